"""The formulas of one matrix against live tensors, and every bad input's message."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lora_edu import counting

SIDES = st.integers(1, 300)


@st.composite
def shapes_and_ranks(draw):
    rows, columns = draw(SIDES), draw(SIDES)
    return rows, columns, draw(st.integers(1, min(rows, columns)))


@settings(deadline=None)
@given(shapes_and_ranks())
def test_parameters_are_the_numbers_in_a_and_b(shape):
    rows, columns, rank = shape
    A, B = torch.empty(rank, columns, device="meta"), torch.empty(rows, rank, device="meta")
    assert counting.lora_parameters(rows, columns, rank) == A.numel() + B.numel()
    assert (B @ A).shape == (rows, columns)
    assert counting.share(rows, columns, rank) == pytest.approx((A.numel() + B.numel()) / (rows * columns))


@settings(deadline=None)
@given(shapes_and_ranks())
def test_break_even_is_where_the_share_passes_one_and_lies_below_the_smaller_side(shape):
    rows, columns, rank = shape
    even = counting.break_even_rank(rows, columns)
    assert min(rows, columns) / 2 <= even < min(rows, columns)
    assert (rank < even) == (counting.share(rows, columns, rank) < 1) or rank == pytest.approx(even)


def test_the_note_s_example():
    assert counting.lora_parameters(10_000, 100, 8) == 80_800
    assert counting.share(10_000, 100, 8) == pytest.approx(0.0808)
    assert counting.break_even_rank(10_000, 100) == pytest.approx(99.01, abs=0.005)
    assert counting.break_even_rank(4096, 4096) == 2048


@settings(deadline=None, max_examples=25)
@given(shapes_and_ranks())
def test_flops_of_one_layer_are_those_that_torch_counts(shape):
    rows, columns, rank = shape
    x = torch.ones(7, columns, requires_grad=True)
    W, A, B = torch.ones(rows, columns), torch.ones(rank, columns), torch.ones(rows, rank)
    for trained, own in ((W, 0), (A, rank)):
        for tensor in (W, A, B):
            tensor.requires_grad_(tensor is trained or (own > 0 and tensor is B))
        with FlopCounterMode(display=False) as forward:
            y = x @ W.T + (x @ A.T @ B.T if own else 0)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert forward.get_total_flops() == 7 * counting.forward_flops(rows, columns, own)
        assert backward.get_total_flops() == 7 * counting.backward_flops(rows, columns, own)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: counting.lora_parameters(10_000, 100, 128),
            "rank must be between 1 and 100 (the smaller side of the 10000 × 100 weight); got 128",
        ),
        (lambda: counting.share(10, 10, 0), "rank must be between 1 and 10"),
        (lambda: counting.lora_parameters(10, 10, 2.5), "got 2.5"),
        (lambda: counting.break_even_rank(0, 3), "rows must be a whole number, 1 or more; got 0"),
        (lambda: counting.architecture("lama-3-8b"), "did you mean Llama-3-8B"),
        (lambda: counting.count("GPT-2", "c_atn"), "did you mean c_attn"),
        (lambda: counting.count("GPT-2", ()), "targets must name at least one matrix"),
        (lambda: counting.count("GPT-2", ("c_attn", "query")), "name the whole or its parts"),
        (
            lambda: counting.count("TinyLM", "embedding", 101),
            "between 1 and 100 (the smaller side of the 10000",
        ),
        (lambda: counting.size(3, "float23"), "unknown dtype 'float23'; did you mean float32"),
        (lambda: counting.optimiser_bytes(3, 1, optimiser="adan"), "did you mean adam"),
        (
            lambda: counting.training_memory("GPT-2", "ful"),
            "method must be one of 'full', 'lora', .*; got 'ful'; did you mean full",
        ),
        (lambda: counting.training_memory("GPT-2", "lora"), "needs a rank"),
        (lambda: counting.training_memory("GPT-2", "full", dtype="int4"), "use method 'lora'"),
        (lambda: counting.training_flops("DeBERTa-XXL"), "not worked out"),
    ],
)
def test_bad_inputs_are_told_the_value_the_rule_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_import_costs_no_torch():
    """Nor numpy, nor widgets: the module is for any Python, at once."""
    code = (
        "import sys, lora_edu.counting; print({'torch', 'numpy', 'ipywidgets', 'difflib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
