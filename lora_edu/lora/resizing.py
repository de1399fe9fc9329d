"""A smaller adapter out of a trained one: the nearest in the Frobenius norm, layer by layer, from the factors alone.

Factors in, factors out; which rank a layer gets is ranks.py's, and what files hold adapter_files.py's.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_edu import lowrank

from .adapter_files import Adapter, Factors
from .ranks import choose_ranks


def singular_values(factors: Factors) -> list[Tensor]:
    """Those of ΔW = s · BA, (min(m, n, r),) float64, largest first; one entry for each expert, else a single one.

    BA is never made (`lowrank.product_singular_values`). What lies below the rounding of that SVD is 0.
    Raises ValueError for factors with entries that aren't finite.
    """
    found = []
    for left, right in factors.products():
        S = abs(factors.scaling) * lowrank.product_singular_values(left, right)
        found.append(torch.where(S > len(S) * torch.finfo(S.dtype).eps * S[0], S, 0.0))
    return found


def pooled(spectra: list[Tensor]) -> Tensor:
    """√Σ σ_k² over the experts of a stack, which share one rank: cutting at r keeps the first r of it."""
    return torch.stack(spectra).square().sum(0).sqrt()


def resize(
    adapter: Adapter | Mapping[str, Factors],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    parameters: int | None = None,
) -> dict[str, Factors]:
    """Layer → the factors of rank r' whose s · BA is the truncation of the old one to r' singular values.

    No other update of that rank is nearer to ΔW (Eckart & Young 1936; `lowrank.truncate`). Exactly one rule chooses
    the ranks, as in `choose_ranks`: `rank`, or `energy`, `error` for each layer by itself, or `parameters` for all
    together. A layer whose rank comes out as 0 is left out. Stacked experts share a rank; it is chosen over all of
    them.

    The scaling s = alpha / r (alpha / √r where rank_stabilised) stays what it was, so that alpha falls with the rank.
    B' = U√Σ and A' = √Σ Vᵀ share the singular values Σ of BA between them, in the dtypes of the old factors.
    Biases in lora_B, dropout, kernels and kinds are kept. Raises ValueError for factors that aren't finite, for a rule
    out of its range, and where nothing is left.
    """
    layers = adapter.layers if isinstance(adapter, Adapter) else adapter
    spectra, sides = {}, {}
    for name, factors in layers.items():
        spectra[name] = pooled(singular_values(factors))
        sides[name] = tuple(factors.experts * side for side in factors.sides)
    ranks = choose_ranks(spectra, sides, rank=rank, energy=energy, error=error, parameters=parameters)
    if not any(ranks.values()):
        cheapest = min((sum(each) for each in sides.values()), default=0)
        raise ValueError(
            f"nothing is left of the adapter: every rank would be 0 (one direction takes {cheapest} parameters or "
            "more, and of a ΔW of 0 nothing is kept)"
        )
    return {name: cut(layers[name], each) for name, each in ranks.items() if each}


def cut(factors: Factors, rank: int) -> Factors:
    """The factors whose s · BA is the truncation of the old one; s stays. rank: 1 to min(m, n, r)."""
    pairs = [lowrank.svd_of_product(left, right) for left, right in factors.products()]
    most = min(len(each.S) for each in pairs)
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be between 1 and {most} (what BA can have at most); got {rank}")
    unit = math.sqrt(rank) if factors.rank_stabilised else rank
    made = factors.with_products([lowrank.halves(each, rank) for each in pairs], factors.scaling * unit)
    return made._replace(
        lora_A=made.lora_A.to(factors.lora_A.dtype), lora_B=made.lora_B.to(factors.lora_B.dtype)
    )


def at_most(factors: Factors, rank: int) -> Factors:
    """The factors as they are, where their rank is no larger than this; else `cut`, to min(m, n) at most."""
    if rank < 1:
        raise ValueError(f"rank must be a whole number above 0; got {rank}")
    return factors if rank >= factors.rank else cut(factors, min(rank, *factors.sides))
