"""Two checkpoints, or a checkpoint and an adapter, tensor by tensor: what is measured and what is only listed."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_edu.delta.files import (
    FORMATS,
    Checkpoint,
    CheckpointError,
    Stored,
    is_adapter,
    open_checkpoint,
)
from lora_edu.delta.measure import Figures, measure, measure_adapter
from lora_edu.lora.peft_format import read_adapter
from lora_edu.paths import expanded
from lora_edu.text import printable

LEAST_ROOM = 2**24  # bytes: a checkpoint of small matrices need not do with less


class Comparison(NamedTuple):
    """Figures by tensor, and what could not be compared, each with the reason."""

    before: str
    after: str
    figures: dict[str, Figures]
    only_before: list[str]
    only_after: list[str]
    shapes_differ: dict[str, str]
    not_measured: dict[str, str]
    notes: list[str]


def compare(
    before: str | Path,
    after: str | Path,
    before_is_exact: bool = False,
    progress: Callable[[list], object] = iter,
) -> Comparison:
    """Measure every tensor that both have; `after` may be an adapter's folder in PEFT's format.

    One tensor is read at a time (an adapter's factors are read at once). before_is_exact: see `measure`.
    progress: wraps the list of pairs that is walked through, as tqdm does.
    Raises CheckpointError, or AdapterError, with one line for what can't be read.
    """
    base, tuned_path = _weights(expanded(before)), expanded(after)
    if is_adapter(tuned_path) and not (tuned_path / "model.safetensors").exists():
        return _with_adapter(base, tuned_path, progress)
    tuned = _weights(tuned_path)
    names, notes = _paired(base, tuned)
    found = Comparison(str(before), str(after), {}, [], [], {}, {}, notes)
    found.only_before.extend(name for name in base.tensors if name not in names)
    there = set(names.values())
    found.only_after.extend(name for name in tuned.tensors if name not in there)
    pairs = {name: (base.tensors[name], tuned.tensors[other]) for name, other in names.items()}
    for name, (old, new) in pairs.items():
        if old.shape != new.shape:
            found.shapes_differ[name] = f"{old.shape} → {new.shape}"
        elif why := _unmeasurable(old) or _unmeasurable(new):
            found.not_measured[name] = why
    left = [name for name in pairs if name not in found.shapes_differ.keys() | found.not_measured.keys()]
    room = _room([pairs[name][0] for name in left])
    for name in progress(left):
        try:
            found.figures[name] = measure(*pairs[name], before_is_exact, room)
        except OSError as error:
            raise CheckpointError(f"{printable(name)} can't be read: {error.strerror or error}") from None
        except (RuntimeError, MemoryError) as error:  # too large for this machine, or no convergence
            found.not_measured[name] = printable(str(error).partition("\n")[0] or "out of memory")
    return found


def _weights(path: Path) -> Checkpoint:
    if is_adapter(path) and not (path / "model.safetensors").exists():
        raise CheckpointError(
            f"{printable(path)} is an adapter, which needs the weights it was trained on: "
            "`lora-edu delta BASE ADAPTER`"
        )
    return open_checkpoint(path)


def _unmeasurable(stored: Stored) -> str | None:
    if not stored.size:
        return f"empty, {stored.shape}"
    if stored.format in FORMATS:
        return None
    kind = (
        "eight bits or fewer, quantised" if re.match("F[468]|[IU]8", stored.format) else "no floating point"
    )
    return f"{printable(stored.format)} ({kind}); measured are {', '.join(FORMATS)}"


def _room(tensors: list[Stored]) -> int:
    """Bytes: a tenth less than four times the largest matrix in float32."""
    return max(LEAST_ROOM, round(3.6 * 4 * max((each.size for each in tensors), default=0)))


def _paired(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Name before → name after, and notes. Where no name is shared, one side may have a prefix (`model.`)."""
    notes = [
        f"{title}: {note}" for title, each in (("BEFORE", base), ("AFTER", tuned)) for note in each.notes
    ]
    shared = {name: name for name in base.tensors if name in tuned.tensors}
    if shared or not base.tensors or not tuned.tensors:
        return shared, notes
    for longer, shorter, title in ((base, tuned, "BEFORE"), (tuned, base, "AFTER")):
        sample = max(shorter.tensors, key=len)
        for name in longer.tensors:
            if name.endswith(f".{sample}"):
                prefix = name.removesuffix(sample)
                with_it = {prefix + each: each for each in shorter.tensors if prefix + each in longer.tensors}
                notes.append(f"{title}'s names have {printable(prefix)} before them, the other's don't")
                return (with_it if longer is base else {v: k for k, v in with_it.items()}), notes
    return {}, notes


def _with_adapter(base: Checkpoint, folder: Path, progress: Callable[[list], object]) -> Comparison:
    adapter = read_adapter(folder)
    found = Comparison(str(base.path), str(folder), {}, [], [], {}, {}, [f"BEFORE: {n}" for n in base.notes])
    places = {}
    for name, factors in adapter.layers.items():
        sides = (factors.lora_B.shape[0], factors.lora_A.shape[1])
        if factors.embedding:
            sides = (factors.lora_A.shape[0], factors.lora_B.shape[0])
        target = _base_name(name, base)
        if target is None:
            found.only_after.append(name)
        elif sorted(base.tensors[target].shape) != sorted(sides):  # Conv1D stores the transpose
            found.shapes_differ[target] = f"{base.tensors[target].shape} → {sides}"
        elif why := _unmeasurable(base.tensors[target]):
            found.not_measured[target] = why
        else:
            places[target] = factors
    for name in adapter.base_weights:
        found.not_measured[printable(name)] = (
            "stored whole beside the adapter's factors; compare it as a model"
        )
    found.only_before.extend(
        name for name, each in base.tensors.items() if len(each.shape) == 2 and name not in places
    )
    for name in progress(list(places)):
        try:
            found.figures[name] = measure_adapter(base.tensors[name], places[name])
        except OSError as error:
            raise CheckpointError(f"{printable(name)} can't be read: {error.strerror or error}") from None
    return found


def _base_name(layer: str, base: Checkpoint) -> str | None:
    """The weight that a layer of the adapter is for: its own name, or the one name that ends, or begins, so.

    An adapter for GPT2LMHeadModel says transformer.h.0…, a checkpoint of GPT2Model h.0…, and the other way
    round. Two that fit are as bad as none.
    """
    name = f"{layer}.weight"
    if name in base.tensors:
        return name
    fitting = [each for each in base.tensors if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return fitting[0] if len(fitting) == 1 else None


def kind(name: str) -> str:
    """What is left of a matrix's name without its layer's number: h.3.attn.c_attn.weight → h.*.attn.c_attn."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name.removesuffix(".weight"))


def by_kind(figures: dict[str, Figures]) -> dict[str, list[Figures]]:
    """Matrices by kind, in the order of their first; vectors left out."""
    kinds: dict[str, list[Figures]] = {}
    for name, each in figures.items():
        if len(each.shape) >= 2:
            kinds.setdefault(kind(name), []).append(each)
    return kinds


def together(figures: list[Figures]) -> tuple[float | None, float | None]:
    """‖ΔW‖/‖W‖ and the floor of several matrices taken as one: √Σ‖·‖² of each."""
    known = [each for each in figures if each.delta_norm is not None]
    weight, delta, floor = (
        math.sqrt(sum((getattr(each, name) or 0.0) ** 2 for each in known))
        for name in ("weight_norm", "delta_norm", "floor")
    )
    return (delta / weight, floor / weight) if weight else (None, None)
