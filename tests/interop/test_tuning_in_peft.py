"""The methods of lora_edu.tuning on models of transformers, family by family; (IA)³ against PEFT's, both ways.

Models are tiny, random and in float64; whatever is trained gets random values.
"""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_edu.lora import trainable_parameters
from lora_edu.training import fit
from lora_edu.tuning import (
    Bottleneck,
    applied,
    bitfit,
    bottleneck,
    fold_ia3,
    ia3,
    load_tuned,
    remove_bitfit,
    remove_bottleneck,
    remove_ia3,
    save_tuned,
    stored_parameters,
    trained_parameters,
)
from lora_edu.tuning.ia3 import Scale

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_matrix import FAMILIES  # noqa: E402 (needs both)
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own: fan_in_fan_out, tied weights

NAMES = ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "opt", "bart", "t5"]
WITHOUT_BIASES = {"llama", "t5"}
PEFTS_OWN = [name for name in NAMES if name != "distilbert"]  # whose layers PEFT knows
METHODS = {
    "bitfit": (bitfit, {}, remove_bitfit),
    "houlsby": (bottleneck, {"width": 3, "norms": True}, remove_bottleneck),
    "pfeiffer": (bottleneck, {"width": 3, "placement": "pfeiffer"}, remove_bottleneck),
    "ia3": (ia3, {}, remove_ia3),
}
CASES = [
    (family, kind)
    for family in NAMES
    for kind in METHODS
    if not (kind == "bitfit" and family in WITHOUT_BIASES)
]


def base(family: str) -> nn.Module:
    model = FAMILIES[family].make().double().eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def outputs(model: nn.Module, family: str) -> Tensor:
    """Logits; of BERT, whose pooler's tanh hides small differences, what the last block gives."""
    if family == "bert":
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        return inner.bert(**FAMILIES[family].inputs()).last_hidden_state
    return model(**FAMILIES[family].inputs()).logits


def values(model: nn.Module, family: str) -> Tensor:
    """Outputs without gradients: torch takes another kernel for attention where a gradient is asked for (T5's bias)."""
    with torch.no_grad():
        return outputs(model, family)


def randomise(model: nn.Module) -> None:
    """By name without what PEFT adds to it, so that the same layer gets the same numbers in both."""
    for name, each in sorted(model.named_parameters()):
        if each.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            each.data = torch.randn(each.shape, generator=generator, dtype=each.dtype)


def theirs_with(family: str, **options) -> nn.Module:
    model = peft.get_peft_model(base(family), peft.IA3Config(**options)).double().eval()
    randomise(model)
    return model


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Layer → its vector, of PEFT's model or of ours."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Scale):
            found[name.removesuffix(".ia3")] = module.vector
        elif hasattr(module, "ia3_l"):
            found[name.removeprefix("base_model.model.")] = module.ia3_l["default"]
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("family, kind", CASES)
def test_every_method_on_every_family(family, kind, tmp_path):
    method, options, remove = METHODS[kind]
    model, plain = base(family), base(family)
    before = [(name, id(each), type(each)) for name, each in model.named_modules()]
    expected = values(plain, family)
    method(model, **options)
    assert torch.equal(values(model, family), expected)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=1e-3)
    target = torch.randn_like(expected)
    # In eval, since dropout would make more noise than three small steps change.
    loss = lambda model, inputs, targets: (outputs(model.eval(), family) - targets).square().mean()
    batches = lambda step: (torch.zeros(1, 1), target)
    losses = fit(model, batches, optimizer, 3, loss=loss, schedule=lambda _: 1.0, progress=False).steps
    assert losses[-1]["loss"] < losses[0]["loss"]
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, start[name])}
    # What changes no output doesn't move: a bias of keys, say, which the softmax cancels.
    assert moved <= trained and len(moved) >= 0.8 * len(trained)
    assert all((each.grad is not None) <= (name in trained) for name, each in model.named_parameters())

    tuned = values(model, family)
    save_tuned(model, tmp_path)
    again = load_tuned(base(family), tmp_path)
    assert torch.equal(values(again, family), tuned) and applied(again) == applied(model)
    assert trained_parameters(again) == trained_parameters(model)

    remove(model)
    assert [(name, id(each), type(each)) for name, each in model.named_modules()] == before
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert torch.equal(values(model, family), expected)
    for (name, mine), original in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, original) and mine.requires_grad == original.requires_grad, name


