"""Which runs are recorded: the stages of the sweeps, each a list of settings, some of them asked for by what came out.

What a setting means is data/runs.py's, how a run is done run.py's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from lora_edu.data import shipped
from lora_edu.data.runs import (
    RANKS,
    SETTINGS,
    SIZES,
    STEPS,
    around,
    best,
    by_dimension,
    embedding_for,
    levels,
    name_of,
    rate_for,
    run_of,
    tuned_full,
)
from lora_edu.recording.run import ATTENTION, MLP, measure, texts
from lora_edu.tinylm import TinyLM

# ---- which runs ------------------------------------------------------------------------------------------------

# Rates tried for full tuning and for LoRA at three ranks, a factor of two apart, until the best lies between others.
FULL_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
LORA_RATES = {
    1: (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
    8: (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    64: (1.5e-3, 3e-3, 6e-3, 1.2e-2),
}
SEEDS = (0, 1, 2)
SHORT = 100  # steps of the runs that compare settings with one another
# Subspaces: numbers trained, and the rate as c √(D / d): P's entries are √(d / D), so c is how far Adam moves a weight.
# Three c at the dimensions below; the middle one was the best or as good everywhere, so bisection's dimensions get it.
DIMENSIONS = {
    "all": (1_000, 10_000, 100_000, 1_000_000),
    "blocks": (10_000, 100_000, SIZES["blocks"]),
}
WEIGHT_RATES = (3e-3, 6e-3, 1.2e-2)
FURTHER = {("all", 1_000): (1.5e-3,), ("blocks", 10_000): (2.4e-2,), ("blocks", 100_000): (2.4e-2,)}
NARROW = 1.4  # seeds of full tuning move d₉₀ by about as much
FROZEN_RATES = {  # by rank and targets
    (8, "all"): (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
    (64, "all"): (3e-3, 6e-3, 1.2e-2, 2.4e-2),
    (8, "blocks"): (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2, 0.192),
}
TARGET_RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
FURTHER_TARGETS = {"head": (9.6e-2,)}
BUDGET = {  # some 80 000 parameters each
    "embedding": 8,
    "head": 8,
    "attention": 17,
    "mlp": 13,
    "blocks": 7,
    "all": {"embedding": 2, "head": 2, **dict.fromkeys((*ATTENTION, *MLP), 4)},
}
SCARCE = ("reference/10", "manual")


def rates() -> list[dict]:
    """The learning rate of full tuning, and of LoRA at three ranks; then the embedding at the others' rate."""
    full = [run_of(method="full", rate=rate) for rate in FULL_RATES]
    full += [run_of(method="full", rate=rate, embedding=1.0) for rate in FULL_RATES[:3]]
    lora = [run_of(rank=rank, rate=rate) for rank, grid in LORA_RATES.items() for rate in grid]
    lora += [run_of(rank=8, rate=rate, embedding=1.0) for rate in LORA_RATES[8][2:5]]
    return full + lora


def tuned(rows: Iterable[Mapping], rank: int, **settings) -> dict:
    """LoRA on every matrix at the tuned rates."""
    return run_of(rank=rank, rate=rate_for(rows, rank), embedding=embedding_for(rows), **settings)


def ranks(rows: Iterable[Mapping]) -> list[dict]:
    """LoRA at every rank and full tuning at their tuned rates, three seeds each."""
    full = tuned_full(rows)
    lora = [tuned(rows, r, seed=seed) for seed in SEEDS for r in RANKS]
    return lora + [
        run_of(method="full", rate=full["rate"], embedding=full["embedding"], seed=s) for s in SEEDS
    ]


def subspaces() -> list[dict]:
    """Random subspaces of all parameters and of the blocks alone, and LoRA with its random factor frozen.

    In the blocks' largest, d = D, P only reorders and flips signs: that is full tuning of the blocks.
    """
    random = [
        run
        for scope, dimensions in DIMENSIONS.items()
        for d in dimensions
        for run in _subspace(scope, d, WEIGHT_RATES + FURTHER.get((scope, d), ()))
    ]
    frozen = [
        run_of(method="frozen A", rank=r, targets=targets, rate=rate)
        for (r, targets), rates in FROZEN_RATES.items()
        for rate in rates
    ]
    return random + frozen


