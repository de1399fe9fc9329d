"""Prompts and prefixes give what PEFT gives: outputs, gradients, generated text, and files both ways."""

import copy
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_edu.lora import AdapterError, trainable_parameters
from lora_edu.training import Batches, fit
from lora_edu.tuning import (
    fold_p_tuning,
    fold_prefix_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    remove_p_tuning,
    remove_prefix_tuning,
    remove_prompt_tuning,
)
from lora_edu.tuning.applied import applied
from lora_edu.tuning.p_tuning import from_peft as p_from_peft
from lora_edu.tuning.p_tuning import to_peft as p_to_peft
from lora_edu.tuning.prefix_tuning import from_peft as prefix_from_peft
from lora_edu.tuning.prefix_tuning import to_peft as prefix_to_peft
from lora_edu.tuning.prompt_tuning import from_peft as prompt_from_peft
from lora_edu.tuning.prompt_tuning import to_peft as prompt_to_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`past_key_values` is deprecated:FutureWarning"
    ),  # what PEFT still says
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS = 32
IDS = torch.arange(16).reshape(2, 8) * 7 % 40  # without 39, the padding
LEFT = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
RIGHT = LEFT.flip(1)
TOKENS = torch.arange(2000) * 7 % 40


def gpt2():
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config)


def llama(heads=2):
    config = transformers.LlamaConfig(
        **SIZES,
        intermediate_size=24,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def opt():
    config = transformers.OPTConfig(
        **SIZES, ffn_dim=24, max_position_embeddings=POSITIONS, word_embed_proj_dim=16, init_std=0.3
    )
    return transformers.OPTForCausalLM(config)


def bert_config():
    sizes = {"intermediate_size": 24, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    return transformers.BertConfig(**SIZES, **sizes)


def bert():
    return transformers.BertModel(bert_config())


def bert_that_classifies():
    return transformers.BertForSequenceClassification(bert_config())


DECODERS = [gpt2, llama, opt]
FAMILIES = [*DECODERS, bert, bert_that_classifies]
PROMPT = (prompt_tuning, {}, peft.PromptTuningConfig, {})
WAYS = {
    "prompt": PROMPT,
    "mlp": (p_tuning, {"hidden": 6}, peft.PromptEncoderConfig, {"encoder_hidden_size": 6}),
    "lstm": (
        p_tuning,
        {"encoder": "lstm", "hidden": 5},
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": (prefix_tuning, {}, peft.PrefixTuningConfig, {}),
    "reparametrised": (
        prefix_tuning,
        {"reparametrise": 7},
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 7},
    ),
}
REMOVE = {
    prompt_tuning: remove_prompt_tuning,
    p_tuning: remove_p_tuning,
    prefix_tuning: remove_prefix_tuning,
}
TO_PEFT = {prompt_tuning: prompt_to_peft, p_tuning: p_to_peft, prefix_tuning: prefix_to_peft}
FROM_PEFT = {prompt_tuning: prompt_from_peft, p_tuning: p_from_peft, prefix_tuning: prefix_from_peft}
every_family = pytest.mark.parametrize("make", FAMILIES)
every_decoder = pytest.mark.parametrize("make", DECODERS)
every_way = pytest.mark.parametrize("way", WAYS)


@functools.cache
def base_of(make):
    torch.manual_seed(0)
    return make().double().eval()


def built(make):
    return copy.deepcopy(base_of(make))


def task(make):
    return "CAUSAL_LM" if make in DECODERS else "FEATURE_EXTRACTION"


def ours(make, way, tokens=4, **more):
    method, options, _, _ = WAYS[way]
    return method(built(make), tokens, **options | more).eval()


def theirs(make, way, tokens=4, model=None, kind=None):
    """PEFT's model, with the trained numbers of ours where it is given."""
    _, _, config, options = WAYS[way]
    kind = kind or task(make)
    wrapped = peft.get_peft_model(built(make), config(task_type=kind, num_virtual_tokens=tokens, **options))
    wrapped = wrapped.double().eval()
    if model is not None:
        for mine, other in pairs(model, wrapped):
            other.data.copy_(mine.data)
    return wrapped


def pairs(model, wrapped):
    """Our trained parameters beside PEFT's, by what they are."""
    mine = dict(getattr(model, applied(model)).named_parameters())
    other = dict(wrapped.prompt_encoder["default"].named_parameters())
    names = {"embeddings": "embedding.weight", "values": "embedding.weight"}

    def called(name):
        name = name.replace("mlp.", "transform." if "transform.0.weight" in other else "mlp_head.")
        return names.get(name, name.replace("lstm.", "lstm_head."))

    assert {called(name) for name in mine} == set(other)
    return [(parameter, other[called(name)]) for name, parameter in mine.items()]


def first(output):
    return output[0]


def own(wrapped_output, tokens=4):
    """Of PEFT's output the reader's own tokens; it keeps the virtual positions of a prompt."""
    values = wrapped_output[0]
    return values[:, -IDS.shape[1] :] if values.dim() == 3 else values


def far(one, other):
    return (one - other).abs().max().item()


def test_families_look_somewhere_in_particular():
    """A comparison of models that ignore what is far away would show nothing."""
    for make in FAMILIES:
        model = built(make)
        changed = IDS.clone()
        changed[:, 0] += 1
        assert far(first(model(changed))[:, -1], first(model(IDS))[:, -1]) > 1e-2


# The same numbers as PEFT


@every_way
@every_family
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
def test_outputs_and_gradients_are_pefts(make, way, mask):
    model = ours(make, way)
    wrapped = theirs(make, way, model=model)
    mine, other = first(model(IDS, attention_mask=mask)), own(wrapped(IDS, attention_mask=mask))
    assert mine.shape == other.shape and far(mine, other) < 1e-12
    base = built(make)
    assert far(mine, first(base(IDS, attention_mask=mask))) > 1e-2
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=mine.dtype)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    for one, two in pairs(model, wrapped):
        scale = two.grad.abs().max().item()
        assert scale > 1e-6 and far(one.grad, two.grad) < 1e-12 * max(scale, 1)
    assert {name for name, each in model.named_parameters() if each.grad is not None} == {
        name for name, each in model.named_parameters() if each.requires_grad
    }


@pytest.mark.slow
@every_way
@every_decoder
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 20))
@settings(max_examples=3, deadline=None)
def test_lengths_do_not_matter(make, way, tokens, batch, time):
    model = ours(make, way, tokens)
    ids = torch.arange(batch * time).reshape(batch, time) * 11 % 40
    other = theirs(make, way, tokens, model)(ids)[0][:, -time:]
    assert far(model(ids)[0], other) < 1e-12


