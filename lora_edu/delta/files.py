"""Checkpoints on disk for `lora-edu delta`: safetensors files and Hugging Face folders, read a few rows at a time.

The header is read and checked here, by the format's rules, so that a damaged or hostile file gets one clear line and
nothing is mapped into memory. Nothing from a file is ever executed. Adapters are read in lora/peft_format.py.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_edu.text import printable

WEIGHTS = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library; a thousand tensors take about 100 kB
BLOCK = 2**18  # entries read at once: a megabyte in float32
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BEGINNINGS = {  # how files of other kinds open
    b"PK\x03\x04": "a zip archive, as torch.save writes: a pickle in a zip",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, the weights themselves were not fetched (`git lfs pull`)",
}
SAVE_AGAIN = (
    "Where you trust it, open it with torch.load(…, weights_only=True) and write it again with "
    "safetensors.torch.save_file"
)


class CheckpointError(ValueError):
    """The checkpoint can't be read, and why."""


class Stored(NamedTuple):
    """One tensor in a file: its format's name, its shape, and the byte at which it begins."""

    path: Path
    format: str
    shape: tuple[int, ...]
    begin: int

    @property
    def sides(self) -> tuple[int, int]:
        """As a matrix: a vector is one column; of more axes, the first by all the others, without leading ones."""
        if len(self.shape) < 2:
            return self.size, 1
        first = next((axis for axis, side in enumerate(self.shape[:-2]) if side != 1), len(self.shape) - 2)
        return self.shape[first], math.prod(self.shape[first + 1 :])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> "Stored":
        """Some rows (of the first axis), which stand together in the file."""
        inner = math.prod(self.shape[1:]) * BITS[self.format] // 8
        return self._replace(shape=(last - first, *self.shape[1:]), begin=self.begin + first * inner)

    def part(self, index: int) -> "Stored":
        """One entry of the first axis: one expert of a stack."""
        return self.rows(index, index + 1)._replace(shape=self.shape[1:])


class Checkpoint(NamedTuple):
    """The tensors of a file or folder by name (none of them read), and what is odd about it, in words."""

    path: Path
    tensors: dict[str, Stored]
    notes: list[str]


def experts_of(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of three axes is a stack of matrices, one an expert, and no convolution's kernel."""
    if len(shape) != 3 or shape[0] < 2 or "conv" in name.lower():
        return False
    return bool(re.search(r"expert|moe", name.lower())) or min(shape[1:]) >= 32


def read_whole(stored: Stored) -> Tensor:
    """A tensor with all its entries, in its own format and shape."""
    return torch.cat([block for _, (block,) in blocks(stored)]).view(stored.shape)


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a safetensors file, or of a folder with one file or several and an index.

    Raises CheckpointError with one line that says what is wrong and, where there is one, the way out.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"there is no {printable(path)}. Nothing is fetched: give a file or folder")
        if path.name.endswith(".index.json"):
            return _open_index(path)
        return Checkpoint(path, read_header(path), [])
    except OSError as error:
        raise CheckpointError(f"{printable(path)} can't be read: {error.strerror or error}") from None


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / WEIGHTS).exists():
        if (folder / "adapter_config.json").exists() and (folder / "adapter_model.safetensors").exists():
            raise CheckpointError(
                f"{printable(folder)} holds a model and an adapter: name the model's file, {WEIGHTS}, or keep "
                "the adapter in a folder of its own"
            )
        return Checkpoint(folder, read_header(folder / WEIGHTS), [])
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _open_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and not indices:
        return Checkpoint(folder, read_header(files[0]), [])
    if len(files) + len(indices) > 1:
        names = ", ".join(printable(each.name) for each in [*indices, *files][:4])
        raise CheckpointError(
            f"{printable(folder)} holds several checkpoints or shards without an index ({names}): name one"
        )
    pickles = sorted(each for each in folder.iterdir() if each.suffix in PICKLES)
    if pickles:
        raise CheckpointError(_pickle(pickles[0]))
    raise CheckpointError(
        f"{printable(folder)} holds no weights: a model's folder has {WEIGHTS}, or shards and "
        f"{WEIGHTS}.index.json"
    )


def _pickle(path: Path) -> str:
    return (
        f"{printable(path.name)} is a pickle, which can run any code when it is opened, so it is not. "
        f"{SAVE_AGAIN}"
    )


# --- shards -------------------------------------------------------------------------------------------------


def _open_index(path: Path) -> Checkpoint:
    """All tensors of all shards, checked against the index that names them."""
    name = printable(path.name)
    places = _json_object(_bytes_of_json(path), name).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{name} must have a weight_map, tensor → file; it has none")
    shards = {}
    for shard in places.values():
        if not isinstance(shard, str):
            raise CheckpointError(f"{name} must name files; it has {printable(shard)}")
        if shard not in shards:
            shards[shard] = read_header(inside(path.parent, shard, name))
    tensors = {}
    for shard, held in shards.items():
        for tensor in held.keys() & tensors.keys():
            other = printable(tensors[tensor].path.name)
            raise CheckpointError(f"{printable(tensor)} is in two shards, {other} and {printable(shard)}")
        tensors |= held
    for tensor, shard in places.items():
        if tensor not in shards[shard]:
            raise CheckpointError(
                f"{name} says that {printable(tensor)} is in {printable(shard)}, but it isn't: the shards are "
                "of another model, or damaged"
            )
    unlisted = [tensor for tensor in tensors if tensor not in places]
    notes = [f"{len(unlisted)} tensors are in its shards but not in its index"] if unlisted else []
    return Checkpoint(path.parent, tensors, notes)


