"""Chapter 12's explorers: what the language model writes before and after, and five cases of how low is low.

Each slider's pictures are made from recorded rows; nothing is loaded, trained or evaluated here.
"""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_edu import plots
from lora_edu.data.runs import method_runs
from lora_edu.docstrings import END
from lora_edu.explore.explorer import Explorer
from lora_edu.five_cases import ONLY, STEEP, Case, at_rank, ranks

OFFERED = 7  # functions to choose from
COLUMNS, LINES = 52, 7  # of a source that is shown
BYTES = 4  # of a number in float32
# A case's colour and mark, in the order of `five_cases.cases`.
LOOKS = (
    (plots.BLUE, "o"),
    (plots.GREEN, "^"),
    (plots.PURPLE, "D"),
    (plots.ORANGE, "s"),
    (plots.BLACK, "*"),
)


# ---- what it writes --------------------------------------------------------------------------------------------


def writers(runs: Sequence[Mapping]) -> dict[str, Mapping]:
    """Name → the row of seed 0 that has answers: "untuned", LoRA on all linear layers by rank at its tuned rate, full.

    runs: rows as `load_llm_runs` reads them. Raises ValueError where the untuned row is missing.
    """
    untuned = [row for row in runs if row["method"] == "none"]
    if not untuned:
        raise ValueError("the untuned model's row (method 'none') is missing")
    (about,) = {(row["task"], row["steps"]) for row in runs if row["steps"] is not None}
    tuned = {key: rows[0] for key, rows in method_runs(runs, *about).items() if rows[0]["seed"] == 0}
    found = {"untuned": untuned[0]}
    found |= {
        f"LoRA r = {r}": tuned[m, r] for m, r in sorted(tuned, key=lambda key: key[1] or 0) if m == "lora"
    }
    return found | ({"full tuning": tuned["full", None]} if ("full", None) in tuned else {})


def written_for(functions: Sequence[Mapping]) -> list[tuple[Mapping, int]]:
    """The functions that have answers, each with the answer's place: those with their source."""
    return [(each, place) for place, each in enumerate(each for each in functions if "source" in each)]


