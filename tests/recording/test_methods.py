"""The methods side by side: which runs are asked for, what a run trains, that every wanted row is recorded."""

from itertools import pairwise

import pytest
import torch
from made_up_rows import all_rows

from lora_edu.data import load_checkpoint, load_methods
from lora_edu.data.runs import method_grid, tuned_method, tuned_rate
from lora_edu.recording import methods
from lora_edu.tinylm import TinyLM

# A loss whose best rate is known: log2 of its distance from it, the same for every seed.
BEST = dict.fromkeys(methods.SIZES, 0.01) | {"prompt": 3.0, "prefix": 1e-4}


def test_a_grid_grows_until_its_best_lies_inside_and_then_there_are_three_seeds():
    rows = all_rows(methods.wanted_far, [], BEST)
    for method, sizes in methods.SIZES.items():
        for size in sizes:
            rate = tuned_rate(rows, "far", method, size, methods.STEPS)
            assert 0.7 < rate / BEST[method] < 1.5, (method, size, rate)
            seeds = {
                row["seed"]
                for row in rows
                if (row["method"], row["size"], row["rate"]) == (method, size, rate)
            }
            assert seeds == set(methods.SEEDS), (method, size)
        for size in {sizes[0], sizes[-1]}:
            grid = [row["rate"] for row in method_grid(rows, "far", method, size, methods.STEPS)]
            assert len(grid) >= 5 and grid[0] < rate < grid[-1], (method, size, grid)
            assert all(1.9 < b / a < 2.1 for a, b in pairwise(grid)), grid
    between = [row for row in rows if row["method"] == "lora" and row["size"] == 4]
    assert len(between) == 3  # no grid of its own
    more = all_rows(methods.wanted_long, all_rows(methods.wanted_near, rows, BEST), BEST)
    for method, size in methods.ONE_SIZE.items():
        near = tuned_method(more, "near", method, size, methods.STEPS)
        assert near is not None and near["rate"] == pytest.approx(BEST[method], rel=0.5)
        long = tuned_method(more, "far", method, size, methods.LONG)
        assert (long is not None) == (method in methods.PATIENT)


def test_a_rate_at_the_edge_of_its_grid_is_not_a_tuned_one_and_one_that_blew_up_counts():
    about = {"task": "far", "method": "prompt", "size": 4, "steps": 100, "seed": 0}
    rows = [about | {"rate": rate, "validation": loss} for rate, loss in ((0.01, 3.0), (0.02, 2.0))]
    assert (
        tuned_method(rows, "far", "prompt", 4, 100) is None
        and tuned_rate(rows, "far", "prompt", 4, 100) is None
    )
    rows.append(about | {"rate": 0.04, "validation": None})
    assert tuned_method(rows, "far", "prompt", 4, 100)["rate"] == 0.02
    rows += [about | {"size": 16, "rate": rate, "validation": rate} for rate in (0.16, 0.08, 0.32)]
    assert tuned_rate(rows, "far", "prompt", 8, 100) is None  # of size 16 nothing is tuned
    rows.append(about | {"size": 16, "rate": 0.04, "validation": 1.0})
    assert tuned_rate(rows, "far", "prompt", 8, 100) == 0.04  # half-way between 4 (0.02) and 16 (0.08)
    assert tuned_rate(rows, "far", "prompt", 32, 100) is None


@pytest.mark.parametrize("method", methods.SIZES)
def test_a_method_starts_where_it_should_and_trains_its_numbers_alone(method):
    base = TinyLM.from_state_dict(load_checkpoint("base")).eval()
    tokens = torch.arange(64).view(2, 32) + 300
    with torch.no_grad():
        before = base(tokens)
    size = methods.SIZES[method][0]
    model = methods.apply(base, method, size).eval()
    with torch.no_grad():
        apart = float((model(tokens) - before).abs().max())
    virtual = method in ("prompt", "p-tuning", "prefix", "prefix through an MLP")
    assert (apart > 1e-3) if virtual else apart == 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = size or 0
    expected = {
        "full": 2_728_000,
        "lora": 10_800 * size,
        "lora everywhere": 31_000 * size,
        "bottleneck": 12 * (201 * size + 100),
        "bitfit": 6_700,
        "ia3": 6 * (100 + 100 + 400),
        "prefix": 1_200 * size,
        "prompt": 100 * size,
        "p-tuning": 100 * size + 3 * 10_100,
        "prefix through an MLP": 100 * size + 10_100 + 101 * 1_200,
    }[method]
    assert trained == expected
    stored = {"p-tuning": 100 * size, "prefix through an MLP": 1_200 * size}.get(method, expected)
    assert methods.stored(model) == stored
    groups = methods.groups_of(model, 0.3)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained
    assert [group["lr"] for group in groups] == ([0.3, 0.3 / 3] if method == "lora everywhere" else [0.3])


def mark(windows: torch.Tensor) -> torch.Tensor:
    """A number for each window of 32 tokens that is as good as the tokens themselves."""
    return (windows * torch.arange(1, 33) ** 9).sum(-1)


def test_the_windows_of_a_task_are_apart_and_none_is_trained_on():
    for task in ("far", "near"):
        text = methods.texts(task)
        assert {name: len(text[name]) for name in ("validation", "test", "code")} == {
            "validation": 30,
            "test": 60,
            "code": 30,
        }
        train = mark(text["train"].unfold(0, 32, 1))
        seen = {name: mark(text[name].unfold(1, 32, 1).flatten(0, 1)) for name in ("validation", "test")}
        both = torch.isin(seen["validation"], seen["test"]).double().mean()
        trained_on = torch.isin(seen["test"], train).double().mean()
        assert both < 0.1 and trained_on < 0.1, (task, both, trained_on)  # docstrings repeat one another


@pytest.mark.slow
def test_a_done_run_is_read_and_one_that_blows_up_is_a_row_too(tmp_path, monkeypatch):
    run = {"task": "far", "method": "ia3", "size": None, "rate": 1e-2, "steps": 2, "seed": 0}
    row = methods.record(run, tmp_path)
    assert row["test"] < methods.untuned("far")["test"] and not list(tmp_path.glob("*.run"))
    monkeypatch.setattr(methods, "fit", None)
    assert methods.record(run, tmp_path) == row

    def explode(*args, **kwargs):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(methods, "fit", explode)
    failed = methods.record(run | {"rate": 99.0}, tmp_path)
    assert failed["validation"] is None and "nan" in failed["failed"]


def test_every_wanted_row_is_recorded_and_nothing_else():
    rows = load_methods()
    before = [row for row in rows if row["method"] == "none"]
    assert [row["task"] for row in before] == ["far", "near"]
    own = [row for row in rows if row["method"] != "none"]
    wanted = {
        methods.name_of(run)
        for stage in methods.STAGES.values()
        for run in stage(own, methods.STEPS, methods.LONG)
    }
    assert {methods.name_of(row) for row in own} == wanted
    for method, sizes in methods.SIZES.items():
        for size in sizes:
            rate = tuned_rate(own, "far", method, size, methods.STEPS)
            assert rate is not None, (method, size)
            found = load_methods(task="far", method=method, size=size, rate=rate, steps=methods.STEPS)
            assert sorted(row["seed"] for row in found) == [0, 1, 2]
            assert all(row["test"] < before[0]["test"] for row in found), (method, size)


@pytest.mark.slow
def test_the_losses_before_tuning_are_found_again():
    for row in load_methods(method="none"):
        now = methods.untuned(row["task"])
        assert now["test"] == pytest.approx(row["test"], abs=0.05)  # another version of numpy, another text