def _bytes_of_json(path: Path) -> bytes:
    if not path.is_file() or path.stat().st_size > LARGEST_HEADER:
        raise CheckpointError(f"{printable(path.name)} must be a file of at most {LARGEST_HEADER} bytes")
    return path.read_bytes()


def inside(folder: Path, shard: str, index: str) -> Path:
    """The shard's path, unless it leaves the folder (or, in Hugging Face's cache, the model's blobs)."""
    refusal = CheckpointError(f"{index} names {printable(shard)}, which leaves the folder: it is refused")
    if not shard or any(mark in shard for mark in ("\\", ":", "\0")) or Path(shard).is_absolute():
        raise refusal
    if ".." in Path(shard).parts:
        raise refusal
    path = folder / shard
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # there each file is a link to ../../blobs
        homes.append(homes[0].parents[1] / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise refusal from None
    if not any(target.is_relative_to(home) for home in homes):
        raise refusal
    if not path.is_file():
        raise CheckpointError(f"the shard {printable(shard)}, which {index} names, is missing")
    return path


# --- one file -----------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Stored]:
    """Name → place of every tensor of a safetensors file, in the file's order, after checking them all."""
    name = printable(path.name)
    if not path.is_file():
        raise CheckpointError(f"{name} must be a file; it is something else")
    total = path.stat().st_size
    with path.open("rb") as file:
        opening = file.read(32)
        length = int.from_bytes(opening[:8], "little")
        if len(opening) < 10 or length > total - 8 or opening[8:9] != b"{":
            raise CheckpointError(_not_safetensors(path, opening, length, total))
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{name} has a header of {length} bytes; at most {LARGEST_HEADER} are read")
        file.seek(8)
        header = _json_object(file.read(length), f"the header of {name}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise CheckpointError(f"the header of {name} is damaged: __metadata__ must hold texts")
    entries = [(_entry(tensor, value, name)) for tensor, value in header.items()]
    entries.sort(key=lambda entry: entry[2:])
    reached, tensors = 0, {}
    for tensor, stored, begin, end in entries:
        if begin != reached:
            what = "overlaps what is before it" if begin < reached else "leaves a gap before it"
            raise CheckpointError(f"{name} is damaged: {printable(tensor)} {what} (it begins at {begin})")
        tensors[tensor] = stored._replace(path=path, begin=8 + length + begin)
        reached = end
    if reached != total - 8 - length:
        missing = reached - (total - 8 - length)
        what = f"truncated: {missing} bytes are missing" if missing > 0 else f"{-missing} bytes too long"
        raise CheckpointError(f"{name} is {what}")
    return {tensor: tensors[tensor] for tensor in header}


def _not_safetensors(path: Path, opening: bytes, length: int, total: int) -> str:
    name = printable(path.name)
    if not opening:
        return f"{name} is empty"
    if path.suffix in PICKLES:
        return _pickle(path)
    for beginning, what in BEGINNINGS.items():
        if opening.startswith(beginning):
            loaded = "pickle" in what
            return f"{name} is {what}, no safetensors file" + (
                f"; it can run any code when it is opened, so it is not. {SAVE_AGAIN}" if loaded else ""
            )
    if opening[8:9] == b"{":
        return f"{name} is truncated or damaged: its header should have {length} bytes, the file has {total}"
    return f"{name} is no safetensors file: it doesn't begin with a header's length and a JSON object"


def _json_object(text: bytes, name: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged, no JSON text: {printable(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is damaged: it must hold an object, not a {type(value).__name__}")
    return value


def _without_twins(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(tensor: str, value: object, name: str) -> tuple[str, Stored, int, int]:
    """(name, place, first byte, byte after the last), offsets counted from the end of the header."""

    def whole(numbers: object) -> bool:
        if not isinstance(numbers, list) or len(numbers) > 64:
            return False
        return all(type(each) is int and 0 <= each < 2**63 for each in numbers)

    damaged = CheckpointError(
        f"{name} is damaged: {printable(tensor)} needs dtype, shape and data_offsets that agree; "
        f"got {printable(value)}"
    )
    if not isinstance(value, dict):
        raise damaged
    format, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(format, str) and whole(shape) and whole(offsets) and len(offsets) == 2):
        raise damaged
    begin, end = offsets
    # a format of another safetensors version has a size that isn't known here: listed later, not measured
    if begin > end or (format in BITS and 8 * (end - begin) != math.prod(shape) * BITS[format]):
        raise damaged
    return tensor, Stored(Path(), format, tuple(shape), 0), begin, end


# --- reading ------------------------------------------------------------------------------------------------


def blocks(*tensors: Stored) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The same rows of tensors of one shape, a few at a time: (which rows, the block of each), as stored."""
    rows, columns = tensors[0].sides
    step = max(1, BLOCK // max(columns, 1))
    with ExitStack() as stack:
        files = [stack.enter_context(each.path.open("rb", buffering=0)) for each in tensors]
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield (
                slice(first, last),
                tuple(_read(file, each, first, last) for file, each in zip(files, tensors, strict=True)),
            )


def _read(file, stored: Stored, first: int, last: int) -> Tensor:
    columns = stored.sides[1]
    block = torch.empty(last - first, columns, dtype=FORMATS[stored.format])
    file.seek(stored.begin + first * columns * block.element_size())
    place, done = memoryview(block.view(torch.uint8).numpy()).cast("B"), 0
    while done < len(place):  # one call may give less than asked for
        count = file.readinto(place[done:])
        if not count:
            raise CheckpointError(
                f"{printable(stored.path.name)} ended early: it was changed while it was read"
            )
        done += count
    return block
