"""DoRA: W = m V / ‖V‖, the magnitudes m trained beside a LoRA on V (Liu et al. 2024, arXiv 2402.09353).

Not LoRA with a scale on its output: the length of every row of W + s BA is divided out first, so that A and B turn W's
rows and m alone says how long they are.
"""

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.lora import AdapterError
from lora_edu.lora.adapter_files import PREFIX, Factors, adapter_of
from lora_edu.lora.checks import check_alpha, is_conv1d
from lora_edu.lora.functional import delta
from lora_edu.lora.inject import Target, unwrap
from lora_edu.lora.peft_format import check_fits, ranks_and_alphas, same_values, target_modules
from lora_edu.text import check_rank, printable

from ..applied import refuse_second, take_off
from ..places import attached, detach
from . import updates

KEY = ".lora_magnitude_vector"  # how PEFT calls m


class DoRA(nn.Module):
    """h = m / ‖W + s BA‖ ⊙ (W x + s BA x) + b, with the norm of each row held constant in the backward pass.

    lora_A (r, in), lora_B (out, r), magnitude m (out,). Of an embedding the rows are the d numbers of a token's vector,
    as W is (d, V) there: lora_A (V, r), lora_B (d, r), m (d,), each norm over the whole vocabulary.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, rank_stabilised: bool = False):
        super().__init__()
        check_alpha(alpha)
        out, into = updates.rows_out(layer).shape
        self.embedding = isinstance(layer, nn.Embedding)
        self.rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
        options = {"dtype": updates.wide(layer), "device": layer.weight.device}
        self.lora_A = nn.Parameter(torch.zeros((into, rank) if self.embedding else (rank, into), **options))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, **options))
        if self.embedding:
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(self.lengths(layer))
        if not self.magnitude.all():
            row = int((self.magnitude == 0).nonzero()[0])
            raise ValueError(f"row {row} of W is zero, so it has no direction to keep; leave this layer out")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def _turned(self, layer: nn.Module) -> Tensor:
        """W + s BA: (out, in)."""
        A = self.lora_A.T if self.embedding else self.lora_A
        return updates.rows_out(layer).to(self.lora_B.dtype) + delta(self.lora_B, A, self.scaling)

    @torch.no_grad()
    def lengths(self, layer: nn.Module) -> Tensor:
        """‖W + s BA‖ of each row, (out,): a constant for the gradient, as §4.3 of the paper proposes and PEFT does."""
        return self._turned(layer).norm(dim=1)

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Wx + b becomes DoRA's output; at the start, where m is the norm itself, bit for bit the same."""
        scale = self.magnitude / self.lengths(layer)
        if self.embedding:
            low = F.embedding(inputs[0], self.lora_A)
        else:
            low = F.linear(inputs[0].to(self.lora_A.dtype), self.lora_A)
        bias = getattr(layer, "bias", None)
        base = output if bias is None else output - bias
        added = (scale - 1) * base + scale * F.linear(self.scaling * low, self.lora_B)
        return output + added.to(output.dtype)

    @torch.no_grad()
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """m ⊙ (W + s BA) / ‖W + s BA‖ − W in the weight's shape."""
        turned = self._turned(layer)
        merged = (self.magnitude / self.lengths(layer))[:, None] * turned
        return updates.as_stored(layer, merged - updates.rows_out(layer))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def dora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Target | Iterable[Target],
    *,
    rank_stabilised: bool = False,
) -> nn.Module:
    """Add DoRA to the layers that `targets` name and freeze all else; returns the model, changed in place.

    W' = m ⊙ (W + s BA) / ‖W + s BA‖ (eq. 5), where the norm is of each row of W (out, in): the paper writes W as (d, k)
    with inputs of d numbers and says column. m starts as W's own norms and B as zero, so the model starts as the base,
    bit for bit. Trained are r (in + out) + out numbers a layer. The norm gets no gradient (§4.3). targets,
    rank_stabilised: as in `add_lora`; linear layers and embeddings. A step makes W + s BA once more than LoRA does. No
    dropout: PEFT's would hide inputs from W's own part too.

    Raises ValueError or TypeError that names the layer and the reason, such as a row of W that is zero; the model is
    then unchanged.
    """
    made = {}
    for name, layer in updates.chosen(model, targets, "dora").items():
        try:
            made[name] = DoRA(layer, check_rank(rank, layer.weight.shape), alpha, rank_stabilised)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return updates.put_on(model, "dora", {}, made, _undo)


