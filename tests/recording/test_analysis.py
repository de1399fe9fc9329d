"""The analysis of recorded weights says what is so of weights whose directions were put there."""

import math

import pytest
import torch

from lora_edu.data.runs import run_of, tuned_runs
from lora_edu.lora import add_lora, lora_layers
from lora_edu.recording import analysis
from lora_edu.tinylm import TinyLM

TARGETS = ["embedding", "head", "query", "key", "value", "output", "up", "down"]


def adapter(rank, seed, spread=1.0):
    """(model, trained state) of LoRA everywhere on a small TinyLM, both factors drawn at random."""
    torch.manual_seed(0)
    model = add_lora(TinyLM(60, 20, 2, 2, 16), rank, rank, TARGETS)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = spread * torch.randn(factor.shape, generator=generator)
    return model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def row(**settings):
    """A recorded row; of two rates the larger is the better one."""
    run = run_of(**settings)
    return run | {"test": 4.0, "name": str(settings), "evaluations": [{"loss": 1 / run["rate"]}]}


def test_updates_are_the_layers_own():
    model, state = adapter(3, seed=0)
    found = analysis.updates(state)
    assert set(found) == set(lora_layers(model)) and len(found) == 2 + 2 * 6
    for name, layer in lora_layers(model).items():
        assert torch.allclose(found[name], layer.delta_weight(), atol=1e-5), name


def test_updates_of_full_tuning_are_its_matrices():
    state = {"head.weight": torch.ones(4, 2).half(), "blocks.0.mlp.up.bias": torch.ones(3).half()}
    found = analysis.updates(state)
    assert list(found) == ["head"] and found["head"].dtype == torch.float32


def test_the_same_run_in_other_factors_is_the_same_run():
    """BA = (BM)(M⁻¹A): the update agrees in full, and so do the row space of A and the column space of B."""
    _, state = adapter(4, seed=0)
    M = torch.eye(4) + torch.ones(4, 4)
    other = {}
    for name, value in state.items():
        thin = value.shape[0] == 4  # A of a linear layer, (r, in); all else is (…, r)
        other[name] = torch.linalg.inv(M) @ value if thin else value @ (torch.linalg.inv(M).T)
        if name.endswith("lora_B"):
            other[name] = value @ M
    for kind, found in analysis.similarity(state, other).items():
        assert found["BA"]["4,4"] == found["BA"]["1,1"] == found["cosine"] == 1, kind
        assert kind == "embedding" or found["A"]["4,4"] == found["B"]["4,4"] == 1


def test_strangers_overlap_by_chance_and_no_more():
    values = {"A": [], "B": [], "BA": []}
    for seed in range(6):
        found = analysis.similarity(adapter(2, seed)[1], adapter(8, seed + 100)[1])
        for what in values:
            values[what].append(found["query"][what]["2,8"])
    for what, each in values.items():
        assert sum(each) / len(each) == pytest.approx(8 / 20, abs=0.08), what
    assert (found["down"]["rows"], found["down"]["columns"]) == (20, 80)
    assert "A" not in found["embedding"] and set(found) == set(TARGETS)


def test_full_tuning_is_compared_by_its_update_alone():
    _, state = adapter(2, seed=0)
    whole = {f"{name}.weight": dW for name, dW in analysis.updates(adapter(20, seed=1)[1]).items()}
    found = analysis.similarity(state, whole)
    assert set(found["query"]) == {"rows", "columns", "BA", "cosine"}
    assert "2,16" in found["query"]["BA"] and "4,1" not in found["query"]["BA"]


def test_its_own_directions_hold_the_most():
    whole = analysis.updates(adapter(20, seed=1)[1])
    own = analysis.captured(whole, whole, 4)
    other = analysis.captured(analysis.updates(adapter(4, seed=2)[1]), whole, 4)
    for kind in TARGETS:
        assert own[kind]["held"] == own[kind]["best"] > other[kind]["held"]
    assert own["query"]["chance"] == 4 / 20 and own["down"]["chance"] == 4 / 80


def test_spectra_of_an_update_of_rank_one():
    _, state = adapter(1, seed=0)
    base = TinyLM(60, 20, 2, 2, 16).state_dict()
    update = analysis.updates(state)
    found = analysis.spectra(update, base)
    assert found["query"]["stable"] == 1 and found["query"]["ninety"] == 1
    assert found["head"]["size"] == pytest.approx(
        float(update["head"].norm() / base["head.weight"].norm()), abs=6e-4
    )


def test_a_new_direction_is_an_intruder_and_a_louder_old_one_is_not():
    torch.manual_seed(0)
    base = {"blocks.0.attention.query.weight": torch.randn(40, 40)}
    W = base["blocks.0.attention.query.weight"]
    U, S, Vh = torch.linalg.svd(W)
    louder = {"blocks.0.attention.query": 3 * S[0] * U[:, :1] @ Vh[:1]}
    spread = torch.full((40,), 1 / math.sqrt(40))  # equally far from all old directions
    new = {"blocks.0.attention.query": 9 * S[0] * torch.outer(U @ spread, spread @ Vh)}
    assert analysis.intruders(louder, base)["found"]["0.9"] == 0
    found = analysis.intruders(new, base)
    assert found["found"]["0.3"] == 1  # its |cosine| with each old direction is √(1 / 40) = 0.16
    assert found["shuffled"]["0.9"] >= 1


def test_nothing_changed_is_no_intruder():
    base = {"blocks.0.mlp.up.weight": torch.randn(80, 20, generator=torch.Generator().manual_seed(0))}
    found = analysis.intruders({"blocks.0.mlp.up": torch.zeros(80, 20)}, base, draws=1)
    assert not any(found["found"].values()) and not any(found["shuffled"].values())


def test_the_tuned_rate_is_that_of_the_best_run_of_seed_0():
    rows = [row(rank=8, rate=rate) for rate in (0.003, 0.01)] + [row(rank=8, rate=0.01, seed=1)]
    rows += [row(method="full", rate=0.006), row(rank=8, rate=0.01, seed=1, text="manual")]
    rows += [row(rank=2, rate=0.02)]  # between ranks whose rates are not known
    assert tuned_runs(rows) == {(8, 0): rows[1], (8, 1): rows[2], (None, 0): rows[3]}


def test_all_of_it_leaves_out_what_is_not_there():
    base = TinyLM(60, 20, 2, 2, 16).state_dict()
    rows = [row(rank=8, rate=rate) for rate in (0.003, 0.01)] + [row(rank=8, rate=0.01, seed=1)]
    states = {each["name"]: adapter(8, seed)[1] for seed, each in enumerate(rows)}
    found = analysis.analyse(rows, states.__getitem__, base)
    assert [(pair["first"]["seed"], pair["second"]["seed"]) for pair in found["pairs"]] == [(0, 1), (0, 0)]
    assert found["captured"] == [] and len(found["spectra"]) == len(found["intruders"]) == 1

    whole = {f"{name}.weight": W for name, W in analysis.updates(adapter(20, seed=9)[1]).items()}
    full = [row(method="full", rate=0.006, seed=seed) for seed in (0, 1)]
    states |= {each["name"]: whole for each in full}
    more = analysis.analyse(rows + full, states.__getitem__, base)
    assert [each["directions"] for each in more["captured"]] == [8, 1, 2, 4, 8, 16]
