"""The command `lora-edu`: finds the sub-command and hands it the rest of the line.

Each is a module with `main(arguments) -> exit status`, imported only when asked for. No work is done here.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lora_edu import paths

# Name → module, what it does, and whether it needs the repository beside the package (a wheel has none).
COMMANDS = {
    "lab": ("lora_edu.lab", "open the chapters in JupyterLab, as copies of your own", True),
    "doctor": ("lora_edu.doctor", "say what this machine has and which chapters can run on it", False),
    "data": ("lora_edu.recording.make", "make the shipped checkpoints anew (an hour on two cores)", True),
    "delta": ("lora_edu.delta", "the spectrum of the difference between two checkpoints", False),
    "extract": ("lora_edu.adapters.extract", "a LoRA adapter out of a full fine-tune", False),
    "merge": ("lora_edu.adapters.merge", "adapters merged into a base model's files", False),
    "inspect": ("lora_edu.adapters.inspect", "which rank a trained adapter really uses", False),
    "resize": ("lora_edu.adapters.resize", "a smaller adapter out of a trained one", False),
    "count": ("lora_edu.counting", "parameters, bytes and FLOPs of LoRA on a model's real shapes", False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit status. An error that names its way out becomes one line.

    A reader of our output that stops reading (`| head`) has seen enough: that is no error.
    """
    make_printable()
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, since at the interpreter's end nobody could catch what it raises
    except OSError as error:
        if not _closed_pipe(error):
            raise
        _write_no_more()
        return 0


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="lora-edu", description="LoRA, measured: the course's commands.")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, what, _) in COMMANDS.items():
        if is_there(module):
            choices.add_parser(name, help=what, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    module, _, needs_repository = COMMANDS[chosen.command]
    try:
        if needs_repository:
            paths.repository()
        return import_module(module).main(rest) or 0
    except (OSError, ValueError) as error:
        if _closed_pipe(error):
            raise
        print(f"lora-edu {chosen.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _closed_pipe(error: Exception) -> bool:
    """Whether nobody reads what we print any more; Windows says so by another number (EINVAL), without a file."""
    if isinstance(error, BrokenPipeError):
        return True
    return os.name == "nt" and isinstance(error, OSError) and error.errno == 22 and error.filename is None


def _write_no_more() -> None:
    """What is still in the buffers goes nowhere, quietly."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())


def is_there(module: str) -> bool:
    """Whether a module of ours exists, found by its file: `find_spec` would import the package above it."""
    place = Path(__file__).parents[1].joinpath(*module.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def make_printable() -> None:
    """Let every text be printed on any console: what it can't show becomes `?`, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
