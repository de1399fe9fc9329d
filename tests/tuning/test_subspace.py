"""Random subspaces: what P must be, that the package trains in it by the rule, and that a model comes back whole."""

import copy
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lora_edu import lowrank
from lora_edu.lora import trainable_parameters
from lora_edu.loss import next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit
from lora_edu.tuning import adjoint, project, remove_subspace, sparse_projection, subspace

TOKENS = torch.arange(2000) * 7 % 40  # each token follows from the one before
SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400)).map(sorted)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 1, "heads": 5, "context": 16} | options)


def batches(seed=0):
    return Batches(TOKENS, batch=4, context=16, seed=seed)


def dense(dial, factor, dimension):
    """P as a matrix, from the definition."""
    P = torch.zeros(len(dial), dimension)
    P[torch.arange(len(dial)), dial.long()] = factor
    return P


@given(SIZES, st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_columns_are_orthonormal_and_the_adjoint_is_the_transpose(sizes, seed):
    dimension, size = sizes
    dial, factor = sparse_projection(size, dimension, seed)
    P = dense(dial, factor, dimension)
    assert torch.allclose(P.T @ P, torch.eye(dimension), atol=1e-5)
    z, g = torch.randn(dimension, requires_grad=True), torch.randn(size)
    assert torch.allclose(project(z, dial, factor), P @ z, atol=1e-5)
    assert torch.allclose(adjoint(g, dial, factor, dimension), P.T @ g, atol=1e-5)
    (gradient,) = torch.autograd.grad(project(z, dial, factor) @ g, z)
    assert torch.allclose(gradient, P.T @ g, atol=1e-5)


@pytest.mark.parametrize("dimension", [100, 1_000, 50_000, 2_728_000])
def test_at_full_size_norms_are_kept_and_the_adjoint_is_exact(dimension):
    dial, factor = sparse_projection(2_728_000, dimension)
    torch.manual_seed(0)
    z, g = torch.randn(dimension, dtype=torch.float64), torch.randn(2_728_000, dtype=torch.float64)
    moved = project(z, dial, factor.double())
    assert moved.norm().item() == pytest.approx(z.norm().item(), rel=1e-6)
    there, back = (moved @ g).item(), (z @ adjoint(g, dial, factor.double(), dimension)).item()
    assert there == pytest.approx(back, abs=1e-9 * moved.norm().item() * g.norm().item())


def test_P_is_stored_in_eight_bytes_a_parameter_whatever_the_dimension():
    for dimension in (10, 50_000):
        dial, factor = sparse_projection(200_000, dimension)
        assert dial.nbytes + factor.nbytes == 8 * 200_000
        assert sorted(dial.unique().tolist()) == list(range(dimension)), "no dial stands idle"


def test_P_is_the_same_on_every_machine_and_for_every_version():
    dial, factor = sparse_projection(100_000, 777, seed=5)
    signed = dial * factor.sign().int() + factor.sign().int()  # ± (dial + 1)
    found = hashlib.sha256(signed.numpy().astype("<i4").tobytes()).hexdigest()
    assert found[:16] == "d5a923cd640e2bc7"
    assert not torch.equal(dial, sparse_projection(100_000, 777, seed=6)[0])


def test_signs_and_dials_look_random():
    """Half the signs are minus, and neighbours share a dial no more often than chance."""
    size, dimension = 200_000, 50
    dials, factor = sparse_projection(size, dimension)
    minus = (factor < 0).float()
    assert abs(minus.mean() - 0.5) < 0.005
    assert abs((dials[1:] == dials[:-1]).float().mean() * dimension - 1) < 0.1
    assert abs(torch.corrcoef(torch.stack([minus, dials.float()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([minus[1:], minus[:-1]]))[0, 1]) < 0.01


def test_at_the_start_the_model_is_the_base_and_only_z_is_trainable():
    model, base = small(), small()
    handle = subspace(model, 30, seed=1)
    assert torch.equal(model(TOKENS[None, :16]), base(TOKENS[None, :16]))
    assert [id(each) for each in trainable_parameters(model)] == [id(handle.z)]
    assert handle.size == sum(p.numel() for p in base.parameters()) and handle.z.shape == (30,)


def test_the_gradient_of_z_is_P_transposed_times_the_full_gradient():
    base, model = small(), small()
    handle = subspace(model, 50)
    inputs, targets = batches()(0)
    next_token_loss(base, inputs, targets).backward()
    next_token_loss(model, inputs, targets).backward()
    whole = torch.cat([p.grad.flatten() for _, p in sorted(base.named_parameters())])
    wanted = dense(handle.dial, handle.factor, 50).T @ whole
    assert torch.allclose(handle.z.grad, wanted, atol=1e-6) and wanted.norm() > 0.01
    originals = [p for p in model.parameters() if p is not handle.z]
    assert all(p.grad is None for p in originals), "no gradient of D numbers is kept"


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_at_full_dimension_training_z_is_full_tuning(kind):
    """P is then a permutation with signs; SGD and Adam don't mind either."""

    def optimizer(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        return torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)

    whole, model = small().double(), small().double()
    handle = subspace(model, sum(p.numel() for p in model.parameters()))
    handle.double()
    fit(whole, batches(), optimizer(whole.parameters()), 10, progress=False)
    fit(model, batches(), optimizer([handle.z]), 10, progress=False)
    remove_subspace(model, merge=True)
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_trained_update_lies_in_the_subspace_and_has_full_rank():
    model = small(vocabulary=40, width=20)
    handle = subspace(model, 25)
    before = next_token_loss(model, *batches()(0)).item()
    fit(model, batches(), torch.optim.Adam([handle.z], lr=0.3), 60, progress=False)
    assert next_token_loss(model, *batches()(0)).item() < before - 0.15
    deltas = handle.deltas()
    flat = torch.cat([delta.flatten() for delta in deltas.values()])
    z = adjoint(flat, handle.dial, handle.factor, 25)
    assert torch.allclose(project(z, handle.dial, handle.factor), flat, atol=1e-5)
    assert torch.allclose(z, handle.z.detach(), atol=1e-4) and flat.norm() > 0.5
    for name, delta in deltas.items():
        if delta.dim() == 2:
            assert torch.linalg.matrix_rank(delta) == min(delta.shape), name


def test_even_one_dimension_gives_an_update_of_full_rank():
    model = small()
    handle = subspace(model, 1)
    handle.z.data.fill_(1.0)
    assert torch.linalg.matrix_rank(handle.deltas()["head.weight"]) == 20
    assert lowrank.stable_rank(torch.linalg.svdvals(handle.deltas()["head.weight"])) > 5


@pytest.mark.parametrize(
    "parameters, moved",
    [
        ("blocks", lambda name: name.startswith("blocks.")),
        (["head", "norm.bias"], lambda name: name in ("head.weight", "norm.bias")),
        ("blocks.0.attention.query.weight", lambda name: name == "blocks.0.attention.query.weight"),
        ("all", lambda name: True),
    ],
)
def test_only_the_parameters_named_move(parameters, moved):
    base, model = small().state_dict(), small()
    handle = subspace(model, 10, parameters=parameters)
    fit(model, batches(), torch.optim.Adam([handle.z], lr=0.1), 3, progress=False)
    remove_subspace(model, merge=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]) != moved(name), name


def test_merging_leaves_a_plain_model_of_the_same_outputs_and_removing_the_base():
    base, model, twin = small(), small(), small()
    for each in (base, model, twin):
        each.norm.requires_grad_(False)
    subspace(model, 40, seed=3).z.data.normal_()
    subspace(twin, 40, seed=3).z.data.copy_(model.subspace.z)
    tokens = TOKENS[None, :16]
    tuned = model(tokens)
    assert torch.equal(twin(tokens), tuned) and torch.equal(copy.deepcopy(model)(tokens), tuned)
    assert not torch.allclose(tuned, base(tokens))
    remove_subspace(model, merge=True)
    assert torch.equal(model(tokens), tuned)
    remove_subspace(twin)
    assert torch.equal(twin(tokens), base(tokens))
    for plain in (model, twin):
        assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == [
            (n, p.requires_grad) for n, p in base.named_parameters()
        ]
        assert type(plain.head) is torch.nn.Linear


def test_a_second_subspace_on_the_model_given_back_is_the_first_again():
    model = small()
    first = subspace(model, 17, seed=2)
    first.z.data.fill_(1.0)
    before = first.deltas()
    remove_subspace(model)
    second = subspace(model, 17, seed=2)
    second.z.data.fill_(1.0)
    assert all(torch.equal(before[name], delta) for name, delta in second.deltas().items())


def test_a_run_resumes_stops_early_and_is_evaluated_like_any_other(tmp_path):
    def run(steps, checkpoint):
        model = small()
        handle = subspace(model, 30)
        history = fit(
            model,
            batches(),
            torch.optim.Adam([handle.z], lr=0.3),
            steps,
            schedule=lambda done: 1.0,
            held_out=lambda m: evaluate(m, TOKENS, context=16),
            evaluate_every=4,
            patience=9,
            checkpoint=checkpoint,
            progress=False,
        )
        return handle.z.detach(), history

    run(6, tmp_path / "run.safetensors")
    resumed, history = run(12, tmp_path / "run.safetensors")
    whole, _ = run(12, None)
    assert torch.equal(resumed, whole) and resumed.norm() > 0 and len(history.steps) == 12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dimension": 0}, r"dimension must be between 1 and \d+ .*; got 0"),
        ({"dimension": 10**7}, "got 10000000"),
        ({"dimension": 5, "seed": -1}, r"seed must be a whole number from 0 .*; got -1"),
        ({"dimension": 5, "parameters": "tail"}, "no parameter is named tail.*embedding, blocks, norm, head"),
        ({"dimension": 5, "parameters": []}, "at least one"),
    ],
)
def test_errors_name_the_value_and_the_rule_and_leave_the_model_alone(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        subspace(model, **options)
    assert list(model.state_dict()) == list(small().state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_tied_parameters_and_a_second_subspace_are_refused():
    model = small()
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are one tied parameter"):
        subspace(model, 5)
    subspace(model, 5, parameters="blocks")
    with pytest.raises(ValueError, match="already; remove_subspace"):
        subspace(model, 5, parameters="blocks")
    with pytest.raises(ValueError, match="no subspace to remove"):
        remove_subspace(small())


def test_half_precision_weights_stay_half_precision():
    model = small().to(torch.bfloat16)
    handle = subspace(model, 20)
    loss = F.cross_entropy(model(TOKENS[None, :16]).float().flatten(0, 1), TOKENS[1:17])
    loss.backward()
    assert (
        model.head.weight.dtype == torch.bfloat16 and handle.z.dtype == handle.z.grad.dtype == torch.float32
    )
