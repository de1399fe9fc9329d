"""`lora-edu delta BEFORE AFTER`: how large a fine-tune's ΔW is, of which rank, and what of it is only rounding.

The command line alone: what is read is in files.py, the figures in measure.py, what is shown in report.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from lora_edu import commands
from lora_edu.delta.compare import Comparison, compare
from lora_edu.delta.files import CheckpointError, open_checkpoint
from lora_edu.delta.measure import Figures
from lora_edu.paths import expanded, write_atomically
from lora_edu.text import format_bytes, printable

__all__ = ["CheckpointError", "Comparison", "Figures", "compare", "main", "open_checkpoint"]

NOTHING_MEASURED = 1  # exit status: read, but of no tensor could anything be said


def main(arguments: Sequence[str]) -> int:
    """Print the tables, write what was asked for; returns the exit status."""
    return commands.status("lora-edu delta", _run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    if options.plot == "-":
        raise CheckpointError("--plot needs a file's name: a picture isn't printed")
    if options.html == "-":
        raise CheckpointError("--html needs a file's name: a page isn't printed")
    for path in (options.json, options.plot, options.html):
        commands.check_output(path, (options.before, options.after))
    found = compare(
        options.before, options.after, options.before_exact, commands.bar("tensor", options.quiet)
    )
    for note in found.given:
        print(f"lora-edu delta: {note}", file=sys.stderr)
    if not found.figures and not found.not_measured and not found.shapes_differ:
        raise CheckpointError(
            "BEFORE and AFTER have no tensor's name in common: are they versions of one model? "
            f"{_first(found.only_before, 'BEFORE')}, {_first(found.only_after, 'AFTER')}"
        )
    from lora_edu.delta import report  # matplotlib, not needed for what can't be read

    made = json.dumps(report.record(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if options.json and options.json != "-":
        write_atomically(expanded(options.json), made.encode("utf-8", "backslashreplace"))
    if options.plot:
        write_atomically(expanded(options.plot), report.picture(found))
    if options.html:
        from lora_edu.delta import page

        if any(each.spectrum for each in found.figures.values()):
            write_page("delta", options.html, page.of_comparison(found))
        else:
            print(f"lora-edu delta: {options.html} not written: no matrix has a spectrum", file=sys.stderr)
    print(
        made if options.json == "-" else report.text(found, report.terminal_width(sys.stdout)),
        end="",
        flush=True,
    )
    if found.figures:
        return 0
    print(
        "Nothing could be measured; the lists above say why.",
        file=sys.stderr if options.json == "-" else None,
    )
    return NOTHING_MEASURED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-edu delta",
        description="The difference ΔW between two checkpoints, matrix by matrix: its size, its ranks, and which of "
        "these figures the rounding of the files could have made. Nothing is fetched and nothing in a file is run.",
    )
    parser.add_argument(
        "before", metavar="BEFORE", help="a safetensors file, or a model's folder (shards too)"
    )
    parser.add_argument(
        "after",
        metavar="AFTER",
        nargs="?",
        help="the same after tuning, or a LoRA adapter (PEFT's folder, kohya, diffusers, MLX); an adapter can also "
        "stand alone, in the place of BEFORE",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every figure as JSON; - prints it in place of the tables"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw size and rank of ΔW by kind of matrix, as PNG")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write one page with every spectrum and a slider over the rank; it needs no network",
    )
    parser.add_argument(
        "--before-exact",
        action="store_true",
        help="tuning started from BEFORE just as it is stored: count AFTER's rounding alone",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def write_page(command: str, name: str, made: bytes) -> None:
    """Write a page and say on the standard error how large it is."""
    write_atomically(expanded(name), made)
    print(f"lora-edu {command}: {name} has {format_bytes(len(made))}", file=sys.stderr)


def _first(names: list[str], title: str) -> str:
    return f"{title} has {printable(names[0])}" if names else f"{title} has none"
