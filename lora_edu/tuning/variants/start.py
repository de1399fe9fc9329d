"""LoRA that doesn't start at B = 0: B₀ and A₀ are given, and W gives up s B₀A₀, so that the model stays the base.

Not for choosing B₀ and A₀ (pissa.py, lora_ga.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu.lora import add_lora, lora_layers, remove_lora
from lora_edu.lora.checks import STARTED
from lora_edu.lora.inject import Target, unwrap

from ..applied import refuse_second
from .updates import wide

# name, plain layer, r, s → A₀ (r, in) and B₀ (out, r); of an embedding with the table taken as (out, in) = (d, V)
Start = Callable[[str, nn.Module, int, float], tuple[Tensor, Tensor]]


def add_started(
    model: nn.Module,
    rank: int | Mapping[Target, int],
    alpha: float | Mapping[Target, float],
    targets: Target | Iterable[Target],
    start: Start,
    **options,
) -> nn.Module:
    """`add_lora`, and in each new layer A₀ and B₀ from `start`, with W − s B₀A₀ in W's place.

    The layer keeps the very W too, which `remove_lora` puts back, so that it is held twice. The difference is rounded
    once to W's dtype. Raises as add_lora and `start` do; the model is then unchanged.
    """
    refuse_second(model)
    add_lora(model, rank, alpha, targets, **options)
    try:
        made = {
            name: start(name, layer._original[0], layer.rank, layer.scaling)
            for name, layer in lora_layers(model).items()
        }
    except BaseException:
        remove_lora(model)
        raise
    for name, layer in lora_layers(model).items():
        _put(layer, *made[name])
    return model


@torch.no_grad()
def _put(layer: nn.Module, A: Tensor, B: Tensor) -> None:
    embedding = isinstance(layer, nn.Embedding)
    layer.lora_A.copy_(A.T if embedding else A)
    layer.lora_B.copy_(B)
    left, right = layer._factors()  # as rounded, and without a padding row
    residual = layer.weight.to(wide(layer)) - layer.scaling * (left.to(wide(layer)) @ right.to(wide(layer)))
    layer._weight_before = (layer.weight,)  # in a tuple: it is no parameter of the model now
    layer.weight = nn.Parameter(residual.to(layer.weight.dtype), requires_grad=False)
    layer.register_buffer(STARTED, layer.lora_A.detach().clone(), persistent=False)
    layer.register_buffer("start_B", layer.lora_B.detach().clone(), persistent=False)


@torch.no_grad()
def as_lora(model: nn.Module) -> nn.Module:
    """Turn LoRA that started in W into plain LoRA of twice the rank on the untouched W; returns the model.

    s (BA − B₀A₀) = s [B, −B₀] [A; A₀] (PiSSA, appendix on the conversion to LoRA): the same model, whose factors
    `save_adapter` writes and that anybody can put on the base; r is 2r and alpha grows so that s stays. W itself is
    back in its place, bit for bit, so in half precision the rounding of W − s B₀A₀ is gone too. Layers that started at
    B = 0 stay. ValueError where no layer started elsewhere or where one is merged.
    """
    started = {name: layer for name, layer in lora_layers(model).items() if STARTED in layer._buffers}
    if not started:
        raise ValueError("no layer of the model has started in W; pissa or lora_ga make it do so")
    for name, layer in started.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; unmerge_lora(model) first")
    for layer in started.values():
        before = layer._weight_before[0]
        before.data = before.data.to(layer.weight)  # where the model was moved since
        layer.weight = before
        trained = layer.lora_A.requires_grad
        across = 1 if isinstance(layer, nn.Embedding) else 0
        layer.lora_A = nn.Parameter(torch.cat([layer.lora_A, layer.start_A], across), requires_grad=trained)
        trained = layer.lora_B.requires_grad
        layer.lora_B = nn.Parameter(torch.cat([layer.lora_B, -layer.start_B], 1), requires_grad=trained)
        layer.alpha *= math.sqrt(2) if layer.rank_stabilised else 2
        layer.rank *= 2
        del layer._buffers[STARTED], layer._buffers["start_B"], layer._weight_before
    return unwrap(model)