@pytest.mark.slow
@every_way
@every_decoder
def test_generated_text_is_pefts_with_and_without_a_cache(make, way):
    """PEFT's own words one at a time: its `generate` doesn't know that transformers calls the cache `cache` by now."""
    model = ours(make, way)
    wrapped = theirs(make, way, model=model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 39, "eos_token_id": None}
    mine = model.generate(IDS, **options)
    assert torch.equal(mine, model.generate(IDS, use_cache=False, **options))
    for each in (model, wrapped):
        step_by_step = IDS
        for _ in range(5):
            following = each(step_by_step).logits[:, -1].argmax(-1, keepdim=True)
            step_by_step = torch.cat([step_by_step, following], dim=1)
        assert torch.equal(mine, step_by_step)
    assert not torch.equal(mine, built(make).generate(IDS, **options))


@pytest.mark.slow
@every_way
@every_decoder
def test_padding_at_the_left_changes_no_generated_word(make, way):
    """Each text alone, and both in one batch with positions counted from the mask, as generate counts them."""
    model = ours(make, way)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 39, "eos_token_id": None}
    together = model.generate(IDS, attention_mask=LEFT, **options)
    assert torch.equal(together[1, 8:], model.generate(IDS[1:, 3:], **options)[0, 5:])
    assert torch.equal(together[0], model.generate(IDS[:1], **options)[0])


# Real tokens


@pytest.mark.parametrize("make", [*DECODERS, bert])
def test_a_prompt_of_real_tokens_is_these_tokens_before_the_text(make):
    before = [3, 1, 4, 1, 5]
    together = torch.cat([torch.tensor(before).expand(2, -1), IDS], dim=1)
    expected = first(built(make)(together))[:, 5:]
    model = prompt_tuning(built(make), 5, init=before)
    assert far(first(model(IDS)), expected) < 1e-12
    assert far(first(model(inputs_embeds=model.get_input_embeddings()(IDS))), expected) < 1e-12


@every_decoder
def test_a_prefix_of_real_tokens_is_these_tokens_before_the_text(make):
    before = [3, 1, 4, 1, 5]
    together = torch.cat([torch.tensor(before).expand(2, -1), IDS], dim=1)
    expected = built(make)(together).logits[:, 5:]
    assert far(prefix_tuning(built(make), 5, init=before)(IDS).logits, expected) < 1e-12


def test_virtual_tokens_do_not_see_the_text_in_a_decoder():
    model, seen = prompt_tuning(built(gpt2), 4), []
    model.transformer.h[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDS), model((IDS + 1) % 40)
    one, other = (each[0] if isinstance(each, tuple) else each for each in seen)
    assert torch.equal(one[:, :4], other[:, :4]) and far(one[:, 4:], other[:, 4:]) > 0.1


# What else a model of transformers returns


