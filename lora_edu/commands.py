"""What the commands for a stranger's files have in common: refusals of one line, a progress bar, where output may go.

Not for what they do: delta/ and adapters/.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from lora_edu.delta.files import CheckpointError
from lora_edu.lora.adapter_files import AdapterError
from lora_edu.paths import expanded
from lora_edu.text import printable

BAD_INPUT = 2  # exit status: a file that can't be read, or nothing to work on


def status(
    name: str,
    work: Callable[[argparse.Namespace], int],
    options: argparse.Namespace,
    also: tuple[type[Exception], ...] = (),
) -> int:
    """What `work` returns; where it refuses its input, one line on the standard error and BAD_INPUT.

    also: what counts as a refusal besides CheckpointError, AdapterError and OSError.
    """
    try:
        return work(options)
    except BrokenPipeError:
        raise  # the reader of a pipe has seen enough: cli.py's
    except (CheckpointError, AdapterError, OSError, *also) as error:
        print(f"{name}: {printable(error, 2000)}", file=sys.stderr)
        return BAD_INPUT


def bar(unit: str, quiet: bool) -> Callable[[list], tqdm]:
    """What wraps a list that is walked through in a progress bar, for a terminal only."""
    hidden = quiet or not sys.stderr.isatty()
    return lambda items: tqdm(items, unit=unit, leave=False, disable=hidden, file=sys.stderr)


def check_output(name: str | None, inputs: Iterable[str | None]) -> None:
    """Before an hour of work: the folder is there, and the file is none of those that are read."""
    if name is None or name == "-":
        return
    path = expanded(name)
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(
            f"{name} can't be written: {'it is a folder' if path.is_dir() else 'no such folder'}"
        )
    for read in map(expanded, filter(None, inputs)):
        if path.exists() and any(other.exists() and path.samefile(other) for other in (read, *_files(read))):
            raise CheckpointError(f"{name} is read, so it is not written over: give another name")


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
