"""Adapters mixed: the sum of their ΔW, exactly, and its best approximation of a lower rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from lora_edu import lowrank
from lora_edu.lora import add_lora, lora_layers, mix, read_adapter, save_adapter
from lora_edu.lora.adapter_files import Factors
from lora_edu.lora.resizing import at_most, pooled, singular_values


def drawn(rank, sides=(9, 7), seed=0, kind="linear", stabilised=False, alpha=3.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    rows, columns = sides
    experts = 3 if kind == "experts" else 1
    if kind == "embedding":
        A, B = draw(rows, rank), draw(columns, rank)
    else:
        A, B = draw(experts * rank, columns), draw(rows, experts * rank)
    return Factors(A, B, alpha, stabilised, 0.0, kind == "embedding", experts)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linear", "embedding", "experts"]),
    st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2), st.booleans()), min_size=1, max_size=3),
)
def test_a_mixture_is_the_weighted_sum_of_updates(kind, parts):
    adapters = [
        ({"layer": drawn(rank, seed=seed, kind=kind, stabilised=stabilised)}, weight)
        for seed, (rank, weight, stabilised) in enumerate(parts)
    ]
    mixed = mix(adapters)["layer"]
    wanted = sum(weight * each["layer"].delta_weight() for each, weight in adapters)
    assert torch.allclose(mixed.delta_weight(), wanted, atol=1e-4)
    assert mixed.rank == sum(rank for rank, _, _ in parts)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["linear", "embedding", "experts"]), st.integers(1, 5), st.booleans())
def test_a_cut_is_the_truncated_svd_and_its_spectrum_says_what_is_lost(kind, rank, stabilised):
    factors = drawn(5, kind=kind, stabilised=stabilised)
    smaller, spectrum = at_most(factors, rank), pooled(singular_values(factors))
    lost = float(spectrum[rank:].norm() / spectrum.norm())
    whole = factors.delta_weight().reshape(-1, *factors.sides)
    best = torch.stack([lowrank.truncate(each, rank) for each in whole])
    assert torch.allclose(smaller.delta_weight().reshape(best.shape), best, atol=1e-4)
    assert lost == pytest.approx(float((whole - best).norm() / whole.norm()), abs=1e-5)
    assert smaller.rank == rank


def test_an_adapter_and_its_negative_cancel(tmp_path):
    model = add_lora(tiny(), 2, 4, ["query", "embedding"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    adapter = read_adapter(save_adapter(model, tmp_path / "a"))
    mixed = mix([(adapter, 1.0), (adapter, -1.0)], rank=2)
    assert set(mixed) == set(adapter.layers)
    assert all(each.delta_weight().abs().max() < 1e-5 for each in mixed.values())


def test_what_cant_be_mixed_is_said():
    with pytest.raises(ValueError, match="at least one"):
        mix([])
    with pytest.raises(ValueError, match="finite number; got nan"):
        mix([({"a": drawn(1)}, math.nan)])
    with pytest.raises(ValueError, match=r"a must be alike.*sides is \(9, 7\) in one and \(9, 6\)"):
        mix([({"a": drawn(1)}, 1.0), ({"a": drawn(1, (9, 6))}, 1.0)])
    with pytest.raises(ValueError, match="whole number above 0; got 0"):
        mix([({"a": drawn(2)}, 1.0)], rank=0)
