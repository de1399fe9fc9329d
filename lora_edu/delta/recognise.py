"""What a path is, by its folder's contents and its file's names: and what to give instead where it can't be measured.

Headers are read, never tensors.
"""

import re
from pathlib import Path

from lora_edu.delta.files import (
    PICKLES,
    WEIGHTS,
    CheckpointError,
    read_header,
)
from lora_edu.lora.adapter_files import CONFIG, MLX_WEIGHTS, OTHER_METHODS, PREFIX, is_lora
from lora_edu.lora.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from lora_edu.text import printable


def is_adapter(path: Path) -> bool:
    """Whether a file or folder is an adapter of LoRA, in whatever layout."""
    if path.is_dir():
        if (path / WEIGHTS).exists():
            return False
        if (path / CONFIG).exists():
            return True
        files = list(path.glob("*.safetensors"))
        return len(files) == 1 and not list(path.glob("*.index.json")) and _holds_only_lora(files[0])
    return path.is_file() and _holds_only_lora(path)


def _holds_only_lora(path: Path) -> bool:
    """Factors, and next to nothing of a model's own weights beside them."""
    if path.suffix != ".safetensors":
        return False
    try:
        names = list(read_header(path))
    except (CheckpointError, OSError):
        return False
    factors = [name for name in names if is_lora(name)]
    others = [part for part in OTHER_METHODS if any(part in name for name in names)]
    if others and not factors:
        return path.name == ADAPTER_WEIGHTS
    whole = [name for name in names if name.endswith(".base_layer.weight")]
    return (
        bool(factors)
        and len(whole) < len(factors) / 2
        and (any(name.startswith(PREFIX) for name in names) or 2 * len(factors) >= len(names) / 2)
    )


def adapter(path: Path) -> tuple[Path, str]:
    """(what to read for an adapter, what there is to say of it)."""
    if path.is_file() and (path.parent / CONFIG).exists() and path.name in (ADAPTER_WEIGHTS, MLX_WEIGHTS):
        return path.parent, f"{path.name} is an adapter's file; its folder, with {CONFIG}, was read"
    return path, ""


def checkpoint(path: Path) -> tuple[Path, str]:
    """(what to read for a checkpoint, what had to be looked for); refuses what holds none, and says what it is."""
    if not path.is_dir() or (path / WEIGHTS).exists() or any(path.glob("*.safetensors.index.json")):
        return path, ""
    snapshots = sorted(each for each in path.glob("snapshots/*") if each.is_dir())
    if snapshots:
        return _snapshot(path, snapshots)
    if any(path.glob("*.safetensors")):
        return path, ""
    if what := foreign(path):
        raise CheckpointError(f"{printable(path)} is {what}")
    return path, ""


def _snapshot(path: Path, snapshots: list[Path]) -> tuple[Path, str]:
    """The one snapshot of a hub's cache, or the one that its `main` names."""
    main = path / "refs" / "main"
    named = (
        path / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()[:80]
        if main.is_file()
        else None
    )
    chosen = named if named in snapshots else snapshots[0] if len(snapshots) == 1 else None
    listed = ", ".join(printable(each.relative_to(path)) for each in snapshots[:4])
    if chosen is None:
        raise CheckpointError(
            f"{printable(path)} is the root of a hub's cache: give one of its folders, {listed}"
        )
    return chosen, f"the root of a hub's cache; its {printable(chosen.relative_to(path))} was read"


def foreign(folder: Path) -> str:
    """What a folder is that holds neither weights nor an adapter, and what to give instead; empty where unknown."""
    inside = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    steps = [each for each in inside if re.fullmatch(r"checkpoint-\d+", each.name)]
    if steps:
        last = max(steps, key=lambda each: int(each.name.partition("-")[2]))
        listed = ", ".join(each.name for each in steps[:4])
        return (
            f"a trainer's folder of {len(steps)} checkpoints ({listed}): give one, such as {printable(last)}"
        )
    adapters = [each for each in inside if (each / CONFIG).exists()]
    if adapters:
        listed = ", ".join(printable(each.name) for each in adapters[:6])
        return f"a folder of adapters ({listed}): give one, such as {printable(adapters[0])}"
    if any(folder.glob("*.distcp")) or (folder / ".metadata").exists():
        return (
            "a distributed checkpoint of torch (FSDP's .distcp files): write it as one with "
            "`accelerate merge-weights` or torch.distributed.checkpoint.format_utils, then as safetensors"
        )
    if any(each.name.startswith("global_step") for each in inside) or (folder / "zero_to_fp32.py").exists():
        return "a DeepSpeed ZeRO checkpoint: `python zero_to_fp32.py . OUT --safe_serialization` writes the weights"
    if any(folder.glob("*.gguf")):
        return "a folder of GGUF files, whose blocks are quantised: give the model it was made from"
    if any(each.name.startswith("models--") for each in inside):
        listed = ", ".join(printable(each.name) for each in inside[:4] if each.name.startswith("models--"))
        return f"a hub's cache ({listed}): give one model's snapshots/ folder"
    nested = [each for each in inside if (each / WEIGHTS).exists() or any(each.glob("*.safetensors"))]
    if nested and not any(each.suffix in PICKLES for each in folder.iterdir()):
        listed = ", ".join(printable(each.name) for each in nested[:6])
        return f"no model itself, but holds some ({listed}): give one, such as {printable(nested[0])}"
    return ""


def instead(path: Path) -> str:
    """For a message: what a path that was taken for an adapter is."""
    if path.is_dir() and (what := foreign(path)):
        return f". It is {what}"
    return ""
