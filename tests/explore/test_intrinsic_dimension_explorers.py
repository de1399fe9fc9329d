"""Chapter 02's explorer: small, nothing cut off, and sentences with the shares that the accuracies have."""

from functools import cache

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
