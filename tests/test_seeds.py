"""What a few seeds can show: Student's t as in the tables, spreads by hand, and a simulation of what is seen."""

import math

import pytest
import torch

from lora_edu.seeds import Spread, detectable, interval, pooled, standard_error, student


@pytest.mark.parametrize(
    "share, freedom, t",  # any table of Student's distribution
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.975, 5, 2.571), (0.95, 20, 1.725), (0.975, 60, 2.000), (0.8, 9, 0.883)],
)  # fmt: skip
def test_t_is_that_of_the_tables(share, freedom, t):
    assert student(share, freedom) == pytest.approx(t, abs=6e-4)
    assert student(1 - share, freedom) == pytest.approx(-t, abs=6e-4)
    assert student(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_the_spread_is_pooled_inside_the_groups_alone():
    assert pooled([[1.0, 3.0], [10.0, 12.0, 14.0]]) == (pytest.approx(math.sqrt((2 + 8) / 3)), 3)
    assert pooled([[1.0, 3.0], [7.0]]).freedom == 1  # one seed tells nothing of the spread
    with pytest.raises(ValueError, match="two seeds at least"):
        pooled([[1.0], [2.0]])


def test_an_interval_of_two_groups_alone_is_the_two_sample_t_interval():
    ours, theirs = [5.0, 5.2, 5.1], [4.9, 4.7, 4.95]
    difference, low, high = interval(ours, theirs, pooled([ours, theirs]))
    assert difference == pytest.approx(0.25)
    # s² = (0.02 + 0.035) / 4, SE = √(2 s² / 3), t₀.₉₇₅ of 4 = 2.7764
    half = 2.7764 * math.sqrt(2 / 3 * (0.02 + 0.035) / 4)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-4)


def test_four_of_five_repetitions_see_the_detectable_difference():
    """Twenty settings of three seeds with deviation 1; two of them differ by what should be seen."""
    generator = torch.Generator().manual_seed(0)
    delta = detectable(Spread(1.0, 40), 3)
    seen = wrong = 0
    for _ in range(1000):
        runs = torch.randn(20, 3, generator=generator, dtype=torch.float64).tolist()
        spread = pooled(runs)
        half = student(0.975, spread.freedom) * standard_error(spread, 3)
        apart = sum(runs[0]) / 3 - sum(runs[1]) / 3
        seen += abs(apart + delta) > half
        wrong += abs(apart) > half
    assert 0.76 < seen / 1000 < 0.84 and 0.03 < wrong / 1000 < 0.07
    assert detectable(Spread(1.0, 40), 3, 0.5) == pytest.approx(student(0.975, 40) * math.sqrt(2 / 3))
    assert detectable(Spread(1.0, 40), 12) == pytest.approx(delta / 2)


REFUSED = [lambda: student(1.0, 3), lambda: student(0.9, 0), lambda: detectable(Spread(1.0, 9), 3, 0.2)]


@pytest.mark.parametrize("call", REFUSED)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
