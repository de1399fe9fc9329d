"""Chapter 07's explorers draw the numbers they are given and say what is true of them."""

import functools

import pytest

from lora_edu.explore import equal_gain, rate_and_rank, shared_directions, trained_and_truncated
from lora_edu.explore.train_with_lora import at_level

RANKS = [1, 2, 4, 8, 16, 32, 64]


def losses_at(rate, best):
    return [
        (50, 5 + abs(rate / best - 1)),
        (100, 4.5 + abs(rate / best - 1)),
        (200, 4 + abs(rate / best - 1)),
    ]


@functools.cache
def drawn(name):
    if name == "rank":
        trained = {
            r: [6 - 2 * (0.5 + 0.06 * k) + noise for noise in (-0.02, 0, 0.02)] for k, r in enumerate(RANKS)
        }
        cut = {
            r: [6 - 2 * 0.14 * (k + 0.5) + noise for noise in (-0.02, 0, 0.02)] for k, r in enumerate(RANKS)
        }
        return trained_and_truncated(trained, cut, [3.98, 4.0, 4.02], 6.0, {r: 31_000 * r for r in RANKS})
    if name == "rate":
        tried = {"full": (0.0015, 0.003, 0.006, 0.012), "r = 1": (0.006, 0.012, 0.024, 0.048)}
        along = {m: {rate: losses_at(rate, rates[1]) for rate in rates} for m, rates in tried.items()}
        return rate_and_rank(
            {m: {r: run[-1][1] for r, run in runs.items()} for m, runs in along.items()}, along
        )
    if name == "gain":
        paths = {
            "full": [(6.0, 3.5), (5.0, 5.0), (4.0, 4.9)],
            "LoRA, r = 8": [(6.0, 3.5), (5.2, 4.0), (4.2, 4.3)],
        }
        return equal_gain(paths, [5.5, 5.0, 4.5, 4.25], 3.5)
    grid = {f"{i},{j}": min(1.0, 0.2 + 0.1 * i / j) for i in (1, 2, 4, 8) for j in RANKS}
    kinds = {
        kind: {"rows": 100, "columns": d, "BA": grid, "A": grid, "B": grid}
        for kind, d in (("up", 100), ("down", 400))
    }
    return shared_directions(kinds | {"embedding": {"rows": 10_000, "columns": 100, "BA": grid}})


@pytest.mark.parametrize("name", ["rank", "rate", "gain", "directions"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= 60 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_the_shares_are_of_the_gain_and_not_of_the_loss():
    sentence = drawn("rank").pictures[8,].sentence
    assert "trained 68%" in sentence and "cut to 8: 49%" in sentence and "248,000 numbers" in sentence


def test_the_best_rate_is_the_one_with_the_lowest_loss():
    assert "best rate tried is 0.003" in drawn("rate").pictures["full",].sentence
    assert "best rate tried is 0.012" in drawn("rate").pictures["r = 1",].sentence


def test_equal_gain_is_read_off_on_a_straight_line():
    assert "full: 0.75, LoRA, r = 8: 0.31" in drawn("gain").pictures[5.5,].sentence
    assert at_level([(6, 3), (5, 4), (4, 8)], 4.5) == 6
    assert at_level([(6, 3), (5, 4)], 6) == 3
    with pytest.raises(ValueError, match="never comes to 3.5; it goes from 6 to 4"):
        at_level([(6, 3), (4, 8)], 3.5)


def test_chance_goes_by_the_dimension_of_the_side():
    pictures = drawn("directions").pictures
    assert ("embedding", "BA") not in pictures, "its two factors are not a linear layer's"
    assert "φ(8, 8) = 0.30 where chance gives 0.08" in pictures["up", "BA"].sentence
    assert "chance gives 0.02" in pictures["down", "A"].sentence
    assert "chance gives 0.08" in pictures["down", "B"].sentence
