"""Adapters between this package and PEFT: either opens the other's folder, and the outputs are equal."""

import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_edu.lora import add_lora, load_adapter, lora_layers, merge_lora, remove_lora, save_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT's own warnings: fan_in_fan_out, saved embeddings, tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert():
    return transformers.BertModel(
        transformers.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=32)
    )


def gpt2():
    config = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=False
        )
    )


def opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, tie_word_embeddings=True
        )
    )


# the model's maker; targets beside the embedding; the embedding; a pattern that matches some of the targets
KINDS = {
    "BERT": (
        bert,
        ["query", "value", "intermediate.dense"],
        "word_embeddings",
        "layer.1.attention.self.query",
    ),
    "GPT-2": (gpt2, ["c_attn", "mlp.c_proj"], "wte", "h.0.attn.c_attn"),
    "Llama": (
        llama,
        ["q_proj", "k_proj", "down_proj", "lm_head"],
        "embed_tokens",
        "layers.0.self_attn.q_proj",
    ),
    "OPT": (opt, ["q_proj", "v_proj", "fc1"], "embed_tokens", "layers.1.self_attn.v_proj"),
}
TOKENS = torch.arange(40).reshape(2, 20)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= 10  # so that every layer matters to the outputs
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def randomise(model: nn.Module) -> None:
    """Factors as after training: all of them non-zero, but for the padding row."""
    torch.manual_seed(1)
    layers = lora_layers(model).values()
    padding = {id(each.lora_A): each.padding_idx for each in layers if isinstance(each, nn.Embedding)}
    for _, module in model.named_modules():
        if hasattr(module, "lora_embedding_A") and "default" in module.lora_embedding_A:
            padding[id(module.lora_embedding_A["default"])] = module.base_layer.padding_idx
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data = 0.3 * torch.randn_like(each)
            row = padding.get(id(each))
            if row is not None:
                (each.data.T if "lora_embedding" in name else each.data)[row] = 0


@st.composite
def settings_of_an_adapter(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    _, linear, embedding, pattern = KINDS[kind]
    return {
        "kind": kind,
        "targets": sorted(draw(st.sets(st.sampled_from([*linear, embedding]), min_size=1))),
        "rank": draw(st.integers(1, 6)),
        "alpha": draw(st.sampled_from([1, 4, 16, 2.5])),
        "rslora": draw(st.booleans()),
        "rank_pattern": draw(st.sampled_from([{}, {pattern: 3}, {f"^.*{pattern}": 2}])),
        "alpha_pattern": draw(st.sampled_from([{}, {pattern: 7}, {linear[0]: 0.5}])),
    }


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(settings_of_an_adapter())
def test_we_open_what_peft_wrote(tmp_path_factory, s):
    folder = tmp_path_factory.mktemp("peft")
    config = peft.LoraConfig(
        r=s["rank"],
        lora_alpha=s["alpha"],
        target_modules=s["targets"],
        use_rslora=s["rslora"],
        rank_pattern=s["rank_pattern"],
        alpha_pattern=s["alpha_pattern"],
    )
    theirs = peft.get_peft_model(base(s["kind"]), config)
    randomise(theirs)
    theirs.eval().save_pretrained(folder)
    expected = outputs(theirs)

    model = base(s["kind"])
    plain = outputs(model)
    assert load_adapter(model, folder) is model
    distance = (outputs(model) - expected).abs().max()
    assert distance <= 1e-5 * expected.abs().max() and 100 * distance < (plain - expected).abs().max()
    trainable = [name for name, each in model.named_parameters() if each.requires_grad]
    assert len(trainable) == 2 * len(lora_layers(model)) and all("lora_" in name for name in trainable)
    merge_lora(model)
    assert torch.allclose(outputs(model), expected, rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert torch.equal(outputs(model), plain)


@few
@given(settings_of_an_adapter(), st.booleans())
def test_peft_opens_what_we_wrote(tmp_path_factory, s, merged):
    folder = tmp_path_factory.mktemp("ours")
    model = base(s["kind"])
    ranks = {target: s["rank"] + (number % 2) for number, target in enumerate(s["targets"])}
    alphas = {target: s["alpha"] + 2 * (number % 3 == 2) for number, target in enumerate(s["targets"])}
    add_lora(model, ranks, alphas, s["targets"], rank_stabilised=s["rslora"], tied="separate")
    randomise(model)
    expected = outputs(model)
    if merged:
        merge_lora(model)
    save_adapter(model, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base(s["kind"]), folder).eval()
    assert not [
        each for each in caught if "missing" in str(each.message) or "unexpected" in str(each.message)
    ]
    assert torch.allclose(outputs(theirs), expected, rtol=1e-4, atol=1e-5)
    again = load_adapter(base(s["kind"]), folder)
    assert torch.equal(outputs(again), expected)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|up_proj)$"])
def test_targets_as_a_pattern(tmp_path, targets):
    theirs = peft.get_peft_model(base("Llama"), peft.LoraConfig(r=2, target_modules=targets))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    assert torch.allclose(
        outputs(load_adapter(base("Llama"), tmp_path)), outputs(theirs), rtol=1e-4, atol=1e-5
    )


def test_one_layer_of_several_with_the_same_ending(tmp_path):
    """The short names would say too much, so that the file has full names or a pattern."""
    nested = nn.ModuleDict({"query": nn.Linear(4, 4), "inner": nn.ModuleDict({"query": nn.Linear(4, 4)})})
    add_lora(nested, 2, 4, "inner.query")
    randomise(nested)
    save_adapter(nested, tmp_path / "one")
    other = nn.ModuleDict({"query": nn.Linear(4, 4), "inner": nn.ModuleDict({"query": nn.Linear(4, 4)})})
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "one")
    assert [name for name, _ in theirs.named_parameters() if "lora_A" in name] == [
        "base_model.model.inner.query.lora_A.default.weight"
    ]


