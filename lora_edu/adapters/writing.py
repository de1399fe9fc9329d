"""Files and folders that appear whole or not at all, and safetensors files written a few rows at a time.

Not for what is in them.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from lora_edu.delta.files import BITS, CheckpointError
from lora_edu.text import printable


class Entry(NamedTuple):
    """A tensor to be written: its format's name, its shape, and what yields its rows in order, as stored."""

    name: str
    format: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor | bytes]]


def check_new(out: Path, inputs: Iterable[Path]) -> None:
    """Raise CheckpointError unless `out` is a new (or empty) folder that can be made, apart from what is read."""
    shown = printable(out)
    for each in inputs:
        place = each.resolve() if each.exists() else each
        if out.resolve() == place or (place.is_dir() and out.resolve().is_relative_to(place)):
            raise CheckpointError(f"OUT must be a folder of its own; {shown} is, or lies in, what is read")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"OUT must be a new folder; {shown} is a file")
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"OUT must be a new folder; {shown} has something in it already")
    if not out.parent.is_dir():
        raise CheckpointError(f"{shown} can't be made: there is no folder {printable(out.parent)}")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise CheckpointError(f"{shown} can't be made: {printable(out.parent)} is not to be written to")


@contextmanager
def in_place(out: Path) -> Iterator[Path]:
    """A name beside `out` for a file or a folder that is put in its place at the end; after a failure nothing is left.

    `out` must not be there, or be an empty folder.
    """
    place = out.with_name(f".{secrets.token_hex(4)}.new")
    try:
        yield place
        if out.is_dir():
            out.rmdir()
        os.replace(place, out)
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


@contextmanager
def made(out: Path) -> Iterator[None]:
    """Whatever reading and writing raise, as a CheckpointError of one line that names what can't be made."""
    try:
        yield
    except OSError as refusal:
        raise CheckpointError(f"{printable(out)} can't be made: {refusal.strerror or refusal}") from None
    except (RuntimeError, MemoryError, SafetensorError) as refusal:
        told = printable(str(refusal).partition("\n")[0] or "out of memory")
        raise CheckpointError(f"{printable(out)} can't be made: {told}") from None


def write_safetensors(path: Path, entries: list[Entry]) -> None:
    """A safetensors file, its header from the entries, its tensors as their blocks come; flushed to the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for entry in entries:
        size = bytes_of(entry.format, entry.shape)
        header[entry.name] = {
            "dtype": entry.format,
            "shape": list(entry.shape),
            "data_offsets": [reached, reached + size],
        }
        reached += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = sum(file.write(_bytes(block)) for block in entry.blocks())
            if written != bytes_of(entry.format, entry.shape):
                raise CheckpointError(
                    f"{printable(entry.name)} ended early: it was changed while it was read"
                )
        file.flush()
        os.fsync(file.fileno())


def bytes_of(format: str, shape: tuple[int, ...]) -> int:
    if format not in BITS:
        raise CheckpointError(
            f"tensors of the format {printable(format)} are not known here and can't be copied"
        )
    return torch.Size(shape).numel() * BITS[format] // 8


def _bytes(block: Tensor | bytes) -> bytes | memoryview:
    if isinstance(block, bytes):
        return block
    return memoryview(block.contiguous().view(torch.uint8).numpy()).cast("B")
