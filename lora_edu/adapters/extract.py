"""`lora-edu extract BEFORE AFTER OUT`: a full fine-tune on disk becomes a LoRA adapter in PEFT's format.

The SVD is lora/extract.py's, the ranks are lora/ranks.py's; here are files, one matrix at a time, and what is said.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lora_edu import commands, lowrank
from lora_edu.adapters import text_loss, weights
from lora_edu.adapters.writing import check_new, in_place, made
from lora_edu.delta import recognise
from lora_edu.delta.compare import grouped
from lora_edu.delta.files import FORMATS, Checkpoint, CheckpointError, Stored, open_checkpoint, read_whole
from lora_edu.delta.measure import difference, norms
from lora_edu.delta.pairing import EMBEDDINGS, canonical, grown, module_of, pair_names, tied_table
from lora_edu.lora.adapter_files import Factors
from lora_edu.lora.combine import from_products
from lora_edu.lora.extract import (
    Leading,
    choose,
    factors,
    first_count,
    leading,
    missing,
    remaining,
    unchosen,
)
from lora_edu.lora.peft_format import write_adapter
from lora_edu.lora.ranks import choose_ranks
from lora_edu.paths import expanded, write_atomically
from lora_edu.text import printable

NOTHING_EXTRACTED = 1
RULES = ("rank", "energy", "error", "parameters")
PARTS = 1  # version of what is kept of an interrupted run


class Matrix(NamedTuple):
    """One matrix of the two checkpoints: the whole tensor, or one expert of a stack.

    layers: the modules of the base that get the factors (several where they share a table). part: the expert's number
    in a stack, None elsewhere. way: "linear", "transposed" or "table". group: matrices that must have one rank.
    """

    key: str
    layers: tuple[str, ...]
    old: Stored
    new: Stored
    way: str
    part: int | None = None
    group: str | None = None


class Row(NamedTuple):
    """What became of one matrix: its norms, of which `floor` is rounding's, its rank, and what the rank leaves."""

    sides: tuple[int, int]
    weight_norm: float
    delta_norm: float
    floor: float
    rank: int
    error: float
    why: str


class Report(NamedTuple):
    """rows by matrix; left: tensor that changed and isn't in the factors → why; kept: those stored whole instead."""

    rows: dict[str, Row]
    left: dict[str, str]
    kept: list[str]
    notes: list[str]
    parameters: int


def extract(
    before: str | Path,
    after: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    parameters: int | None = None,
    keep_whole: bool = False,
    before_is_exact: bool = False,
    progress: Callable[[list], object] = iter,
) -> Report:
    """Write the adapter that turns BEFORE into AFTER, as near as its ranks allow, to the new folder `out`.

    Exactly one of rank, energy, error and parameters (`choose_ranks`). keep_whole: norms, biases and tables that grew
    go into the adapter whole (modules_to_save, bias). before_is_exact: as `measure` has it.
    What was found is kept in `<out>.partial` until the end: the same call goes on there after it was interrupted.
    Raises CheckpointError with one line for what can't be read or written; then nothing is left behind.
    """
    rules = dict(zip(RULES, (rank, energy, error, parameters), strict=True))
    try:
        choose_ranks({}, {}, **rules)
    except ValueError as refusal:
        raise CheckpointError(str(refusal)) from None
    before, after, out = expanded(before), expanded(after), expanded(out)
    base, tuned, notes = _open(before, after)
    check_new(out, (before, after))
    left: dict[str, str] = {}
    matrices = _matrices(base, tuned, left, notes)
    store = _Parts(out, base, tuned, rules, before_is_exact)
    try:
        with made(out):
            store.open()
            report = _run(
                base, tuned, matrices, rules, left, notes, store, keep_whole, out, before_is_exact, progress
            )
    except Exception:
        store.remove()
        raise
    store.remove()
    return report


