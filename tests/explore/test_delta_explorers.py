"""Chapter 03's explorers: small, nothing cut off, and sentences that say what the matrices say."""

import re
from functools import cache

import pytest
import torch

from lora_edu import explore, lowrank

KINDS = ["query", "up"]


@cache
def group(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query": (40, 40), "up": (80, 40)}
    return {
        kind: [scale * torch.randn(shapes[kind], generator=generator) for _ in range(2)] for kind in KINDS
    }


@cache
def explorers():
    W = group(0)["up"][0]
    counts = torch.arange(80) // 8  # 8 rows of tokens that never occur
    first, second = ({kind: matrices[0] for kind, matrices in group(seed).items()} for seed in (1, 2))
    quiet = torch.where(counts[:, None] == 0, 10.0, 1.0)
    return {
        "spectra_by_kind": explore.spectra_by_kind(group(0), group(1)),
        "truncation": explore.truncation(group(1), {1: 5.0, 8: 4.0, 32: 3.2}, before=5.0, after=3.0),
        "two_seeds": explore.two_seeds(first, second, most=20),
        "rare_rows": explore.rare_rows({"AdamW": W * quiet, "SGD": W}, counts, thresholds=(0, 1, 5)),
        "rounding": explore.rounding(W, lowrank.truncate(group(1)["up"][0], 3), sizes=(0.1, 0.001)),
    }


NAMES = ["spectra_by_kind", "truncation", "two_seeds", "rare_rows", "rounding"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_small_and_nothing_is_cut_off(name):
    explorer = explorers()[name]
    assert explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    sentences = [picture.sentence for picture in explorer.pictures.values()]
    assert len(set(sentences)) == len(sentences)


def said(name, *values):
    return explorers()[name].pictures[values].sentence


def test_the_ranks_said_are_those_of_the_spectra():
    ranks = [lowrank.rank_for_energy(torch.linalg.svdvals(W), 0.9) for W in group(1)["query"]]
    assert f", {sorted(ranks)[0]:g} in ΔW" in said("spectra_by_kind", "query")


def test_the_share_of_the_gain_starts_from_the_base():
    assert "0% of the gain" in said("truncation", 1) and "50% of the gain" in said("truncation", 8)


def test_two_unrelated_updates_overlap_by_chance():
    overlap, chance = map(float, re.findall(r"\d\.\d+", said("two_seeds", "query")))
    assert chance == 0.2 and abs(overlap - chance) < 0.1


def test_dropping_the_rows_that_nobody_reads_drops_their_energy():
    W = group(0)["up"][0]
    loud = 100 * W[:8].square().sum()
    left = W[8:].square().sum() / (loud + W[8:].square().sum())
    assert f"AdamW {left:.0%} of its energy" in said("rare_rows", 1)
    assert "SGD 100% of its energy" in said("rare_rows", 0)


def test_rounding_hides_the_rank_of_a_small_update_and_the_floor_shows_it():
    large, small = said("rounding", "bfloat16", 0.1), said("rounding", "bfloat16", 0.001)
    needed = [int(re.search(r"needs rank (\d+)", sentence)[1]) for sentence in (large, small)]
    assert needed[0] <= 3 < 10 < needed[1]
    assert "3 singular values stand above" in large
