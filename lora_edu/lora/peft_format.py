"""Adapters on disk, in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

Not for adding LoRA to a model (inject.py), nor for what files hold (adapter_files.py). PEFT itself is not needed;
nothing from a file is ever executed.
"""

import functools
import json
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_edu.paths import expanded
from lora_edu.text import printable

from .adapter_files import CONFIG, NOT_PRODUCT, PREFIX, WEIGHTS, Adapter, AdapterError, Factors, read_adapter
from .checks import STARTED, is_conv1d
from .inject import LoRALayer, lora_layers, replace_layers, set_parameter, unwrap
from .layers import LoRAEmbedding, LoRALinear, LoRAQuantisedLinear
from .quant import QuantisedLinear, weight_like, weight_shape

__all__ = ["AdapterError", "Factors", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]


class Beside(NamedTuple):
    """What an adapter brought into a model besides LoRA, so that it can be saved again and taken out.

    whole: parameter → its key in the file; rows: table → (key, token ids); originals: parameter → its value before;
    settings: what PEFT's configuration says of them; untied: parameter → the one that it shared with another module.
    """

    whole: dict[str, str]
    rows: dict[str, tuple[str, list[int]]]
    originals: dict[str, Tensor]
    settings: dict
    untied: dict[str, nn.Parameter]


# Writing


def save_adapter(model: nn.Module, folder: str | Path, base_model_name: str | None = None) -> Path:
    """Write the model's LoRA layers to `folder`, as PEFT does; returns the folder.

    Both files are written beside the old ones first and then put in their place; the configuration goes first
    and comes last. Whoever looks finds the old adapter, the new one or, for a moment, no configuration, never
    half of each; after a failure the old one is back. Other files in the folder stay. A merged model is saved
    the same as an unmerged one. `base_model_name` is stored for PEFT, which can fetch the base by it.

    Raises ValueError if the model has no LoRA layer, if a factor isn't finite, if a layer started in W (pissa and
    lora_ga; `as_lora` first), or if the layers can't be expressed in the format (it has one `use_rslora` for all).
    Warns of other trained parameters: they are not saved.
    """
    model, folder = unwrap(model), expanded(folder)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer to save; add_lora it first")
    started = next((name for name, layer in layers.items() if STARTED in layer._buffers), None)
    if started is not None:
        raise ValueError(
            f"{started} started in W itself (pissa or lora_ga), so its factors alone are for a base that nobody else "
            "has; lora_edu.tuning.variants.as_lora(model) makes LoRA for the untouched W of them, which can be saved"
        )
    if len({layer.rank_stabilised for layer in layers.values()}) > 1:
        raise ValueError("PEFT's format has one use_rslora for all layers; some here have it and some don't")
    tensors = {}
    for name, layer in layers.items():
        tensors |= _tensors(name, layer.lora_A, layer.lora_B, isinstance(layer, LoRAEmbedding))
    beside = vars(model).get("_beside_lora", Beside({}, {}, {}, {}, {}))
    tensors |= _tensors_beside(model, beside)
    factors = {id(each) for layer in layers.values() for each in (layer.lora_A, layer.lora_B)}
    others = [
        name
        for name, each in model.named_parameters()
        if each.requires_grad and id(each) not in factors and name not in beside.whole
    ]
    if others:
        warnings.warn(f"not saved, as they are not LoRA: {', '.join(others[:6])}", stacklevel=2)
    ends = {name.rpartition(".")[2] for name in layers}
    config = _config(layers, target_modules(model, set(layers), [ends, set(layers)]), base_model_name)
    config["fan_in_fan_out"] = any(getattr(each, "transposed", False) for each in layers.values())
    return put_files(folder, tensors, config | beside.settings)


