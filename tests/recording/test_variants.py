"""The variants side by side: which runs are asked for, what a run trains, that every wanted row is recorded."""

import math
from itertools import pairwise

import pytest
import torch
from made_up_rows import all_rows, row_of

from lora_edu.data import load_methods, load_variants
from lora_edu.data.runs import method_grid, tuned_method, tuned_rate
from lora_edu.lora import lora_layers
from lora_edu.loss import next_token_loss
from lora_edu.recording import methods, variants
from lora_edu.tuning import stored_parameters, trained_parameters
from lora_edu.tuning.variants import Muon, deltas

# A loss whose best rate is known: log2 of its distance from it, the same for every seed. Two lie outside the five.
BEST = dict.fromkeys([*variants.SIZES, *variants.SCALES], 0.008) | {"vera": 2.0, "lora+": 2.5e-4}
LORA_AT_16 = [  # methods.py's own
    {"task": "far", "method": "lora", "size": 16, "rate": rate, "steps": methods.STEPS, "seed": 0}
    for rate in (4e-3, 8e-3, 1.6e-2)
]


def test_a_grid_grows_until_its_best_lies_inside_and_then_there_are_three_seeds():
    rows = all_rows(
        variants.wanted_near,
        all_rows(variants.wanted_far, [row_of(run, BEST) for run in LORA_AT_16], BEST),
        BEST,
    )
    for method, sizes in variants.SIZES.items():
        tests = [("far", size) for size in sizes] + ([("near", sizes[0])] if method != "lora" else [])
        for task, size in tests:
            rate = tuned_rate(rows, task, method, size, methods.STEPS)
            assert rate is not None and 0.7 < rate / BEST[method] < 1.5, (task, method, size, rate)
            about = {"task": task, "method": method, "size": size, "rate": rate}
            assert sorted(row["seed"] for row in rows if about.items() <= row.items()) == list(methods.SEEDS)
            grid = [row["rate"] for row in method_grid(rows, task, method, size, methods.STEPS)]
            least = 5 if (task, size) == ("far", sizes[0]) else 3
            assert len(grid) >= least and grid[0] < rate < grid[-1], (task, method, size, grid)
            assert all(1.9 < b / a < 2.1 for a, b in pairwise(grid)), grid
    assert not [row for row in rows if row["task"] == "near" and row["method"] == "lora"]


def test_every_rate_is_a_power_of_two_thousandths_so_that_variants_share_rates():
    rows = all_rows(
        variants.wanted_scaling,
        all_rows(variants.wanted_far, [row_of(run, BEST) for run in LORA_AT_16], BEST),
        BEST,
    )
    for row in rows:
        power = math.log2(row["rate"] / 1e-3)  # three digits are kept of a rate: 1.02 for 1.024
        assert abs(power - round(power)) < 0.01, row
    scalings = {(row["method"], row["size"]) for row in rows} - {
        (method, size) for method, sizes in variants.SIZES.items() for size in sizes
    }
    assert scalings == {(name, rank) for name in variants.SCALES for rank in (1, 16)} | {("pissa", 1)}
    for method, size in scalings:
        assert tuned_method(rows, "far", method, size, methods.STEPS) is not None


def _prepared(method: str, size: int, **options):
    run = {"task": "far", "method": method, "size": size, "rate": 0.01, "steps": 20, "seed": 0}
    return variants.prepare(run | options)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*variants.SIZES, *variants.SCALES])
