"""`lora-edu merge BASE ADAPTER[:WEIGHT] … OUT`: W + Σ w_i ΔW_i in the base's own files, a few rows at a time.

Which tensor an adapter's layer is for: delta/compare.py. How files appear whole or not at all: writing.py.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_edu import commands
from lora_edu.adapters import weights
from lora_edu.adapters.writing import Entry, bytes_of, check_new, in_place, made, write_safetensors
from lora_edu.delta import recognise
from lora_edu.delta.compare import beside, target_of
from lora_edu.delta.files import (
    FORMATS,
    PICKLES,
    Checkpoint,
    CheckpointError,
    Stored,
    blocks,
    inside,
    open_checkpoint,
)
from lora_edu.delta.pairing import canonical, counts_tokens, module_of, tied_table
from lora_edu.lora.adapter_files import Adapter, AdapterError, Factors, read_adapter
from lora_edu.lora.combine import concatenated
from lora_edu.lora.resizing import at_most
from lora_edu.paths import expanded, write_atomically
from lora_edu.text import format_bytes, printable

PIECE = 2**22  # bytes copied at once
SWALLOWED = (
    0.1  # --keep-float32 without a number: matrices of whose ΔW rounding swallows more than this share
)
CAN_BE_MERGED = ("lora_bias=", "target_parameters=", "there is no adapter_config.json")


class Options(NamedTuple):
    """rank: of the combination, None for all of it. keep_float32: share of ΔW that rounding may swallow before a
    matrix is written in float32. stochastic: seed of the rounding, None for rounding to nearest. keep_tied: an update
    of one module of a shared table changes the table for all of them."""

    rank: int | None = None
    keep_float32: float | None = None
    stochastic: int | None = None
    keep_tied: bool = False


class Merged(NamedTuple):
    """What merging one tensor did.

    format: before → after. swallowed: ‖ΔW − (merged − W)‖_F / ‖ΔW‖_F, merged as it is written. kept: the share of ΔW
    that is there along ΔW, ⟨merged − W, ΔW⟩ / ‖ΔW‖²: 1 where nothing is lost on average. nearest: `swallowed` with
    rounding to nearest in the base's own format.
    """

    formats: tuple[str, str]
    delta_norm: float
    swallowed: float
    kept: float
    nearest: float


class Report(NamedTuple):
    """tensors: what was changed; notes: what was done about ties, tables and whole modules; bytes: of the files."""

    tensors: dict[str, Merged]
    notes: list[str]
    bytes: int


class Change(NamedTuple):
    """All that is added to one tensor. products: (left, right) in the orientation stored, one for each expert of a
    stack; whole: (weight, value) of tensors stored whole; rows: (weight, ids, values); added: what is simply added."""

    products: list[tuple[Tensor, Tensor]]
    whole: list[tuple[float, Tensor]]
    rows: list[tuple[float, list[int], Tensor]]
    added: list[Tensor]


def merge(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    options: Options = Options(),  # noqa: B008 - never changed
    progress: Callable[[list], object] = iter,
) -> Report:
    """Write the base with the adapters merged into it to the new folder `out`; shards, index and other files as they
    are in the base.

    adapters: [(adapter's file or folder, weight), …]; their combination Σ w_i ΔW_i is exact, or of the given rank.
    A matrix is computed in float32 and rounded once. Raises CheckpointError or AdapterError with one line for what
    can't be read, merged or written; then nothing is left behind.
    """
    base, out = expanded(base), expanded(out)
    if options.rank is not None and options.rank < 1:
        raise CheckpointError(f"rank must be a whole number above 0; got {options.rank}")
    if recognise.is_adapter(base):
        raise CheckpointError(
            f"{printable(base)} is an adapter: BASE must be the model that it was trained on"
        )
    place, note = recognise.checkpoint(base)
    model = open_checkpoint(place)
    read, paths = [], []
    for path, weight in adapters:
        if not math.isfinite(weight):
            raise CheckpointError(f"a weight must be a finite number; got {weight}")
        paths.append(expanded(path))
        read.append((_adapter(paths[-1]), weight))
    check_new(out, (base, place, *paths))
    plan = _Plan(model, read, options)
    plan.notes[:0] = [f"BASE: {note}"] if note else []
    with made(out), in_place(out) as folder:
        folder.mkdir()
        written = _write(plan, folder, progress)
        _copy_others(model.path, folder, plan)
    return Report(plan.done, plan.notes, written)


def _adapter(path: Path) -> Adapter:
    place, _ = recognise.adapter(path)
    try:
        adapter = read_adapter(place)
    except FileNotFoundError as error:
        raise AdapterError(f"{printable(path)} is no adapter: {error}{recognise.instead(path)}") from None
    for layer, why in adapter.refused.items():
        raise AdapterError(f"{printable(path)}: {printable(layer)} can't be merged: {why}")
    for objection in adapter.objections:
        if not objection.startswith(CAN_BE_MERGED):
            raise AdapterError(f"{printable(path)}: {objection}")
    if not adapter.scaled:
        raise AdapterError(f"{printable(path)} doesn't say what alpha is, so its scale isn't known")
    return adapter


# --- what is added to which tensor --------------------------------------------------------------------------


class _Plan:
    """For every tensor of the output what it is made of. No tensor of the base is read here."""

    def __init__(self, model: Checkpoint, adapters: list[tuple[Adapter, float]], options: Options):
        self.model, self.options = model, options
        self.config = weights.config_of(model.path)
        self.changes: dict[str, Change] = {}
        self.new: dict[
            str, tuple[str, Tensor | str]
        ] = {}  # tensor → (the one it comes after, its value or source)
        self.resized: dict[str, int] = {}
        self.notes: list[str] = list(model.notes)
        self.done: dict[str, Merged] = {}
        self.untied = False
        self.transposed = weights.transposed_modules(model.tensors)
        self.by_name = {canonical(name): name for name in model.tensors}
        self._whole(adapters)
        self._factors(adapters)

    def _factors(self, adapters: list[tuple[Adapter, float]]) -> None:
        parts: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
        for adapter, weight in adapters:
            for layer, factors in adapter.layers.items():
                for target, module, part in self._targets(layer, factors, adapter):
                    parts.setdefault(target, {}).setdefault(module, []).append((part, weight))
        for target, modules in parts.items():
            together = {module: concatenated(module, each) for module, each in modules.items()}
            if self.options.rank is not None:
                together = {module: at_most(each, self.options.rank) for module, each in together.items()}
            ties = weights.tied_modules(target, self.model.tensors, self.config)
            asked = any(adapter.config.get("ensure_weight_tying") for adapter, _ in adapters)
            if ties:
                self._of_tied(target, together, ties, asked)
            elif len(together) > 1:
                raise AdapterError(
                    f"{', '.join(map(printable, together))} are one tensor in BASE, {printable(target)}, whose "
                    "config.json doesn't say how they are tied"
                )
            else:
                self._add(
                    target, *next(iter(together.values())).products(), like=next(iter(together.values()))
                )

    def _targets(self, layer: str, factors: Factors, adapter: Adapter) -> Iterator[tuple[str, str, Factors]]:
        """(tensor of the base, name of the module, its factors): one, or those of each expert that has its own."""
        own = canonical(f"{layer}.").rstrip(".")
        names = []
        if factors.experts > 1:
            names = weights.one_by_one(own, factors.experts, factors.sides, self.model.tensors)
        if not names:
            yield self._target(layer, adapter), own, factors
            return
        for expert, (left, right) in zip(names, factors.products(), strict=True):
            for name, rows in zip(expert, left.chunk(len(expert)), strict=True):
                if self.model.tensors[name].format not in FORMATS:
                    raise AdapterError(_quantised(name, self.model.tensors[name]))
                yield (
                    name,
                    name.removesuffix(".weight"),
                    factors._replace(lora_A=right, lora_B=rows, experts=1),
                )

    def _target(self, layer: str, adapter: Adapter) -> str:
        factors = adapter.layers[layer]
        name, why = target_of(layer, adapter, self.model.tensors)
        if name is None and (whole := self.by_name.get(f"{canonical(layer + '.')}weight")) is not None:
            name = whole
        if name is None:
            reason = {
                "packed": "is packed (GPTQ, AWQ) in BASE: give the unquantised model",
                "unclear": "fits several stacks in BASE",
            }.get(
                why,
                "is not in BASE: the adapter is for another model, or its experts are stored otherwise there",
            )
            raise AdapterError(f"{printable(adapter.path)}: {printable(layer)} {reason}")
        stored = self.model.tensors[name]
        if stored.format not in FORMATS:
            raise AdapterError(_quantised(name, stored))
        if not self._fits(name, factors):
            mine, theirs = ("×".join(map(str, each)) for each in (factors.sides, stored.shape))
            grew = counts_tokens(name) and len(stored.shape) == 2 and factors.sides[1] == stored.shape[1]
            way_out = ": the vocabulary was resized; resize_token_embeddings in BASE first" if grew else ""
            raise AdapterError(f"{printable(layer)} is {mine} in the adapter and {theirs} in BASE{way_out}")
        return name

    def _fits(self, name: str, factors: Factors) -> bool:
        shape, sides = self.model.tensors[name].shape, factors.sides
        shape = (self.resized.get(name, shape[0]), *shape[1:])
        if factors.experts > 1:
            return len(shape) == 3 and shape[0] == factors.experts and sorted(shape[1:]) == sorted(sides)
        if factors.embedding:
            return shape == sides
        return shape in (sides, sides[::-1]) or sides == (shape[0], math.prod(shape[1:]))

    def _of_tied(self, target: str, together: dict[str, Factors], ties: list[str], asked: bool) -> None:
        """A table that several modules share: changed for all of them alike, or given to each apart."""
        own = canonical(target).removesuffix(".weight")
        modules = [own, *ties] if module_of(target) != "shared" else list(ties)
        given = [module for module in modules if module in together]
        strange = [module for module in together if module not in modules]
        first = together[(given or strange)[0]]
        alike = len(given) == len(modules) and all(_alike(first, together[module]) for module in given[1:])
        if alike or self.options.keep_tied or asked:
            if not all(_alike(first, each) for each in together.values()):
                raise AdapterError(
                    f"{', '.join(map(printable, together))} share one table in BASE and have updates of their own: "
                    "they can't stay tied"
                )
            if not alike:
                self.notes.append(
                    f"{printable(target)} is changed for all that share it, {', '.join(modules)}, though the adapter "
                    f"is for {', '.join(together)} alone: its outputs are not those of BASE with the adapter beside it"
                )
            return self._add(target, *first.products(), like=first)
        if modules != [own, ties[-1]]:
            raise AdapterError(
                f"{printable(target)} is one table for {', '.join(modules)} in BASE, and the adapter changes only "
                f"{', '.join(map(printable, together))}, which such files can't hold: --keep-tied changes it for all"
            )
        head = f"{ties[-1]}.weight"
        self.new[head] = (target, target)
        self.untied = True
        for module, each in together.items():
            self._add(target if module == own else head, *each.products(), like=each)
        self.notes.append(
            f"{printable(own)} and {printable(ties[-1])} shared one table, and the adapter changes them differently: "
            f"{printable(head)} is written by itself, and config.json says tie_word_embeddings: false"
        )

    def _add(self, name: str, *products: tuple[Tensor, Tensor], like: Factors) -> None:
        """The update of a tensor, turned as that is stored; and the bias that goes with it."""
        stored = self.model.tensors[self.new[name][1] if name in self.new else name]
        shape, turned = stored.shape, False
        if like.experts > 1:
            turned = shape[1:] != like.sides
            if shape[1] == shape[2]:
                turned = bool(weights.stored_in_out(name, self.model.tensors))
        elif not like.embedding and len(shape) == 2:
            turned = shape != like.sides or (shape[0] == shape[1] and module_of(name) in self.transposed)
        change = self._change(name)
        change.products.extend((right.T, left.T) if turned else (left, right) for left, right in products)
        if like.bias is not None:
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias not in self.model.tensors:
                raise AdapterError(
                    f"{printable(name)} has no bias in BASE for the one of lora_B to be added to"
                )
            self._change(bias).added.append(like.scaling * like.bias.float())

    def _change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change([], [], [], []))

    def _whole(self, adapters: list[tuple[Adapter, float]]) -> None:
        """modules_to_save, biases, tables and token rows of the adapters."""
        for adapter, weight in adapters:
            told = adapter.config.get("modules_to_save")
            trained = [str(each) for each in told] if isinstance(told, list) else []
            for name, tensor in adapter.whole.items():
                self._one_whole(
                    name, tensor, weight, len(adapters) == 1, any(f".{m}." in f".{name}" for m in trained)
                )
            for name, (ids, values) in adapter.rows.items():
                target = self.by_name.get(name) or tied_table(
                    name, self._rows_shape(values), self.model.tensors
                )
                if target is None or max(ids, default=0) >= self.model.tensors[target].shape[0]:
                    raise AdapterError(
                        f"the token rows of {printable(name)} are not in BASE: resize it first"
                    )
                self._change(target).rows.append((weight, ids, values))

    def _rows_shape(self, values: Tensor) -> tuple[int, ...]:
        return next((s.shape for n, s in self.model.tensors.items() if counts_tokens(n)), tuple(values.shape))

    def _one_whole(self, name: str, tensor: Tensor, weight: float, alone: bool, trained: bool) -> None:
        if not beside(name, tensor, self.model.tensors):
            return  # the base's own table, stored beside its factors
        target = self.by_name.get(name)
        shared = tied_table(name, tuple(tensor.shape), self.model.tensors) if target is None else None
        if target is None and shared is None:
            if not alone or weight != 1:
                raise AdapterError(f"{printable(name)} is in the adapter alone, so it can't be weighted")
            self.new[name] = (next(reversed(self.model.tensors)), tensor)
            self.notes.append(f"{printable(name)} is not in BASE: it is written as the adapter has it")
            return
        if shared is not None:  # a head trained as a copy of the table
            self.new[name] = (shared, shared)
            self.untied = True
            self.notes.append(
                f"{printable(name)} was trained apart from its table: tie_word_embeddings is now false"
            )
            self._change(name).whole.append((weight, tensor))
            return
        stored = self.model.tensors[target]
        if stored.format not in FORMATS:
            raise AdapterError(_quantised(target, stored))
        if stored.shape != tuple(tensor.shape):
            grew = len(stored.shape) == tensor.dim() and stored.shape[1:] == tuple(tensor.shape[1:])
            if not (grew and alone and weight == 1):
                raise AdapterError(
                    f"{printable(name)} is {tuple(tensor.shape)} in the adapter and {stored.shape} in BASE"
                )
            self.resized[target] = tensor.shape[0]
            self.notes.append(f"{printable(target)} has {tensor.shape[0]} rows now, as in the adapter")
        ties = weights.tied_modules(target, self.model.tensors, self.config)
        if trained and ties and not self.options.keep_tied and f"{ties[-1]}.weight" not in self.new:
            if target in self.resized or len(ties) > 1:
                raise AdapterError(
                    f"{printable(name)} is shared with {', '.join(ties)} in BASE: take --keep-tied"
                )
            self.new[f"{ties[-1]}.weight"] = (target, target)
            self.untied = True
            self.notes.append(
                f"{printable(name)} was trained apart from {ties[-1]}: tie_word_embeddings is now false"
            )
        self._change(target).whole.append((weight, tensor))


def _quantised(name: str, stored: Stored) -> str:
    return (
        f"{printable(name)} is in {printable(stored.format)} in BASE, which can't be merged into: give the unquantised "
        "model"
    )


def _alike(one: Factors, other: Factors) -> bool:
    """Whether two layers' ΔW are equal up to rounding, from their factors alone."""
    if one is other:
        return True
    products = [each.products()[0] for each in (one, other)]
    left, right = (
        torch.cat([L.double() for L, _ in products], 1),
        torch.cat([one.scaling * products[0][1].double(), -other.scaling * products[1][1].double()]),
    )
    size = lambda L, R: float((torch.linalg.qr(L, mode="r").R @ torch.linalg.qr(R.T, mode="r").R.T).norm())
    return size(left, right) <= 1e-5 * size(products[0][0].double(), one.scaling * products[0][1].double())


# --- rows ---------------------------------------------------------------------------------------------------


def _source(plan: _Plan, name: str) -> Stored | None:
    """The stored tensor that an output tensor begins from."""
    if name in plan.new:
        origin = plan.new[name][1]
        return plan.model.tensors[origin] if isinstance(origin, str) else None
    return plan.model.tensors[name]


def _rows(plan: _Plan, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, W + change), a few rows at a time, in float32 (float64 where the base has it)."""
    stored, change = _source(plan, name), plan.changes[name]
    wide = torch.promote_types(FORMATS[stored.format], torch.float32)
    if name in plan.resized:
        table = change.whole[0][1].to(wide)
        made = table + sum(
            (left.to(wide) @ right.to(wide) for left, right in change.products), torch.zeros(())
        )
        yield made, made
        return
    for part, products, number in _parts(stored, change.products):
        products = [(left.to(wide), right.to(wide)) for left, right in products]
        of = lambda value, number=number, part=part: (value if number is None else value[number]).reshape(
            part.sides
        )
        for which, (block,) in blocks(part):
            old = block.to(wide)
            new = old.clone()
            for left, right in products:
                new += left[which] @ right
            for weight, value in change.whole:
                new += weight * (of(value)[which].to(wide) - old)
            for weight, ids, values in change.rows:
                for place, token in enumerate(ids):
                    if which.start <= token < which.stop:
                        new[token - which.start] += weight * (
                            values[place].to(wide) - old[token - which.start]
                        )
            for value in change.added:
                new += of(value)[which].to(wide)
            yield old, new


def _parts(
    stored: Stored, products: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Stored, list[tuple[Tensor, Tensor]], int | None]]:
    """A tensor with all that is added to it; of a stack of experts each one with its own."""
    inner = products and (len(products[0][0]), products[0][1].shape[1])
    if len(stored.shape) == 3 and len(products) == stored.shape[0] and inner == stored.shape[1:]:
        for number, pair in enumerate(products):
            yield stored.part(number), [pair], number
    else:
        yield stored, products, None


def rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """To the nearest number of a format; with a generator up or down at random, so that the mean is the value.

    The chance to go to the other neighbour is the distance from the nearest one over the gap (stochastic rounding:
    Gupta et al. 2015, section 3).
    """
    nearest = values.to(dtype)
    if generator is None or dtype not in (torch.float16, torch.bfloat16):
        return nearest
    error = values - nearest.to(values.dtype)
    step = _neighbour(nearest, error > 0)
    gap = (step.to(values.dtype) - nearest.to(values.dtype)).abs()
    chance = torch.rand(values.shape, generator=generator, dtype=values.dtype)
    return torch.where((chance * gap < error.abs()) & step.isfinite(), step, nearest)


def _neighbour(values: Tensor, up: Tensor) -> Tensor:
    """The next number of a half-precision format above (where `up`) or below, by counting in its bits."""
    bits = values.view(torch.int16).to(torch.int32)
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits)  # sign and magnitude → a line of whole numbers
    order = order + torch.where(up, 1, -1)
    bits = torch.where(order < 0, (-order) | 0x8000, order)
    return bits.to(torch.int16).view(values.dtype)


class _Tally:
    """Sums over a tensor of what rounding did to its ΔW."""

    def __init__(self) -> None:
        self.whole = self.lost = self.along = 0.0

    def add(self, old: Tensor, new: Tensor, written: Tensor) -> None:
        update = (new - old).double()
        there = written.double() - old.double()
        self.whole += float(update.square().sum())
        self.lost += float((update - there).square().sum())
        self.along += float((update * there).sum())

    @property
    def swallowed(self) -> float:
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def _format(plan: _Plan, name: str) -> tuple[str, float | None]:
    """(the format in which a changed tensor is written, what rounding to nearest swallows, where that was asked)."""
    own = _source(plan, name).format
    limit = plan.options.keep_float32
    if limit is None or own not in ("F16", "BF16") or name in plan.resized:
        return own, None
    tally = _Tally()
    for old, new in _rows(plan, name):
        tally.add(old, new, rounded(new, FORMATS[own], None))
    return ("F32" if tally.swallowed > limit else own), tally.swallowed


def _changed(plan: _Plan, name: str, format: str, nearest: float | None) -> Iterator[Tensor]:
    """The blocks of a changed tensor, rounded; what that did is put into the plan's record at the end."""
    own, dtype = _source(plan, name).format, FORMATS[format]
    seed = plan.options.stochastic
    generator = None
    if seed is not None:
        # 32 bits are all that torch's generator on a CPU takes of a seed
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    tally, plain = _Tally(), _Tally()
    for old, new in _rows(plan, name):
        written = rounded(new, dtype, generator)
        if not written.isfinite().all():
            raise AdapterError(
                f"{printable(name)} would have entries that are infinite or NaN in {format}. Nothing was written"
            )
        if name not in plan.resized:
            tally.add(old, new, written)
            if generator is not None and nearest is None:
                plain.add(old, new, rounded(new, dtype, None))
        yield written
    if nearest is None:
        nearest = plain.swallowed if generator is not None else tally.swallowed
    along = tally.along / tally.whole if tally.whole else 1.0
    plan.done[name] = Merged((own, format), math.sqrt(tally.whole), tally.swallowed, along, nearest)


# --- files --------------------------------------------------------------------------------------------------


def _write(plan: _Plan, folder: Path, progress: Callable[[list], object]) -> int:
    """The shards of the base, under their names, and their index; returns the bytes of all tensors."""
    shards: dict[str, list[str]] = {}
    for name, stored in plan.model.tensors.items():
        after = [new for new, (place, _) in plan.new.items() if place == name]
        shards.setdefault(stored.path.name, []).extend([name, *after])
    if len(shards) < len({stored.path for stored in plan.model.tensors.values()}):
        raise CheckpointError(
            "BASE has shards of one name in several folders, which can't be written into one"
        )
    if len(shards) == 1:
        shards = {"model.safetensors": next(iter(shards.values()))}
    steps = iter(progress([name for names in shards.values() for name in names]))
    places, total = {}, 0
    for shard, names in shards.items():
        entries = [_entry(plan, name, steps) for name in names]
        write_safetensors(folder / shard, entries)
        places |= dict.fromkeys(names, shard)
        total += sum(bytes_of(entry.format, entry.shape) for entry in entries)
    for _ in steps:
        pass
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _entry(plan: _Plan, name: str, steps: Iterator) -> Entry:
    stored = _source(plan, name)
    if stored is None:  # the adapter's own
        tensor = plan.new[name][1]
        format = next(each for each, dtype in FORMATS.items() if dtype == tensor.dtype)
        return Entry(name, format, tuple(tensor.shape), lambda: _stepped(steps, iter([tensor])))
    if name not in plan.changes:
        return Entry(name, stored.format, stored.shape, lambda: _stepped(steps, _copied(stored)))
    format, nearest = _format(plan, name)
    shape = (plan.resized.get(name, stored.shape[0]), *stored.shape[1:]) if stored.shape else ()
    return Entry(name, format, shape, lambda: _stepped(steps, _changed(plan, name, format, nearest)))


def _stepped(steps: Iterator, made: Iterator) -> Iterator:
    next(steps, None)  # the progress bar
    yield from made


def _copied(stored: Stored) -> Iterator[bytes]:
    """A tensor's bytes as they are."""
    left = bytes_of(stored.format, stored.shape)
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        while left and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def _copy_others(base: Path, folder: Path, plan: _Plan) -> None:
    """config.json, tokenizer and whatever else lies beside the weights; config.json says what changed."""
    home = base if base.is_dir() else base.parent
    if base.is_dir() or (home / "config.json").is_file():
        weights_of = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLES)
        for each in sorted(home.iterdir()):
            if not each.is_file() or each.name.endswith(weights_of) or each.name.startswith("."):
                continue
            try:
                shutil.copyfile(inside(home, each.name, "BASE"), folder / each.name)
            except CheckpointError as refusal:
                plan.notes.append(f"not copied: {refusal}")
    config = dict(plan.config)
    sized = [rows for name, rows in plan.resized.items() if counts_tokens(name)]
    changed = {"tie_word_embeddings": False} if plan.untied else {}
    changed |= {"vocab_size": sized[0]} if sized else {}
    if changed and config:
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text | {key: value for key, value in changed.items() if key in text}
        config |= {key: value for key, value in changed.items() if key in config or key != "vocab_size"}
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Merge, and say what rounding swallowed; returns the exit status."""
    return commands.status("lora-edu merge", _command, _parser().parse_args(arguments), (ValueError,))


def _command(options: argparse.Namespace) -> int:
    adapters = [_weighted(each) for each in options.adapters]
    commands.check_output(options.json, (options.base, *(path for path, _ in adapters)))
    how = Options(options.rank, options.keep_float32, options.stochastic, options.keep_tied)
    report = merge(options.base, adapters, options.out, how, commands.bar("tensor", options.quiet))
    for note in report.notes:
        print(f"lora-edu merge: {note}", file=sys.stderr)
    if options.json:
        record = {
            "made_by": "lora-edu merge",
            "bytes": report.bytes,
            "tensors": [{"name": name, **each._asdict()} for name, each in report.tensors.items()],
            "notes": report.notes,
        }
        write_atomically(expanded(options.json), json.dumps(record, indent=1).encode())
    print(text(report, options.out), flush=True)
    return 0


def _weighted(given: str) -> tuple[str, float]:
    """ADAPTER:WEIGHT taken apart; a colon in a path that is there is the path's."""
    path, colon, number = given.rpartition(":")
    if not colon or expanded(given).exists():
        return given, 1.0
    try:
        return path, float(number)
    except ValueError:
        return given, 1.0


def text(report: Report, out: str) -> str:
    """How many tensors were changed, and where half precision is involved what rounding did to ΔW."""
    changed = {name: each for name, each in report.tensors.items() if each.delta_norm}
    lines = [
        f"{len(report.tensors)} tensors changed, {format_bytes(report.bytes)} written to {printable(out)}."
    ]
    half = {name: each for name, each in changed.items() if each.formats[0] in ("F16", "BF16")}
    if not half:
        return lines[0]
    before, after = ([getattr(each, what) for each in half.values()] for what in ("nearest", "swallowed"))
    worst = max(half, key=lambda name: half[name].nearest)
    lines.append(
        f"Rounding to {'/'.join(sorted({each.formats[0] for each in half.values()}))} swallows "
        f"{statistics.median(before):.1%} of ΔW in the median of {len(half)} tensors, {max(before):.1%} of "
        f"{printable(worst)} (‖ΔW − (merged − W)‖ / ‖ΔW‖)."
    )
    wide = sum(each.formats[1] == "F32" for each in half.values())
    if after != before:
        along = statistics.median(each.kept for each in half.values())
        lines.append(
            f"As written: {statistics.median(after):.1%} in the median, {max(after):.1%} at most; along ΔW "
            f"{along:.1%} of it is there. {wide} tensors are in float32."
        )
        if wide:
            lines.append(
                "A loader that casts them to one format rounds them again: load with dtype=torch.float32."
            )
    elif max(before) > SWALLOWED:
        lines.append(
            f"{sum(each > SWALLOWED for each in before)} tensors lose more than {SWALLOWED:.0%}: --keep-float32 writes "
            "these in float32, --stochastic rounds without bias."
        )
        lines += [
            f"  {printable(name)}: {each.nearest:.1%}"
            for name, each in sorted(half.items(), key=lambda item: -item[1].nearest)[:10]
            if each.nearest > SWALLOWED
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-edu merge",
        description="W + Σ weight · ΔW in the base's own files: a few rows in memory at a time, shards, index, config "
        "and tokenizer as they are. What rounding to half precision swallows of each ΔW is measured. Nothing is "
        "fetched and nothing in a file is run.",
        epilog="A negative WEIGHT takes an adapter away: my-adapter:-1. An embedding's adapter on a table that "
        "the head shares unties the two (config.json says so), since that is what BASE with the adapter computes; "
        "PEFT's merge_and_unload changes the table for both instead, as --keep-tied does.",
    )
    parser.add_argument(
        "base", metavar="BASE", help="the model: a safetensors file, or a folder (shards too)"
    )
    parser.add_argument(
        "adapters",
        metavar="ADAPTER[:WEIGHT]",
        nargs="+",
        help="a LoRA adapter (PEFT, kohya, diffusers, MLX); 1 by default",
    )
    parser.add_argument("out", metavar="OUT", help="a new folder for the merged model")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="cut the combination to this rank in every matrix"
    )
    parser.add_argument(
        "--keep-float32",
        type=float,
        nargs="?",
        const=SWALLOWED,
        metavar="SHARE",
        help=f"write a matrix in float32 where rounding would swallow more than SHARE of its ΔW ({SWALLOWED})",
    )
    parser.add_argument(
        "--stochastic",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="round up or down at random, so that ΔW is there on average; the seed makes it repeatable",
    )
    parser.add_argument(
        "--keep-tied",
        action="store_true",
        help="change a shared table for all that share it, as merge_and_unload does",
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