def docstring_writer(
    runs: Sequence[Mapping], functions: Sequence[Mapping], names: Sequence[str] | None = None
) -> Explorer:
    """A tuning and a function → its source, the library's line and the one the model writes; every rank's loss.

    runs: rows as `load_llm_runs` reads them; functions: `load_llm_functions`; names: of those to offer, by default
    OFFERED of them evenly spaced, whatever was written for them. Raises ValueError for a name that has no answer.
    """
    rows = writers(runs)
    found: dict[str, tuple[Mapping, int]] = {}
    for each, place in written_for(functions):
        found.setdefault(each["name"], (each, place))
    if names is None:
        everything = list(found)
        count = min(OFFERED, len(everything))
        names = [everything[i * len(everything) // count] for i in range(count)]
    if strangers := [name for name in names if name not in found]:
        raise ValueError(f"nothing was written for {strangers[0]!r}")
    # on a log scale, so that the untuned model and full tuning stand beside the smallest and the largest rank
    sizes = [row["size"] for row in rows.values() if row["size"]]
    places = {name: row["size"] or 4 * max(sizes) for name, row in rows.items()}
    places["untuned"] = min(sizes) / 4
    losses = {name: row["test"] for name, row in rows.items()}
    room = 0.12 * (max(losses.values()) - min(losses.values()))

    def draw(figure: Figure, run: str, function: str) -> str:
        page, cost = figure.subplots(1, 2, width_ratios=[1.9, 1])
        (about, number), row = found[function], rows[run]
        answer = row["answers"][number]
        shown = _cut(about["source"], COLUMNS, LINES)
        whole = f"{about['module']}: {function}"
        title = whole if len(whole) <= COLUMNS else _cut(function, COLUMNS, 1)
        plots.page_of_text(page, shown, title, "", COLUMNS, LINES)
        page.set_facecolor("white")
        _below(page, 62, "the library", about["summary"], plots.BLACK)
        _below(page, 18, run, _one_line(answer), plots.BLUE)
        ranks = [name for name, each in rows.items() if each["size"]]
        cost.plot([places[name] for name in ranks], [losses[name] for name in ranks], color=plots.GREY)
        cost.plot(list(places.values()), list(losses.values()), "o", color=plots.GREY)
        cost.plot(places[run], losses[run], "o", color=plots.BLUE, markersize=10)
        cost.set(xscale="log", xlabel="rank r", title=f"{losses[run]:.2f} nats a token{_size(row)}")
        cost.set(ylabel="held-out loss", ylim=(min(losses.values()) - room, max(losses.values()) + room))
        plots.plain_ticks(cost.xaxis, list(places.values()))
        words = {"untuned": "none", "full tuning": "full"}
        cost.xaxis.set_ticklabels([words.get(name, str(places[name])) for name in places])
        rate = "" if row["rate"] is None else f" at a rate of {row['rate']:g}"
        return (
            f"{run[0].upper()}{run[1:]}{rate}{_size(row)}: {losses[run]:.2f} nats a token on held-out answers, one "
            f"seed. For {function} the library has “{about['summary']}”; the model writes “{_one_line(answer)}”"
            f"{'' if answer.endswith(END) else ' and does not end there'}."
        )

    return Explorer(
        draw,
        {"run": list(rows), "function": list(names)},
        start={"run": "LoRA r = 8" if "LoRA r = 8" in rows else next(iter(rows)), "function": names[0]},
        size=(7.2, 3.1),
        labels={"run": "tuned by", "function": "function"},
        colours=16,
        density=1.0,
    )


def _size(row: Mapping) -> str:
    """', 9.8 MB' of what was trained in float32; nothing for the untuned model."""
    return f", {BYTES * row['trained'] / 1e6:.3g} MB" if row["trained"] else ""


def _one_line(answer: str) -> str:
    """An answer as one line without the mark of its end; line breaks as ⏎, so that they are seen."""
    return " ⏎ ".join(part.strip() for part in answer.removesuffix(END).strip().splitlines())


def _cut(source: str, columns: int, lines: int) -> str:
    """The first lines of a source, each at most `columns` wide, with '…' where something is left out."""
    rows = source.rstrip().expandtabs(4).split("\n")
    wide = [row if len(row) <= columns else row[: columns - 1] + "…" for row in rows]
    return "\n".join(wide if len(wide) <= lines else [*wide[: lines - 1], "…"])


def _below(axes: Axes, height: float, title: str, text: str, colour: str) -> None:
    """A title and below it a text in at most two lines, `height` points above the foot of the axes."""
    lines = textwrap.wrap(text, COLUMNS, max_lines=2, placeholder=" …") or ["(nothing)"]
    place = {"xy": (0, 0), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(title, xytext=(0, height + 2), va="bottom", fontsize=8.5, fontweight="bold", **place)
    look = {"family": "DejaVu Sans Mono", "size": 9.2, "parse_math": False, "color": colour}
    axes.annotate("\n".join(lines), xytext=(6, height), va="top", **look, **place)


# ---- how low is low ----------------------------------------------------------------------------------------------


def five_cases(cases: Sequence[Case]) -> Explorer:
    """A rank r → in every case the share of the gain that ΔW cut to r keeps, and what LoRA trained at r reaches."""
    return Explorer(
        lambda figure, r: draw_cases(figure, cases, r),
        {"r": ranks(cases)},
        start={"r": 8},
        size=(7.2, 3.9),
        labels={"r": "rank r"},
        density=1.25,
    )


@plots.style()
def draw_cases(figure: Figure, cases: Sequence[Case], r: int | None = None) -> str:
    """Share of the gain against r/width, of cut ΔW, and against trained numbers, of LoRA; returns the sentence.

    r: the rank that is marked in all curves, with its figures in the sentence; None: none.
    """
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    at = f"r = {r}" if r else "r"
    for case, (colour, mark) in zip(cases, LOOKS, strict=True):
        for name, curve in case.cut.items():
            places = [100 * rank / case.width for rank in curve if rank]
            look = {"linestyle": "--"} if name == STEEP else {"label": f"{case.name} ({case.width})"}
            face = "white" if name == STEEP else colour
            values = [share for rank, share in curve.items() if rank]
            left.plot(places, values, color=colour, marker=mark, markersize=4, markerfacecolor=face, **look)
            if r:
                _ring(left, 100 * r / case.width, curve[r], colour, mark, face)
        if case.trained:
            numbers = [case.numbers[rank] for rank in case.trained]
            right.plot(numbers, list(case.trained.values()), color=colour, marker=mark, markersize=4)
            for rank in case.trained if case is cases[-1] else ():
                place = (case.numbers[rank], case.trained[rank])
                right.annotate(
                    str(rank), place, (0, -13), textcoords="offset points", ha="center", fontsize=7.5
                )
            right.plot(case.full, 1, mark, color=colour, markersize=5, markerfacecolor="white")
            if r in case.trained:
                _ring(right, case.numbers[r], case.trained[r], colour, mark, colour)
    for axes in (left, right):
        axes.axhline(1, color=plots.GREY, linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="r in % of the width", ylabel="share of the gain", ylim=(-0.08, 1.14))
    plots.plain_ticks(left.xaxis, (0.2, 1, 5, 20, 60))
    left.set_title(f"ΔW cut to {at}: of its own gain")
    right.set(xscale="log", xlabel="numbers trained")
    plots.plain_ticks(right.xaxis, (1e4, 1e6, 1e8))
    right.xaxis.set_ticklabels(["10 000", "1 million", "100 million"])
    right.set(xlim=(9e3, 4e8))
    right.annotate("full tuning", (3.6e8, 1), (0, 5), textcoords="offset points", ha="right", fontsize=8.5)
    right.set_title(f"LoRA at {at}: of full tuning's")
    left.legend(fontsize=7, loc="lower right", title="model (width); dashed: steep", title_fontsize=7)
    if r is None:
        return (
            "Share of a tuning's gain in five cases: kept by full tuning's ΔW cut to r, against r in % of the width "
            "(dashed: the steep tuning), and reached by LoRA trained at r, against the numbers trained."
        )
    return f"r = {r}. " + "; ".join(map(_said, at_rank(cases, r))) + "."


def _ring(axes: Axes, x: float, y: float, colour: str, mark: str, face: str) -> None:
    """A larger mark, where the chosen rank is."""
    size = 12 if mark == "*" else 9
    axes.plot(x, y, mark, color=colour, markersize=size, markerfacecolor=face, markeredgewidth=1.5)


def _said(row: Mapping) -> str:
    """A case at a rank in words: 'SmolLM2, docstrings (1.4 % of the width): cut, gentle 90 %, steep 95 %; …'."""
    of = lambda name, share: f"{share:.0%} of the way" if name == ONLY else f"{name} {share:.0%}"
    whole = [of(name, share) for name, share in row["cut"].items()]
    words = f"{row['name']} ({row['percent']:.2g} % of {row['width']}): cut, {', '.join(whole)}"
    if row["trained"] is None:
        return words
    return f"{words}, trained {row['trained']:.0%} ({row['numbers']:,} numbers)"