def write_adapter(
    folder: str | Path,
    layers: Mapping[str, Factors],
    *,
    base_model_name: str | None = None,
    modules_to_save: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, object] | None = None,
    common: str | None = None,
) -> Path:
    """Write an adapter that no model holds to `folder`, in PEFT's format; returns the folder.

    layers: name of the layer in the base → its factors; all of them are named in target_modules in full. Ranks and
    alphas that are not the most frequent ones go to rank_pattern and alpha_pattern, by full name.
    modules_to_save: name of a parameter in the base → its trained value, kept whole; biases alone, of a layer with
    LoRA or of any other, are what PEFT calls bias="all". tensors: what else the file shall hold, under the file's
    own keys (token rows, as `Adapter.keys` names them). settings: entries of the configuration that replace those
    made here; stacks of experts need target_parameters among them. common: the layer whose rank and alpha stand in
    the configuration as r and lora_alpha (by default the most frequent ones do; a stack of experts goes first).
    The files are put in place as `save_adapter` does it.

    Raises ValueError if there is nothing to write, if an entry isn't finite, or if the layers can't be expressed in
    the format (it has one `use_rslora` for all).
    """
    folder = expanded(folder)
    if not layers and not modules_to_save and not tensors:
        raise ValueError("there is no layer to write: every ΔW is zero")
    if len({each.rank_stabilised for each in layers.values()}) > 1:
        raise ValueError("PEFT's format has one use_rslora for all layers; some here have it and some don't")
    held: dict[str, Tensor] = {}
    for name, factors in layers.items():
        held |= _tensors(name, factors.lora_A, factors.lora_B, factors.embedding)
        if factors.bias is not None:
            held[f"{PREFIX}{name}.lora_B.bias"] = factors.bias.detach().cpu().contiguous()
    common = common or next((name for name, each in layers.items() if each.experts > 1), None)
    parameters = (settings or {}).get("target_parameters") or []
    by_parameter = {name.rpartition(".")[0] for name in parameters}
    targets = sorted(name for name, each in layers.items() if each.experts == 1 and name not in by_parameter)
    config = _config(layers, targets, base_model_name, common)
    whole, biases = set(), False
    kept = {name.rpartition(".")[0] for name in modules_to_save or {} if not name.endswith(".bias")}
    for name, tensor in (modules_to_save or {}).items():
        module, _, last = name.rpartition(".")
        inside = module in layers
        biases |= module not in kept
        whole |= {module} & kept
        key = f"{PREFIX}{module}.base_layer.{last}" if inside else f"{PREFIX}{name}"
        held[key] = tensor.detach().cpu().contiguous()
    config |= {"modules_to_save": sorted(whole) or None, "bias": "all" if biases else "none"}
    held |= {key: tensor.detach().cpu().contiguous() for key, tensor in (tensors or {}).items()}
    return put_files(folder, held, config | dict(settings or {}))


def _tensors(name: str, lora_A: Tensor, lora_B: Tensor, embedding: bool) -> dict[str, Tensor]:
    """A layer's factors under the file's keys; of an embedding A is stored (r, V)."""
    held = {}
    for factor, kind in zip((lora_A.T if embedding else lora_A, lora_B), _kinds(embedding), strict=True):
        if factor.is_meta or not torch.isfinite(factor).all():
            raise ValueError(f"{name}: {kind} has entries that are infinite, NaN or without data; not saved")
        held[f"{PREFIX}{name}.{kind}"] = factor.detach().cpu().contiguous()
    return held


def put_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    weights_name: str = WEIGHTS,
    config_name: str = CONFIG,
) -> Path:
    """Both files beside the old ones, then in their place; after a failure the old ones are back."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, names = secrets.token_hex(4), (weights_name, config_name)
    new = {name: folder / f".{mark}.new.{name}" for name in names}
    old = {name: folder / f".{mark}.old.{name}" for name in names}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    try:
        new[config_name].write_text(text + "\n", encoding="utf-8")
        save_file(dict(tensors), new[weights_name], metadata={"format": "pt"})
        for path in new.values():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for name in reversed(names):
            if (folder / name).exists():
                os.replace(folder / name, old[name])
        for name in names:
            os.replace(new[name], folder / name)
    except BaseException:
        for name in names:
            if old[name].exists():
                os.replace(old[name], folder / name)
        raise
    finally:
        for path in (*new.values(), *old.values()):
            path.unlink(missing_ok=True)
    return folder


def _tensors_beside(model: nn.Module, beside: Beside) -> dict[str, Tensor]:
    """What a loaded adapter had trained beside LoRA, under the file's names, with the values of now."""
    state = all_tensors(model)
    whole = {key: state[name] for name, key in beside.whole.items()}
    rows = {key: state[name][ids] for name, (key, ids) in beside.rows.items()}
    return {key: each.detach().cpu().clone().contiguous() for key, each in (whole | rows).items()}


