"""Recorded rows are read without what made them."""

import subprocess
import sys

from lora_edu.data import load_sweeps
from lora_edu.data.runs import UNBRACKETED, grid_of, inside_grid, method_runs, name_of, run_of, tuned_rows

READERS = "from lora_edu.data.runs import best, by_dimension, levels, tuned_full, tuned_runs"
LOADED = f"{READERS}\nimport sys\nprint(*sorted(m for m in sys.modules if m.startswith('lora_edu')))"


def test_reading_a_row_loads_neither_training_nor_tuning_nor_lora():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "lora_edu",
        "lora_edu.data",
        "lora_edu.data.comparison",
        "lora_edu.data.corpus",
        "lora_edu.data.runs",
        "lora_edu.data.shipped",
        "lora_edu.paths",
    ]


def _row(rate: float, loss: float, **settings) -> dict:
    run = run_of(rate=rate, **settings)
    return run | {"name": name_of(run), "test": loss, "evaluations": [{"loss": loss}]}


def test_a_row_is_inside_its_grid_when_smaller_and_larger_rates_were_tried_too():
    rows = [_row(rate, loss, rank=8) for rate, loss in ((0.01, 3.0), (0.02, 2.0), (0.04, 2.5))]
    rows += [_row(rate, loss, rank=4) for rate, loss in ((0.01, 3.0), (0.02, 2.0))]
    rows.append(_row(0.08, 1.0, rank=8, seed=1))  # another seed, another scale: other grids
    rows.append(_row(0.08, 1.0, rank=8, scale=2.0))
    assert [row["name"] for row in tuned_rows(rows)] == ["lora rank=8 rate=0.02", "lora rank=4 rate=0.02"]
    assert [inside_grid(rows, row) for row in tuned_rows(rows)] == [True, False]
    assert grid_of(rows, rows[0]) == [0.01, 0.02, 0.04]
    rows.append(_row(0.04, 1.0, rank=4) | {"test": None})  # blew up: a larger rate was tried
    assert inside_grid(rows, rows[4])


def test_no_recorded_row_is_called_tuned_at_the_edge_of_its_grid_unless_it_is_listed():
    rows = load_sweeps()
    at_edge = {row["name"]: row for row in tuned_rows(rows) if not inside_grid(rows, row)}
    assert len(tuned_rows(rows)) > 25 and set(at_edge) == set(UNBRACKETED)
    for name, untried in UNBRACKETED.items():  # the rate that is missing lies beyond the edge
        grid = grid_of(rows, at_edge[name])
        assert untried < grid[0] == at_edge[name]["rate"] or untried > grid[-1] == at_edge[name]["rate"], name


def _method(method: str, size: int | None, losses: dict[float, float | None], seed: int = 0) -> list[dict]:
    about = {"task": "far", "method": method, "size": size, "steps": 100, "seed": seed}
    return [about | {"rate": rate, "validation": loss, "test": loss} for rate, loss in losses.items()]


def test_runs_of_a_method_are_those_at_the_rate_that_lies_between_others():
    rows = _method("lora", 1, {0.01: 3.0, 0.02: 2.0, 0.04: 2.5}) + _method("lora", 1, {0.02: 2.2}, seed=1)
    rows += _method("lora", 4, {0.01: 1.0, 0.02: 2.0, 0.04: 2.5})  # best at the edge: not tuned
    rows += _method("prompt", 4, {0.01: 3.0, 0.02: 2.0, 0.04: None})  # blew up: a larger rate was tried
    rows += _method("prompt", 4, {0.02: None}, seed=1)  # but another seed blew up at the best rate
    rows += [row | {"steps": 400} for row in _method("full", None, {0.01: 3.0, 0.02: 2.0, 0.04: 2.5})]
    found = method_runs(rows, "far", 100)
    assert list(found) == [("lora", 1)]
    assert [(row["rate"], row["seed"]) for row in found["lora", 1]] == [(0.02, 0), (0.02, 1)]
    assert list(method_runs(rows, "far", 400)) == [("full", None)]


def test_a_size_without_a_grid_has_the_rate_between_those_of_its_neighbours():
    rows = _method("lora", 1, {0.02: 3.0, 0.04: 2.0, 0.08: 2.5}) + _method(
        "lora", 16, {0.005: 3.0, 0.01: 2.0, 0.02: 2.5}
    )
    rows += _method("lora", 4, {0.02: 1.9})
    found = method_runs(rows, "far", 100)
    assert [row["rate"] for row in found["lora", 4]] == [
        0.02
    ]  # 4 is halfway from 1 to 16, as 0.02 from 0.04 to 0.01
