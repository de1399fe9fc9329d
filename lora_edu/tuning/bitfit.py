"""BitFit: train the bias terms and nothing else (Ben Zaken et al. 2021, arXiv 2106.10199).

Not for models without biases: the method moves what is there and adds nothing (Llama's linear layers have none).
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora_edu.lora.inject import Target, find_layers, unwrap

from .applied import mark, refuse_second, take_off, trained_in_place
from .stored import fitting, option


def bitfit(
    model: nn.Module,
    targets: Target | Iterable[Target] | None = None,
    *,
    head: Target | Iterable[Target] | None = None,
) -> nn.Module:
    """Train the bias terms of `model` and freeze everything else; returns the model, changed in place.

    A bias term is a parameter whose name ends in `bias`: those of linear layers and those of layer norms (§3, and the
    paper's b_q, b_k, b_v, b_m1 … b_m3, b_LN1, b_LN2). T5's table of relative positions, `relative_attention_bias`, is
    an embedding, and none. Nothing is added where a layer has no bias, since the paper trains what the pre-trained
    model has. In TinyLM all linear layers of the blocks and all norms have one, the head and the embedding don't: for
    L blocks of width d that is L · 11 d + d numbers, 6 700 of 2 728 000 as it ships.

    targets: the modules whose biases are trained (a target as in `add_lora`) instead of all; the paper's smallest set
    is query and the first matrix of the MLP (§4, 'fewer bias parameters'), ["query", "mlp.up"] in TinyLM and
    ["query", "intermediate.dense"] in BERT. head: modules that are trained whole beside them, as the paper trains the
    layer of the task ("classifier").

    Raises ValueError for a model or a module without a bias, and for a model that has a method already; the model is
    then unchanged.
    """
    refuse_second(model)
    inner = unwrap(model)
    if targets is None:
        biases = [name for name, _ in inner.named_parameters() if name.endswith("bias")]
    else:
        biases = []
        for name in find_layers(model, _listed(targets)):
            own = [each for each, _ in inner.get_submodule(name).named_parameters(recurse=False)]
            if not any(each.endswith("bias") for each in own):
                raise ValueError(f"{name} has no bias of its own to train; leave it out of the targets")
            biases += [f"{name}.{each}" for each in own if each.endswith("bias")]
    if not biases:
        raise ValueError(
            f"this {type(inner).__name__} has no bias terms, and BitFit trains nothing else; ia3 or add_lora train few "
            "numbers in a model without biases"
        )
    whole = []
    for name in find_layers(model, _listed(head)) if head is not None else ():
        whole += [f"{name}.{each}" for each, _ in inner.get_submodule(name).named_parameters()]
    options = {"biases": biases, "whole": whole}
    mark(model, "bitfit", options, trained=dict.fromkeys([*biases, *whole]))
    return model


def remove_bitfit(model: nn.Module, keep: bool = False) -> nn.Module:
    """Give the model its own biases back, trainable as they were; with `keep` it keeps the trained ones."""
    return take_off(model, "bitfit", keep)


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, by the parameters' names."""
    return {name: each.detach() for name, each in trained_in_place(model).items()}


def load(model: nn.Module, options: Mapping, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put a state on a model that has no method: the same parameters are trained, and take its values.

    Raises AdapterError if they aren't this model's; it is then unchanged.
    """
    refuse_second(model)
    biases, whole = (option(options, each, list) for each in ("biases", "whole"))
    values = fitting(dict(unwrap(model).named_parameters()), tensors, [*biases, *whole])
    mark(model, "bitfit", {"biases": biases, "whole": whole}, trained=values)
    for name, parameter in trained_in_place(model).items():
        parameter.data.copy_(values[name])
    return model


def _listed(targets: Target | Iterable[Target]) -> list[Target]:
    return [targets] if isinstance(targets, Target) else list(targets)
