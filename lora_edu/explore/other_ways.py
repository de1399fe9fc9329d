"""Chapter 08's explorers: each method at each size, and which are worth their price for a price of your choice.

Each function takes rows of recorded runs and figures that the chapter counted or timed; nothing is trained here.
"""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lora_edu import plots
from lora_edu.explore.explorer import Explorer

# Method as in data/methods.json → how it is called, its colour and mark, the parts of a model that it trains, and what
# its size is called.
NAMES = {
    "full": "full tuning",
    "lora": "LoRA",
    "lora everywhere": "LoRA, all matrices",
    "bottleneck": "bottleneck adapters",
    "bitfit": "BitFit",
    "ia3": "(IA)³",
    "prefix": "prefix tuning",
    "prefix through an MLP": "prefix tuning, MLP",
    "prompt": "prompt tuning",
    "p-tuning": "P-Tuning",
}
LOOKS = {
    "full": (plots.BLACK, "*"),
    "lora": (plots.BLUE, "o"),
    "lora everywhere": (plots.BLUE, "s"),
    "bottleneck": (plots.VERMILION, "o"),
    "bitfit": (plots.GREEN, "D"),
    "ia3": (plots.GREEN, "^"),
    "prefix": (plots.PURPLE, "o"),
    "prefix through an MLP": (plots.PURPLE, "s"),
    "prompt": (plots.ORANGE, "o"),
    "p-tuning": (plots.ORANGE, "s"),
}
ACTS_ON = {
    "full": ("weights", "biases"),
    "lora": ("LoRA",),
    "lora everywhere": ("LoRA", "LoRA at the ends"),
    "bottleneck": ("bottlenecks",),
    "bitfit": ("biases",),
    "ia3": ("scales",),
    "prefix": ("prefix",),
    "prefix through an MLP": ("prefix", "prefix encoder"),
    "prompt": ("virtual tokens",),
    "p-tuning": ("virtual tokens", "prompt encoder"),
}
SIZE = {
    "lora": "r",
    "lora everywhere": "r",
    "bottleneck": "m",
}  # the others with a size have k virtual tokens


def called(method: str, size: int | None) -> str:
    """A method and its size in words: 'LoRA, r = 4'."""
    return NAMES[method] if size is None else f"{NAMES[method]}, {SIZE.get(method, 'k')} = {size}"


def by_method(
    runs: Mapping[tuple[str, int | None], Sequence[Mapping]], x: str = "stored", y: str = "test"
) -> dict[str, tuple[list, list]]:
    """Method → (a number of each size, the losses of its seeds): what `plots.quality_against` draws.

    runs: (method, size) → rows at the tuned rate, as `lora_edu.data.runs.method_runs` gives them.
    """
    series: dict[str, tuple[list, list]] = {}
    for (method, _), rows in sorted(runs.items(), key=lambda item: item[1][0][x]):
        sizes, losses = series.setdefault(method, ([], []))
        sizes.append(rows[0][x])
        losses.append([row[y] for row in rows])
    return {method: series[method] for method in NAMES if method in series}


