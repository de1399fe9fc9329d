"""What the variants that compute something else than LoRA have in common: where they go, their ΔW, and folding it in.

Not for one variant's arithmetic: each has its own file. What they add stands beside a layer, attached by a hook.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu.lora import lora_layers
from lora_edu.lora.checks import STARTED, is_conv1d
from lora_edu.lora.inject import Target, find_layers, refuse_at, tied_to, unwrap

from ..applied import applied, mark, refuse_second, take_off
from ..places import attach, attached


def chosen(
    model: nn.Module, targets: Target | Iterable[Target], method: str, embeddings: str = ""
) -> dict[str, nn.Module]:
    """Name → layer for the targets, each one that LoRA could be added to.

    embeddings: why this method has no sense for a table, where it has none. Raises ValueError or TypeError that names
    the layer and the reason.
    """
    refuse_second(model)
    targets = [targets] if isinstance(targets, Target) else list(targets)
    inner = unwrap(model)
    found = {name: inner.get_submodule(name) for name in find_layers(model, targets)}
    for name, layer in found.items():
        refuse_at(inner, name, layer, "refuse")
        if embeddings and isinstance(layer, nn.Embedding):
            raise TypeError(f"{name} is an embedding, and {method} is for linear layers: {embeddings}")
        if getattr(layer, "padding_idx", None) is not None or getattr(layer, "max_norm", None) is not None:
            raise TypeError(
                f"{name} has padding_idx or max_norm, which {method} would not keep; add_lora adapts such an embedding"
            )
    return found


def put_on(
    model: nn.Module,
    method: str,
    options: dict,
    made: Mapping[str, nn.Module],
    undo: Callable[[nn.Module], None],
) -> nn.Module:
    """Attach each module to its layer as `layer.METHOD`, all else frozen; returns the model."""
    mark(model, method, options, undo)
    for name, module in made.items():
        attach(unwrap(model).get_submodule(name), method, module)
    return model


def rows_out(layer: nn.Module) -> Tensor:
    """W as the layer multiplies with it: (out, in), whichever way it is stored; an embedding's table as (d, V)."""
    return layer.weight.T if is_conv1d(layer) or isinstance(layer, nn.Embedding) else layer.weight


def as_stored(layer: nn.Module, delta: Tensor) -> Tensor:
    """A ΔW of (out, in), or (d, V), in the shape in which the layer stores its weight."""
    return delta.T if is_conv1d(layer) or isinstance(layer, nn.Embedding) else delta


def wide(layer: nn.Module) -> torch.dtype:
    """What the trained numbers are kept in: the weight's dtype, float32 at least."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


@torch.no_grad()
def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Layer → ΔW, what tuning has added to the base's own W so far, in the weight's shape: of LoRA or of any variant.

    After `pissa` or `lora_ga` this is s (BA − B₀A₀), since W − s B₀A₀ stands in W's place. ValueError where neither
    LoRA nor a variant with a forward of its own is on the model.
    """
    method = applied(model)
    if method is None and lora_layers(model):
        found = {}
        for name, layer in lora_layers(model).items():
            found[name] = layer.delta_weight()
            if STARTED in layer._buffers:
                A, B = layer.start_A, layer.start_B
                made = layer.scaling * (A @ B.T if isinstance(layer, nn.Embedding) else B @ A)
                found[name] -= made.T if getattr(layer, "transposed", False) else made
        return found
    inner = unwrap(model)
    found = {
        name: layer._modules[method].delta_weight(layer).to(layer.weight.dtype)
        for name, layer in inner.named_modules()
        if hasattr(layer._modules.get(method), "delta_weight")
    }
    if not found:
        raise ValueError(
            f"the model has {method or 'nothing'} on it, which has no ΔW; put LoRA or a variant on"
        )
    return found


@torch.no_grad()
def fold(model: nn.Module, method: str, kind: type) -> nn.Module:
    """W + ΔW in W's place, rounded once, and the method off; there is no way back. Returns the model.

    Raises ValueError if a weight belongs to another layer too (tied) or if a sum isn't finite; the model is then
    unchanged.
    """
    folded = []
    for name, module in attached(model, method, kind).items():
        layer = unwrap(model).get_submodule(name)
        others = tied_to(unwrap(model), name)
        if others:
            raise ValueError(
                f"{name}.weight is also {others[0]} (tied), which folding would change; use the model as it is"
            )
        merged = (layer.weight.to(wide(layer)) + module.delta_weight(layer)).to(layer.weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"{name}: the folded weight must be finite in {merged.dtype}, and isn't. Nothing was folded"
            )
        folded.append((layer.weight, merged))
    take_off(model, method)
    for weight, merged in folded:
        weight.copy_(merged)
    return model
