"""AdaLoRA: ΔW = P Λ Q in the form of an SVD, and a budget of singular values shared by all matrices.

Zhang et al. 2023, arXiv 2303.10512. Not `lora_edu.lora.choose_ranks`, which allots ranks after a full tuning.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.lora import AdapterError
from lora_edu.lora.adapter_files import CONFIG, PREFIX
from lora_edu.lora.checks import check_alpha, is_conv1d
from lora_edu.lora.inject import Target, unwrap
from lora_edu.lora.peft_format import target_modules
from lora_edu.text import check_rank, printable

from ..applied import refuse_second, take_off
from ..places import attached, detach, sides
from . import updates

KEYS = {"Q": ".lora_A", "singular": ".lora_E", "P": ".lora_B"}  # how PEFT calls them


class AdaLoRA(nn.Module):
    """h = W x + s P Λ Q x: P (out, r), Λ's diagonal `singular` (r, 1), Q (r, in).

    s = alpha / (r₀ + 10⁻⁵) with the rank r₀ at the start, as in the authors' code and PEFT; r is r₀, or less where a
    file has fewer triplets.
    """

    def __init__(self, layer: nn.Module, start_rank: int, alpha: float, rank: int | None = None):
        super().__init__()
        check_alpha(alpha)
        into, out = sides(layer)
        self.start_rank, self.alpha = start_rank, alpha
        rank = start_rank if rank is None else rank
        options = {"dtype": updates.wide(layer), "device": layer.weight.device}
        self.P = nn.Parameter(torch.randn(out, rank, **options) * 0.02)
        self.singular = nn.Parameter(torch.zeros(rank, 1, **options))
        self.Q = nn.Parameter(torch.randn(rank, into, **options) * 0.02)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.start_rank + 1e-5)

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        low = F.linear(inputs[0].to(self.Q.dtype), self.Q * self.singular)
        return output + (self.scaling * F.linear(low, self.P)).to(output.dtype)

    @torch.no_grad()
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """s P Λ Q, in the weight's shape."""
        return updates.as_stored(layer, self.scaling * self.P @ (self.singular * self.Q))

    def extra_repr(self) -> str:
        return f"rank={len(self.singular)}, alpha={self.alpha:g}"


def adalora(model: nn.Module, rank: int, alpha: float, targets: Target | Iterable[Target]) -> nn.Module:
    """Add P Λ Q of rank `rank` to the layers that `targets` name and freeze all else; returns the model.

    ΔW = s P Λ Q (eq. 3), with P and Q normal of deviation 0.02 and Λ = 0, so that the model starts as the base: `rank`
    is the paper's r at the start, above what is wanted in the end (1.5 times in the paper). Train with `orthogonality`
    in the loss and a `RankBudget` that takes singular values away; without them this is LoRA with a diagonal. Linear
    layers only, as in PEFT: the paper's importance is a mean over a vector, and of a table's Q most entries have no
    gradient.

    Raises ValueError or TypeError that names the layer and the reason; the model is then unchanged.
    """
    why = "the importance of a direction is a mean over Q's row, most of which has no gradient in a table"
    made = {}
    for name, layer in updates.chosen(model, targets, "adalora", why).items():
        try:
            made[name] = AdaLoRA(layer, check_rank(rank, layer.weight.shape), alpha)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return updates.put_on(model, "adalora", {}, made, _undo)


def orthogonality(model: nn.Module) -> Tensor:
    """How far P's columns and Q's rows are from orthonormal, to be added to the loss with a weight (0.1 to 0.5 in use).

    The mean over all P and Q of ‖PᵀP − 1‖_F and ‖QQᵀ − 1‖_F, as in the authors' code and PEFT; eq. 4 of the paper has
    the squares. ValueError where AdaLoRA isn't on the model.
    """
    parts = []
    for layer in _some(model).values():
        for rows in (layer.P.T, layer.Q):
            parts.append((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).norm())
    return torch.stack(parts).mean()


