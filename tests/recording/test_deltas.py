"""Short tunings for chapter 03: overlaps count what they should, and the planted run is judged by its own teacher."""

import json

import pytest
import torch

from lora_edu import lowrank
from lora_edu.data import load_checkpoint, load_deltas, shipped
from lora_edu.recording import deltas


def test_an_update_overlaps_with_itself_and_not_with_one_of_other_directions():
    generator = torch.Generator().manual_seed(0)
    one = {"blocks.0.mlp.up.weight": torch.randn(90, 64, generator=generator)}
    (own,) = deltas.overlaps(one, one)["up"]
    assert own["right"] == own["left"] == [1.0] * len(deltas.SIZES) and own["cosine"] == 1.0
    U, S, Vh = lowrank.svd(one["blocks.0.mlp.up.weight"])
    half = (U[:, :32] * S[:32]) @ Vh[:32] + 1e-3 * (U[:, 32:] * S[32:]) @ Vh[32:]
    turned = half @ (Vh.T @ Vh.roll(32, 0))  # the strongest 32 inputs become the weakest
    (row,) = deltas.overlaps({"blocks.0.mlp.up.weight": half}, {"blocks.0.mlp.up.weight": turned})["up"]
    assert max(row["right"]) < 1e-3 and min(row["left"]) > 0.999


def test_a_short_tuning_moves_every_matrix_and_its_order_matters():
    first, second = (deltas.tune("reference", seed, steps=1) for seed in (0, 1))
    assert set(first) == {name for name, W in load_checkpoint("base").items() if W.dim() == 2}
    assert all(dW.norm() > 0 for dW in first.values())
    assert not first["head.weight"].equal(second["head.weight"])


def test_the_teacher_itself_is_at_no_distance_and_the_base_is_far():
    base, goal = load_checkpoint("base"), load_checkpoint("planted")["planted"]
    name = shipped.manifest()["stages"]["planted"]["matrix"]
    text = torch.arange(2 * 64).view(2, 64) % 1000
    found = deltas.planted_figures(base, goal, {name: goal}, name, text)
    assert found["divergence"]["tuned"] == 0 and found["divergence"]["base"] > 0.001
    assert found["divergence"]["1"] > found["divergence"]["2"] == 0
    assert found["relative_norm"] == 1 and found["overlap"] == [1.0, 1.0]
    assert found["singular_values"][1] > 1000 * found["singular_values"][2]


def test_what_is_packed_is_read_again():
    record = {
        "another text": {"rate": 0.1, "overlaps": {"same text": {"up": [{"right": [1.0]}]}}},
        "b": {"c": [1]},
    }
    assert json.loads(deltas.packed(record)) == record


def test_what_ships_has_both_and_the_text_shows_beside_the_order():
    found = load_deltas()["another text"]
    at = found["sizes"].index(8)
    for kind in ("query", "key", "value", "output", "up", "down"):
        same, other = (
            sum(row["right"][at] for row in found["overlaps"][what][kind]) / 6 for what in deltas.PAIRS
        )
        assert lowrank.chance_similarity(8, 8, 100) + 0.03 < other < same - 0.1


@pytest.mark.slow
def test_the_planted_rank_is_learnt_from_drawn_tokens():
    about = shipped.manifest()["stages"]["planted"] | {"steps": 3}
    found = deltas.planted_with_labels(about)
    assert len(found["singular_values"]) == 100 and found["divergence"]["base"] > 0.05
