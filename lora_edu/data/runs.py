"""Rows that were recorded (data/sweeps.json): what a run's settings are, and which row answers a question.

Nothing is trained here and torch is not needed: `lora_edu.recording` makes the rows.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

# 200 steps of 8 × 256 tokens: 410 000, three fifths of the reference text's training part
STEPS, BATCH = 200, 8
RANKS = (1, 2, 4, 8, 16, 32, 64)
TUNED_AT = (
    1,
    8,
    64,
)  # ranks at which LoRA's rate was looked for; between them it lies on a line in the logarithms
SIZES = {"all": 2_728_000, "blocks": 727_800}  # parameters of TinyLM, by where a subspace lies
# A run's settings and what they are where a run doesn't name them. rank: of all targets, or by target. scale: s, the
# factor before BA. embedding: the embedding's learning rate as a share of the others'.
SETTINGS = {
    "text": "reference",  # or manual; reference/10, a tenth of it; planted: code, towards chapter 03's planted model
    "method": "lora",  # or full, subspace, frozen A
    "rank": None,
    "scale": 1.0,
    "targets": "all",
    "dimension": None,
    "rate": None,
    "embedding": 1 / 3,
    "seed": 0,
    "steps": STEPS,
    "patience": None,
}


# Best of their grid, but at its edge: name → the rate next to it that was not tried. Whoever shows one says so.
# The two ranks of LoRA have the rate that `rate_for` interpolates, and a smaller one to compare with.
UNBRACKETED: dict[str, float] = {
    "subspace dimension=1000 rate=0.0783": 0.0392,
    "lora rank=16 rate=0.015": 0.03,
    "lora rank=32 rate=0.0095": 0.019,
}


def run_of(**settings) -> dict:
    """The settings of a run, complete. Raises KeyError for a name that is none."""
    if unknown := set(settings) - set(SETTINGS):
        raise KeyError(f"unknown settings {sorted(unknown)}; there are {', '.join(SETTINGS)}")
    return SETTINGS | settings


def name_of(run: Mapping) -> str:
    """A run's name: the settings that differ from the usual ones. It is a file's name, too."""
    words = [str(run["method"])]
    for key, usual in SETTINGS.items():
        if key != "method" and run[key] != usual:
            value = run[key]
            if isinstance(value, Mapping):
                value = "+".join(f"{name}.{number}" for name, number in value.items())
            words.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(words).replace("/", "_")


def best(rows: Iterable[Mapping], **settings) -> dict:
    """The row with these settings whose validation loss is lowest."""
    fitting = [
        row
        for row in rows
        if row["test"] is not None and all(row[key] == value for key, value in settings.items())
    ]
    if not fitting:
        raise ValueError(f"no run has been recorded with {settings}")
    return min(fitting, key=lambda row: min(each["loss"] for each in row["evaluations"]))


def rate_for(rows: Iterable[Mapping], rank: int) -> float:
    """LoRA's tuned learning rate at a rank: found at 1, 8 and 64 (the embedding at a third of it), between them on a
    straight line in the logarithms."""
    usual = {"method": "lora", "text": "reference", "targets": "all", "scale": 1.0, "steps": STEPS, "seed": 0}
    usual |= {"embedding": SETTINGS["embedding"]}
    at_rank = lambda r: best(rows, rank=r, **usual)["rate"]
    if rank in TUNED_AT:
        return at_rank(rank)
    tuned_rates = [(math.log2(r), math.log(at_rank(r))) for r in TUNED_AT]
    at = math.log2(rank)
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(tuned_rates) if at <= pair[1][0])
    return float(f"{math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0)):.2g}")


def embedding_for(rows: Iterable[Mapping]) -> float:
    """The embedding's rate as a share of the others': the better of the two tried at rank 8, the same for all ranks."""
    return best(rows, rank=8, method="lora", text="reference", targets="all", scale=1.0, steps=STEPS, seed=0)[
        "embedding"
    ]


def tuned_full(rows: Iterable[Mapping]) -> dict:
    """Full tuning at the tuned rates."""
    return best(rows, method="full", text="reference", steps=STEPS, seed=0)


def grid_of(rows: Iterable[Mapping], row: Mapping) -> list[float]:
    """The learning rates tried with all of a row's other settings, ascending; those at which it blew up count too."""
    others = {key: row[key] for key in SETTINGS if key != "rate"}
    return sorted({each["rate"] for each in rows if all(each[key] == value for key, value in others.items())})


def inside_grid(rows: Iterable[Mapping], row: Mapping) -> bool:
    """Whether smaller and larger learning rates than a row's were tried too, so that it may be called tuned."""
    rates = grid_of(rows, row)
    return rates[0] < row["rate"] < rates[-1]


def tuned_rows(rows: Iterable[Mapping]) -> list[Mapping]:
    """The best row of every grid: of the rows of seed 0 with s = 1 that differ in their learning rate alone.

    Rows with another s compare settings with one another; nobody calls them tuned.
    """
    rows, grids = list(rows), {}
    for row in rows:
        if row["seed"] == 0 and row["scale"] == SETTINGS["scale"]:
            grids.setdefault(name_of(dict(row) | {"rate": None}), []).append(row)
    return [best(grid) for grid in grids.values() if len({row["rate"] for row in grid}) > 1]


def usual_runs(rows: Iterable[Mapping]) -> list[Mapping]:
    """LoRA on all matrices at one rank and full tuning on the whole reference text, 200 steps, s = 1: any rank, rate
    and seed."""
    usual = {k: SETTINGS[k] for k in ("text", "scale", "targets", "patience")} | {"steps": STEPS}
    return [
        row
        for row in rows
        if row["method"] in ("lora", "full")
        and row["test"] is not None
        and not isinstance(row["rank"], Mapping)
        and all(row[key] == value for key, value in usual.items())
    ]