def _open(before: Path, after: Path) -> tuple[Checkpoint, Checkpoint, list[str]]:
    found, notes = [], []
    for title, path in (("BEFORE", before), ("AFTER", after)):
        if recognise.is_adapter(path):
            raise CheckpointError(
                f"{printable(path)} is an adapter already: {title} must be a model's checkpoint "
                "(`lora-edu merge` makes one of a base and an adapter)"
            )
        place, note = recognise.checkpoint(path)
        found.append(open_checkpoint(place))
        notes += [f"{title}: {each}" for each in ([note] if note else []) + found[-1].notes]
    return found[0], found[1], notes


# --- what there is to extract -------------------------------------------------------------------------------


def _matrices(base: Checkpoint, tuned: Checkpoint, left: dict[str, str], notes: list[str]) -> list[Matrix]:
    """Every matrix that both have, by the names of AFTER; what can't be expressed is put into `left`."""
    names, renamed = pair_names(base.tensors, tuned.tensors)
    if not names:
        raise CheckpointError(
            "BEFORE and AFTER have no tensor's name in common: are they versions of one model?"
        )
    if renamed:
        notes.append("names differ between BEFORE and AFTER; the adapter has those of AFTER")
    pairs = {other: (base.tensors[name], tuned.tensors[other]) for name, other in names.items()}
    for other, stored in tuned.tensors.items():  # a head that only AFTER holds apart
        shared = tied_table(other, stored.shape, base.tensors) if other not in pairs else None
        if shared is not None:
            pairs[other] = (base.tensors[shared], stored)
    config = weights.config_of(tuned.path) or weights.config_of(base.path)
    transposed = weights.transposed_modules(tuned.tensors)
    blocks = weights.expert_blocks(canonical(name) for name in tuned.tensors)
    found = []
    for name, (old, new) in pairs.items():
        found += _of_tensor(name, old, new, tuned, config, transposed, blocks, left)
    alone = [name for name in tuned.tensors if name not in pairs]
    left.update(dict.fromkeys(alone, "in AFTER alone"))
    if not config and any(m.way == "table" and module_of(m.key) in EMBEDDINGS for m in found):
        notes.append("no config.json: a head that shares the token table is not known, and so not adapted")
    return found


def _of_tensor(
    name: str,
    old: Stored,
    new: Stored,
    tuned: Checkpoint,
    config: dict,
    transposed: set[str],
    blocks: set[str],
    left: dict[str, str],
) -> list[Matrix]:
    layer = canonical(name).removesuffix(".weight")
    if old.format not in FORMATS or new.format not in FORMATS or not old.size:
        return []
    if old.shape != new.shape and len(old.shape) == 2 and grown(old.shape, new.shape):
        rows = min(old.shape[0], new.shape[0])
        left[name] = f"rows {rows} to {max(old.shape[0], new.shape[0]) - 1} are in one of the two alone"
        old, new = old.rows(0, rows), new.rows(0, rows)
    if old.shape != new.shape:
        left[name] = f"{old.shape} before, {new.shape} after"
        return []
    if weights.is_stack(name, old):
        return _of_stack(name, old, new, tuned, left)
    if len(old.shape) != 2 or layer == canonical(name) or module_of(name) in weights.OWN_INDICES:
        if not _equal(old, new):
            left[name] = _why_not(name, old)
        return []
    block = next((each for each in blocks if layer.startswith(f"{each}.")), None)
    if block is not None and ".experts." not in layer and layer != f"{block}.gate":
        if not _equal(old, new):
            left[name] = "beside experts: PEFT takes its name for an expert's"
        return []
    if block is not None and layer == f"{block}.gate" and _equal(old, new):
        return []
    if weights.is_table(name):
        shared = weights.tied_modules(name, tuned.tensors, config)
        own = [] if module_of(name) == "shared" and shared else [layer]  # no model calls `shared` itself
        return [Matrix(name, (*own, *shared), old, new, "table")]
    way = "transposed" if module_of(name) in transposed else "linear"
    grouped = block or weights.is_router(layer, tuned.tensors)
    return [Matrix(name, (layer,), old, new, way, group="experts" if grouped else None)]


