"""Prefix tuning: keys and values in every layer, with and without the MLP (Li & Liang 2021)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu.lora import trainable_parameters
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import fold_prefix_tuning, prefix_tuning, trained_parameters
from lora_edu.tuning.applied import applied, applied_options
from lora_edu.tuning.prefix_tuning import state
from lora_edu.tuning.virtual_tokens import by_layer

IDS = torch.arange(12).reshape(2, 6)


def small(**options):
    torch.manual_seed(0)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 64} | options)


@given(st.integers(1, 30), st.integers(1, 3).map(lambda each: 10 * each), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_prefix_has_a_key_and_a_value_a_token_in_every_layer(k, d, L):
    model = prefix_tuning(small(width=d, layers=L), k)
    assert trained_parameters(model) == 2 * L * k * d
    assert torch.equal(prefix_tuning(small(width=d, layers=L), **applied_options(model))(IDS), model(IDS))


@given(
    st.integers(1, 30), st.integers(1, 3).map(lambda each: 10 * each), st.integers(1, 4), st.integers(1, 40)
)
@settings(max_examples=15, deadline=None)
def test_reparametrised_an_mlp_is_trained_and_a_prefix_is_stored(k, d, L, h):
    model = prefix_tuning(small(width=d, layers=L), k, h)
    assert trained_parameters(model) == k * d + (d * h + h) + (h * 2 * L * d + 2 * L * d)
    assert state(model)["prompt_embeddings"].shape == (k, 2 * L * d)
    assert trained_parameters(fold_prefix_tuning(model)) == 2 * L * k * d


def test_true_takes_the_width_for_the_mlp():
    assert applied_options(prefix_tuning(small(), 3, True))["reparametrise"] == 20


def test_each_layer_has_a_part_of_its_own():
    """A change of layer 1's keys leaves what layer 0 gives; every part gets a gradient."""
    model, seen = prefix_tuning(small(), 3), []
    (values,) = trainable_parameters(model)
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    before = model(IDS)
    values.data.view(3, 4, 20)[:, 2] += 1  # (token, key and value of layers 0 and 1, width)
    after = model(IDS)
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(before, after)
    after.logsumexp(-1).sum().backward()
    assert (values.grad.view(3, 4, 20).norm(dim=(0, 2)) > 0).all()


def test_a_prefix_of_values_zero_and_keys_zero_takes_weight_from_every_token():
    """Zero keys score 0 and not −∞: they weaken what the text attends to, as PEFT's init_weights="zero" does."""
    model, base = prefix_tuning(small(), 3), small()
    trainable_parameters(model)[0].data.zero_()
    assert not torch.allclose(model(IDS), base(IDS), atol=1e-4)


def test_the_order_in_the_file_is_token_then_key_and_value_of_each_layer_then_head():
    values = torch.arange(2 * 12.0).view(2, 12)  # 2 tokens, 3 layers, 2 heads of 1
    pairs = by_layer(values, layers=3, heads=2)
    assert [tuple(each.shape) for pair in pairs for each in pair] == [(2, 2, 1)] * 6
    assert pairs[1][0].squeeze(-1).tolist() == [
        [4, 16],
        [5, 17],
    ]  # keys of layer 1: head by head, token by token
    assert pairs[2][1].squeeze(-1).tolist() == [[10, 22], [11, 23]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reparametrise": 0}, "reparametrise must be False, True or .* at least 1; got 0"),
        ({"reparametrise": -4}, "got -4"),
        ({"reparametrise": 1.5}, "got 1.5"),
        ({"reparametrise": "mlp"}, "got 'mlp'"),
        ({"reparametrise": 8, "init": [1]}, "init by tokens is for a prefix without reparametrise"),
    ],
)
def test_errors_name_the_value_and_the_rule_and_leave_the_model_alone(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        prefix_tuning(model, 5, **options)
    assert applied(model) is None and model.context == 64 and all(p.requires_grad for p in model.parameters())


def test_what_has_no_mlp_is_not_folded():
    with pytest.raises(ValueError, match="no MLP to fold"):
        fold_prefix_tuning(prefix_tuning(small(), 3))
    with pytest.raises(ValueError, match="nothing on it, not prefix_tuning"):
        fold_prefix_tuning(small())
