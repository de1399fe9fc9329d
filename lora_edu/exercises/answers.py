"""What every chapter's checks have in common: judging one number. No exercise of its own."""

from collections.abc import Mapping


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
