"""The baselines: probabilities that sum to one, and known values on text that can be counted by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu.recording import ngrams


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # trigrams of two tokens
@given(st.lists(st.integers(0, 4), min_size=20, max_size=200), st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_each_context_has_probabilities_that_sum_to_one(train, first, second):
    train = torch.tensor(train)
    for order, context in (("bigram", [second]), ("trigram", [first, second])):
        # One question at a time: the loss of the last token of `context + word` alone.
        total = 0.0
        for word in range(5):
            asked = torch.tensor([*context, word])
            total += math.exp(-_last(train, asked, order))
        assert total == pytest.approx(1)


def _last(train, asked, order):
    """The loss that the model of this order gives to the last token (the mean is over one token there)."""
    return ngrams.baselines(train, asked, vocabulary=5)[order]


def test_a_bigram_knows_what_always_follows_and_a_trigram_what_depends_on_two():
    alternating = torch.tensor([0, 1] * 500)
    found = ngrams.baselines(alternating, alternating[:100], vocabulary=2)
    assert found["unigram"] == pytest.approx(math.log(2), abs=0.01)
    assert found["bigram"] < 0.01
    generator = np.random.default_rng(0)
    rows = [[a, b, a ^ b] for a, b in generator.integers(0, 2, (2000, 2))]
    parity = torch.tensor(rows).flatten()
    found = ngrams.baselines(parity[:3000], parity[3000:], vocabulary=2)
    assert found["trigram"] < found["bigram"] - 0.05  # a third of the tokens follow from the two before


def test_an_unseen_token_costs_much_but_not_everything():
    found = ngrams.baselines(torch.tensor([0, 1, 2] * 50), torch.tensor([3, 3, 3, 3]), vocabulary=4)
    assert all(1.9 < loss < math.inf for loss in found.values())


def test_a_kneser_ney_bigram_counted_by_hand():
    """Text 0 0 1 0 2 over three words (Chen & Goodman 1999, eq. 17 to 20, and one count added at the bottom).

    Pairs: 00, 01, 10, 02, each once: n₁ = 4, n₂ = 0, so D = 4 / (4 + 0) = 1, and every count less D is 0. What is left
    is D · n(h) / c(h) · lower(w): after 0 (three pairs, three kinds) and after 1 (one and one) the factor is 1, so
    p(w | h) = lower(w). A word's lower share counts the words it follows, plus one: 0 follows 0 and 1, 1 follows 0,
    2 follows 0, which is (2 + 1, 1 + 1, 1 + 1) / 7.
    """
    text = torch.tensor([0, 0, 1, 0, 2])
    found = ngrams.baselines(text, torch.tensor([1, 0, 2]), vocabulary=3)
    assert found["bigram"] == pytest.approx(-(math.log(3 / 7) + math.log(2 / 7)) / 2)
    assert found["unigram"] == pytest.approx(-(math.log(2 / 8) + math.log(4 / 8) + math.log(2 / 8)) / 3)


def test_a_kneser_ney_bigram_with_a_discount_below_one():
    """Text 0 1 0 1 0 2: pairs 01 twice, 10 twice, 02 once: D = 1 / (1 + 2 · 2) = 1/5.

    After 0 come three pairs of two kinds: p(1 | 0) = (2 − 1/5) / 3 + (1/5 · 2 / 3) · lower(1). The words 0, 1 and 2
    follow one word each, so lower = (2, 2, 2) / 6 = 1/3.
    """
    found = ngrams.baselines(torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([0, 1, 0, 2]), vocabulary=3)
    after_0 = lambda count: (count - 1 / 5) / 3 + (1 / 5 * 2 / 3) / 3
    after_1 = (2 - 1 / 5) / 2 + (1 / 5 * 1 / 2) / 3
    assert found["bigram"] == pytest.approx(
        -(math.log(after_0(2)) + math.log(after_1) + math.log(after_0(1))) / 3
    )