def _undo(model: nn.Module) -> None:
    detach(model, "dora", DoRA)


def remove_dora(model: nn.Module) -> nn.Module:
    """Take DoRA off: the model is the one before, bit for bit and trainable as it was."""
    return take_off(model, "dora")


def fold_dora(model: nn.Module) -> nn.Module:
    """Put W' in W's place, so that the model costs what a plain one costs; see `updates.fold` for what is raised."""
    return updates.fold(model, "dora", DoRA)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) as PEFT stores LoRA with use_dora. ValueError if only some layers use rsLoRA."""
    layers, inner = attached(model, "dora", DoRA), unwrap(model)
    stabilised = {layer.rank_stabilised for layer in layers.values()}
    ends = {name.rpartition(".")[2] for name in layers}
    config = {
        "peft_type": "LORA",
        "use_dora": True,
        **ranks_and_alphas(layers),
        "use_rslora": stabilised == {True},
        "target_modules": target_modules(inner, set(layers), [ends, set(layers)]),
        "fan_in_fan_out": any(is_conv1d(inner.get_submodule(name)) for name in layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = {}
    for name, layer in layers.items():
        A, B = (
            ("lora_embedding_A", "lora_embedding_B")
            if layer.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {
            f"{PREFIX}{name}.{A}": layer.lora_A.T if layer.embedding else layer.lora_A,
            f"{PREFIX}{name}.{B}": layer.lora_B,
            f"{PREFIX}{name}{KEY}": layer.magnitude,
        }
    return config, tensors


def from_peft(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put PEFT's DoRA on a model that has no method; ranks and alphas are those of each layer's tensors and patterns.

    Raises AdapterError, with the reason, if the file doesn't fit; the model is then unchanged.
    """
    refuse_second(model)
    inner = unwrap(model)
    magnitudes = {key[len(PREFIX) : -len(KEY)]: each for key, each in tensors.items() if key.endswith(KEY)}
    rest = {key: each for key, each in tensors.items() if not key.endswith(KEY)}
    adapter = adapter_of(dict(config) | {"use_dora": False}, rest)
    check_fits(inner, adapter)
    own = dict(inner.named_parameters(remove_duplicate=False))
    for name, tensor in adapter.whole.items():
        if name not in own or own[name].shape != tensor.shape or not same_values(own[name], tensor):
            raise AdapterError(f"the file holds {printable(name)} beside DoRA, which isn't supported")
    if adapter.rows:
        raise AdapterError(
            f"the file holds rows of {printable(next(iter(adapter.rows)))}, which isn't supported"
        )
    if magnitudes.keys() != adapter.layers.keys():
        odd = next(iter(magnitudes.keys() ^ adapter.layers.keys()))
        raise AdapterError(
            f"{printable(odd)} must have lora_A, lora_B and a magnitude vector; the file is incomplete"
        )
    made = {}
    try:
        updates.chosen(model, list(adapter.layers), "dora")
        for name, factors in adapter.layers.items():
            made[name] = _from_factors(name, inner.get_submodule(name), factors, magnitudes[name])
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    if any(each.dropout for each in adapter.layers.values()):
        warnings.warn("the file's lora_dropout acts in training only and isn't taken over", stacklevel=3)
    return updates.put_on(model, "dora", {}, made, _undo)


def _from_factors(name: str, layer: nn.Module, factors: Factors, magnitude: Tensor) -> DoRA:
    made = DoRA(layer, factors.rank, factors.alpha, factors.rank_stabilised)
    if magnitude.shape != made.magnitude.shape:
        raise ValueError(
            f"{name}: the magnitude vector must be ({len(made.magnitude)},); got {tuple(magnitude.shape)}"
        )
    with torch.no_grad():
        for mine, stored in zip(
            (made.lora_A, made.lora_B, made.magnitude),
            (factors.lora_A, factors.lora_B, magnitude),
            strict=True,
        ):
            mine.copy_(stored)
    return made
