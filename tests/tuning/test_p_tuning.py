"""P-Tuning: an encoder is trained, its output is stored (Liu et al. 2021)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu.tinylm import TinyLM
from lora_edu.tuning import fold_p_tuning, p_tuning, trained_parameters
from lora_edu.tuning.applied import applied, applied_options
from lora_edu.tuning.p_tuning import state

IDS = torch.arange(12).reshape(2, 6)


def small(**options):
    torch.manual_seed(0)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 1, "heads": 5, "context": 64} | options)


@given(st.integers(1, 30), st.integers(1, 3).map(lambda each: 10 * each), st.integers(1, 17))
@settings(max_examples=15, deadline=None)
def test_an_mlp_encoder_has_three_layers_and_a_prompt_is_stored(k, d, h):
    model = p_tuning(small(width=d), k, hidden=h)
    assert (
        trained_parameters(model)
        == k * d + (d * h + h) + (h * h + h) + (h * d + d)
        == k * d + 2 * d * h + h * h + 2 * h + d
    )
    assert state(model)["prompt_embeddings"].shape == (k, d)
    assert trained_parameters(fold_p_tuning(model)) == k * d


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_an_lstm_encoder_reads_both_ways_before_two_layers(k, h, layers):
    model, d = p_tuning(small(), k, "lstm", h, layers=layers), 20
    first = 2 * (4 * h * d + 4 * h * h + 8 * h)  # two directions, four gates, two biases each
    above = 2 * (4 * h * 2 * h + 4 * h * h + 8 * h)
    assert (
        trained_parameters(model) == k * d + first + (layers - 1) * above + 4 * h * h + 2 * h + 2 * h * d + d
    )
    assert trained_parameters(fold_p_tuning(model)) == k * d


def test_the_hidden_width_is_the_models_unless_given():
    model = p_tuning(small())
    assert model.p_tuning.mlp[0].out_features == 20 and applied_options(model)["hidden"] == 20


def test_in_an_lstm_virtual_tokens_know_each_other_and_in_an_mlp_they_do_not():
    """The paper's reason for the LSTM (§3.2): virtual tokens should depend on each other."""
    for encoder, others in (("mlp", False), ("lstm", True)):
        source = p_tuning(small(), 5, encoder).p_tuning
        (gradient,) = torch.autograd.grad(source()[2].sum(), source.embedding.weight)
        assert [bool(row.abs().sum() > 0) for row in gradient] == [others, others, True, others, others]


def test_folded_it_is_prompt_tuning_and_named_so():
    model = p_tuning(small(), 5)
    assert applied(model) == "p_tuning"
    fold_p_tuning(model)
    assert applied(model) == "prompt_tuning" and applied_options(model) == {"tokens": 5}
    assert not hasattr(model, "p_tuning") and trained_parameters(model) == 5 * 20
    with pytest.raises(ValueError, match="has prompt_tuning on it, not p_tuning"):
        fold_p_tuning(model)


def test_dropout_acts_in_training_and_not_in_what_is_stored():
    model = p_tuning(small(), 5, "lstm", dropout=0.5)
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    stored = state(model)["prompt_embeddings"]
    assert model.p_tuning.training and model.p_tuning.lstm.training
    assert torch.allclose(stored, model.eval().p_tuning(), atol=1e-6) and torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder": "gru"}, 'encoder must be "mlp" or "lstm"; got \'gru\''),
        ({"hidden": 0}, "hidden must be a whole number of at least 1; got 0"),
        ({"hidden": True}, "hidden must be a whole number of at least 1; got True"),
        ({"encoder": "lstm", "layers": 0}, "layers must be a whole number of at least 1; got 0"),
        ({"encoder": "lstm", "dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"layers": 3}, 'layers and dropout are for encoder="lstm"; got 3 and 0.0 with "mlp"'),
        ({"dropout": 0.1}, 'for encoder="lstm"; got 2 and 0.1'),
    ],
)
def test_errors_name_the_value_and_the_rule_and_leave_the_model_alone(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        p_tuning(model, 5, **options)
    assert applied(model) is None and model.context == 64 and all(p.requires_grad for p in model.parameters())
