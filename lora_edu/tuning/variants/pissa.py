"""PiSSA: LoRA that starts with W's own largest singular directions (Meng et al. 2024, arXiv 2404.02948).

Not another forward: h = W_res x + s BA x is LoRA's, and only where it starts is new.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu import lowrank
from lora_edu.lora import AdapterError, lora_layers
from lora_edu.lora.adapter_files import adapter_of
from lora_edu.lora.inject import Target, unwrap
from lora_edu.lora.peft_format import check_fits
from lora_edu.text import printable

from .start import add_started
from .updates import rows_out, wide


def pissa(
    model: nn.Module,
    rank: int | Mapping[Target, int],
    alpha: float | Mapping[Target, float],
    targets: Target | Iterable[Target],
    **options,
) -> nn.Module:
    """Add LoRA with A = √(Σ_r/s) V_rᵀ and B = U_r √(Σ_r/s) of W = UΣVᵀ, and freeze the rest of W; returns the model.

    W_res = W − s BA, frozen, stands in W's place (eq. 2 to 4), so that W_res + s BA = W to rounding; PEFT divides by s
    too. For an embedding W is the table as (d, V), so A (V, r) and B (d, r) are its halves. The exact SVD, in float32
    at least. rank, alpha, options: as in `add_lora`.

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


def from_peft(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put PEFT's LoRA with init_lora_weights="pissa" on a model: the file's A and B, and W_res from the model's own W.

    That is what PEFT does when it opens the file. Raises AdapterError, with the reason, if the file doesn't fit; the
    model is then unchanged. The other way goes by `as_lora` and `save_adapter`, for which no W has to be decomposed.
    """
    adapter = adapter_of(dict(config) | {"init_lora_weights": True}, tensors)
    check_fits(unwrap(model), adapter)
    beside = next(iter((*adapter.whole, *adapter.rows)), None)
    if beside is not None:
        raise AdapterError(f"the file holds {printable(beside)} beside PiSSA, which isn't supported")
    ranks = {name: factors.rank for name, factors in adapter.layers.items()}
    alphas = {name: factors.alpha for name, factors in adapter.layers.items()}
    one = next(iter(adapter.layers.values()))
    options = {"dropout": one.dropout, "rank_stabilised": one.rank_stabilised}
    try:
        pissa(model, ranks, alphas, list(ranks), **options)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(adapter.layers[name].lora_A)
            layer.lora_B.copy_(adapter.layers[name].lora_B)
    return model