def _kinds(embedding: bool) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


def _config(
    layers: Mapping[str, LoRALayer | Factors],
    target_modules: list[str] | str,
    base_model_name: str | None,
    common: str | None = None,
) -> dict:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name,
        **ranks_and_alphas(layers, common),
        "lora_dropout": max((getattr(each, "dropout", 0.0) for each in layers.values()), default=0.0),
        "use_rslora": any(each.rank_stabilised for each in layers.values()),
        "target_modules": target_modules,
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "task_type": None,
    }


def ranks_and_alphas(layers: Mapping[str, LoRALayer | Factors], common: str | None = None) -> dict:
    """The configuration's r and lora_alpha, of the layer `common` or else the most frequent; the others as patterns."""
    number = lambda alpha: int(alpha) if alpha == int(alpha) else alpha
    most_frequent = lambda values: Counter(values).most_common(1)[0][0] if layers else 1
    usual = [layers[common]] if common else list(layers.values())
    rank = most_frequent(layer.rank for layer in usual)
    alpha = most_frequent(layer.alpha for layer in usual)
    key = lambda name: f"^{re.escape(name)}"  # PEFT matches the keys as patterns
    return {
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {key(name): each.rank for name, each in layers.items() if each.rank != rank},
        "alpha_pattern": {
            key(name): number(each.alpha) for name, each in layers.items() if each.alpha != alpha
        },
    }


def target_modules(model: nn.Module, names: set[str], candidates: Iterable[set[str]]) -> list[str] | str:
    """The first of the candidates, sets of ends of names, that says exactly the layers `names`; else a pattern."""
    everything = [name for name, _ in model.named_modules()]
    for targets in candidates:
        if {name for name in everything if _ends_with(name, targets)} == names:
            return sorted(targets)
    return f"^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"


def _ends_with(name: str, targets) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


# Reading


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter in `folder` to the model, which is changed in place and returned.

    Everything is frozen but LoRA and what the adapter trained beside it: modules_to_save, biases, token rows. Those
    take the file's values, as in PEFT; `remove_lora` gives the model its own back, `save_adapter` writes them
    again. The same holds of an embedding's own table in the file, where it is not the model's (compared in the
    coarser of the two dtypes): it is taken, with a warning.
    The factors keep the file's dtype, or the weight's where that is wider. Ranks are those of the tensors. An
    embedding that is tied to the head is adapted alone, as PEFT does it. A padding row that isn't zero is kept,
    with a warning: this layer, unlike PEFT's, doesn't add it. A layer that target_modules names and the file lacks
    stays as it is, with a warning.

    Raises AdapterError, with the reason, if the files are damaged, belong to another model or use a feature
    that isn't here; FileNotFoundError if there are none. The model is then unchanged.
    """
    model = unwrap(model)
    if lora_layers(model):
        raise ValueError(
            f"the model has LoRA already, on {next(iter(lora_layers(model)))}; remove_lora it first"
        )
    adapter = read_adapter(folder)
    if adapter.config.get("use_dora") is True:
        raise AdapterError(
            f"use_dora=True isn't supported ({NOT_PRODUCT['use_dora']}) by LoRA's layers; "
            "lora_edu.tuning.load_tuned(model, folder) opens it"
        )
    check_fits(model, adapter)
    parameters = all_tensors(model)
    values = _values_beside(parameters, adapter)

    def build(name: str, layer: nn.Module) -> LoRALayer:
        factors = adapter.layers[name]
        options = {
            "rank_stabilised": factors.rank_stabilised,
            "lora_dtype": factors_dtype(factors, weight_like(layer)),
            "any_rank": True,
        }
        if factors.embedding:
            lora = LoRAEmbedding.from_layer(layer, factors.rank, factors.alpha, **options)
        else:
            kind = LoRAQuantisedLinear if isinstance(layer, QuantisedLinear) else LoRALinear
            lora = kind.from_layer(layer, factors.rank, factors.alpha, factors.dropout, **options)
        with torch.no_grad():
            lora.lora_A.copy_(factors.lora_A)
            lora.lora_B.copy_(factors.lora_B)
        return lora

    try:
        replace_layers(model, adapter.layers, build, tied="separate")
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    _put_beside(model, adapter, parameters, values)
    return model


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Raise AdapterError unless the adapter's factors can be put into this model.

    Warns where target_modules names layers that the file lacks, and of a padding row that isn't zero.
    """
    if adapter.objections:
        raise AdapterError(adapter.objections[0])
    for name, why in adapter.refused.items():
        raise AdapterError(f"{printable(name)} isn't supported: {why}")
    for name, factors in adapter.layers.items():
        if factors.bias is not None:
            raise AdapterError(f"{printable(name)} has a bias in lora_B, which isn't supported")
    _check_names(model, adapter)
    _check_shapes(model, adapter.layers)
    for name, factors in adapter.layers.items():
        padding = getattr(model.get_submodule(name), "padding_idx", None)
        if factors.embedding and padding is not None and factors.lora_A[padding].any():
            warnings.warn(
                f"{name}: the adapter's row of the padding token {padding} isn't zero. It is kept, but not "
                "added: the output there is the base's row (PEFT adds it)",
                stacklevel=3,
            )


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name that they have."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def factors_dtype(factors: Factors, weight: Tensor) -> torch.dtype:
    """The dtype that factors take in a model: the file's, or the weight's where that is wider."""
    return functools.reduce(torch.promote_types, (factors.lora_A.dtype, factors.lora_B.dtype, weight.dtype))