@pytest.mark.parametrize("family", sorted(WITHOUT_BIASES))
def test_a_family_without_biases_is_refused_by_bitfit(family):
    with pytest.raises(ValueError, match="has no bias terms, and BitFit trains nothing else"):
        bitfit(base(family))


# blocks, width, MLP's width, keys and values of each attention in all blocks, attentions, MLPs
SHAPES = {
    "bert": (2, 16, 24, 2 * 2 * 16, 2, 2),
    "gpt2": (2, 16, 64, 2 * 2 * 16, 2, 2),
    "llama": (2, 16, 24, 2 * 2 * 8, 2, 2),  # one head of keys and values for two of queries
    "opt": (2, 16, 24, 2 * 2 * 16, 2, 2),
}


@pytest.mark.parametrize("family", SHAPES)
def test_counts_follow_the_papers(family):
    blocks, d, inner, keys_values, attentions, mlps = SHAPES[family]
    m, each = 5, 2 * d * 5 + d + 5
    assert trained_parameters(bottleneck(base(family), m)) == (attentions + mlps) * each
    assert trained_parameters(bottleneck(base(family), m, "pfeiffer")) == mlps * each
    assert trained_parameters(ia3(base(family))) == keys_values + blocks * inner


def test_in_gpt2_the_queries_are_left_alone_unless_asked_for():
    model = ia3(base("gpt2"))
    assert stored_parameters(model) - trained_parameters(model) == 2 * 16
    assert trained_parameters(ia3(base("gpt2"), queries=True)) == stored_parameters(model)
    attention = model.transformer.h[0].attn.c_attn
    x = torch.randn(3, 16, dtype=torch.float64)
    plain = attention(x)
    attention.ia3.vector.data.fill_(2.0)
    assert torch.equal(attention(x), torch.cat([plain[:, :16], 2 * plain[:, 16:]], dim=1))


def test_an_adapter_stands_before_the_sum_in_bert():
    """LayerNorm(adapter(dense(h)) + x), as in figure 2 of Houlsby et al."""
    model = bottleneck(base("bert"), 3)
    randomise(model)
    output = model.bert.encoder.layer[0].output
    h, x = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    linear = torch.nn.functional.linear(h, output.dense.weight, output.dense.bias)
    assert isinstance(output.dense.bottleneck, Bottleneck)
    assert torch.allclose(output(h, x), output.LayerNorm(output.dense.bottleneck(linear) + x), atol=1e-12)


# (IA)³ and PEFT


@pytest.mark.parametrize("family", NAMES)
def test_peft_opens_our_ia3_with_the_same_values_and_gradients(family, tmp_path):
    model = ia3(base(family))
    randomise(model)
    save_tuned(model, tmp_path, base_model_name="somebody/something")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base(family), tmp_path, is_trainable=True).double().eval()
    assert not [each for each in caught if "missing" in str(each.message) or "nexpected" in str(each.message)]
    assert set(vectors(theirs)) == set(vectors(model))
    expected = outputs(theirs, family)
    assert distance(outputs(model, family), expected) < 1e-13
    assert distance(outputs(base(family), family), expected) > 1e-2
    outputs(model, family).square().sum().backward()
    expected.square().sum().backward()
    for name, mine in vectors(model).items():
        whole = vectors(theirs)[name].grad.flatten()
        assert distance(mine.grad, whole[-len(mine) :]) < 1e-11, name


