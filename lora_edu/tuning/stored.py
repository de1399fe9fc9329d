"""What a method checks before it believes a file: an option's kind, a tensor's name and shape.

Not for opening files (files.py).
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_edu.lora import AdapterError
from lora_edu.text import printable


def option(options: Mapping, name: str, kind: type):
    """The option of this name if it is of this kind; a list must hold names. Raises AdapterError."""
    value = options.get(name)
    right = type(value) is kind and (kind is not list or all(isinstance(each, str) for each in value))
    if not right:
        rule = {
            list: "a list of names",
            int: "a whole number",
            float: "a number",
            str: "a word",
            bool: "true or false",
        }[kind]
        raise AdapterError(f"the file's option {name} must be {rule}; got {printable(value)}")
    return value


def fitting(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """The file's tensors in the dtype and on the device of those that they are for.

    wanted: what the model has, by name; names: which of them the file must hold, no more and no less. Raises
    AdapterError that names the first that doesn't fit.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in wanted:
            raise AdapterError(f"the file is for another model: {printable(name)} is not in this one")
        if name not in tensors:
            raise AdapterError(f"the file lacks {printable(name)}: it is incomplete")
        here, there = tuple(wanted[name].shape), tuple(tensors[name].shape)
        if here != there:
            raise AdapterError(
                f"{name} is {there} in the file and {here} in the model: it is for another one"
            )
    strangers = [name for name in tensors if name not in set(names)]
    if strangers:
        raise AdapterError(f"the file holds {printable(strangers[0])}, which this method doesn't have")
    return {name: tensors[name].to(wanted[name]) for name in names}
