"""LoRA for a whole model: add it to chosen layers, merge, unmerge, take it out again.

Not for one layer (layers.py) and not for files (peft_format.py).
"""

import fnmatch
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lora_edu.text import nearest

from .checks import is_conv1d, refuse_layer, refuse_tuned
from .layers import LoRAEmbedding, LoRALinear, LoRAQuantisedLinear, MergeReport
from .quant import QuantisedLinear

Target = str | re.Pattern | type
LoRALayer = LoRALinear | LoRAEmbedding | LoRAQuantisedLinear
ALL_LINEAR = "all-linear"  # PEFT's word


def add_lora(
    model: nn.Module,
    rank: int | Mapping[Target, int],
    alpha: float | Mapping[Target, float],
    targets: Target | Iterable[Target],
    *,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    sparse: bool | None = None,
    check_tokens: bool = True,
    lora_dtype: torch.dtype | None = None,
    tied: str = "refuse",
) -> nn.Module:
    """Give LoRA to the layers that `targets` name and freeze everything else; returns the model, changed in
    place.

    A target is the end of a layer's name ("query", "0.attention.query"), a pattern ("blocks.*.query", or a
    compiled regular expression that has to match the whole name), a type of layer (nn.Linear) or "all-linear",
    which means as in PEFT every linear layer but the head that makes the logits. Each must match something.
    `rank` and `alpha` are one number, or a number for each target; a layer that several targets match belongs
    to the first. `dropout` acts in linear layers; `sparse` and `check_tokens` in embeddings (LoRAEmbedding).
    A QuantisedLinear (`quantise_model`) is adapted as it is, in four bits: QLoRA.

    An embedding whose table is also the head's (tied) is refused: with LoRA on one of the two, input and
    output would use different tables, and no single table could hold the merged one. `tied="separate"`
    accepts that: the other keeps W, whether merged or not. A tied layer that only a type or "all-linear" matches
    is left out, with a warning, where others are left.

    Raises ValueError or TypeError that names the layer and the reason; the model is then unchanged.
    """
    if tied not in ("refuse", "separate"):
        raise ValueError(f'tied must be "refuse" or "separate"; got {tied!r}')
    targets = [targets] if isinstance(targets, Target) else list(targets)
    found = find_layers(model, targets)
    if tied == "refuse":
        found = _without_tied(model, found, targets)
    for number, name in ((rank, "rank"), (alpha, "alpha")):
        if isinstance(number, Mapping) and set(number) != set(targets):
            raise ValueError(
                f"{name} must have one value for each target ({_listing(targets)}); "
                f"got values for {_listing(number)}"
            )
    of = lambda numbers, target: numbers[target] if isinstance(numbers, Mapping) else numbers

    def build(name: str, layer: nn.Module) -> LoRALayer:
        target = found[name]
        options = {"rank_stabilised": rank_stabilised, "lora_dtype": lora_dtype}
        if isinstance(layer, nn.Embedding):
            options |= {"sparse": sparse, "check_tokens": check_tokens}
            return LoRAEmbedding.from_layer(layer, of(rank, target), of(alpha, target), **options)
        kind = LoRAQuantisedLinear if isinstance(layer, QuantisedLinear) else LoRALinear
        return kind.from_layer(layer, of(rank, target), of(alpha, target), dropout, **options)

    return replace_layers(model, found, build, tied)


def replace_layers(model: nn.Module, names: Iterable[str], build, tied: str) -> nn.Module:
    """Put `build(name, layer)` in each named layer's place, everywhere it is used; all of them or none."""
    model = unwrap(model)
    refuse_tuned(model)
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        refuse_at(model, name, layer, tied)
    trainable = [name for name, each in _all_parameters(model) if each.requires_grad]
    try:
        built = {}
        for name, layer in layers.items():
            try:
                built[id(layer)] = build(name, layer)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            # Its own Parameter on the same memory, so that merging leaves the other alone.
            if tied_to(model, name):
                built[id(layer)].weight = nn.Parameter(layer.weight.data, requires_grad=False)
    except BaseException:
        _set_trainable(model, trainable)
        raise
    kept = [
        each
        for layer in lora_layers(model).values()
        for each in (layer.lora_A, layer.lora_B)
        if each.requires_grad
    ]
    model.requires_grad_(False)
    for factor in kept:
        factor.requires_grad_(True)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in built:
                setattr(parent, name, built[id(child)])
    model._trainable_before_lora = sorted({*trainable, *getattr(model, "_trainable_before_lora", ())})
    if hasattr(type(model), "resize_token_embeddings"):
        ends = (_table(model), _head(model))
        if any(layer in ends for layer in lora_layers(model).values()):
            model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)
    return model


