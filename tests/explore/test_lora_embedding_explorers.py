"""Chapter 06's explorers: whole pictures within the budget, bytes as live layers move them."""

import functools

import pytest
import torch

from lora_edu.explore import bytes_moved, first_step, measured_on_a_gpu, roofline
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


def made_up_record() -> dict:
    """As on_a_gpu.py --apply leaves one; no figure in it is a measurement."""
    shape = {"vocabulary": 1000, "width": 64, "tokens": 512, "rank": 8, "measure": "forward"}
    least = {"least_bytes": 1_000_000}
    rows = [
        shape | least | {"way": "lora_edu", "median_s": 2e-6},
        shape | least | {"way": "PEFT", "median_s": 8e-6},
    ]
    rows += [rows[0] | {"rank": 16, "median_s": 1.0}, rows[0] | {"measure": "step", "median_s": 1.0}]
    about = {"device": "Synthetic H100", "date": "2000-01-01", "command": "nothing"}
    return about | {"rows": rows, "copy_bytes_per_s": 1e12}


def test_a_cards_figures_name_the_card_the_day_and_the_command():
    shown = measured_on_a_gpu(made_up_record())
    assert shown.sentence.startswith(
        "Recorded on Synthetic H100, 2000-01-01, by nothing: a forward pass of 512 tokens"
    )
    assert shown.sentence.endswith("a copy of the bytes it must move: lora_edu 50%, PEFT 12%.")
    assert shown.png.startswith(b"\x89PNG")


def test_without_a_record_it_says_how_to_make_one():
    said = measured_on_a_gpu(None)
    assert (
        said.startswith("No GPU figure has been measured yet.")
        and "python tools/on_a_gpu.py --out DIR" in said
    )
