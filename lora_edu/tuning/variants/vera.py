"""VeRA: one random pair A, B for all layers, and two trained vectors a layer (Kopiczko et al. 2023, arXiv 2310.11454).

Not a LoRA of its own in each layer: A and B are never trained, and r may be above a layer's sides.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.lora import AdapterError
from lora_edu.lora.adapter_files import PREFIX
from lora_edu.lora.checks import is_conv1d
from lora_edu.lora.inject import Target, unwrap
from lora_edu.lora.peft_format import target_modules
from lora_edu.text import check_rank, printable

from ..applied import applied_options, refuse_second, take_off
from ..places import attached, detach, sides
from . import updates

A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"  # PEFT's names
D_END, B_END = ".vera_lambda_d", ".vera_lambda_b"


class Shared(nn.Module):
    """A (r, widest in) and B (widest out, r): one of it stands under every layer, which takes its part of both."""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)


class VeRA(nn.Module):
    """h = W x + b ⊙ B (d ⊙ A x): d (r,) and b (out,) are trained, the first in columns and out rows of A and B used."""

    def __init__(self, layer: nn.Module, shared: Shared, d_start: float = 0.1):
        super().__init__()
        self.into, self.out = sides(layer)
        self.shared = shared
        options = {"dtype": shared.A.dtype, "device": shared.A.device}
        self.d = nn.Parameter(torch.full((len(shared.A),), d_start, **options))
        self.b = nn.Parameter(torch.zeros(self.out, **options))

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        low = self.d * F.linear(inputs[0].to(self.d.dtype), self.shared.A[:, : self.into])
        return output + (self.b * F.linear(low, self.shared.B[: self.out])).to(output.dtype)

    @torch.no_grad()
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """diag(b) B diag(d) A, in the weight's shape."""
        made = (self.b[:, None] * self.shared.B[: self.out]) @ (
            self.d[:, None] * self.shared.A[:, : self.into]
        )
        return updates.as_stored(layer, made)

    def extra_repr(self) -> str:
        return f"rank={len(self.d)}, numbers={len(self.d) + len(self.b)}"


def vera(
    model: nn.Module, rank: int, targets: Target | Iterable[Target], *, d_start: float = 0.1, seed: int = 0
) -> nn.Module:
    """Train d (r,) and b (out,) of each layer that `targets` name, with A and B shared; returns the model.

    h = W x + Λ_b B Λ_d A x (eq. 2). A and B are Kaiming-uniform and frozen, drawn by `seed` as PEFT draws them
    (projection_prng_key) in the size of the largest layer, of which a smaller one takes the first columns and rows. b
    starts at 0, so that the model starts as the base, and d at 0.1 (§3.3). Trained are L r + Σ out numbers for L
    layers, so r costs next to nothing and is often above the layers' sides (256 in the paper); a step costs what LoRA
    of that rank costs.

    Linear layers only: in a table's place A would be (r, V), a random vector for each token. Raises ValueError or
    TypeError that names the layer and the reason; the model is then unchanged.
    """
    why = "a table has one input for each token, so that A would be a random vector a token"
    layers = updates.chosen(model, targets, "vera", why)
    rank = check_rank(rank, next(iter(layers.values())).weight.shape, bounded=False)
    if not math.isfinite(d_start) or d_start == 0:
        raise ValueError(
            f"d_start must be a finite number other than 0 (b would get no gradient); got {d_start!r}"
        )
    into, out = (max(each) for each in zip(*map(sides, layers.values()), strict=True))
    generator = torch.Generator().manual_seed(seed)
    A, B = (_kaiming(shape, generator) for shape in ((rank, into), (out, rank)))
    return _put_on(model, layers, A, B, d_start, seed)


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform with variance 2 / columns, in float32 on the CPU, as PEFT draws it."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _put_on(
    model: nn.Module, layers: Mapping[str, nn.Module], A: Tensor, B: Tensor, d_start: float, seed: int
) -> nn.Module:
    first = next(iter(layers.values()))
    shared = Shared(*(each.to(first.weight.device, updates.wide(first)) for each in (A, B)))
    made = {name: VeRA(layer, shared, d_start) for name, layer in layers.items()}
    return updates.put_on(model, "vera", {"seed": seed}, made, _undo)


def _undo(model: nn.Module) -> None:
    detach(model, "vera", VeRA)


