"""BitFit: which parameters are bias terms, how many, and what can't be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import portrait
from torch import nn

from lora_edu.lora import trainable_parameters
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import bitfit, remove_bitfit, trained_parameters


def trained(model):
    return [name for name, each in model.named_parameters() if each.requires_grad]


@given(st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_in_tinylm_eleven_biases_of_width_a_block_and_one_at_the_end(layers, heads):
    width = 4 * heads
    model = bitfit(TinyLM(30, width, layers, heads, 8))
    assert trained_parameters(model) == layers * 11 * width + width
    assert all(name.endswith("bias") for name in trained(model))


def test_at_the_size_that_ships_it_is_a_four_hundredth_of_the_model():
    model = TinyLM()
    everything = sum(each.numel() for each in model.parameters())
    assert everything == 2_728_000 and trained_parameters(bitfit(model)) == 6_700


def test_the_papers_smallest_set_is_the_query_and_the_first_matrix_of_the_mlp():
    model = bitfit(TinyLM(30, 20, 2, 5, 8), ["query", "mlp.up"])
    assert trained_parameters(model) == 2 * (20 + 80)
    assert trained(model) == [
        f"blocks.{n}.{each}.bias" for n in range(2) for each in ("attention.query", "mlp.up")
    ]


def test_the_tasks_layer_is_trained_whole_and_given_back():
    model = TinyLM(30, 20, 1, 5, 8)
    before = model.head.weight.detach().clone()
    bitfit(model, "query", head="head")
    assert trained(model) == ["blocks.0.attention.query.bias", "head.weight"]
    for each in trainable_parameters(model):
        each.data.add_(1.0)
    remove_bitfit(model)
    assert torch.equal(model.head.weight, before) and not model.blocks[0].attention.query.bias.any()


def test_kept_biases_stay_and_the_model_is_a_plain_one():
    model = bitfit(TinyLM(30, 20, 1, 5, 8), "query")
    model.blocks[0].attention.query.bias.data.fill_(2.0)
    remove_bitfit(model, keep=True)
    assert model.blocks[0].attention.query.bias.eq(2).all()
    assert all(each.requires_grad for each in model.parameters())


def test_the_biases_of_torchs_own_attention_are_found():
    model = bitfit(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)}))
    assert trained(model) == ["attention.in_proj_bias", "attention.out_proj.bias", "norm.bias"]


@pytest.mark.parametrize(
    "make, options, message",
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4, bias=False)),
            {},
            "this Sequential has no bias terms.*ia3 or add_lora",
        ),
        (TinyLM, {"targets": "head"}, "head has no bias of its own to train; leave it out"),
        (TinyLM, {"targets": "quary"}, "no layer matches quary; did you mean query"),
        (TinyLM, {"head": "classifier"}, "no layer matches classifier"),
        (TinyLM, {"targets": []}, "targets must name at least one layer"),
    ],
)
def test_errors_name_the_layer_and_leave_the_model_alone(make, options, message):
    model = make()
    before = portrait(model)
    with pytest.raises(ValueError, match=message):
        bitfit(model, **options)
    assert portrait(model) == before