def _of_stack(name: str, old: Stored, new: Stored, tuned: Checkpoint, left: dict[str, str]) -> list[Matrix]:
    """The experts of one tensor; PEFT nests the wrappers of two tensors of one module, the first one inside."""
    module, _, last = canonical(name).rpartition(".")
    in_out = weights.stored_in_out(canonical(name), {canonical(each): s for each, s in tuned.tensors.items()})
    if _equal(old, new):
        return []
    if in_out is None or last not in (weights.GATED, weights.DOWN):
        left[name] = "a stack of matrices of which neither name nor shape says how a model uses them"
        return []
    way = "transposed" if in_out else "linear"
    return [
        Matrix(f"{name}[{k}]", (f"{module}.{last}",), old.part(k), new.part(k), way, k, "experts")
        for k in range(old.shape[0])
    ]


def _why_not(name: str, stored: Stored) -> str:
    if len(stored.shape) < 2:
        return "a bias" if name.endswith("bias") else "a vector (norm or scale)"
    if module_of(name) in weights.OWN_INDICES:
        return "a table whose module computes its own indices"
    return "a kernel of a convolution" if len(stored.shape) > 2 else "no weight of a layer"


def _equal(old: Stored, new: Stored) -> bool:
    return norms(old, new)[0].status == "equal"


# --- one matrix at a time -----------------------------------------------------------------------------------