def methods_and_sizes(
    runs: Mapping[tuple[str, int | None], Sequence[Mapping]], before: Mapping[str, float]
) -> Explorer:
    """A method and a size → where it acts, how many numbers it trains and stores, its rate, its loss among the others.

    runs: (method, size) → rows at the tuned rate, one a seed; before: the untuned model's row. Losses in nats a token.
    """
    order = sorted(runs, key=lambda key: (list(NAMES).index(key[0]), runs[key][0]["stored"]))
    series = by_method(runs)
    losses = [loss for _, repeats in series.values() for values in repeats for loss in values]
    low, high = min(losses), max(*losses, before["test"])

    def draw(figure: Figure, choice: tuple[str, int | None]) -> str:
        method, size = choice
        rows, colour = runs[choice], LOOKS[method][0]
        model, where = figure.subplots(2, 1, height_ratios=[1, 1.15])
        plots.where_it_acts(model, ACTS_ON[method], colour)
        for other, (x, repeats) in series.items():
            shade = colour if other == method else "#c8c8c8"
            means = [mean(values) for values in repeats]
            where.plot(x, means, LOOKS[other][1], linestyle="-", linewidth=1, color=shade, markersize=4)
        here, numbers = [row["test"] for row in rows], [rows[0]["trained"], rows[0]["stored"]]
        where.plot(numbers, [mean(here)] * 2, ":", color=colour)
        where.plot(
            numbers[0], mean(here), LOOKS[method][1], color=colour, markerfacecolor="white", markersize=9
        )
        where.plot(numbers[1], mean(here), LOOKS[method][1], color=colour, markersize=9)
        plots.mark_level(where, before["test"], "before tuning")
        where.set(xscale="log", ylabel="loss, nats a token", ylim=(low - 0.1, high + 0.25))
        where.set_xlabel("numbers stored; hollow: trained" if numbers[0] != numbers[1] else "numbers stored")
        plots.plain_ticks(where.xaxis, (1e3, 1e4, 1e5, 1e6))
        where.xaxis.set_ticklabels(["1 000", "10 000", "100 000", "1 000 000"])
        code = mean(row["code"] for row in rows)
        return (
            f"{called(method, size)}: {numbers[0]:,} numbers trained, {numbers[1]:,} stored; at a rate of "
            f"{rows[0]['rate']:g} the loss falls from {before['test']:.2f} to {mean(here):.2f} "
            f"({min(here):.2f} to {max(here):.2f} over {_seeds(len(here))}), and on code it goes from "
            f"{before['code']:.2f} to {code:.2f}."
        )

    return Explorer(
        draw,
        {"choice": order},
        start={"choice": ("lora", 4) if ("lora", 4) in order else order[0]},
        size=(7.2, 4.0),
        labels={"choice": "method"},
        formats={"choice": lambda choice: called(*choice)},
        density=1.25,
    )


def price_and_quality(
    prices: Mapping[str, Mapping[str, float]],
    losses: Mapping[str, Mapping[str, float]],
    units: Mapping[str, str],
) -> Explorer:
    """What counts as the price, what as quality → the methods as points, and the stairs of those that none beats.

    prices: name of a price → method → number; losses: name of a text → method → nats a token; units: name of a price →
    what stands at its axis, unless it is the name. A method is drawn where both have it.
    """
    bottom, top = ({name: pick(each.values()) for name, each in losses.items()} for pick in (min, max))

    def draw(figure: Figure, price: str, text: str) -> str:
        axes, key = figure.subplots(1, 2, width_ratios=[2.6, 1])
        points = {
            name: (prices[price][name], loss) for name, loss in losses[text].items() if name in prices[price]
        }
        most, least = (pick(x for x, _ in points.values()) for pick in (max, min))
        scale = "log" if most > 20 * least else "linear"
        _, best = plots.price_and_quality(axes, points, LOOKS, xscale=scale)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=units.get(price, price), ylabel=f"loss on {text}, nats a token")
        axes.set_ylim(bottom[text] - 0.1, top[text] + 0.2)
        axes.set_title("filled: no other is nowhere worse and somewhere better")
        handles, names = axes.get_legend_handles_labels()
        key.legend(handles, [NAMES[name] for name in names], loc="center left", borderaxespad=0, fontsize=8)
        key.set_axis_off()
        beaten = [NAMES[name] for name in points if name not in best]
        return (
            f"Price: {price}; quality: the loss on {text}. Not beaten: "
            f"{', '.join(f'{NAMES[name]} ({points[name][1]:.2f})' for name in best)}. "
            f"Beaten: {', '.join(beaten) or 'none'}."
        )

    return Explorer(
        draw,
        {"price": list(prices), "text": list(losses)},
        start={"price": next(iter(prices)), "text": next(iter(losses))},
        size=(7.2, 3.1),
        labels={"price": "what counts as price", "text": "loss on"},
    )


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
