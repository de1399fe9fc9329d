"""Bottleneck adapters: their count, where they stand, how near the identity they start, and their arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import portrait
from torch import nn
from torch.nn import functional as F

from lora_edu.tinylm import TinyLM
from lora_edu.tuning import Bottleneck, bottleneck, trained_parameters

TOKENS = torch.arange(24).reshape(2, 12)


def small(**options):
    torch.manual_seed(0)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 16} | options)


def adapters(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, Bottleneck)}


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.sampled_from(["houlsby", "pfeiffer"]))
@settings(max_examples=25, deadline=None)
def test_each_has_2dm_d_and_m_numbers(layers, heads, width, placement):
    d = 4 * heads
    model = bottleneck(TinyLM(30, d, layers, heads, 8), width, placement)
    each = 2 * d * width + d + width
    assert trained_parameters(model) == (2 if placement == "houlsby" else 1) * layers * each
    places = ["attention.output", "mlp.down"] if placement == "houlsby" else ["mlp.down"]
    assert list(adapters(model)) == [
        f"blocks.{n}.{place}.bottleneck" for n in range(layers) for place in places
    ]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", None])
def test_a_block_is_the_papers_with_the_adapter_before_each_sum(placement, activation):
    model = bottleneck(small(), 6, placement, activation).double()
    for each in adapters(model).values():
        for parameter in each.parameters():
            parameter.data.normal_()
    f = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    f = f[activation or {"houlsby": "gelu", "pfeiffer": "relu"}[placement]]

    def adapted(layer, h):
        adapter = layer.bottleneck
        return h + f(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias

    x = model.embedding(TOKENS)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        given_ = {}
        handle = attention.output.register_forward_pre_hook(
            lambda layer, inputs, to=given_: to.update(x=inputs[0])
        )
        attention(block.attention_norm(x))
        handle.remove()
        h = F.linear(given_["x"], attention.output.weight, attention.output.bias)
        x = x + (adapted(attention.output, h) if placement == "houlsby" else h)
        h = F.linear(F.gelu(mlp.up(block.mlp_norm(x))), mlp.down.weight, mlp.down.bias)
        x = x + adapted(mlp.down, h)
    assert torch.allclose(model.hidden(TOKENS), model.norm(x), atol=1e-12)


def test_gradients_of_an_adapter_are_those_of_finite_differences():
    adapter = Bottleneck(nn.Linear(5, 7).double(), 3, "tanh", "houlsby").double()
    for parameter in adapter.parameters():
        parameter.data.normal_()
    h = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, *parameters: torch.func.functional_call(
            adapter, dict(zip(dict(adapter.named_parameters()), parameters, strict=True)), (h,)
        ),
        (h, *(each.detach().requires_grad_() for each in adapter.parameters())),
    )


@pytest.mark.parametrize(
    "activation, root",
    [("gelu", lambda d, m: math.sqrt(d * m) / 2), ("relu", lambda d, m: math.sqrt(d * m / 2))],
)
@pytest.mark.parametrize("d, m", [(768, 64), (100, 8)])
def test_the_papers_start_is_near_the_identity_by_the_docstrings_measure(activation, root, d, m):
    torch.manual_seed(0)
    h, added = torch.randn(400, d), []
    for _ in range(20):
        adapter = Bottleneck(nn.Linear(1, d), m, activation, "houlsby")
        assert max(each.abs().max() for each in adapter.parameters()) <= 0.02
        added.append((adapter(h) - h).detach().square().mean())
    measured = math.sqrt(sum(added) / len(added))
    sigma = 0.01 * 0.8796  # of a normal distribution cut at two standard deviations
    assert measured == pytest.approx(sigma**2 * root(d, m), rel=0.12)
    if (d, m) == (768, 64):
        assert round(100 * sigma**2 * root(d, m), 1) == {"gelu": 0.9, "relu": 1.2}[activation]


def test_the_papers_start_moves_the_model_a_little_and_ours_not_at_all():
    base = small()(TOKENS)
    near = bottleneck(small(), 8, start="houlsby")(TOKENS)
    assert 0 < (near - base).norm() / base.norm() < 0.01
    assert torch.equal(bottleneck(small(), 8)(TOKENS), base)


def test_from_the_start_that_is_the_identity_the_second_matrix_learns_first():
    model = bottleneck(small(), 8)
    model(TOKENS).square().mean().backward()
    for each in adapters(model).values():
        assert each.up.weight.grad.any() and each.up.bias.grad.any()
        assert not each.down.weight.grad.any(), "W_up is zero, so nothing comes through it yet"


def test_with_norms_all_of_them_are_trained_too():
    model = bottleneck(small(), 3, norms=True)
    trained = {
        name for name, each in model.named_parameters() if each.requires_grad and "bottleneck" not in name
    }
    assert trained == {
        f"{norm}.{kind}"
        for norm in ("norm", *(f"blocks.{n}.{each}_norm" for n in range(2) for each in ("attention", "mlp")))
        for kind in ("weight", "bias")
    }
    assert trained_parameters(model) == 2 * 2 * (2 * 20 * 3 + 20 + 3) + 5 * 2 * 20


def test_the_start_follows_the_seed_and_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    one, same, other = (adapters(bottleneck(small(), 4, seed=seed)) for seed in (1, 1, 2))
    torch.manual_seed(5)
    model = TinyLM(40, 20, 2, 5, 16)
    torch.manual_seed(5)
    bottleneck(model, 4)
    assert torch.equal(torch.rand(3), wanted)
    for name, each in one.items():
        assert torch.equal(each.down.weight, same[name].down.weight)
        assert not torch.equal(each.down.weight, other[name].down.weight)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0}, r"width must be a whole number above 0 .*; got 0"),
        ({"width": 2.5}, "got 2.5"),
        ({"width": True}, "got True"),
        ({"width": 2, "placement": "parallel"}, "placement must be one of houlsby, pfeiffer; got 'parallel'"),
        (
            {"width": 2, "activation": "swish"},
            "activation must be one of relu, gelu, silu, tanh; got 'swish'",
        ),
        ({"width": 2, "activation": torch.relu}, "activation must be one of relu"),
        ({"width": 2, "start": "zero"}, "start must be one of identity, houlsby; got 'zero'"),
        ({"width": 2, "norms": "all"}, "norms must be True or False; got 'all'"),
        ({"width": 2, "placement": "pfeiffer", "attention": "output"}, "no adapter after attention; leave"),
        (
            {"width": 2, "mlp": "attention.output"},
            "blocks.0.attention.output is among attention and among mlp",
        ),
        ({"width": 2, "mlp": "mlp.dwon"}, "no layer matches mlp.dwon; did you mean"),
    ],
)
def test_errors_name_the_value_and_the_rule_and_leave_the_model_alone(options, message):
    model = small()
    before = portrait(model)
    with pytest.raises(ValueError, match=message):
        bottleneck(model, **options)
    assert portrait(model) == before
