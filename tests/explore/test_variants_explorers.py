"""Chapter 09's explorers draw the rows that they are given and say what is true of them."""

import functools

import pytest

from lora_edu.data.runs import SHORT, VARIANT_SIZES
from lora_edu.explore import one_rate_for_all, variants_beside_lora
from lora_edu.explore.variants import NAMES, TESTS, beside_lora, grids_in, size_in, tuned_in
from lora_edu.recording.methods import STEPS as RECORDED
from lora_edu.recording.variants import SIZES
from lora_edu.seeds import Spread

SPREAD = Spread(
    0.012, 40
)  # 0.008 times the square root of 3/2: an error of 0.0098 of a difference over three seeds
GRID = {0.008: 5.2, 0.016: 5.1, 0.032: 5.0, 0.064: None}


def rows(method, size, best, loss, task="far"):
    """A grid around `best`, whose run has this loss, three seeds there; the largest rate blew up."""
    about = {"task": task, "method": method, "size": size, "steps": SHORT}
    near = {-1: loss + 0.1, 0: loss, 1: loss + 0.1}
    made = [about | {"rate": best * 2**k, "seed": 0, "validation": round(near[k], 4)} for k in near]
    made.append(about | {"rate": best * 4, "seed": 0, "validation": None})
    made += [about | {"rate": best, "seed": seed, "validation": loss} for seed in (1, 2)]
    return [
        row | {"test": row["validation"] and row["validation"] + 0.01 * (row["seed"] - 1)} for row in made
    ]


ROWS = [
    *rows("lora", 4, 0.016, 5.0),
    *rows("lora", 16, 0.016, 4.9),
    *rows("dora", 4, 0.016, 5.01),
    *rows("dora", 16, 0.008, 4.8),
    *rows("vera", 1050, 0.064, 5.3),
]
FAR = list(TESTS)[:2]


@functools.cache
def drawn(name):
    if name == "one rate":
        grid = {"lora": GRID, "dora": {0.008: 5.1, 0.016: 5.15}, "muon": {0.016: 5.3, 0.064: 4.9}}
        return one_rate_for_all(grid, {"lora": 5.0, "dora": 5.1, "muon": 4.9}, [0.008, 0.016, 0.064])
    grids = {test: grids_in(ROWS, test) for test in FAR}
    runs = {test: tuned_in(ROWS, test) for test in FAR}
    return variants_beside_lora(grids, runs, dict.fromkeys(FAR, SPREAD))


@pytest.mark.parametrize("name", ["variants", "one rate"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= 30 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_a_difference_is_said_with_its_interval_and_what_it_means():
    said = {values: picture.sentence for values, picture in drawn("variants").pictures.items()}
    assert (
        "DoRA, far task, r = 4: best rate 0.016, LoRA's 0.016; test loss 5.010 beside 5.000, a difference of +0.010 "
        "(-0.010 to +0.030): not to be told from LoRA." == said["dora", FAR[0]]
    )
    assert "a difference of -0.100 (-0.120 to -0.080): better than LoRA." in said["dora", FAR[1]]
    assert "(+0.280 to +0.320): worse than LoRA." in said["vera", FAR[0]]
    assert "VeRA would need r = 4 650" in said["vera", FAR[1]]


def test_the_interval_is_of_the_test_losses_at_the_tuned_rate_alone():
    runs = tuned_in(ROWS, FAR[0])
    assert list(runs) == ["lora", "dora", "vera"] and all(len(each) == 3 for each in runs.values())
    middle, low, high = beside_lora(runs, SPREAD)["dora"]
    assert (middle, high - middle) == (
        pytest.approx(0.01),
        pytest.approx(2.0211 * 0.012 * (2 / 3) ** 0.5, rel=1e-4),
    )
    assert middle - low == pytest.approx(high - middle)
    assert grids_in(ROWS, FAR[0])["dora"] == {0.008: 5.11, 0.016: 5.01, 0.032: 5.11, 0.064: None}


def test_at_one_rate_those_that_were_tried_are_sorted_and_a_run_that_blew_up_is_last():
    said = [picture.sentence for picture in drawn("one rate").pictures.values()]
    assert said[0] == "All at a rate of 0.008, best first: DoRA 5.10, LoRA 5.20."
    assert said[1] == "All at a rate of 0.016, best first: LoRA 5.10, DoRA 5.15, Muon 5.30."
    assert said[2] == "All at a rate of 0.064, best first: Muon 4.90, LoRA blew up."


def test_names_sizes_and_steps_are_those_of_the_recorded_runs():
    assert dict(SIZES) == VARIANT_SIZES and set(NAMES) == set(SIZES) and SHORT == RECORDED
    assert [size_in(test, "vera") for test in TESTS] == [1050, None, 1050]
    assert [size_in(test, "lora-xs") for test in TESTS] == [35, 69, 35]
