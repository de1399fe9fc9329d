"""Adapters out of adapters: several mixed with weights, exactly, and cut back to a rank where asked.

Factors in, factors out; no base and no model is needed.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapter_files import Adapter, Factors
from .resizing import at_most


def mix(
    adapters: Sequence[tuple[Adapter | Mapping[str, Factors], float]], rank: int | None = None
) -> dict[str, Factors]:
    """Factors of Σ_i w_i ΔW_i, layer by layer, for [(adapter, w_1), …]: exact, of rank Σ r_i at most.

    The factors are concatenated, B = [w_1 s_1 B_1 | w_2 s_2 B_2 | …] and A stacked, with alpha = r, so that s = 1.
    (Adding the A's and the B's of two adapters, as is sometimes done, is not a mixture: it has B_1 A_2 in it.)
    rank: each layer is then cut to the nearest of this rank (`at_most`); a layer of lower rank stays as it is.

    Raises ValueError if there is nothing to mix, if a layer is not of one shape and kind everywhere, or if an adapter
    has more than factors (whole modules, token rows): these can be mixed only with their base.
    """
    if not adapters:
        raise ValueError("give at least one adapter to mix, as [(adapter, weight), …]")
    found: dict[str, list[tuple[Factors, float]]] = {}
    for adapter, weight in adapters:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"a weight must be a finite number; got {weight!r}")
        for name, each in _layers(adapter).items():
            found.setdefault(name, []).append((each, float(weight)))
    mixed = {name: concatenated(name, parts) for name, parts in found.items()}
    return mixed if rank is None else {name: at_most(each, rank) for name, each in mixed.items()}


def _layers(adapter: Adapter | Mapping[str, Factors]) -> Mapping[str, Factors]:
    if not isinstance(adapter, Adapter):
        return adapter
    for name, why in adapter.refused.items():
        raise ValueError(f"{name} can't be mixed: {why}")
    beside = [*adapter.whole, *adapter.rows]
    if beside:
        raise ValueError(
            f"{adapter.path} holds {beside[0]} whole beside its factors, which takes the base to mix: "
            "`lora-edu merge` does it"
        )
    return adapter.layers


def concatenated(name: str, parts: Sequence[tuple[Factors, float]]) -> Factors:
    """One layer's Σ_i w_i s_i B_i A_i as one pair of factors."""
    first = parts[0][0]
    for each, _ in parts[1:]:
        for what in ("sides", "embedding", "experts", "kernel"):
            if getattr(each, what) != getattr(first, what):
                raise ValueError(
                    f"{name} must be alike in all adapters; its {what} is {getattr(first, what)} in one and "
                    f"{getattr(each, what)} in another"
                )
    dtype = torch.float32
    for each, _ in parts:
        dtype = torch.promote_types(dtype, torch.promote_types(each.lora_A.dtype, each.lora_B.dtype))
    products = []
    for pairs in zip(*(each.products() for each, _ in parts), strict=True):
        scales = [weight * each.scaling for each, weight in parts]
        left = torch.cat([s * pair[0].to(dtype) for s, pair in zip(scales, pairs, strict=True)], dim=1)
        products.append((left, torch.cat([pair[1].to(dtype) for pair in pairs])))
    biases = [weight * each.scaling * each.bias.to(dtype) for each, weight in parts if each.bias is not None]
    return from_products(first, products)._replace(bias=sum(biases) if biases else None)


def from_products(like: Factors, products: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    """Factors of the kind of `like` with s = 1, from a pair (left, right) for each expert; see `Factors.products`."""
    rank = products[0][0].shape[1]
    return like.with_products(products, math.sqrt(rank) if like.rank_stabilised else float(rank))
