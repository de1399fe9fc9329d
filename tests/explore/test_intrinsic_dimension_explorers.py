"""Chapter 02's explorers: small, nothing cut off, and sentences with the shares and the ranks that they were given."""

import re
from functools import cache

import torch

from lora_edu import explore

ACCURACY = {
    "all weights": {100: 0.18, 1_000: 0.2, 10_000: 0.25, 1_000_000: 0.31},
    "blocks alone": {1_000: 0.19, 10_000: 0.24, 727_800: 0.3},
}


@cache
def explorer():
    sizes = {"all weights": 2_728_000, "blocks alone": 727_800}
    return explore.random_subspaces(ACCURACY, before=0.15, full=0.35, sizes=sizes)


def test_pictures_are_small_and_nothing_is_cut_off():
    pictures = explorer().pictures.values()
    assert explorer().bytes <= 500_000 and len(pictures) == 5
    assert not [picture.complaints for picture in pictures if picture.complaints]
    assert len({picture.sentence for picture in pictures}) == 5


def test_the_gain_starts_from_the_base_and_the_performance_from_nothing():
    said = explorer().pictures[(10_000,)].sentence
    assert "all weights, 273 to a dial: 25.0% right, 50% of the gain, 71% of the performance" in said
    assert "blocks alone, 72.8 to a dial: 24.0% right, 45% of the gain, 69% of the performance" in said


def test_a_dimension_that_one_of_them_does_not_have_is_left_out():
    assert "blocks" not in explorer().pictures[(100,)].sentence
    assert "all weights" not in explorer().pictures[(727_800,)].sentence


@cache
def side_by_side():
    """LoRA of r = 1, 4 and 32 beside a subspace of full rank, in a tall and in a square matrix."""
    generator = torch.Generator().manual_seed(1)
    accuracy = {
        "random subspace": {1_000: 0.1, 32_000: 0.28, 100_000: 0.3, 1_000_000: 0.33, 2_728_000: 0.34},
        "LoRA": {31_000: 0.27, 124_000: 0.31, 992_000: 0.32},
    }
    beside, ranks = {32_000: 31_000, 100_000: 124_000, 1_000_000: 992_000}, (1, 4, 32)
    draw = lambda rows, columns: torch.randn(rows, columns, generator=generator)
    updates = {
        name: {d: (draw(rows, 40), draw(rows, r) @ draw(r, 40)) for d, r in zip(beside, ranks, strict=True)}
        for name, rows in (("embedding", 300), ("query", 40))
    }
    return explore.full_rank_beside_low_rank(accuracy, beside, updates)


def test_full_and_low_rank_stand_side_by_side_in_small_pictures():
    pictures = side_by_side().pictures
    assert side_by_side().bytes <= 500_000 and len(pictures) == 6
    assert not [picture.complaints for picture in pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in pictures.values()}) == 6


def test_accuracies_are_those_of_the_pair_and_ranks_are_measured():
    said = side_by_side().pictures[100_000, "embedding"].sentence
    assert "30.0% right with 100,000 numbers in a random subspace, 31.0% with 124,000 in LoRA" in said
    assert "ΔW has rank 40 and 4;" in said
    ninety = {}
    for d, r in ((32_000, 1), (1_000_000, 32)):
        said = side_by_side().pictures[d, "query"].sentence
        assert f"has rank 40 and {r};" in said
        subspace, lora, noise = re.search(r"energy takes (\d+) and (\d+) \(noise: (\d+)\)", said).groups()
        ninety[d] = int(subspace), int(lora), int(noise)
    assert ninety[32_000][1] == 1 < ninety[1_000_000][1] < 32
    assert all(abs(subspace - noise) <= 2 for subspace, _, noise in ninety.values())
