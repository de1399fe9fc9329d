"""Chapter 06's explorers: whole pictures within the budget, bytes as live layers move them."""

import functools

import pytest
import torch

from lora_edu.explore import bytes_moved, first_step, roofline
from lora_edu.explore.lora_embedding import first_move


@functools.cache
def drawn(make):
    if make in (bytes_moved, roofline):
        return make()
    generator = torch.Generator().manual_seed(0)
    return make(*(torch.randn(shape, generator=generator) for shape in ((300, 100), (100, 100))))


@pytest.mark.parametrize("make", [bytes_moved, first_step, roofline])
def test_pictures_are_whole_and_within_the_budget(make):
    explorer = drawn(make)
    assert len(explorer.pictures) <= 60 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_an_embedding_moves_as_far_at_every_rank_and_alpha():
    """√(3 d) times a linear weight: a normal factor beside a Kaiming-uniform one of variance 1 / (3 d)."""
    for d in (48, 100):
        gradient = torch.randn(200, d, generator=torch.Generator().manual_seed(1))
        for rank in (2, 8, 32):
            times = first_move(gradient, rank, "A") / first_move(gradient, rank, "B")
            assert abs(times / (3 * d) ** 0.5 - 1) < 0.15