@pytest.mark.parametrize("family", PEFTS_OWN)
def test_we_open_pefts_ia3_of_its_own_layers_and_write_the_same_file(family, tmp_path):
    """PEFT's choice for the family: in BERT the attention's last layer too, in OPT queries instead of values."""
    theirs = theirs_with(family)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_tuned(base(family), tmp_path / "theirs")
    expected = outputs(theirs, family)
    assert distance(outputs(model, family), expected) < 1e-13
    outputs(model, family).square().sum().backward()
    expected.square().sum().backward()
    for name, each in vectors(theirs).items():
        assert distance(vectors(model)[name].grad, each.grad.flatten()) < 1e-11, name
    assert trained_parameters(model) == trained_parameters(theirs)
    save_tuned(model, tmp_path / "ours")
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert distance(outputs(fold_ia3(model), family), outputs(theirs.merge_and_unload(), family)) < 1e-13


@pytest.mark.parametrize("family", NAMES)
def test_folded_is_unfolded(family):
    model = ia3(base(family))
    randomise(model)
    tuned = outputs(model, family)
    fold_ia3(model)
    assert distance(outputs(model, family), tuned) < 1e-12 and applied(model) is None


ENDS = {
    "bert": (["key", "value", "query", "intermediate.dense"], ["output.dense", "layer.1.output.dense"]),
    "gpt2": (["c_attn", "c_fc", "h.1.attn.c_attn"], ["mlp.c_proj", "c_proj"]),
    "llama": (
        ["k_proj", "v_proj", "0.self_attn.v_proj", "lm_head"],
        ["down_proj", "o_proj", "layers.1.mlp.down_proj"],
    ),
    "t5": (["k", "v", "EncDecAttention.k", "lm_head"], ["wo", "encoder.block.0.layer.0.SelfAttention.o"]),
}


@st.composite
def layers_of_a_family(draw):
    family = draw(st.sampled_from(sorted(ENDS)))
    some = lambda ends: sorted(draw(st.sets(st.sampled_from(ends), min_size=1, max_size=2)))
    return family, *map(some, ENDS[family])


@pytest.mark.slow
@given(layers_of_a_family(), st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whichever_layers_the_file_names_exactly_these(tmp_path_factory, layers, queries):
    family, ends, starts = layers
    folder = tmp_path_factory.mktemp("layers")
    model = ia3(base(family), ends, starts, queries=queries)
    randomise(model)
    save_tuned(model, folder)
    theirs = peft.PeftModel.from_pretrained(base(family), folder).double().eval()
    assert set(vectors(theirs)) == set(vectors(model))
    assert distance(outputs(theirs, family), outputs(model, family)) < 1e-13
    again = load_tuned(base(family), folder)
    assert torch.equal(outputs(again, family), outputs(model, family))
    assert trained_parameters(again) == trained_parameters(model)


@pytest.mark.slow
@given(layers_of_a_family())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whichever_layers_peft_was_given(tmp_path_factory, layers):
    family, ends, starts = layers
    folder = tmp_path_factory.mktemp("layers")
    theirs = theirs_with(family, target_modules=[*ends, *starts], feedforward_modules=starts)
    theirs.save_pretrained(folder)
    model = load_tuned(base(family), folder)
    assert distance(outputs(model, family), outputs(theirs, family)) < 1e-13
    assert set(vectors(theirs)) == set(vectors(model))


def test_tinylm_is_opened_by_peft_too(tmp_path):
    from lora_edu.tinylm import TinyLM

    def make():
        torch.manual_seed(0)
        return TinyLM(40, 20, 12, 5, 16).double()  # blocks.1 and blocks.11: names that end in each other's

    model = ia3(make(), "blocks.1.attention.value", ["1.mlp.down", "11.mlp.down"])
    randomise(model)
    save_tuned(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert "blocks.11.mlp.down" in config["feedforward_modules"]
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).double()
    tokens = torch.arange(24).reshape(2, 12)
    assert set(vectors(theirs)) == set(vectors(model)) and distance(theirs(tokens), model(tokens)) < 1e-13


def test_a_head_that_peft_saved_beside_the_vectors_is_refused_by_name(tmp_path):
    theirs_with("bert", modules_to_save=["classifier"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the file holds base_model.model.classifier.*isn't supported"):
        load_tuned(base("bert"), tmp_path)