def _check_names(model: nn.Module, adapter: Adapter) -> None:
    """Raise AdapterError unless the model has the adapter's layers and the targets name all of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    strangers = [name for name in adapter.layers if name not in modules]
    if strangers:
        raise AdapterError(
            f"the adapter is for another model: {len(strangers)} of its {len(adapter.layers)} layers are not in "
            f"this one, such as {printable(strangers[0])}"
        )
    targets = adapter.config.get("target_modules")
    if isinstance(targets, str) or adapter.layout != "PEFT":
        return  # a pattern, or all-linear: the tensors say which layers
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(f"target_modules must be a list of names or a pattern; got {printable(targets)}")
    unnamed = [name for name in adapter.layers if not _ends_with(name, targets)]
    if unnamed and not adapter.config.get("ensure_weight_tying"):
        raise AdapterError(f"the file adapts {unnamed[0]}, which target_modules doesn't name: it is damaged")
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if any(adapter.config.get(name) for name in narrowed):
        return
    missing = [
        name
        for name, layer in model.named_modules()
        if _ends_with(name, targets)
        and (isinstance(layer, nn.Linear | nn.Embedding | QuantisedLinear) or is_conv1d(layer))
        and name not in adapter.layers
    ]
    if missing:
        warnings.warn(
            f"target_modules names {len(missing)} layers that the file has no tensors for, such as {missing[0]}: "
            "they stay as they are",
            stacklevel=4,
        )


def _check_shapes(model: nn.Module, layers: Mapping[str, Factors]) -> None:
    """Raise AdapterError unless each layer is of the adapter's kind and shape."""
    for name, factors in layers.items():
        layer = model.get_submodule(name)
        known = isinstance(layer, QuantisedLinear) or isinstance(getattr(layer, "weight", None), Tensor)
        if factors.kernel:
            raise AdapterError(f"{name} is a convolution: LoRA there is measured, but not put into a model")
        if not known or isinstance(layer, nn.Embedding) != factors.embedding:
            kind = "an embedding" if factors.embedding else "a linear layer"
            raise AdapterError(f"{name} is {kind} in the adapter and a {type(layer).__name__} in the model")
        shape = weight_shape(layer)[::-1] if is_conv1d(layer) else weight_shape(layer)
        if shape != factors.sides:
            mine, theirs = (" × ".join(map(str, each)) for each in (shape, factors.sides))
            raise AdapterError(
                f"{name} is {theirs} in the adapter and {mine} in the model"
                + (_resize(name, shape, factors.sides) or ": the adapter is for another model")
            )