def test_only_the_outer_layer(tmp_path):
    make = lambda: nn.ModuleDict(
        {"query": nn.Linear(4, 4), "inner": nn.ModuleDict({"query": nn.Linear(4, 4)})}
    )
    model = add_lora(make(), 2, 4, re.compile("query"))
    assert set(lora_layers(model)) == {"query"}
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert [name for name, _ in theirs.named_parameters() if "lora_A" in name] == [
        "base_model.model.query.lora_A.default.weight"
    ]


def test_half_precision_model_with_float32_factors(tmp_path):
    """PEFT keeps the factors of a bfloat16 model in float32; so do we when we open them."""
    theirs = peft.get_peft_model(base("Llama").bfloat16(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = load_adapter(base("Llama").bfloat16(), tmp_path)
    assert next(iter(lora_layers(model).values())).lora_A.dtype == torch.float32
    assert torch.allclose(outputs(model).float(), outputs(theirs).float(), rtol=0.05, atol=0.02)


def test_rank_above_the_smaller_side_is_accepted_from_a_file(tmp_path):
    theirs = peft.get_peft_model(
        base("Llama"), peft.LoraConfig(r=64, target_modules=["q_proj", "embed_tokens"])
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = load_adapter(base("Llama"), tmp_path)
    assert {each.rank for each in lora_layers(model).values()} == {64}
    assert torch.allclose(outputs(model), outputs(theirs), rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path / "again")
    assert torch.equal(outputs(load_adapter(base("Llama"), tmp_path / "again")), outputs(model))


def test_padding_row_that_is_not_zero_is_kept_and_said(tmp_path):
    """Where the two packages differ: PEFT adds ΔW at the padding token."""
    theirs = peft.get_peft_model(base("BERT"), peft.LoraConfig(r=2, target_modules=["word_embeddings"]))
    randomise(theirs)
    table = theirs.base_model.model.embeddings.word_embeddings
    table.lora_embedding_A["default"].data[:, 0] = 1.0
    theirs.eval().save_pretrained(tmp_path)
    model = base("BERT")
    with pytest.warns(UserWarning, match=r"row of the padding token 0 isn't zero. It is kept, but not added"):
        load_adapter(model, tmp_path)
    ours = model.embeddings.word_embeddings
    assert torch.equal(ours(torch.tensor([0])), ours.weight[:1])
    assert not torch.allclose(table(torch.tensor([0])), ours.weight[:1], atol=1e-2)
    assert torch.allclose(ours(torch.tensor([5])), table(torch.tensor([5])), atol=1e-5)
    assert ours.lora_A[0].eq(1).all()


def feature(name):
    """An adapter that PEFT wrote with one of its features on."""
    options = {
        "DoRA": {"use_dora": True},
        "bias": {"bias": "all"},
        "lora_bias": {"lora_bias": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        "target_parameters": {"target_parameters": ["up_proj.weight"]},
        "PiSSA": {"init_lora_weights": "pissa"},
        "OLoRA": {"init_lora_weights": "olora"},
        "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    }[name]
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DoRA", "use_dora=True isn't supported .DoRA"),
        ("lora_bias", "lora_bias=True isn't supported"),
        ("target_parameters", "target_parameters=.*isn't supported"),
        ("PiSSA", "init_lora_weights=pissa isn't supported: it changes the base weights"),
        ("OLoRA", "init_lora_weights=olora isn't supported"),
        ("layer_replication", "layer_replication=.*isn't supported"),
    ],
)
def test_features_that_are_not_here_are_refused_by_name(tmp_path, name, message):
    peft.get_peft_model(base("Llama"), feature(name)).save_pretrained(tmp_path)
    model = base("Llama")
    before = [(each, id(module)) for each, module in model.named_modules()], outputs(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert [(each, id(module)) for each, module in model.named_modules()] == before[0]
    assert torch.equal(outputs(model), before[1]) and all(each.requires_grad for each in model.parameters())


def test_other_methods_of_peft_are_refused_by_name(tmp_path):
    peft.get_peft_model(
        base("Llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type must be LORA; this adapter is IA3"):
        load_adapter(base("Llama"), tmp_path)


@pytest.mark.parametrize("name", ["bias", "modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("kind", ["Llama", "OPT"])
def test_what_was_trained_beside_lora_comes_along(tmp_path, name, kind):
    """Biases, whole modules and single token rows: PEFT's outputs, there and back, and the base again afterwards."""
    theirs = peft.get_peft_model(base(kind), feature(name))
    torch.manual_seed(5)
    for each in theirs.parameters():
        if each.requires_grad:
            each.data += 0.1 * torch.randn_like(each)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = base(kind)
    before = outputs(model)
    load_adapter(model, tmp_path / "theirs")
    assert torch.allclose(outputs(model), outputs(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    assert torch.allclose(outputs(again), outputs(theirs), rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert torch.equal(outputs(model), before)


def test_a_changed_table_beside_the_adapter_is_taken_as_peft_takes_it(tmp_path):
    """PEFT stores an adapted embedding's own table too, and loads it over the model's."""
    theirs = peft.get_peft_model(base("OPT"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    theirs.base_model.model.model.decoder.embed_tokens.base_layer.weight.data += 1
    theirs.eval().save_pretrained(tmp_path)
    model = base("OPT")
    before = outputs(model)
    with pytest.warns(UserWarning, match="holds its own model.decoder.embed_tokens.weight, other than the"):
        load_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(base("OPT"), tmp_path).eval()
    assert torch.allclose(outputs(model), outputs(again), rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert torch.equal(outputs(model), before)


def test_adapter_of_another_model_is_refused(tmp_path):
    peft.get_peft_model(base("OPT"), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"for another model: 2 of its 2 layers are not in this one, such as model.dec"
    ):
        load_adapter(base("Llama"), tmp_path)
    wider = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **{**SMALL, "hidden_size": 32}, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=32
        )
    )
    with pytest.raises(ValueError, match=r"q_proj is 16 × 16 in the adapter and 32 × 32 in the model"):
        load_adapter(wider, tmp_path)


def test_scaled_embedding_is_refused():
    """Gemma multiplies its embedding's output: a plain LoRA layer would lose that."""
    config = transformers.Gemma3TextConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8)
    model = transformers.Gemma3ForCausalLM(config)
    with pytest.raises(TypeError, match=r"Gemma3TextScaledWordEmbedding changes what nn.Embedding computes"):
        add_lora(model, 2, 4, "embed_tokens", tied="separate")
    with pytest.raises(TypeError, match="OPTLearnedPositionalEmbedding changes what"):
        add_lora(base("OPT"), 2, 4, "embed_positions")


def test_tied_models_of_transformers_are_recognised():
    for kind in ("GPT-2", "OPT"):
        with pytest.raises(ValueError, match=r"tied"):
            add_lora(base(kind), 2, 4, KINDS[kind][2])
