"""Chapter 07's explorers: trained against truncated rank, learning rate, forgetting at equal gain, shared directions.

Each function takes numbers of recorded runs and returns an Explorer; nothing is loaded, trained or evaluated here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean

from matplotlib.figure import Figure

from lora_edu import lowrank, plots
from lora_edu.explore.explorer import Explorer


def trained_and_truncated(
    trained: Mapping[int, Sequence[float]],
    truncated: Mapping[int, Sequence[float]],
    full: Sequence[float],
    before: float,
    parameters: Mapping[int, int],
) -> Explorer:
    """Rank r → share of full tuning's gain: trained at r, and full tuning's ΔW cut to r.

    trained, truncated: rank → test losses, one a seed; full: test losses of full tuning; before: that of the base;
    parameters: rank → numbers that LoRA trains.
    """
    ranks = sorted(trained)
    whole = before - mean(full)
    share = {
        name: {r: [(before - loss) / whole for loss in losses[r]] for r in ranks}
        for name, losses in (("trained at r", trained), ("cut to r", truncated))
    }
    spread = [(before - loss) / whole for loss in full]

    def draw(figure: Figure, r: int) -> str:
        curve, beside = figure.subplots(1, 2, width_ratios=[1.6, 1])
        here = {name: mean(values[r]) for name, values in share.items()}
        plots.bands(
            curve,
            {name: (ranks, [values[k] for k in ranks]) for name, values in share.items()},
            xscale="log",
            xlabel="rank r",
            ylabel="share of the gain",
            ylim=(0, 1.15),
        )
        curve.axhspan(min(spread), max(spread), color=plots.GREY, alpha=0.35, linewidth=0)
        curve.annotate("full tuning", (ranks[0], 1), (0, 5), textcoords="offset points")
        curve.legend(loc="lower right")
        plots.plain_ticks(curve.xaxis, ranks)
        curve.axvline(r, color=plots.GREY, linewidth=1, linestyle=":")
        curve.set_title("bands: from the lowest to the highest seed")
        values = [1.0, here["trained at r"], here["cut to r"]]
        colours = [plots.GREY, plots.BLUE, plots.VERMILION]
        plots.bars(beside, ["full", "trained", "cut"], values, colours, [f"{v:.0%}" for v in values])
        beside.set(xlim=(0, 1.35), xticks=[0, 0.5, 1], xlabel="share of the gain", title=f"r = {r}")
        return (
            f"r = {r}: trained {here['trained at r']:.0%} of full tuning's gain with {parameters[r]:,} numbers; "
            f"full tuning's ΔW cut to {r}: {here['cut to r']:.0%}."
        )

    return Explorer(draw, {"r": ranks}, start={"r": 8}, labels={"r": "rank r"})


def rate_and_rank(
    losses: Mapping[str, Mapping[float, float]], along: Mapping[str, Mapping[float, Sequence]]
) -> Explorer:
    """Method → held-out loss at the end of each learning rate tried, and on the way there.

    losses: name → rate → loss; along: name → rate → [(step, loss), …] of the same runs. The best rate is ringed.
    """
    low = min(loss for values in losses.values() for loss in values.values())
    high = max(loss for runs in along.values() for run in runs.values() for _, loss in run)

    def draw(figure: Figure, method: str) -> str:
        ends, way = figure.subplots(1, 2)
        for name, values in losses.items():
            rates = sorted(values)
            ends.plot(rates, [values[rate] for rate in rates], color="#c8c8c8", linewidth=1.2)
            if name != method:
                place = rates[0], values[rates[0]]
                ends.annotate(name, place, (0, 4), textcoords="offset points", color=plots.GREY, fontsize=8.5)
        plots.rate_curves(ends, {method: losses[method]}, ylabel="held-out loss at the end")
        plots.plain_ticks(ends.xaxis, sorted({rate for values in losses.values() for rate in values})[::2])
        best = min(losses[method], key=losses[method].get)
        ends.set_title(f"best of {len(losses[method])} rates: {best:g}")
        curves = {
            f"{rate:g}": tuple(zip(*along[method][rate], strict=True)) for rate in sorted(along[method])
        }
        plots.curves(way, curves, xlabel="step", ylabel="held-out loss", ylim=(low - 0.1, high + 0.1))
        way.set_title(f"{method}, by learning rate")
        return f"{method}: the best rate tried is {best:g}, with {losses[method][best]:.2f} nats a token at the end."

    return Explorer(draw, {"method": list(losses)}, start={"method": next(iter(losses))}, colours=128)


def equal_gain(
    paths: Mapping[str, Sequence[tuple[float, float]]], levels: Sequence[float], before: float
) -> Explorer:
    """Loss on the tuning text that all have reached → what each has then lost on code.

    paths: name → [(loss on the tuning text, loss on code), …] along a run; levels: losses, from the highest to the
    lowest, each within every path; before: the base's loss on code.
    """
    highest = max(at_level(path, level) for path in paths.values() for level in levels) - before

    def draw(figure: Figure, level: float) -> str:
        plane, beside = figure.subplots(1, 2, width_ratios=[1.3, 1])
        lost = {name: at_level(path, level) - before for name, path in paths.items()}
        colours = dict(zip(paths, plots.PALETTE, strict=False))
        for name, path in paths.items():
            plane.plot(*zip(*path, strict=True), color=colours[name], marker="o")
        plane.axvline(level, color=plots.GREY, linestyle=":")
        plane.invert_xaxis()
        plane.set(xlabel="held-out docstrings, nats a token", ylabel="held-out code")
        plane.set_title("every 50 steps of each run")
        texts = [f"{lost[name]:+.2f}" for name in paths]
        plots.bars(beside, list(paths), list(lost.values()), [colours[name] for name in paths], texts)
        beside.set(xlim=(0, 1.35 * highest), xlabel="nats lost on code", title=f"docstrings at {level:g}")
        words = ", ".join(f"{name}: {value:.2f}" for name, value in lost.items())
        return f"Where the loss on docstrings has come down to {level:g}, code has lost, in nats: {words}."

    return Explorer(
        draw,
        {"level": levels},
        start={"level": levels[len(levels) // 2]},
        labels={"level": "loss on docstrings"},
        colours=128,
    )


def at_level(path: Sequence[tuple[float, float]], level: float) -> float:
    """The second number where the first, which falls along the path, comes down to `level`: on a straight line.

    Raises ValueError where the path never gets there.
    """
    for (x0, y0), (x1, y1) in pairwise(path):
        if x1 <= level <= x0:
            return y0 + (y1 - y0) * (x0 - level) / (x0 - x1)
    reached = f"{path[0][0]:g} to {min(x for x, _ in path):g}"
    raise ValueError(f"the path never comes to {level:g}; it goes from {reached}")


def shared_directions(kinds: Mapping[str, Mapping]) -> Explorer:
    """Kind of block matrix and what is compared → φ(i, j) of two runs at powers of two, beside chance.

    kinds: as in one of the recorded `pairs`: kind → {"rows", "columns", "BA", "A", "B"}, each of the last three
    "i,j" → φ.
    """
    names = [kind for kind in ("query", "value", "up", "down") if kind in kinds]

    def draw(figure: Figure, kind: str, what: str) -> str:
        table, along = figure.subplots(1, 2, width_ratios=[1.5, 1])
        found = kinds[kind]
        cells = {tuple(map(int, at.split(","))): value for at, value in found[what].items()}
        rows, columns = (sorted({at[side] for at in cells}) for side in (0, 1))
        dimension = found["rows"] if what == "B" else found["columns"]
        grid = [[cells[i, j] for j in columns] for i in rows]
        plots.level_grid(table, grid, rows, columns, title=f"{kind}, {what}: φ(i, j)", xlabel="j", ylabel="i")
        i, far = rows[-1], columns[-1]
        chance = [lowrank.chance_similarity(i, j, dimension) for j in columns]
        plots.curves(
            along,
            {"found": (columns, grid[-1]), f"chance, max({i}, j) / {dimension}": (columns, chance)},
            xscale="log",
            xlabel="j",
            ylim=(0, 1.25),
            yticks=[0, 0.5, 1],
            title=f"φ({i}, j)",
        )
        along.legend(loc="upper left")
        plots.plain_ticks(along.xaxis, columns)
        same = columns.index(i)
        return (
            f"{kind}, {what}: φ({i}, {i}) = {cells[i, i]:.2f} where chance gives {chance[same]:.2f}, "
            f"and φ({i}, {far}) = {cells[i, far]:.2f} where chance gives {chance[-1]:.2f}."
        )

    return Explorer(
        draw,
        {"kind": names, "what": ["BA", "A", "B"]},
        start={"kind": names[0], "what": "BA"},
        labels={"kind": "matrix", "what": "compared"},
        size=(7.2, 2.4),
    )
