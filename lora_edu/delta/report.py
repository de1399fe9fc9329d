"""What `lora-edu delta` shows: the tables, the words under them, the JSON record and the figure."""

import math
import os
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from lora_edu import plots
from lora_edu.delta.compare import Comparison, by_kind, kind, together
from lora_edu.delta.measure import MARKABLE, Figures
from lora_edu.text import printable

RANKS = ("rank_50", "rank_90", "rank_99")
COLUMNS = (  # heading, width
    ("shape", 12),
    ("‖ΔW‖/‖W‖", 11),
    ("floor", 9),
    ("stable", 8),
    ("effect.", 8),
    ("50 %", 6),
    ("90 %", 6),
    ("99 %", 6),
    ("above", 6),
)
NORM = ("‖ΔW‖", 9)  # a column of its own where some ‖W‖ is not known
LEAST_NAME = 20
STATES = {
    "floor": "floor",
    "equal": "equal",
    "not finite": "NaN/Inf",
    "unmerged": "unmerged",
    "unchanged": "unchanged",
}
MEANING = {
    "columns": "stable, effect.: stable rank (‖ΔW‖²/σ₁²) and effective rank (exp of the entropy of σ/Σσ) of ΔW. "
    "50, 90, 99 %: the rank that holds so much of ‖ΔW‖². floor: what rounding puts into ΔW, its norm over ‖W‖. "
    "above: how many singular values are larger than any that rounding could have made.",
    "*": "* Rounding may have changed this figure by more than a tenth: it includes singular values that rounding "
    "alone could have made.",
    "floor": "floor (at the end of a row): ΔW is at or below the rounding floor. Rounding alone makes as large a "
    "difference, and the ranks in this row are those of rounding noise, which has full rank; only what is counted "
    "under 'above' is not.",
    "equal": "equal: the same in both, ΔW = 0.",
    "not finite": "NaN/Inf: has entries that are not finite; nothing else is said of it.",
    "after": "Of some matrices only AFTER's rounding was counted: --before-exact says so, or ΔW is smaller than "
    "BEFORE's own rounding would have made it.",
    "head": "method head: a random sketch holds all but a negligible rest; the effective rank is right to 1 %.",
    "unmerged": "unmerged: factors of LoRA that stand beside the base's weights in the checkpoint. Ranks are those of "
    "BA; its norm would need alpha, which is not stored.",
    "unchanged": "unchanged: the base's weight, as it was before.",
    "missing": "A word in place of ‖ΔW‖/‖W‖ says why there is no ‖W‖: no base (none was given), missing (no weight "
    "of that name and shape), quantised or packed (its entries are no floating point), other shape, unclear (several "
    "weights fit).",
    "experts": "Experts that are stacked in one tensor are measured one by one: norms are of all together, the rest "
    "are medians.",
    "none": "An adapter holds ΔW itself and not a rounded sum, so there is no rounding floor.",
}
MOST = 20  # names in a list; the JSON record has them all


def text(found: Comparison, width: int | None) -> str:
    """Both tables and what they need in words; names are cut to fit `width` columns, None: never."""
    lines = []
    matrices = {name: each for name, each in found.figures.items() if len(each.shape) >= 2}
    vectors = {name: each for name, each in found.figures.items() if len(each.shape) < 2}
    if matrices:
        norms = any(each.weight_norm is None and each.delta_norm is not None for each in matrices.values())
        rows = {name.removesuffix(".weight"): _cells(each, norms) for name, each in matrices.items()}
        columns = (COLUMNS[0], NORM, *COLUMNS[1:]) if norms else COLUMNS
        lines += table("matrix", rows, width, columns)
        lines += ["", "By kind (medians; the norm and the floor: of all taken together)", ""]
        kinds = {f"{name} ({len(of)})": of for name, of in by_kind(found.figures).items()}
        lines += table("kind", {name: _kind_cells(of, norms) for name, of in kinds.items()}, width, columns)
        lines += [""]
        lines += [textwrap.fill(words, min(width or 100, 100)) for words in _words(matrices)]
    lines += _vectors(vectors)
    lines += _listed(found)
    return "\n".join(lines) + "\n"


def table(
    title: str, rows: dict[str, list[str]], width: int | None, columns: Sequence[tuple[str, int]]
) -> Iterator[str]:
    """A line for each row: the name, then the cells under the columns' headings; what is over stands behind them.

    columns: (heading, letters wide). width: of the terminal, into which names are shortened to fit; None: never.
    """
    rest = sum(wide for _, wide in columns) + 9
    longest = max(len(title), *(len(printable(name)) for name in rows))
    room = longest if width is None else max(LEAST_NAME, min(longest, width - rest))
    yield f"{title:{room}}" + "".join(f"{name:>{wide}}" for name, wide in columns)
    for name, cells in rows.items():
        line = "".join(f"{cell:>{wide}}" for cell, (_, wide) in zip(cells, columns, strict=False))
        yield f"{_shortened(printable(name), room):{room}}{line} {' '.join(cells[len(columns) :])}".rstrip()


