"""What holds of every method of the room: the base at the start, only its own trained, taken off bit for bit."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TOKENS as IDS
from tiny_models import portrait, tiny
from torch import nn

from lora_edu.lora import add_lora, trainable_parameters
from lora_edu.lora.inject import find_layers
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, fit
from lora_edu.tuning import (
    applied,
    bitfit,
    bottleneck,
    ia3,
    remove_bitfit,
    remove_bottleneck,
    remove_ia3,
    stored_parameters,
    subspace,
    trained_parameters,
)
from lora_edu.tuning.applied import applied_options, mark, take_off

STREAM = torch.arange(2000) * 7 % 40
METHODS = {
    "bitfit": (bitfit, {}, remove_bitfit),
    "bitfit of some, and the head": (bitfit, {"targets": ["query", "mlp.up"], "head": "head"}, remove_bitfit),
    "houlsby": (bottleneck, {"width": 3}, remove_bottleneck),
    "houlsby with norms": (bottleneck, {"width": 2, "norms": True, "activation": "tanh"}, remove_bottleneck),
    "pfeiffer": (bottleneck, {"width": 3, "placement": "pfeiffer"}, remove_bottleneck),
    "ia3": (ia3, {}, remove_ia3),
    "ia3 of values": (ia3, {"outputs": "value", "inputs": []}, remove_ia3),
}


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 16} | options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def hooks(model):
    return [name for name, each in model.named_modules() if each._forward_hooks or each._forward_pre_hooks]


def train(model, steps=3):
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    return fit(
        model, Batches(STREAM, batch=4, context=16), optimizer, steps, schedule=lambda _: 1.0, progress=False
    )


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_starts_at_the_base_trains_its_own_alone_and_comes_off_bit_for_bit(kind):
    method, options, remove = METHODS[kind]
    base, model = small(), small()
    for each in (base, model):  # what was frozen stays so afterwards
        each.eval().embedding.requires_grad_(False)
    before = portrait(model)
    assert method(model, **options) is model and applied(model) == method.__name__
    assert torch.equal(model(STREAM[None, :16]), base(STREAM[None, :16]))
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    at_the_start = {name: each.detach().clone() for name, each in model.named_parameters()}
    losses = [row["loss"] for row in train(model).steps]
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, at_the_start[name]) != (name in trained), name
        assert (parameter.grad is not None) == (name in trained), name
    assert remove(model) is model and applied(model) is None and not hooks(model)
    assert portrait(model) == before
    assert [type(each) for each in model.modules()] == [type(each) for each in base.modules()]
    for (name, parameter), original in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(parameter, original) and parameter.requires_grad == original.requires_grad, name
    assert list(model.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("kind", METHODS)
def test_a_deep_copy_is_tuned_and_comes_off_by_itself(kind):
    method, options, remove = METHODS[kind]
    base, model = small(), method(small(), **options)
    twin = copy.deepcopy(model)
    train(twin)
    tokens = STREAM[None, :16]
    assert torch.equal(model(tokens), base(tokens)) and not torch.equal(twin(tokens), base(tokens))
    remove(twin)
    assert torch.equal(twin(tokens), base(tokens)) and applied(model) == method.__name__
    train(model)
    assert not torch.equal(model(tokens), base(tokens)) and torch.equal(twin(tokens), base(tokens))


@pytest.mark.parametrize("kind", ["houlsby", "houlsby with norms", "pfeiffer", "ia3", "ia3 of values"])
def test_the_options_kept_make_the_same_shapes_on_another_model(kind):
    method, options, _ = METHODS[kind]
    model = method(small(), **options)
    twin = method(small(seed=1), **applied_options(model))
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in twin.named_parameters()
    ]


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_trained_is_what_is_stored(kind):
    method, options, _ = METHODS[kind]
    model = method(small(), **options)
    assert (
        trained_parameters(model)
        == stored_parameters(model)
        == sum(p.numel() for p in trainable_parameters(model))
    )


@pytest.mark.parametrize("kind", METHODS)
def test_half_precision_starts_at_the_base_and_trains(kind):
    method, options, remove = METHODS[kind]
    base, model = small().bfloat16(), method(small().bfloat16(), **options)
    tokens = STREAM[None, :16]
    assert torch.equal(model(tokens), base(tokens)) and model(tokens).dtype == torch.bfloat16
    train(model)
    assert not torch.equal(model(tokens), base(tokens))
    assert torch.equal(remove(model)(tokens), base(tokens))


@pytest.mark.parametrize("first", ["bitfit", "houlsby", "ia3"])
@pytest.mark.parametrize("second", ["bitfit", "pfeiffer", "ia3"])
def test_a_second_method_is_refused_and_says_how_the_first_comes_off(first, second):
    model = METHODS[first][0](small(), **METHODS[first][1])
    name, before = applied(model), portrait(model)
    with pytest.raises(
        ValueError, match=rf"the model has {name} already; remove_{name}\(model\) takes it off"
    ):
        METHODS[second][0](model, **METHODS[second][1])
    for other in (lambda: add_lora(model, 2, 4, "query"), lambda: subspace(model, 3)):
        with pytest.raises(ValueError, match=rf"the model has {name} already; remove_{name}"):
            other()
    assert portrait(model) == before


def test_lora_and_a_subspace_are_refused_beside_a_method():
    with pytest.raises(ValueError, match=r"has LoRA already; remove_lora\(model\)"):
        ia3(add_lora(small(), 2, 4, "query"))
    model = small()
    subspace(model, 3)
    with pytest.raises(ValueError, match=r"has a `subspace` already; remove_subspace\(model\)"):
        bitfit(model)


@pytest.mark.parametrize("remove", [remove_bitfit, remove_bottleneck, remove_ia3])
def test_nothing_or_another_method_is_not_taken_off(remove):
    name = remove.__name__.removeprefix("remove_")
    with pytest.raises(ValueError, match=f"the model has no {name} to take off"):
        remove(small())
    other = ia3(small()) if name != "ia3" else bitfit(small())
    with pytest.raises(
        ValueError, match=rf"the model has {applied(other)}, not {name}; remove_{applied(other)}"
    ):
        remove(other)
    with pytest.raises(ValueError, match="no method of lora_edu.tuning"):
        applied_options(small())


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_no_model_and_what_is_wrapped_is_refused(kind):
    method, options, _ = METHODS[kind]
    with pytest.raises(TypeError, match="the model must be an nn.Module; got str"):
        method("TinyLM", **options)


def test_a_model_of_no_known_family_needs_the_names_and_then_works():
    """tests/lora's Tiny has its MLP in an nn.Sequential, so that no name says what a layer is."""
    for method, option in ((lambda m: bottleneck(m, 2), "mlp"), (ia3, "outputs")):
        model = tiny()
        before = portrait(model)
        said = rf"Tiny is of none known here \(TinyLM, BERT.*T5\).*give {option} as names .*named_modules\(\) lists"
        with pytest.raises(ValueError, match=said):
            method(model)
        assert portrait(model) == before
    named = bottleneck(tiny(), 2, mlp="mlp.2", attention="attention.output")
    assert trained_parameters(named) == 2 * 2 * (2 * 8 * 2 + 8 + 2)
    assert trained_parameters(ia3(tiny(), ["key", "value"], "mlp.2")) == 2 * (8 + 8 + 32)
    for model in (named, bitfit(tiny())):
        assert torch.equal(model(IDS), tiny()(IDS))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"outputs": "vlaue", "inputs": []}, ValueError, "no layer matches vlaue; did you mean value"),
        (
            {"outputs": "attention_norm"},
            TypeError,
            r"blocks.0.attention_norm must be a linear layer .*got LayerNorm",
        ),
        ({"inputs": nn.Embedding}, TypeError, "embedding must be a linear layer"),
        ({"outputs": [], "inputs": []}, ValueError, "both empty, so that nothing would be trained"),
        ({"outputs": "mlp.down"}, ValueError, "blocks.0.mlp.down is among outputs and among inputs"),
    ],
)
def test_ia3_says_what_is_wrong_with_the_layers_named(options, error, message):
    model = small()
    before = portrait(model)
    with pytest.raises(error, match=message):
        ia3(model, **options)
    assert portrait(model) == before


