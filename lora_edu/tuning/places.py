"""Where a method acts in a transformer: the layers that end attention and MLP, keys and values, by their names.

And small modules attached to such layers by hooks, so that the model's own modules stay what they are. Not for LoRA,
which takes a layer's place (lora/inject.py).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_edu.lora.checks import is_conv1d
from lora_edu.lora.inject import Target, find_layers, unwrap


class Family(NamedTuple):
    """Ends of names, as regular expressions: the linear layer that an attention ends with, the one that an MLP ends
    with (its input is the inner activation), and those that make keys and values.

    fused: keys and values come out of one layer, behind the queries where it makes those too.
    """

    attention: str
    mlp: str
    keys_values: str
    fused: bool = False


FAMILIES = {
    "TinyLM": Family(r"attention\.output", r"mlp\.down", r"attention\.(key|value)"),
    "BERT and RoBERTa": Family(
        r"(cross)?attention\.output\.dense",
        r"layer\.\d+\.output\.dense",
        r"(cross)?attention\.self\.(key|value)",
    ),
    "DistilBERT": Family(r"attention\.out_lin", r"ffn\.lin2", r"attention\.(k|v)_lin"),
    "GPT-2": Family(
        r"(attn|crossattention)\.c_proj", r"mlp\.c_proj", r"(attn|crossattention)\.c_attn", fused=True
    ),
    "Llama, Mistral and Qwen": Family(r"self_attn\.o_proj", r"mlp\.down_proj", r"self_attn\.(k|v)_proj"),
    "OPT and BART": Family(
        r"(self|encoder)_attn\.out_proj", r"layers\.\d+\.fc2", r"(self|encoder)_attn\.(k|v)_proj"
    ),
    "T5": Family(r"(Self|EncDec)Attention\.o", r"DenseReluDense\.wo", r"(Self|EncDec)Attention\.(k|v)"),
}


def linear_layers(
    model: nn.Module, part: str, given: Target | Iterable[Target] | None, option: str
) -> dict[str, nn.Module]:
    """Name → layer, for one part of every block: "attention", "mlp" or "keys_values", as in `Family`.

    given: which layers, as `add_lora` has its targets, instead of those of the model's family; `option` is the name
    of the argument that brought them. Raises ValueError for a model of no known family, and for a target that matches
    nothing; TypeError for a layer that isn't linear, or whose hooks would not be called.
    """
    model = unwrap(model)
    if given is None:
        pattern = getattr(FAMILIES[_family(model, option)], part)
        targets: list[Target] = [_end(pattern)]
    else:
        targets = [given] if isinstance(given, Target) else list(given)
    found = {name: model.get_submodule(name) for name in find_layers(model, targets)}
    for name, layer in found.items():
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"{name}: nn.MultiheadAttention reads this weight without calling the layer, so that nothing added "
                "to its output would be seen; name another layer, or write the attention with nn.Linear"
            )
        if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
            raise TypeError(
                f"{name} must be a linear layer (nn.Linear, or Conv1D of transformers); got {type(layer).__name__}"
            )
    return found


def is_fused(layer: nn.Module, name: str) -> bool:
    """Does this layer make queries, keys and values in one product, in this order, as GPT-2's c_attn does?"""
    return is_conv1d(layer) and _end(FAMILIES["GPT-2"].keys_values).fullmatch(name) is not None


def sides(layer: nn.Module) -> tuple[int, int]:
    """(numbers in, numbers out) of a linear layer, whichever way its weight is stored."""
    return tuple(layer.weight.shape) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def attach(layer: nn.Module, name: str, module: nn.Module, before: bool = False) -> None:
    """Make `module` a part of the layer, called `name`: what the layer gives out goes through it, or with `before`
    what the layer is given."""
    layer.add_module(name, module.train(layer.training))
    # Bound methods, since those of a deep copy belong to the copy.
    if before:
        module.hook = layer.register_forward_pre_hook(module.on_input)
    else:
        module.hook = layer.register_forward_hook(module.on_output)


def attached(model: nn.Module, name: str, kind: type) -> dict[str, nn.Module]:
    """Name of the layer → the module of this kind attached to it as `name`, in the model's order."""
    layers = unwrap(model).named_modules()
    return {each: layer._modules[name] for each, layer in layers if type(layer._modules.get(name)) is kind}


def detach(model: nn.Module, name: str, kind: type) -> None:
    """Take out every module that `attach` put in under this name, and its hook."""
    for each, module in attached(model, name, kind).items():
        module.hook.remove()
        delattr(unwrap(model).get_submodule(each), name)


def _family(model: nn.Module, option: str) -> str:
    """The one family whose names this model has; ValueError where there is none or more than one."""
    modules = [name for name, _ in model.named_modules()]

    def fits(family: Family) -> bool:
        patterns = [_end(each) for each in (family.attention, family.mlp, family.keys_values)]
        hits = [[name for name in modules if pattern.fullmatch(name)] for pattern in patterns]
        makers = (model.get_submodule(name) for name in hits[2])
        return all(hits) and (not family.fused or all(is_conv1d(each) for each in makers))

    found = [name for name, family in FAMILIES.items() if fits(family)]
    if len(found) != 1:
        what = f"of {' and of '.join(found)}" if found else f"of none known here ({', '.join(FAMILIES)})"
        raise ValueError(
            f"by the names of its layers {type(model).__name__} is {what}, so say which layers are meant: give "
            f'{option} as names or ends of names, such as ["block.0.linear", "value"]; model.named_modules() lists them'
        )
    return found[0]


def _end(pattern: str) -> re.Pattern:
    return re.compile(rf"(?:.*\.)?(?:{pattern})")
