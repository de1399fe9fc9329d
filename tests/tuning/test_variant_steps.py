"""Variants that are another step: LoRA+, scaled gradients, Muon; and whose step depends on BA alone."""

import copy
import math

import pytest
import torch
from small_tinylm import LAYERS, TOKENS, moved, small

from lora_edu.lora import add_lora, lora_layers, trainable_parameters
from lora_edu.loss import next_token_loss
from lora_edu.training import fit
from lora_edu.tuning.variants import (
    Muon,
    change_basis,
    deltas,
    lora_plus,
    orthogonalised,
    scale_gradients,
    scaled_steps,
)

ALL = [*LAYERS, "embedding"]
R = 3


def with_lora(**options):
    """LoRA that has left B = 0 already."""
    return moved(add_lora(small(), R, 2 * R, ALL, **options))


def gradients(model):
    next_token_loss(model, TOKENS, TOKENS.flip(1)).backward()
    return model


def walk(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(model)
        optimizer.step()
    return deltas(model)


# Whose step depends on BA alone

SGD = torch.optim.SGD
OPTIMIZERS = {
    "SGD": (lambda model: SGD(trainable_parameters(model), 0.1, momentum=0.9), "orthogonal"),
    "LoRA+ with SGD": (lambda model: SGD(lora_plus(model, 0.1, 4)), "orthogonal"),
    "Adam": (lambda model: torch.optim.Adam(trainable_parameters(model), 1e-2), "none"),
    "scaled SGD": (
        lambda model: scaled_steps(SGD(trainable_parameters(model), 0.1, 0.9, weight_decay=0.1), model, 0.0),
        "all",
    ),
    "scaled AdamW": (
        lambda model: scaled_steps(torch.optim.AdamW(trainable_parameters(model), 1e-2), model, 0.0),
        "none",
    ),
    "Muon": (lambda model: Muon(model, 0.02), "orthogonal"),
    "Muon on the product": (lambda model: Muon(model, 0.02, product=True, damping=0.0), "all"),
}
TURN = torch.linalg.qr(torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
BASES = {
    "orthogonal": TURN,
    "all": TURN @ torch.diag(torch.tensor([0.2, 1.0, 6.0], dtype=torch.float64)) @ TURN.T @ TURN,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_for_which_M_the_steps_of_B_M_and_M_inverse_A_are_the_same(name):
    make, invariant = OPTIMIZERS[name]
    start = deltas(with_lora())

    def after(M):
        model = with_lora() if M is None else change_basis(with_lora(), M)
        return walk(model, make(model))

    plain = after(None)
    for kind, M in BASES.items():
        other = after(M)
        step = max((plain[each] - start[each]).abs().max() for each in start)
        difference = max((plain[each] - other[each]).abs().max() for each in start) / step
        same = invariant == "all" or invariant == kind
        assert difference < 1e-8 if same else difference > 1e-2, (kind, float(difference))


def test_another_basis_is_the_same_update_and_a_bad_one_is_refused():
    model, base = with_lora(), with_lora()
    assert change_basis(model, BASES["all"]) is model
    for name, delta in deltas(model).items():
        assert torch.allclose(delta, deltas(base)[name], atol=1e-13)
        assert (lora_layers(model)[name].lora_B - lora_layers(base)[name].lora_B).abs().max() > 0.01
    with pytest.raises(ValueError, match="M must be invertible"):
        change_basis(model, torch.zeros(R, R))
    with pytest.raises(ValueError, match=r"M must be \(3, 3\) for embedding; got \(2, 2\)"):
        change_basis(model, torch.eye(2))


# LoRA+


def test_lora_plus_gives_b_its_rate_and_everything_once():
    model = add_lora(small(), R, 6, ALL)
    model.norm.weight.requires_grad_(True)
    layers = lora_layers(model)
    groups = {group["name"]: group for group in lora_plus(model, 1e-3, 8, embedding_rate=5e-4)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "lora_A": 1e-3,
        "lora_B": 8e-3,
        "embedding": 5e-4,
        "other": 1e-3,
    }
    held = [each for group in groups.values() for each in group["params"]]
    assert len(held) == len({id(each) for each in held}) == len(trainable_parameters(model))
    linear = {name: each for name, each in layers.items() if name != "embedding"}
    assert {id(each.lora_B) for each in linear.values()} == {id(each) for each in groups["lora_B"]["params"]}
    assert {id(each.lora_A) for each in linear.values()} == {id(each) for each in groups["lora_A"]["params"]}


def test_at_ratio_1_lora_plus_is_lora_and_a_ratio_moves_b_further():
    one, plus, plain = (with_lora() for _ in range(3))
    walk(one, torch.optim.Adam(lora_plus(one, 1e-2, 1.0)), 1)
    walk(plus, torch.optim.Adam(lora_plus(plus, 1e-2, 4.0)), 1)
    walk(plain, torch.optim.Adam(trainable_parameters(plain), 1e-2), 1)
    start = with_lora()
    for name, layer in lora_layers(plain).items():
        mine, other, before = (lora_layers(each)[name] for each in (one, plus, start))
        assert torch.equal(mine.lora_A, layer.lora_A) and torch.equal(mine.lora_B, layer.lora_B)
        assert torch.equal(other.lora_A, layer.lora_A)
        if name != "embedding":
            moved_by = other.lora_B - before.lora_B
            assert torch.allclose(moved_by, 4 * (layer.lora_B - before.lora_B), rtol=1e-9)


@pytest.mark.parametrize("numbers", [{"rate": 0.0}, {"rate": 1e-3, "ratio": -1}, {"rate": float("nan")}])
def test_lora_plus_refuses_rates_and_models_that_cannot_be(numbers):
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        lora_plus(with_lora(), **numbers)
    with pytest.raises(ValueError, match="no factor of LoRA is trained"):
        lora_plus(small(), 1e-3)


# Scaled gradients


def test_scaled_gradients_are_those_of_the_paper():
    model = gradients(with_lora())
    plain = {
        name: (layer.lora_A.grad.clone(), layer.lora_B.grad.clone())
        for name, layer in lora_layers(model).items()
    }
    scale_gradients(model, 0.1)
    eye = 0.1 * torch.eye(R, dtype=torch.float64)
    for name, layer in lora_layers(model).items():
        A = layer.lora_A.T if name == "embedding" else layer.lora_A
        grad_A, grad_B = plain[name]
        B_gram, A_gram = layer.lora_B.T @ layer.lora_B + eye, A @ A.T + eye
        wanted = grad_A @ B_gram.inverse() if name == "embedding" else B_gram.inverse() @ grad_A
        assert torch.allclose(layer.lora_A.grad, wanted, rtol=1e-9)
        assert torch.allclose(layer.lora_B.grad, grad_B @ A_gram.inverse(), rtol=1e-9)


def test_a_sparse_gradient_is_scaled_to_the_same_and_stays_sparse():
    dense, sparse = gradients(with_lora()), gradients(with_lora(sparse=True))
    for model in (dense, sparse):
        scale_gradients(model, 1e-3)
    assert sparse.embedding.lora_A.grad.is_sparse
    assert torch.allclose(sparse.embedding.lora_A.grad.to_dense(), dense.embedding.lora_A.grad, rtol=1e-9)


def test_from_b_zero_scaled_steps_train_and_a_closure_is_refused():
    model = add_lora(small(), R, R, ALL)
    optimizer = scaled_steps(SGD(trainable_parameters(model), 0.05), model)
    batches = lambda step: (TOKENS, TOKENS.flip(1))
    losses = fit(model, batches, optimizer, 8, schedule=lambda _: 1.0, clip=None, progress=False).steps
    assert losses[-1]["loss"] < losses[0]["loss"]
    with pytest.raises(RuntimeError, match="a closure makes its gradients"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="damping must be a finite number, 0 or more; got -1"):
        scaled_steps(optimizer, model, -1)
    with pytest.raises(ValueError, match="no LoRA layer"):
        scaled_steps(optimizer, small())


# Muon


@pytest.mark.parametrize("shape", [(40, 5), (5, 40), (7, 7)])
def test_orthogonalised_keeps_the_directions_and_levels_the_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    inside = U.T @ found @ Vh.T
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-10)
    assert inside.diagonal().min() > 0.65 and inside.diagonal().max() < 1.25
    assert torch.allclose(found, U * inside.diagonal() @ Vh, atol=1e-10)
    assert torch.equal(orthogonalised(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_on_the_factors_it_is_torchs_muon():
    """torch's iteration is in bfloat16: three digits."""
    mine, theirs = add_lora(small(torch.float32), R, R, LAYERS), add_lora(small(torch.float32), R, R, LAYERS)
    theirs.load_state_dict(moved(mine).state_dict())
    start = deltas(mine)
    ours = walk(mine, Muon(mine, 0.02, 0.9))
    other = walk(theirs, torch.optim.Muon(trainable_parameters(theirs), 0.02, 0.0, 0.9))
    for name, delta in ours.items():
        assert (delta - other[name]).norm() < 0.05 * (delta - start[name]).norm(), name


def test_on_the_product_a_step_of_b_moves_the_product_by_half_the_rate():
    model = gradients(with_lora())
    before = copy.deepcopy(lora_layers(model))
    Muon(model, 0.02, product=True, damping=0.0).step()
    for name, layer in lora_layers(model).items():
        A = before[name].lora_A.T if name == "embedding" else before[name].lora_A
        values = torch.linalg.svdvals((layer.lora_B - before[name].lora_B) @ A)[:R]
        assert values.min() > 0.6 * 0.01 and values.max() < 1.25 * 0.01, (name, values)


@pytest.mark.parametrize("product", [False, True])
def test_muon_trains_from_b_zero_and_goes_on_from_its_state(product, tmp_path):
    model = add_lora(small(), R, R, ALL)
    batches = lambda step: (TOKENS, TOKENS.flip(1))
    losses = fit(
        model, batches, Muon(model, 0.02, product=product), 8, schedule=lambda _: 1.0, progress=False
    ).steps
    assert losses[-1]["loss"] < losses[0]["loss"]
    whole, half = add_lora(small(), R, R, "query"), add_lora(small(), R, R, "query")
    half.load_state_dict(whole.state_dict())
    optimizer = Muon(whole, 0.02, product=product)
    walk(whole, optimizer, 4)
    first = Muon(half, 0.02, product=product)
    walk(half, first, 2)
    second = Muon(half, 0.5)
    second.load_state_dict(first.state_dict())
    walk(half, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))


def test_muon_refuses_what_it_would_leave_out():
    model = with_lora()
    for options, message in (
        ({"lr": -1}, "lr must be a finite number, 0 or more; got -1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1; got 1.0"),
        ({"damping": math.nan}, "damping must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon(model, **options)
    with pytest.raises(ValueError, match="no factor of LoRA is trained"):
        Muon(small())
    model.norm.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="norm.bias is trained too"):
        Muon(model)
    with pytest.raises(TypeError, match="Muon needs the whole gradient; add_lora with sparse=False"):
        Muon(gradients(with_lora(sparse=True))).step()
