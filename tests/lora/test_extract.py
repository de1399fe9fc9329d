"""ΔW of two state dicts as factors: beside the truncated SVD, down to the rounding floor, within a budget."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TOKENS, tiny

from lora_edu import lowrank
from lora_edu.lora import extract_lora, load_adapter, write_adapter
from lora_edu.lora.extract import choose, leading


def moved(model, rank=3, size=0.1, seed=5):
    """The model after a change of low rank to every matrix and a small one to every vector."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for each in tuned.parameters():
            if each.ndim == 2:
                each += size * torch.randn(len(each), rank) @ torch.randn(rank, each.shape[1])
            else:
                each += size
    return tuned


def test_base_and_adapter_are_base_and_truncated_delta(tmp_path):
    base, tuned = tiny(), moved(tiny())
    before, after = base.state_dict(), tuned.state_dict()
    found = extract_lora(before, after, rank=2)
    assert set(found.left) == {name for name, each in before.items() if each.ndim == 1}
    adapted = load_adapter(copy.deepcopy(base), write_adapter(tmp_path / "a", found.layers))
    for name, layer in found.layers.items():
        delta = after[f"{name}.weight"] - before[f"{name}.weight"]
        best = lowrank.truncate(delta, 2)
        assert torch.allclose(layer.delta_weight(), best, atol=1e-5)
        assert found.errors[name] == pytest.approx(float((delta - best).norm() / delta.norm()), abs=1e-4)
        assert torch.allclose(adapted.get_submodule(name).delta_weight(), best, atol=1e-5)
    cut = copy.deepcopy(base)
    with torch.no_grad():
        for name in found.layers:
            weight = cut.get_submodule(name).weight
            weight += lowrank.truncate(after[f"{name}.weight"] - weight, 2)
    assert torch.allclose(adapted(TOKENS), cut(TOKENS), atol=1e-4)


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.2}])
def test_energy_and_error_are_held_matrix_by_matrix_and_no_rank_is_wasted(rule):
    before, after = tiny().state_dict(), moved(tiny()).state_dict()
    most = (1 - rule.get("energy", 0)) ** 0.5 if "energy" in rule else rule["error"]
    for name, layer in extract_lora(before, after, **rule).layers.items():
        S = torch.linalg.svdvals(after[f"{name}.weight"].double() - before[f"{name}.weight"].double())
        left = lambda rank, S=S: float(S[rank:].norm() / S.norm())
        assert left(layer.rank) <= most + 1e-6 and (layer.rank == 1 or left(layer.rank - 1) > most - 1e-6)


def test_one_budget_is_shared_by_all_spectra():
    before, after = tiny().state_dict(), moved(tiny()).state_dict()
    found = extract_lora(before, after, parameters=400)
    spent = sum(each.rank * sum(each.sides) for each in found.layers.values())
    assert spent <= 400
    gains = {}
    for name, each in before.items():
        if each.ndim == 2:
            S = torch.linalg.svdvals(after[name] - each)
            gains[name.removesuffix(".weight")] = S.square() / sum(each.shape)
    taken = [float(gains[name][each.rank - 1]) for name, each in found.layers.items()]
    ranks = {name: found.layers[name].rank if name in found.layers else 0 for name in gains}
    not_taken = [(float(gains[name][rank]), name) for name, rank in ranks.items() if rank < len(gains[name])]
    best, name = max(not_taken)
    assert best <= min(taken) * (1 + 1e-4) or sum(before[f"{name}.weight"].shape) > 400 - spent


def test_a_budget_asks_for_no_more_directions_than_it_takes():
    torch.manual_seed(0)
    deltas = {
        name: torch.diag(0.98 ** torch.arange(300.0)) * scale for name, scale in (("a", 1.0), ("b", 1e-6))
    }
    asked = []

    def lead(name, count):
        asked.append((name, count))
        return leading(deltas[name], count, None, 0.0)

    rules = {"rank": None, "energy": None, "error": None, "parameters": 100 * 600}
    ranks, heads = choose(["a", "b"], {"a": (300, 300), "b": (300, 300)}, rules, lead)
    assert ranks == {"a": 100, "b": 0}
    assert asked == [("a", 32), ("b", 32), ("a", 64), ("a", 128)]
    assert len(heads["b"].S) == 32


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([torch.bfloat16, torch.float16]))
def test_no_rank_is_spent_on_rounding(seed, dtype):
    """A change of rank 2 stored in half precision: 20 directions are asked for, those of the rounding aren't taken."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(60, 50, generator=generator)
    update = torch.randn(60, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    gentle = W * (1 + 1e-4 * torch.randn(60, 50, generator=generator))
    before = {"a.weight": W.to(dtype), "b.weight": W.to(dtype)}
    after = {"a.weight": (W + update).to(dtype), "b.weight": gentle.to(dtype)}
    found = extract_lora(before, after, rank=20)
    assert found.layers["a"].rank == 2 and found.rounding["a"] < 1e-3
    assert "b" not in found.layers and found.left["b.weight"] == "no direction above the rounding floor"
    assert found.rounding["b"] > 0.5


def test_grown_and_shrunk_tables_fit_the_base():
    torch.manual_seed(1)
    base = torch.randn(12, 4)
    update = torch.randn(12, 1) @ torch.randn(1, 4)
    more = torch.cat([base + update, torch.randn(3, 4)])
    found = extract_lora({"wte.weight": base}, {"wte.weight": more}, rank=4)
    assert torch.allclose(found.layers["wte"].delta_weight(), update, atol=1e-5)
    assert found.layers["wte"].embedding and "rows 12 to 14" in found.left["wte.weight"]
    fewer = extract_lora({"wte.weight": base}, {"wte.weight": (base + update)[:9]}, rank=4)
    assert torch.allclose(fewer.layers["wte"].delta_weight()[:9], update[:9], atol=1e-5)
    assert fewer.layers["wte"].delta_weight()[9:].abs().max() < 1e-6


def test_weights_that_are_stored_transposed():
    torch.manual_seed(1)
    base, update = torch.randn(5, 7), torch.randn(5, 1) @ torch.randn(1, 7)
    before, after = {"h.c_attn.weight": base}, {"h.c_attn.weight": base + update}
    layer = extract_lora(before, after, rank=1, transposed=("c_attn",)).layers["h.c_attn"]
    assert layer.lora_A.shape == (1, 5) and layer.lora_B.shape == (7, 1)
    assert torch.allclose(layer.delta_weight(), update.T, atol=1e-5)


def test_nothing_and_two_rules_are_refused():
    state = tiny().state_dict()
    with pytest.raises(ValueError, match="equal"):
        extract_lora(state, state, rank=1)
    with pytest.raises(ValueError, match="exactly one"):
        extract_lora(state, state, rank=1, energy=0.9)