class RankBudget:
    """Takes singular values away while AdaLoRA trains, the least important of all matrices first (§3.2, §3.3).

    Of each number w in P, Λ and Q with gradient g: I = |w g|, Ī ← β₁ Ī + (1 − β₁) I (sensitivity), U ← β₂ U + (1 − β₂)
    |I − Ī| (uncertainty), and Ī U is its importance (eq. 8 to 11). A triplet's is that of its singular value and the
    means over its column of P and its row of Q. The budget b counts triplets in all matrices: r₀ a matrix for
    `start` steps, target_rank a matrix for the last `end` of `steps`, and between b = b₁ + (b₀ − b₁)
    (1 − (t − start)/(steps − start − end))³ (eq. 12). Every `every` steps all but the b most important triplets have
    their singular value set to 0; until the end a zero may grow again. The target itself is reached at the step
    steps − end, so that `end` must be at least 1 for it.

    `follow` has an optimizer call `after_step` itself. What was weighed is kept here alone, so a run that goes on
    from a checkpoint of `fit` weighs anew.
    """

    def __init__(
        self,
        model: nn.Module,
        target_rank: float,
        steps: int,
        *,
        start: int = 0,
        end: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ):
        self.layers = _some(model)
        self.first = sum(len(layer.singular) for layer in self.layers.values())
        self.last = round(target_rank * len(self.layers))
        if not 1 <= self.last <= self.first:
            raise ValueError(
                f"target_rank must leave between 1 and {self.first} singular values in all {len(self.layers)} "
                f"matrices; {target_rank} leaves {self.last}"
            )
        if min(start, end) < 0 or not start < steps - end or every < 1:
            raise ValueError(
                "start and end, 0 or more, must leave some of the steps between them, and every must be at least 1; "
                f"got steps = {steps}, start = {start}, end = {end}, every = {every}"
            )
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} must be between 0 and 1; got {beta!r}")
        self.steps, self.start, self.end, self.every = steps, start, end, every
        self.betas = beta1, beta2
        self.sensitivity: dict[Tensor, Tensor] = {}
        self.uncertainty: dict[Tensor, Tensor] = {}
        self.kept = {
            name: torch.ones(len(layer.singular), dtype=torch.bool) for name, layer in self.layers.items()
        }
        self.done = 0

    def follow(self, optimizer: torch.optim.Optimizer) -> "RankBudget":
        """Have every step of `optimizer` followed by `after_step`, counted from 0; returns the budget."""
        optimizer.register_step_post_hook(lambda *_: self.after_step(self.done))
        return self

    def budget(self, step: int) -> int:
        """How many singular values may be other than 0 after this step, counted from 0."""
        if step <= self.start:
            return self.first
        left = max(0.0, 1 - (step - self.start) / (self.steps - self.end - self.start))
        return int((self.first - self.last) * left**3 + self.last)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """To be called after the optimiser's step, while the gradients are still there."""
        self.done = step + 1
        settled = self.steps - self.end
        if step < settled:
            self._weigh()
        if step == settled or (self.start < step < settled and step % self.every == 0):
            self._choose(self.budget(step))
        if step >= settled or (self.start < step and step % self.every == 0):
            for name, layer in self.layers.items():
                layer.singular.masked_fill_(~self.kept[name][:, None].to(layer.singular.device), 0.0)

    def ranks(self) -> dict[str, int]:
        """Layer → how many singular values it keeps, 0 too; those above 0 are a pattern of ranks for `add_lora`."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    def importance(self) -> dict[str, Tensor]:
        """Layer → the importance of each of its triplets, (r,), as of the last step that was weighed."""
        score = lambda each: self.sensitivity[each] * self.uncertainty[each]
        return {
            name: score(layer.singular)[:, 0] + score(layer.P).mean(0) + score(layer.Q).mean(1)
            for name, layer in self.layers.items()
        }

    def _weigh(self) -> None:
        beta1, beta2 = self.betas
        for layer in self.layers.values():
            for each in (layer.P, layer.singular, layer.Q):
                if each.grad is None:
                    raise RuntimeError(
                        "AdaLoRA's numbers have no gradient; call after_step before zero_grad()"
                    )
                now = (each * each.grad).abs()
                zero = torch.zeros_like(now)
                mean = beta1 * self.sensitivity.get(each, zero) + (1 - beta1) * now
                self.sensitivity[each] = mean
                self.uncertainty[each] = (
                    beta2 * self.uncertainty.get(each, zero) + (1 - beta2) * (now - mean).abs()
                )

    def _choose(self, budget: int) -> None:
        scores = self.importance()
        away = self.first - budget
        if away > 0:
            threshold = torch.cat([each.cpu() for each in scores.values()]).kthvalue(away).values
            self.kept = {name: each.cpu() > threshold for name, each in scores.items()}


def _some(model: nn.Module) -> dict[str, AdaLoRA]:
    layers = attached(model, "adalora", AdaLoRA)
    if not layers:
        raise ValueError("the model has no AdaLoRA; adalora(model, rank, alpha, targets) puts it on")
    return layers


def _undo(model: nn.Module) -> None:
    detach(model, "adalora", AdaLoRA)


def remove_adalora(model: nn.Module) -> nn.Module:
    """Take AdaLoRA off: the model is the one before, bit for bit and trainable as it was."""
    return take_off(model, "adalora")


def fold_adalora(model: nn.Module) -> nn.Module:
    """Add s P Λ Q to each W: a plain model of the same outputs; see `updates.fold` for what is raised."""
    return updates.fold(model, "adalora", AdaLoRA)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) as PEFT stores AdaLoRA; triplets whose singular value is 0 are written too.

    ValueError where layers have other alphas or ranks at the start, which the format has no place for.
    """
    layers, inner = _some(model), unwrap(model)
    if len({(layer.start_rank, layer.alpha) for layer in layers.values()}) > 1:
        raise ValueError(
            "PEFT's format has one init_r and one lora_alpha for all layers; some here have others"
        )
    first = next(iter(layers.values()))
    ends = {name.rpartition(".")[2] for name in layers}
    fewer = {
        f"{name}.lora_E": [index < len(layer.singular) for index in range(layer.start_rank)]
        for name, layer in layers.items()
        if len(layer.singular) < layer.start_rank
    }
    config = {
        "peft_type": "ADALORA",
        "init_r": first.start_rank,
        "target_r": first.start_rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules(inner, set(layers), [ends, set(layers)]),
        "fan_in_fan_out": any(is_conv1d(inner.get_submodule(name)) for name in layers),
        "rank_pattern": fewer or None,
        "total_step": 1,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    parts = ((name, layer, kind, key) for name, layer in layers.items() for kind, key in KEYS.items())
    return config, {f"{PREFIX}{name}{key}": getattr(layer, kind) for name, layer, kind, key in parts}


def from_peft(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put PEFT's AdaLoRA on a model that has no method, each layer with as many triplets as the file has of it.

    Raises AdapterError, with the reason, if the file doesn't fit; the model is then unchanged.
    """
    refuse_second(model)
    rank, alpha = config.get("init_r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{CONFIG}: init_r must be a whole number above 0; got {printable(rank)}")
    end = KEYS["singular"]
    names = [key[len(PREFIX) : -len(end)] for key in tensors if key.startswith(PREFIX) and key.endswith(end)]
    wanted = {f"{PREFIX}{name}{key}" for name in names for key in KEYS.values()}
    odd = next(iter(set(tensors) ^ wanted), None)
    if odd is not None or not names:
        raise AdapterError(
            f"{printable(odd or end)}: the file must hold lora_A, lora_E and lora_B of each layer, no more"
        )
    modules = dict(unwrap(model).named_modules())
    strangers = [name for name in names if name not in modules]
    if strangers:
        raise AdapterError(f"the adapter is for another model: {printable(strangers[0])} is not in this one")
    made = {}
    try:
        for name, layer in updates.chosen(model, names, "adalora", "the file must be damaged").items():
            held = {kind: tensors[f"{PREFIX}{name}{key}"] for kind, key in KEYS.items()}
            made[name] = _from_tensors(name, layer, rank, alpha, held)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    return updates.put_on(model, "adalora", {}, made, _undo)


def _from_tensors(
    name: str, layer: nn.Module, rank: int, alpha: float, held: Mapping[str, Tensor]
) -> AdaLoRA:
    made = AdaLoRA(layer, rank, alpha, len(held["singular"]))
    with torch.no_grad():
        for kind, tensor in held.items():
            mine = getattr(made, kind)
            if mine.shape != tensor.shape or len(made.singular) > rank:
                raise ValueError(
                    f"{name}: {KEYS[kind][1:]} must be {tuple(mine.shape)} of at most {rank} triplets; got "
                    f"{tuple(tensor.shape)}"
                )
            mine.copy_(tensor)
    return made
