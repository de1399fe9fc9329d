"""What a method of this room trained, on disk: PEFT's folder where PEFT has the method, else a plain layout of ours.

Not for LoRA (lora/peft_format.py). Nothing from a file is ever executed, and PEFT isn't needed.
"""

import importlib
from pathlib import Path

from torch import Tensor, nn

from lora_edu.lora import trainable_parameters
from lora_edu.lora.adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterError,
    check_file,
    find_file,
    read_config,
    read_tensors,
)
from lora_edu.lora.peft_format import put_files
from lora_edu.paths import expanded
from lora_edu.text import printable

from .applied import applied, applied_options, refuse_second

OUR_CONFIG, OUR_WEIGHTS = "tuning.json", "tuning.safetensors"
METHODS = ("bitfit", "bottleneck", "ia3", "p_tuning", "prefix_tuning", "prompt_tuning")
VARIANTS = ("adalora", "dora", "lora_xs", "vera")  # of LoRA, each with a forward of its own
PEFT_TYPES = {
    "ADALORA": "adalora",
    "IA3": "ia3",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "PROMPT_TUNING": "prompt_tuning",
    "VERA": "vera",
}


def save_tuned(model: nn.Module, folder: str | Path, base_model_name: str | None = None) -> Path:
    """Write what the model's method trained to `folder`; returns the folder.

    Where PEFT has the method and can take the model: adapter_config.json and adapter_model.safetensors, which PEFT
    opens, and base_model_name is stored there. Otherwise tuning.json (method, options, names) and tuning.safetensors,
    each tensor under its name in the model. Both files are put in place as `save_adapter` does it: whoever looks finds
    the old ones or the new ones.

    Raises ValueError if the model has no method, if a number isn't finite, or if the folder holds the files of the
    other layout, since it would then hold two.
    """
    folder = expanded(folder)
    config, tensors = _stored(model)
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.isfinite().all():
            raise ValueError(f"{name} has entries that are infinite, NaN or without data; not saved")
    ours = config is None
    other = CONFIG if ours else OUR_CONFIG
    if (folder / other).exists():
        raise ValueError(f"{folder} holds another adapter, as {other} says: save to a folder of its own")
    held = {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}
    if ours:
        about = {"method": applied(model), "options": applied_options(model), "names": sorted(held)}
        return put_files(folder, held, about, OUR_WEIGHTS, OUR_CONFIG)
    common = {"base_model_name_or_path": base_model_name, "inference_mode": True, "task_type": None}
    return put_files(folder, held, common | config)


def load_tuned(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the method whose files are in `folder` on the model, with what it trained; returns the model.

    LoRA's variants too, DoRA, VeRA and AdaLoRA among PEFT's; and PiSSA, after which the model has LoRA's layers.

    Raises AdapterError, with the reason, if the files are damaged, belong to another model or hold another method
    (LoRA's are `load_adapter`'s); FileNotFoundError if there are none; ValueError if the model has a method already.
    The model is then unchanged.
    """
    refuse_second(model)
    folder = expanded(folder)
    ours, pefts = (folder / OUR_CONFIG).exists(), (folder / CONFIG).exists()
    if ours and pefts:
        raise AdapterError(f"the folder holds both {OUR_CONFIG} and {CONFIG}; keep the one that is meant")
    if ours:
        return _load_ours(model, folder)
    if not pefts:
        raise FileNotFoundError(
            f"there is no {CONFIG} in {folder}, nor {OUR_CONFIG}; save_tuned writes a folder with one of them"
        )
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind == "LORA" and config.get("use_dora") is True:
        return _module("dora").from_peft(model, config, read_tensors(find_file(folder, WEIGHTS)))
    if kind == "LORA" and config.get("init_lora_weights") == "pissa":
        return _module("pissa").from_peft(model, config, read_tensors(find_file(folder, WEIGHTS)))
    if kind == "LORA":
        raise AdapterError("this adapter is LoRA; lora_edu.lora.load_adapter(model, folder) opens it")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise AdapterError(f"peft_type must be one of {', '.join(PEFT_TYPES)}; got {printable(kind)}")
    tensors = read_tensors(find_file(folder, WEIGHTS))
    return _module(PEFT_TYPES[kind]).from_peft(model, config, tensors)


def _load_ours(model: nn.Module, folder: Path) -> nn.Module:
    config = read_config(folder, OUR_CONFIG)
    name, options, names = (config.get(each) for each in ("method", "options", "names"))
    if not isinstance(name, str) or name not in METHODS + VARIANTS:
        listed = ", ".join(METHODS + VARIANTS)
        raise AdapterError(f"{OUR_CONFIG}: method must be one of {listed}; got {printable(name)}")
    if not isinstance(options, dict):
        raise AdapterError(f"{OUR_CONFIG}: options must be an object; got {printable(options)}")
    weights = folder / OUR_WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(f"there is no {OUR_WEIGHTS} in {folder}, beside its {OUR_CONFIG}")
    tensors = read_tensors(check_file(weights))
    if names != sorted(tensors):
        raise AdapterError(
            f"{OUR_WEIGHTS} doesn't hold the names that {OUR_CONFIG} lists: the files don't match"
        )
    return _module(name).load(model, options, tensors)


def trained_parameters(model: nn.Module) -> int:
    """How many numbers of the model are trained."""
    return sum(each.numel() for each in trainable_parameters(model))


def stored_parameters(model: nn.Module) -> int:
    """How many numbers `save_tuned` writes: those that use needs.

    Other than those trained where a method trains what makes its numbers (p_tuning's encoder), or where the format has
    a place for more than was trained ((IA)³ in GPT-2: a 1 for each query).
    """
    return sum(each.numel() for each in _stored(model)[1].values())


def _stored(model: nn.Module) -> tuple[dict | None, dict[str, Tensor]]:
    """(PEFT's configuration, or None for our own layout; the tensors under the file's names)."""
    name = applied(model)
    if name is None:
        raise ValueError(
            f"the model has no method to save; put one on first ({', '.join(METHODS + VARIANTS)})"
        )
    module = _module(name)
    told = module.to_peft(model) if hasattr(module, "to_peft") else None
    return told if told is not None else (None, module.state(model))


def _module(name: str):
    """The module of a method; by its whole name, since `lora_edu.tuning.ia3` is the function."""
    room = "lora_edu.tuning.variants" if name in (*VARIANTS, "pissa") else "lora_edu.tuning"
    return importlib.import_module(f"{room}.{name}")