class _Parts:
    """The directions found so far, a file for each matrix, in a folder beside OUT that belongs to this very run."""

    def __init__(self, out: Path, base: Checkpoint, tuned: Checkpoint, rules: dict, exact: bool):
        self.folder = out.parent / f"{out.name}.partial"
        read = sorted({stored.path for each in (base, tuned) for stored in each.tensors.values()})
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in read]
        self.mark = json.dumps([PARTS, states, rules, exact])

    def open(self) -> None:
        told = self.folder / "run.json"
        if self.folder.exists() and (not told.is_file() or told.read_text(encoding="utf-8") != self.mark):
            if not told.is_file() and any(self.folder.iterdir()):
                raise CheckpointError(
                    f"{printable(self.folder)} is in the way and was not made here: move it, or take another OUT"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        write_atomically(told, self.mark.encode())

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def read(self, number: int) -> tuple[dict, Tensor] | None:
        """(what is known of a matrix, its singular values), where they were found before."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                return json.loads(file.metadata()["known"]), file.get_tensor("S").clone()
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None  # not there yet, or cut off

    def halves(self, number: int, rank: int) -> tuple[Tensor, Tensor]:
        with safe_open(self.path(number), framework="pt") as file:
            U, S, Vh = (file.get_tensor(each).clone() for each in ("U", "S", "Vh"))
        return lowrank.halves(lowrank.Factors(U, S, Vh), rank)

    def write(self, number: int, known: dict, head: Leading) -> None:
        tensors = {name: getattr(head, name).contiguous() for name in ("U", "S", "Vh")}
        place = self.path(number).with_suffix(".new")
        save_file(tensors, place, metadata={"known": json.dumps(known)})
        place.replace(self.path(number))

    def remove(self) -> None:
        if (self.folder / "run.json").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)


def _run(
    base: Checkpoint,
    tuned: Checkpoint,
    matrices: list[Matrix],
    rules: dict,
    left: dict[str, str],
    notes: list[str],
    store: _Parts,
    keep_whole: bool,
    out: Path,
    exact: bool,
    progress: Callable[[list], object],
) -> Report:
    numbers = {matrix.key: number for number, matrix in enumerate(matrices)}
    known = {}

    def lead(key: str, count: int | None) -> Leading:
        """The leading directions, as numbers alone: the vectors stay on the disk."""
        number = numbers[key]
        done = store.read(number)
        if done is None or not (done[0]["exhausted"] or count is None or len(done[1]) >= count):
            told, head = _measure(matrices[number], count, missing(rules), exact)
            store.write(number, told, head)
            done = told, head.S
        known[key] = done[0]
        empty = torch.empty(0)
        return Leading(empty, done[1], empty, done[0]["norm"], done[0]["exhausted"], done[0]["left"])

    for matrix in progress(matrices):
        lead(matrix.key, first_count(rules))
    for key, each in known.items():
        if each["status"] == "not finite":
            left[key] = each["note"]
    usable = [m for m in matrices if m.group or known[m.key]["norm"]]
    ranks, heads = choose(
        [m.key for m in usable],
        {m.key: m.old.sides for m in usable},
        rules,
        lead,
        {m.key: m.group for m in usable if m.group},
        {m.key: len(m.layers) for m in usable},
    )
    layers, targets = _layers(usable, ranks, numbers, store)
    shared = next((m for m in usable if len(m.layers) > 1 and ranks[m.key]), None)
    if shared is not None:
        notes.append(
            f"{', '.join(shared.layers)} share one table in the base, so each has the same factors: merge with "
            "`lora-edu merge` (PEFT's merge_and_unload would add them to the table once for each)"
        )
    targets += [f"{layer}.weight" for layer in layers if weights.is_router(layer, tuned.tensors)]
    rows = {}
    for m in matrices:
        told = known[m.key]
        if m.key not in ranks or not told["norm"]:
            continue
        rank = min(ranks[m.key], len(heads[m.key].S))
        why = "" if rank else unchosen(heads[m.key])
        left_over = remaining(heads[m.key], rank)
        rows[m.key] = Row(m.old.sides, told["weight"], told["norm"], told["floor"], rank, left_over, why)
    whole = _kept(left, tuned, layers) if keep_whole else {}
    if not layers and not whole:
        return Report(rows, left, [], notes, 0)
    settings: dict[str, object] = {"task_type": None}
    if targets:
        settings["target_parameters"] = targets
    settings["fan_in_fan_out"] = any(m.way == "transposed" and m.part is None for m in usable)
    common = next((m.layers[0] for m in usable if m.group and m.part is None and m.layers[0] in layers), None)
    with in_place(out) as place:
        write_adapter(
            place,
            layers,
            base_model_name=weights.config_of(base.path).get("_name_or_path") or None,
            modules_to_save=whole,
            settings=settings,
            common=common,
        )
    for name in whole:
        left.pop(name, None)
    spent = sum(each.lora_A.numel() + each.lora_B.numel() for each in layers.values())
    return Report(rows, left, list(whole), notes, spent)


def _measure(matrix: Matrix, count: int | None, left: float | None, exact: bool) -> tuple[dict, Leading]:
    """Norms, rounding floor and leading directions of one ΔW."""
    figures, scale = norms(matrix.old, matrix.new, exact, tight=False)
    told = {"status": figures.status, "note": figures.note, "weight": figures.weight_norm or 0.0, "norm": 0.0}
    told |= {"floor": 0.0, "exhausted": True, "left": 0.0}
    rows, columns = matrix.old.sides
    if figures.edge is None:
        return told, Leading(torch.empty(rows, 0), torch.empty(0), torch.empty(0, columns), 0.0, True, 0.0)
    delta = difference(matrix.old, matrix.new, scale)
    found = leading(delta, count, left, figures.edge * scale, figures.delta_norm * scale)
    if found.exhausted and len(found.S) < min(rows, columns):  # at the edge: now it must be known well
        figures, _ = norms(matrix.old, matrix.new, exact)
        found = leading(delta, count, left, figures.edge * scale, figures.delta_norm * scale)
    head = found._replace(S=found.S / scale, norm=found.norm / scale, error=found.error / scale)
    return told | {
        "norm": head.norm,
        "floor": figures.floor,
        "exhausted": head.exhausted,
        "left": head.error,
    }, head


def _layers(
    matrices: list[Matrix], ranks: dict[str, int], numbers: dict[str, int], store: _Parts
) -> tuple[dict[str, Factors], list[str]]:
    """Layer → its factors, and the stacks among them by their parameters' names (PEFT's target_parameters)."""
    layers, stacks = {}, {}
    for matrix in matrices:
        rank = ranks[matrix.key]
        if not rank:
            continue
        left, right = store.halves(numbers[matrix.key], rank)
        short = rank - left.shape[1]  # zeros, up to a rank that others share
        left, right = F.pad(left, (0, short)), F.pad(right, (0, 0, 0, short))
        if matrix.part is not None:
            stacks.setdefault(matrix.layers[0], []).append((matrix, left, right))
            continue
        for layer in matrix.layers:
            table = matrix.way == "table" and module_of(f"{layer}.weight") not in weights.HEADS
            layers[layer] = factors(left, right, table, matrix.way == "transposed")
    for parameter, experts in stacks.items():
        module, _, last = parameter.rpartition(".")
        nested = last == weights.GATED and f"{module}.{weights.DOWN}" in stacks
        way = experts[0][0].way
        products = [(right.T, left.T) if way == "transposed" else (left, right) for _, left, right in experts]
        like = factors(*products[0])._replace(experts=len(products))
        layers[f"{module}.base_layer" if nested else module] = from_products(like, products)
    return layers, sorted(stacks)


def _kept(left: dict[str, str], tuned: Checkpoint, layers: dict[str, Factors]) -> dict[str, Tensor]:
    """AFTER's values of what can't be factors, under the names of the base; a norm goes with its bias."""
    found = {}
    for name in left:
        stored = tuned.tensors.get(name)
        if stored is None or stored.format not in FORMATS or not stored.size:
            continue
        module, _, last = canonical(name).rpartition(".")
        if (
            not module
            or last not in ("weight", "bias")
            or (last == "weight" and module in layers and len(stored.shape) < 2)
        ):
            continue
        if last == "weight" and module in layers:  # a table that grew: whole, and not as factors as well
            del layers[module]
        found[name] = read_whole(stored)
        if last == "weight" and (bias := name.removesuffix("weight") + "bias") in tuned.tensors:
            found[bias] = read_whole(tuned.tensors[bias])
    return {canonical(name): tensor for name, tensor in found.items()}


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Extract, and say what was taken and what was not; returns the exit status."""
    return commands.status("lora-edu extract", _command, _parser().parse_args(arguments), (ValueError,))