@every_way
@pytest.mark.parametrize("make", [*DECODERS, bert])
def test_hidden_states_and_attention_are_of_the_readers_own_tokens(make, way):
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation("eager")
    method, options, _, _ = WAYS[way]
    method(model.eval(), 4, **options)
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [each.shape[:2] for each in output.hidden_states] == [(2, 8)] * 3
    assert [each.shape for each in output.attentions] == [(2, 4, 8, 12)] * 2
    for each in output.attentions:
        assert torch.allclose(each.sum(-1), torch.ones(2, 4, 8), atol=1e-5)
    as_tuple = model(IDS, return_dict=False)
    assert torch.equal(as_tuple[0], first(output))


@every_way
@every_decoder
def test_a_loss_is_that_of_the_next_own_token(make, way):
    model = ours(make, way)
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    assert far(model(IDS, labels=IDS).loss.double(), expected) < 1e-5


@every_way
@every_decoder
def test_a_cache_goes_on_where_it_stood(make, way):
    model = ours(make, way)
    whole = model(IDS).logits
    half = model(IDS[:, :5], use_cache=True)
    name = "cache" if "cache" in half else "past_key_values"
    rest = model(IDS[:, 5:], **{name: half[name]}).logits
    assert far(torch.cat([half.logits, rest], dim=1), whole) < 1e-12


@pytest.mark.parametrize("way", ["prompt", "mlp", "lstm"])
def test_a_head_for_sequences_reads_what_it_reads_in_peft(way):
    """The pooler's first token is a virtual one; the virtual tokens' type is the first."""
    kinds = torch.tensor([[0] * 4 + [1] * 4] * 2)
    model = ours(bert_that_classifies, way)
    wrapped = theirs(bert_that_classifies, way, model=model, kind="SEQ_CLS")
    mine = model(IDS, token_type_ids=kinds).logits
    assert far(mine, wrapped(IDS, token_type_ids=kinds).logits) < 1e-12
    assert far(mine, model(IDS).logits) > 1e-2


# In and out


@every_way
@every_family
def test_taken_out_the_model_is_as_it_was_and_so_is_a_copy(make, way):
    model = built(make)
    before = {name: (id(each), each.detach().clone()) for name, each in model.named_parameters()}
    attributes, expected = set(vars(model)), first(model(IDS))
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]
    method, options, _, _ = WAYS[way]
    method(model, 4, **options)
    twin, tuned = copy.deepcopy(model), first(model(IDS))
    for each in trainable_parameters(twin):
        each.data.add_(torch.randn_like(each))
    assert far(first(twin(IDS)), tuned) > 1e-4 and torch.equal(first(model(IDS)), tuned)
    for each in (model, twin):
        REMOVE[method](each)
        assert torch.equal(first(each(IDS)), expected) and set(vars(each)) == attributes
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in each.modules()]
        assert all(parameter.requires_grad for parameter in each.parameters())
    now = {name: (id(each), each) for name, each in model.named_parameters()}
    assert now.keys() == before.keys()
    assert all(now[name][0] == i and torch.equal(now[name][1], value) for name, (i, value) in before.items())


@every_way
@every_decoder
def test_fit_trains_what_is_virtual_and_nothing_else(make, way):
    model = ours(make, way).float()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    trained = trainable_parameters(model)
    history = fit(model, Batches(TOKENS, 8, 16), torch.optim.Adam(trained, lr=0.1), 3, progress=False)
    assert history.steps[-1]["loss"] != history.steps[0]["loss"]
    changed = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == {name for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    "way, fold", [("mlp", fold_p_tuning), ("lstm", fold_p_tuning), ("reparametrised", fold_prefix_tuning)]
)
@every_family
def test_folded_it_is_the_same(make, way, fold):
    model = ours(make, way)
    expected, base = first(model(IDS)), built(make)
    assert far(first(fold(model)(IDS)), expected) < 1e-12
    REMOVE[prompt_tuning if fold is fold_p_tuning else prefix_tuning](model)
    assert torch.equal(first(model(IDS)), first(base(IDS)))


# Files


