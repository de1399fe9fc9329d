"""Rows of runs that nobody did, with a loss whose best rate is known; for what a stage asks for."""

import math
from collections.abc import Callable, Mapping

from lora_edu.recording import methods


def row_of(run: dict, best: Mapping[str, float]) -> dict:
    """The row of a run, the same for every seed; its loss is by log2 of the rate's distance from the method's best."""
    loss = 5 + abs(math.log2(run["rate"] / best[run["method"]])) / 10
    return run | {"validation": loss, "test": loss, "code": loss, "trained": 1, "stored": 1}


def all_rows(wanted: Callable, rows: list[dict], best: Mapping[str, float]) -> list[dict]:
    """Every row that a stage asks for, asked again until it wants no more."""
    while True:
        known = {methods.name_of(row) for row in rows}
        new = {methods.name_of(run): run for run in wanted(rows) if methods.name_of(run) not in known}
        if not new:
            return rows
        rows = rows + [row_of(run, best) for run in new.values()]
