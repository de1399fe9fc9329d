"""Chapter 10's explorers draw the numbers and texts that they are given and say what is true of them."""

import functools

import pytest

from lora_edu.explore import high_then_cut, rounded_away, spent_by_rule, two_adapters

KINDS = ("key", "output", "query", "value", "down", "up", "embedding", "head")
RANKS = (1, 2, 4, 8, 16, 32, 64)
PROMPT = "Return the"
WEIGHTS = (-0.5, 0.0, 0.5, 1.0, 1.5)


def mixed_losses(one, other):
    return {
        "reference": 6 - 1.6 * one + 0.8 * one**2 + 0.5 * other,
        "manual": 5 + (other - 1) ** 2 + one,
        "code": 3.9 + one**2 + other**2,
    }


@functools.cache
def drawn(name):
    if name == "budget":
        budgets = (4, 8, 16, 32, 64)
        ranks = {
            "one rank": {b: {kind: [b] * 6 for kind in KINDS} for b in budgets},
            "most energy": {
                b: {k: [b // 4 + i * 2 * j for i in range(6)] for j, k in enumerate(KINDS)} for b in budgets
            },
        }
        energy = {
            rule: {b: 0.5 + 0.007 * b + more for b in budgets}
            for rule, more in zip(ranks, (0, 0.02), strict=True)
        }
        gain = {
            rule: {b: 0.3 + 0.009 * b - less for b in budgets}
            for rule, less in zip(ranks, (0, 0.1), strict=True)
        }
        return spent_by_rule(ranks, energy, gain)
    if name == "cut":
        runs = [(64, 0.003), (64, 0.006), (16, 0.015)]
        cut = {(r, rate): {k: 4 + 1.5 * (1 - k / r) for k in RANKS if k <= r} for r, rate in runs}
        trained = {k: dict.fromkeys((0.003, 0.006, 0.012), 4.7 - 0.1 * i) for i, k in enumerate(RANKS)}
        trained[16] = {0.015: 4.3}
        return high_then_cut(cut, trained, 5.95, {k: min(rates) for k, rates in trained.items()})
    if name == "rounding":
        sizes = (0.5, 0.05, 0.005, 0.0005)
        swallowed = {
            "to the nearest": {s: 0.8 - s for s in sizes},
            "by chance": {s: 0.001 / s for s in sizes},
        }
        gain = {"to the nearest": {s: s**0.1 for s in sizes}, "by chance": {s: 1.05 - s / 10 for s in sizes}}
        return rounded_away(swallowed, gain)
    pairs = [(one, other) for one in WEIGHTS for other in WEIGHTS]
    texts = {
        pair: PROMPT + f" value {pair}.\n\nParameters\n----------\n" + "x : array\n" * 9 for pair in pairs
    }
    return two_adapters(
        PROMPT, texts, {pair: mixed_losses(*pair) for pair in pairs}, ("docstrings", "manual")
    )


@pytest.mark.parametrize("name", ["budget", "cut", "rounding", "mixture"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= 30 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_a_budget_is_said_with_both_shares_of_both_rules():
    sentence = drawn("budget").pictures[8,].sentence
    assert sentence.startswith("A budget of rank 8 everywhere.")
    assert "one rank: 55.6% of the energy, 37% of the gain" in sentence
    assert "most energy: 57.6% of the energy, 27% of the gain" in sentence


def test_a_cut_is_compared_with_what_was_trained_at_the_same_rate_alone():
    pictures = drawn("cut").pictures
    assert "k = 8: cut 5.31, trained 4.40" in pictures[(64, 0.003),].sentence
    assert "k = 32" in pictures[(64, 0.003),].sentence and "k = 32" not in pictures[(16, 0.015),].sentence
    assert pictures[(16, 0.015),].sentence.endswith("At that rate, k = 16: cut 4.00, trained 4.30.")


def test_an_error_above_the_update_is_shown_as_it_is():
    sentence = drawn("rounding").pictures[0.0005,].sentence
    assert "by chance: error 2.00 ‖ΔW‖, 105% of the gain" in sentence
    assert "to the nearest: error 0.80 ‖ΔW‖, 47% of the gain" in sentence


def test_losses_of_a_mixture_stand_beside_the_base():
    sentence = drawn("mixture").pictures[0.5, 1.0].sentence
    assert "docstrings × 0.5, manual × 1." in sentence
    assert "reference 5.90 (-0.10), manual 5.50 (-0.50), code 5.15 (+1.25)" in sentence
    assert "it writes “value (0.5, 1.0). Parameters" in sentence
