"""What the chapters' checks have in common: judging one number, asking for a function. No exercise of its own."""

import math
from collections.abc import Callable, Mapping

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


def tried(
    k: int, answer: Callable, call: str, *arguments: object, longest: int | None = None
) -> tuple[object, str]:
    """(what exercise k's function gives for these arguments, ""), or (None, what to say) where it raises something.

    call: how it reads in a sentence, "with W of 3 × 4". longest: characters of the error's message that are shown.
    """
    try:
        return answer(*arguments), ""
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:longest]}"
        return None, f"Exercise {k}: not yet: {call} it raises {told}"


def in_words(value: object) -> str:
    """What somebody returned, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of these shapes in float64, drawn anew at each call."""
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def real(value: object) -> float | None:
    """A finite number, None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def measured_merge(
    k: int, answer: Callable, shape: tuple[int, int], dtype: torch.dtype, size: float, shown: Callable = repr
) -> tuple[Tensor, Tensor, str, float | str]:
    """Exercise k's function of (W, ΔW) tried on a W of this dtype and a ΔW with ‖ΔW‖ = size · ‖W‖ in float32.

    Returns W, ΔW, how the call reads, and the number that came back, or what to say if none did. `shown` puts what
    came back into words.
    """
    W, update = (each.float() for each in normal(shape, shape))
    W = W.to(dtype)
    update *= size * W.float().norm() / update.norm()
    before, call = W.clone(), f"with W in {str(dtype)[6:]} and ‖ΔW‖ = {size:g} ‖W‖"
    got, problem = tried(k, answer, call, W, update.clone())
    if problem:
        return W, update, call, problem
    if not torch.equal(W, before):
        return W, update, call, f"Exercise {k}: not yet: it changes the weight it was given."
    wrong = f"Exercise {k}: not yet: {call} the answer is one number; got {shown(got)}."
    return W, update, call, wrong if real(got) is None else real(got)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and, up to rounding in float32, the same numbers."""
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-7)
