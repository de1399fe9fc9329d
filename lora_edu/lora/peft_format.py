"""Adapters on disk, in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

Not for adding LoRA to a model (inject.py). PEFT itself is not needed; nothing from a file is ever executed.
"""

import functools
import json
import math
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_edu.text import printable

from .checks import check_alpha, check_dropout, is_conv1d
from .functional import delta
from .inject import lora_layers, replace_layers, unwrap
from .layers import LoRAEmbedding, LoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
LARGEST_CONFIG = 4 * 2**20  # bytes; PEFT's own are about 1 kB
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Settings that change nothing in what a trained adapter computes.
# fmt: off
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "target_modules", "init_lora_weights", "bias",
}
# fmt: on
REFUSED = {
    "use_dora": "DoRA, which rescales the merged weight's rows",
    "use_qalora": "QALoRA, which pools the input",
    "lora_bias": "a bias in lora_B",
    "modules_to_save": "whole modules trained beside LoRA",
    "trainable_token_indices": "single token rows trained beside LoRA",
    "target_parameters": "LoRA on parameters outside of a linear layer or embedding",
    "layer_replication": "layers used several times",
    "alora_invocation_tokens": "activated LoRA, which acts from a token on",
    "ensure_weight_tying": "one adapter for the tied embedding and head",
    "megatron_config": "Megatron's parallel layers",
}
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class AdapterError(ValueError):
    """The adapter can't be used, and why: damaged, for another model, or of an unsupported kind."""


class Factors(NamedTuple):
    """The trained factors of one layer, in the shapes of LoRALinear or LoRAEmbedding."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    rank_stabilised: bool
    dropout: float
    embedding: bool

    @property
    def rank(self) -> int:
        return self.lora_B.shape[1]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def delta_weight(self) -> Tensor:
        """ΔW in float32 at least: (out, in) of a linear layer, s · B A; (V, d) of an embedding, s · A Bᵀ."""
        pair = (self.lora_A, self.lora_B.T) if self.embedding else (self.lora_B, self.lora_A)
        return delta(*pair, self.scaling, torch.promote_types(self.lora_A.dtype, torch.float32))


class Adapter(NamedTuple):
    """What a folder holds: the factors by layer, and base tables that PEFT stores with an embedding's."""

    layers: dict[str, Factors]
    base_weights: dict[str, Tensor]


class _Place(NamedTuple):
    """Where the file holds a layer's two tensors, and what the configuration says about it."""

    A: str
    B: str
    rows: int
    columns: int
    alpha: float
    embedding: bool


# Writing


def save_adapter(model: nn.Module, folder: str | Path, base_model_name: str | None = None) -> Path:
    """Write the model's LoRA layers to `folder`, as PEFT does; returns the folder.

    Both files are written beside the old ones first and then put in their place; the configuration goes first
    and comes last. Whoever looks finds the old adapter, the new one or, for a moment, no configuration, never
    half of each; after a failure the old one is back. Other files in the folder stay. A merged model is saved
    the same as an unmerged one. `base_model_name` is stored for PEFT, which can fetch the base by it.

    Raises ValueError if the model has no LoRA layer, if a factor isn't finite, or if the layers can't be
    expressed in the format (it has one `use_rslora` for all). Warns of other trained parameters: they are not
    saved.
    """
    model, folder = unwrap(model), Path(folder)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer to save; add_lora it first")
    if len({layer.rank_stabilised for layer in layers.values()}) > 1:
        raise ValueError("PEFT's format has one use_rslora for all layers; some here have it and some don't")
    tensors = {}
    for name, layer in layers.items():
        embedding = isinstance(layer, LoRAEmbedding)
        pair = (layer.lora_A.T, layer.lora_B) if embedding else (layer.lora_A, layer.lora_B)
        for factor, kind in zip(pair, _kinds(embedding), strict=True):
            if factor.is_meta or not torch.isfinite(factor).all():
                raise ValueError(
                    f"{name}: {kind} has entries that are infinite, NaN or without data; not saved"
                )
            tensors[f"{PREFIX}{name}.{kind}"] = factor.detach().cpu().contiguous()
    factors = {id(each) for layer in layers.values() for each in (layer.lora_A, layer.lora_B)}
    others = [
        name for name, each in model.named_parameters() if each.requires_grad and id(each) not in factors
    ]
    if others:
        warnings.warn(f"not saved, as they are not LoRA: {', '.join(others[:6])}", stacklevel=2)

    folder.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    new = {name: folder / f".{mark}.new.{name}" for name in (WEIGHTS, CONFIG)}
    old = {name: folder / f".{mark}.old.{name}" for name in (WEIGHTS, CONFIG)}
    text = json.dumps(_config(model, layers, base_model_name), indent=2, sort_keys=True, ensure_ascii=False)
    try:
        new[CONFIG].write_text(text + "\n", encoding="utf-8")
        save_file(tensors, new[WEIGHTS], metadata={"format": "pt"})
        for path in new.values():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists():
                os.replace(folder / name, old[name])
        for name in (WEIGHTS, CONFIG):
            os.replace(new[name], folder / name)
    except BaseException:
        for name in (WEIGHTS, CONFIG):
            if old[name].exists():
                os.replace(old[name], folder / name)
        raise
    finally:
        for path in (*new.values(), *old.values()):
            path.unlink(missing_ok=True)
    return folder


