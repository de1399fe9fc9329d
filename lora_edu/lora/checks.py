"""What LoRA's layers refuse, and how they say it: layers it can't be added to, bad options, uses that would mislead.

Not for a whole model (inject.py) or an adapter's files (peft_format.py).
"""

import math

import torch
from torch import Tensor, nn

from .quant import QuantisedLinear

POOLED = "lora_pool"  # the child of a layer that holds its adapters, where an AdapterPool serves it
STARTED = (
    "start_A"  # the buffer of a LoRA layer that did not start at B = 0, so that W has given something up
)
TUNED_BY = "tuning_method"  # the attribute of a model that says which method of lora_edu.tuning is on it


def is_conv1d(layer: nn.Module) -> bool:
    """Is this Hugging Face's Conv1D, a linear layer whose weight is stored (in, out)?"""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") and hasattr(layer, "nf")


def _is_falcons(layer: nn.Module) -> bool:
    """Is this transformers' FalconLinear, x Wᵀ + b in two steps? The one subclass that computes what nn.Linear does."""
    kind = type(layer)
    return kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers.")


def refuse_tuned(model: nn.Module) -> None:
    """Raise ValueError if a method of lora_edu.tuning is on the model (unwrapped), with the way to take it off."""
    record = vars(model).get(TUNED_BY)
    if record is not None:
        raise ValueError(f"the model has {record.name} already; remove_{record.name}(model) takes it off")


KINDS = (nn.Linear, nn.Embedding, QuantisedLinear)  # what LoRA can be added to, beside Conv1D


def refuse_layer(layer: nn.Module, kinds: tuple[type, ...] = KINDS) -> None:
    """Raise TypeError, with the reason, unless LoRA can be added to this layer."""
    kind = type(layer).__name__
    if "unmerged_weight" in layer._buffers:  # LoRA's layers, which import this file
        raise TypeError(f"{kind} has LoRA already; remove_lora it first, or train the adapter it has")
    if POOLED in layer._modules:
        raise TypeError(
            f"{kind} is served by an AdapterPool; add the adapter to that pool, or pool.remove() it first"
        )
    conv1d = is_conv1d(layer) and nn.Linear in kinds
    family = next((each for each in kinds if isinstance(layer, each)), None)
    if family is None and not conv1d:
        quantised = "quant" in f"{type(layer).__module__}.{kind}".lower()
        problem = "is already quantised, by another library" if quantised else "is none of them"
        if isinstance(layer, QuantisedLinear):
            problem = "is quantised: LoRAQuantisedLinear.from_layer, or add_lora for any of these"
        wanted = " or ".join(map(_called, kinds))
        conv = ", or Conv1D of transformers" if nn.Linear in kinds else ""
        raise TypeError(f"LoRA can be added to {wanted}{conv}; {kind} {problem}")
    if family is not QuantisedLinear:
        _refuse_weight(layer, kind)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            "nn.MultiheadAttention reads out_proj's weight without calling the layer, so that LoRA there "
            "would never be used; adapt another layer, or write the attention with nn.Linear"
        )
    if hasattr(layer, "_hf_hook"):
        raise TypeError(
            f"{kind} carries accelerate's hooks (from device_map, or weights kept on the CPU or disk), which LoRA's "
            "layer would lose; load the model onto one device, without device_map, or call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) where its weights are all there. Then add "
            "LoRA, and dispatch the model after that"
        )
    own = vars(layer).get("forward")
    # Hooks taken off again leave the class's own forward behind, as an attribute of the layer.
    if own is not None and getattr(own, "__func__", None) is not type(layer).forward:
        raise TypeError(
            f"the forward of this {kind} was replaced on the layer itself, which LoRA would undo; add LoRA first and "
            "let the other library wrap the model after that"
        )
    if not conv1d and type(layer).forward is not family.forward and not _is_falcons(layer):
        raise TypeError(
            f"{kind} changes what {_called(family)} computes, which LoRA would undo; adapt another layer"
        )
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name, None) for name in hooks):
        raise TypeError(
            f"{kind} has hooks, which would be lost; remove them, add LoRA, then register them again"
        )


def _called(kind: type[nn.Module]) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


def _refuse_weight(layer: nn.Module, kind: str) -> None:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise TypeError(f"{kind} has no weight yet; run the model once, then add LoRA")
    if "weight" not in layer._parameters:
        raise TypeError(
            f"{kind} computes its weight (a parametrization or weight norm); remove that, then add LoRA"
        )
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(
            f"{kind} is already quantised ({weight.dtype}, {type(weight.data).__name__}); load it unquantised, and "
            "quantise_model can put it in four bits that LoRA goes onto"
        )


def check_alpha(alpha: float) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(
            f"alpha must be a finite number other than 0 (at 0 nothing is learnt); got {alpha!r}"
        )


def check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout!r}")


def check_options(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Options of an embedding that can't be had, alone or together."""
    if sparse and scale_grad_by_freq:
        raise ValueError(
            "sparse=True can't go with scale_grad_by_freq=True: torch has no sparse gradient scaled by "
            "frequency; choose one of them"
        )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0; got {max_norm!r}")


def check_merged(merged: Tensor, weight: Tensor) -> None:
    """Raise ValueError if W + ΔW has an entry that isn't finite, and say which of the two makes it so."""
    if merged.device.type != "meta" and not torch.isfinite(merged).all():
        where = "the frozen weight" if not torch.isfinite(weight).all() else "the update"
        raise ValueError(
            f"the merged weight must be finite in {merged.dtype}; {where} makes "
            f"{int((~torch.isfinite(merged)).sum())} of its entries infinite or NaN. Nothing was merged"
        )


def refuse_training(layer: nn.Module) -> None:
    """Raise RuntimeError where a merged layer is asked for gradients of its factors, which it can't give."""
    trained = layer.lora_A.requires_grad or layer.lora_B.requires_grad
    if layer.training and trained and torch.is_grad_enabled():
        raise RuntimeError(
            f"this {type(layer).__name__} is merged, so its lora_A and lora_B would get no gradient; "
            "unmerge() to train it, or call eval() (or torch.no_grad()) to use it"
        )


def refuse_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise IndexError for a token outside the vocabulary, by its number. On a GPU this waits for the result."""
    if tokens.numel() and not tokens.is_meta:
        lowest, highest = torch.stack(tokens.aminmax()).tolist()  # one wait, not two
        if lowest < 0 or highest >= vocabulary:
            bad = lowest if lowest < 0 else highest
            raise IndexError(
                f"token ids must be between 0 and {vocabulary - 1} (vocabulary size {vocabulary}); got {bad}"
            )


def check_shape(layer: nn.Module) -> None:
    """Raise RuntimeError if W no longer fits its factors: `resize_token_embeddings` changes W alone."""
    rows = layer.lora_A if isinstance(layer, nn.Embedding) else layer.lora_B
    side = 1 if getattr(layer, "transposed", False) else 0
    if layer.weight.shape[side] != len(rows):
        raise RuntimeError(
            f"the weight of this {type(layer).__name__} has {layer.weight.shape[side]} rows, its factors are for "
            f"{len(rows)}: it was resized after LoRA was added (resize_token_embeddings?). remove_lora(model), resize, "
            "then add_lora again"
        )