def test_a_variant_starts_as_the_base_and_trains_its_numbers_alone(method):
    size = variants.SIZES.get(method, (16,))[0]
    model, optimizer, told = _prepared(method, size)
    tokens = methods.texts("far")["test"][:2, :33]
    base = variants.TinyLM.from_state_dict(variants.regimes.start("far")).eval()
    with torch.no_grad():
        apart = float((model.eval()(tokens) - base(tokens)).abs().max())
    assert apart == 0 if method not in ("pissa", "lora-ga", "lora-xs") else apart < 5e-3
    inside = 6 * (4 * (100 + 100) + 2 * (100 + 400))  # in + out of the blocks' 36 matrices
    rows = 6 * (5 * 100 + 400)
    expected = {
        "dora": inside * size + rows,
        "adalora": round(1.5 * size) * (inside + 36),
        "vera": 36 * size + rows,
        "lora-xs": 36 * size**2,
    }.get(method, inside * size)
    assert trained_parameters(model) == expected
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) and sum(p.numel() for p in held) == expected
    assert isinstance(optimizer, Muon) == (method == "muon")
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == ({0.01, 0.16} if method == "lora+" else {0.01})
    loss = told.get("loss", next_token_loss)(model, tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    assert all(delta.norm() > 0 for delta in deltas(model).values())


@pytest.mark.parametrize(
    "name, rank, s",
    [
        ("lora, alpha 4", 1, 4),
        ("lora, alpha 4", 16, 0.25),
        ("rslora, alpha 2", 1, 2),
        ("rslora, alpha 2", 16, 0.5),
    ],
)
def test_scalings_differ_from_lora_in_s_alone_and_meet_it_at_rank_4(name, rank, s):
    model, _, _ = _prepared(name, rank)
    assert {layer.scaling for layer in lora_layers(model).values()} == {s}
    assert variants.SCALES[name](4) == 1


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match=r"one of lora, lora\+, .*; got 'qlora'"):
        _prepared("qlora", 4)


@pytest.mark.slow
def test_adaloras_row_has_its_ranks_and_they_add_up_and_what_started_in_w_is_stored_twice(tmp_path):
    run = {"task": "far", "method": "adalora", "size": 2, "rate": 0.02, "steps": 10, "seed": 0}
    row = variants.record(run, tmp_path)
    assert sum(row["ranks"].values()) == 36 * 2 and max(row["ranks"].values()) <= 3
    assert row["trained"] == 3 * (10_800 + 36) == row["stored"]
    row = variants.record(run | {"method": "pissa", "rate": 1e-3, "steps": 2}, tmp_path)
    assert (row["trained"], row["stored"]) == (21_600, 43_200) and "ranks" not in row
    assert not list(tmp_path.glob("*.run"))


def test_a_run_that_blows_up_is_a_row_too(tmp_path, monkeypatch):
    def explode(*args, **kwargs):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(methods, "fit", explode)
    run = {"task": "far", "method": "lora", "size": 1, "rate": 99.0, "steps": 2, "seed": 0}
    failed = variants.record(run, tmp_path)
    assert failed["validation"] is None and "nan" in failed["failed"]


def test_every_wanted_row_is_recorded_and_nothing_else():
    rows = load_variants()
    wanted = {
        methods.name_of(run)
        for stage in variants.STAGES.values()
        for run in stage(rows, methods.STEPS, methods.LONG)
    }
    lora = {methods.name_of(row) for row in load_methods(method="lora", steps=methods.STEPS)}
    assert {methods.name_of(row) for row in rows} == wanted | lora
    assert len(rows) == len({methods.name_of(row) for row in rows})
    untuned = {row["task"]: row["test"] for row in load_methods(method="none")}
    for method, sizes in variants.SIZES.items():
        for task, size in [*(("far", size) for size in sizes), ("near", sizes[0])]:
            rate = tuned_rate(rows, task, method, size, methods.STEPS)
            assert rate is not None, (task, method, size)
            found = load_variants(task=task, method=method, size=size, rate=rate)
            assert sorted(row["seed"] for row in found) == [0, 1, 2], (task, method, size)
            assert all(row["test"] < untuned[task] for row in found), (task, method, size)


def test_the_recorded_ranks_of_adalora_spend_its_budget():
    rows = [row for row in load_variants(method="adalora") if row["test"] is not None]
    assert rows
    for row in rows:
        assert len(row["ranks"]) == 36 and sum(row["ranks"].values()) == 36 * row["size"]
        assert max(row["ranks"].values()) <= round(variants.EXTRA * row["size"])


def test_what_is_stored_of_a_variant_is_said_in_its_rows():
    for method in ("pissa", "lora-ga"):
        assert all(row["stored"] == 2 * row["trained"] for row in load_variants(method=method) if row["test"])
    model = _prepared("vera", 1050)[0]
    [row, *_] = load_variants(method="vera", seed=0)
    assert row["stored"] == stored_parameters(model) and row["trained"] == trained_parameters(model)
