"""`lora-edu resize ADAPTER OUT`: a smaller adapter in the format it came in, with all that stood beside LoRA.

Files in, files out; the factors are lora/resizing.py's. PEFT's and MLX's folders, kohya's and diffusers' files.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lora_edu import commands
from lora_edu.adapters import text_loss
from lora_edu.adapters.inspect import open_adapter
from lora_edu.adapters.writing import in_place
from lora_edu.delta.files import CheckpointError
from lora_edu.lora.adapter_files import (
    CONFIG,
    MLX_WEIGHTS,
    NOT_LOADED,
    WEIGHTS,
    Adapter,
    AdapterError,
    Factors,
    read_config,
    sort_keys,
)
from lora_edu.lora.peft_format import ranks_and_alphas
from lora_edu.lora.resizing import pooled, resize, singular_values
from lora_edu.paths import expanded
from lora_edu.text import printable

NAME = "lora-edu resize"


class Resized(NamedTuple):
    """What was made of an adapter. before, after: layer → its rank; energy: share of all ‖ΔW‖² that is kept."""

    before: dict[str, int]
    after: dict[str, int]
    parameters_before: int
    parameters_after: int
    energy: float


def main(arguments: Sequence[str]) -> int:
    """Write the smaller adapter and say what it keeps; returns the exit status."""
    return commands.status(NAME, _run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    rule = {
        "rank": options.rank,
        "energy": options.energy,
        "error": options.error,
        "parameters": options.parameters,
    }
    adapter, notes = open_adapter(options.adapter)
    for note in notes:
        print(f"{NAME}: {note}", file=sys.stderr)
    held = text_loss.asked_for(options)
    out = expanded(options.out)
    _check_out(out, adapter)
    layers = smaller(adapter, **{name: value for name, value in rule.items() if value is not None})
    rows = []
    if held:  # before anything is written: it may not fit the model
        new = lambda name, factors: layers[name].rank if name in layers else 0
        cuts = {"0": lambda name, factors: 0, "new": new, "r": text_loss.whole}
        rows = text_loss.losses(held, adapter.path, cuts)
    made = write(adapter, layers, out)
    print("\n".join(_told(adapter, made, options.out)))
    if held:
        print("\n".join(["", *text_loss.lines(held, rows)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="A smaller adapter: each layer's s · BA is replaced by the nearest of its new rank. The scaling s, "
        "the file's format and all that stands beside LoRA are kept; the old adapter is not touched.",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="PEFT's folder, or a file of kohya, diffusers or MLX"
    )
    parser.add_argument(
        "out", metavar="OUT", help="what to write: a folder or a file, as ADAPTER is; must not be there"
    )
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--rank", metavar="R", type=int, help="this rank in every layer, or less where there is less"
    )
    rule.add_argument(
        "--energy", metavar="E", type=float, help="the share of ‖ΔW‖² to keep in each layer, say 0.99"
    )
    rule.add_argument(
        "--error", metavar="E", type=float, help="the largest ‖ΔW − ΔW_r‖/‖ΔW‖ in each layer, say 0.1"
    )
    rule.add_argument(
        "--parameters", metavar="N", type=int, help="a budget for all layers together, spent where it counts"
    )
    text_loss.add_options(parser)
    return parser


def smaller(adapter: Adapter, **rule: float) -> dict[str, Factors]:
    """What `resize` makes of an adapter that was read, for a file of its format.

    Raises AdapterError for what can't be cut, or not be written in the format.
    """
    _check(adapter, rule)
    try:
        layers = resize(adapter, **rule)
    except ValueError as error:
        raise AdapterError(printable(error, 400)) from None
    return _alike(layers) if _needs_one_rank(adapter) else layers


def _needs_one_rank(adapter: Adapter) -> str:
    """Whose format can't say a rank or an alpha of one layer; empty where it can.

    Of target_parameters PEFT's keys name the module alone, its patterns the parameter.
    """
    if adapter.layout == "MLX":
        return "MLX"
    return "PEFT, of target_parameters," if adapter.config.get("target_parameters") else ""


def _alike(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates with one rank, by directions of zeros, and one alpha, by what B takes of the scaling."""
    rank = max(each.rank for each in layers.values())
    first = next(iter(layers.values()))
    scaling = first.scaling
    alpha = scaling * (math.sqrt(rank) if first.rank_stabilised else rank)
    made = {}
    for name, each in layers.items():
        more, B = rank - each.rank, each.lora_B.reshape(len(each.lora_B), each.rank, each.experts)
        B = F.pad(B, (0, 0, 0, more)).flatten(1) * (each.scaling / scaling)
        if each.embedding:
            A = F.pad(each.lora_A, (0, more))
        else:
            A = F.pad(each.lora_A.reshape(each.experts, each.rank, -1), (0, 0, 0, more)).flatten(0, 1)
        bias = None if each.bias is None else each.bias * (each.scaling / scaling)
        made[name] = each._replace(lora_A=A, lora_B=B.to(each.lora_B.dtype), alpha=alpha, bias=bias)
    return made