def merge_lora(model: nn.Module, requantise: bool = False) -> dict[str, MergeReport]:
    """Merge every LoRA layer, or none if one refuses; what rounding swallowed and what it costs, by layer.

    requantise: merge quantised layers, too, each into new codes of four bits (LoRAQuantisedLinear.merge); without it
    they refuse. Raises ValueError with the layer's name and the reason.
    """
    layers, newly, reports = _some_lora(model), [], {}
    try:
        for name, layer in layers.items():
            if not layer.merged:
                newly.append(layer)
            reports[name] = (
                layer.merge(requantise) if isinstance(layer, LoRAQuantisedLinear) else layer.merge()
            )
    except ValueError as error:
        for layer in newly:
            layer.unmerge()
        raise ValueError(f"{name}: {error}") from None
    return reports


def unmerge_lora(model: nn.Module) -> None:
    """Give every layer its original weight back, bit for bit."""
    for layer in _some_lora(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module, merge: bool = False, requantise: bool = False) -> nn.Module:
    """Put the very original modules back, trainable as they were, and forget the adapter; returns the model.

    What the adapter had trained beside LoRA (modules_to_save, biases, token rows) goes back, too.
    `merge=True` leaves W + ΔW in them, and what stood beside LoRA. If one of them was tied to another layer, it is
    not afterwards. `requantise`: as in `merge_lora`.
    """
    model = unwrap(model)
    layers = _some_lora(model)
    if merge:
        merge_lora(model, requantise)
    originals = {}
    for layer in layers.values():
        if not merge:
            layer.unmerge()
        original = layer._original[0] if layer._original else _plain(layer)
        if isinstance(layer, LoRAQuantisedLinear):
            original.take(layer)
        else:
            shared = layer._original and layer.weight is not original.weight and not merge
            if shared:  # moved since, with the model
                original.weight.data = original.weight.data.to(layer.weight)
            else:
                original.weight = layer.weight
        if isinstance(layer, LoRAEmbedding):  # which may have been resized since
            original.num_embeddings, original.padding_idx = original.weight.shape[0], layer.padding_idx
        if getattr(layer, "bias", None) is not None:
            original.bias = layer.bias
        original.train(layer.training)
        originals[id(layer)] = original
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in originals:
                setattr(parent, name, originals[id(child)])
    beside = vars(model).pop("_beside_lora", None)
    if beside is not None and not merge:
        state = dict(_all_parameters(model)) | dict(model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, original in beside.originals.items():
                state[name].copy_(original)
        for name, shared in beside.untied.items():
            set_parameter(model, name, shared)
    vars(model).pop("resize_token_embeddings", None)
    if "_trainable_before_lora" in vars(model):
        _set_trainable(model, vars(model).pop("_trainable_before_lora"))
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser should get: those that require a gradient, each once."""
    return [each for each in model.parameters() if each.requires_grad]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of a model by name."""
    modules = unwrap(model).named_modules()
    return {name: each for name, each in modules if isinstance(each, LoRALayer)}


def find_layers(model: nn.Module, targets: list[Target]) -> dict[str, Target]:
    """Name → the first target that matches it, in the model's order. A target without a match is an error."""
    if not targets:
        raise ValueError(f"targets must name at least one layer; this model has {_offers(model)}")
    modules = {name: each for name, each in unwrap(model).named_modules() if name}
    if not modules:
        raise ValueError(
            f"the model is itself a {type(model).__name__}; use LoRALinear, LoRAEmbedding or "
            "LoRAQuantisedLinear.from_layer"
        )
    for target in targets:
        if not isinstance(target, Target):
            raise TypeError(f"a target must be a name, a pattern or a type of layer; got {target!r}")
    linear = [name for name in _suitable(model) if name and not isinstance(modules[name], nn.Embedding)]
    head = _head(unwrap(model))
    hits = {
        target: [name for name in linear if modules[name] is not head]
        if target == ALL_LINEAR
        else [name for name, each in modules.items() if matches(target, name, each)]
        for target in targets
    }
    for target, names in hits.items():
        if not names:
            raise ValueError(f"no layer matches {_show(target)}; {_near(model, target)}")
    return {
        name: next(t for t in targets if name in hits[t])
        for name in modules
        if any(name in h for h in hits.values())
    }


def matches(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, str):
        if any(each in target for each in "*?["):
            return fnmatch.fnmatchcase(name, target)
        return name == target or name.endswith(f".{target}")
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return isinstance(module, target)


def _without_tied(model: nn.Module, found: dict[str, Target], targets: list[Target]) -> dict[str, Target]:
    """The layers found, but for those that are tied and that no target means in particular; says which."""
    model = unwrap(model)
    named = [each for each in targets if not isinstance(each, type) and each != ALL_LINEAR]

    def left_out(name: str) -> bool:
        layer = model.get_submodule(name)
        return (
            isinstance(layer, nn.Linear | nn.Embedding)
            and not any(matches(target, name, layer) for target in named)
            and bool(tied_to(model, name))
        )

    tied = [name for name in found if left_out(name)]
    kept = {name: target for name, target in found.items() if name not in tied}
    if not tied or not kept:
        return found
    others = dict.fromkeys(other for name in tied for other in tied_to(model, name))
    warnings.warn(
        f"{_listing(tied)} left out: the weight is also {_listing(others)} (tied). Name the layer and say "
        'tied="separate" to adapt it alone',
        stacklevel=3,
    )
    return kept


def tied_to(model: nn.Module, name: str) -> list[str]:
    """Other places that hold the same weight as the layer `name`, as 'module.parameter'."""
    layer = model.get_submodule(name)
    if isinstance(layer, QuantisedLinear):
        return []

    def same(parameter: nn.Parameter) -> bool:
        if parameter is layer.weight or layer.weight.is_meta or parameter.is_meta:
            return parameter is layer.weight
        here, there = layer.weight.data_ptr(), parameter.data_ptr()
        return here == there != 0 and parameter.shape == layer.weight.shape

    return [
        f"{other}.{kind}" if other else kind
        for other, module in model.named_modules()
        if module is not layer
        for kind, parameter in module.named_parameters(recurse=False)
        if same(parameter)
    ]


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put another Parameter in the place of the one called so; whatever shares the old one keeps it."""
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, parameter)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def refuse_at(model: nn.Module, name: str, layer: nn.Module, tied: str) -> None:
    """Raise TypeError or ValueError, with the reason, unless LoRA can be added to this layer where it stands."""
    try:
        refuse_layer(layer)
    except TypeError as error:
        inside = sorted({each.rpartition(".")[2] for each in _suitable(layer)} - {""})
        hint = (
            f"; it contains {_listing(inside)}"
            if inside and not isinstance(layer, nn.MultiheadAttention)
            else ""
        )
        raise TypeError(f"{name}: {error}{hint}") from None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("the model is wrapped in DistributedDataParallel; add LoRA first, then wrap it")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"{name}: in inference nn.TransformerEncoderLayer reads this weight without calling the layer "
            "(its fast path) and LoRA is skipped; call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    others = tied_to(model, name)
    if others and tied == "refuse":
        raise ValueError(
            f"{name}.weight is also {_listing(others)} (tied): with LoRA on {name} alone, the two would no "
            "longer be the same table, nor could one table hold the merged weight. Leave it out of the "
            'targets, or say tied="separate" to adapt it alone'
        )


def _table(model: nn.Module) -> nn.Module | None:
    """The input embedding of a model of transformers; of one that has none of its own (CLIP, Wav2Vec2), None."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits: the one that transformers' models name, else `head` or `lm_head`."""
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()
    return getattr(model, "head", getattr(model, "lm_head", None))


def _resize_token_embeddings(model, new_num_tokens: int | None = None, *options, **named):
    """Stands before transformers' own while the table or the head has LoRA: that resizes W alone, or drops LoRA."""
    rows = model.get_input_embeddings().weight.shape[0]
    multiple = named.get("pad_to_multiple_of") or next(iter(options), None) or 1
    wanted = -(-(new_num_tokens or rows) // multiple) * multiple
    if wanted == rows:
        return type(model).resize_token_embeddings(model, new_num_tokens, *options, **named)
    raise RuntimeError(
        f"resize_token_embeddings({new_num_tokens}): the table or the head has LoRA, whose factors are for {rows} "
        "tokens; transformers would resize W alone. Resize first, then add_lora; remove_lora(model) leads back there"
    )


def _some_lora(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer; add_lora it first")
    return layers


def _plain(layer: LoRALayer) -> nn.Module:
    """The layer without LoRA for one that was not made from it."""
    if isinstance(layer, LoRAEmbedding):
        options = (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse)
        return nn.Embedding(layer.num_embeddings, layer.embedding_dim, *options, device="meta")
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")


def _set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    names = set(names)
    for name, parameter in _all_parameters(model):
        parameter.requires_grad_(name in names)


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Under every name that a parameter has: tied ones come several times."""
    return model.named_parameters(remove_duplicate=False)


def _suitable(model: nn.Module) -> Iterator[str]:
    for name, module in unwrap(model).named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | QuantisedLinear) or is_conv1d(module):
            yield name


def _offers(model: nn.Module) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in _suitable(model))
    return f"layers named {_listing(names)}" if names else "no linear layer and no embedding"


def _near(model: nn.Module, target: Target) -> str:
    if isinstance(target, type):
        kinds = dict.fromkeys(type(unwrap(model).get_submodule(name)).__name__ for name in _suitable(model))
        return (
            f"this model has {_listing(kinds)}"
            if kinds
            else "this model has no linear layer and no embedding"
        )
    text = target if isinstance(target, str) else target.pattern
    text = re.sub(r"[^\w.]+", "", text).strip(".")
    names = list(_suitable(model))
    ends = dict.fromkeys([name.rpartition(".")[2] for name in names] + names)
    close = dict.fromkeys(nearest(text, ends) + nearest(text.rpartition(".")[2], ends, cutoff=0.6))
    if close:
        return f"did you mean {_listing(close, ' or ')}?"
    return f"this model has {_offers(model)}"


def _listing(items: Iterable, joint: str = ", ") -> str:
    shown = [_show(each) for each in items]
    return joint.join(shown[:12]) + (f"{joint}… ({len(shown)} in all)" if len(shown) > 12 else "")


def _show(target: Target) -> str:
    if isinstance(target, type):
        return target.__name__
    return target if isinstance(target, str) else target.pattern