def _subspace(scope: str, d: int, weight_rates: Iterable[float]) -> list[dict]:
    steps = [float(f"{c * math.sqrt(SIZES[scope] / d):.3g}") for c in weight_rates]
    return [run_of(method="subspace", targets=scope, dimension=d, rate=rate) for rate in steps]


@cache
def _base_accuracy() -> float:
    base = TinyLM.from_state_dict(shipped.load_checkpoint("base"))
    return measure(base, texts("reference")["test"])["accuracy"]


def bisection(rows: Iterable[Mapping], before: float | None = None) -> list[dict]:
    """d₉₀ bisected in log d, for all parameters and the blocks, of the performance and of the gain.

    The interval between two dimensions of the stage `subspaces` is halved until its ends are within a factor of
    `NARROW`. Which d comes next depends on what came out, so these are the runs that the rows so far ask for: ask again
    when they are done, until no new one comes. `before` is the base's accuracy, computed if it isn't given.
    """
    rows = list(rows)
    before = _base_accuracy() if before is None else before
    asked: dict[str, dict] = {}
    for scope, grid in DIMENSIONS.items():
        known = by_dimension(rows, scope)
        for level in levels(before, known[SIZES[scope]]["accuracy"]).values():
            low, high = around({d: row for d, row in known.items() if d in (*grid, SIZES[scope])}, level)
            while high / low > NARROW:
                middle = int(float(f"{math.sqrt(low * high):.2g}"))
                asked |= {name_of(run): run for run in _subspace(scope, middle, WEIGHT_RATES[1:2])}
                if middle not in known:
                    break
                low, high = (low, middle) if known[middle]["accuracy"] >= level else (middle, high)
    return list(asked.values())


def draws(rows: Iterable[Mapping], before: float | None = None) -> list[dict]:
    """Two more seeds, each its own draw of P, at both ends of every interval that `bisection` found, at the next
    dimension above it and of full tuning of the blocks; and of the tuned runs with a frozen A.

    Subspaces of different dimension are drawn anew and not nested, so a crossing may be one draw's. Full tuning of all
    weights has its seeds in `ranks`.
    """
    rows = list(rows)
    before = _base_accuracy() if before is None else before
    again = []
    for scope in DIMENSIONS:
        known = by_dimension(rows, scope)
        for level in levels(before, known[SIZES[scope]]["accuracy"]).values():
            below, above = around(known, level)
            again += [known[d] for d in (below, above, min(d for d in known if d > above))]
    again.append(by_dimension(rows, "blocks")[SIZES["blocks"]])
    usual = {"method": "frozen A", "text": "reference", "steps": STEPS, "seed": 0}
    again += [best(rows, rank=r, targets=targets, **usual) for r, targets in FROZEN_RATES]
    asked = [{key: row[key] for key in SETTINGS} | {"seed": seed} for row in again for seed in SEEDS[1:]]
    return list({name_of(run): run for run in asked}.values())


def cuts() -> list[dict]:
    """Full tuning, and LoRA at rank 64, whose ΔW is cut to every rank: each rank may choose its rate."""
    full = [run_of(method="full", rate=rate, embedding=1.0) for rate in (3.75e-4, 7.5e-4, *FULL_RATES)]
    return full + [run_of(rank=64, rate=rate) for rate in LORA_RATES[64][:3]]


def common_rate() -> list[dict]:
    """LoRA between rank 8 and 64 at a rate that both have too: small for the lower ranks, and no rank's best."""
    return [run_of(rank=rank, rate=3e-3) for rank in (16, 32)]


