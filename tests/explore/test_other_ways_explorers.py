"""Chapter 08's explorers draw the rows that they are given and say what is true of them."""

import functools

import pytest

from lora_edu import plots
from lora_edu.explore import methods_and_sizes, price_and_quality
from lora_edu.explore.other_ways import ACTS_ON, LOOKS, NAMES, SIZE, by_method, called
from lora_edu.recording.methods import SIZES

BEFORE = {"test": 6.0, "code": 3.7}


def rows(method, size, losses):
    stored = 1_000 * (size or 4)
    trained = stored + (30_300 if method == "p-tuning" else 0)
    about = {"method": method, "size": size, "rate": 0.016, "stored": stored, "trained": trained}
    return [about | {"test": loss, "code": loss - 1, "seed": seed} for seed, loss in enumerate(losses)]


RUNS = {
    ("p-tuning", 64): rows("p-tuning", 64, [5.25]),
    ("lora", 16): rows("lora", 16, [4.6, 4.7, 4.8]),
    ("lora", 4): rows("lora", 4, [4.9, 5.0, 5.1]),
    ("full", None): rows("full", None, [4.4, 4.5, 4.6]),
}


@functools.cache
def drawn(name):
    if name == "methods":
        return methods_and_sizes(RUNS, BEFORE)
    prices = {
        "numbers": {"full": 2_728_000, "lora": 43_200, "prompt": 1_600, "ia3": 3_600},
        "time": {"full": 1.0, "lora": 1.0, "prompt": 1.3},
    }
    losses = {
        "docstrings": {"full": 4.5, "lora": 4.7, "prompt": 5.6, "ia3": 5.6},
        "code": {"full": 4.8, "lora": 4.4, "prompt": 3.9, "ia3": 3.8},
    }
    return price_and_quality(prices, losses, {"time": "a token, times the base's"})


@pytest.mark.parametrize("name", ["methods", "prices"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= 30 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_a_method_is_said_with_what_it_trains_and_stores_and_with_its_seeds():
    pictures = drawn("methods").pictures
    assert "P-Tuning, k = 64: 94,300 numbers trained, 64,000 stored" in pictures[("p-tuning", 64),].sentence
    assert "(5.25 to 5.25 over one seed)" in pictures[("p-tuning", 64),].sentence
    sentence = drawn("methods").start.sentence
    assert sentence.startswith("LoRA, r = 4: 4,000 numbers trained, 4,000 stored; at a rate of 0.016")
    assert "from 6.00 to 5.00 (4.90 to 5.10 over 3 seeds), and on code it goes from 3.70 to 4.00." in sentence


def test_methods_come_in_the_order_of_their_names_and_sizes_in_that_of_their_numbers():
    assert list(by_method(RUNS)) == ["full", "lora", "p-tuning"]
    assert by_method(RUNS)["lora"] == ([4_000, 16_000], [[4.9, 5.0, 5.1], [4.6, 4.7, 4.8]])
    assert by_method(RUNS, "trained", "code")["p-tuning"] == ([94_300], [[4.25]])
    assert [key for (key,) in drawn("methods").pictures] == [
        ("full", None),
        ("lora", 4),
        ("lora", 16),
        ("p-tuning", 64),
    ]


def test_what_no_other_beats_depends_on_the_price_and_on_the_text():
    said = {values: picture.sentence for values, picture in drawn("prices").pictures.items()}
    assert (
        "Not beaten: prompt tuning (5.60), LoRA (4.70), full tuning (4.50). Beaten: (IA)³."
        in said["numbers", "docstrings"]
    )
    assert (
        "Not beaten: prompt tuning (3.90), (IA)³ (3.80). Beaten: full tuning, LoRA."
        in said["numbers", "code"]
    )
    assert "Not beaten: full tuning (4.50). Beaten: LoRA, prompt tuning." in said["time", "docstrings"]


def test_every_recorded_method_has_a_name_a_look_and_a_place():
    assert set(SIZES) == set(NAMES) == set(LOOKS) == set(ACTS_ON)
    assert len(set(LOOKS.values())) == len(LOOKS)
    assert {part for parts in ACTS_ON.values() for part in parts} <= set(plots.PARTS)
    assert (
        set(SIZE) == {"lora", "lora everywhere", "bottleneck"}
        and called("prefix", 4) == "prefix tuning, k = 4"
    )