def write(adapter: Adapter, layers: Mapping[str, Factors], out: Path) -> Resized:
    """Write an adapter with `layers` in the place of its own to `out`: a PEFT or MLX folder as a folder, else a file.

    `out` must not be there; it appears whole or not at all. Raises CheckpointError or OSError where it can't.
    """
    _check_out(out, adapter)
    tensors, metadata = _rewritten(adapter, layers)
    config = _config(adapter, layers)
    _put(out, adapter, tensors, metadata, config)
    kept = total = 0.0
    for name, factors in adapter.layers.items():
        squares = pooled(singular_values(factors)).square()
        kept += float(squares[: layers[name].rank if name in layers else 0].sum())
        total += float(squares.sum())
    size = lambda of: sum(each.lora_A.numel() + each.lora_B.numel() for each in of.values())
    return Resized(
        {name: each.rank for name, each in adapter.layers.items()},
        {name: each.rank for name, each in layers.items()},
        size(adapter.layers),
        size(layers),
        kept / total,
    )


def _check(adapter: Adapter, rule: Mapping[str, float]) -> None:
    """Raise AdapterError where a cut would not be what it says, or could not be written down."""
    for name, why in adapter.refused.items():
        raise AdapterError(f"{printable(name)} can't be cut: {why}")
    harmless = tuple(f"{name}=" for name in NOT_LOADED)
    for why in adapter.objections:
        without_config = adapter.layout in ("kohya", "diffusers") and f"there is no {CONFIG}" in why
        if not why.startswith(harmless) and not without_config:
            raise AdapterError(why)
    most = max((each.rank for each in adapter.layers.values()), default=0)
    if rule.get("rank", 0) >= most:
        raise AdapterError(f"--rank must be below {most}, the adapter's largest rank; got {rule['rank']}")
    if (whose := _needs_one_rank(adapter)) and "rank" not in rule:
        raise AdapterError(f"{whose} has one rank for all layers: give --rank")
    if adapter.layout == "diffusers" and adapter.config:
        raise AdapterError(
            "this file carries diffusers' own configuration in its header, which a cut would contradict: load it into "
            "the pipeline, save it with save_lora_weights without the metadata, and resize that"
        )


def _check_out(out: Path, adapter: Adapter) -> None:
    folder, shown = _is_folder(adapter), printable(out)
    if out.is_symlink() or (out.exists() and not (folder and out.is_dir() and not any(out.iterdir()))):
        raise CheckpointError(f"{shown} is there already, so it is not written over: give another name")
    if folder and adapter.path.parent.resolve() in out.resolve().parents:
        raise CheckpointError(
            f"{shown} lies in the adapter's own folder, which is left alone: give another place"
        )
    if not out.parent.is_dir():
        raise CheckpointError(f"{shown} can't be written: no such folder")
    if not folder and out.suffix != ".safetensors":
        raise CheckpointError(f"{shown} must end in .safetensors, as ADAPTER is a file; or give another name")


def _is_folder(adapter: Adapter) -> bool:
    return adapter.layout in ("PEFT", "MLX")