def _shortened(name: str, room: int) -> str:
    """The end of a name says more than its start: model.layers.3.self_attn.q_proj → …3.self_attn.q_proj."""
    return name if len(name) <= room else "…" + name[len(name) - room + 1 :]


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def number(value: float | None, mark: bool = False) -> str:
    """Three digits, with a star or a space behind it, so that digits stand under digits."""
    if value is None:
        return "- "
    shown = f"{value:.3g}" if value < 1000 and not isinstance(value, int) else f"{value:.0f}"
    return shown + ("*" if mark else " ")


def _cells(figures: Figures, norms: bool) -> list[str]:
    marked = {name: number(getattr(figures, name), name in figures.marked) for name in MARKABLE}
    norm = marked.pop("relative_norm")
    return [
        shape_text(figures.shape),
        *([number(figures.delta_norm)] if norms else []),
        figures.missing + " " if figures.missing else norm,
        number(figures.relative_floor),
        *marked.values(),
        number(figures.above),
        STATES.get(figures.status, ""),
    ]


def _kind_cells(figures: list[Figures], norms: bool) -> list[str]:
    """A median is marked where half of its values are."""
    norm, floor = together(figures)
    shapes = {shape_text(each.shape) for each in figures}
    half = len(figures) / 2
    cells = [shapes.pop() if len(shapes) == 1 else "various"]
    if norms:
        cells.append(number(math.sqrt(sum((each.delta_norm or 0.0) ** 2 for each in figures))))
    reasons = {each.missing for each in figures if each.missing}
    if reasons:
        cells.append(f"{reasons.pop() if len(reasons) == 1 else 'various'} ")
    else:
        cells.append(number(norm, sum("relative_norm" in each.marked for each in figures) >= half))
    cells.append(number(floor if any(each.floor is not None for each in figures) else None))
    for name in (*MARKABLE[1:], "above"):
        value = _median(figures, name)
        value = round(value) if value is not None and name.startswith(("rank_", "above")) else value
        cells.append(number(value, sum(name in each.marked for each in figures) >= half))
    cells.append(_states(figures))
    return cells


def _median(figures: list[Figures], name: str) -> float | None:
    """Median of a figure over the matrices that have it."""
    values = [getattr(each, name) for each in figures if getattr(each, name) is not None]
    return statistics.median(values) if values else None


def _states(figures: list[Figures]) -> str:
    """How many are at the floor, equal or not finite: "2 floor, 1 equal"."""
    states = [STATES[each.status] for each in figures if each.status in STATES]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _words(matrices: dict[str, Figures]) -> Iterator[str]:
    """Only what the table shows is explained."""
    shown = {each.status for each in matrices.values()} | {each.roundings for each in matrices.values()}
    yield MEANING["columns"]
    if any(each.marked for each in matrices.values()):
        yield MEANING["*"]
    shown |= {"missing" for each in matrices.values() if each.missing}
    shown |= {"experts" for each in matrices.values() if each.experts}
    for state in (
        "floor",
        "equal",
        "not finite",
        "unmerged",
        "unchanged",
        "missing",
        "experts",
        "after",
        "none",
    ):
        if state in shown:
            yield MEANING[state]
    for name, each in matrices.items():
        if each.note:
            yield f"{printable(name)}: {each.note}"
    formats = {each for of in matrices.values() for each in of.formats if " in " in each}
    for each in sorted(formats):
        inner, _, outer = each.partition(" in ")
        yield f"Some tensors in {outer} hold {inner} numbers only; their rounding was counted as {inner}'s."
    if any(len(each.shape) > 2 and not each.experts for each in matrices.values()):
        yield "Tensors of more than two axes are read as matrices: the first axis by the others, sides of 1 left out."


def _vectors(vectors: dict[str, Figures]) -> Iterator[str]:
    """Vectors have no spectrum; their norms alone, a line for each kind."""
    kinds: dict[str, list[Figures]] = {}
    for name, each in vectors.items():
        kinds.setdefault(kind(name), []).append(each)
    if kinds:
        yield from ("", "Vectors (biases, norms): ‖ΔW‖/‖W‖, all of a kind taken together; rounding floor", "")
    for name, of in kinds.items():
        norm, floor = together(of)
        yield f"{printable(name)} ({len(of)})  {number(norm)} {number(floor)} {_states(of)}".rstrip()


