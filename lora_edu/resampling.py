"""What chance alone would give: an exact permutation test for rank correlation, a bootstrap over pairs.

Not for fitting or for large samples: scipy.stats has those.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch

from lora_edu.text import whole_number

MOST_PAIRS = 8  # 8! = 40 320 orders, a tenth of a second


class Interval(NamedTuple):
    """A mean difference and the bounds between which it lies in that share of the resamples."""

    difference: float
    low: float
    high: float


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's ρ of n pairs: the correlation of the ranks; equal values share the mean of their ranks.

    1: both sort the pairs alike; −1: the other way round. Spearman, not Kendall: it is the ordinary correlation, of
    ranks, so that ties need no correction of their own and a picture of rank against rank shows what is correlated;
    Kendall's advantage, a better approximation of p in small samples, is nothing to an exact test. Spearman (1904),
    'The proof and measurement of association between two things'.
    Raises ValueError for fewer than two pairs, unequal lengths, a number that isn't finite, and values that are all
    equal, which have no order.
    """
    x, y = _centred_ranks(x, y)
    return _product(x, y) / math.sqrt(_product(x, x) * _product(y, y))


def permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """The two-sided p of `rank_correlation(x, y)`: the share of all n! ways to pair x with y whose |ρ| is as large.

    Exact, ties included, and nothing is drawn: the way at hand counts too, so that p is at least 1 / n!; without ties
    the reversed order has the same |ρ|, and p is at least 2 / n! (0.0028 for six pairs). It asks whether two orders
    have anything to do with each other where the n things are all there are; it says nothing of other things.
    Fisher (1935), The Design of Experiments, §21. Raises ValueError as `rank_correlation` does, and above 8 pairs.
    """
    x, y = _centred_ranks(x, y)
    if len(x) > MOST_PAIRS:
        raise ValueError(
            f"at most {MOST_PAIRS} pairs: their {math.factorial(MOST_PAIRS)} orders are all tried; got {len(x)} pairs. "
            'Draw some of the orders: scipy.stats.permutation_test with permutation_type="pairings"'
        )
    # Whole numbers throughout: a ρ that is equal is found equal.
    found = abs(_product(x, y))
    as_large = sum(abs(_product(x, order)) >= found for order in permutations(y))
    return as_large / math.factorial(len(x))


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], draws: int = 10_000, seed: int = 0, *, level: float = 0.95
) -> Interval:
    """(mean of a − b, low, high): where the mean difference lies in `level` of the resamples of the pairs.

    a, b: what two systems got for the same n questions. Pairs are drawn together, n at a time with replacement, so that
    what makes a question hard for both falls out of the difference. The bounds are the percentiles (1 ± level) / 2 of
    `draws` such means, which are a little too narrow for few pairs (below about twenty).
    Efron & Tibshirani (1993), An Introduction to the Bootstrap, §13.3. Raises ValueError as `rank_correlation` does,
    equal values apart, and for a level outside (0, 1).
    """
    a, b = _numbers(a, b)
    draws, seed = whole_number("draws", draws), whole_number("seed", seed, least=0)
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1 (0.95: 95 % of the resamples); got {level!r}")
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    n, generator = len(differences), torch.Generator().manual_seed(seed)
    means, most = [], max(1, 1_000_000 // len(differences))  # a million indices at a time: 8 MB
    for start in range(0, draws, most):
        rows = min(most, draws - start)
        means.append(differences[torch.randint(n, (rows, n), generator=generator)].mean(1))
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(bounds).tolist()
    return Interval(float(differences.mean()), low, high)


def _numbers(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Both as floats; ValueError unless they are pairs of finite numbers."""
    try:
        x, y = [float(each) for each in x], [float(each) for each in y]
    except (TypeError, ValueError):
        raise ValueError(
            "x and y must be two rows of numbers, such as lists or one-dimensional tensors"
        ) from None
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x and y must be pairs, at least two of them; got {len(x)} and {len(y)} numbers")
    if bad := [each for each in (*x, *y) if not math.isfinite(each)]:
        raise ValueError(f"every number must be finite; got {bad[0]}. Leave that pair out")
    return x, y


def _centred_ranks(x: Sequence[float], y: Sequence[float]) -> tuple[list[int], list[int]]:
    """Twice the ranks less their mean, so that they are whole numbers with sum 0: [-1, 1] for two pairs."""
    ranks = []
    for values in _numbers(x, y):
        times, below, rank = Counter(values), 0, {}
        if len(times) == 1:
            raise ValueError(f"the values are all {values[0]:g}, which gives no order to correlate")
        for value in sorted(times):
            rank[value] = 2 * below + times[value] - len(values)
            below += times[value]
        ranks.append([rank[value] for value in values])
    return ranks[0], ranks[1]


def _product(x: Sequence[int], y: Sequence[int]) -> int:
    return sum(map(int.__mul__, x, y))
