"""How many numbers each way of tuning trains, adds and stores, for any shape. No memory, no FLOPs: training_step.py.

The methods are those of `lora_edu.tuning` with its defaults (and LoRA and full tuning), by the names that the recorded
runs have.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from lora_edu.counting.adapters import count
from lora_edu.counting.architectures import Architecture
from lora_edu.counting.models import architecture
from lora_edu.text import did_you_mean, whole_number

PROMPTS = ("prompt", "p-tuning")  # virtual tokens that go through all layers, as the text does
PREFIXES = ("prefix", "prefix through an MLP")  # keys and values of virtual tokens, layer by layer
SIZED = ("bottleneck", *PREFIXES, *PROMPTS)
METHODS = ("full", "lora", "bitfit", "ia3", *SIZED)


class Trained(NamedTuple):
    """What a method trains, in numbers.

    parameters: trained, in so many `tensors`. added: those of them that the model itself doesn't have (the rest are its
    own, trained where they are). stored: numbers that use needs afterwards, which its file holds.
    """

    parameters: int
    tensors: int
    added: int
    stored: int


def trained(
    model: str | Architecture,
    method: str = "full",
    rank: int | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    size: int | None = None,
) -> Trained:
    """The numbers that a method trains on a model of L layers of width d, whose keys have w numbers (d without grouped
    queries) and whose MLP is f wide inside.

    "full": all of the model's own. "lora": r (rows + columns) for each of `targets`, at `rank` r. "bitfit": every bias.
    "ia3": L (2 w + f). The others have a `size`: "bottleneck" m numbers inside, after attention and MLP of each layer
    as Houlsby et al. place them: 2 L (2 d m + d + m); "prefix" k virtual tokens: 2 L k w; "prefix through an MLP" as
    wide inside as the keys: k w + w² + w + 2 L (w² + w), stored as the prefix; "prompt" k d; "p-tuning" through its MLP
    of three layers: k d + 3 (d² + d), stored as the prompt. Raises ValueError for what doesn't fit.
    """
    model = architecture(model)
    check_method(model, method, rank, size)
    if method == "full":
        return Trained(model.parameters, model.tensor_count, 0, model.parameters)
    if method == "lora":
        counted = count(model, targets, rank)
        return Trained(counted.parameters, counted.tensors, counted.parameters, counted.parameters)
    biases = [entry for entry in model.entries if entry.name.endswith("bias")]
    if method == "bitfit":
        numbers = sum(model.copies(entry) * math.prod(entry.shape) for entry in biases)
        return Trained(numbers, sum(map(model.copies, biases)), 0, numbers)
    layers, d, w = model.layers, model.width, model.key_value_heads * model.head_width
    if method == "ia3":
        fused = has_fused_attention(model)
        numbers = layers * (2 * w + model.mlp)
        # PEFT's format has one vector for all that a fused matrix gives, with ones for the queries.
        queries = layers * model.heads * model.head_width if fused else 0
        return Trained(numbers, layers * (2 if fused else 3), numbers, numbers + queries)
    prefix = 2 * layers * w
    numbers, tensors, stored = {
        "bottleneck": lambda m: (
            2 * layers * (2 * d * m + d + m),
            8 * layers,
            2 * layers * (2 * d * m + d + m),
        ),
        "prefix": lambda k: (k * prefix, 1, k * prefix),
        "prefix through an MLP": lambda k: (k * w + w * w + w + prefix * (w + 1), 5, k * prefix),
        "prompt": lambda k: (k * d, 1, k * d),
        "p-tuning": lambda k: (k * d + 3 * (d * d + d), 7, k * d),
    }[method](size)
    return Trained(numbers, tensors, numbers, stored)


def has_fused_attention(model: Architecture) -> bool:
    """Does one matrix make queries, keys and values, as GPT-2's c_attn?"""
    return any(entry.role == "query_key_value" for entry in model.entries)


def check_method(model: Architecture, method: str, rank: int | None, size: int | None) -> None:
    """Raise ValueError unless the method is known, has the rank or size that it needs, and fits the model."""
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}{did_you_mean(str(method), METHODS)}"
        )
    if method == "lora" and rank is None:
        raise ValueError("method 'lora' needs a rank; got None")
    if method in SIZED:
        if size is None:
            what = "numbers inside" if method == "bottleneck" else "virtual tokens"
            raise ValueError(f"method {method!r} needs a size ({what}); got None")
        whole_number("size", size)
        if method != "bottleneck" and size >= model.context:
            raise ValueError(
                f"size must be below {model.context} (the positions of {model.name}, which text needs too); got {size}"
            )
    elif size is not None:
        own = "LoRA's is its rank" if method == "lora" else "there is nothing to choose"
        raise ValueError(f"method {method!r} takes no size, {own}; got {size!r}")
    if rank is not None and method not in ("full", "lora"):
        raise ValueError(
            f"rank is LoRA's; method {method!r} has {'a size' if method in SIZED else 'none'}; got {rank!r}"
        )
    if method == "bitfit" and not any(entry.name.endswith("bias") for entry in model.entries):
        raise ValueError(
            f"{model.name} has no biases, and BitFit trains nothing else; (IA)³ or LoRA train few numbers there"
        )
    if method in PREFIXES and any(entry.role == "pooler" for entry in model.entries):
        raise ValueError(
            f"{model.name} is an encoder, which keeps no keys and values from before: a prefix needs them, a prompt "
            "doesn't"
        )