def _kinds(embedding: bool) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


def _config(model: nn.Module, layers: dict, base_model_name: str | None) -> dict:
    number = lambda alpha: int(alpha) if alpha == int(alpha) else alpha
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    key = lambda name: f"^{re.escape(name)}"  # PEFT matches the keys as patterns
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {key(name): each.rank for name, each in layers.items() if each.rank != rank},
        "alpha_pattern": {
            key(name): number(each.alpha) for name, each in layers.items() if each.alpha != alpha
        },
        "lora_dropout": max(getattr(each, "dropout", 0.0) for each in layers.values()),
        "use_rslora": next(iter(layers.values())).rank_stabilised,
        "target_modules": _target_modules(model, set(layers)),
        "fan_in_fan_out": any(getattr(each, "transposed", False) for each in layers.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "task_type": None,
    }


def _target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """Ends of names if they say exactly these layers, else full names, else a pattern."""
    everything = [name for name, _ in model.named_modules()]
    for targets in ({name.rpartition(".")[2] for name in names}, names):
        if {name for name in everything if _ends_with(name, targets)} == names:
            return sorted(targets)
    return f"^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"


def _ends_with(name: str, targets) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


# Reading


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter in `folder` to the model, which is changed in place and returned: frozen, but for LoRA.

    The factors keep the file's dtype, or the weight's where that is wider. An embedding that is tied to the
    head is adapted alone, as PEFT does it. A padding row that isn't zero is kept, with a warning: this layer,
    unlike PEFT's, doesn't add it.

    Raises AdapterError, with the reason, if the files are damaged, belong to another model or use a feature
    that isn't here; FileNotFoundError if there are none. The model is then unchanged.
    """
    model = unwrap(model)
    if lora_layers(model):
        raise ValueError(
            f"the model has LoRA already, on {next(iter(lora_layers(model)))}; remove_lora it first"
        )
    adapter = read_adapter(folder, model)
    _check_base(model, adapter.base_weights)
    for name, factors in adapter.layers.items():
        padding = getattr(model.get_submodule(name), "padding_idx", None)
        if factors.embedding and padding is not None and factors.lora_A[padding].any():
            warnings.warn(
                f"{name}: the adapter's row of the padding token {padding} isn't zero. It is kept, but not "
                "added: the output there is the base's row (PEFT adds it)",
                stacklevel=2,
            )

    def build(name: str, layer: nn.Module) -> LoRALinear | LoRAEmbedding:
        factors = adapter.layers[name]
        options = {
            "rank_stabilised": factors.rank_stabilised,
            "lora_dtype": functools.reduce(
                torch.promote_types, (factors.lora_A.dtype, factors.lora_B.dtype, layer.weight.dtype)
            ),
            "any_rank": True,
        }
        if factors.embedding:
            lora = LoRAEmbedding.from_layer(layer, factors.rank, factors.alpha, **options)
        else:
            lora = LoRALinear.from_layer(layer, factors.rank, factors.alpha, factors.dropout, **options)
        with torch.no_grad():
            lora.lora_A.copy_(factors.lora_A)
            lora.lora_B.copy_(factors.lora_B)
        return lora

    try:
        return replace_layers(model, adapter.layers, build, tied="separate")
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None


def read_adapter(folder: str | Path, model: nn.Module | None = None) -> Adapter:
    """An adapter's folder, checked; with a model, also against that, before any tensor is read."""
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_features(config)
    weights = _file(folder, WEIGHTS)
    try:
        with safe_open(weights, framework="pt") as file:
            stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            shapes = {key: tuple(each.get_shape()) for key, each in stored.items()}
            for key, each in stored.items():
                if each.get_dtype() not in DTYPES:
                    raise AdapterError(
                        f"{printable(key)} must be in {', '.join(DTYPES)}; got {each.get_dtype()}"
                    )
            pairs, rest = _pairs(shapes)
            if model is not None:
                _check_names(model, config, pairs)
            places = _places(config, shapes, pairs)
            if model is not None:
                _check_shapes(model, places)
            read = {key: file.get_tensor(key).clone() for key in shapes}
    except AdapterError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{WEIGHTS} is damaged or truncated: {printable(str(error))}") from None
    for key, tensor in read.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{printable(key)} has entries that are infinite or NaN: the file is damaged or training diverged"
            )
    layers = {
        name: Factors(
            read[place.A].T.contiguous() if place.embedding else read[place.A],
            read[place.B],
            place.alpha,
            config.get("use_rslora", False),
            config.get("lora_dropout", 0.0),
            place.embedding,
        )
        for name, place in places.items()
    }
    return Adapter(layers, {name: read[key] for name, key in rest.items()})


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if path.exists():
        raise AdapterError(f"{path.name} must be a file; it is something else")
    pickles = [each.name for each in folder.glob("adapter_model.*") if each.suffix in (".bin", ".pt", ".pth")]
    if name == WEIGHTS and pickles:
        raise AdapterError(
            f"{pickles[0]} is a pickle, which can run any code when opened, so it is not; open it with PEFT "
            f"where you trust it and save it again: that writes {WEIGHTS}"
        )
    if name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").exists():
        raise AdapterError("an adapter in several files (an index.json) isn't supported; save it as one")
    raise FileNotFoundError(
        f"there is no {name} in {folder}; an adapter is a folder with {CONFIG} and {WEIGHTS}"
    )


