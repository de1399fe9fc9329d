"""Which method of this room is on a model, what it was given, and how it comes off. One at a time.

Not for training and not for files (files.py). LoRA and subspaces have their own marks; they are refused beside these.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_edu.lora import lora_layers
from lora_edu.lora.checks import TUNED_BY, refuse_tuned
from lora_edu.lora.inject import unwrap


class Applied(NamedTuple):
    """What `mark` leaves on a model as `model.tuning_method`.

    name: of the method's function ("ia3"). options: plain values (numbers, strings, lists) with which
    `METHOD(other_model, **options)`, or for bitfit and lora_xs their module's `load`, makes the same shapes; empty or
    partial for variants of LoRA whose files say it all (dora, vera, adalora). undo: a function of the
    module, not a closure, that is given the model and takes out what the method put in; so a deep copy of the model
    comes off by itself. trainable: the parameters that required a gradient before. originals: the values before of the
    model's own parameters that are trained where they are.
    """

    name: str
    options: dict
    undo: Callable[[nn.Module], None]
    trainable: list[str]
    originals: dict[str, Tensor]


def applied(model: nn.Module) -> str | None:
    """The name of the method on the model, or None."""
    record = vars(unwrap(model)).get(TUNED_BY)
    return record.name if isinstance(record, Applied) else None


def applied_options(model: nn.Module) -> dict:
    """The options of the method on the model; ValueError where there is none."""
    return dict(_record(model, None).options)


def refuse_second(model: nn.Module) -> None:
    """Raise ValueError or TypeError unless a method can be put on this model: nothing may be on it already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module; got {type(model).__name__}")
    if isinstance(unwrap(model), nn.parallel.DistributedDataParallel):
        raise TypeError(
            "the model is wrapped in DistributedDataParallel; put the method on first, then wrap it"
        )
    refuse_tuned(unwrap(model))
    if lora_layers(model):
        raise ValueError("the model has LoRA already; remove_lora(model) takes it off")
    if hasattr(unwrap(model), "subspace"):
        raise ValueError("the model has a `subspace` already; remove_subspace(model) takes it out")


def mark(
    model: nn.Module,
    name: str,
    options: dict,
    undo: Callable[[nn.Module], None] | None = None,
    trained: Iterable[str] = (),
) -> None:
    """Write down that `name` is on the model, freeze all that is in it now, and remember what was trainable.

    A method calls this when all its checks are done and its new modules are built, and then puts them in: they are
    what is trained. `trained`: names of the model's own parameters that the method trains where they are; they stay
    trainable and `take_off` gives them their values back. Raises as `refuse_second` does; the model is then unchanged.
    """
    refuse_second(model)
    model = unwrap(model)
    named = list(model.named_parameters(remove_duplicate=False))
    trainable = [each for each, parameter in named if parameter.requires_grad]
    parameters = dict(named)
    originals = {each: parameters[each].detach().clone() for each in trained}
    setattr(model, TUNED_BY, Applied(name, dict(options), undo, trainable, originals))
    model.requires_grad_(False)
    for each in originals:
        parameters[each].requires_grad_(True)


def remark(model: nn.Module, **changes) -> None:
    """Change what is written down of the method on the model, as when it is folded: name, options or undo."""
    setattr(unwrap(model), TUNED_BY, _record(model, None)._replace(**changes))


def check_applied(model: nn.Module, name: str) -> None:
    """Raise ValueError unless the method `name` is on the model."""
    if applied(model) != name:
        raise ValueError(f"the model has {applied(model) or 'nothing'} on it, not {name}")


def trained_in_place(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that its method trains where they are, by name."""
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in _record(model, None).originals}


def take_off(model: nn.Module, name: str, keep: bool = False) -> nn.Module:
    """Undo the method `name` and give every parameter its requires_grad back; returns the model.

    What was trained where it stands gets its old value back, unless `keep`. Raises ValueError where another method or
    none is on the model.
    """
    record = _record(model, name)
    inner = unwrap(model)
    if record.undo is not None:
        record.undo(inner)
    if not keep:
        with torch.no_grad():
            for each, parameter in trained_in_place(model).items():
                parameter.copy_(record.originals[each])
    delattr(inner, TUNED_BY)
    for each, parameter in inner.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(each in record.trainable)
        if not parameter.requires_grad:
            parameter.grad = None
    return model


def _record(model: nn.Module, name: str | None) -> Applied:
    there = applied(model)
    if there is None:
        raise ValueError(f"the model has no {name or 'method of lora_edu.tuning'} to take off")
    if name not in (None, there):
        raise ValueError(f"the model has {there}, not {name}; remove_{there}(model) takes it off")
    return vars(unwrap(model))[TUNED_BY]
