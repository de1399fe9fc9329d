"""Recorded rows are read without what made them."""

import subprocess
import sys

from lora_edu.data import load_sweeps
from lora_edu.data.runs import UNBRACKETED, grid_of, inside_grid, name_of, run_of, tuned_rows

READERS = "from lora_edu.data.runs import best, by_dimension, levels, tuned_full, tuned_runs"
LOADED = f"{READERS}\nimport sys\nprint(*sorted(m for m in sys.modules if m.startswith('lora_edu')))"


def test_reading_a_row_loads_neither_training_nor_tuning_nor_lora():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "lora_edu",
        "lora_edu.data",
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
