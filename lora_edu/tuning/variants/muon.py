"""Muon on LoRA's factors, one by one (Jordan et al. 2024) or for their product (LoRA-Muon, Cesista et al. 2026).

Not for a whole model: torch.optim.Muon is that. The first is kellerjordan.github.io/posts/muon, the second arXiv
2606.12921.
"""

import math

import torch
from torch import Tensor, nn

from lora_edu.lora import lora_layers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: fast towards 1, then between about 0.7 and 1.2


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of matrix = U S Vᵀ, (m, n), by Newton–Schulz: X ← a X + b (XXᵀ) X + c (XXᵀ)² X, `steps` times.

    Each singular value becomes one between about 0.7 and 1.2, unless it is below a thousandth of ‖matrix‖_F; zero
    stays zero. In the matrix's own dtype, float32 at least, where Jordan et al. take bfloat16.
    """
    a, b, c = COEFFICIENTS
    X = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    X = X / X.norm().clamp_min(torch.finfo(X.dtype).tiny)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return (X.T if tall else X).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of LoRA's factors with all singular values alike, from momentum: m ← β m + (1 − β) ∇.

    product=False: A and B are two matrices, as in Jordan et al.: B ← B − η √max(1, out/r) O((1 − β) ∇B + β m_B), with O
    for `orthogonalised`, and A (r, in) likewise; Nesterov's momentum. It is what torch.optim.Muon does. The steps of ΔW
    are the same for B M and M⁻¹ A where M is orthogonal, as SGD's are, and no others.

    product=True: steepest descent of BA in the spectral norm (LoRA-Muon, eq. for ΔA and ΔB): with S = AAᵀ,
    B ← B − η/2 O(m_B S^-½) S^-½, so that the change of B times A has singular values of about η/2; A with S = BᵀB
    likewise. Now the steps of ΔW are the same for every invertible M. damping δ: S + δ1 is inverted, which isn't the
    same for every M any more; S must be invertible where δ = 0. No weight decay.

    Of an embedding A is taken as (r, V). A factor that isn't trained or has no gradient stays. Raises ValueError for
    numbers out of range and where the model trains anything beside LoRA, which would be left out; TypeError in a step
    with a sparse gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        momentum: float = 0.95,
        *,
        product: bool = False,
        damping: float = 1e-9,
    ):
        if not math.isfinite(lr) or lr < 0:
            raise ValueError(f"lr must be a finite number, 0 or more; got {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1; got {momentum!r}")
        if not math.isfinite(damping) or damping < 0:
            raise ValueError(f"damping must be a finite number, 0 or more; got {damping!r}")
        self.layers = list(lora_layers(model).values())
        factors = [
            each for layer in self.layers for each in (layer.lora_B, layer.lora_A) if each.requires_grad
        ]
        if not factors:
            raise ValueError("no factor of LoRA is trained here; add_lora the model first")
        held = {id(each) for each in factors}
        for name, each in model.named_parameters():
            if each.requires_grad and id(each) not in held:
                raise ValueError(
                    f"{name} is trained too and no factor of LoRA; freeze it, or take another optimiser"
                )
        super().__init__(factors, {"lr": lr, "momentum": momentum, "product": product, "damping": damping})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for layer in self.layers:
            B, A = layer.lora_B, layer.lora_A
            table = isinstance(layer, nn.Embedding)
            # both roots before either factor moves
            A_root = _inverse_root(A if table else A.T, group) if group["product"] else None
            B_root = _inverse_root(B, group) if group["product"] else None
            for factor, root, across in ((B, A_root, False), (A, B_root, not table)):
                if factor.grad is not None:
                    self._move(factor, root, across, table and factor is A)
        return loss

    def _move(self, factor: Tensor, root: Tensor | None, across: bool, table: bool) -> None:
        """across: whether the factor is stored (r, n); else (n, r)."""
        if factor.grad.is_sparse:
            raise TypeError("Muon needs the whole gradient; add_lora with sparse=False")
        group, state = self.param_groups[0], self.state[factor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(factor)
        mean = state["momentum_buffer"].lerp_(factor.grad, 1 - group["momentum"])
        if root is None:
            update = orthogonalised(factor.grad.lerp(mean, group["momentum"]))
            rows, columns = update.T.shape if table else update.shape
            factor.sub_(group["lr"] * math.sqrt(max(1, rows / columns)) * update)
            return
        update = orthogonalised((mean.T if across else mean) @ root) @ root
        factor.sub_(group["lr"] / 2 * (update.T if across else update))


def _inverse_root(factor: Tensor, group: dict) -> Tensor:
    """(FᵀF + δ1)^-½ of an (n, r) factor, 0 in directions where that is 0."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    values = values.clamp_min(0) + group["damping"]
    inverse = torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return ((vectors * inverse) @ vectors.T).to(factor.dtype)