def _read_config(folder: Path) -> dict:
    path = _file(folder, CONFIG)
    if path.stat().st_size > LARGEST_CONFIG:
        raise AdapterError(f"{CONFIG} must be at most {LARGEST_CONFIG} bytes; it has {path.stat().st_size}")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} is no JSON text: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG} must hold an object; it holds a {type(config).__name__}")
    return config


def _refuse_features(config: dict) -> None:
    """Raise AdapterError for whatever a LoRA layer here would not compute, by its name in PEFT."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type must be LORA; this adapter is {printable(config.get('peft_type'))}")
    _expect(
        config,
        "r",
        lambda r: isinstance(r, int) and not isinstance(r, bool) and r >= 1,
        "a whole number above 0",
    )
    for name in ("rank_pattern", "alpha_pattern"):
        _expect(config, name, lambda patterns: isinstance(patterns, dict | None), "an object")
    _expect(config, "use_rslora", lambda flag: isinstance(flag, bool), "true or false", False)
    try:
        check_alpha(config.get("lora_alpha"))
        check_dropout(config.get("lora_dropout", 0.0))
        for alpha in (config.get("alpha_pattern") or {}).values():
            check_alpha(alpha)
    except (ValueError, OverflowError) as error:
        raise AdapterError(f"{CONFIG}: {printable(str(error))}") from None
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"bias={printable(config['bias'])} (biases trained beside LoRA) isn't supported; only none is"
        )
    start = config.get("init_lora_weights")
    if not any(start is each or (isinstance(start, str) and start == each) for each in HARMLESS_STARTS):
        raise AdapterError(
            f"init_lora_weights={printable(start)} isn't supported: it changes the base weights before "
            "training. PEFT can save the adapter as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if name not in READ | WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            what = REFUSED.get(name, "not known here")
            raise AdapterError(f"{printable(name)}={printable(value)} isn't supported ({what})")


def _expect(config: dict, name: str, holds, rule: str, default=None) -> None:
    value = config.get(name, default)
    if not holds(value):
        raise AdapterError(f"{CONFIG}: {name} must be {rule}; got {printable(value)}")


def _pairs(shapes: Mapping[str, tuple]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Layer → its tensors' names as {"A": …, "B": …}; and the remaining tensors by the base weight's name."""
    pairs: dict[str, dict[str, str]] = {}
    rest = {}
    for key in shapes:
        if not key.startswith(PREFIX) or len(key) > 300:
            raise AdapterError(f"a tensor's name must start with {PREFIX} and be short; got {printable(key)}")
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", key[len(PREFIX) :], re.DOTALL)
        if match and bool(match[2]) != bool(match[4]):
            pair = pairs.setdefault(match[1], {})
            if match[3] in pair:
                raise AdapterError(
                    f"{printable(match[1])} has lora_{match[3]} twice, also as {printable(key)}"
                )
            pair[match[3]] = key
        elif any(part in key for part in ("lora_", "modules_to_save", "trainable_tokens", "token_adapter")):
            raise AdapterError(
                f"the tensor {printable(key)} belongs to a kind of adapter that isn't supported"
            )
        else:
            rest[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = key
    if not pairs:
        raise AdapterError(f"{WEIGHTS} holds no LoRA tensor")
    return pairs, rest


def _places(config: dict, shapes: Mapping[str, tuple], pairs: dict[str, dict[str, str]]) -> dict[str, _Place]:
    """What the files say of each layer, once the tensors and the configuration agree."""
    ranks, alphas = (_patterns(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    places = {}
    for name, keys in pairs.items():
        if set(keys) != {"A", "B"}:
            raise AdapterError(f"{printable(name)} has lora_{next(iter(keys))} alone: the file is incomplete")
        embedding, other = (keys[each].endswith(f"lora_embedding_{each}") for each in "AB")
        if embedding != other:
            raise AdapterError(f"{printable(name)} has one factor of an embedding and one of a linear layer")
        A, B = shapes[keys["A"]], shapes[keys["B"]]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] < 1:
            raise AdapterError(
                f"{printable(name)}: lora_A must be (r, in) and lora_B (out, r); got {A} and {B}"
            )
        rank = _by_pattern(ranks, name, config["r"])
        if rank != A[0]:
            raise AdapterError(
                f"{printable(name)} has rank {A[0]}, but {CONFIG} says {printable(rank)}: the files don't match"
            )
        rows, columns = (A[1], B[0]) if embedding else (B[0], A[1])
        alpha = _by_pattern(alphas, name, config["lora_alpha"])
        places[name] = _Place(keys["A"], keys["B"], rows, columns, alpha, embedding)
    return places


def _patterns(patterns: dict) -> list[tuple[re.Pattern, object]]:
    """PEFT's patterns, compiled. One that could take forever to match is refused: a file may be hostile."""
    compiled, involved = [], 0
    for text, value in patterns.items():
        bare = re.sub(r"\\.", "", text)
        repeats = len(re.findall(r"[*+{]", bare))
        involved += repeats > 0
        if len(text) > 500 or repeats > 2 or re.search(r"\)[*+?{]", bare) or involved > 20:
            raise AdapterError(
                f"the pattern {printable(text)} is too involved to be matched safely; name the layers"
            )
        try:
            compiled.append((re.compile(rf"(.*\.)?({text})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"the pattern {printable(text)} is no regular expression: {error}") from None
    return compiled


def _by_pattern(patterns: list[tuple[re.Pattern, object]], name: str, default):
    """As PEFT: the first pattern that matches the end of the name wins."""
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _check_names(model: nn.Module, config: dict, pairs: Mapping) -> None:
    """Raise AdapterError unless the model has the adapter's layers and the targets name just these."""
    modules = dict(model.named_modules(remove_duplicate=False))
    strangers = [name for name in pairs if name not in modules]
    if strangers:
        raise AdapterError(
            f"the adapter is for another model: {len(strangers)} of its {len(pairs)} layers are not in this "
            f"one, such as {printable(strangers[0])}"
        )
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return  # a pattern, or all-linear: the tensors say which layers
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(f"target_modules must be a list of names or a pattern; got {printable(targets)}")
    narrowed = any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    for name, layer in model.named_modules():
        named = _ends_with(name, targets)
        if name in pairs and not named:
            raise AdapterError(f"the file adapts {name}, which target_modules doesn't name: it is damaged")
        suitable = isinstance(layer, nn.Linear | nn.Embedding) or is_conv1d(layer)
        if named and suitable and name not in pairs and not narrowed:
            raise AdapterError(
                f"target_modules names {name}, but the file has no tensors for it: it is incomplete"
            )


def _check_shapes(model: nn.Module, places: dict[str, _Place]) -> None:
    """Raise AdapterError unless each layer is of the adapter's kind and shape."""
    for name, place in places.items():
        layer = model.get_submodule(name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(layer, nn.Embedding) != place.embedding:
            kind = "an embedding" if place.embedding else "a linear layer"
            raise AdapterError(f"{name} is {kind} in the adapter and a {type(layer).__name__} in the model")
        shape = tuple(reversed(weight.shape)) if is_conv1d(layer) else tuple(weight.shape)
        if shape != (place.rows, place.columns):
            mine = " × ".join(map(str, shape))
            raise AdapterError(
                f"{name} is {place.rows} × {place.columns} in the adapter and {mine} in the model"
            )


def _check_base(model: nn.Module, base_weights: dict[str, Tensor]) -> None:
    """PEFT stores an adapted embedding's own table too. Fine if it is the model's; else it was changed."""
    mine = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in base_weights.items():
        if name not in mine:
            raise AdapterError(f"the file holds {printable(name)}, which the model doesn't have")
        same = mine[name].shape == tensor.shape
        if not same or not (mine[name].is_meta or torch.equal(tensor.to(mine[name]), mine[name].detach())):
            raise AdapterError(
                f"the file holds its own {name}, other than the model's: the base was changed or resized in "
                "training, so that LoRA alone doesn't give what was trained"
            )
