"""What a few seeds can show: the spread of runs pooled over settings, and how large a difference has to be.

Not for pairs of answers to the same questions (resampling.py). Student's t, because with a few seeds the spread itself
is not known well.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_edu.text import whole_number


class Spread(NamedTuple):
    """The standard deviation of a single run, and the degrees of freedom with which it is known."""

    deviation: float
    freedom: int


def pooled(groups: Iterable[Sequence[float]]) -> Spread:
    """The spread inside groups, each the results of one setting with several seeds.

    s² = Σ_g Σ_i (x_gi − mean_g)² / Σ_g (n_g − 1): every setting is taken to have the same spread, which a look at the
    single ones should bear out. Raises ValueError where no group has two numbers.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        centre = sum(group) / len(group)
        squares += sum((value - centre) ** 2 for value in group)
        freedom += len(group) - 1
    if freedom < 1:
        raise ValueError("the spread over seeds needs a setting with two seeds at least")
    return Spread(math.sqrt(squares / freedom), freedom)


def student(share: float, freedom: int) -> float:
    """The t that a share of Student's distribution lies below: student(0.975, 20) = 2.086.

    By halving an interval; the distribution is Abramowitz & Stegun 26.7.3 and 26.7.4. ValueError for a share outside
    (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1; got {share!r}")
    freedom = whole_number("freedom", freedom)
    if share < 0.5:
        return -student(1 - share, freedom)
    low, high = 0.0, 1.0
    while _below(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _below(t: float, freedom: int) -> float:
    """The share of Student's distribution below t ≥ 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2:
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= 2 * k / (2 * k + 1) * cosine**2
        return 0.5 + (angle + math.sin(angle) * cosine * total) / math.pi
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= (2 * k - 1) / (2 * k) * cosine**2
    return 0.5 + math.sin(angle) * total / 2


def standard_error(spread: Spread, seeds: int, others: int | None = None) -> float:
    """Of the difference of two means, over `seeds` and over `others` (as many unless given) runs."""
    return spread.deviation * math.sqrt(1 / seeds + 1 / (seeds if others is None else others))


def interval(
    ours: Sequence[float], theirs: Sequence[float], spread: Spread, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference of the means ours − theirs, its lower and upper bound), by the pooled spread of many settings."""
    difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    half = student((1 + level) / 2, spread.freedom) * standard_error(spread, len(ours), len(theirs))
    return difference, difference - half, difference + half


def detectable(spread: Spread, seeds: int, power: float = 0.8, level: float = 0.95) -> float:
    """How large a true difference of two settings must be to be seen in a share `power` of repetitions.

    Seen: the interval of `level` around the difference of two means of `seeds` runs leaves out 0. A difference δ is
    seen in about the share of repetitions in which t falls below δ / SE − t_level, so δ = (t_level + t_power) SE. That
    holds but for the noncentral t's skew, a hundredth here. ValueError for a power of less than one half.
    """
    if not 0.5 <= power < 1:
        raise ValueError(f"power must be at least 0.5 and below 1; got {power!r}")
    reach = student((1 + level) / 2, spread.freedom) + (
        student(power, spread.freedom) if power > 0.5 else 0.0
    )
    return reach * standard_error(spread, seeds)
