"""(IA)³: learned vectors that scale keys, values and the inner activation of the MLP (Liu et al. 2022, 2205.05638).

Not for more than one task at a time: the vectors can be folded into the weights, and the model is then a plain one.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu.lora import AdapterError
from lora_edu.lora.adapter_files import PREFIX
from lora_edu.lora.checks import is_conv1d
from lora_edu.lora.inject import Target, tied_to, unwrap
from lora_edu.lora.peft_format import target_modules
from lora_edu.text import printable

from .applied import mark, refuse_second, take_off
from .places import attach, attached, detach, is_fused, linear_layers, sides

KEY = ".ia3_l"  # how PEFT calls a layer's vector


class Scale(nn.Module):
    """x (…, n) → x ⊙ l, with l = 1 at the start; the first `unscaled` numbers of x stay as they are.

    l is kept in float32 where the layer's weight is in half precision, and the product is rounded once.
    """

    def __init__(self, layer: nn.Module, on: str, unscaled: int = 0):
        super().__init__()
        self.on, self.unscaled = on, unscaled
        numbers = sides(layer)[on == "output"] - unscaled
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.vector = nn.Parameter(torch.ones(numbers, dtype=dtype, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x[..., self.unscaled :] * self.vector).to(x.dtype)
        return torch.cat([x[..., : self.unscaled], scaled], dim=-1) if self.unscaled else scaled

    def on_output(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return self(output)

    def on_input(self, layer: nn.Module, inputs: tuple) -> tuple:
        return (self(inputs[0]), *inputs[1:])

    def whole(self) -> Tensor:
        """l with a 1 for each number that stays as it is."""
        return torch.cat([self.vector.new_ones(self.unscaled), self.vector.detach()])

    def extra_repr(self) -> str:
        return f"on={self.on!r}, numbers={len(self.vector)}, unscaled={self.unscaled}"


def ia3(
    model: nn.Module,
    outputs: Target | Iterable[Target] | None = None,
    inputs: Target | Iterable[Target] | None = None,
    *,
    queries: bool = False,
) -> nn.Module:
    """Scale keys, values and the MLP's inner activation by trained vectors; returns the model, changed in place.

    In every block softmax(q (l_k ⊙ k)ᵀ) (l_v ⊙ v) and W_2 (l_ff ⊙ γ(W_1 x)) (§3.3); in an encoder and decoder the
    attention between the two has its own l_k and l_v. All l are ones at the start, so the model is then the base, bit
    for bit, and they alone are trained: L (d_k + d_v + d_ff) numbers for L blocks, d each and 4 d in TinyLM and GPT-2.

    outputs: the layers whose output is scaled, instead of those that make keys and values; inputs: those whose input is
    scaled, instead of the second matrix of each MLP; both as targets of `add_lora`, and [] for none. The model's family
    is known by the names of its layers (TinyLM, BERT, RoBERTa, DistilBERT, GPT-2, Llama, OPT, BART, T5). GPT-2 makes
    queries, keys and values in one layer, c_attn: keys and values are scaled alone, as in the paper, unless `queries`,
    with which the vector has a part for the queries too, as PEFT's always has.

    Raises ValueError for a family that isn't known (name the layers then) and for a model that has a method already,
    TypeError for a layer that isn't linear; the model is then unchanged.
    """
    refuse_second(model)
    ends = {} if outputs == [] else linear_layers(model, "keys_values", outputs, "outputs")
    starts = {} if inputs == [] else linear_layers(model, "mlp", inputs, "inputs")
    twice = [name for name in starts if name in ends]
    if twice:
        raise ValueError(
            f"{twice[0]} is among outputs and among inputs; a layer has one vector, leave it out of one"
        )
    if not ends and not starts:
        raise ValueError("outputs and inputs are both empty, so that nothing would be trained; name a layer")
    unscaled = {name: 0 if queries else _queries(layer, name) for name, layer in ends.items()}
    return _put_on(model, unscaled, list(starts))


def _queries(layer: nn.Module, name: str) -> int:
    """How many queries this layer gives before its keys and values, each of which is as wide as what it is given."""
    numbers_in, numbers_out = sides(layer)
    return numbers_out - 2 * numbers_in if is_fused(layer, name) else 0


def _put_on(model: nn.Module, unscaled: Mapping[str, int], inputs: list[str]) -> nn.Module:
    inner = unwrap(model)
    made = {
        name: Scale(inner.get_submodule(name), "output", numbers) for name, numbers in unscaled.items()
    } | {name: Scale(inner.get_submodule(name), "input") for name in inputs}
    queries = any(_queries(inner.get_submodule(name), name) > numbers for name, numbers in unscaled.items())
    mark(model, "ia3", {"outputs": list(unscaled), "inputs": inputs, "queries": queries}, _undo)
    for name, scale in made.items():
        attach(inner.get_submodule(name), "ia3", scale, before=scale.on == "input")
    return model


def _undo(model: nn.Module) -> None:
    detach(model, "ia3", Scale)


def remove_ia3(model: nn.Module) -> nn.Module:
    """Take the vectors out: the model is the one before, trainable as it was, and what was trained is lost."""
    return take_off(model, "ia3")


@torch.no_grad()
def fold_ia3(model: nn.Module) -> nn.Module:
    """Multiply the vectors into the weights and take them out; returns the model, a plain one of the same outputs.

    diag(l) W and l ⊙ b where the output is scaled, W diag(l) where the input is (§3.3: no cost in use). The product is
    made in float32 at least and rounded to the weight's dtype. There is no way back: the old weights are gone.

    Raises ValueError if a weight or bias belongs to another layer too (tied), or if a product isn't finite; the
    model is then unchanged.
    """
    folded = []
    for name, scale in attached(model, "ia3", Scale).items():
        layer = unwrap(model).get_submodule(name)
        others = tied_to(unwrap(model), name)
        if others:
            raise ValueError(
                f"{name}.weight is also {others[0]} (tied), which folding would change; use the model as it is"
            )
        across = (scale.on == "input") != is_conv1d(layer)  # l stands over the weight's columns
        vector = scale.whole()
        folded.append((layer.weight, layer.weight * (vector if across else vector[:, None])))
        if scale.on == "output" and layer.bias is not None:
            folded.append((layer.bias, layer.bias * vector))
        for parameter, product in folded[-2:]:
            if not torch.isfinite(product.to(parameter.dtype)).all():
                raise ValueError(
                    f"{name}: the folded weight must be finite in {parameter.dtype}, and isn't. Nothing was folded"
                )
    remove_ia3(model)
    for parameter, product in folded:
        parameter.copy_(product)
    return model


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors) as PEFT's IA3 stores them: l as (out, 1), or (1, in) where the input is scaled.

    PEFT has one vector for all that c_attn of GPT-2 gives: its part for the queries is 1 where they aren't scaled.
    """
    scales, inner = attached(model, "ia3", Scale), unwrap(model)
    names = set(scales)
    inputs = {name for name, scale in scales.items() if scale.on == "input"}
    targets, feedforward = _targets(inner, names, inputs)
    config = {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(is_conv1d(inner.get_submodule(name)) for name in names),
        "init_ia3_weights": True,
        "exclude_modules": None,
        "modules_to_save": None,
    }
    shape = {"input": (1, -1), "output": (-1, 1)}
    tensors = {f"{PREFIX}{name}{KEY}": scale.whole().view(shape[scale.on]) for name, scale in scales.items()}
    return config, tensors