def remove_vera(model: nn.Module) -> nn.Module:
    """Take VeRA off: the model is the one before, bit for bit and trainable as it was."""
    return take_off(model, "vera")


def fold_vera(model: nn.Module) -> nn.Module:
    """Add Λ_b B Λ_d A to each W: a plain model of the same outputs; see `updates.fold` for what is raised."""
    return updates.fold(model, "vera", VeRA)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) as PEFT stores VeRA with save_projection: A and B too, once."""
    layers, inner = attached(model, "vera", VeRA), unwrap(model)
    shared = next(iter(layers.values())).shared
    ends = {name.rpartition(".")[2] for name in layers}
    config = {
        "peft_type": "VERA",
        "r": len(shared.A),
        "target_modules": target_modules(inner, set(layers), [ends, set(layers)]),
        "projection_prng_key": applied_options(model)["seed"],
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": any(is_conv1d(inner.get_submodule(name)) for name in layers),
        "bias": "none",
        "modules_to_save": None,
        "init_weights": True,
    }
    tensors = {A_KEY: shared.A, B_KEY: shared.B}
    for name, layer in layers.items():
        tensors |= {f"{PREFIX}{name}{D_END}": layer.d, f"{PREFIX}{name}{B_END}": layer.b}
    return config, tensors


def from_peft(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put PEFT's VeRA on a model that has no method; A and B are the file's, or drawn anew where it has none.

    Raises AdapterError, with the reason, if the file doesn't fit; the model is then unchanged.
    """
    refuse_second(model)
    inner = unwrap(model)
    rank, seed = config.get("r"), config.get("projection_prng_key", 0)
    if type(rank) is not int or rank < 1 or type(seed) is not int:
        raise AdapterError(
            f"r and projection_prng_key must be whole numbers; got {printable(rank)}, {printable(seed)}"
        )
    own = {A_KEY, B_KEY}
    names = [
        key[len(PREFIX) : -len(B_END)] for key in tensors if key.endswith(B_END) and key.startswith(PREFIX)
    ]
    wanted = {f"{PREFIX}{name}{end}" for name in names for end in (D_END, B_END)}
    odd = next(iter((set(tensors) - own) ^ wanted), None)
    if odd is not None or not names:
        what = "lacks" if odd in wanted else "holds"
        raise AdapterError(
            f"the file {what} {printable(odd or B_END)}: it must have two vectors for each layer, no more"
        )
    modules = dict(inner.named_modules())
    for name in names:
        layer = modules.get(name)
        if layer is None:
            raise AdapterError(f"the adapter is for another model: {printable(name)} is not in this one")
        if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
            raise AdapterError(
                f"{name} is a linear layer in the adapter and a {type(layer).__name__} in the model"
            )
        out = sides(layer)[1]
        for end, length in ((D_END, rank), (B_END, out)):
            shape = tuple(tensors[f"{PREFIX}{name}{end}"].shape)
            if shape != (length,):
                raise AdapterError(
                    f"{name}: {end[1:]} must be ({length},); got {shape}: it is for another model"
                )
    layers = {name: modules[name] for name in names}
    into, out = (max(each) for each in zip(*map(sides, layers.values()), strict=True))
    if own <= tensors.keys():
        A, B = tensors[A_KEY], tensors[B_KEY]
        if (
            A.ndim != 2
            or B.ndim != 2
            or (len(A), B.shape[1]) != (rank, rank)
            or A.shape[1] < into
            or len(B) < out
        ):
            raise AdapterError(
                f"vera_A and vera_B must be at least ({rank}, {into}) and ({out}, {rank}); got {tuple(A.shape)}, "
                f"{tuple(B.shape)}"
            )
    elif own & tensors.keys() or config.get("save_projection", True):
        raise AdapterError(
            "the file lacks vera_A or vera_B, which save_projection says it has: it is incomplete"
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        A, B = (_kaiming(shape, generator) for shape in ((rank, into), (out, rank)))
    try:
        updates.chosen(model, names, "vera")
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    _put_on(model, layers, A, B, 0.1, seed)
    with torch.no_grad():
        for name, layer in attached(model, "vera", VeRA).items():
            layer.d.copy_(tensors[f"{PREFIX}{name}{D_END}"])
            layer.b.copy_(tensors[f"{PREFIX}{name}{B_END}"])
    return model
