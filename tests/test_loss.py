"""The next-token loss: in slices or not the loss of the logits, with every gradient, whatever the head adds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_edu import loss as losses
from lora_edu.lora import LoRALinear, add_lora, lora_layers, merge_lora, trainable_parameters
from lora_edu.loss import HeadLoss, next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches


def small(seed=0):
    torch.manual_seed(seed)
    return TinyLM(vocabulary=40, width=20, layers=1, heads=5, context=16)


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(2000) * 7 % 40


def plain(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@given(st.integers(1, 600), st.integers(2, 30), st.integers(1, 8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_sliced_head_loss_is_cross_entropy_with_its_gradients(count, vocabulary, width, frozen):
    torch.manual_seed(count)
    hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.randint(vocabulary, (count,))
    ours = HeadLoss.apply(hidden, weight, targets, None, None)
    whole = F.cross_entropy(hidden @ weight.T, targets)
    assert torch.allclose(ours, whole)
    wanted = [hidden] if frozen else [hidden, weight]
    for one, other in zip(
        torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * whole, wanted), strict=True
    ):
        assert torch.allclose(one, other)


def test_the_loss_through_the_head_is_the_loss_of_the_logits(tokens):
    model = small()
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    assert torch.allclose(next_token_loss(model, inputs, targets), plain(model, inputs, targets))


@given(st.integers(1, 600), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_lora_in_the_head_has_the_gradients_of_the_formed_table(count, rank, frozen, frozen_A):
    torch.manual_seed(count)
    double = {"dtype": torch.float64}
    hidden = torch.randn(count, 6, **double, requires_grad=True)
    weight = torch.randn(9, 6, **double, requires_grad=not frozen)
    lora_A = torch.randn(rank, 6, **double, requires_grad=not frozen_A)
    lora_B = torch.randn(9, rank, **double, requires_grad=True)
    targets = torch.randint(9, (count,))
    ours = HeadLoss.apply(hidden, weight, targets, 0.5 * hidden @ lora_A.T, lora_B)
    whole = F.cross_entropy(hidden @ (weight + 0.5 * lora_B @ lora_A).T, targets)
    assert torch.allclose(ours, whole)
    wanted = [each for each in (hidden, weight, lora_A, lora_B) if each.requires_grad]
    for one, other in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(whole, wanted), strict=True):
        assert torch.allclose(one, other)


def test_every_lora_layer_of_a_model_gets_the_gradient_of_the_plain_loss(tokens):
    model = add_lora(small(), rank=3, alpha=6, targets=["embedding", "head", "query", "down"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    trained = trainable_parameters(model)
    whole = plain(model, inputs, targets)
    ours = next_token_loss(model, inputs, targets)
    assert torch.allclose(ours, whole)
    for one, other in zip(
        torch.autograd.grad(ours, trained), torch.autograd.grad(whole, trained), strict=True
    ):
        assert other.norm() > 0 and torch.allclose(one, other, atol=1e-6)


# What the head adds is neither dropped nor gone past


def adapted(**options):
    """A model with LoRA in its head, as after some training."""
    model = add_lora(small(), 3, 6, "head", **options)
    nn.init.normal_(model.head.lora_B)
    return model.train()


def test_dropout_in_the_head_is_the_forward_passs_own(tokens):
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    model = adapted(dropout=0.5)
    trained = trainable_parameters(model)
    torch.manual_seed(5)
    ours = next_token_loss(model, inputs, targets)
    torch.manual_seed(5)
    whole = plain(model, inputs, targets)
    assert torch.allclose(ours, whole)
    for one, other in zip(
        torch.autograd.grad(ours, trained), torch.autograd.grad(whole, trained), strict=True
    ):
        assert other.norm() > 0 and torch.allclose(one, other, atol=1e-6)
    assert (ours - next_token_loss(model, inputs, targets)).abs() > 1e-3, "another draw, another loss"
    model.eval()
    assert torch.equal(next_token_loss(model, inputs, targets), next_token_loss(model, inputs, targets))


def test_a_merged_head_refuses_to_be_trained_and_can_be_measured(tokens):
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    model = adapted()
    before = next_token_loss(model, inputs, targets)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="this LoRALinear is merged.*unmerge"):
        next_token_loss(model, inputs, targets)
    assert torch.allclose(next_token_loss(model.eval(), inputs, targets), before, atol=1e-5)


class Scaled(LoRALinear):
    """A variant that changes what the layer computes and says nothing of a low-rank part."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def biased(model):
    model.head = nn.Linear(20, 40)


def hooked(model):
    model.head.register_forward_hook(lambda layer, inputs, output: 3 * output)


def replaced(model):
    forward = model.head.forward
    model.head.forward = lambda x: forward(x).exp()


def parametrised(model):
    parametrize.register_parametrization(model.head, "weight", Doubled())


def variant(model):
    model.head = Scaled.from_layer(model.head, 2, 4)


def wrapped(model):
    model.head = nn.Sequential(nn.GELU(), model.head)


@pytest.mark.parametrize("change", [biased, hooked, replaced, parametrised, variant, wrapped])
def test_a_head_that_computes_something_else_is_called(tokens, change):
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    model = small()
    unchanged = next_token_loss(model, inputs, targets)
    change(model)
    ours = next_token_loss(model, inputs, targets)
    assert torch.allclose(ours, plain(model, inputs, targets))
    assert (ours - unchanged).abs() > 1e-4


def test_the_slices_are_taken_where_they_can_be(tokens, monkeypatch):
    """Else nothing here would notice if every head were called, at the price of all logits at once."""
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    sliced = []
    whole = HeadLoss.apply
    monkeypatch.setattr(losses.HeadLoss, "apply", lambda *parts: sliced.append(1) or whole(*parts))
    for model in (small(), adapted(dropout=0.1), adapted(rank_stabilised=True)):
        next_token_loss(model, inputs, targets)
    assert len(sliced) == 3


# Models of other kinds


class Output:
    def __init__(self, logits):
        self.logits = logits


class Wrapping(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, tokens):
        return self.wrap(self.model(tokens))


@pytest.mark.parametrize("wrap", [Output, lambda logits: (logits, None)], ids=["logits", "tuple"])
def test_logits_are_found_where_others_put_them(tokens, wrap):
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    model = small()
    ours = next_token_loss(Wrapping(model, wrap), inputs, targets)
    assert torch.equal(ours, plain(model, inputs, targets))


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda z: z[:, -1], r"\(4, 40\)"),
        (lambda z: z[:, 1:], r"\(4, 15, 40\)"),
        (lambda z: None, "NoneType"),
    ],
)
def test_what_is_no_logits_is_named(tokens, wrap, got):
    inputs, targets = Batches(tokens, batch=4, context=16)(0)
    with pytest.raises(
        TypeError, match=rf"logits \(batch, time, vocabulary\) for targets \(4, 16\).*; got {got}"
    ):
        next_token_loss(Wrapping(small(), wrap), inputs, targets)
