"""A smaller adapter: the truncation of s · BA from its factors, with the scaling that it had."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu import lowrank
from lora_edu.lora import resize
from lora_edu.lora.adapter_files import Factors
from lora_edu.lora.resizing import cut, pooled, singular_values


def factors(rows=12, columns=9, rank=6, alpha=5.0, seed=0, dtype=torch.float64, **options) -> Factors:
    made = torch.Generator().manual_seed(seed)
    options = {"rank_stabilised": False, "dropout": 0.1, "embedding": False} | options
    many = options.get("experts", 1)
    A = torch.randn(many * rank, columns, generator=made, dtype=torch.float64)
    B = torch.randn(rows, rank * many, generator=made, dtype=torch.float64)
    if options["embedding"]:
        A, B = A.T.contiguous(), B
    return Factors(A.to(dtype), B.to(dtype), alpha, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 8),
    st.floats(0.1, 40),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_the_smaller_update_is_the_truncation_of_the_old_one(
    rows, columns, rank, alpha, stabilised, embedding, data
):
    old = factors(rows, columns, rank, alpha, rank_stabilised=stabilised, embedding=embedding)
    smaller = data.draw(st.integers(1, min(rows, columns, rank)))
    new = cut(old, smaller)
    assert new.rank == smaller and new.scaling == pytest.approx(old.scaling, rel=1e-12)
    expected = lowrank.truncate(old.delta_weight(), smaller)
    assert torch.allclose(new.delta_weight(), expected, atol=1e-9 * float(expected.norm()))
    S = torch.linalg.svdvals(old.delta_weight())
    (found,) = singular_values(old)
    assert torch.allclose(found, S[: len(found)], atol=1e-9 * float(S[0]))


def test_experts_share_a_rank_and_each_is_truncated():
    old = factors(rank=4, experts=3)
    new = resize({"moe": old}, rank=2)["moe"]
    assert new.experts == 3 and new.rank == 2 and new.lora_A.shape == (6, 9) and new.lora_B.shape == (12, 6)
    for before, after in zip(old.delta_weight(), new.delta_weight(), strict=True):
        assert torch.allclose(after, lowrank.truncate(before, 2), atol=1e-10)
    left = (new.delta_weight() - old.delta_weight()).square().sum()
    assert float(left) == pytest.approx(float(pooled(singular_values(old))[2:].square().sum()))


def test_what_stands_beside_the_factors_is_kept():
    old = factors(dtype=torch.bfloat16, bias=torch.ones(12), kernel=(3, 1))
    new = cut(old, 3)
    assert new.lora_A.dtype == torch.bfloat16 and new.kernel == (3, 1) and new.dropout == 0.1
    assert torch.equal(new.bias * new.scaling, old.bias * old.scaling)


def test_one_budget_goes_where_the_energy_is():
    """All the energy that 84 parameters can keep, found by trying every pair of ranks."""
    layers = {"loud": factors(alpha=20.0), "quiet": factors(seed=1, alpha=4.0)}
    new = resize(layers, parameters=84)
    kept = sum(float(each.delta_weight().square().sum()) for each in new.values())
    spectra = {name: singular_values(each)[0].square() for name, each in layers.items()}
    best = max(
        float(spectra["loud"][:one].sum() + spectra["quiet"][:two].sum())
        for one in range(7)
        for two in range(7)
        if 21 * (one + two) <= 84
    )
    assert kept == pytest.approx(best)
    assert sum(each.lora_A.numel() + each.lora_B.numel() for each in new.values()) <= 84


def test_a_layer_that_was_not_trained_is_left_out_and_nothing_at_all_is_an_error():
    old = factors()
    still = old._replace(lora_B=torch.zeros_like(old.lora_B))
    assert list(resize({"still": still, "moved": old}, energy=0.9)) == ["moved"]
    with pytest.raises(ValueError, match=r"nothing is left of the adapter: every rank would be 0"):
        resize({"still": still}, rank=2)
    with pytest.raises(ValueError, match=r"one direction takes 21 parameters or more"):
        resize({"moved": old}, parameters=20)


def test_a_rank_that_ba_does_not_have_is_not_filled_with_rounding():
    old = factors(rank=4)
    twice = old._replace(
        lora_A=torch.cat([old.lora_A] * 2), lora_B=torch.cat([old.lora_B] * 2, 1), alpha=10.0
    )
    assert resize({"q": twice}, rank=7)["q"].rank == 4


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "give exactly one of"),
        ({"rank": 2, "energy": 0.9}, "give exactly one of"),
        ({"rank": 0}, "rank must be a whole number above 0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1"),
        ({"error": -0.1}, "error must be at least 0 and below 1"),
    ],
)
def test_rules_out_of_range(rule, message):
    with pytest.raises(ValueError, match=message):
        resize({"q": factors()}, **rule)


def test_nan_and_a_rank_too_large_are_said():
    old = factors()
    with pytest.raises(ValueError, match=r"rank must be between 1 and 6 \(what BA can have at most\); got 7"):
        cut(old, 7)
    with pytest.raises(ValueError, match="must be finite"):
        resize({"q": old._replace(lora_A=old.lora_A * torch.nan)}, rank=2)


@pytest.mark.parametrize("sides", [(40, 30, 5), (12, 40, 16), (8, 8, 8)])
def test_the_edge_of_noise_is_that_of_products_drawn_in_full(sides):
    """Forty products, never drawn as their factors' triangles: their largest singular values are distributed alike."""
    rows, columns, rank = sides
    torch.manual_seed(0)
    values = torch.linalg.svdvals(
        torch.randn(400, rows, rank).double() @ torch.randn(400, rank, columns).double()
    )
    largest = values[:, 0] / values.norm(dim=1)
    edge = lowrank.product_noise_edge(rows, columns, rank)
    assert largest.quantile(0.85) < edge <= largest.max() * 1.1
    assert edge == lowrank.product_noise_edge(rows, columns, rank)


def test_an_edge_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank and draws must be at least 1; got 0 and 40"):
        lowrank.product_noise_edge(3, 3, 0)
    with pytest.raises(
        ValueError, match="left must have as many columns as right has rows; got 2 × 3 and 4 × 2"
    ):
        lowrank.svd_of_product(torch.ones(2, 3), torch.ones(4, 2))
