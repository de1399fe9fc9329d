"""Which method of this room is on a model, what it was given, and how it comes off. One at a time.

Not for training and not for files (files.py). LoRA and subspaces have their own marks; they are refused beside these.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from lora_edu.lora import lora_layers
from lora_edu.lora.inject import unwrap

HELD_BY = "tuning_method"  # the attribute of the model


class Applied(NamedTuple):
    """What `mark` leaves on a model as `model.tuning_method`.

    name: of the method's function ("ia3"). options: plain values (numbers, strings, lists) with which
    `METHOD(other_model, **options)` makes the same shapes. undo: a function of the module, not a closure, that is given
    the model and takes out what the method put in; so a deep copy of the model comes off by itself. trainable: the
    parameters that required a gradient before.
    """

    name: str
    options: dict
    undo: Callable[[nn.Module], None]
    trainable: list[str]


def applied(model: nn.Module) -> str | None:
    """The name of the method on the model, or None."""
    record = vars(unwrap(model)).get(HELD_BY)
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
    if (name := applied(model)) is not None:
        raise ValueError(f"the model has {name} already; remove_{name}(model) takes it off")
    if lora_layers(model):
        raise ValueError("the model has LoRA already; remove_lora(model) takes it off")
    if hasattr(unwrap(model), "subspace"):
        raise ValueError("the model has a `subspace` already; remove_subspace(model) takes it out")


def mark(model: nn.Module, name: str, options: dict, undo: Callable[[nn.Module], None]) -> None:
    """Write down that `name` is on the model, freeze all that is in it now, and remember what was trainable.

    A method calls this when all its checks are done and its new modules are built, and then puts them in: they are
    what is trained. Raises as `refuse_second` does; the model is then unchanged.
    """
    refuse_second(model)
    model = unwrap(model)
    named = list(model.named_parameters(remove_duplicate=False))
    trainable = [each for each, parameter in named if parameter.requires_grad]
    setattr(model, HELD_BY, Applied(name, dict(options), undo, trainable))
    model.requires_grad_(False)


def take_off(model: nn.Module, name: str) -> nn.Module:
    """Undo the method `name` and give every parameter its requires_grad back; returns the model.

    Raises ValueError where another method or none is on the model.
    """
    record = _record(model, name)
    inner = unwrap(model)
    record.undo(inner)
    delattr(inner, HELD_BY)
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
    return vars(unwrap(model))[HELD_BY]