def from_peft(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put PEFT's vectors on a model that has no method; which layers they are for is said by the tensors.

    In GPT-2's c_attn the queries' part becomes a trained one where it is another than 1. Raises AdapterError if the
    file is for another model or holds anything beside the vectors; the model is then unchanged.
    """
    refuse_second(model)
    inner, vectors, unscaled, inputs = unwrap(model), {}, {}, []
    modules, own = dict(inner.named_modules()), dict(inner.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        plain = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if (
            plain is not None
            and plain.shape == tensor.shape
            and torch.equal(plain.cpu(), tensor.to(plain.dtype))
        ):
            continue  # the base's own table, which PEFT stores too where it or the head has a vector
        if not key.startswith(PREFIX) or not key.endswith(KEY):
            raise AdapterError(
                f"the file holds {printable(key)}, which is no vector of (IA)³; it isn't supported"
            )
        name = key[len(PREFIX) : -len(KEY)]
        if name not in modules:
            raise AdapterError(f"the adapter is for another model: {printable(name)} is not in this one")
        layer = modules[name]
        if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
            raise AdapterError(
                f"{name} is a linear layer in the adapter and a {type(layer).__name__} in the model"
            )
        numbers_in, numbers_out = sides(layer)
        on_input = tuple(tensor.shape) == (1, numbers_in)
        if not on_input and tuple(tensor.shape) != (numbers_out, 1):
            raise AdapterError(
                f"{name}: its vector must be (1, {numbers_in}), for the input, or ({numbers_out}, 1); got "
                f"{tuple(tensor.shape)}"
            )
        vectors[name] = tensor.flatten()
        if on_input:
            inputs.append(name)
        else:
            queries = _queries(layer, name)
            unscaled[name] = queries if (vectors[name][:queries] == 1).all() else 0
    if not vectors:
        raise AdapterError("the file holds no vector of (IA)³")
    _put_on(model, unscaled, inputs)
    with torch.no_grad():
        for name, scale in attached(model, "ia3", Scale).items():
            scale.vector.copy_(vectors[name][scale.unscaled :])
    return model


def _targets(model: nn.Module, names: set[str], inputs: set[str]) -> tuple[list[str] | str, list[str] | str]:
    """target_modules and feedforward_modules that PEFT reads as exactly these layers.

    PEFT wants the second to be among the first, and matches it by the end of the name, whether at a dot or not.
    """
    for parts in (1, 2):
        short = lambda name, parts=parts: ".".join(name.split(".")[-parts:])
        targets, feedforward = {short(name) for name in names}, {short(name) for name in inputs}
        found = target_modules(model, names, [targets])
        read = {name for name in names if name.endswith(tuple(feedforward))}
        if isinstance(found, list) and read == inputs:
            return sorted(targets), sorted(feedforward)
    whole = target_modules(model, names, [names])
    if isinstance(whole, list) and {name for name in names if name.endswith(tuple(inputs))} == inputs:
        return whole, sorted(inputs)
    return target_modules(model, names, []), target_modules(model, inputs, [])
