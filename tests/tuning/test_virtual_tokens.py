"""What prompts and prefixes have in common: they stand for real tokens, look like them, and come out again."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_edu.lora import AdapterError, add_lora, trainable_parameters
from lora_edu.loss import next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, fit
from lora_edu.tuning import (
    fold_p_tuning,
    fold_prefix_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    remove_p_tuning,
    remove_prefix_tuning,
    remove_prompt_tuning,
)
from lora_edu.tuning.p_tuning import load as load_p_tuning
from lora_edu.tuning.p_tuning import state as state_p_tuning
from lora_edu.tuning.prefix_tuning import load as load_prefix
from lora_edu.tuning.prefix_tuning import state as state_prefix
from lora_edu.tuning.prompt_tuning import load as load_prompt
from lora_edu.tuning.prompt_tuning import state as state_prompt
from lora_edu.tuning.prompt_tuning import to_peft

TOKENS = torch.arange(2000) * 7 % 40  # each token follows from the one before
IDS = torch.arange(18).reshape(2, 9) * 5 % 40
WAYS = [
    (prompt_tuning, {}, remove_prompt_tuning),
    (prompt_tuning, {"init": "random"}, remove_prompt_tuning),
    (p_tuning, {}, remove_p_tuning),
    (p_tuning, {"encoder": "lstm", "hidden": 6}, remove_p_tuning),
    (prefix_tuning, {}, remove_prefix_tuning),
    (prefix_tuning, {"reparametrise": 7}, remove_prefix_tuning),
]
every_way = pytest.mark.parametrize("method, options, remove", WAYS)
exact_way = pytest.mark.parametrize("method", [prompt_tuning, prefix_tuning])


def small(seed=0, **options):
    """A TinyLM whose attention looks somewhere in particular, in float64."""
    torch.manual_seed(seed)
    model = TinyLM(
        **{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 24} | options
    ).double()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(5 if name.endswith(("query.weight", "key.weight", "head.weight")) else 1)
    return model


def portrait(model):
    return {
        "parameters": [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        "attributes": {name: id(value) for name, value in vars(model).items() if name != "context"},
        "context": model.context,
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()],
    }


def same(one, other):
    pairs = zip(one.pop("parameters"), other.pop("parameters"), strict=True)
    assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in pairs)
    assert one == other


# Virtual tokens that are real ones


@exact_way
@given(st.lists(st.integers(0, 39), min_size=1, max_size=9), st.integers(1, 15), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_real_tokens_before_the_text_are_an_exact_prompt_and_an_exact_prefix(method, before, time, batch):
    model = small()
    ids = torch.arange(batch * time).reshape(batch, time) * 11 % 40
    together = torch.cat([torch.tensor(before).expand(batch, -1), ids], dim=1)
    expected = model(together)[:, len(before) :]
    method(model, len(before), init=before)
    assert torch.allclose(model(ids), expected, rtol=0, atol=1e-12)
    assert torch.allclose(model.hidden(ids) @ model.head.weight.T, expected, rtol=0, atol=1e-12)


@exact_way
def test_token_ids_are_cut_or_repeated_to_the_length_asked_for(method):
    for given_ids, used in (([1, 2, 3], [1, 2, 3, 1, 2]), (range(9), [0, 1, 2, 3, 4])):
        one, other = method(small(), 5, init=given_ids), method(small(), 5, init=used)
        assert torch.equal(one(IDS), other(IDS))


def test_virtual_tokens_do_not_see_the_text():
    model, seen = prompt_tuning(small(), 4), []
    hook = model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    other = (IDS + 3) % 40
    model(IDS), model(other)
    hook.remove()
    assert torch.equal(seen[0][:, :4], seen[1][:, :4])
    assert not torch.allclose(seen[0][:, 4:], seen[1][:, 4:])


@every_way
def test_the_text_sees_the_virtual_tokens_and_only_what_came_before(method, options, remove):
    base, model = small(), method(small(), 4, **options)
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 40
    one, other = model(IDS), model(changed)
    assert one.shape == base(IDS).shape and not torch.allclose(one[:, 0], base(IDS)[:, 0], atol=1e-3)
    assert torch.allclose(one[:, :5], other[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, 5:], other[:, 5:], atol=1e-3)


# Training


@every_way
def test_three_steps_change_the_loss_and_nothing_that_is_frozen(method, options, remove):
    model = small()
    before = copy.deepcopy(model.state_dict())
    method(model, 4, **options)
    batches = Batches(TOKENS, batch=4, context=16)
    start = next_token_loss(model, *batches(0)).item()
    trained = trainable_parameters(model)
    values = [each.detach().clone() for each in trained]
    held = {id(each) for each in getattr(model, method.__name__).parameters()}
    assert {id(each) for each in trained} == held
    fit(model, batches, torch.optim.Adam(trained, lr=0.05), 3, progress=False)
    assert abs(next_token_loss(model, *batches(0)).item() - start) > 1e-3
    assert all(not torch.equal(each, value) for each, value in zip(trained, values, strict=True))
    assert all(each.grad is None for name, each in model.named_parameters() if name in before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@every_way
def test_gradients_are_those_of_differences(method, options, remove):
    model = method(small(), 3, **options)
    inputs, targets = IDS[:, :-1], IDS[:, 1:]
    next_token_loss(model, inputs, targets).backward()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -2e-6):
            parameter.data.add_(direction, alpha=step)
            losses.append(next_token_loss(model, inputs, targets).item())
        parameter.data.add_(direction, alpha=1e-6)
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4, abs=1e-7)


@every_way
def test_generation_goes_on_beyond_the_context(method, options, remove):
    model = method(small(), 4, **options)
    longer = model.generate(IDS[0], 30, temperature=0)
    assert longer.shape == (39,)
    tokens = IDS[0]
    for _ in range(30):
        tokens = torch.cat([tokens, model(tokens[None, -20:])[0, -1].argmax(0, keepdim=True)])
    assert torch.equal(longer, tokens)


# In and out


@every_way
def test_taken_out_the_model_is_as_it_was_and_so_is_a_copy(method, options, remove):
    model = small()
    model.norm.requires_grad_(False)
    before, expected = portrait(model), model(IDS)
    assert method(model, 4, **options) is model
    twin, tuned = copy.deepcopy(model), model(IDS)
    assert torch.equal(twin(IDS), tuned)
    for each in trainable_parameters(twin):
        each.data.add_(torch.randn_like(each))
    assert not torch.allclose(twin(IDS), tuned) and torch.equal(model(IDS), tuned)
    assert remove(model) is model
    same(portrait(model), before)
    assert torch.equal(model(IDS), expected)
    assert not torch.allclose(twin(IDS), tuned), "a copy stands alone"
    remove(twin)
    assert torch.equal(twin(IDS), expected) and list(vars(twin)) == list(vars(model))


@pytest.mark.parametrize(
    "method, options, fold, remove",
    [
        (p_tuning, {}, fold_p_tuning, remove_prompt_tuning),
        (p_tuning, {"encoder": "lstm", "layers": 1}, fold_p_tuning, remove_prompt_tuning),
        (prefix_tuning, {"reparametrise": True}, fold_prefix_tuning, remove_prefix_tuning),
    ],
)
def test_folded_it_is_the_same_and_what_is_stored_is_what_is_trained(method, options, fold, remove):
    model = small().eval()
    before = portrait(model)
    method(model, 4, **options)
    fit(model, Batches(TOKENS, 4, 16), torch.optim.Adam(trainable_parameters(model)), 3, progress=False)
    expected = model(IDS)
    unfolded = sum(each.numel() for each in trainable_parameters(model))
    copied = copy.deepcopy(model)
    assert fold(model) is model
    assert torch.allclose(model(IDS), expected, rtol=0, atol=1e-12)
    assert torch.allclose(fold(copied)(IDS), expected, rtol=0, atol=1e-12)
    (values,) = trainable_parameters(model)
    assert values.numel() < unfolded
    fit(model, Batches(TOKENS, 4, 16), torch.optim.Adam([values], lr=0.05), 3, progress=False)
    assert not torch.allclose(model(IDS), expected, atol=1e-3), "it can be trained on"
    remove(model)
    same(portrait(model), before)


@pytest.mark.parametrize(
    "method, options, state, load, remove",
    [
        (prompt_tuning, {}, state_prompt, load_prompt, remove_prompt_tuning),
        (p_tuning, {"encoder": "lstm"}, state_p_tuning, load_p_tuning, remove_prompt_tuning),
        (prefix_tuning, {"reparametrise": 5}, state_prefix, load_prefix, remove_prefix_tuning),
    ],
)
def test_what_is_stored_makes_the_same_model_again(method, options, state, load, remove):
    model, other = method(small(), 4, **options), small()
    stored = state(model)
    numbers = 4 * 20 * (4 if method is prefix_tuning else 1)
    assert list(stored) == ["prompt_embeddings"] and stored["prompt_embeddings"].numel() == numbers
    assert load(other, {}, stored) is other
    assert torch.allclose(other(IDS), model(IDS), rtol=0, atol=1e-12)
    stored["prompt_embeddings"].zero_()
    assert torch.allclose(other(IDS), model(IDS), rtol=0, atol=1e-12), "on memory of its own"
    remove(other)
    assert torch.equal(other(IDS), small()(IDS))


@every_way
def test_half_precision_models_keep_their_precision_and_the_trained_numbers_have_more(
    method, options, remove
):
    model = method(small().to(torch.bfloat16), 4, **options)
    logits = model(IDS)
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert {each.dtype for each in trainable_parameters(model)} == {torch.float32}
    assert all(each.grad.norm() > 0 for each in trainable_parameters(model))


@every_way
def test_the_same_seed_draws_the_same_and_leaves_the_callers_random_numbers_alone(method, options, remove):
    state = torch.get_rng_state()
    one, other, third = (method(small(), 4, seed=seed, **options) for seed in (3, 3, 4))
    torch.manual_seed(0), TinyLM(40, 20, 2, 5, 24)
    after_small = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), after_small) and state is not None
    assert torch.equal(one(IDS), other(IDS)) and not torch.allclose(one(IDS), third(IDS))


# What is refused


@every_way
@pytest.mark.parametrize(
    "given_options, message",
    [
        ({"tokens": 0}, r"tokens must be a whole number of at least 1 .*; got 0"),
        ({"tokens": 2.5}, "got 2.5"),
        ({"tokens": True}, "got True"),
        ({"tokens": 24}, r"tokens must be below 24 \(the positions of this model.*\); got 24"),
        ({"tokens": 4, "seed": -1}, r"seed must be a whole number from 0 .*; got -1"),
    ],
)
def test_bad_numbers_are_named_and_nothing_is_changed(method, options, remove, given_options, message):
    model = small()
    before = portrait(model)
    with pytest.raises(ValueError, match=message):
        method(model, **options | given_options)
    same(portrait(model), before)


@every_way
def test_text_that_no_longer_fits_is_refused_with_the_way_out(method, options, remove):
    model = method(small(), 4, **options)
    said = (
        "21 tokens of text and 4 virtual ones are more than this model's 24 positions; give at most 20 tokens"
    )
    for call in (model, model.hidden):
        call(TOKENS[None, :20])
        with pytest.raises(ValueError, match=said):
            call(TOKENS[None, :21])
    remove(model)
    assert model(TOKENS[None, :24]).shape == (1, 24, 40)


@every_way
def test_one_method_at_a_time(method, options, remove):
    model = method(small(), 4, **options)
    expected = model(IDS)
    for second, more, _ in WAYS:
        with pytest.raises(
            ValueError, match=rf"has {method.__name__} already; remove_{method.__name__}\(model\)"
        ):
            second(model, 4, **more)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(ValueError, match=r"has LoRA already; remove_lora\(model\)"):
        method(add_lora(small(), 2, 4, "query"), 4, **options)
    with pytest.raises(ValueError, match=f"no {method.__name__} to take off"):
        remove(small())
    wrong = remove_p_tuning if method is not p_tuning else remove_prompt_tuning
    with pytest.raises(ValueError, match=rf"has {method.__name__}, not"):
        wrong(model)


@every_way
def test_models_that_have_no_place_for_virtual_tokens_are_refused(method, options, remove):
    with pytest.raises(
        TypeError, match="TinyLM or a model of transformers; got Sequential, which has no config"
    ):
        method(nn.Sequential(nn.Embedding(4, 4)), 4, **options)


@exact_way
@pytest.mark.parametrize(
    "ids, message",
    [
        ([], r"at least one; got \(0,\)"),
        ([0.5], r"whole numbers in one row, .*float32"),
        ([[1, 2]], r"in one row, at least one; got \(1, 2\)"),
        ([1, 40], "token ids must be between 0 and 39; got 40"),
        ([-1], "between 0 and 39; got -1"),
        ([True], "whole numbers"),
        ("words", "init must be .*\"random\" or token ids; got 'words'"),
        (object(), "whole numbers"),
    ],
)
def test_what_is_no_token_is_named(method, ids, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        method(model, 4, init=ids)
    assert "context" in vars(model) and model.context == 24


@pytest.mark.parametrize("load, width", [(load_prompt, 20), (load_p_tuning, 20), (load_prefix, 80)])
def test_files_that_do_not_fit_are_refused_and_nothing_is_changed(load, width):
    values = torch.zeros(4, width)
    for tensors, message in (
        ({}, "one tensor, prompt_embeddings.*the file holds nothing"),
        ({"other": values}, "the file holds other"),
        ({"prompt_embeddings": values, "classifier.weight": values}, "holds classifier.weight too"),
        ({"prompt_embeddings": values[:, 1:]}, f"tokens × {width}; the file holds 4 × {width - 1}"),
        ({"prompt_embeddings": values[0]}, f"the file holds {width}"),
        ({"prompt_embeddings": values[:0]}, f"the file holds 0 × {width}"),
        ({"prompt_embeddings": values.long()}, "floating-point numbers; the file holds torch.int64"),
    ):
        model = small()
        before = portrait(model)
        with pytest.raises(AdapterError, match=message):
            load(model, {}, tensors)
        same(portrait(model), before)
    with pytest.raises(ValueError, match="tokens must be below 24"):
        load(small(), {}, {"prompt_embeddings": torch.zeros(24, width)})


def test_peft_has_no_file_for_tinylm():
    assert to_peft(prompt_tuning(small(), 4)) is None
    with pytest.raises(ValueError, match="the model has nothing on it, not prompt_tuning"):
        to_peft(small())


def test_a_prompt_costs_its_positions_and_no_logits():
    """The head never sees the virtual positions: nothing of size tokens × vocabulary is made for them."""
    model, rows = prompt_tuning(small(), 4), []
    model.head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    model(IDS)
    assert rows == [(2, 9, 20)] and math.prod(model(IDS).shape) == 2 * 9 * 40
