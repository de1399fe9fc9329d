"""Which rank each matrix gets: every rule against its definition, and one budget against every possible choice."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu import lowrank
from lora_edu.lora import choose_ranks

SPECTRA = {
    "a": torch.tensor([4.0, 2.0, 1.0, 0.5]),
    "b": torch.tensor([3.0, 3.0, 3.0]),
    "zero": torch.zeros(3),
}
SIDES = {"a": (4, 6), "b": (3, 5), "zero": (3, 3)}


def kept(ranks: dict[str, int], spectra=SPECTRA) -> float:
    return sum(float(spectra[name][:rank].double().square().sum()) for name, rank in ranks.items())


def spent(ranks: dict[str, int], sides=SIDES) -> int:
    return sum(rank * sum(sides[name]) for name, rank in ranks.items())


def test_a_fixed_rank_stops_where_the_singular_values_do():
    assert choose_ranks(SPECTRA, SIDES, rank=2) == {"a": 2, "b": 2, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, rank=9) == {"a": 4, "b": 3, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, rank=9, most={"a": 1}) == {"a": 1, "b": 3, "zero": 0}


@pytest.mark.parametrize("share", [0.1, 0.5, 2 / 3, 0.9, 0.99, 1.0])
def test_energy_is_that_of_lowrank_and_error_its_root(share):
    ranks = choose_ranks(SPECTRA, SIDES, energy=share)
    assert ranks == {name: lowrank.rank_for_energy(each, share) for name, each in SPECTRA.items()}
    if share < 1:
        error = math.sqrt(1 - share)
        for name, rank in choose_ranks(SPECTRA, SIDES, error=error).items():
            left = lambda r, S=SPECTRA[name]: float(S[r:].norm()) <= error * float(S.norm()) * (1 + 1e-6)
            assert left(rank) and (rank == 0 or not left(rank - 1))


def test_a_head_of_the_spectrum_needs_the_whole_norm():
    head = {"a": SPECTRA["a"][:2]}
    assert choose_ranks(head, SIDES, energy=0.95) == {"a": 2}
    assert choose_ranks(head, SIDES, energy=0.8, norms={"a": 10.0}) == {"a": 2}, "not reached: all there is"
    assert choose_ranks(head, SIDES, energy=0.1, norms={"a": 10.0}) == {"a": 1}


spectrum = st.lists(st.floats(0, 8, width=16), min_size=1, max_size=4).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(spectrum, min_size=1, max_size=3), st.integers(1, 60), st.data())
def test_no_choice_keeps_much_more_within_the_budget(drawn, budget, data):
    """Against every choice there is: the best one where all cost the same, else less than one σ² away from it."""
    spectra = {str(number): each for number, each in enumerate(drawn)}
    equal = data.draw(st.booleans())
    sides = {
        name: (4, 4) if equal else data.draw(st.sampled_from([(2, 2), (3, 4), (5, 5)])) for name in spectra
    }
    chosen = choose_ranks(spectra, sides, parameters=budget)
    assert spent(chosen, sides) <= budget
    choices = itertools.product(*(range(len(each) + 1) for each in spectra.values()))
    every = [dict(zip(spectra, ranks, strict=True)) for ranks in choices]
    best = max(kept(each, spectra) for each in every if spent(each, sides) <= budget)
    largest = max((float(each[0]) ** 2 for each in spectra.values()), default=0.0)
    assert kept(chosen, spectra) == pytest.approx(best) if equal else kept(chosen, spectra) >= best - largest


def test_the_budget_goes_where_a_parameter_brings_most():
    """9 / 8 for each direction of b, 16 / 10, 4 / 10 … for those of a."""
    assert choose_ranks(SPECTRA, SIDES, parameters=10) == {"a": 1, "b": 0, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, parameters=18) == {"a": 1, "b": 1, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, parameters=34) == {"a": 1, "b": 3, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, parameters=10**6) == {"a": 4, "b": 3, "zero": 0}
    assert choose_ranks(SPECTRA, SIDES, parameters=10**6, most={"b": 1}) == {"a": 4, "b": 1, "zero": 0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "exactly one of rank, energy, error and parameters; got none"),
        ({"rank": 2, "energy": 0.5}, "got rank and energy"),
        ({"rank": 0}, "rank must be a whole number above 0; got 0"),
        ({"rank": 1.5}, "rank must be a whole number above 0; got 1.5"),
        ({"rank": True}, "got True"),
        ({"parameters": -5}, "parameters must be a whole number above 0; got -5"),
        ({"energy": 0.0}, "energy must be above 0 and at most 1"),
        ({"energy": float("nan")}, "energy must be above 0"),
        ({"error": 1.0}, "error must be at least 0 and below 1"),
    ],
)
def test_what_is_no_rule_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        choose_ranks(SPECTRA, SIDES, **rules)


def test_bad_spectra_are_refused():
    with pytest.raises(ValueError, match="must fall"):
        choose_ranks({"a": torch.tensor([1.0, 2.0])}, SIDES, rank=1)
    with pytest.raises(ValueError, match="finite"):
        choose_ranks({"a": torch.tensor([float("nan")])}, SIDES, rank=1)
    with pytest.raises(ValueError, match="x has none"):
        choose_ranks({"x": torch.tensor([1.0])}, SIDES, rank=1)
