"""Five cases of how low is low: shares by hand from made-up rows, and what the recorded ones say."""

import pytest
import torch
from made_up_llm import ROWS

from lora_edu import five_cases
from lora_edu.data import load_methods, load_regimes
from lora_edu.data.published import Recorded, load_recorded


def test_shares_count_from_the_untuned_model_to_the_whole_update():
    assert five_cases.shares({"0": 5.5, "1": 4.0, "8": 2.9}, 5.0, 3.0) == pytest.approx(
        {0: -0.25, 1: 0.5, 8: 1.05}
    )
    with pytest.raises(ValueError, match=r"nothing was gained: 3\.0000 nats before, 3\.1000 after"):
        five_cases.shares({1: 2.0}, 3.0, 3.1)


def test_a_real_model_has_a_gentle_and_a_steep_curve_and_lora_beside_tuned_full_tuning():
    case = five_cases.language_model(ROWS)
    assert (case.width, case.full) == (576, 134_515_008)
    assert case.cut["gentle"] == pytest.approx({0: 0.1, 1: 0.5, 2: 0.7, 8: 0.8, 64: 1.0})
    assert case.cut["steep"] == pytest.approx({0: -0.125, 1: 0.25, 2: 0.375, 8: 0.75, 64: 0.9375})
    # of the gain of full tuning at its tuned rate, 1 nat; three seeds at 8
    assert case.trained == pytest.approx({1: 0.8, 4: 0.85, 8: 0.8})
    assert case.numbers == {1: 305_280, 4: 1_221_120, 8: 2_442_240}
    assert five_cases.at_rank([case], 8) == [
        {
            "name": "SmolLM2, docstrings",
            "width": 576,
            "percent": pytest.approx(800 / 576),
            "cut": {"gentle": pytest.approx(0.8), "steep": pytest.approx(0.75)},
            "trained": pytest.approx(0.8),
            "numbers": 2_442_240,
        }
    ]
    assert five_cases.at_rank([case], 2)[0]["trained"] is None
    assert five_cases.ranks([case]) == [1, 2, 8, 64]
    at_the_edge = [row for row in ROWS if row["rate"] not in (2.5e-5, 5e-5)] + [ROWS[4] | {"rate": 4e-4}]
    with pytest.raises(ValueError, match="full tuning of 'docstrings' has no tuned rate"):
        five_cases.language_model(at_the_edge)


def test_the_encoders_losses_stand_a_step_deeper():
    rows = []
    for row in ROWS:
        some = dict(row) | {"quarter": {"loss": row["cut_on"]}}
        if "cut" in row:
            some["quarter"] = {"loss": row["whole"]}
            some["cut"] = {r: {"loss": loss, "mrr": 0.5} for r, loss in row["cut"].items()}
        rows.append(some)
    case, other = five_cases.encoder(rows), five_cases.language_model(ROWS)
    assert case.width == 384 and (case.cut, case.trained, case.numbers) == (
        other.cut,
        other.trained,
        other.numbers,
    )


def test_the_published_fine_tune_is_measured_by_its_way_back():
    divergence = torch.tensor(
        [[4.0, 2.0], [1.0, 2.0], [0.0, 0.3], [9.0, 9.0]]
    )  # the last is no cut to a rank
    case = five_cases.published(Recorded({"divergence": divergence}, {"ranks": [1, 8]}))
    assert case.cut == {"one tuning": pytest.approx({0: 0.0, 1: 0.5, 8: 0.95})}
    assert (case.trained, case.numbers, case.full) == ({}, {}, None)


def test_tinylm_far_is_lora_on_all_matrices_in_the_same_runs():
    rows = load_regimes()
    case = five_cases.far(rows)
    row = load_regimes(task="far", method="full", steps=100, seed=0, rate=6e-3)[0]
    assert case.cut["steep"][8] == (row["before"] - row["cut"]["8"]) / (row["before"] - row["after"])
    assert list(case.trained) == [1, 4, 8] and 0.65 < case.trained[1] < 0.75 and 0.88 < case.trained[8] < 0.93
    everywhere = load_methods(task="far", method="lora everywhere", size=4)[0]
    assert case.numbers[4] == everywhere["trained"]
    with pytest.raises(
        ValueError, match="LoRA of rank 1: the best rate, 0.024, lies at the edge of those tried"
    ):
        five_cases.far([row for row in rows if row["method"] == "full" or row["rate"] < 0.03])


def test_tinylm_near_is_lora_on_the_blocks_beside_tuned_full_tuning():
    case = five_cases.near(load_regimes(), load_methods())
    assert list(case.cut) == ["gentle"] and case.numbers == {4: 43_200} and 0.4 < case.trained[4] < 0.5


def test_every_case_is_recorded():
    found = five_cases.cases()
    assert [case.width for case in found] == [100, 100, 256, 384, 576]
    assert five_cases.ranks(found) == [1, 2, 4, 8, 16, 32, 64]
    for case in found:
        for curve in case.cut.values():
            assert 0.9 < curve[64] < 1.1 and curve[1] < curve[64] + 0.02
        assert set(case.trained) == set(case.numbers)
        assert all(0.3 < share < 1.5 for share in case.trained.values())
    assert list(found[-1].trained) == list(found[-2].trained) == [1, 4, 8, 16, 64]
    rxnfp = found[2].cut["one tuning"]
    divergence = load_recorded("rxnfp").tensors["divergence"].mean(dim=1)
    assert rxnfp[8] == pytest.approx(1 - float(divergence[4] / divergence[0]), abs=1e-3)
