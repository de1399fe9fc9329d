"""Chapter 05's explorers draw what a run returns and say what is true of it."""

import functools
import math

import pytest
import torch

from lora_edu.explore import alpha_that_does_nothing, gradient_norms, seen_through
from lora_edu.explore import lora_linear as explorers

PICTURES = 60
BYTES = 500_000


def run(alpha, rate, start):
    """A loss that depends on alpha · rate · start only: the same along the slider, another one off it."""
    return [1 / (1 + step * alpha * rate * start / 16) for step in range(20)]


def along(r, alpha):
    s = alpha / r
    steps = range(10)
    return [s * step for step in steps], [s] * 10, [1 / (1 + step) for step in steps]


@functools.cache
def drawn(name):
    gradient = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    return {
        "seen": lambda: seen_through(gradient),
        "norms": lambda: gradient_norms(along),
        "alpha": lambda: alpha_that_does_nothing(run),
    }[name]()


@pytest.mark.parametrize("name", ["seen", "norms", "alpha"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= PICTURES and explorer.bytes <= BYTES
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_alpha_does_nothing_unless_something_is_set_free():
    said = {key: picture.sentence for key, picture in drawn("alpha").pictures.items()}
    for release in explorers.RELEASED:
        for alpha in explorers.ALPHAS:
            same = release == "nothing" or alpha == explorers.USUAL
            assert ("the run is the same" in said[release, alpha]) == same


def test_companions_move_by_the_root_unless_set_free():
    assert explorers.factors(64, "nothing") == (0.5, 0.5)
    assert explorers.factors(64, "learning rate") == (1.0, 0.5)
    assert explorers.factors(64, "A₀") == (0.5, 1.0)
    assert explorers.factors(64, "both") == (1.0, 1.0)
    assert explorers.factors(1, "nothing") == (4.0, 4.0)


def test_the_mean_over_draws_tends_to_the_gradient():
    """E[AᵀA] is the identity for entries of variance 1 / r: the error is √((in + 1) / (draws · r))."""
    G = torch.randn(30, 40, generator=torch.Generator().manual_seed(7))
    for draws in (16, 256, 4096):
        error = float((explorers.mean_through(G, 8, draws) - G).norm() / G.norm())
        assert error == pytest.approx(math.sqrt(41 / (8 * draws)), rel=0.1)


def test_one_draw_of_rank_one_gives_a_matrix_of_rank_one():
    G = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    assert torch.linalg.matrix_rank(explorers.mean_through(G, 1, 1), rtol=1e-4) == 1


def test_the_sentences_hold_the_norms():
    sentence = drawn("norms").pictures[8, 16].sentence
    assert "s = 2" in sentence and "A's gradient is 0" in sentence and "B's 2" in sentence


def test_a_first_gradient_of_A_that_is_not_zero_would_be_told():
    run = lambda r, alpha: ([0.25, 0.1], [1.0, 0.5], [1.0, 0.5])
    assert "A's gradient is 0.25 and" in gradient_norms(run).pictures[8, 16].sentence
