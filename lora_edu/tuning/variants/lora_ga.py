"""LoRA-GA: LoRA that starts in the first gradient's own directions (Wang et al. 2024, arXiv 2407.05000).

Not another forward or optimiser: only where A and B start is new.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu import lowrank
from lora_edu.lora.inject import Target, find_layers, unwrap
from lora_edu.loss import next_token_loss

from ..applied import refuse_second
from .start import add_started
from .updates import as_stored


def first_gradient(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    targets: Target | Iterable[Target],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = next_token_loss,
) -> dict[str, Tensor]:
    """Layer → the gradient of the mean loss over `batches` with respect to its W, in W's shape; the model stays.

    batches: (inputs, targets) pairs, gone through once; the gradients are averaged. Only the W that `targets` name get
    one (n numbers beside the n of W). Raises as `add_lora` does for targets, and ValueError where there is no batch or
    a layer has no gradient.
    """
    refuse_second(model)
    inner = unwrap(model)
    targets = [targets] if isinstance(targets, Target) else list(targets)
    weights = {name: inner.get_submodule(name).weight for name in find_layers(model, targets)}
    parameters = list(inner.parameters())
    before = [(each.requires_grad, each.grad) for each in parameters]
    found, count = {}, 0
    try:
        inner.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for inputs, wanted in batches:
            value = loss(model, inputs, wanted)
            none = [None] * len(weights)
            asked = list(weights.values())
            gradients = torch.autograd.grad(value, asked, allow_unused=True) if value.requires_grad else none
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    raise ValueError(f"{name} has no gradient: the loss doesn't depend on its weight")
                dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
                found[name] = found[name] + dense if name in found else dense
            count += 1
    finally:
        for each, (trained, gradient) in zip(parameters, before, strict=True):
            each.requires_grad_(trained)
            each.grad = gradient
    if not count:
        raise ValueError("batches must hold at least one pair (inputs, targets); it holds none")
    return {name: each / count for name, each in found.items()}


def lora_ga(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    *,
    gamma: float = 16.0,
    rank_stabilised: bool = True,
    **options,
) -> nn.Module:
    """Add LoRA to the layers of `gradients`, A and B from the gradient's SVD; returns the model, changed in place.

    ∇W = UΣVᵀ, (out, in): A = c V[:, 1…r]ᵀ and B = c U[:, r+1…2r] with c = out^¼ / √γ (algorithm 1, with its 'stable
    scale'), and W − s BA, frozen, in W's place. The first step of SGD then moves W by −η s² (∇W AᵀA + BBᵀ∇W), to first
    order in η, which is c² s² times the best matrix of rank 2r to −η ∇W (theorem 3.1). s = α/√r unless
    rank_stabilised=False, as in the paper. gradients: of `first_gradient`, in W's shape, by layer; of an embedding the
    table is taken as (d, V). PEFT multiplies B by the gradient's singular values and doesn't scale A, which is another
    start in the same two subspaces.

    What comes off and how it is saved: as with `pissa`. options: those of `add_lora`. Raises ValueError for a gradient
    of another shape, one that isn't finite or is of rank below 2r; the model is then unchanged.
    """
    if not math.isfinite(gamma) or gamma <= 0:
        raise ValueError(f"gamma must be a finite number above 0; got {gamma!r}")
    if not gradients:
        raise ValueError(
            "gradients must hold at least one layer's; first_gradient(model, batches, targets) makes them"
        )

    def start(name: str, layer: nn.Module, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        gradient = gradients[name]
        if gradient.shape != layer.weight.shape:
            raise ValueError(
                f"{name}: the gradient must be {tuple(layer.weight.shape)} as the weight; got {tuple(gradient.shape)}"
            )
        try:
            found = lowrank.svd(as_stored(layer, gradient))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if 2 * rank > len(found.S) or not found.S[2 * rank - 1] > 0:
            most = int((found.S > 0).sum()) // 2
            raise ValueError(
                f"{name}: rank must be at most {most}, half the rank of the gradient, whose first 2r directions A and "
                f"B share; got {rank}"
            )
        c = found.U.shape[0] ** 0.25 / math.sqrt(gamma)
        return c * found.Vh[:rank], c * found.U[:, rank : 2 * rank]

    names = list(gradients)
    return add_started(model, rank, alpha, names, start, rank_stabilised=rank_stabilised, **options)
