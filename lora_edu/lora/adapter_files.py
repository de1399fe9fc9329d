"""Adapters as people have them, read into factors: PEFT's folders and the layouts of kohya, diffusers and MLX.

Nothing from a file is ever executed, and no model is needed. Putting one into a model is peft_format.py's.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_edu.paths import expanded
from lora_edu.text import printable

from .checks import check_alpha, check_dropout
from .functional import delta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
LARGEST_CONFIG = 4 * 2**20  # bytes; PEFT's own are about 1 kB
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MATCHING_SECONDS = 5.0  # for all patterns of a file together

# What wrappers put into names: the mark, and whose it is. Stripped wherever it stands, and said.
WRAPPERS = {
    "_orig_mod.": "torch.compile's",
    "_fsdp_wrapped_module.": "FSDP's",
    "_checkpoint_wrapped_module.": "activation checkpointing's",
    "module.": "DataParallel's",
}

# Settings that change nothing in what a trained adapter computes.
# fmt: off
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "target_modules", "init_lora_weights", "bias", "modules_to_save", "trainable_token_indices", "lora_bias",
    "ensure_weight_tying", "target_parameters",
}
# fmt: on
NOT_PRODUCT = {  # settings with which the update is not s · BA on the stored base
    "use_dora": "DoRA, which rescales the merged weight's rows",
    "use_qalora": "QALoRA, which pools the input",
    "alora_invocation_tokens": "activated LoRA, which acts from a token on",
    "kasa_config": "KaSA, which has a diagonal between B and A and cuts the base's weight",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "Arrow, which chooses among several adapters",
}
NOT_LOADED = {
    "lora_bias": "a bias in lora_B",
    "layer_replication": "layers used several times",
    "megatron_config": "Megatron's parallel layers",
    "target_parameters": "LoRA on parameters outside of a linear layer or embedding",
}
# tensors that only training needs: of MonteCLoRA's draws, of VeLoRA's gradients
ONLY_TRAINING = ("lora_monteclora_sampler", "lora_velora_embed")
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
OTHER_METHODS = {  # parts of names that another method than LoRA leaves
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "ia3_": "(IA)³",
    "boft_": "BOFT",
    "vera_lambda": "VeRA",
}


class AdapterError(ValueError):
    """The adapter can't be used, and why: damaged, for another model, or of an unsupported kind."""


