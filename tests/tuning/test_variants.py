"""What every variant of LoRA must do: start as the base, come off bit for bit, fold, be saved, and refuse by name."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tinylm import LAYERS, TOKENS, moved, small
from tiny_models import portrait
from torch import nn

from lora_edu.lora import AdapterError, add_lora, lora_layers, save_adapter, trainable_parameters
from lora_edu.loss import next_token_loss
from lora_edu.training import fit
from lora_edu.tuning import applied, ia3, load_tuned, save_tuned, stored_parameters, trained_parameters
from lora_edu.tuning.variants import (
    RankBudget,
    adalora,
    deltas,
    dora,
    fold_adalora,
    fold_dora,
    fold_lora_xs,
    fold_vera,
    lora_xs,
    orthogonality,
    remove_adalora,
    remove_dora,
    remove_lora_xs,
    remove_vera,
    vera,
)

# method, options, how it comes off, how it folds, whether it takes the embedding, trained numbers of LAYERS at r = 3
SIDES = [(20, 20), (20, 20), (80, 20), (80, 20), (20, 40)]  # of LAYERS: in and out
LORA, PAIR = {"rank": 3, "alpha": 6}, {"rank": 3}
VARIANTS = {
    "dora": (dora, LORA, remove_dora, fold_dora, True, sum(3 * (m + n) + n for m, n in SIDES)),
    "vera": (vera, PAIR, remove_vera, fold_vera, False, sum(3 + n for _, n in SIDES)),
    "lora_xs": (lora_xs, LORA, remove_lora_xs, fold_lora_xs, True, 3 * 3 * len(SIDES)),
    "adalora": (adalora, LORA, remove_adalora, fold_adalora, False, sum(3 * (m + n) + 3 for m, n in SIDES)),
}


def put(kind, model, targets=LAYERS):
    method, options, *_ = VARIANTS[kind]
    return method(model, targets=targets, **options)


def targets_of(kind):
    return [*LAYERS, "embedding"] if VARIANTS[kind][4] else LAYERS


@pytest.fixture(params=VARIANTS)
def kind(request):
    return request.param


def test_it_starts_as_the_base_and_trains_only_its_own(kind):
    base, model = small(), put(kind, small())
    assert (model(TOKENS) - base(TOKENS)).abs().max() < (1e-12 if kind != "lora_xs" else 1e-3)
    assert trained_parameters(model) == VARIANTS[kind][5]
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    rate = 1e-2
    run = fit(
        model,
        lambda step: (TOKENS, TOKENS.flip(1)),
        torch.optim.Adam(trainable_parameters(model), lr=rate),
        6,
        schedule=lambda _: 1.0,
        progress=False,
    )
    assert run.steps[-1]["loss"] < run.steps[0]["loss"]
    assert all(torch.equal(dict(model.named_parameters())[name], each) for name, each in frozen.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_comes_off_bit_for_bit(kind, dtype):
    base, model = small(dtype), small(dtype)
    model.blocks[0].requires_grad_(False)
    before = portrait(model)
    moved(put(kind, model, targets_of(kind)))
    model(TOKENS)
    VARIANTS[kind][2](model)
    assert portrait(model) == before and applied(model) is None
    assert not any(each._forward_hooks for each in model.modules())
    assert torch.equal(model(TOKENS), base(TOKENS))


def test_folded_it_is_the_same_model_without_a_method(kind):
    base, model = small(), moved(put(kind, small(), targets_of(kind)))
    tuned, changes = model(TOKENS), deltas(model)
    VARIANTS[kind][3](model)
    assert (model(TOKENS) - tuned).abs().max() < 1e-11 and (tuned - base(TOKENS)).abs().max() > 1e-2
    assert applied(model) is None and list(model.state_dict()) == list(base.state_dict())
    for name, delta in changes.items():
        difference = model.get_submodule(name).weight - base.get_submodule(name).weight
        assert torch.allclose(difference, delta, atol=1e-12) and delta.abs().max() > 1e-4


def test_what_was_saved_is_loaded_trainable(kind, tmp_path):
    model = moved(put(kind, small(), targets_of(kind)))
    save_tuned(model, tmp_path)
    again = load_tuned(small(), tmp_path)
    assert torch.allclose(again(TOKENS), model(TOKENS), atol=1e-12) and applied(again) == kind
    assert trained_parameters(again) == trained_parameters(model)
    assert stored_parameters(again) == stored_parameters(model) >= trained_parameters(model)
    assert [name for name, each in again.named_parameters() if each.requires_grad] == [
        name for name, each in model.named_parameters() if each.requires_grad
    ]
    other = small(width=24, heads=4)
    before = portrait(other)
    with pytest.raises(AdapterError, match=r"20|24|another base"):
        load_tuned(other, tmp_path)
    assert portrait(other) == before


def test_a_file_that_lacks_or_holds_something_else_is_refused(kind, tmp_path):
    save_tuned(moved(put(kind, small())), tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    whole = load_file(weights)
    model = small()
    before = portrait(model)
    for key, tensor in whole.items():
        rest = {name: each for name, each in whole.items() if name != key}
        others = [rest, rest | {key: tensor.flatten()[1:].clone()}, rest | {f"{key}x": tensor.clone()}]
        for other in [*others, whole | {"strange": tensor.clone()}]:
            save_file(other, weights)
            with pytest.raises(AdapterError):
                load_tuned(model, tmp_path)
    assert portrait(model) == before


def test_a_deep_copy_comes_off_by_itself(kind):
    model = moved(put(kind, small()))
    twin, tuned = copy.deepcopy(model), model(TOKENS)
    moved(twin, 5)
    assert torch.equal(model(TOKENS), tuned) and not torch.equal(twin(TOKENS), tuned)
    VARIANTS[kind][2](twin)
    assert torch.equal(twin(TOKENS), small()(TOKENS)) and torch.equal(model(TOKENS), tuned)


def test_in_half_precision_the_trained_numbers_are_wide(kind):
    model = put(kind, small(torch.bfloat16))
    assert {each.dtype for each in trainable_parameters(model)} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16


def test_what_is_refused_leaves_the_model_alone(kind, tmp_path):
    method, options, remove, _, embedding, _ = VARIANTS[kind]
    model = small()
    before = portrait(model)
    with pytest.raises(ValueError, match="did you mean"):
        method(model, targets="querry", **options)
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        method(model, targets="query", **options | {"rank": 0})
    if not embedding:
        with pytest.raises(TypeError, match="embedding is an embedding, and"):
            method(model, targets="embedding", **options)
    with pytest.raises(ValueError, match="no .* to take off"):
        remove(model)
    assert portrait(model) == before
    tied = small()
    tied.head.weight = tied.embedding.weight
    with pytest.raises(ValueError, match="tied"):
        method(tied, targets="head", **options)
    put(kind, model)
    with pytest.raises(ValueError, match=rf"remove_{kind}\(model\) takes it off"):
        add_lora(model, 2, 2, "key")
    with pytest.raises(ValueError, match=rf"remove_{kind}\(model\) takes it off"):
        ia3(model)
    with pytest.raises(ValueError, match="no LoRA layer to save"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the model has LoRA already"):
        method(add_lora(small(), 2, 2, "key"), targets="query", **options)


def test_a_number_that_is_none_is_neither_folded_nor_saved(kind, tmp_path):
    model = put(kind, small())
    trainable_parameters(model)[0].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="isn't. Nothing was folded"):
        VARIANTS[kind][3](model)
    with pytest.raises(ValueError, match="not saved"):
        save_tuned(model, tmp_path)
    assert applied(model) == kind


def test_an_embedding_with_padding_is_refused_where_embeddings_are_taken(kind):
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 6))
    with pytest.raises(TypeError, match=r"padding_idx|linear layers"):
        put(kind, model, "0")


def test_deltas_of_plain_lora_are_those_of_its_layers():
    model = moved(add_lora(small(), 2, 4, [*LAYERS, "embedding"]))
    layers = lora_layers(model)
    assert deltas(model).keys() == layers.keys()
    assert all(torch.allclose(each, layers[name].delta_weight()) for name, each in deltas(model).items())
    with pytest.raises(ValueError, match="nothing on it, which has no ΔW"):
        deltas(small())


# DoRA


def test_dora_has_the_magnitudes_as_row_norms_and_starts_bit_for_bit():
    model, base = dora(small(), 3, 6, [*LAYERS, "embedding"]), small()
    assert torch.equal(model(TOKENS), base(TOKENS))
    query, table = model.blocks[0].attention.query, model.embedding
    assert torch.allclose(query.dora.magnitude, query.weight.norm(dim=1), atol=1e-14)
    assert torch.allclose(table.dora.magnitude, table.weight.norm(dim=0), atol=1e-14)


def test_doras_folded_rows_are_as_long_as_the_magnitudes_say():
    model = moved(dora(small(), 3, 6, "query"))
    layer = model.blocks[1].attention.query
    wanted, part = layer.dora.magnitude.detach().clone(), layer.dora
    turned = layer.weight + part.scaling * part.lora_B @ part.lora_A
    wanted_weight = (wanted[:, None] * turned / turned.norm(dim=1, keepdim=True)).detach()
    fold_dora(model)
    assert torch.allclose(layer.weight, wanted_weight, atol=1e-13)
    assert torch.allclose(layer.weight.norm(dim=1), wanted.abs(), atol=1e-13)


def test_doras_norm_gets_no_gradient():
    """§4.3: the gradient of B is that of m/c (W + s BA)x with c a constant; with c differentiated it is another."""
    model = moved(dora(small(), 3, 6, "query"))
    layer = model.blocks[0].attention.query
    part, x = layer.dora, torch.randn(7, 20, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = part.lora_B.grad.clone()

    def gradient(constant):
        turned = layer.weight + part.scaling * part.lora_B @ part.lora_A
        norm = turned.norm(dim=1).detach() if constant else turned.norm(dim=1)
        out = x @ (turned * (part.magnitude / norm)[:, None]).T + layer.bias
        return torch.autograd.grad(out.square().sum(), part.lora_B)[0]

    assert torch.allclose(got, gradient(True), rtol=1e-10)
    assert (got - gradient(False)).abs().max() > 1e-3 * got.abs().max()


def test_dora_refuses_a_row_without_a_direction():
    model = small()
    model.blocks[1].attention.query.weight.data[4] = 0
    with pytest.raises(ValueError, match=r"blocks.1.attention.query: row 4 of W is zero"):
        dora(model, 2, 2, "query")
    assert applied(model) is None


# VeRA


def test_vera_shares_one_frozen_pair_and_starts_at_one_tenth_and_zero():
    model = vera(small(), 30, LAYERS, seed=5)
    parts = {name: module.vera for name, module in model.named_modules() if hasattr(module, "vera")}
    assert len(parts) == 5 and len({id(part.shared) for part in parts.values()}) == 1
    shared = parts["head"].shared
    assert shared.A.shape == (30, 80) and shared.B.shape == (40, 30), (
        "the widest in and out; r above both sides"
    )
    for part in parts.values():
        assert (part.d == 0.1).all() and (part.b == 0).all()
    assert not any("shared" in name for name, _ in model.named_parameters())
    for matrix, columns in ((shared.A, 80), (shared.B, 30)):
        bound = (6 / columns) ** 0.5
        assert matrix.abs().max() <= bound and matrix.abs().max() > 0.95 * bound
    again = vera(small(), 30, LAYERS, seed=5).head.vera.shared
    assert torch.equal(again.A, shared.A)
    assert not torch.equal(vera(small(), 30, LAYERS, seed=6).head.vera.shared.A, shared.A)


def test_vera_is_its_formula_and_a_copy_shares_within_itself():
    model = moved(vera(small(), 3, LAYERS))
    layer, x = model.blocks[0].attention.query, torch.randn(4, 20, dtype=torch.float64)
    part = layer.vera
    A, B = part.shared.A[:, :20], part.shared.B[:20]
    wanted = nn.functional.linear(x, layer.weight, layer.bias) + part.b * ((part.d * (x @ A.T)) @ B.T)
    assert torch.allclose(layer(x), wanted, atol=1e-13)
    twin = copy.deepcopy(model).to(torch.float32)
    assert twin.head.vera.shared is twin.blocks[0].attention.query.vera.shared is not model.head.vera.shared
    assert twin.head.vera.shared.A.dtype == torch.float32
    with pytest.raises(ValueError, match="d_start must be a finite number other than 0"):
        vera(small(), 3, "query", d_start=0)


# LoRA-XS


def test_lora_xs_moves_w_between_its_own_singular_vectors():
    base, model = small(), moved(lora_xs(small(), 3, 6, [*LAYERS, "embedding"]))
    for name, delta in deltas(model).items():
        weight = base.get_submodule(name).weight.detach()
        W = weight.T if name == "embedding" else weight
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        delta = delta.T if name == "embedding" else delta
        inside = U[:, :3].T @ delta @ Vh[:3].T
        assert torch.allclose(U[:, :3] @ inside @ Vh[:3], delta, atol=1e-12), (
            "nothing outside of the top three"
        )
        R = model.get_submodule(name).lora_xs.R
        assert torch.allclose((inside / S[:3]).abs(), 2 * R.abs(), atol=1e-10), "s U R Σ Vᵀ, to signs"


def test_lora_xs_starts_at_the_base_with_std_0_and_has_a_gradient_there():
    model = lora_xs(small(), 3, 3, LAYERS, std=0)
    assert torch.equal(model(TOKENS), small()(TOKENS))
    model(TOKENS).square().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in trainable_parameters(model))
    stds = torch.cat(
        [each.R.flatten() for each in lora_xs(small(), 12, 3, LAYERS).modules() if hasattr(each, "R")]
    )
    assert 0.8e-5 < stds.std() < 1.2e-5


def test_lora_xs_knows_another_base(tmp_path):
    save_tuned(moved(lora_xs(small(), 3, 6, LAYERS)), tmp_path)
    other = small()
    other.head.weight.data *= 1.01
    with pytest.raises(AdapterError, match="head has other singular values than the W that R was trained on"):
        load_tuned(other, tmp_path)
    assert applied(other) is None


# AdaLoRA


def trained_adalora(steps=12, **options):
    model = adalora(small(), 3, 6, LAYERS)
    optimizer = torch.optim.Adam(trainable_parameters(model), 0.02)
    budget = RankBudget(model, 1, steps, **options).follow(optimizer)
    loss = lambda model, x, y: next_token_loss(model, x, y) + 0.1 * orthogonality(model)
    batches = lambda step: (TOKENS, TOKENS.flip(1))
    history = fit(model, batches, optimizer, steps, loss=loss, schedule=lambda _: 1.0, progress=False)
    return model, budget, history


def test_adaloras_budget_falls_by_the_cube_and_is_kept():
    model, budget, history = trained_adalora(start=2, end=3)
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    assert [budget.budget(step) for step in range(12)] == [
        15 if step <= 2 else int(10 * max(0, 1 - (step - 2) / 7) ** 3 + 5) for step in range(12)
    ]
    assert sum(budget.ranks().values()) == 5
    for name, rank in budget.ranks().items():
        singular = model.get_submodule(name).adalora.singular
        assert int((singular != 0).sum()) == rank
        assert torch.linalg.matrix_rank(deltas(model)[name]) == rank
    pattern = {name: rank for name, rank in budget.ranks().items() if rank}
    plain = add_lora(small(), pattern, 6, list(pattern))
    assert {name: layer.rank for name, layer in lora_layers(plain).items()} == pattern


def test_adalora_keeps_the_most_important_of_all_matrices_together():
    """Eq. 7 to 11 by hand for two steps: sensitivity, uncertainty, and the sum of Λ's and the means of P's and Q's."""
    model = adalora(small(), 3, 6, LAYERS)
    moved(model)
    budget, by_hand = RankBudget(model, 1, 10, beta1=0.7, beta2=0.6), {}
    for step in range(2):
        model.zero_grad()
        next_token_loss(model, TOKENS, TOKENS.roll(step + 1)).backward()
        for each in trainable_parameters(model):
            now = (each * each.grad).abs().detach()
            mean, spread = by_hand.get(each, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = 0.7 * mean + 0.3 * now
            by_hand[each] = mean, 0.6 * spread + 0.4 * (now - mean).abs()
        budget._weigh()
    score = {each: mean * spread for each, (mean, spread) in by_hand.items()}
    for name, found in budget.importance().items():
        part = model.get_submodule(name).adalora
        wanted = score[part.singular][:, 0] + score[part.P].mean(0) + score[part.Q].mean(1)
        assert torch.allclose(found, wanted, rtol=1e-10)
    budget._choose(4)
    flat = torch.cat(list(budget.importance().values())).sort(descending=True).values
    kept = torch.cat([each[budget.kept[name]] for name, each in budget.importance().items()])
    assert sorted(kept.tolist(), reverse=True) == flat[:4].tolist()


def test_orthogonality_is_zero_for_orthonormal_factors_and_pulls_towards_them():
    model = adalora(small(), 3, 6, LAYERS)
    assert abs(orthogonality(model).item() - 3**0.5) < 0.1, "P and Q are near zero at the start"
    for each in model.modules():
        if hasattr(each, "adalora"):
            each.adalora.P.data = torch.linalg.qr(each.adalora.P.data).Q
            each.adalora.Q.data = torch.linalg.qr(each.adalora.Q.data.T).Q.T
    assert orthogonality(model).item() < 1e-12


def test_adalora_refuses_budgets_that_cannot_be():
    model = adalora(small(), 3, 6, LAYERS)
    for options, message in (
        ({"target_rank": 4, "steps": 9}, r"between 1 and 15 singular values in all 5 matrices; 4 leaves 20"),
        ({"target_rank": 0.05, "steps": 9}, "leaves 0"),
        ({"target_rank": 1, "steps": 9, "start": 5, "end": 4}, "must leave some of the steps between them"),
        ({"target_rank": 1, "steps": 9, "beta1": 1.0}, "beta1 must be between 0 and 1; got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            RankBudget(model, **options)
    with pytest.raises(ValueError, match="no AdaLoRA; adalora"):
        RankBudget(small(), 1, 9)
    with pytest.raises(ValueError, match="no AdaLoRA; adalora"):
        orthogonality(small())
    with pytest.raises(RuntimeError, match=r"call after_step before zero_grad\(\)"):
        RankBudget(model, 1, 9).after_step(0)
