"""Prompt tuning: how many numbers, and where they start (Lester et al. 2021)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu.lora import trainable_parameters
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import prompt_tuning
from lora_edu.tuning.applied import applied, applied_options


def small(**options):
    torch.manual_seed(0)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 1, "heads": 5, "context": 64} | options)


@given(
    st.integers(1, 60),
    st.integers(1, 4).map(lambda each: 10 * each),
    st.sampled_from(["vocabulary", "random"]),
)
@settings(max_examples=20, deadline=None)
def test_a_prompt_has_a_row_of_the_models_width_for_each_virtual_token(tokens, width, init):
    model = prompt_tuning(small(width=width), tokens, init)
    (prompt,) = trainable_parameters(model)
    assert prompt.shape == (tokens, width)
    assert applied(model) == "prompt_tuning" and applied_options(model)["tokens"] == tokens
    other = prompt_tuning(small(width=width), **applied_options(model))
    assert torch.equal(other.prompt_tuning(), prompt)


def rows_of(model):
    """Which token of the vocabulary each virtual token starts from."""
    tokens = {tuple(row): token for token, row in enumerate(model.embedding.weight.tolist())}
    return [tokens[tuple(row)] for row in model.prompt_tuning().tolist()]


def test_a_sampled_vocabulary_is_different_tokens_among_the_most_common():
    found = rows_of(prompt_tuning(small(), 10, common=12, seed=1))
    assert len(set(found)) == 10 and max(found) < 12
    assert found != rows_of(prompt_tuning(small(), 10, common=12, seed=2))
    assert sorted(rows_of(prompt_tuning(small(), 40))) == list(range(40))
    again = rows_of(prompt_tuning(small(), 30, common=12))
    assert again[:12] == again[12:24] and set(again) == set(range(12)), "all of them, then round again"


def test_the_5000_most_common_are_taken_unless_told_otherwise():
    model = prompt_tuning(small(vocabulary=9_000, context=4_000), 3_000)
    found = rows_of(model)
    assert 4_900 < max(found) < 5_000 and len(set(found)) == 3_000


def test_random_starts_are_uniform_between_minus_a_half_and_a_half():
    values = prompt_tuning(small(context=4_000), 3_000, "random").prompt_tuning()
    assert values.min() >= -0.5 and values.max() <= 0.5
    assert values.mean().abs() < 0.01 and (values.var() * 12 - 1).abs() < 0.02
    histogram = torch.histc(values, 10, -0.5, 0.5) / values.numel()
    assert (histogram - 0.1).abs().max() < 0.01


def test_a_start_from_the_table_is_a_copy_of_it():
    model = prompt_tuning(small(), 3, init=[5, 6, 7])
    before = model.embedding.weight.clone()
    model.prompt_tuning.embeddings.data.zero_()
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("common", [0, -3, 2.5, True])
def test_a_pool_without_a_token_is_refused(common):
    with pytest.raises(ValueError, match=f"common must be at least 1 .*; got {common}"):
        prompt_tuning(small(), 3, common=common)
