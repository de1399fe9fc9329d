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


REACTIONS = [f"reaction number {k} of the book" for k in range(30)]
CHANGED = {0: [True] * 30, 8: [k < 12 for k in range(30)], 16: [k < 2 for k in range(30)]}


def run(task, rate, steps, kept, seed=0):
    """A recorded run of the map: two nats of gain, of which each rank keeps what is given."""
    sigma = torch.linspace(1, 0.1, 30) ** (1 / (1000 * rate))
    spectrum = {"size": 10 * rate, "sigma": [round(float(s), 3) for s in sigma / sigma.norm()]}
    cut = {str(r): 6.0 - 2.0 * share for r, share in zip((1, 8, 32), kept, strict=True)}
    spectra = dict.fromkeys(("query", "up", "embedding", "head", "all"), spectrum)
    losses = {"before": 6.0, "after": 4.0, "cut": cut, "spectra": spectra}
    return {"task": task, "rate": rate, "steps": steps, "seed": seed} | losses


REGIMES = [
    *(
        run("far", rate, n, (0.5 - 40 * rate, 0.8 - 40 * rate - n / 1000, 0.95))
        for rate in (0.001, 0.006)
        for n in (25, 100)
    ),
    run("near", 0.001, 25, (0.6, 0.9, 0.99)),
    run("far", 0.001, 50, (0.4, 0.7, 0.9)),  # its neighbour at 0.006 is missing
]


def of(matrices):
    return {kind: torch.stack([torch.linalg.svdvals(W) for W in each]) for kind, each in matrices.items()}


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
        "rare_rows": explore.rare_rows({"AdamW": W * quiet, "SGD": W}, counts, thresholds=(0, 1, 5), start=1),
        "rounding": explore.rounding(W, lowrank.truncate(group(1)["up"][0], 3), sizes=(0.1, 0.001)),
        "published_spectra": explore.published_spectra(
            of(group(0)), {"one": of(group(1)), "other": of(group(2, 0.1))}, ("TinyLM's ΔW", of(group(3)))
        ),
        "regimes": explore.regimes(REGIMES),
        "decisions_kept": explore.decisions_kept(
            REACTIONS, CHANGED, dict.fromkeys(CHANGED, (0.1, 0.9)), {r: 0.1 + r / 100 for r in CHANGED}
        ),
    }


NAMES = [
    "spectra_by_kind",
    "truncation",
    "two_seeds",
    "rare_rows",
    "rounding",
    "published_spectra",
    "regimes",
    "decisions_kept",
]


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


def test_the_energy_of_all_matrices_is_weighed_by_their_size():
    """Not the mean over kinds: a large matrix counts for what it holds."""
    loud = {"query": group(1)["query"], "up": [100 * lowrank.truncate(W, 1) for W in group(1)["up"]]}
    sentence = explore.truncation(loud, {1: 5.0, 8: 4.0}, before=5.0, after=3.0).pictures[(1,)].sentence
    assert "100% of their energy" in sentence


def test_two_unrelated_updates_overlap_by_chance():
    overlap, chance = map(float, re.findall(r"\d\.\d+", said("two_seeds", "query")))
    assert chance == 0.2 and abs(overlap - chance) < 0.1


def test_dropping_the_rows_that_nobody_reads_drops_their_energy_and_a_common_row_counts_for_nothing():
    W = group(0)["up"][0]
    loud = 100 * W[:8].square().sum()
    left = W[8:].square().sum() / (loud + W[8:].square().sum())
    assert f"AdamW {left:.0%} of its energy" in said("rare_rows", 1)
    assert "SGD 100% of its energy" in said("rare_rows", 0)
    counts = torch.arange(80) // 8
    shifted = explore.rare_rows({"AdamW": W + 50, "SGD": W}, counts, thresholds=(0, 1), start=0)
    ranks = re.findall(r"stable rank (\d+\.\d)", shifted.pictures[(0,)].sentence)
    assert ranks[0] == ranks[1]


def test_the_shares_of_the_full_rank_are_those_of_the_published_spectra():
    shares = [lowrank.rank_for_energy(torch.linalg.svdvals(W), 0.9) / 40 for W in group(1)["query"]]
    assert f"one {sum(shares) / 2:.0%}" in said("published_spectra", "query")


def test_the_map_of_regimes_has_the_runs_that_are_complete_and_the_near_task_where_it_is_there():
    explorer = explorers()["regimes"]
    assert set(explorer.pictures) == {(rate, n) for rate in (0.001, 0.006) for n in (25, 100)}
    assert (
        "cut to 1, 8, 32 the update keeps 46%, 73%, 95% of that. Near text: 2.00 nats, cut to 8 90%"
        in said("regimes", 0.001, 25)
    )
    assert "keeps 26%, 46%, 95% of that." in said("regimes", 0.006, 100)
    assert "Near" not in said("regimes", 0.006, 100)
    with pytest.raises(ValueError, match=r"needs two rates .*got rates \[0.001\] with steps \[25\]"):
        explore.regimes([run("far", 0.001, 25, (0.1, 0.2, 0.3))])


def test_the_decisions_that_come_back_are_counted():
    assert "60% of the 30 decisions stay (10% to 90%); 12 change, 10 of these come back with r = 16" in said(
        "decisions_kept", 8
    )
    assert "2 change, 2 of these come back with the whole ΔW" in said("decisions_kept", 16)


def test_rounding_hides_the_rank_of_a_small_update_and_the_floor_shows_it():
    large, small = said("rounding", "bfloat16", 0.1), said("rounding", "bfloat16", 0.001)
    needed = [int(re.search(r"needs rank (\d+)", sentence)[1]) for sentence in (large, small)]
    assert needed[0] <= 3 < 10 < needed[1]
    assert "3 singular values stand above" in large
