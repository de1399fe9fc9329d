"""Chapter 10's explorers: a budget of ranks, 'train high, then cut', what a merge rounds away, two adapters mixed.

Each function takes numbers and texts that the chapter measured or read; nothing is loaded or evaluated here.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lora_edu import plots
from lora_edu.explore.explorer import Explorer

QUOTED = 60  # characters of a text that the sentence under its picture repeats
COLUMNS = 44  # of the page beside the bars


def spent_by_rule(
    ranks: Mapping[str, Mapping[int, Mapping[str, Sequence[int]]]],
    energy: Mapping[str, Mapping[int, float]],
    gain: Mapping[str, Mapping[int, float]],
) -> Explorer:
    """A budget of parameters spent by two rules: the rank of each layer, beside energy and gain kept.

    ranks: rule → budget → kind of matrix → rank of each layer; energy, gain: rule → budget → share kept. A budget is
    given as the rank that it buys everywhere.
    """
    budgets = sorted(next(iter(gain.values())))

    def draw(figure: Figure, budget: int) -> str:
        where, kept = figure.subplots(1, 2, width_ratios=[1.25, 1])
        highest = max(max(of) for rule in ranks.values() for of in rule[budget].values())
        plots.dots_by_kind(where, {rule: each[budget] for rule, each in ranks.items()}, xlabel="rank")
        where.set(xlim=(-0.03 * highest, 1.7 * highest), title="a dot for each layer")
        for (rule, shares), colour in zip(gain.items(), plots.PALETTE, strict=False):
            kept.plot(budgets, [energy[rule][b] for b in budgets], "--", color=colour, linewidth=1)
            kept.plot(budgets, [shares[b] for b in budgets], "-", color=colour)
            kept.plot(budget, energy[rule][budget], "o", markerfacecolor="white", color=colour)
            kept.plot(budget, shares[budget], "o", color=colour, markersize=7)
        kept.set(xscale="log", xlabel="budget, as a rank everywhere", ylabel="share kept", ylim=(0, 1.05))
        kept.set_title("dashed: energy; solid: gain")
        plots.plain_ticks(kept.xaxis, budgets)
        said = "; ".join(
            f"{rule}: {energy[rule][budget]:.1%} of the energy, {gain[rule][budget]:.0%} of the gain"
            for rule in gain
        )
        return f"A budget of rank {budget} everywhere. {said}."

    return Explorer(
        draw, {"budget": budgets}, start={"budget": 8}, size=(7.2, 3.0), labels={"budget": "budget r"}
    )


def high_then_cut(
    cut: Mapping[tuple[int, float], Mapping[int, float]],
    trained: Mapping[int, Mapping[float, float]],
    before: float,
    best: Mapping[int, float],
) -> Explorer:
    """A run of high rank, cut to every rank, beside training at that rank: at the run's own rate, and at the best.

    cut: (rank, rate) of the run → rank k → test loss of its ΔW cut to k; trained: k → rate → test loss of LoRA
    trained at k; before: loss of the base; best: k → the rate of `trained` that was best on validation text. All in
    nats a token.
    """
    lowest = min(loss for losses in (*cut.values(), *trained.values()) for loss in losses.values())
    everything = sorted({k for losses in cut.values() for k in losses})

    def draw(figure: Figure, run: tuple[int, float]) -> str:
        axes = figure.subplots(1, 2, sharey=True)
        rank, rate = run
        losses = {k: loss for k, loss in cut[run].items() if k <= rank}
        same = {k: trained[k][rate] for k in sorted(trained) if k <= rank and rate in trained[k]}
        tuned = {k: trained[k][best[k]] for k in sorted(trained) if k <= rank}
        for each, others, title in (
            (axes[0], same, f"trained at the same rate, {rate:g}"),
            (axes[1], tuned, "trained, each rank at its best rate"),
        ):
            each.plot(
                losses.keys(),
                losses.values(),
                color=plots.VERMILION,
                marker="o",
                label=f"r = {rank}, cut to k",
            )
            # a line between the few ranks that had this rate would say something of those that had not
            line = "" if others is same else "-"
            each.plot(
                others.keys(),
                others.values(),
                f"s{line}",
                color=plots.BLUE,
                markersize=7,
                label="trained at k",
            )
            each.set(xscale="log", xlabel="rank k", ylim=(lowest - 0.1, before + 0.75), title=title)
            each.set_xlim(0.85, 1.2 * everything[-1])
            plots.plain_ticks(each.xaxis, everything)
            plots.mark_level(each, before, "the base")
            each.legend(loc="upper right")
        axes[0].set_ylabel("held-out loss, nats a token")
        pairs = "; ".join(f"k = {k}: cut {losses[k]:.2f}, trained {same[k]:.2f}" for k in same if k in losses)
        return f"LoRA of r = {rank} at the rate {rate:g}. At that rate, {pairs}."

    runs = list(cut)
    return Explorer(
        draw,
        {"run": runs},
        start={"run": max(runs, key=lambda run: sum(run[1] in rates for rates in trained.values()))},
        size=(7.2, 2.9),
        labels={"run": "trained high"},
        formats={"run": lambda run: f"r = {run[0]}, rate {run[1]:g}"},
    )


def rounded_away(
    swallowed: Mapping[str, Mapping[float, float]], gain: Mapping[str, Mapping[float, float]]
) -> Explorer:
    """The size of an update against what merging it into a coarse format swallows, and what is left of its gain.

    swallowed: way of rounding → ‖ΔW‖ / ‖W‖ → ‖ΔW − (merged − W)‖ / ‖ΔW‖; gain: the same → share of the gain that
    is left after the merge.
    """
    sizes = sorted(next(iter(swallowed.values())), reverse=True)
    colours = dict(zip(swallowed, plots.PALETTE, strict=False))
    highest = max(share for values in swallowed.values() for share in values.values())

    def draw(figure: Figure, size: float) -> str:
        lost, left = figure.subplots(1, 2, width_ratios=[1.25, 1])
        for way, shares in swallowed.items():
            lost.plot(sizes, [shares[each] for each in sizes], color=colours[way], label=way)
            lost.plot(size, shares[size], "o", color=colours[way], markersize=7)
        lost.set(
            xscale="log", xlabel="‖ΔW‖ / ‖W‖", ylabel="error of the merge / ‖ΔW‖", ylim=(0, 1.1 * highest)
        )
        lost.invert_xaxis()
        lost.legend(loc="upper left")
        plots.plain_ticks(lost.xaxis, (0.1, 0.01, 0.001))
        lost.set_title("swallowed, in norm")
        shares = [max(gain[way][size], 0.0) for way in gain]
        texts = [f"{gain[way][size]:.0%}" for way in gain]
        plots.bars(
            left, [way.replace(", ", ",\n") for way in gain], shares, [colours[way] for way in gain], texts
        )
        left.set(xlim=(0, 1.45), xticks=[0, 0.5, 1], xlabel="share of the gain", title="left of the gain")
        words = [
            f"{way}: error {swallowed[way][size]:.2f} ‖ΔW‖, {share:.0%} of the gain"
            for way, share in ((way, gain[way][size]) for way in gain)
        ]
        return f"‖ΔW‖ is {size:.2g} of ‖W‖. {'; '.join(words)}."

    return Explorer(
        draw,
        {"size": sizes},
        start={"size": sizes[len(sizes) // 2]},
        size=(7.2, 2.9),
        labels={"size": "‖ΔW‖ / ‖W‖"},
        formats={"size": lambda size: f"{size:.2g}"},
    )


def two_adapters(
    prompt: str,
    texts: Mapping[tuple[float, float], str],
    losses: Mapping[tuple[float, float], Mapping[str, float]],
    names: tuple[str, str],
) -> Explorer:
    """Weights of two adapters → what the model writes, and its loss on each held-out text beside the base's.

    texts: (first weight, second weight) → prompt and continuation; losses: the same → name of a text → nats a token;
    names: of the two adapters. (0, 0) is the base.
    """
    first, second = (sorted({pair[place] for pair in texts}) for place in (0, 1))
    highest = max(loss for each in losses.values() for loss in each.values())
    base = losses[0.0, 0.0]

    def draw(figure: Figure, one: float, other: float) -> str:
        page, bars = figure.subplots(1, 2, width_ratios=[1.75, 1])
        here = losses[one, other]
        title = f"{names[0]} × {one:g}, {names[1]} × {other:g}"
        plots.page_of_text(page, texts[one, other], title, prompt, columns=COLUMNS)
        colours = [plots.BLUE if here[name] <= base[name] else plots.VERMILION for name in here]
        named = [f"{name}\n{loss:.2f}" for name, loss in here.items()]
        plots.bars(bars, named, list(here.values()), colours, [""] * len(here))
        for row, name in enumerate(here):
            bars.plot([base[name]] * 2, [row - 0.42, row + 0.42], color=plots.BLACK, linewidth=2)
        bars.set(xlim=(0, 1.05 * highest), xlabel="held-out loss, nats a token", title="black: the base")
        said = ", ".join(f"{name} {loss:.2f} ({loss - base[name]:+.2f})" for name, loss in here.items())
        begins = " ".join(texts[one, other].removeprefix(prompt).split())[:QUOTED]
        return (
            f"{names[0]} × {one:g}, {names[1]} × {other:g}. Nats a token (against the base): {said}. "
            f"After “{prompt}” it writes “{begins} …”."
        )

    return Explorer(
        draw,
        {"one": first, "other": second},
        start={"one": 0.5, "other": 0.5},
        size=(7.2, 2.9),
        labels={"one": names[0], "other": names[1]},
        colours=32,
        density=1.25,
    )
