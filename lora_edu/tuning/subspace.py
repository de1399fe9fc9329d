"""Training in a random subspace: θ = θ₀ + P z, with z the only thing trained (Li et al. 2018, Aghajanyan et al. 2020).

P has one number ±1/√n in each row, so it is never stored as a matrix. Not for low rank: a ΔW made here has full rank.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_edu.lora.checks import refuse_tuned
from lora_edu.lora.inject import unwrap


def sparse_projection(size: int, dimension: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(dial, factor) of a random P (size, dimension) with orthonormal columns and one number in each row.

    Row i of P holds factor[i] in column dial[i] and zeros: every parameter follows one of `dimension` dials, with a
    random sign. dial (size,) int32; factor (size,) float32: ± 1/√n for a dial with n parameters. Each dial has
    ⌊size/dimension⌋ parameters or one more, chosen by a random permutation, so columns don't overlap, PᵀP = 1 and
    ‖P z‖ = ‖z‖ up to rounding, whatever z is. Eight bytes a parameter.

    Li et al. use a dense, a sparse and a Fastfood P, Aghajanyan et al. Fastfood (Le et al. 2013), whose columns are
    orthonormal on average and whose cost is some D log d. One number a row costs D, and its columns are orthonormal
    exactly; this is the count sketch (Charikar et al. 2002) with dials of equal size. At dimension = size
    P is a permutation with signs, and training z is full tuning. What it does worse than a dense P: two parameters
    on one dial can never both be set at will.

    The random numbers are a hash of seed and i (splitmix64), so P is the same with every version and on every machine.
    """
    if not 1 <= dimension <= size:
        raise ValueError(
            f"dimension must be between 1 and {size} (the number of parameters moved); got {dimension}"
        )
    drawn = _hash(size, seed)
    dial = np.empty(size, dtype=np.int32)
    dial[np.argsort(drawn, kind="stable")] = np.arange(size) % dimension
    on_a_dial = size // dimension + (dial < size % dimension)
    sign = 1.0 - 2.0 * (drawn & np.uint64(1)).astype(np.float64)
    return torch.from_numpy(dial), torch.from_numpy(sign / np.sqrt(on_a_dial)).float()


def project(z: Tensor, dial: Tensor, factor: Tensor) -> Tensor:
    """P z: (dimension,) → (size,), or some rows of it for slices of `dial` and `factor`; differentiable in z."""
    return _Project.apply(z, dial, factor)


def adjoint(gradient: Tensor, dial: Tensor, factor: Tensor, dimension: int) -> Tensor:
    """Pᵀ g: (size,) → (dimension,). It is the gradient of z where g is that of P z."""
    return gradient.new_zeros(dimension).index_add_(0, dial, gradient.flatten() * factor)


