"""Rank correlation, its exact test and the paired bootstrap, against values that others print and worked by hand."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_edu.resampling import paired_bootstrap, permutation_p, rank_correlation


def test_rho_is_one_minus_six_d_squared_where_there_are_no_ties():
    """ρ = 1 − 6 Σd² / (n (n² − 1)), d the differences of ranks."""
    x, y = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
    assert rank_correlation(x, y) == pytest.approx(
        -29 / 165
    )  # the standard textbook pairs of IQ and hours: Σd² = 194
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == 1 and rank_correlation([1, 2, 3], [9, 4, 1]) == -1


def test_ties_share_the_mean_of_their_ranks():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    assert rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(
    ("x", "y", "p"),
    [
        ([1, 2, 3], [1, 2, 3], 2 / 6),  # |ρ| = 1: the order and its reverse
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 2 / 120),
        ([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], 2 / 720),
        ([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], 10 / 120),  # table for n = 5, ρ = 0.9: 0.042 one-sided
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], 12 / 720),  # table for n = 6, ρ = 0.943: 0.0083 one-sided
        (
            [1, 1, 2],
            [1, 2, 3],
            4 / 6,
        ),  # ρ = ±0.87 in four of the six, 0 where the single one is in the middle
        ([0, 0, 1, 1], [0, 0, 1, 1], 8 / 24),
        ([3, 1, 2], [1, 3, 2], 2 / 6),
    ],
)
def test_p_is_the_share_of_orders_counted_by_hand(x, y, p):
    assert permutation_p(x, y) == pytest.approx(p, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=5))
def test_p_is_what_counting_correlations_gives_and_lies_in_its_bounds(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(ValueError, match="the values are all"):
            permutation_p(x, y)
        return
    found = abs(rank_correlation(x, y))
    as_large = [abs(rank_correlation(x, order)) >= found - 1e-12 for order in permutations(y)]
    assert permutation_p(x, y) == pytest.approx(sum(as_large) / len(as_large))
    assert permutation_p(x, y) == permutation_p(y, x) == permutation_p(x, [-each for each in y])
    assert 1 / math.factorial(len(x)) <= permutation_p(x, y) <= 1


def test_p_is_a_p_over_all_orders_the_share_below_it_is_never_larger():
    """What a test promises: among all orders of y, p ≤ c holds in a share of at most c of them."""
    every = sorted(permutation_p(range(5), order) for order in permutations(range(5)))
    assert all((k + 1) / len(every) <= p + 1e-12 for k, p in enumerate(every) if every[k + 1 : k + 2] != [p])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (range(9), range(9), 'at most 8 pairs.*got 9 pairs.*permutation_type="pairings"'),
        ([1, 2], [1], "pairs, at least two of them; got 2 and 1 numbers"),
        ([1], [1], "at least two of them; got 1 and 1"),
        ([1, math.nan], [1, 2], "every number must be finite; got nan. Leave that pair out"),
        ([3, 3, 3], [1, 2, 3], "the values are all 3, which gives no order"),
        (["a", "b"], [1, 2], "two rows of numbers"),
        (3, [1, 2], "two rows of numbers"),
    ],
)
def test_bad_input_says_what_is_wrong(x, y, message):
    with pytest.raises(ValueError, match=message):
        permutation_p(x, y)


def test_the_interval_of_a_mean_is_the_one_of_its_standard_error():
    """For many pairs the percentiles are mean ± 1.96 standard errors of the differences, whatever both share."""
    generator = torch.Generator().manual_seed(3)
    shared = 5 * torch.randn(800, generator=generator)
    a = shared + 0.3 + torch.randn(800, generator=generator)
    differences = (a - shared).double()
    found = paired_bootstrap(a, shared, 4000)
    error = float(differences.std() / math.sqrt(800))
    assert found.difference == pytest.approx(float(differences.mean()))
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    half = paired_bootstrap(a, shared, 4000, level=0.5)
    assert half.high - half.low == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_a_seed_gives_the_same_interval_and_equal_differences_an_empty_one():
    a, b = [1.0, 2.0, 4.0], [0.0, 2.5, 1.0]
    assert paired_bootstrap(a, b, 500, seed=1) == paired_bootstrap(a, b, 500, seed=1)
    assert paired_bootstrap([2, 3, 4], [1, 2, 3], 100) == (1.0, 1.0, 1.0)


def test_the_two_pairs_that_can_be_worked_by_hand():
    """Differences 0 and 1: the mean is 0, 1/2, 1 in a quarter, a half, a quarter of the resamples."""
    found = paired_bootstrap([0, 1], [0, 0], 2000, level=0.4)
    assert found == (0.5, 0.5, 0.5) and paired_bootstrap([0, 1], [0, 0], 2000)[1:] == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be a whole number, 1 or more; got 0"),
        ({"seed": -1}, "seed must be a whole number, 0 or more; got -1"),
        ({"level": 95}, "level must be above 0 and below 1 .*; got 95"),
    ],
)
def test_bad_options_of_the_bootstrap(options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap([1, 2], [2, 1], **options)
