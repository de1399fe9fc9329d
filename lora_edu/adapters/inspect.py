"""`lora-edu inspect ADAPTER`: which rank a trained adapter really uses, from its factors, and what a cut would keep.

The command line and what is shown; the figures are usage.py's.
"""

import argparse
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lora_edu import commands
from lora_edu.adapters import text_loss
from lora_edu.adapters.usage import (
    Usage,
    kept_at,
    recommendation,
    uses_of,
)
from lora_edu.delta import NOTHING_MEASURED, recognise, write_page
from lora_edu.delta.compare import grouped, kind
from lora_edu.delta.files import CheckpointError
from lora_edu.delta.measure import rank_grid
from lora_edu.lora.adapter_files import Adapter, read_adapter
from lora_edu.paths import expanded, write_atomically
from lora_edu.text import printable

COLUMNS = (
    ("shape", 12),
    ("r", 5),
    ("‖ΔW‖", 9),
    ("stable", 8),
    ("effect.", 8),
    ("90 %", 6),
    ("99 %", 6),
    ("at r/2", 8),
    ("at r/4", 8),
    ("above", 6),
    ("cut to", 7),
)
MEANING = {
    "columns": "‖ΔW‖: of ΔW = s · BA, whose singular values come from QR of B and A. stable, effect.: stable rank "
    "(‖ΔW‖²/σ₁²) and effective rank (exp of the entropy of σ/Σσ). 90, 99 %: the rank that holds so much of ‖ΔW‖². "
    "at r/2, at r/4: the share of ‖ΔW‖² that the best cut to that rank keeps. cut to: the rank of 99 %, where that is "
    "three quarters of r or less.",
    "above": "above: how many singular values are larger than any in 40 draws of noise (5 where r > 256): products "
    "of Gaussian factors of the same shapes, scaled to the same ‖ΔW‖ (parallel analysis, Horn 1965). It tells "
    "structure from noise, not use from waste: of an update that uses all its directions alike none is above.",
    "energy": "Energy is not behaviour: --text FILE --model FOLDER measures the loss at each rank.",
    "equal": "equal: ΔW = 0, as before training.",
    "not finite": "NaN/Inf: the factors have entries that are not finite.",
    "experts": "Experts in one tensor share a rank: ranks and shares are those of the whole stack; stable, effect. and "
    "above are medians.",
}
STATES = {"equal": "equal", "not finite": "NaN/Inf"}
NAME = "lora-edu inspect"


