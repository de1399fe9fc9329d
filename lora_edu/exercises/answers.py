"""What the chapters' checks have in common: judging one number, asking for a function. No exercise of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor


def judge(
    k: int,
    answer: object,
    right: float,
    mistakes: Mapping[float, str],
    hint: str,
    why: str,
    tolerance: float = 1e-3,
) -> str:
    """What to tell someone who gave this number for exercise k; within the relative tolerance it is right."""
    if answer is None:
        return f"Exercise {k}: not attempted yet. Hint: {hint}"
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return f"Exercise {k}: the answer is one number; got {answer!r}."
    if abs(value - right) <= tolerance * abs(right):
        return f"Exercise {k}: right. {why}"
    for mistake, diagnosis in mistakes.items():
        if abs(value - mistake) <= tolerance * abs(mistake):
            return f"Exercise {k}: not yet: {diagnosis}"
    size = "too small" if value < right else "too large"
    return f"Exercise {k}: not yet: {value:.12g} is {size}. Hint: {hint}"


def no_function(k: int, answer: object, arguments: str, hint: str) -> str | None:
    """What to tell someone whose answer to exercise k is open, or not a function of these arguments; else None."""
    if answer is None:
        return f"Exercise {k}: not attempted yet. Hint: {hint}"
    if not callable(answer):
        return f"Exercise {k}: the answer is a function of ({arguments}); got {answer!r}."
    return None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and, up to rounding in float32, the same numbers."""
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-7)