class _Project(torch.autograd.Function):
    """By hand, since autograd's own gradient of a look-up needs the dials as int64 and keeps what was looked up."""

    @staticmethod
    def forward(ctx, z: Tensor, dial: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(dial, factor)
        ctx.dimension = len(z)
        return z.index_select(0, dial) * factor

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return adjoint(gradient, *ctx.saved_tensors, ctx.dimension), None, None


class Subspace(nn.Module):
    """What `subspace` leaves in a model as `model.subspace`: z, and how the chosen parameters follow it.

    z: the trainable vector (dimension,), zero at the start. `size`: how many numbers follow it, D. `spans`: their
    names, each with (start, shape) in the long vector θ.
    """

    def __init__(self, parameters: dict[str, Tensor], dimension: int, seed: int):
        super().__init__()
        ends = np.cumsum([0] + [parameter.numel() for parameter in parameters.values()])
        self.spans = {
            name: (int(start), parameter.shape)
            for start, (name, parameter) in zip(ends, parameters.items(), strict=False)
        }
        self.size, self.dimension, self.seed = int(ends[-1]), dimension, seed
        dial, factor = sparse_projection(self.size, dimension, seed)
        device = next(iter(parameters.values())).device
        self.register_buffer("dial", dial.to(device), persistent=False)
        self.register_buffer("factor", factor.to(device), persistent=False)
        self.z = nn.Parameter(torch.zeros(dimension, device=device))

    def rows(self, name: str) -> Tensor:
        """The part of P z that moves the parameter `name`, in its shape; differentiable in z."""
        start, shape = self.spans[name]
        part = slice(start, start + shape.numel())
        return project(self.z, self.dial[part], self.factor[part]).view(shape)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Name → ΔW, for every parameter that follows z."""
        return {name: self.rows(name) for name in self.spans}

    def extra_repr(self) -> str:
        return f"dimension={self.dimension}, size={self.size}, seed={self.seed}"


class _Moved(nn.Module):
    """θ₀ → θ₀ + its part of P z."""

    def __init__(self, subspace: Subspace, name: str):
        super().__init__()
        self.name = name
        self._subspace = (subspace,)  # in a tuple: z belongs to the model once, not to each of its layers

    def forward(self, original: Tensor) -> Tensor:
        return original + self._subspace[0].rows(self.name).to(original.dtype)


def subspace(
    model: nn.Module, dimension: int, seed: int = 0, parameters: str | Iterable[str] = "all"
) -> Subspace:
    """Let the chosen parameters of `model` follow θ = θ₀ + P z and freeze the rest; returns what holds z.

    parameters: "all", or names or the beginnings of names, such as "blocks" or ["blocks.0.attention", "head.weight"].
    Train with an optimiser over `[handle.z]` (the only parameter left that requires a gradient); P follows
    from `seed`.

    The model is changed in place by `torch.nn.utils.parametrize`: wherever a layer reads its weight, it reads
    θ₀ + P z, so functions that go past `model.forward` (the loss reads `model.hidden` and `model.head.weight`)
    work and gradients reach z by autograd alone. A step holds θ₀, θ and P (4, 4 and 8 bytes a parameter), and one
    weight's gradient at a time; no gradient or Adam state of D numbers. Each reading computes θ anew: some 1 % of a
    training step, but felt in `generate`; `remove_subspace(model, merge=True)` leaves plain weights.

    Raises ValueError that names what doesn't fit; the model is then unchanged.
    """
    if hasattr(model, "subspace"):
        raise ValueError("the model has a `subspace` already; remove_subspace(model) takes it out")
    refuse_tuned(unwrap(model))
    chosen = _choose(model, parameters)
    handle = Subspace(chosen, dimension, seed)
    handle._trainable_before = [name for name, each in model.named_parameters() if each.requires_grad]
    owners = {name.rpartition(".")[0] for name in chosen}
    handle._order = {owner: list(model.get_submodule(owner)._parameters) for owner in owners}
    model.requires_grad_(False)
    for name in chosen:
        owner, _, kind = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), kind, _Moved(handle, name))
    model.subspace = handle
    return handle


def remove_subspace(model: nn.Module, merge: bool = False) -> nn.Module:
    """Give the model its plain parameters back, trainable as they were; with `merge` they hold θ₀ + P z.

    Not for one of two deep copies: torch keeps the parametrised class of a layer in common, and the other would break.
    """
    handle = getattr(model, "subspace", None)
    if not isinstance(handle, Subspace):
        raise ValueError("the model has no subspace to remove")
    deltas = handle.deltas() if merge else {}
    for name in handle.spans:
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.remove_parametrizations(module, kind, leave_parametrized=False)
        if merge:
            getattr(module, kind).data.add_(deltas[name])
        for each in handle._order[owner]:  # as they stood: torch has put this one last
            if each in module._parameters:
                module._parameters[each] = module._parameters.pop(each)
    del model.subspace
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in handle._trainable_before)
    return model


def _choose(model: nn.Module, parameters: str | Iterable[str]) -> dict[str, Tensor]:
    """The parameters named, sorted: P then doesn't depend on the order in which a model was put together."""
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    everything = dict(model.named_parameters())
    matches = {
        each: [name for name in everything if each == "all" or name == each or name.startswith(f"{each}.")]
        for each in wanted
    }
    for each, names in matches.items():
        if not names:
            tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in everything))
            raise ValueError(f"no parameter is named {each} or {each}.…; this model has {tops}")
    chosen = {
        name: everything[name] for name in sorted({name for names in matches.values() for name in names})
    }
    if not chosen:
        raise ValueError('parameters must name at least one; "all" takes every one')
    names_of: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(value), []).append(name)
    for name, value in chosen.items():
        if len(names_of[id(value)]) > 1:
            shared = " and ".join(names_of[id(value)])
            raise ValueError(f"{shared} are one tied parameter, which would come apart; leave {name} out")
        if not value.is_floating_point():
            raise ValueError(f"{name} holds {value.dtype}, not floating-point numbers; leave it out")
    return chosen


def _hash(size: int, seed: int) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): (size,) uint64 that look random, the same everywhere."""
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be a whole number from 0 to 2**31 − 1; got {seed!r}")
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