def tuned_runs(rows: Iterable[Mapping]) -> dict[tuple[int | None, int], Mapping]:
    """(rank, seed) → the row at the tuned rates (`rate_for`, `embedding_for`); rank None: full tuning (`tuned_full`).

    Ranks whose rate the rows don't tell are left out.
    """
    rows, settings = list(rows), {}
    usual = usual_runs(rows)
    for rank in {row["rank"] for row in usual}:
        try:
            full = tuned_full(rows) if rank is None else None
            settings[rank] = (
                (full["rate"], full["embedding"]) if full else (rate_for(rows, rank), embedding_for(rows))
            )
        except ValueError:
            continue
    return {
        (row["rank"], row["seed"]): row
        for row in usual
        if settings.get(row["rank"]) == (row["rate"], row["embedding"])
    }


def by_dimension(rows: Iterable[Mapping], scope: str) -> dict[int, dict]:
    """Dimension d → the run in a subspace of it whose rate was best on validation text; d = D: full tuning."""
    rows = list(rows)
    runs = {"method": "subspace", "targets": scope, "text": "reference", "steps": STEPS, "seed": 0}
    sizes = {row["dimension"] for row in rows if runs.items() <= row.items() and row["test"] is not None}
    found = {d: best(rows, dimension=d, **runs) for d in sorted(sizes)}
    return found | ({SIZES["all"]: tuned_full(rows)} if scope == "all" else {})


def levels(before: float, full: float) -> dict[str, float]:
    """The accuracy at d₉₀ of the performance, which counts from zero, and of the gain, which counts from the base."""
    return {"performance": 0.9 * full, "gain": before + 0.9 * (full - before)}


def around(runs: Mapping[int, Mapping], level: float) -> tuple[int, int]:
    """(the largest d below the smallest that reaches an accuracy, that smallest d), of the runs by dimension."""
    above = min(d for d, row in runs.items() if row["accuracy"] >= level)
    return max(d for d in runs if d < above), above


# ---- the methods and the variants side by side (data/methods.json, data/variants.json) ---------------------------

SHORT = 100  # steps of most of these runs
# Variant → sizes: the rank, or the one at which a variant trains as many numbers as LoRA at that rank (43 200 at 4,
# 172 800 at 16). VeRA would need 4 650 for the second. AdaLoRA's is the mean rank that it ends with.
VARIANT_SIZES: dict[str, tuple[int, ...]] = {
    "lora": (4, 16),
    "lora+": (4, 16),
    "dora": (4, 16),
    "pissa": (4, 16),
    "lora-ga": (4, 16),
    "adalora": (4, 16),
    "scaled adamw": (4, 16),
    "muon": (4, 16),
    "vera": (1050,),
    "lora-xs": (35, 69),
}


def tuned_method(
    rows: Iterable[Mapping], task: str, method: str, size: int | None, steps: int
) -> Mapping | None:
    """Of the rows of one method and size that differ in their rate alone (seed 0) the best on validation text; None
    where it is not between two others: then it may not be called tuned."""
    grid = method_grid(rows, task, method, size, steps)
    best_row = min(grid, key=validation_loss, default=None)
    return None if best_row in (None, *grid[:1], *grid[-1:]) else best_row


def validation_loss(row: Mapping) -> float:
    """By which a rate is chosen: infinite where the run blew up."""
    return math.inf if row["validation"] is None else row["validation"]


def method_grid(
    rows: Iterable[Mapping], task: str, method: str, size: int | None, steps: int
) -> list[Mapping]:
    """The rows of one method and size with seed 0, by rate; those that blew up too."""
    about = {"task": task, "method": method, "size": size, "steps": steps, "seed": 0}
    return sorted((row for row in rows if about.items() <= row.items()), key=lambda row: row["rate"])


def tuned_rate(rows: Iterable[Mapping], task: str, method: str, size: int | None, steps: int) -> float | None:
    """A method's tuned rate at a size: its own where a grid was tried there, else on a line in the logarithms between
    the next smaller and the next larger size that have one; None where nothing is tuned."""
    rows = [row for row in rows if (row["task"], row["method"], row["steps"]) == (task, method, steps)]
    own = tuned_method(rows, task, method, size, steps)
    if own is not None or size is None:
        return None if own is None else own["rate"]
    if len(method_grid(rows, task, method, size, steps)) > 1:
        return None  # a grid that is not wide enough yet
    tuned_sizes = {s: tuned_method(rows, task, method, s, steps) for s in {row["size"] for row in rows}}
    points = sorted((math.log(s), math.log(row["rate"])) for s, row in tuned_sizes.items() if row is not None)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < math.log(size) < x1:
            share = (math.log(size) - x0) / (x1 - x0)
            return float(f"{math.exp(y0 + (y1 - y0) * share):.2g}")
    return None


def method_runs(
    rows: Iterable[Mapping], task: str, steps: int
) -> dict[tuple[str, int | None], list[Mapping]]:
    """(method, size) → its rows at the tuned rate, by seed; in the order in which the rows name them.

    A method whose rate isn't found (the best of its grid lies at the edge) and one that blew up with a seed there are
    left out.
    """
    rows = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
    found = {}
    for method, size in dict.fromkeys((row["method"], row["size"]) for row in rows):
        rate = tuned_rate(rows, task, method, size, steps)
        about = {"method": method, "size": size, "rate": rate}
        runs = [row for row in rows if about.items() <= row.items()]
        if runs and all(row["test"] is not None for row in runs):
            found[method, size] = sorted(runs, key=lambda row: row["seed"])
    return found
