"""A whole model's linear layers in four bits: quantised here, or taken from a GGUF file as they lie there.

Not for the formats (quant.py) nor for LoRA on top (`add_lora`, which takes quantised layers as they are).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_edu.paths import expanded
from lora_edu.text import printable

from .checks import is_conv1d
from .inject import Target, find_layers, lora_layers, tied_to, unwrap
from .quant import Quantised, QuantisedLinear, dequantise, from_gguf, quantise, relative_error, rows_in_order

# GGUF's name of a layer in a block → that of transformers, in a model of the Llama architecture.
LLAMA_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class QuantiseReport(NamedTuple):
    """What quantising a layer did: ‖W − Wq‖_F / ‖W‖_F, and the weight's bytes before and after."""

    error: float
    bytes_before: int
    bytes_after: int


def quantise_model(
    model: nn.Module,
    targets: Target | Iterable[Target] = "all-linear",
    format: str = "nf4",
    block: int = 64,
    double: bool = True,
) -> dict[str, QuantiseReport]:
    """Put a QuantisedLinear in the place of each linear layer that `targets` name; the model is changed in place.

    targets: as in `add_lora`; "all-linear" leaves out the head, as QLoRA does. format: "nf4", with `block` and `double`
    (`quantise_nf4`), or GGUF's "q4_0" or "q4_1" (`quantise_gguf`). Biases are kept and shared, as trainable as they
    were. A model on the meta device gets layers with room and no numbers, for `load_state_dict(assign=True)`.
    Returns what it cost, by layer (the error is NaN on the meta device).

    Raises TypeError or ValueError, with the layer and the reason, for a layer that is no nn.Linear (or Conv1D of
    transformers), has LoRA, hooks or a computed weight, is tied to another, or can't be quantised; the model is then
    unchanged.
    """
    model = unwrap(model)
    names = find_layers(model, [targets] if isinstance(targets, Target) else list(targets))
    done, reports = {}, {}
    for name in names:
        layer = model.get_submodule(name)
        _refuse(model, name, layer)
        weight = layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()
        try:
            done[name] = quantise(weight, format, block, double)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        off = float("nan") if weight.is_meta else relative_error(weight, done[name])
        reports[name] = QuantiseReport(off, weight.numel() * weight.element_size(), done[name].nbytes)
    _put(model, done)
    return reports


def dequantise_model(model: nn.Module) -> nn.Module:
    """Put an nn.Linear with the decoded weight in the place of each QuantisedLinear; returns the model.

    The way to merge without rounding to four bits again: `remove_lora`, this, `load_adapter`, `merge_lora`. It needs
    the memory of the float model. Raises ValueError where a quantised layer has LoRA.
    """
    model = unwrap(model)
    quantised = {name: each for name, each in model.named_modules() if isinstance(each, QuantisedLinear)}
    for name in lora_layers(model):
        if name in quantised:
            raise ValueError(f"{name} has LoRA; save_adapter(model, FOLDER) and remove_lora(model) first")
    built = {}
    for layer in quantised.values():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        weight = dequantise(layer.quantised).to(layer.dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        built[layer] = plain.train(layer.training)
    _replace(model, built)
    return model


def quantise_from_gguf(model: nn.Module, path: str | Path) -> dict[str, QuantiseReport]:
    """Give a model's linear layers the 4-bit blocks that its GGUF file holds, none rounded again; changed in place.

    model: of the Llama architecture, in transformers' names, with the file's own weights in float, as
    `from_pretrained(folder, gguf_file=…)` makes it. path: a GGUF file, read with the package `gguf`. Each tensor in
    Q4_0 or Q4_1 takes the place of its layer's weight; the others (embedding, head, norms) stay as they are. The
    rows of query and key, which GGUF stores in another order, go back into transformers'.
    Returns the report of each layer; its error is the difference to the float weight, no more than that one's rounding.

    Raises ImportError without gguf, FileNotFoundError without the file, ValueError where the file is no GGUF, of
    another architecture, without 4-bit blocks, or where a layer's weight is not the file's. The model is then
    unchanged.
    """
    model, path = unwrap(model), expanded(path)
    done, reports = {}, {}
    for name, quantised in _read_llama(path).items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{printable(path)} has the layer {name}, which the model doesn't have"
            ) from None
        _refuse(model, name, layer)
        if tuple(layer.weight.shape) != quantised.shape:
            mine, theirs = (" × ".join(map(str, each)) for each in (layer.weight.shape, quantised.shape))
            raise ValueError(f"{name} is {mine} in the model and {theirs} in {printable(path)}")
        off = relative_error(layer.weight, quantised)
        if not off <= torch.finfo(layer.weight.dtype).eps:
            raise ValueError(
                f"{name} of the model is not the file's (relative difference {off:.2g}): open the model from "
                f"{printable(path)} (gguf_file=…), or use quantise_model, which rounds the model's own weights"
            )
        size = layer.weight.numel() * layer.weight.element_size()
        done[name], reports[name] = quantised, QuantiseReport(off, size, quantised.nbytes)
    _put(model, done)
    return reports


