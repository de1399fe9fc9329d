"""LoRA that starts in W: PiSSA and LoRA-GA, what they start with, that W comes back, and their way to plain LoRA."""

import copy

import pytest
import torch
from small_tinylm import LAYERS, TOKENS, moved, small
from tiny_models import portrait
from torch import nn

from lora_edu.lora import (
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    trainable_parameters,
    unmerge_lora,
)
from lora_edu.loss import next_token_loss
from lora_edu.tuning.variants import as_lora, deltas, first_gradient, lora_ga, pissa

ALL = [*LAYERS, "embedding"]
BATCHES = [(TOKENS, TOKENS.flip(1)), (TOKENS.flip(0), TOKENS.roll(1, 1))]
STARTS = {
    "pissa": lambda model, rank=3, targets=ALL, **options: pissa(model, rank, 2 * rank, targets, **options),
    "lora_ga": lambda model, rank=3, targets=ALL, **options: lora_ga(
        model, first_gradient(model, BATCHES, targets), rank, 2 * rank, **options
    ),
}


@pytest.fixture(params=STARTS)
def start(request):
    return STARTS[request.param]


@pytest.mark.parametrize("stabilised", [False, True])
def test_it_starts_as_the_base_and_w_comes_back_bit_for_bit(start, stabilised):
    base, model = small(), small()
    model.blocks[0].requires_grad_(False)
    before = portrait(model)
    assert start(model, rank_stabilised=stabilised) is model
    assert (model(TOKENS) - base(TOKENS)).abs().max() < 1e-12
    for name, layer in lora_layers(model).items():
        assert (layer.weight - base.get_submodule(name).weight).abs().max() > 1e-3, "W_res isn't W"
        assert layer.lora_A.abs().max() > 1e-3 and layer.lora_B.abs().max() > 1e-3
        assert deltas(model)[name].abs().max() == 0
    moved(model)
    remove_lora(model)
    assert portrait(model) == before and torch.equal(model(TOKENS), base(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision_too(start, dtype):
    base, model = small(dtype), start(small(dtype))
    share = (model(TOKENS) - base(TOKENS)).norm() / base(TOKENS).norm()
    assert share < 20 * torch.finfo(dtype).eps
    remove_lora(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_moved_to_another_dtype_it_comes_off_there(start):
    model = remove_lora(start(small(torch.float32)).double())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), small(torch.float32).double().parameters(), strict=True)
    )


def test_merged_unmerged_and_kept(start):
    base, model = small(), moved(start(small()))
    tuned, changes = model(TOKENS), deltas(model)
    assert (tuned - base(TOKENS)).abs().max() > 1e-2
    merge_lora(model)
    assert (model.eval()(TOKENS) - tuned).abs().max() < 1e-11
    unmerge_lora(model)
    remove_lora(model, merge=True)
    assert not lora_layers(model) and (model(TOKENS) - tuned).abs().max() < 1e-11
    for name, delta in changes.items():
        got = model.get_submodule(name).weight - base.get_submodule(name).weight
        assert torch.allclose(got, delta, atol=1e-11)


@pytest.mark.parametrize("stabilised", [False, True])
def test_as_lora_it_is_the_same_model_of_twice_the_rank_on_the_untouched_w(start, stabilised, tmp_path):
    base, model = small(), moved(start(small(), rank_stabilised=stabilised))
    tuned, changes = model(TOKENS), deltas(model)
    scalings = [layer.scaling for layer in lora_layers(model).values()]
    with pytest.raises(ValueError, match=r"started in W itself .*as_lora\(model\)"):
        save_adapter(model, tmp_path)
    assert as_lora(model) is model
    assert (model(TOKENS) - tuned).abs().max() < 1e-11
    for (name, layer), scaling in zip(lora_layers(model).items(), scalings, strict=True):
        assert layer.rank == 6 and abs(layer.scaling / scaling - 1) < 1e-15
        assert torch.equal(layer.weight, base.get_submodule(name).weight)
        assert torch.allclose(layer.delta_weight(), changes[name], atol=1e-12)
        assert layer.lora_A.requires_grad and layer.lora_B.requires_grad and not layer.weight.requires_grad
    save_adapter(model, tmp_path)
    assert (load_adapter(small(), tmp_path)(TOKENS) - tuned).abs().max() < 1e-11
    with pytest.raises(ValueError, match="no layer of the model has started in W"):
        as_lora(model)
    remove_lora(model)
    assert torch.equal(model(TOKENS), base(TOKENS))


def test_a_merged_one_is_not_turned_and_a_copy_is_its_own(start):
    model = start(small())
    twin = copy.deepcopy(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"is merged; unmerge_lora\(model\) first"):
        as_lora(model)
    as_lora(moved(twin))
    unmerge_lora(model)
    assert (model(TOKENS) - small()(TOKENS)).abs().max() < 1e-12


def test_a_padding_row_stays_the_bases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8, padding_idx=5), nn.Linear(8, 8))
    nn.init.normal_(model[0].weight)
    tokens, base = torch.arange(12), copy.deepcopy(model)
    pissa(model, 3, 3, "0")
    assert torch.equal(model(tokens)[5], base(tokens)[5])
    assert torch.allclose(model(tokens), base(tokens), atol=1e-5)


