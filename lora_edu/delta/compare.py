"""Two checkpoints, a checkpoint and an adapter, or an adapter alone: what is measured and what is only listed."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from lora_edu.delta import recognise
from lora_edu.delta.files import (
    FORMATS,
    Checkpoint,
    CheckpointError,
    Stored,
    blocks,
    experts_of,
    open_checkpoint,
    read_whole,
)
from lora_edu.delta.measure import Figures, measure, measure_adapter, together_as_one
from lora_edu.delta.pairing import (
    canonical,
    counts_tokens,
    grown,
    layer_weight,
    pair_names,
    tied_table,
)
from lora_edu.lora.adapter_files import Adapter, Factors, is_lora, read_adapter, sort_keys
from lora_edu.paths import expanded
from lora_edu.text import printable

Each = TypeVar("Each")
LEAST_ROOM = 2**24  # bytes: a checkpoint of small matrices need not do with less


class Comparison(NamedTuple):
    """Figures by tensor, and what could not be compared, each with the reason.

    notes: what is odd about the files; given: what was recognised that is not plainly a checkpoint or an adapter;
    new_rows: table that grew → what its new rows are.
    """

    before: str
    after: str
    figures: dict[str, Figures]
    only_before: list[str]
    only_after: list[str]
    shapes_differ: dict[str, str]
    not_measured: dict[str, str]
    notes: list[str]
    given: list[str] = []  # noqa: RUF012 - never changed
    new_rows: dict[str, str] = {}  # noqa: RUF012 - never changed


def compare(
    before: str | Path,
    after: str | Path | None = None,
    before_is_exact: bool = False,
    progress: Callable[[list], object] = iter,
) -> Comparison:
    """Measure every tensor that both have; `after` may be an adapter, and an adapter can stand alone.

    Names are matched by their longest common end (pairing.py). Of a table that grew, the rows that both have are
    measured; of experts stacked in one tensor, each by itself. An adapter is measured from its factors, with or
    without a base. One tensor is read at a time (an adapter's factors are read at once).
    before_is_exact: see `measure`. progress: wraps the list of pairs that is walked through, as tqdm does.
    Raises CheckpointError, or AdapterError, with one line for what can't be read.
    """
    before = expanded(before)
    if after is None:
        if not recognise.is_adapter(before):
            raise CheckpointError(
                f"{printable(before)} is no adapter, so it takes two: `lora-edu delta BEFORE AFTER`"
                + recognise.instead(before)
            )
        return _with_adapter(None, before, progress)
    after = expanded(after)
    if recognise.is_adapter(before):
        raise CheckpointError(
            f"{printable(before)} is an adapter, which needs the weights it was trained on: "
            "`lora-edu delta BASE ADAPTER` (or `lora-edu delta ADAPTER` alone)"
        )
    base, given = _open(before, "BEFORE")
    if recognise.is_adapter(after):
        return _with_adapter(base, after, progress, given)
    tuned, more = _open(after, "AFTER")
    return _of_two(base, tuned, before_is_exact, progress, given + more)


def _open(path: Path, title: str) -> tuple[Checkpoint, list[str]]:
    """A checkpoint, and what had to be looked for."""
    place, note = recognise.checkpoint(path)
    return open_checkpoint(place), [f"{title}: {note}"] if note else []


def _of_two(
    base: Checkpoint,
    tuned: Checkpoint,
    before_is_exact: bool,
    progress: Callable[[list], object],
    given: list[str],
) -> Comparison:
    notes = [
        f"{title}: {note}" for title, each in (("BEFORE", base), ("AFTER", tuned)) for note in each.notes
    ]
    found = Comparison(str(base.path), str(tuned.path), {}, [], [], {}, {}, notes, given, {})
    base_lora, tuned_lora = ({n: s for n, s in each.tensors.items() if is_lora(n)} for each in (base, tuned))
    plain = [
        {name: stored for name, stored in each.tensors.items() if name not in lora}
        for each, lora in ((base, base_lora), (tuned, tuned_lora))
    ]
    names = _paired(*plain, found)
    pairs = {}
    for name, other in names.items():
        old, new = plain[0][name], plain[1][other]
        if old.shape != new.shape and grown(old.shape, new.shape) and counts_tokens(name):
            old, new = _common_rows(name, old, new, found)
        if old.shape != new.shape:
            found.shapes_differ[name] = f"{old.shape} → {new.shape}"
        elif why := _unmeasurable(old) or _unmeasurable(new):
            found.not_measured[name] = why
        else:
            pairs[name] = (old, new)
    room = _room([old for old, _ in pairs.values()])
    for name in progress(list(pairs)):
        try:
            found.figures[name] = _measure_pair(name, *pairs[name], before_is_exact, room)
        except OSError as error:
            raise CheckpointError(f"{printable(name)} can't be read: {error.strerror or error}") from None
        except (RuntimeError, MemoryError) as error:  # too large for this machine, or no convergence
            found.not_measured[name] = printable(str(error).partition("\n")[0] or "out of memory")
    for title, lora in (("BEFORE", base_lora), ("AFTER", tuned_lora)):
        if lora:
            _unmerged(title, lora, found)
    return found


def _paired(left: dict[str, Stored], right: dict[str, Stored], found: Comparison) -> dict[str, str]:
    """Name before → name after; what has no counterpart is listed, and renaming is noted."""
    names, renamed = pair_names(left, right)
    for (mine, theirs), times in renamed.items():
        tensors = "1 tensor" if times == 1 else f"{times} tensors"
        if mine and theirs:
            told = f"{printable(mine)} in BEFORE is {printable(theirs)} in AFTER ({tensors}, matched by their ends)"
        else:
            title, longer = ("BEFORE", mine) if mine else ("AFTER", theirs)
            told = f"{title}'s names have {printable(longer)} before them, the other's don't ({tensors})"
        found.notes.append(told)
    sides = (
        ("BEFORE", left, names, found.only_before),
        ("AFTER", right, set(names.values()), found.only_after),
    )
    for title, tensors, matched, alone in sides:
        for name in (name for name in tensors if name not in matched):
            shared = tied_table(name, tensors[name].shape, tensors)
            if shared is not None and shared in matched and _same(tensors[name], tensors[shared]):
                found.notes.append(
                    f"{printable(name)}, in {title} alone, is the same table as its {printable(shared)} (tied)"
                )
            else:
                alone.append(name)
    return names


def _same(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same entries."""
    return (
        (one.format, one.shape) == (other.format, other.shape)
        and one.format in FORMATS
        and all(torch.equal(*pair) for _, pair in blocks(one, other))
    )


def _common_rows(name: str, old: Stored, new: Stored, found: Comparison) -> tuple[Stored, Stored]:
    """Both tables cut to the rows that both have; the others are named, with their norm."""
    rows = min(old.shape[0], new.shape[0])
    longer, title = (new, "AFTER") if new.shape[0] > rows else (old, "BEFORE")
    count = longer.shape[0] - rows
    told = f"{count} rows ({rows} to {longer.shape[0] - 1}) in {title} alone"
    if longer.format in FORMATS and len(longer.shape) > 1:
        tail, head = (_mean_row_norm(longer.rows(*part)) for part in ((rows, longer.shape[0]), (0, rows)))
        told += f", norm of each {tail:.3g} in the mean (of the others {head:.3g})"
    found.new_rows[name] = told
    return old.rows(0, rows), new.rows(0, rows)


def _mean_row_norm(stored: Stored) -> float:
    """Mean norm of a matrix's rows, a few of them in memory at a time."""
    return sum(float(block.double().norm(dim=1).sum()) for _, (block,) in blocks(stored)) / stored.shape[0]


def _measure_pair(name: str, old: Stored, new: Stored, exact: bool, room: int) -> Figures:
    """The figures of two tensors of one shape, expert by expert where the tensor is a stack of them."""
    if not experts_of(name, old.shape):
        return measure(old, new, exact, room)
    each = [measure(old.part(k), new.part(k), exact, room) for k in range(old.shape[0])]
    return together_as_one(each, old.shape)


def _unmerged(title: str, lora: dict[str, Stored], found: Comparison) -> None:
    """Factors that stand in a model's own checkpoint: ranks from them; alpha is not there, so no norm."""
    keys = sort_keys(lora)
    for layer, pair in keys.pairs.items():
        if not {"A", "B"} <= set(pair):
            continue
        A, B = (read_whole(lora[pair[each]]) for each in "AB")
        if "lora_embedding" in pair["A"]:
            A, B = B, A
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            found.not_measured[layer] = f"unmerged LoRA in {title} whose factors don't fit each other"
            continue
        name = next((n for n in found.figures if canonical(n) == f"{layer}.weight"), f"{layer}.weight")
        base = found.figures.get(name)
        found.figures[name] = measure_adapter(None, [(B, A)], 1.0, (B.shape[0], A.shape[1]))._replace(
            status="unmerged",
            delta_norm=None,
            weight_norm=base.weight_norm if base else None,
            note=f"unmerged LoRA in {title}: ranks of its BA; alpha isn't stored, so its norm isn't known",
        )
    listed = ", ".join(printable(layer) for layer in list(keys.pairs)[:3])
    found.notes.append(
        f"{title} holds unmerged LoRA on {len(keys.pairs)} layers ({listed}{', …' if len(keys.pairs) > 3 else ''}): "
        "its weights are the base's alone. Merge it first (PEFT: merge_and_unload), or give the adapter's folder"
    )
    for name, each in found.figures.items():
        if each.status == "equal":
            found.figures[name] = each._replace(status="unchanged")


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


# --- adapters -----------------------------------------------------------------------------------------------


def _with_adapter(
    base: Checkpoint | None, path: Path, progress: Callable[[list], object], given: list[str] | None = None
) -> Comparison:
    """An adapter's own figures; those over ‖W‖ where the base is there and can be read."""
    place, note = recognise.adapter(path)
    adapter = read_adapter(place)
    title = "AFTER" if base is not None else "ADAPTER"
    given = [*(given or []), *([f"{title}: {note}"] if note else [])]
    given += [f"{title}: {each}" for each in adapter.notes]
    notes = [f"BEFORE: {each}" for each in base.notes] if base else []
    found = Comparison(str(base.path) if base else "", str(path), {}, [], [], {}, {}, notes, given, {})
    for layer, why in adapter.refused.items():
        found.not_measured[printable(layer)] = why
    tensors = base.tensors if base else {}
    used = set()
    for layer in progress(list(adapter.layers)):
        factors = adapter.layers[layer]
        target, why = target_of(layer, adapter, tensors) if base else (None, "no base")
        name = target if target and why != "tied" else f"{layer}.weight"
        stored = tensors.get(target) if target else None
        if stored is not None:
            used.add(target)
            why = _no_norm(stored, factors.sides, factors.experts)
        readable = stored if not why else None
        shape = readable.shape if readable is not None else _shape_of(factors)
        try:
            found.figures[name] = measure_adapter(readable, factors.products(), factors.scaling, shape, why)
        except OSError as error:
            raise CheckpointError(f"{printable(name)} can't be read: {error.strerror or error}") from None
    kernels = sum(bool(factors.kernel) for factors in adapter.layers.values())
    if kernels:
        given.append(
            f"{title}: LoRA on {kernels} convolutions (Conv2d and the like), measured as matrices out × (in · kernel)"
        )
    for name, tensor in adapter.whole.items():
        if told := beside(name, tensor, tensors):
            found.not_measured[printable(name)] = told
    for name, (ids, rows) in adapter.rows.items():
        found.not_measured[printable(name)] = (
            f"{len(ids)} token rows trained by themselves (trainable_token_indices), "
            f"norm of each {float(rows.double().norm(dim=-1).mean()):.3g} in the mean"
        )
    for layer, factors in adapter.layers.items():
        if factors.bias is not None:
            found.not_measured[f"{printable(layer)}.bias"] = (
                f"lora_B's own bias, norm {float(factors.bias.double().norm()) * abs(factors.scaling):.3g}"
            )
    if any(each.status == "measured" for each in found.figures.values()) or not base:
        found.only_before.extend(
            name for name, each in tensors.items() if len(each.shape) == 2 and name not in used
        )
    return found


def target_of(layer: str, adapter: Adapter, tensors: dict[str, Stored]) -> tuple[str | None, str]:
    """(the base's weight that an adapter's layer is for, or why there is none); see `layer_weight`."""
    factors = adapter.layers[layer]
    if factors.experts > 1 or adapter.config.get("target_parameters"):
        module = re.sub(r"(\.base_layer)+$", "", layer)
        stacked = [
            name
            for name, each in tensors.items()
            if canonical(name).rpartition(".")[0].endswith(module)
            and len(each.shape) == 3
            and each.shape[0] == factors.experts
            and sorted(each.shape[1:]) == sorted(factors.sides)
        ]
        if len(stacked) == 1:
            return stacked[0], ""
        if stacked:
            return None, "unclear"
    return layer_weight(layer, factors.sides, tensors)


def _shape_of(factors: Factors) -> tuple[int, ...]:
    return factors.sides if factors.experts == 1 else (factors.experts, *factors.sides)


def _no_norm(stored: Stored, sides: tuple[int, int], experts: int) -> str:
    """Why ‖W‖ can't be had of a weight; empty where it can."""
    if stored.format not in FORMATS:
        return "quantised"
    if experts > 1:
        return ""
    shape = stored.shape if len(stored.shape) < 3 else stored.sides
    return "" if sorted(shape) == sorted(sides) else "other shape"


def beside(name: str, tensor: torch.Tensor, tensors: dict[str, Stored]) -> str:
    """What a tensor stored whole beside LoRA is, and how far from the base's; nothing where it is the base's own."""
    names = {canonical(each): each for each in tensors}
    place = names.get(name) or tied_table(name, tuple(tensor.shape), tensors)
    stored = tensors.get(place) if place else None
    told = "stored whole beside the adapter's factors; compare it as a model"
    if stored is None or stored.format not in FORMATS:
        return told
    if stored.shape != tuple(tensor.shape):
        return f"{told} ({stored.shape} in BEFORE, {tuple(tensor.shape)} here)"
    coarser = max((FORMATS[stored.format], tensor.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    change = norm = 0.0
    same = True
    for which, (old,) in blocks(stored):
        new = tensor.reshape(stored.sides)[which]
        change += float((new.double() - old.double()).square().sum())
        norm += float(old.double().square().sum())
        same &= torch.equal(old.to(coarser), new.to(coarser))
    if same:
        return ""
    return f"trained whole beside LoRA, ‖change‖/‖W‖ = {math.sqrt(change / norm):.3g}" if norm else told


def kind(name: str) -> str:
    """What is left of a matrix's name without its layer's number: h.3.attn.c_attn.weight → h.*.attn.c_attn."""
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", name.removesuffix(".weight"))


def grouped(figures: Mapping[str, Each]) -> dict[str, list[Each]]:
    """What belongs to matrices, by their kind, in the order of their first."""
    kinds: dict[str, list[Each]] = {}
    for name, each in figures.items():
        kinds.setdefault(kind(name), []).append(each)
    return kinds


def by_kind(figures: dict[str, Figures]) -> dict[str, list[Figures]]:
    """Matrices by kind, in the order of their first; vectors left out."""
    return grouped({name: each for name, each in figures.items() if len(each.shape) >= 2})


def together(figures: list[Figures]) -> tuple[float | None, float | None]:
    """‖ΔW‖/‖W‖ and the floor of several matrices taken as one: √Σ‖·‖² of each."""
    known = [each for each in figures if each.delta_norm is not None]
    weight, delta, floor = (
        math.sqrt(sum((getattr(each, name) or 0.0) ** 2 for each in known))
        for name in ("weight_norm", "delta_norm", "floor")
    )
    return (delta / weight, floor / weight) if weight else (None, None)
