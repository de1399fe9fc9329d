"""Chapter 01's explorers on small matrices: what their sentences say is true, and their pictures stay in the budget."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lora_edu import explore, lowrank

place = torch.linspace(0, 1, 60, dtype=torch.float64)
SMOOTH = (
    torch.sin(5 * place[:, None]) * torch.cos(3 * place[:50]) + torch.outer(place, place[:50])
).abs() / 2


def numbers(sentence):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", sentence)]


@pytest.fixture(scope="module")
def explorers():
    return {
        "photograph": explore.photograph_rank(SMOOTH, ranks=(1, 2, 8)),
        "map": explore.elevation_rank(300 + 500 * SMOOTH, row=10, ranks=(1, 2, 8)),
        "hidden": explore.hidden_direction(strengths=(0, 1.5, 3)),
        "noisy": explore.noisy_photograph(SMOOTH, levels=(0.05, 0.5)),
    }


def test_every_picture_is_whole_and_small(explorers):
    for name, explorer in explorers.items():
        for picture in explorer.pictures.values():
            assert not picture.complaints, (name, picture.complaints)
            assert len(picture.png) < 80_000


def test_the_photograph_tells_its_energy(explorers):
    energy = lowrank.energy(SMOOTH - SMOOTH.mean())
    for (r,), picture in explorers["photograph"].pictures.items():
        rank, kept, stored = numbers(picture.sentence)
        assert rank == r and kept / 100 == pytest.approx(float(energy[r - 1]), abs=5e-4)
        assert stored / 100 == pytest.approx(r * (60 + 50) / (60 * 50), abs=5e-4)


def test_no_share_is_rounded_up_to_all_of_it(explorers):
    assert "100.0%" not in " ".join(picture.sentence for picture in explorers["map"].pictures.values())


def test_the_map_tells_metres(explorers):
    heights = 300 + 500 * SMOOTH
    for (r,), picture in explorers["map"].pictures.items():
        cut = lowrank.truncate(heights - heights.mean(), r)
        off = float((heights - heights.mean() - cut).square().mean().sqrt())
        assert numbers(picture.sentence)[-1] == round(off)


def test_the_whole_map_stands_beside_the_cut_one(explorers):
    first, last = (
        np.asarray(Image.open(io.BytesIO(explorers["map"].pictures[r,].png)).convert("L"), dtype=float)
        for r in (1, 8)
    )
    panel = first.shape[1] // 6  # well within the original; the cut one begins after it
    changed = np.abs(first - last).mean(axis=0)
    # Each picture has its own palette, so the original differs by a shade or two.
    assert changed[:panel].max() < 8 and changed[2 * panel : 3 * panel].max() > 20


def test_a_hidden_direction_shows_only_when_it_is_strong_enough(explorers):
    sentences = {values: picture.sentence for values, picture in explorers["hidden"].pictures.items()}
    assert "nothing stands above" in sentences[0, 200] and numbers(sentences[0, 200])[-1] < 5
    assert "one singular value stands" in sentences[3, 200]
    assert numbers(sentences[3, 200])[-1] == pytest.approx(100 * (1 - 1 / 9), abs=5)


def test_the_best_rank_named_for_a_noisy_photograph_is_the_best(explorers):
    mean = SMOOTH.mean()
    noise = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for (sigma,), picture in explorers["noisy"].pictures.items():
        noisy = SMOOTH - mean + sigma * noise
        cuts = [torch.zeros_like(noisy), *(lowrank.truncate(noisy, r) for r in range(1, 51))]
        best = min(range(51), key=lambda r: float((cuts[r] - (SMOOTH - mean)).norm()))
        assert picture.sentence.endswith(f"closest to the clean photograph is rank {best}.")
