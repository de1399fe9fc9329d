"""Chapter 02's explorers: what tuning in a random subspace reaches at each dimension, and what its ΔW looks like.

They take numbers of recorded runs, and singular values; nothing is loaded or trained here.
"""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lora_edu import lowrank, plots
from lora_edu.explore.explorer import Explorer


def random_subspaces(
    accuracy: Mapping[str, Mapping[int, float]], before: float, full: float, sizes: Mapping[str, int]
) -> Explorer:
    """Dimension d → next-token accuracy when so many numbers are trained, beside the levels that define d₉₀.

    accuracy: what the subspace moves → d → accuracy on held-out text; before: that of the base; full: of full tuning;
    sizes: what the subspace moves → how many weights that is.
    """
    every = sorted({d for found in accuracy.values() for d in found})
    levels = {
        "full tuning": full,
        "90 % of the gain": before + 0.9 * (full - before),
        "90 % of the performance": 0.9 * full,
        "base": before,
    }

    def draw(figure: Figure, d: int) -> str:
        curve, beside = figure.subplots(1, 2, width_ratios=[1.7, 1])
        series = {
            name: (sorted(found), [found[k] for k in sorted(found)]) for name, found in accuracy.items()
        }
        lines = plots.curves(curve, series, xscale="log", xlabel="dimension d", ylabel="right next tokens")
        for line in lines:
            line.set_marker("o")
        for name, level in levels.items():
            plots.mark_level(curve, level, name, 0.55)
        curve.axvline(d, color=plots.GREY, linewidth=1, linestyle=":")
        curve.legend(loc=(0.6, 0.13))
        curve.set(ylim=(before - 0.02, full + 0.03), title="accuracy on held-out docstrings")
        plots.plain_ticks(curve.xaxis, (100, 1_000, 10_000, 100_000, 1_000_000))
        curve.xaxis.set_ticklabels(["100", "1,000", "10,000", "100,000", "1,000,000"])
        here = {name: found[d] for name, found in accuracy.items() if d in found}
        gain = {name: (value - before) / (full - before) for name, value in here.items()}
        colours = [colour for name, colour in zip(accuracy, plots.PALETTE, strict=False) if name in here]
        plots.bars(beside, list(gain), list(gain.values()), colours, [f"{g:.0%}" for g in gain.values()])
        beside.set(xlim=(0, 1.35), xticks=[0, 0.5, 1], xlabel="share of the gain", title=f"d = {d:,}")
        found = "; ".join(
            f"{name}, {sizes[name] / d:,.3g} to a dial: {value:.1%} right, {gain[name]:.0%} of the gain, "
            f"{value / full:.0%} of the performance"
            for name, value in here.items()
        )
        return f"d = {d:,}. {found}."

    return Explorer(draw, {"d": every}, start={"d": 10_000}, formats={"d": "{:,}"})


def full_rank_beside_low_rank(
    accuracy: Mapping[str, Mapping[int, float]],
    beside: Mapping[int, int],
    updates: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]],
) -> Explorer:
    """Dimension d and a matrix → a random subspace and LoRA of about as many numbers: how good, and both spectra.

    accuracy: "random subspace" and "LoRA" → numbers trained → next-token accuracy of whole runs; beside: d → the
    numbers of the LoRA beside it, both of them in `accuracy`; updates: matrix → d → ΔW from a random subspace and from
    LoRA. Their singular values are drawn as σ / ‖ΔW‖, and with them those of noise of the same shape.
    """
    subspace, lora = accuracy["random subspace"], accuracy["LoRA"]
    shown = range(min(beside) // 2, 2 * max(beside))
    seen = {name: {n: found[n] for n in sorted(found) if n in shown} for name, found in accuracy.items()}
    both = [value for found in seen.values() for value in found.values()]
    spectra, ranks = {}, {}
    for matrix, of_d in updates.items():
        shape = next(iter(of_d.values()))[0].shape
        noise = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        for d, found in of_d.items():
            of_both = dict(zip(("random subspace", "LoRA"), found, strict=True))
            ranks[matrix, d] = {name: lowrank.numerical_rank(dW) for name, dW in of_both.items()}
            spectra[matrix, d] = {name: torch.linalg.svdvals(dW) for name, dW in of_both.items()} | {
                "noise": noise
            }

    def draw(figure: Figure, d: int, matrix: str) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        lines = plots.curves(
            left,
            {name: (list(found), list(found.values())) for name, found in seen.items()},
            xscale="log",
            xlabel="numbers trained",
            ylabel="right next tokens",
            ylim=(min(both) - 0.02, max(both) + 0.01),
            title="whole runs, recorded",
        )
        for line, (x, y) in zip(lines, [(d, subspace[d]), (beside[d], lora[beside[d]])], strict=True):
            line.set_marker("o")
            left.plot(x, y, "o", markersize=10, markerfacecolor="none", color=line.get_color())
        left.legend(loc="lower right")
        plots.plain_ticks(left.xaxis, (30_000, 100_000, 300_000, 1_000_000))
        left.xaxis.set_ticklabels(["30,000", "100,000", "300,000", "1,000,000"])
        singular_values, rank = spectra[matrix, d], ranks[matrix, d]
        series = {name: (range(1, len(S) + 1), S / S.norm()) for name, S in singular_values.items()}
        *_, noise = plots.curves(right, series, xlabel="number k", ylabel="σ$_k$ / ‖ΔW‖", ylim=(-0.02, 1.05))
        noise.set(color=plots.GREY, linestyle="--")
        right.legend(loc="upper right")
        right.set_title(f"ΔW of {matrix}, after a short run")
        ninety = {name: lowrank.rank_for_energy(S, 0.9) for name, S in singular_values.items()}
        return (
            f"Whole runs: {subspace[d]:.1%} right with {d:,} numbers in a random subspace, {lora[beside[d]]:.1%} with "
            f"{beside[d]:,} in LoRA. Short runs, {matrix}: ΔW has rank {rank['random subspace']} and {rank['LoRA']}; "
            f"90 % of its energy takes {ninety['random subspace']} and {ninety['LoRA']} (noise: {ninety['noise']})."
        )

    dimensions = sorted(beside)
    return Explorer(
        draw,
        {"d": dimensions, "matrix": list(updates)},
        start={"d": dimensions[len(dimensions) // 2], "matrix": next(iter(updates))},
        labels={"d": "dimension d"},
        formats={"d": "{:,}"},
    )