def _listed(found: Comparison) -> Iterator[str]:
    yield from ([""] if found.notes else [])
    yield from found.notes
    lists = {
        "Only in BEFORE, not compared": [printable(name) for name in found.only_before],
        "Only in AFTER, not compared": [printable(name) for name in found.only_after],
        "Rows that only one has, not compared": [
            f"{printable(name)}: {why}" for name, why in found.new_rows.items()
        ],
        "Shapes differ": [f"{printable(name)}: {why}" for name, why in found.shapes_differ.items()],
        "Not measured": [f"{printable(name)}: {why}" for name, why in found.not_measured.items()],
    }
    for title, lines in lists.items():
        if lines:
            yield from ("", f"{title} ({len(lines)}):")
            yield from (f"  {line}" for line in lines[:MOST])
            if len(lines) > MOST:
                yield f"  and {len(lines) - MOST} more; --json lists all"


def record(found: Comparison) -> dict:
    """Everything as JSON: numbers are numbers, null is what could not be computed."""

    def one(name: str, each: Figures) -> dict:
        fields = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in each._asdict().items()
            if key
            != "spectrum"  # for the page: as JSON, a line a number, it would be longer than all the rest
        }
        more = {"relative_norm": each.relative_norm, "relative_floor": each.relative_floor}
        return {"name": name, "kind": kind(name)} | fields | more

    rows = [one(name, each) for name, each in found.figures.items()]
    kinds = []
    for name, of in by_kind(found.figures).items():
        norm, floor = together(of)
        medians = {field: _median(of, field) for field in (*MARKABLE[1:], "above")}
        at_floor = sum(each.status == "floor" for each in of)
        kinds.append(
            {"kind": name, "matrices": len(of), "relative_norm": norm, "relative_floor": floor}
            | {"at_floor": at_floor, "medians": medians}
        )
    return {
        "made_by": "lora-edu delta",
        "before": found.before,
        "after": found.after,
        "matrices": [row for row in rows if len(row["shape"]) >= 2],
        "vectors": [row for row in rows if len(row["shape"]) < 2],
        "kinds": kinds,
        "only_in_before": found.only_before,
        "only_in_after": found.only_after,
        "shapes_differ": found.shapes_differ,
        "not_measured": found.not_measured,
        "new_rows": found.new_rows,
        "notes": found.notes,
        "given": found.given,
        "meaning": MEANING,
    }


@plots.style()
def picture(found: Comparison) -> bytes:
    """PNG: by kind, size of ΔW beside the rounding floor, and the share of the full rank that 90 % takes."""
    kinds = {name: [each for each in of if each.relative_norm] for name, of in by_kind(found.figures).items()}
    kinds = {name: of for name, of in kinds.items() if of}
    height = min(1.3 + 0.24 * max(len(kinds), 3), 30)
    figure, (size, rank) = plots.subplots(1, 2, size=(7.2, height), sharey=True)
    for row, of in enumerate(kinds.values()):
        for each in of:
            noisy = each.status == "floor"
            look = {"color": plots.BLUE, "markerfacecolor": "none" if noisy else plots.BLUE, "markersize": 4}
            size.plot(each.relative_norm, row, "o", **look)
            if each.floor:
                size.plot(each.relative_floor, row, "|", color=plots.VERMILION, markersize=10)
            if each.rank_90:
                smaller = min(each.sides)
                noisy = "rank_90" in each.marked
                look["markerfacecolor"] = "none" if noisy else plots.BLUE
                rank.plot(each.rank_90 / smaller, row, "o", **look)
    names = [_shortened(printable(name), 30).replace("$", r"\$") for name in kinds]
    size.set(xscale="log", xlabel="‖ΔW‖ / ‖W‖", title="Size of ΔW")
    size.set_yticks(range(len(names)), names)
    size.set_ylim(max(len(names), 1) - 0.5, -0.5)
    rank.set(xlim=(0, 1.03), xlabel="share of the full rank", title="Rank for 90 % of the energy")
    handles = [
        size.plot([], [], "o", color=plots.BLUE, markersize=4, label="a matrix")[0],
        size.plot([], [], "o", color=plots.BLUE, markerfacecolor="none", label="could be rounding")[0],
        size.plot([], [], "|", color=plots.VERMILION, markersize=10, label="rounding floor")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    with warnings.catch_warnings():  # a name may have letters that no font has
        warnings.simplefilter("ignore")
        return plots.to_png(figure)


def terminal_width(stream) -> int | None:
    """Columns to keep to; None for a file or a pipe, which take lines of any length."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None
