"""PiSSA: LoRA that starts with W's own largest singular directions (Meng et al. 2024, arXiv 2404.02948).

Not another forward: h = W_res x + s BA x is LoRA's, and only where it starts is new.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from lora_edu import lowrank
from lora_edu.lora.inject import Target

from .start import add_started
from .updates import rows_out, wide


def pissa(
    model: nn.Module, rank: int, alpha: float, targets: Target | Iterable[Target], **options
) -> nn.Module:
    """Add LoRA with A = √(Σ_r/s) V_rᵀ and B = U_r √(Σ_r/s) of W = UΣVᵀ, and freeze the rest of W; returns the model.

    W_res = W − s BA, frozen, stands in W's place (eq. 2 to 4), so that W_res + s BA = W to rounding; PEFT divides by s
    too. For an embedding W is the table as (d, V), so A (V, r) and B (d, r) are its halves. The exact SVD, in float32
    at least. options: those of `add_lora`.

    `remove_lora` gives W back bit for bit (the layer keeps it, so W is held twice); `remove_lora(model, merge=True)`
    keeps what was learnt; `as_lora` makes plain LoRA of rank 2r of it, which can be saved. Raises as `add_lora` does,
    and ValueError where s isn't above 0 or W isn't finite; the model is then unchanged.
    """

    def start(name: str, layer: nn.Module, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        if not scaling > 0:
            raise ValueError(f"{name}: alpha must be above 0, so that Σ/s has a root; got s = {scaling:g}")
        try:
            found = lowrank.svd(rows_out(layer).to(wide(layer)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        B, A = lowrank.halves(found._replace(S=found.S / scaling), rank)
        return A, B

    return add_started(model, rank, alpha, targets, start, **options)
