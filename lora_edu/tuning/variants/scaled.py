"""Scaled gradients: a step on A and B that depends on BA alone (Zhang & Pilanci 2024, arXiv 2402.02347).

And what that is about: B M and M⁻¹ A are other factors of the same ΔW. Not an optimiser of its own: any of torch's.
"""

import math

import torch
from torch import Tensor, nn

from lora_edu.lora import LoRAEmbedding, LoRALinear, lora_layers


def scaled_steps(
    optimizer: torch.optim.Optimizer, model: nn.Module, damping: float = 1e-6
) -> torch.optim.Optimizer:
    """Let every step of `optimizer` see the gradients of `scale_gradients(model, damping)`; returns the optimizer.

    With SGD, with or without momentum and weight decay, and damping 0 the steps of ΔW are the same for all factors of
    the same ΔW; with Adam, which the paper uses too (scaled AdamW), they aren't: it divides entry by entry, and
    entries of B M are others than those of B. Nor where gradients are clipped before the step, as `fit` does unless
    told clip=None: the norm that is clipped depends on M. Raises ValueError for a damping below 0 and, in a step with
    a closure, which would make its gradients after the scaling, RuntimeError.
    """
    if not math.isfinite(damping) or damping < 0:
        raise ValueError(f"damping must be a finite number, 0 or more; got {damping!r}")
    if not lora_layers(model):
        raise ValueError("the model has no LoRA layer whose gradients could be scaled; add_lora it first")

    def before_step(optimizer: torch.optim.Optimizer, arguments: tuple, named: dict) -> None:
        # torch hands the hook what step was called with; some versions put the optimizer first
        if named.get("closure") is not None or any(callable(each) for each in arguments):
            raise RuntimeError(
                "a closure makes its gradients after they would be scaled; call backward, then step()"
            )
        scale_gradients(model, damping)

    optimizer.register_step_pre_hook(before_step)
    return optimizer


@torch.no_grad()
def scale_gradients(model: nn.Module, damping: float = 1e-6) -> None:
    """Every LoRA layer's ∇A becomes (BᵀB + δ1)⁻¹ ∇A and ∇B becomes ∇B (AAᵀ + δ1)⁻¹, in place.

    δ: damping; the inverse is the pseudo-inverse, so that δ = 0 is right at B = 0 too. Of an embedding ∇A is (V, r) and
    multiplied from the right; a sparse one stays sparse. Made in float32 at least.
    """
    for layer in lora_layers(model).values():
        B, A = tall(layer)
        for factor, other in ((layer.lora_B, A), (layer.lora_A, B)):
            if factor.grad is None:
                continue
            wide = other.to(torch.promote_types(other.dtype, torch.float32))
            gram = wide.T @ wide + damping * torch.eye(other.shape[1], dtype=wide.dtype, device=wide.device)
            inverse = torch.linalg.pinv(gram, hermitian=True).to(factor.dtype)
            from_left = factor is layer.lora_A and not isinstance(layer, nn.Embedding)
            if factor.grad.is_sparse:
                held = factor.grad.coalesce()
                values = held.values() @ inverse
                factor.grad = torch.sparse_coo_tensor(
                    held.indices(), values, held.shape, check_invariants=False, is_coalesced=True
                )
            else:
                factor.grad.copy_(inverse @ factor.grad if from_left else factor.grad @ inverse)


@torch.no_grad()
def change_basis(model: nn.Module, M: Tensor) -> nn.Module:
    """Write every layer's BA as (B M)(M⁻¹ A): other factors, the same ΔW to rounding; returns the model.

    M: (r, r), invertible. Raises ValueError where it isn't, or where a layer has another rank.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        if M.shape != (layer.rank, layer.rank):
            raise ValueError(f"M must be ({layer.rank}, {layer.rank}) for {name}; got {tuple(M.shape)}")
    inverse, info = torch.linalg.inv_ex(M)
    if info.any() or not torch.isfinite(inverse).all():
        raise ValueError("M must be invertible")
    for layer in layers.values():
        B, A = tall(layer)
        B.copy_(B @ M.to(B))
        A.copy_(A @ inverse.T.to(A))
    return model


def tall(layer: LoRALinear | LoRAEmbedding) -> tuple[Tensor, Tensor]:
    """(B (out, r), Aᵀ (in, r)) as views without gradients; of an embedding out is d and in is V."""
    A = layer.lora_A if isinstance(layer, nn.Embedding) else layer.lora_A.T
    return layer.lora_B.detach(), A.detach()
