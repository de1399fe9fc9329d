"""Chapter 09's explorers: each variant's learning rates beside LoRA's, and one rate for all of them.

Each function takes rows of recorded runs; nothing is trained here. What is a variant's code is in tuning/variants/.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_edu import plots
from lora_edu.data.runs import SHORT, VARIANT_SIZES, method_grid, method_runs
from lora_edu.explore.explorer import Explorer
from lora_edu.seeds import Spread, detectable, interval

# Variant as in data/variants.json → how it is called
NAMES = {
    "lora": "LoRA",
    "lora+": "LoRA+",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "lora-ga": "LoRA-GA",
    "adalora": "AdaLoRA",
    "scaled adamw": "scaled AdamW",
    "muon": "Muon",
    "vera": "VeRA",
    "lora-xs": "LoRA-XS",
}
# Test → task, and which of a variant's sizes.
TESTS = {"far task, r = 4": ("far", 0), "far task, r = 16": ("far", 1), "near task, r = 4": ("near", 0)}


def size_in(test: str, method: str) -> int | None:
    """A variant's size in a test; None where it takes no part (VeRA has none for the numbers of r = 16)."""
    place = TESTS[test][1]
    sizes = VARIANT_SIZES[method]
    return sizes[place] if place < len(sizes) else None


def tuned_in(rows: Iterable[Mapping], test: str) -> dict[str, list[Mapping]]:
    """Variant → its rows at the tuned rate, one a seed; a variant whose rate isn't found is left out."""
    found = method_runs(rows, TESTS[test][0], SHORT)
    sizes = {method: size_in(test, method) for method in NAMES}
    return {method: found[method, size] for method, size in sizes.items() if (method, size) in found}


def grids_in(
    rows: Iterable[Mapping], test: str, loss: str = "validation"
) -> dict[str, dict[float, float | None]]:
    """Variant → rate → loss of seed 0, None where the run blew up."""
    rows, found = list(rows), {}
    for method in NAMES:
        size = size_in(test, method)
        tried = method_grid(rows, TESTS[test][0], method, size, SHORT) if size is not None else []
        if tried:
            found[method] = {row["rate"]: row[loss] for row in tried}
    return found


def beside_lora(
    runs: Mapping[str, Sequence[Mapping]], spread: Spread
) -> dict[str, tuple[float, float, float]]:
    """Variant → (test loss − LoRA's, its lower and upper bound), 95 %."""
    losses = {method: [row["test"] for row in each] for method, each in runs.items()}
    return {
        method: interval(each, losses["lora"], spread) for method, each in losses.items() if method != "lora"
    }


def variants_beside_lora(
    grids: Mapping[str, Mapping[str, Mapping[float, float | None]]],
    runs: Mapping[str, Mapping[str, Sequence[Mapping]]],
    spreads: Mapping[str, Spread],
) -> Explorer:
    """A variant and a test → its losses by learning rate beside LoRA's, and its difference to LoRA among the others'.

    By test: grids, variant → rate → validation loss (`grids_in`); runs, variant → rows at the tuned rate (`tuned_in`);
    spreads, of a single run over seeds. Losses in nats a token.
    """
    variants = [
        method for method in NAMES if method != "lora" and any(method in each for each in runs.values())
    ]
    differences = {test: beside_lora(each, spreads[test]) for test, each in runs.items()}
    seen = {
        test: [value for triple in each.values() for value in triple] for test, each in differences.items()
    }
    losses = {
        test: [loss for each in lines.values() for loss in each.values() if loss is not None]
        for test, lines in grids.items()
    }

    def draw(figure: Figure, variant: str, test: str) -> str:
        curve, beside = figure.subplots(1, 2, width_ratios=[1.1, 1])
        lowest = min(losses[test])
        for method, colour in (("lora", plots.GREY), (variant, plots.BLUE)):
            tried = {rate: loss for rate, loss in grids[test].get(method, {}).items() if loss is not None}
            if not tried:
                continue
            rates, best = sorted(tried), min(tried, key=tried.get)
            curve.plot(rates, [tried[r] for r in rates], ".-", color=colour, label=NAMES[method])
            curve.plot(best, tried[best], "o", color=colour, markersize=10, markerfacecolor="none")
        curve.legend()
        curve.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a token")
        curve.set_ylim(lowest - 0.05, min(max(losses[test]), lowest + 0.7) + 0.05)
        plots.plain_ticks(curve.xaxis, (0.001, 0.004, 0.016, 0.064, 0.256))
        names = {NAMES[method]: triple for method, triple in differences[test].items()}
        band = detectable(spreads[test], 3)
        plots.differences(beside, [NAMES[method] for method in variants], names, band, NAMES[variant])
        beside.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
        room = 0.05 * (max(seen[test]) - min(seen[test]))
        beside.set(xlim=(min(seen[test]) - room, max(seen[test]) + room), xlabel="test loss − LoRA's")
        return f"{NAMES[variant]}, {test}: {_said(variant, runs[test], differences[test])}"

    return Explorer(
        draw,
        {"variant": variants, "test": list(runs)},
        start={"variant": variants[0], "test": next(iter(runs))},
        size=(7.2, 3.1),
        formats={"variant": lambda variant: NAMES[variant]},
        density=1.25,
    )