def test_a_layer_whose_hooks_are_never_called_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(
        TypeError, match="attention.out_proj: nn.MultiheadAttention reads this weight without"
    ):
        bottleneck(model, 2, mlp="mlp", attention="out_proj")


def test_torchs_own_encoder_layer_calls_what_is_attached_in_inference_too():
    """Its fast path reads weights without calling the layers; with hooks on them it isn't taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    base = model(x)
    ia3(model, [], "linear2")
    assert torch.allclose(model(x), base, atol=1e-6)
    model[0].linear2.ia3.vector.data.fill_(3.0)
    with torch.no_grad():
        assert not torch.allclose(model(x), base, atol=1e-2)


@given(
    st.sets(st.sampled_from([name for name, _ in small().named_parameters()])),
    st.sampled_from(sorted(METHODS)),
)
@settings(max_examples=40, deadline=None)
def test_whatever_was_trainable_is_so_again(trainable, kind):
    method, options, remove = METHODS[kind]
    model = small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    method(model, **options)
    wanted = {"bitfit": "bias", "bottleneck": ".bottleneck.", "ia3": ".ia3."}[method.__name__]
    now = {name for name, each in model.named_parameters() if each.requires_grad}
    extra = {name for name in now if "norm" in name or name == "head.weight"}
    assert now - extra and all(wanted in name for name in now - extra)
    remove(model)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == trainable


def test_names_with_a_meaning_in_patterns_are_taken_literally():
    """A target is a pattern where it has a star; a module's name never does, so nothing is matched by chance."""
    model = small()
    assert list(find_layers(model, ["blocks.*.attention.value"])) == [
        f"blocks.{block}.attention.value" for block in range(2)
    ]
    ia3(model, "blocks.*.attention.value", re.compile(r"blocks\.1\.mlp\.down"))
    assert applied_options(model) == {
        "outputs": ["blocks.0.attention.value", "blocks.1.attention.value"],
        "inputs": ["blocks.1.mlp.down"],
        "queries": False,
    }


def test_a_mark_of_ones_own_freezes_and_gives_back():
    """What the other methods of the room rest on."""
    model = small()
    mark(model, "mine", {"size": 3}, trained=["norm.weight"])
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["norm.weight"]
    model.norm.weight.data.fill_(7.0)
    assert take_off(model, "mine", keep=True).norm.weight[0] == 7 and "tuning_method" not in vars(model)
