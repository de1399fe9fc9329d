"""Chapter 02's explorer: what tuning in a random subspace reaches at each dimension.

It takes numbers of recorded runs; nothing is loaded or trained here.
"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from lora_edu import plots
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