class Factors(NamedTuple):
    """The trained factors of one layer, in the shapes of LoRALinear or LoRAEmbedding.

    Linear: lora_A (r, in), lora_B (out, r); a convolution's kernel is part of `in`. Embedding: lora_A (V, r),
    lora_B (d, r). Experts, E of them in one tensor: lora_A (E · r, in), expert by expert, and lora_B (out, r · E),
    the expert changing fastest, as PEFT stores them. bias: lora_B's own, (out,), to be scaled like BA.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    rank_stabilised: bool
    dropout: float
    embedding: bool
    experts: int = 1
    bias: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.lora_B.shape[1] // self.experts

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of ΔW, of one expert where there are several."""
        if self.embedding:
            return self.lora_A.shape[0], self.lora_B.shape[0]
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """(left, right) with ΔW = s · left right: one pair, or one for each expert."""
        if self.embedding:
            return [(self.lora_A, self.lora_B.T)]
        if self.experts == 1:
            return [(self.lora_B, self.lora_A)]
        A = self.lora_A.reshape(self.experts, self.rank, -1)
        B = self.lora_B.reshape(-1, self.rank, self.experts)
        return [(B[..., expert], A[expert]) for expert in range(self.experts)]

    def with_products(self, products: Sequence[tuple[Tensor, Tensor]], alpha: float) -> "Factors":
        """The same layer with other factors, given as `products` gives them, and another alpha."""
        if self.embedding:
            A, B = products[0][0], products[0][1].T
        else:
            A = torch.cat([right for _, right in products])
            B = torch.stack([left for left, _ in products], dim=2).flatten(1)  # the expert changes fastest
        return self._replace(lora_A=A.contiguous(), lora_B=B.contiguous(), alpha=alpha)

    def delta_weight(self) -> Tensor:
        """ΔW in float32 at least: (out, in) of a linear layer, s · BA; (V, d) of an embedding, s · A Bᵀ; of
        experts (E, out, in)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        made = [delta(left, right, self.scaling, dtype) for left, right in self.products()]
        return made[0] if self.experts == 1 else torch.stack(made)


class Adapter(NamedTuple):
    """What a file or folder holds.

    layout: "PEFT", "kohya", "diffusers" or "MLX". layers: the factors by layer. whole: tensors stored whole beside
    them (modules_to_save, biases, an adapted embedding's own table), by the base's name. rows: token rows trained
    by themselves, table's name → (ids, rows). refused: layer → why its update is no s · BA. objections: what
    keeps it from being put into a model, though not from being measured. notes: what is odd about it, in words.
    keys: name of a whole tensor or of a table with rows → its key in the file.
    scaled: whether alpha is known; where it isn't, s = 1 stands for it.
    """

    path: Path
    layout: str
    layers: dict[str, Factors]
    whole: dict[str, Tensor]
    rows: dict[str, tuple[list[int], Tensor]]
    refused: dict[str, str]
    objections: list[str]
    notes: list[str]
    config: dict
    keys: dict[str, str]
    scaled: bool


class _Keys(NamedTuple):
    """A file's names sorted: layer → {"A": key, "B": key, "alpha": key, "bias": key}, and what else there is."""

    layout: str
    pairs: dict[str, dict[str, str]]
    whole: dict[str, str]
    rows: dict[str, str]
    refused: dict[str, str]
    objections: list[str]
    notes: list[str]


def read_adapter(path: str | Path) -> Adapter:
    """An adapter's folder or file, whatever it was trained for.

    Raises AdapterError, with the reason, if it is damaged or holds no LoRA; FileNotFoundError if nothing is there.
    What can be measured but not put into a model is read, and said under `refused` and `objections`.
    """
    weights, config = find_adapter(expanded(path))
    with _opened(weights) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
        formats = {key: each.get_dtype() for key, each in slices.items()}
        metadata = file.metadata() or {}
        keys = sort_keys(shapes)
        config = config if config is not None else _config_of(metadata)
        _check_formats(formats, (key for pair in keys.pairs.values() for key in pair.values()))
        for name in [name for name, key in keys.whole.items() if formats[key] not in DTYPES]:
            keys.objections.append(f"{printable(name)}, stored whole, is in {formats[keys.whole[name]]}")
            del keys.whole[name]
        read = {key: file.get_tensor(key).clone() for key in _wanted(keys)}
    return _assemble(weights, config, keys, read)


def adapter_of(config: dict, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that PEFT's configuration and tensors, both in memory, hold; raises as `read_adapter` does.

    For methods that store LoRA's factors and something more: they take out what is theirs first.
    """
    check_config(config)
    keys = sort_keys(tensors)
    return _assemble(Path(WEIGHTS), config, keys, {key: tensors[key] for key in _wanted(keys)})


@contextlib.contextmanager
def _opened(weights: Path) -> Iterator[safe_open]:
    """A safetensors file to read from; what goes wrong with it is an AdapterError with the reason."""
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except AdapterError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{weights.name} is damaged or truncated: {printable(str(error))}") from None


def _check_formats(formats: Mapping[str, str], keys: Iterable[str]) -> None:
    for key in keys:
        if formats[key] not in DTYPES:
            raise AdapterError(f"{printable(key)} must be in {', '.join(DTYPES)}; got {formats[key]}")


def _infinite(read: Mapping[str, Tensor]) -> Iterator[str]:
    """What there is to say of each tensor that isn't finite."""
    for key, tensor in read.items():
        if not torch.isfinite(tensor).all():
            yield f"{printable(key)} has entries that are infinite or NaN: the file is damaged or training diverged"


def _wanted(keys: _Keys) -> Iterable[str]:
    yield from (key for pair in keys.pairs.values() for key in pair.values())
    yield from keys.whole.values()
    yield from keys.rows.values()


# --- which files ----------------------------------------------------------------------------------------------


def find_adapter(path: Path) -> tuple[Path, dict | None]:
    """The file with the tensors, and the configuration where there is one (checked)."""
    if path.is_dir() or not path.exists():
        if not (path / CONFIG).exists():
            lone = sorted(path.glob("*.safetensors")) if path.is_dir() else []
            if len(lone) == 1:
                return check_file(lone[0]), None
        config = read_config(path)
        if "lora_parameters" in config:  # MLX's own configuration, under the same name
            return find_file(path, MLX_WEIGHTS), check_mlx(config)
        check_config(config)
        return find_file(path, WEIGHTS), config
    beside = path.parent / CONFIG
    config = read_config(path.parent) if beside.is_file() else None
    if config is not None:
        config = check_mlx(config) if "lora_parameters" in config else config
        check_config(config)
    return check_file(path), config


def check_file(path: Path) -> Path:
    """The path, if a file is there; AdapterError if it is a folder or something else."""
    if not path.is_file():
        raise AdapterError(f"{path.name} must be a file; it is something else")
    return path


def find_file(folder: Path, name: str) -> Path:
    """The file of this name in an adapter's folder; AdapterError or FileNotFoundError says what there is."""
    path = folder / name
    if path.exists():
        return check_file(path)
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


def read_config(folder: Path, name: str = CONFIG) -> dict:
    """adapter_config.json as a dictionary, its size and form checked."""
    path = find_file(folder, name)
    if path.stat().st_size > LARGEST_CONFIG:
        raise AdapterError(f"{name} must be at most {LARGEST_CONFIG} bytes; it has {path.stat().st_size}")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{name} is no JSON text: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{name} must hold an object; it holds a {type(config).__name__}")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file: finite numbers in one of DTYPES, or AdapterError with the reason."""
    with _opened(path) as file:
        formats = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        _check_formats(formats, formats)
        read = {key: file.get_tensor(key).clone() for key in formats}
    for problem in _infinite(read):
        raise AdapterError(problem)
    return read


def check_config(config: dict) -> None:
    """Raise AdapterError unless this is LoRA's configuration and its numbers are numbers."""
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


def check_mlx(config: dict) -> dict:
    """MLX's configuration in PEFT's words: its `scale` is s itself."""
    settings = config["lora_parameters"]
    scale = settings.get("scale") if isinstance(settings, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or not scale:
        raise AdapterError(
            f"{CONFIG}: lora_parameters.scale must be a number other than 0; got {printable(scale)}"
        )
    return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "mlx_scale": float(scale)}


def _config_of(metadata: Mapping[str, str]) -> dict | None:
    """The configuration that newer diffusers keep in the file's own header."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    alphas = {value for key, value in told.items() if str(key).endswith("lora_alpha")}
    if len(alphas) != 1 or not isinstance(alpha := alphas.pop(), int | float) or not math.isfinite(alpha):
        return None
    return {"peft_type": "LORA", "lora_alpha": alpha}


def _expect(config: dict, name: str, holds: Callable, rule: str, default=None) -> None:
    value = config.get(name, default)
    if not holds(value):
        raise AdapterError(f"{CONFIG}: {name} must be {rule}; got {printable(value)}")


# --- whose names ----------------------------------------------------------------------------------------------

_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.(?!weight$|bias$)([^.]+))?\.(weight|bias)", re.DOTALL)
_TABLE = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.(?!weight$)([^.]+))?", re.DOTALL)
_KOHYA = re.compile(r"(.+)\.(lora_down|lora_up|lora_mid)\.weight|(.+)\.(alpha|dora_scale)", re.DOTALL)
_OLD_DIFFUSERS = re.compile(r"(.+?)(?:\.processor)?[._](?:(to_\w+?)_)?lora[.](down|up)\.weight", re.DOTALL)
_MLX = re.compile(r"(.+)\.lora_([ab])", re.DOTALL)
_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.")


def unwrapped(name: str) -> tuple[str, list[str]]:
    """A name without the marks of wrappers, and the marks that were in it."""
    found = []
    for mark in WRAPPERS:
        pattern = rf"(?:^|(?<=\.)){re.escape(mark)}"
        name, times = re.subn(pattern, "", name)
        found += [mark] * bool(times)
    return name, found


def is_lora(key: str) -> bool:
    """Whether a tensor's name is that of a factor of LoRA, in any layout."""
    return any(pattern.fullmatch(key) for pattern in (_LINEAR, _TABLE, _MLX, _OLD_DIFFUSERS)) or key.endswith(
        (".lora_down.weight", ".lora_up.weight")
    )


def sort_keys(names: Iterable[str]) -> _Keys:
    """What the names say: whose layout this is, which belong together, and what stands beside LoRA.

    Raises AdapterError where they hold no LoRA, or two adapters.
    """
    names = list(names)
    for name in names:
        if len(name) > 300:
            raise AdapterError(_no_prefix(name))
    if any(".lora_down." in name or ".lora_up." in name for name in names):
        found = _sort_kohya(names)
    elif any(_MLX.fullmatch(name) for name in names):
        found = _sort_small(names, _MLX, "MLX")
    elif any(_OLD_DIFFUSERS.fullmatch(name) for name in names):
        found = _sort_small(names, _OLD_DIFFUSERS, "diffusers")
    else:
        found = _sort_peft(names)
    if not found.pairs and not found.refused:
        other = next((what for part, what in OTHER_METHODS.items() for name in names if part in name), None)
        if other:
            raise AdapterError(f"these are factors of {other}, another method than LoRA; only LoRA is read")
        raise AdapterError(f"{WEIGHTS} holds no LoRA tensor")
    return found


def _sort_peft(names: list[str]) -> _Keys:
    found = _Keys("PEFT", {}, {}, {}, {}, [], [])
    adapters, marks, bare = set(), {}, []
    for key in names:
        name, seen = unwrapped(key)
        marks |= dict.fromkeys(seen)
        if not name.startswith(PREFIX):
            bare.append(key)
        name = name.removeprefix(PREFIX)
        match = _LINEAR.fullmatch(name) or _TABLE.fullmatch(name)
        if any(part in name for part in ONLY_TRAINING):
            continue
        if match:
            adapters.add(match[3])
            part = "bias" if match.re is _LINEAR and match[4] == "bias" else match[2]
            _add(found.pairs.setdefault(match[1], {}), part, key, match[1])
        elif "lora_magnitude_vector" in name:
            found.refused[name.partition(".lora_magnitude_vector")[0]] = NOT_PRODUCT["use_dora"]
        elif name.endswith(".lora_diag") or ".lora_diag." in name:
            found.refused[name.partition(".lora_diag")[0]] = NOT_PRODUCT["kasa_config"]
        elif "trainable_tokens_delta" in name:
            table = re.split(r"\.token_adapter|\.trainable_tokens_delta", name)[0]
            found.rows[f"{table}.weight"] = key
        elif "token_adapter" in name or ".original_module." in name or "trainable_tokens_original" in name:
            continue  # the base's own table, kept beside its rows
        elif "lora_" in name or "ranknum" in name:
            found.objections.append(
                f"the tensor {printable(key)} belongs to a kind of adapter that isn't supported"
            )
        else:
            plain = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)", "", name).replace(".base_layer.", ".")
            found.whole[plain] = key
    if len(adapters) > 1:
        listed = ", ".join(printable(each or "none") for each in sorted(adapters, key=str))
        raise AdapterError(f"the file holds several adapters ({listed}): save one, or give a folder of one")
    if adapters - {None}:
        found.notes.append(
            f"its keys carry the adapter's name, .{printable(adapters.pop())}., as a PeftModel's own state_dict() "
            "has them (save_pretrained leaves it out)"
        )
    for mark in marks:
        found.notes.append(f"its keys carry {WRAPPERS[mark]} mark {mark}, which is passed over")
    return _without_prefix(found, bare)


def _without_prefix(found: _Keys, bare: list[str]) -> _Keys:
    """Keys without PEFT's prefix: diffusers' where their parts are named so."""
    if not bare:
        return found
    if all(key.startswith(_DIFFUSERS) for key in bare) and found.pairs:
        found.notes.append("a LoRA in diffusers' layout (pytorch_lora_weights)")
        return found._replace(layout="diffusers")
    if found.pairs and any(key not in bare for pair in found.pairs.values() for key in pair.values()):
        raise AdapterError(_no_prefix(bare[0]))
    found.objections.append(_no_prefix(bare[0]))
    return found


def _no_prefix(key: str) -> str:
    return f"a tensor's name must start with {PREFIX} and be short; got {printable(key)}"


def _sort_kohya(names: list[str]) -> _Keys:
    found = _Keys("kohya", {}, {}, {}, {}, [], ["a LoRA in kohya's layout (lora_down, lora_up, alpha)"])
    parts = {"lora_down": "A", "lora_up": "B", "alpha": "alpha"}
    for key in names:
        match = _KOHYA.fullmatch(unwrapped(key)[0])
        if not match:
            found.whole[key] = key
            continue
        layer, part = (match[1], match[2]) if match[1] else (match[3], match[4])
        if part in parts:
            _add(found.pairs.setdefault(layer, {}), parts[part], key, layer)
        else:
            why = "a third factor (LoCon's lora_mid)" if part == "lora_mid" else NOT_PRODUCT["use_dora"]
            found.refused[layer] = why
    for layer in [layer for layer, pair in found.pairs.items() if set(pair) == {"alpha"}]:
        del found.pairs[layer]  # of another method's layer
    return found


def _sort_small(names: list[str], pattern: re.Pattern, layout: str) -> _Keys:
    found = _Keys(layout, {}, {}, {}, {}, [], [f"a LoRA in {layout}'s layout"])
    sides = {"a": "A", "b": "B", "down": "A", "up": "B"}
    for key in names:
        match = pattern.fullmatch(unwrapped(key)[0])
        if not match:
            found.whole[key] = key
            continue
        layer = ".".join(part for part in match.groups()[:-1] if part)
        _add(found.pairs.setdefault(layer, {}), sides[match.groups()[-1]], key, layer)
    return found


def _add(pair: dict[str, str], part: str, key: str, layer: str) -> None:
    if part in pair:
        raise AdapterError(f"{printable(layer)} has lora_{part} twice, also as {printable(key)}")
    pair[part] = key


# --- factors --------------------------------------------------------------------------------------------------


def _assemble(weights: Path, config: dict | None, keys: _Keys, read: dict[str, Tensor]) -> Adapter:
    notes, objections, refused = list(keys.notes), list(keys.objections), dict(keys.refused)
    if config is None:
        notes.append(f"{weights.name} is an adapter's file without {CONFIG}")
        objections.append(f"there is no {CONFIG} beside it, which says what alpha is")
    config = config or {}
    objections += _features(config)
    everywhere = _not_a_product(config)
    alphas = _patterns(config.get("alpha_pattern") or {})
    deadline = time.monotonic() + MATCHING_SECONDS
    layers, guessed = {}, 0
    stacks = _stacks(keys, read, config, deadline)
    for name, pair in keys.pairs.items():
        if everywhere or name in refused:
            refused.setdefault(name, everywhere)
            continue
        if not {"A", "B"} <= set(pair):
            raise AdapterError(f"{printable(name)} has lora_{next(iter(pair))} alone: the file is incomplete")
        experts, parameters = stacks.get(name, (1, [name]))
        factors = _factors(name, pair, read, keys.layout, config, experts)
        places = parameters if experts > 1 else [name]
        told = {_alpha(place, pair, read, factors, config, alphas, deadline) for place in places}
        if len(told) > 1:
            refused[name] = (
                "its keys don't say which of target_parameters it is for, and alpha_pattern gives "
                f"{printable(', '.join(places))} different alphas"
            )
            continue
        alpha, known = told.pop()
        guessed += not known
        layers[name] = factors._replace(alpha=alpha)
    if guessed:
        notes.append("alpha is not in the file, so norms are those of s = 1; ranks do not depend on it")
    ranks = {factors.rank for factors in layers.values() if factors.experts == 1}
    if not config.get("rank_pattern") and keys.layout == "PEFT" and ranks - {config.get("r"), None}:
        name = next(n for n, each in layers.items() if each.rank != config.get("r"))
        if config:
            objections.append(
                f"{printable(name)} has rank {layers[name].rank}, but {CONFIG} says {config['r']}: the files "
                "don't match"
            )
    objections += _infinite(read)
    rows = {}
    for name, key in keys.rows.items():
        ids = _token_ids(config, name)
        if ids is None or read[key].dim() != 2 or len(ids) != len(read[key]):
            objections.append(f"the token rows of {printable(name)} don't fit trainable_token_indices")
            ids = list(range(len(read[key]))) if read[key].dim() else []
        rows[name] = (ids, read[key])
    whole = {name: read[key] for name, key in keys.whole.items()}
    return Adapter(
        weights,
        keys.layout,
        layers,
        whole,
        rows,
        refused,
        objections,
        notes,
        config,
        keys.whole | keys.rows,
        not guessed,
    )


def _stacks(
    keys: _Keys, read: dict[str, Tensor], config: dict, deadline: float
) -> dict[str, tuple[int, list[str]]]:
    """Of each layer of target_parameters: (how many experts its tensors stack, the parameters that it may be for).

    Its keys name the module alone, with a .base_layer for each further parameter of it, and its tensors have E · r
    rows. All stacks of a module have one E; which r goes with a parameter says rank_pattern.
    """
    targets = [each for each in config.get("target_parameters") or [] if isinstance(each, str)]
    if not targets or keys.layout != "PEFT":
        return {}
    ranks = _patterns(config.get("rank_pattern") or {})
    modules: dict[str, dict[str, dict[int, list[str]]]] = {}
    for name, pair in keys.pairs.items():
        module = re.sub(r"(\.base_layer)+$", "", name)
        if not {"A", "B"} <= set(pair) or "lora_embedding_" in pair["A"]:
            continue
        named = [f"{module}.{target.rpartition('.')[2]}" for target in targets]
        named = [each for each, target in zip(named, targets, strict=True) if _ends(each, target)]
        rows = read[pair["A"]].shape[0] if read[pair["A"]].dim() == 2 else 0
        found: dict[int, list[str]] = {}
        for parameter in named:
            rank = _first_match(ranks, parameter, config["r"], deadline, "rank_pattern")
            if isinstance(rank, int) and rank > 0 and rows % rank == 0:
                found.setdefault(rows // rank, []).append(parameter)
        if found:
            modules.setdefault(module, {})[name] = found
    stacks = {}
    for found in modules.values():
        common = set.intersection(*(set(each) for each in found.values()))
        if common:
            stacks |= {name: (max(common), each[max(common)]) for name, each in found.items()}
    return stacks


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _first_match(
    patterns: list[tuple[re.Pattern, float]], name: str, otherwise: float, deadline: float, what: str
) -> float:
    """The value of the first pattern that matches the end of a name, as in PEFT."""
    for pattern, value in patterns:
        if time.monotonic() > deadline:
            raise AdapterError(f"{what} is too involved to be matched safely; name the layers")
        if pattern.match(name):
            return value
    return otherwise


def _factors(
    name: str, pair: dict[str, str], read: dict[str, Tensor], layout: str, config: dict, experts: int
) -> Factors:
    """The two tensors in our shapes, alpha still open."""
    embedding, other = ("lora_embedding_" in pair[each] for each in "AB")
    if embedding != other:
        raise AdapterError(f"{printable(name)} has one factor of an embedding and one of a linear layer")
    A, B = read[pair["A"]], read[pair["B"]]
    if layout == "MLX" and A.dim() == B.dim() == 2:
        A, B = A.T, B.T
    kernel: tuple[int, ...] = ()
    if A.dim() == B.dim() and 3 <= A.dim() <= 5 and all(side == 1 for side in B.shape[2:]):  # a convolution
        kernel, A, B = tuple(A.shape[2:]), A.flatten(1), B.flatten(1)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] < 1:
        raise AdapterError(
            f"{printable(name)}: lora_A must be (r, in) and lora_B (out, r); got {tuple(read[pair['A']].shape)} "
            f"and {tuple(read[pair['B']].shape)}"
        )
    bias = read[pair["bias"]] if "bias" in pair else None
    A = A.T.contiguous() if embedding else A
    stabilised, dropout = config.get("use_rslora", False), config.get("lora_dropout", 0.0)
    return Factors(A, B, 1.0, stabilised, dropout, embedding, experts, bias, kernel)


def _alpha(
    name: str,
    pair: dict[str, str],
    read: dict[str, Tensor],
    factors: Factors,
    config: dict,
    patterns: list[tuple[re.Pattern, float]],
    deadline: float,
) -> tuple[float, bool]:
    """(alpha, whether the files say it). Where they don't, alpha = r, so that s = 1."""
    if "alpha" in pair:
        alpha = read[pair["alpha"]]
        if alpha.numel() != 1:
            raise AdapterError(f"{printable(name)}: alpha must be one number; got shape {tuple(alpha.shape)}")
        return float(alpha), True
    if "mlx_scale" in config:
        return config["mlx_scale"] * factors.rank, True
    if "lora_alpha" not in config:
        neutral = math.sqrt(factors.rank) if factors.rank_stabilised else factors.rank
        return float(neutral), False
    return _first_match(patterns, name, config["lora_alpha"], deadline, "alpha_pattern"), True


def _patterns(patterns: dict) -> list[tuple[re.Pattern, float]]:
    """PEFT's patterns, compiled. One that could take forever to match is refused: a file may be hostile."""
    compiled, involved = [], 0
    for text, value in patterns.items():
        bare = re.sub(r"\[[^\]]*\]", "x", re.sub(r"\\.", "x", text))
        repeats = len(re.findall(r"[*+{]", bare))
        involved += repeats > 0
        if len(text) > 500 or repeats > 3 or re.search(r"\)[*+{]", bare) or involved > 20:
            raise AdapterError(
                f"the pattern {printable(text)} is too involved to be matched safely; name the layers"
            )
        try:
            compiled.append((re.compile(rf"(.*\.)?({text})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"the pattern {printable(text)} is no regular expression: {error}") from None
    return compiled


def _features(config: dict) -> list[str]:
    """Settings that LoRA layers of ours would not follow, each in a sentence."""
    found = []
    for name, value in config.items():
        if value in (None, False, "", [], {}) or name in WITHOUT_EFFECT or name == "mlx_scale":
            continue
        what = NOT_LOADED.get(name) or NOT_PRODUCT.get(name)
        if what or name not in READ:
            found.append(f"{printable(name)}={printable(value)} isn't supported ({what or 'not known here'})")
    if (why := _changed_base(config)) is not None:
        found.append(why)
    return found


def _not_a_product(config: dict) -> str:
    """Why no layer's update is s · BA on the stored base; empty where each is."""
    for name, why in NOT_PRODUCT.items():
        if config.get(name):
            return why
    return _changed_base(config) or ""


def _changed_base(config: dict) -> str | None:
    start = config.get("init_lora_weights")
    if any(start is each or (isinstance(start, str) and start == each) for each in HARMLESS_STARTS):
        return None
    return (
        f"init_lora_weights={printable(start)} isn't supported: it changes the base weights before training. "
        "PEFT can save the adapter as plain LoRA (path_initial_model_for_weight_conversion)"
    )


def _token_ids(config: dict, table: str) -> list[int] | None:
    """The ids of the rows that were trained in a table: a list for the embedding, or lists by module's name."""
    told = config.get("trainable_token_indices")
    if isinstance(told, dict):
        module = table.removesuffix(".weight")
        fitting = [ids for name, ids in told.items() if module == name or module.endswith(f".{name}")]
        told = fitting[0] if len(fitting) == 1 else None
    good = isinstance(told, list) and all(type(each) is int and each >= 0 for each in told)
    return told if good else None