def _resize(name: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """The way out where only the number of tokens differs."""
    if len(mine) != len(theirs) or mine[1:] != theirs[1:]:
        return ""
    return (
        f". If {name} counts tokens, the adapter was trained with another vocabulary: call "
        f"model.resize_token_embeddings({theirs[0]}) first"
    )


def _values_beside(parameters: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Parameter → the value that the adapter gives it, where that is another than the model's."""
    values = {}
    trained = _trained_whole(adapter)
    for name, tensor in adapter.whole.items():
        if name not in parameters:
            raise AdapterError(f"the file holds {printable(name)}, which the model doesn't have")
        mine = parameters[name]
        if mine.shape != tensor.shape:
            sizes = " and ".join("×".join(map(str, each)) for each in (tensor.shape, mine.shape))
            raise AdapterError(
                f"{name} differs in size between the file and the model, {sizes}"
                + (
                    _resize(name, tuple(mine.shape), tuple(tensor.shape))
                    or ": the adapter is for another model"
                )
            )
        if mine.is_meta or same_values(mine.detach(), tensor):
            continue
        values[name] = tensor
        if name not in trained:
            warnings.warn(
                f"the file holds its own {name}, other than the model's: the base was changed or resized in "
                "training. The file's is taken, as PEFT does; remove_lora puts the model's back",
                stacklevel=3,
            )
    for name, (ids, rows) in adapter.rows.items():
        if name not in parameters:
            raise AdapterError(f"the file holds rows of {printable(name)}, which the model doesn't have")
        table = values.get(name, parameters[name].detach()).clone()
        if rows.shape[1:] != table.shape[1:] or max(ids, default=0) >= len(table):
            raise AdapterError(
                f"the file holds rows {max(ids, default=0)} and before of {name}, which has {len(table)} rows of "
                f"{tuple(table.shape[1:])}: call model.resize_token_embeddings({max(ids, default=0) + 1}) or more"
            )
        table[ids] = rows.to(table)
        values[name] = table
    return values


def same_values(mine: Tensor, stored: Tensor) -> bool:
    """Whether two tables are the same in the coarser of their dtypes."""
    coarser = max((mine.dtype, stored.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(mine.to(coarser), stored.to(coarser).to(mine.device))


def _trained_whole(adapter: Adapter) -> set[str]:
    """Of what is stored whole, what the configuration says was trained."""
    modules = adapter.config.get("modules_to_save") or []
    biases = adapter.config.get("bias", "none") != "none"
    return {
        name
        for name in adapter.whole
        if (biases and name.endswith("bias")) or any(f".{module}." in f".{name}" for module in modules)
    }


def _put_beside(
    model: nn.Module, adapter: Adapter, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Give the parameters their values and remember what they were."""
    if not values and not adapter.whole and not adapter.rows:
        return
    originals, untied, trained = {}, {}, _trained_whole(adapter)
    with torch.no_grad():
        for name, value in values.items():
            mine = parameters[name]
            others = [other for other, each in parameters.items() if each is mine and other != name]
            # of a shared table that is trained in one of its places PEFT trains a copy
            if name in trained and not set(others) <= adapter.whole.keys():
                untied[name] = mine
                set_parameter(model, name, nn.Parameter(value.to(mine).clone(), requires_grad=False))
            else:
                originals[name] = mine.detach().clone()
                mine.copy_(value)
    now = dict(model.named_parameters(remove_duplicate=False))
    for name in trained & now.keys():
        now[name].requires_grad_(True)
    keep = ("modules_to_save", "bias", "trainable_token_indices")
    settings = {name: adapter.config[name] for name in keep if adapter.config.get(name) not in (None, "none")}
    taken = {name for name in adapter.whole if name in trained or name in values}
    model._beside_lora = Beside(
        {name: adapter.keys[name] for name in taken},
        {name: (adapter.keys[name], ids) for name, (ids, _) in adapter.rows.items()},
        originals,
        settings,
        untied,
    )