def _said(
    variant: str, runs: Mapping[str, Sequence[Mapping]], differences: Mapping[str, tuple[float, float, float]]
) -> str:
    """How a variant did, in words."""
    if variant not in runs:
        return "not run; VeRA would need r = 4 650 to train as many numbers as LoRA at r = 16."
    rows, lora = runs[variant], runs["lora"]
    middle, low, high = differences[variant]
    verdict = "better than LoRA" if high < 0 else "worse than LoRA" if low > 0 else "not to be told from LoRA"
    loss = lambda some: mean(row["test"] for row in some)
    return (
        f"best rate {rows[0]['rate']:g}, LoRA's {lora[0]['rate']:g}; test loss {loss(rows):.3f} beside "
        f"{loss(lora):.3f}, a difference of {middle:+.3f} ({low:+.3f} to {high:+.3f}): {verdict}."
    )


def one_rate_for_all(
    grid: Mapping[str, Mapping[float, float | None]], tuned: Mapping[str, float], rates: Sequence[float]
) -> Explorer:
    """A learning rate → every variant's loss at it, beside its loss at its own best rate; sorted by the first.

    grid: variant → rate → loss; tuned: variant → loss at its own rate; both of one seed, in nats a token. A variant
    that wasn't tried at a rate is left out of its picture.
    """
    shown = [
        loss for each in grid.values() for rate, loss in each.items() if rate in rates and loss is not None
    ]
    low = min(*tuned.values(), *shown)
    high = min(max(shown), low + 0.5)

    def draw(figure: Figure, rate: float) -> str:
        axes = figure.subplots()
        here = {method: each[rate] for method, each in grid.items() if rate in each}
        order = sorted(here, key=lambda method: math.inf if here[method] is None else here[method])
        pairs = {NAMES[m]: (high if here[m] is None else min(here[m], high), tuned[m]) for m in order}
        plots.before_and_after(axes, pairs, (f"at {rate:g}", "at its own rate"))
        axes.set(
            xlim=(low - 0.03, high + 0.03), xlabel=f"test loss, nats a token (from {high:.1f} on at the edge)"
        )
        axes.legend(loc="lower right")
        axes.set_ylim(len(grid) - 0.5, -0.5)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == NAMES["lora"] else "normal")
        words = [f"{NAMES[m]} {'blew up' if here[m] is None else format(here[m], '.2f')}" for m in order]
        return f"All at a rate of {rate:g}, best first: {', '.join(words)}."

    return Explorer(
        draw,
        {"rate": list(rates)},
        start={"rate": rates[0]},
        size=(7.2, 3.2),
        labels={"rate": "one rate for all"},
        density=1.25,
    )