def written(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@every_way
@every_family
def test_peft_opens_what_is_stored(make, way, tmp_path):
    model = ours(make, way)
    config, tensors = TO_PEFT[WAYS[way][0]](model)
    tensors = {
        name: each.float() for name, each in tensors.items()
    }  # PEFT opens in float32 whatever is stored
    wrapped = peft.PeftModel.from_pretrained(built(make), written(tmp_path / "ours", config, tensors))
    opened, mine = own(wrapped.double().eval()(IDS)), FROM_PEFT[WAYS[way][0]](built(make), config, tensors)
    assert far(first(mine(IDS)), opened) < 1e-12 and far(first(model(IDS)), opened) < 1e-6
    assert set(config) <= set(wrapped.peft_config["default"].to_dict()), "no key that PEFT doesn't have"


@every_way
@pytest.mark.parametrize("make", [*DECODERS, bert])
def test_what_peft_stores_opens_here(make, way, tmp_path):
    wrapped = theirs(make, way)
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    tensors, method = load_file(tmp_path / "adapter_model.safetensors"), WAYS[way][0]
    model = FROM_PEFT[method](built(make), config, tensors)
    assert applied(model) == ("prefix_tuning" if method is prefix_tuning else "prompt_tuning")
    assert far(first(model(IDS)), own(wrapped(IDS))) < 1e-12
    (values,) = trainable_parameters(model)
    assert torch.equal(values, tensors["prompt_embeddings"].to(values))


def test_a_head_trained_beside_a_prompt_is_named(tmp_path):
    theirs(bert_that_classifies, "prompt", kind="SEQ_CLS").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) > 1, "PEFT stores the classifier too"
    with pytest.raises(
        AdapterError, match="a head trained beside it is not supported; the file holds .*classifier"
    ):
        prompt_from_peft(built(bert_that_classifies), config, tensors)


@pytest.mark.parametrize(
    "way, change, message",
    [
        ("prompt", {"num_virtual_tokens": 5}, "num_virtual_tokens 5, the file holds 4"),
        ("prompt", {"num_virtual_tokens": "many"}, "num_virtual_tokens 'many', the file holds 4"),
        (
            "mlp",
            {"num_transformer_submodules": 2},
            r"for an encoder and a decoder \(num_transformer_submodules 2\)",
        ),
        ("prefix", {"num_layers": 3}, "num_layers is 3 in the file and 2 in the model"),
        ("prefix", {"num_attention_heads": 8}, "num_attention_heads is 8 in the file and 2 in the model"),
        ("prefix", {"token_dim": [16]}, r"token_dim is \[16\] in the file and 8 in the model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(way, change, message):
    method = WAYS[way][0]
    config, tensors = TO_PEFT[method](ours(llama, way))
    model = built(llama)
    with pytest.raises(AdapterError, match=message):
        FROM_PEFT[method](model, config | change, tensors)
    assert applied(model) is None and torch.equal(first(model(IDS)), first(built(llama)(IDS)))


def test_a_prefix_is_as_wide_as_the_keys():
    """Grouped-query attention: 2 of 4 heads have keys of their own."""
    assert trainable_parameters(prefix_tuning(built(llama), 3))[0].shape == (3, 2 * 2 * 8)
    assert trainable_parameters(prefix_tuning(built(lambda: llama(4)), 3))[0].shape == (3, 2 * 2 * 16)


# What is refused


@every_way
@every_family
def test_text_that_no_longer_fits_is_refused_with_the_way_out(make, way):
    model = ours(make, way)
    model(TOKENS[None, :28])
    said = (
        "29 tokens of text and 4 virtual ones are more than this model's 32 positions; give at most 28 tokens"
    )
    with pytest.raises(ValueError, match=said):
        model(TOKENS[None, :29])


@pytest.mark.slow
@every_way
@every_decoder
def test_generation_ends_with_the_positions(make, way):
    model = ours(make, way)
    options = {"do_sample": False, "pad_token_id": 39, "eos_token_id": None}
    assert model.generate(IDS, max_new_tokens=21, **options).shape == (2, 29)
    with pytest.raises(ValueError, match="29 tokens of text and 4 virtual ones are more than"):
        model.generate(IDS, max_new_tokens=22, **options)


@every_way
def test_a_mask_that_is_no_row_a_text_is_refused(way):
    model = ours(gpt2, way)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, time\); got \(2, 1, 8, 8\)"):
        model(IDS, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))


@every_way
def test_an_encoder_with_a_decoder_is_refused(way):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    method, options, _, _ = WAYS[way]
    with pytest.raises(TypeError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        method(transformers.T5ForConditionalGeneration(config), 4, **options)


def test_a_model_that_keeps_no_keys_has_no_prefix_but_may_have_a_prompt():
    config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    model = transformers.DistilBertModel(config)
    with pytest.raises(TypeError, match="takes no cache of keys and values.*prompt_tuning works without"):
        prefix_tuning(model, 4)
    assert prompt_tuning(model, 4)(IDS)[0].shape == (2, 8, 16)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_would_drop_a_prefix_and_is_refused(make):
    model = ours(make, "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"gradient checkpointing.*gradient_checkpointing_disable\(\)"):
        model(IDS)
    model.gradient_checkpointing_disable()
    model(IDS)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_changes_nothing_for_a_prompt(make):
    model = ours(make, "prompt")
    model(IDS).logits.sum().backward()
    (prompt,) = trainable_parameters(model)
    expected, prompt.grad = prompt.grad, None
    for module in model.modules():  # training mode, without dropout
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(IDS).logits.sum().backward()
    assert far(prompt.grad, expected) < 1e-12