def spreads() -> list[dict]:
    """LoRA with more ranks in the blocks than in the two tables, in whole runs: BUDGET's and twice it, at the rate
    that is best for BUDGET's in short ones."""
    ranks = [{name: times * r for name, r in BUDGET["all"].items()} for times in (1, 2)]
    return [run_of(rank=each, rate=2.4e-2) for each in ranks]


def scaling(rows: Iterable[Mapping]) -> list[dict]:
    """Short runs: alpha / r against alpha / √r at one rate, alpha beside the rate, and the embedding's own rate."""
    rate, few = rate_for(rows, 8), {"steps": SHORT, "embedding": embedding_for(rows)}
    by_rank = [
        run_of(rank=r, rate=rate, scale=float(f"{scale:.4g}"), **few)
        for r in RANKS[::3]
        for scale in (8 / r, math.sqrt(8 / r))
    ]
    by_size = [
        run_of(rank=8, rate=rate * faster, scale=larger, **few)
        for factor in (0.5, 1.0, 2.0, 4.0)
        for faster, larger in ((factor, 1.0), (1.0, factor))
    ]
    exchanged = [run_of(rank=8, rate=rate * c**-0.5, scale=c, **few) for c in (0.25, 4.0)]
    own = [run_of(rank=8, rate=rate, **few | {"embedding": share}) for share in (1.0, 1 / 3, 0.1)]
    return by_rank + by_size + exchanged + own


def targets() -> list[dict]:
    """Short runs: some 80 000 parameters spent on different matrices, four rates each or five."""
    return [
        run_of(
            rank=rank, targets=name, rate=rate, embedding=1.0 if name == "embedding" else 1 / 3, steps=SHORT
        )
        for name, rank in BUDGET.items()
        for rate in (*TARGET_RATES, *FURTHER_TARGETS.get(name, ()))
    ]


def scarce(rows: Iterable[Mapping]) -> list[dict]:
    """Little text: full tuning and LoRA, stopped early, at the rate tuned on plenty of it, a third and a ninth; and a
    27th on the manual, where a ninth was the best for full tuning and rank 8."""
    full = tuned_full(rows)
    methods = [
        ({"method": "full", "embedding": full["embedding"]}, full["rate"]),
        *(({"rank": r}, rate_for(rows, r)) for r in (1, 8)),
    ]
    asked = [(text, 3.0**-k, *method) for text in SCARCE for k in (2, 1, 0) for method in methods]
    asked += [("manual", 1 / 27, *method) for method in (methods[0], methods[2])]
    return [
        run_of(text=text, rate=float(f"{rate * factor:.3g}"), steps=150, patience=2, **settings)
        for text, factor, settings, rate in asked
    ]


def planted() -> list[dict]:
    """LoRA of rank 1, 2 and 4 on the block of chapter 03's planted update, towards the planted model."""
    return [
        run_of(text="planted", rank=r, targets="block 3", rate=rate, steps=400)
        for rate in (3e-3, 1e-2, 3e-2)
        for r in (1, 2, 4)
    ] + [run_of(text="planted", rank=1, targets="block 3", rate=0.1, steps=400)]


def short() -> list[dict]:
    """A run of a few seconds, recorded so that a test can repeat it."""
    return [run_of(rank=1, rate=1.2e-2, targets="blocks", steps=8)]


# Stage → its runs, given the rows of the stages before it; asked again with its own, it may want more.
STAGES: dict[str, Callable[[list[dict]], list[dict]]] = {
    "rates": lambda rows: rates(),
    "ranks": ranks,
    "subspaces": lambda rows: subspaces(),
    "bisection": bisection,
    "draws": draws,
    "cuts": lambda rows: cuts(),
    "common_rate": lambda rows: common_rate(),
    "spreads": lambda rows: spreads(),
    "scaling": scaling,
    "targets": lambda rows: targets(),
    "scarce": scarce,
    "planted_lora": lambda rows: planted(),
    "short": lambda rows: short(),
}
# Stage → the methods whose ΔW is cut to every rank in it.
TRUNCATED = {"ranks": ("full",), "scarce": ("full",), "cuts": ("full", "lora")}