# --- what the new files hold --------------------------------------------------------------------------------


def _rewritten(adapter: Adapter, layers: Mapping[str, Factors]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors with the new factors in their old places and shapes; all else is as it was, bit for bit."""
    try:
        with safe_open(adapter.path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{adapter.path.name} can't be read again: {printable(error)}") from None
    for name, keys in sort_keys(tensors).pairs.items():
        factors = layers.get(name)
        if factors is None:
            for key in keys.values():
                del tensors[key]
            continue
        A, B = factors.lora_A, factors.lora_B
        if factors.embedding:
            A = A.T
        if adapter.layout == "MLX":
            A, B = A.T, B.T
        if tensors[keys["A"]].dim() > 2:  # a convolution's kernel
            A = A.reshape(len(A), *tensors[keys["A"]].shape[1:])
            B = B.reshape(*B.shape, *tensors[keys["B"]].shape[2:])
        tensors[keys["A"]], tensors[keys["B"]] = A.contiguous(), B.contiguous()
        if "bias" in keys:
            tensors[keys["bias"]] = factors.bias.contiguous()
        if "alpha" in keys:
            old = tensors[keys["alpha"]]
            tensors[keys["alpha"]] = torch.full_like(old, factors.alpha)
    return tensors, {
        key: value for key, value in metadata.items() if not key.startswith(("ss_network_dim", "sshs_"))
    }


def _config(adapter: Adapter, layers: Mapping[str, Factors]) -> dict | None:
    """The old configuration with the new ranks and alphas, the most frequent ones outside of the patterns."""
    if not _is_folder(adapter):
        return None
    config = read_config(adapter.path.parent)
    told = ranks_and_alphas(layers)
    if adapter.layout == "MLX":
        config["lora_parameters"] = config["lora_parameters"] | {"rank": told["r"]}
        return config
    config |= told
    if layers.keys() != adapter.layers.keys() and not config.get("target_parameters"):
        config["target_modules"] = sorted(layers)
    return config


# --- putting them in place ----------------------------------------------------------------------------------


def _put(
    out: Path, adapter: Adapter, tensors: dict[str, Tensor], metadata: dict[str, str], config: dict | None
) -> None:
    """Everything beside `out` first, then one rename; after a failure nothing is left."""
    try:
        with in_place(out) as beside:
            if config is None:
                _save(tensors, beside, metadata)
            else:
                beside.mkdir()
                text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                (beside / CONFIG).write_bytes(text.encode("utf-8", "backslashreplace"))
                _save(tensors, beside / (MLX_WEIGHTS if adapter.layout == "MLX" else WEIGHTS), metadata)
            _check_out(out, adapter)  # something may have come since
    except SafetensorError as error:
        raise CheckpointError(f"{printable(out)} can't be written: {printable(error)}") from None


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata=metadata or None)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _told(adapter: Adapter, made: Resized, out: str) -> list[str]:
    """What was cut, and what was kept."""
    old, new = set(made.before.values()), set(made.after.values())
    span = lambda ranks: f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    lines = [
        f"{printable(out)}: {len(made.after)} layers of rank {span(new)} (before: {len(made.before)} of {span(old)}), "
        f"{made.parameters_after} of {made.parameters_before} parameters "
        f"({100 * made.parameters_after / made.parameters_before:.1f} %), {100 * made.energy:.2f} % of ‖ΔW‖²"
    ]
    dropped = [name for name in made.before if name not in made.after]
    if dropped:
        some = ", ".join(printable(name) for name in dropped[:3]) + (", …" if len(dropped) > 3 else "")
        lines.append(f"Left out, of rank 0 now: {len(dropped)} layers ({some})")
    beside = (
        len(adapter.whole)
        + len(adapter.rows)
        + sum(each.bias is not None for each in adapter.layers.values())
    )
    if beside:
        lines.append(f"Kept as they were: {beside} tensors beside LoRA")
    if _is_folder(adapter):
        lines.append(f"Other files of the old folder (tokenizer, README) were not copied; its {CONFIG} was")
    return lines