# PiSSA


def test_pissa_starts_with_the_top_of_ws_svd_in_equal_halves():
    """Eq. 2 to 4: BA of s BA is the best rank-r matrix to W, and W_res has the other singular values."""
    model, base = STARTS["pissa"](small(), 4), small()
    for name, layer in lora_layers(model).items():
        weight = base.get_submodule(name).weight.detach()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        top = U[:, :4] * S[:4] @ Vh[:4]
        assert torch.allclose(layer.delta_weight(), top, atol=1e-12)
        assert torch.allclose(torch.linalg.svdvals(layer.weight)[:-4], S[4:], atol=1e-12)
        A, B = (layer.lora_A.T, layer.lora_B) if name == "embedding" else (layer.lora_A, layer.lora_B)
        half = torch.diag(S[:4] / layer.scaling)
        assert torch.allclose(A @ A.T, half, atol=1e-12) and torch.allclose(B.T @ B, half, atol=1e-12)


def test_pissa_refuses_what_has_no_root_or_no_svd():
    model = small()
    before = portrait(model)
    with pytest.raises(ValueError, match=r"blocks.0.attention.query: alpha must be above 0.*got s = -1"):
        pissa(model, 2, -2, "query")
    assert portrait(model) == before
    model.blocks[1].mlp.down.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.down: matrix must be finite"):
        pissa(model, 2, 2, "down")
    assert not lora_layers(model)
    pissa(model, 2, 2, "query")
    with pytest.raises(ValueError, match="the model has LoRA already"):
        pissa(model, 2, 2, "key")


# LoRA-GA


def whole(gradient):
    return sum(next_token_loss(gradient, *batch) for batch in BATCHES) / len(BATCHES)


def test_first_gradient_is_that_of_full_tuning_and_leaves_the_model_alone():
    model, full = small(), small()
    model.blocks[0].requires_grad_(False)
    before = portrait(model)
    found = first_gradient(model, BATCHES, ALL)
    assert portrait(model) == before and all(each.grad is None for each in model.parameters())
    whole(full).backward()
    assert len(found) == 6
    for name, gradient in found.items():
        assert torch.allclose(gradient, full.get_submodule(name).weight.grad, atol=1e-13)
    with pytest.raises(ValueError, match="batches must hold at least one pair"):
        first_gradient(model, [], "query")
    with pytest.raises(ValueError, match=r"blocks.0.attention.query has no gradient"):
        first_gradient(model, BATCHES, "query", lambda model, x, y: model.head.weight.sum())
    with pytest.raises(ValueError, match=r"blocks.1.attention.query has no gradient"):
        first_gradient(
            model, BATCHES, "query", lambda model, x, y: model.blocks[0].attention.query.weight.sum()
        )
    assert portrait(model) == before


@pytest.mark.parametrize("rank, stabilised", [(1, True), (3, True), (3, False)])
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r(rank, stabilised):
    """Theorem 3.1: to first order in the rate SGD moves ΔW along −∇W cut to rank 2r, by c² s² with c = out^¼ / √γ."""
    gradients = first_gradient(small(), BATCHES, ALL)
    model = lora_ga(small(), gradients, rank, 4, gamma=9.0, rank_stabilised=stabilised)
    rate = 1e-7
    optimizer = torch.optim.SGD(trainable_parameters(model), rate)
    whole(model).backward()
    optimizer.step()
    for name, layer in lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        best = U[:, : 2 * rank] * S[: 2 * rank] @ Vh[: 2 * rank]
        out = layer.lora_B.shape[0]
        wanted = -rate * layer.scaling**2 * out**0.5 / 9.0 * best
        assert (deltas(model)[name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_lora_gas_stable_scale():
    """The stable scale: rows of A and columns of B are of length out^¼ / √γ, so that ‖A‖ = ‖B‖ = out^¼ √(r/γ)."""
    model = STARTS["lora_ga"](small(), 4)
    for layer in lora_layers(model).values():
        size = layer.lora_B.shape[0] ** 0.25 * (4 / 16.0) ** 0.5
        assert torch.allclose(layer.lora_A.norm(), torch.tensor(size).double(), rtol=1e-6)
        assert torch.allclose(layer.lora_B.norm(), torch.tensor(size).double(), rtol=1e-6)


def test_lora_ga_refuses_a_gradient_that_does_not_fit():
    model, gradients = small(), first_gradient(small(), BATCHES, "query")
    before = portrait(model)
    name = "blocks.0.attention.query"
    for changed, rank, message in (
        (gradients[name][:, :9], 2, r"the gradient must be \(20, 20\) as the weight; got \(20, 9\)"),
        (gradients[name], 11, "rank must be at most 10, half the rank of the gradient"),
        (torch.zeros(20, 20), 2, "rank must be at most 0"),
        (gradients[name] * float("inf"), 2, "must be finite"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}|{name}: {message}"):
            lora_ga(model, gradients | {name: changed}, rank, 2)
    with pytest.raises(ValueError, match="gradients must hold at least one layer's"):
        lora_ga(model, {}, 2, 2)
    with pytest.raises(ValueError, match="gamma must be a finite number above 0; got 0"):
        lora_ga(model, gradients, 2, 2, gamma=0)
    assert portrait(model) == before