def _command(options: argparse.Namespace) -> int:
    commands.check_output(options.json, (options.before, options.after))
    if options.text and options.model is None:
        options.model = options.before
    held = text_loss.asked_for(options)
    report = extract(
        options.before,
        options.after,
        options.out,
        **{rule: getattr(options, rule) for rule in RULES},
        keep_whole=options.keep_whole,
        before_is_exact=options.before_exact,
        progress=commands.bar("matrix", options.quiet),
    )
    for note in report.notes:
        print(f"lora-edu extract: {note}", file=sys.stderr)
    if options.json:
        write_atomically(expanded(options.json), json.dumps(record(report), indent=1).encode())
    print(text(report, options.out), flush=True)
    if held and report.parameters:
        print("\n".join(["", *_losses(held, options)]), flush=True)
    return 0 if report.parameters or report.kept else NOTHING_EXTRACTED


def _losses(held: text_loss.HeldOut, options: argparse.Namespace) -> list[str]:
    """The table of losses of the adapter that was written, and what the full fine-tune has."""
    whole = {name: cut for name, cut in text_loss.USUAL.items() if name != "0"}
    rows = text_loss.losses(held, options.out, whole)
    lines = text_loss.lines(held, rows)
    after = expanded(options.after)
    if (after / "config.json").is_file():
        lines.append(f"AFTER itself, the full fine-tune: {text_loss.loss_of(held, after):.4f}")
    return lines


def record(report: Report) -> dict:
    """Every figure, for JSON."""
    return {
        "made_by": "lora-edu extract",
        "parameters": report.parameters,
        "matrices": [{"name": name, **row._asdict()} for name, row in report.rows.items()],
        "left": report.left,
        "kept_whole": report.kept,
        "notes": report.notes,
    }