# ---- helpers -----------------------------------------------------------------------------------------------


def _refuse(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise TypeError or ValueError, with the reason, unless a QuantisedLinear can stand in this layer's place."""
    kind = type(layer).__name__
    if name in lora_layers(model):
        raise ValueError(
            f"{name} has LoRA; quantise first and add LoRA after that (remove_lora leads back there)"
        )
    if isinstance(layer, QuantisedLinear):
        raise ValueError(f"{name} is quantised already ({layer.quantised.format})")
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    if not (plain or is_conv1d(layer)):
        raise TypeError(
            f"{name}: only nn.Linear, or Conv1D of transformers, can be quantised; {kind} is none of them"
        )
    weight = layer._parameters.get("weight")
    if weight is None or type(weight.data) is not Tensor or not weight.is_floating_point():
        raise TypeError(f"{name}: the weight of this {kind} is computed or quantised, by another library")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise TypeError(f"{name}: nn.{type(parent).__name__} reads this weight without calling the layer")
    if others := tied_to(model, name):
        raise ValueError(
            f"{name}.weight is also {', '.join(others)} (tied), which stays in float: leave it out"
        )
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, each, None) for each in hooks) or hasattr(layer, "_hf_hook"):
        raise TypeError(
            f"{name}: this {kind} has hooks, which would be lost; quantise first, then register them"
        )


def _put(model: nn.Module, weights: Mapping[str, Quantised]) -> None:
    """A QuantisedLinear with this weight, and with the layer's own bias, in the place of each layer."""
    built = {}
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        new = QuantisedLinear.from_quantised(weight, layer.bias, layer.weight.dtype)
        built[layer] = new.train(layer.training)
    _replace(model, built)


def _replace(model: nn.Module, built: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module everywhere where the old one stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in built:
                setattr(parent, name, built[child])


def _read_llama(path: Path) -> dict[str, Quantised]:
    """transformers' name of a layer → its 4-bit weight, rows in transformers' order."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {printable(path)}")
    try:
        import gguf
    except ImportError:
        raise ImportError("a GGUF file is read with the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{printable(path)} can't be read as GGUF: {printable(error)}") from None
    about = lambda key: None if (field := reader.get_field(key)) is None else field.contents()
    architecture = about("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{printable(path)} is of the architecture {printable(architecture)}; this reads llama"
        )
    heads = about("llama.attention.head_count")
    heads = {"attn_q": heads, "attn_k": about("llama.attention.head_count_kv") or heads}
    found = {}
    for tensor in reader.tensors:
        block, _, layer = tensor.name.removesuffix(".weight").removeprefix("blk.").partition(".")
        kind = tensor.tensor_type.name.lower()
        if layer not in LLAMA_LAYERS or kind not in ("q4_0", "q4_1"):
            continue
        columns, rows = map(int, tensor.shape)  # GGUF names the fastest one first
        weight = from_gguf(torch.from_numpy(tensor.data.copy()), (rows, columns), kind)
        if layer in heads:
            pairs = torch.arange(rows).view(
                heads[layer], -1, 2
            )  # the two numbers that the turn takes together
            weight = rows_in_order(weight, pairs.transpose(1, 2).flatten())
        found[f"model.layers.{block}.{LLAMA_LAYERS[layer]}"] = weight
    if not found:
        raise ValueError(f"{printable(path)} has no linear layer in Q4_0 or Q4_1: there is nothing to take")
    return found
