"""Models of transformers in ordinary use: trained by fit, every linear layer as in PEFT, tables resized, accelerate."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lora_edu.lora import add_lora, lora_layers, remove_lora, trainable_parameters
from lora_edu.training import Batches, evaluate, fit

accelerate_hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2(tied=True):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config)


TOKENS = torch.arange(2000) * 7 % 40  # each token follows from the one before
IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_fit_trains_a_model_of_transformers(make, tmp_path):
    model = add_lora(make(tied=False), 4, 8, ["all-linear", "lm_head"])
    before = evaluate(model, TOKENS[:200], context=16)
    inputs, targets = TOKENS[None, :16], TOKENS[None, 1:17]
    logits = model.eval()(inputs).logits
    assert evaluate(model, TOKENS[:17], context=16) == pytest.approx(
        nn.functional.cross_entropy(logits[0], targets[0]).item(), rel=1e-5
    )
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=2e-2)
    path = str(tmp_path / "run.safetensors")
    fit(model, Batches(TOKENS, batch=8, context=16), optimizer, 40, checkpoint=path, progress=False)
    assert evaluate(model, TOKENS[:200], context=16) < before - 0.5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_all_linear_is_what_peft_adapts(make, tied):
    ours = list(lora_layers(add_lora(make(tied), 2, 4, "all-linear")))
    theirs = peft.get_peft_model(make(tied), peft.LoraConfig(r=2, target_modules="all-linear"))
    layers = [name for name, each in theirs.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
    assert ours == [name.removeprefix("base_model.model.") for name in layers]


def test_a_tied_head_is_left_out_of_every_linear_layer():
    with pytest.warns(UserWarning, match="lm_head left out: the weight is also model.embed_tokens.weight"):
        model = add_lora(llama(tied=True), 2, 4, [nn.Linear])
    assert list(lora_layers(model)) == list(lora_layers(add_lora(llama(), 2, 4, "all-linear")))
    assert type(model.lm_head) is nn.Linear


# resize_token_embeddings


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("rows", [36, 48])
def test_resizing_under_lora_is_refused_and_possible_without(target, rows):
    model = add_lora(llama(), 2, 4, [target, "q_proj"])
    said = rf"resize_token_embeddings\({rows}\).*factors are for 40 tokens.*Resize first, then add_lora"
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=said):
            each.resize_token_embeddings(rows)
        assert each(IDS).logits.shape == (2, 6, 40) and target in " ".join(lora_layers(each))
        each.resize_token_embeddings(40)  # what many scripts call, whether it changes anything or not
        each.resize_token_embeddings(37, pad_to_multiple_of=8)
        remove_lora(each)
        each.resize_token_embeddings(rows)
        assert add_lora(each, 2, 4, [target, "q_proj"])(IDS).logits.shape == (2, 6, rows)


def test_resizing_is_as_ever_where_neither_end_has_lora():
    model = add_lora(llama(), 2, 4, "q_proj")
    model.resize_token_embeddings(48)
    assert model(IDS).logits.shape == (2, 6, 48) and list(lora_layers(model)) == [
        "model.layers.0.self_attn.q_proj"
    ]


# accelerate


def test_accelerates_hooks_are_named_with_the_way_out():
    model = llama()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            accelerate_hooks.add_hook_to_module(module, accelerate_hooks.AlignDevicesHook("cpu"))
    for target, kind in (("q_proj", "Linear"), ("embed_tokens", "Embedding")):
        said = (
            rf"{target}: {kind} carries accelerate's hooks .*remove_hook_from_module\(model, recurse=True\)"
        )
        with pytest.raises(TypeError, match=said):
            add_lora(model, 2, 4, target)
    accelerate_hooks.remove_hook_from_module(model, recurse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(lora_layers(add_lora(model, 2, 4, ["q_proj", "embed_tokens"]))) == 2
