"""LoRA-XS: an r × r matrix between W's own singular vectors (Bałazy et al. 2024, arXiv 2405.17604).

Not PiSSA, which trains both factors and takes them out of W: here they are frozen and W stays whole.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu import lowrank
from lora_edu.lora import AdapterError
from lora_edu.lora.checks import check_alpha
from lora_edu.lora.inject import Target, unwrap
from lora_edu.text import check_rank

from ..applied import take_off
from ..places import attached, detach
from ..stored import fitting, option
from . import updates


class LoRAXS(nn.Module):
    """h = W x + s B R A x with A = Σ_r V_rᵀ (r, in) and B = U_r (out, r) of W = UΣVᵀ frozen, and R (r, r) trained.

    Of an embedding W is the table as (d, V). The sign of each pair of singular vectors, which is free, is the one with
    which the largest number of U's column is above 0.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        check_alpha(alpha)
        self.rank, self.alpha = rank, alpha
        found = lowrank.svd(updates.rows_out(layer).to(updates.wide(layer)))
        U, S, Vh = found.U[:, :rank], found.S[:rank], found.Vh[:rank]
        sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()[0]
        self.register_buffer("A", (sign * S)[:, None] * Vh, persistent=False)
        self.register_buffer("B", (U * sign).contiguous(), persistent=False)
        self.register_buffer("S", S.clone(), persistent=False)
        self.R = nn.Parameter(torch.zeros(rank, rank, dtype=S.dtype, device=S.device))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if isinstance(layer, nn.Embedding):
            low = F.embedding(inputs[0], self.A.T)
        else:
            low = F.linear(inputs[0].to(self.R.dtype), self.A)
        return output + F.linear(F.linear(self.scaling * low, self.R), self.B).to(output.dtype)

    @torch.no_grad()
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """s B R A, in the weight's shape."""
        return updates.as_stored(layer, self.scaling * self.B @ self.R @ self.A)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def lora_xs(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Target | Iterable[Target],
    *,
    std: float = 1e-5,
    seed: int = 0,
) -> nn.Module:
    """Train an r × r matrix R for each layer that `targets` name, and freeze all else; returns the model.

    W + s U_r R Σ_r V_rᵀ (§3; the paper writes x W, so that its A = UΣ is the side of the input), with s = alpha / r: r²
    numbers a layer, however large W is. R starts normal with `std`, 1e-5 as in the paper, so that the model starts near
    the base; std=0 starts there exactly, and R has a gradient all the same. The exact SVD, in float32 at least. Linear
    layers and embeddings. PEFT has no LoRA-XS; `save_tuned` keeps R and the r singular values by which `load_tuned`
    knows W again.

    Raises ValueError or TypeError that names the layer and the reason; the model is then unchanged.
    """
    if not math.isfinite(std) or std < 0:
        raise ValueError(f"std must be a finite number, 0 or more; got {std!r}")
    made = _made(updates.chosen(model, targets, "lora_xs"), rank, alpha)
    generator = torch.Generator().manual_seed(seed)
    for module in made.values():
        module.R.data += std * torch.randn(module.R.shape, generator=generator).to(module.R)
    return _put_on(model, made, rank, alpha)


def _made(layers: Mapping[str, nn.Module], rank: int, alpha: float) -> dict[str, LoRAXS]:
    made = {}
    for name, layer in layers.items():
        try:
            made[name] = LoRAXS(layer, check_rank(rank, layer.weight.shape), alpha)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return made


def _put_on(model: nn.Module, made: Mapping[str, LoRAXS], rank: int, alpha: float) -> nn.Module:
    options = {"layers": list(made), "rank": rank, "alpha": float(alpha)}
    return updates.put_on(model, "lora_xs", options, made, _undo)


def _undo(model: nn.Module) -> None:
    detach(model, "lora_xs", LoRAXS)


def remove_lora_xs(model: nn.Module) -> nn.Module:
    """Take LoRA-XS off: the model is the one before, bit for bit and trainable as it was."""
    return take_off(model, "lora_xs")


def fold_lora_xs(model: nn.Module) -> nn.Module:
    """Add s B R A to each W, so that the model costs what a plain one costs; see `updates.fold` for what is raised."""
    return updates.fold(model, "lora_xs", LoRAXS)


def state(model: nn.Module) -> dict[str, Tensor]:
    """R and the singular values of W by which it is known again, for each layer."""
    layers = attached(model, "lora_xs", LoRAXS).items()
    return {f"{name}.{kind}": getattr(each, kind).detach() for name, each in layers for kind in ("R", "S")}


def load(model: nn.Module, options: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put a state on a model that has no method. Raises AdapterError if it is for another W; the model is unchanged."""
    names, rank, alpha = (
        option(options, *each) for each in (("layers", list), ("rank", int), ("alpha", float))
    )
    modules = dict(unwrap(model).named_modules())
    missing = next((name for name in names if name not in modules), None)
    if missing is not None or not names:
        raise AdapterError(f"the file is for another model: {missing} is not in this one")
    try:
        made = _made(updates.chosen(model, names, "lora_xs"), rank, alpha)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    wanted = {f"{name}.{kind}": getattr(each, kind) for name, each in made.items() for kind in ("R", "S")}
    values = fitting(wanted, tensors, wanted)
    for name, each in made.items():
        if not torch.allclose(values[f"{name}.S"], each.S, rtol=1e-3, atol=0):
            raise AdapterError(
                f"{name} has other singular values than the W that R was trained on: another base"
            )
        each.R.data.copy_(values[f"{name}.R"])
    return _put_on(model, made, rank, alpha)
