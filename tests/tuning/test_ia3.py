"""(IA)³: its count, its three products, and that folded into the weights it is the same model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora_edu.tinylm import TinyLM
from lora_edu.tuning import applied, fold_ia3, ia3, trained_parameters
from lora_edu.tuning.ia3 import Scale

TOKENS = torch.arange(24).reshape(2, 12)


def small(**options):
    torch.manual_seed(0)
    model = TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 16} | options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.double()


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for each in model.modules():
        if isinstance(each, Scale):
            each.vector.data = torch.randn(each.vector.shape, generator=generator).to(each.vector)
    return model


@given(st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_a_block_has_a_number_for_each_key_value_and_inner_activation(layers, heads):
    width = 4 * heads
    assert trained_parameters(ia3(TinyLM(30, width, layers, heads, 8))) == layers * (
        width + width + 4 * width
    )


def test_keys_values_and_the_inner_activation_are_scaled_and_nothing_else():
    """§3.3: softmax(q (l_k ⊙ k)ᵀ) (l_v ⊙ v), and W_2 (l_ff ⊙ γ(W_1 x))."""
    model = randomise(ia3(small()))
    block = model.blocks[0]
    attention, mlp, x = block.attention, block.mlp, torch.randn(2, 7, 20, dtype=torch.float64)
    plain = lambda layer, x: F.linear(x, layer.weight, layer.bias)
    heads = lambda y: y.view(2, 7, 5, 4).transpose(1, 2)
    query = attention.turn(heads(plain(attention.query, x)))
    key = attention.turn(heads(plain(attention.key, x) * attention.key.ia3.vector))
    value = heads(plain(attention.value, x) * attention.value.ia3.vector)
    scores = (query @ key.transpose(-1, -2) / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    wanted = plain(attention.output, (scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 7, 20))
    assert torch.allclose(attention(x), wanted, atol=1e-12)
    assert torch.allclose(mlp(x), plain(mlp.down, F.gelu(plain(mlp.up, x)) * mlp.down.ia3.vector), atol=1e-12)


@given(
    st.integers(1, 2),
    st.sampled_from([None, [], "value", ["key", "query"], nn.Linear]),
    st.sampled_from([None, [], "output", ["mlp.up", "down"]]),
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_folded_it_is_the_same_model_without_a_method(layers, outputs, inputs, trainable, seed):
    if (outputs == [] and inputs == []) or (outputs is nn.Linear and inputs != []):
        return
    model, base = small(layers=layers), small(layers=layers)
    model.requires_grad_(trainable)
    randomise(ia3(model, outputs, inputs), seed)
    tuned = model(TOKENS)
    assert not torch.allclose(tuned, base(TOKENS))
    fold_ia3(model)
    assert (model(TOKENS) - tuned).abs().max() <= 1e-12 * max(1.0, tuned.abs().max().item())
    assert applied(model) is None and list(model.state_dict()) == list(base.state_dict())
    assert all(each.requires_grad == trainable for each in model.parameters())


def test_in_half_precision_the_vector_has_float32_and_the_product_is_rounded_once():
    model = ia3(small().bfloat16())
    layer = model.blocks[0].attention.key
    randomise(model)
    assert layer.ia3.vector.dtype == torch.float32
    x = torch.randn(3, 20).bfloat16()
    wanted = (F.linear(x, layer.weight, layer.bias).float() * layer.ia3.vector).bfloat16()
    assert torch.equal(layer(x), wanted)
    weight = layer.weight.detach().clone()
    vector = layer.ia3.vector.detach().clone()
    fold_ia3(model)
    assert torch.equal(layer.weight, (weight.float() * vector[:, None]).bfloat16())


def test_a_vectors_gradient_is_that_of_finite_differences():
    scale = Scale(nn.Linear(4, 6).double(), "output", 2)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    run = lambda x, vector: torch.func.functional_call(scale, {"vector": vector}, (x,))
    assert torch.autograd.gradcheck(run, (x, torch.randn(4, dtype=torch.float64, requires_grad=True)))
    assert torch.equal(scale(x)[:, :2], x[:, :2]) and scale.whole().shape == (6,)


def test_a_weight_that_another_layer_shares_is_not_folded():
    model = small()
    model.blocks[1].attention.key.weight = model.blocks[0].attention.key.weight
    randomise(ia3(model))
    tuned = model(TOKENS)
    with pytest.raises(
        ValueError, match=r"blocks.0.attention.key.weight is also blocks.1.attention.key.weight \(tied"
    ):
        fold_ia3(model)
    assert torch.equal(model(TOKENS), tuned) and applied(model) == "ia3"


def test_a_product_that_is_not_finite_is_not_folded():
    model = ia3(small().half())
    model.blocks[1].mlp.down.ia3.vector.data.fill_(1e30)
    before = model.blocks[0].attention.key.weight.detach().clone()
    with pytest.raises(
        ValueError, match="blocks.1.mlp.down: the folded weight must be finite in torch.float16"
    ):
        fold_ia3(model)
    assert torch.equal(model.blocks[0].attention.key.weight, before) and applied(model) == "ia3"


def test_folding_needs_the_method():
    with pytest.raises(ValueError, match="the model has no ia3 to take off"):
        fold_ia3(small())