def main(arguments: Sequence[str]) -> int:
    """Print the tables, write what was asked for; returns the exit status."""
    return commands.status(NAME, _run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    if options.html == "-":
        raise CheckpointError("--html needs a file's name: a page isn't printed")
    for path in (options.json, options.html):
        commands.check_output(path, (options.adapter, options.text, options.model))
    adapter, notes = open_adapter(options.adapter)
    held = text_loss.asked_for(options)
    uses = uses_of(adapter, commands.bar("layer", options.quiet))
    for note in notes:
        print(f"{NAME}: {note}", file=sys.stderr)
    rows = _losses(held, adapter, uses) if held else []
    from lora_edu.delta import report  # matplotlib, not needed for what can't be read

    told = record(options.adapter, adapter, uses) | (text_loss.record(held, rows) if held else {})
    made = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if options.json and options.json != "-":
        write_atomically(expanded(options.json), made.encode("utf-8", "backslashreplace"))
    measured = any(each.status == "measured" for each in uses.values())
    if options.html and measured:
        write_page("inspect", options.html, page_of(options.adapter, uses))
    shown = (
        made if options.json == "-" else text(adapter, uses, report.terminal_width(sys.stdout), held is None)
    )
    if held and options.json != "-":
        shown += "\n" + "\n".join(text_loss.lines(held, rows)) + "\n"
    print(shown, end="", flush=True)
    if measured:
        return 0
    print(
        f"Nothing could be measured: {recommendation(uses)[1]}.",
        file=sys.stderr if options.json == "-" else None,
    )
    return NOTHING_MEASURED


def _losses(held: text_loss.HeldOut, adapter: Adapter, uses: Mapping[str, Usage]) -> list[text_loss.Row]:
    cuts = dict(text_loss.USUAL)
    if recommendation(uses)[0] == "resize":
        cuts = {"cut to": lambda name, factors: uses[name].recommended} | cuts
    return text_loss.losses(held, adapter.path, cuts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Which rank a trained adapter really uses: the spectrum of every ΔW = s · BA from its factors, "
        "what a cut to half and a quarter of the rank keeps, and a recommendation. No base is needed, and nothing in a "
        "file is run.",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="PEFT's folder, or a file of kohya, diffusers or MLX"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every figure as JSON; - prints it in place of the tables"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write one page with every spectrum and a slider over the rank; it needs no network",
    )
    text_loss.add_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def open_adapter(name: str) -> tuple[Adapter, list[str]]:
    """An adapter in any layout, and what there is to say of it; a folder that is something else is named."""
    path = expanded(name)
    if path.is_dir() and not recognise.is_adapter(path):
        raise CheckpointError(f"{printable(path)} is no adapter{recognise.instead(path)}")
    place, note = recognise.adapter(path)
    adapter = read_adapter(place)
    return adapter, [*([note] if note else []), *adapter.notes]


# --- what is shown ------------------------------------------------------------------------------------------


def text(adapter: Adapter, uses: Mapping[str, Usage], width: int | None, hint: bool = True) -> str:
    """The tables, the words under them, totals and the recommendation. hint: that a text can be measured, too."""
    from lora_edu.delta import report

    lines = []
    if uses:
        lines += report.table("layer", {name: _cells(each) for name, each in uses.items()}, width, COLUMNS)
        lines += ["", "By kind (medians; the norm, and the shares at r/2 and r/4: of all taken together)", ""]
        kinds = {f"{name} ({len(of)})": _kind_cells(of) for name, of in grouped(uses).items()}
        lines += report.table("kind", kinds, width, COLUMNS)
        lines += ["", *_totals(uses), ""]
        lines += [textwrap.fill(words, min(width or 100, 100)) for words in _words(uses)]
        lines += ["", *_advice(uses, width, hint)]
    listed = [f"{printable(name)}: {why}" for name, why in adapter.refused.items()]
    listed += [
        f"{printable(name)}: stored whole, {' × '.join(map(str, each.shape))}"
        for name, each in adapter.whole.items()
    ]
    listed += [
        f"{printable(name)}: {len(ids)} token rows of their own" for name, (ids, _) in adapter.rows.items()
    ]
    if listed:
        lines += ["", f"Not measured ({len(listed)}):", *(f"  {each}" for each in listed[: report.MOST])]
        if len(listed) > report.MOST:
            lines.append(f"  and {len(listed) - report.MOST} more; --json lists all")
    return "\n".join(lines) + "\n"


def _cells(used: Usage) -> list[str]:
    from lora_edu.delta.report import number, shape_text

    shape = (used.experts, *used.sides) if used.experts > 1 else used.sides
    return [
        shape_text(shape),
        f"{used.rank} ",
        *(
            number(each)
            for each in (used.norm, used.stable_rank, used.effective_rank, used.rank_90, used.rank_99)
        ),
        _percent(used.half),
        _percent(used.quarter),
        number(used.above),
        number(used.recommended),
        STATES.get(used.status, ""),
    ]


def _kind_cells(uses: list[Usage]) -> list[str]:
    from lora_edu.delta.report import number, shape_text

    shapes, ranks = {each.sides for each in uses}, {each.rank for each in uses}
    numbered = dict(enumerate(uses))
    norm = math.sqrt(sum((each.norm or 0.0) ** 2 for each in uses))
    middle = {
        name: [value for each in uses if (value := getattr(each, name)) is not None]
        for name in ("stable_rank", "effective_rank", "rank_90", "rank_99", "above", "recommended")
    }
    shown = {
        name: number(
            (statistics.median if name.endswith("e_rank") else statistics.median_high)(of) if of else None
        )
        for name, of in middle.items()
    }
    return [
        shape_text(next(iter(shapes))) if len(shapes) == 1 else "various",
        f"{next(iter(ranks))} " if len(ranks) == 1 else "various ",
        number(norm),
        *(shown[name] for name in ("stable_rank", "effective_rank", "rank_90", "rank_99")),
        _percent(kept_at(2, numbered)),
        _percent(kept_at(4, numbered)),
        shown["above"],
        shown["recommended"],
    ]


def _percent(share: float | None) -> str:
    """Two digits after the point, and never 100 of what is less."""
    if share is None:
        return "- "
    shown = f"{100 * share:.1f}"
    return f"{'>99.9' if shown == '100.0' and share < 1 - 1e-12 else shown} "


def _totals(uses: Mapping[str, Usage]) -> Iterator[str]:
    parameters = sum(each.parameters for each in uses.values())
    norm = math.sqrt(sum((each.norm or 0.0) ** 2 for each in uses.values()))
    yield (
        f"All {len(uses)} layers: {parameters} parameters, ‖ΔW‖ {norm:.3g}; r/2 keeps {_percent(kept_at(2, uses))}% of "
        f"it squared, r/4 {_percent(kept_at(4, uses))}%"
    )


def _words(uses: Mapping[str, Usage]) -> Iterator[str]:
    yield MEANING["columns"]
    yield MEANING["above"]
    for state in ("equal", "not finite"):
        if any(each.status == state for each in uses.values()):
            yield MEANING[state]
    if any(each.experts > 1 for each in uses.values()):
        yield MEANING["experts"]


def _advice(uses: Mapping[str, Usage], width: int | None, hint: bool) -> Iterator[str]:
    what, why = recommendation(uses)
    said = {
        "resize": "Cut it: lora-edu resize ADAPTER OUT --energy 0.99",
        "higher": "Keep it, and try a higher rank",
        "keep": "Keep it as it is",
        "nothing": "Nothing to recommend",
    }[what]
    yield textwrap.fill(f"{said}. Why: {why}.", min(width or 100, 100))
    if hint and what != "nothing":
        yield textwrap.fill(MEANING["energy"], min(width or 100, 100))


def record(name: str, adapter: Adapter, uses: Mapping[str, Usage]) -> dict:
    """Everything as JSON: numbers are numbers, null is what could not be computed."""
    what, why = recommendation(uses)
    rows = []
    for layer, each in uses.items():
        fields = {
            key: list(value) if isinstance(value, tuple) else value for key, value in each._asdict().items()
        }
        rows.append(
            {"name": layer, "kind": kind(layer), "parameters": each.parameters, "flat": each.flat} | fields
        )
    return {
        "made_by": NAME,
        "adapter": name,
        "layout": adapter.layout,
        "alpha_known": adapter.scaled,
        "layers": rows,
        "kept_at_half": kept_at(2, uses),
        "kept_at_quarter": kept_at(4, uses),
        "recommended": what,
        "reason": why,
        "stored_whole": {key: list(each.shape) for key, each in adapter.whole.items()},
        "token_rows": {key: len(ids) for key, (ids, _) in adapter.rows.items()},
        "not_measured": adapter.refused,
        "objections": adapter.objections,
        "notes": adapter.notes,
        "meaning": MEANING,
    }


def page_of(name: str, uses: Mapping[str, Usage]) -> bytes:
    """The page of `inspect`: with the largest singular value of noise of the same norm as a line."""
    from lora_edu.delta.page import Entry, page

    entries = []
    for layer, each in uses.items():
        if each.status != "measured":
            continue
        squares = [value**2 for value in each.values]
        total = sum(squares)
        spectrum = [
            (k, each.values[k - 1], min(sum(squares[:k]) / total, 1.0)) for k in rank_grid(len(squares))
        ]
        alone = each.experts == 1
        note = f"r = {each.rank}" + ("" if alone else f", {each.experts} experts together")
        edge, above = (each.edge, each.above) if alone else (None, None)
        where = (layer, kind(layer), each.sides, each.experts, each.norm, spectrum)
        entries.append(Entry(*where, edge, above, each.rank_90, note))
    advice = recommendation(uses)[1]
    lead = [
        "The spectrum of ΔW = s · BA, layer by layer. " + f"{advice[0].upper()}{advice[1:]}.",
        "The line: the largest singular value in 40 draws of noise, products of Gaussian factors of the same shapes, "
        "scaled to the same ‖ΔW‖. " + MEANING["energy"],
    ]
    above = "are larger than any of noise of the same norm"
    return page(f"Adapter {Path(name).name}", lead, entries, "largest of noise of the same ‖ΔW‖", above)