def text(report: Report, out: str) -> str:
    """What was extracted, by kind of matrix, and what was left."""
    kinds = grouped(report.rows)
    lines = []
    if kinds:
        width = max(map(len, kinds)) + 7
        lines.append(f"{'':{width}}  ‖ΔW‖/‖W‖  rounding      ranks  energy kept")
    for kind, rows in kinds.items():
        ranks = sorted({row.rank for row in rows})
        told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        weight, delta, floor = (
            math.hypot(*(getattr(row, n) for row in rows)) for n in ("weight_norm", "delta_norm", "floor")
        )
        size = f"{delta / weight:9.3g}" if weight else f"{'-':>9}"
        share = min(1.0, (floor / delta) ** 2)
        lines.append(
            f"{kind + f' ({len(rows)})':{width}} {size}  {share:8.2%} {told:>10}  {_energy(rows):10.1%}"
        )
    rows = list(report.rows.values())
    if rows:
        taken = sum(row.rank > 0 for row in rows)
        floor, delta = _of_all(rows, "floor"), _of_all(rows, "delta_norm")
        lines.append("")
        lines.append(
            f"{taken} of {len(rows)} matrices that changed, {report.parameters:,} parameters, "
            f"{_energy(rows):.1%} of ‖ΔW‖² kept; rounding can have made {min(1.0, (floor / delta) ** 2):.2%} of it."
        )
    reasons: dict[str, list[str]] = {}
    for name, why in report.left.items():
        reasons.setdefault(why, []).append(printable(name))
    for name, row in report.rows.items():
        if row.why:
            reasons.setdefault(row.why, []).append(printable(name))
    if reasons:
        lines.append("Not in the factors:")
    for why, names in reasons.items():
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"  {why}: {listed}")
    if report.kept:
        lines.append(f"Kept whole (modules_to_save, biases): {len(report.kept)} tensors.")
    elif report.left:
        lines.append("--keep-whole puts into the adapter what can be stored whole.")
    written = report.parameters or report.kept
    lines.append(
        f"Written to {printable(out)}." if written else "Nothing could be extracted; nothing was written."
    )
    return "\n".join(lines)


def _of_all(rows: list[Row], norm: str) -> float:
    """A norm of several matrices taken as one."""
    return math.hypot(*(getattr(row, norm) for row in rows))


def _energy(rows: list[Row]) -> float:
    whole = sum(row.delta_norm**2 for row in rows)
    return 1 - sum((row.error * row.delta_norm) ** 2 for row in rows) / whole if whole else 1.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-edu extract",
        description="A LoRA adapter in PEFT's format out of two checkpoints: the model BEFORE and AFTER a full "
        "fine-tune. Randomised SVD, its error measured; no rank is spent on what rounding alone could have made. "
        "Stopped in the middle, the same command goes on where it was. Nothing is fetched, nothing in a file is run.",
        epilog="Ranks are named one by one in the adapter's rank_pattern, with alpha = rank, so that the scaling is 1.",
    )
    parser.add_argument(
        "before", metavar="BEFORE", help="a safetensors file, or a model's folder (shards too)"
    )
    parser.add_argument("after", metavar="AFTER", help="the same model after a full fine-tune")
    parser.add_argument("out", metavar="OUT", help="a new folder for the adapter")
    rules = parser.add_mutually_exclusive_group(required=True)
    rules.add_argument("--rank", type=int, metavar="R", help="at most this rank for every matrix")
    rules.add_argument(
        "--energy", type=float, metavar="SHARE", help="of each matrix, this share of ‖ΔW‖² (0.9)"
    )
    rules.add_argument(
        "--error", type=float, metavar="E", help="of each matrix, ‖ΔW − BA‖ at most E · ‖ΔW‖ (0.3)"
    )
    rules.add_argument(
        "--parameters",
        type=int,
        metavar="N",
        help="this many parameters in all, where they keep most of ‖ΔW‖²",
    )
    parser.add_argument(
        "--keep-whole",
        action="store_true",
        help="store norms, biases and grown tables whole (modules_to_save); a grown table needs "
        "resize_token_embeddings in the base",
    )
    parser.add_argument(
        "--before-exact", action="store_true", help="tuning started from BEFORE just as it is stored"
    )
    text_loss.add_options(parser, "default: BEFORE")
    parser.add_argument("--json", metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
