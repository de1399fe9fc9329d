"""Chapter 06's explorers: whole pictures within the budget, bytes as live layers move them."""

import functools

import pytest
import torch

from lora_edu.explore import bytes_moved, first_step, roofline
from lora_edu.explore.lora_embedding import first_move, look_up_bytes, look_up_operations, traffic


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


@pytest.mark.parametrize(("vocabulary", "tokens"), [(1000, 64), (1_000_000, 2048)])
def test_only_the_dense_ways_grow_with_the_vocabulary(vocabulary, tokens):
    moved, larger = traffic(vocabulary, tokens), traffic(2 * vocabulary, tokens)
    assert moved["minimum"] < moved["ours, sparse"] < moved["loralib"] == moved["PEFT"]
    for name in moved:
        grows = {"loralib": 6, "PEFT": 6, "ours": 4}.get(name, 0)
        assert larger[name] - moved[name] == grows * 4 * 8 * vocabulary


def test_a_look_up_does_half_the_rank_in_operations_a_byte_and_one_pass_moves_a_quarter():
    for rank in (4, 16, 64):
        moved = look_up_bytes(65_536, 4096, rank)
        intensity = look_up_operations(65_536, 4096, rank) / moved["one pass"]
        assert abs(intensity / ((rank + 1) / 2) - 1) < 0.02
        assert 3.9 < moved["loralib, PEFT"] / moved["one pass"] < 4.01
        assert moved["one pass"] < moved["PyTorch, ours"] < moved["loralib, PEFT"]
