"""Bottleneck adapters: two small matrices and a non-linearity after a sub-layer (Houlsby et al. 2019, 1902.00751;
Pfeiffer et al. 2020, AdapterFusion, 2005.00247).

Not LoRA's 'adapter', which is a file of factors: these are extra layers, and can't be folded into a weight.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.lora import AdapterError
from lora_edu.lora.inject import Target, unwrap
from lora_edu.text import printable

from .applied import mark, refuse_second, take_off, trained_in_place
from .places import attach, attached, detach, linear_layers, sides
from .stored import fitting, option

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
USUAL = {"houlsby": "gelu", "pfeiffer": "relu"}
START = 0.01  # standard deviation of the weights at the start (Houlsby et al., §3.6)


class Bottleneck(nn.Module):
    """h (…, d) → h + W_up f(W_down h + b_down) + b_up, with W_down (m, d) and W_up (d, m): 2 d m + d + m numbers.

    Held in float32 where the layer's weight is in half precision; the sum is rounded once.
    """

    def __init__(self, layer: nn.Module, width: int, activation: str, start: str):
        super().__init__()
        numbers, weight = sides(layer)[1], layer.weight
        kind = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.activation = activation
        self.down = nn.Linear(numbers, width, **kind)
        self.up = nn.Linear(width, numbers, **kind)
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix.weight, std=START, a=-2 * START, b=2 * START)
            nn.init.zeros_(matrix.bias)
        if start == "identity":
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        x = h.to(self.down.weight.dtype)
        return (x + self.up(ACTIVATIONS[self.activation](self.down(x)))).to(h.dtype)

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return self(output)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def bottleneck(
    model: nn.Module,
    width: int,
    placement: str = "houlsby",
    activation: str | None = None,
    *,
    start: str = "identity",
    norms: bool = False,
    attention: Target | Iterable[Target] | None = None,
    mlp: Target | Iterable[Target] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Put bottleneck adapters into every block and train them alone; returns the model, changed in place.

    width: m, the numbers inside. placement: "houlsby", an adapter after each attention (in a decoder that reads an
    encoder, after both) and one after each MLP; "pfeiffer", one after each MLP alone. Each acts on what the sub-layer's
    last linear layer gives, before it is added to the residual stream, and before dropout where there is some. It has
    2 d m + d + m numbers (§2.1), so Houlsby's placement trains 2 L (2 d m + d + m) in L blocks.
    activation: "relu", "gelu", "silu" or "tanh"; unless given, GELU in Houlsby's placement, as in its authors' code,
    and ReLU in Pfeiffer's.

    start: "identity": W_up and all biases are zero, so that the model is at first the base, bit for bit; W_down is
    N(0, 0.01²), cut at two standard deviations. "houlsby": W_up is drawn so, too, as in the paper (§3.6), and the
    adapter is only near the identity: to h of d independent numbers of variance 1 it adds σ² √(d m) / 2 to each with
    GELU, σ² √(d m / 2) with ReLU, where σ = 0.0088 is what the cut leaves: 0.9 % and 1.2 % at d = 768, m = 64.
    norms: train the scales and biases of all norms too, as Houlsby et al. do (§2.1, 2 d numbers a norm).
    attention, mlp: the layers that an adapter comes after, as targets of `add_lora`, where the model's family isn't
    known by the names of its layers. `seed` draws the start.

    AdapterFusion's adapter has more around it in BERT (it reads what the block's norm gives and a norm follows it);
    here 'pfeiffer' is the placement alone, which is what models whose norms come first have room for.

    Raises ValueError for a bad option, a family that isn't known and a model that has a method already, TypeError for a
    layer that isn't linear; the model is then unchanged.
    """
    refuse_second(model)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number above 0 (the numbers inside); got {width!r}")
    _one_of("placement", placement, USUAL)
    activation = USUAL[placement] if activation is None else activation
    _one_of("activation", activation, ACTIVATIONS)
    _one_of("start", start, ("identity", "houlsby"))
    if placement == "pfeiffer" and attention is not None:
        raise ValueError('placement="pfeiffer" has no adapter after attention; leave `attention` out')
    if not isinstance(norms, bool):
        raise ValueError(f"norms must be True or False; got {norms!r}")
    after = {"mlp": linear_layers(model, "mlp", mlp, "mlp")}
    if placement == "houlsby":
        after["attention"] = linear_layers(model, "attention", attention, "attention")
        if twice := [name for name in after["mlp"] if name in after["attention"]]:
            raise ValueError(f"{twice[0]} is among attention and among mlp; a layer has one adapter after it")
    layers = {name: layer for found in after.values() for name, layer in found.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {name: Bottleneck(layer, width, activation, start) for name, layer in layers.items()}
    options = {
        "width": width,
        "placement": placement,
        "activation": activation,
        "start": start,
        "norms": norms,
    }
    options |= {"seed": seed} | {each: list(found) for each, found in after.items()}
    mark(model, "bottleneck", options, _undo, _norms(unwrap(model)) if norms else ())
    for name, adapter in made.items():
        attach(layers[name], "bottleneck", adapter)
    return model


def _undo(model: nn.Module) -> None:
    detach(model, "bottleneck", Bottleneck)


def remove_bottleneck(model: nn.Module) -> nn.Module:
    """Take the adapters out: the model is the one before, trainable as it was, and what was trained is lost."""
    return take_off(model, "bottleneck")


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: each adapter's four tensors under its layer's name, and norms."""
    held = {
        f"{name}.{part}": each.detach()
        for name, adapter in attached(model, "bottleneck", Bottleneck).items()
        for part, each in adapter.named_parameters()
    }
    return held | {name: each.detach() for name, each in trained_in_place(model).items()}


def load(model: nn.Module, options: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put a state on a model that has no method, made with the options that its `bottleneck` had.

    Raises AdapterError if it is another model's; the model is then unchanged.
    """
    refuse_second(model)
    width, norms = option(options, "width", int), option(options, "norms", bool)
    words = {each: option(options, each, str) for each in ("placement", "activation", "start")}
    parts = ("mlp",) if words["placement"] == "pfeiffer" else ("mlp", "attention")
    named = {part: list(dict.fromkeys(option(options, part, list))) for part in parts}
    modules = dict(unwrap(model).named_modules())
    for name in [name for names in named.values() for name in names]:
        if name not in modules:
            raise AdapterError(f"the file is for another model: {printable(name)} is not in this one")
        down = tensors.get(f"{name}.down.weight")
        if down is None:
            raise AdapterError(f"the file lacks {printable(name)}.down.weight: it is incomplete")
        # Before anything is made, since a file may say any width.
        if down.dim() != 2 or len(down) != width:
            raise AdapterError(
                f"{name}.down.weight is {tuple(down.shape)}, but the options say width {width}"
            )
    exactly = {part: [re.compile(re.escape(name)) for name in names] for part, names in named.items()}
    try:
        bottleneck(model, width, norms=norms, **words, **exactly)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    wanted = state(model)
    try:
        values = fitting(wanted, tensors, wanted)
    except AdapterError:
        remove_bottleneck(model)
        raise
    for name, parameter in wanted.items():
        parameter.copy_(values[name])
    return model


def _norms(model: nn.Module) -> list[str]:
    """The scales and biases of the modules whose class says that it is a norm (LayerNorm, LlamaRMSNorm)."""
    return [
        f"{name}.{each}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for each, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1
    ]


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
