"""Chapter 03's checks: right answers pass, each typical mistake is told by name, nonsense is refused kindly."""

import pytest
import torch

from lora_edu import exercises, lowrank
from lora_edu.data import load_checkpoint, load_corpus

CHECKS = [getattr(exercises, f"check_03_{k}") for k in range(1, 6)]


@pytest.fixture(scope="module")
def data():
    return {name: load_checkpoint(name) for name in ("base", "reference_seed_0", "reference_seed_1")}


@pytest.mark.parametrize("number, check", list(enumerate(CHECKS, 1)))
def test_an_open_cell_gets_a_hint_and_nonsense_a_kind_word(number, check):
    assert check(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "the answer is one number; got 'twelve'" in check("twelve")
    assert "not yet" in check(-12345.0)


def test_exercise_1_tells_rounding_from_rank():
    before, after = exercises.rounded_pair()
    assert before.dtype == after.dtype == torch.bfloat16
    difference = after.float() - before.float()
    S = lowrank.svd(difference).S
    above = int((lowrank.rounding_floor(before.float(), torch.bfloat16)[0] < S).sum())
    assert above == 5 and exercises.check_03_1(above).startswith("Exercise 1: right")
    assert "rounding has full rank" in exercises.check_03_1(lowrank.numerical_rank(difference))
    assert "part of that energy is rounding" in exercises.check_03_1(lowrank.rank_for_energy(S, 0.9))


def test_exercise_2_subtracts_the_base():
    assert exercises.check_03_2(0.75).startswith("Exercise 2: right")
    for answer, words in (
        (3.6 / 4.1, "Subtract the base first|subtract the base first"),
        (4.1 / 5.6, "subtract the base first"),
        (0.25, "the share that is lost"),
        (1.5 / 5.6, "against the full gain"),
        (0.5, "lost in nats"),
        (1.5, "gain in nats"),
    ):
        message = exercises.check_03_2(answer)
        assert any(word in message for word in words.split("|")), message


def test_exercise_3_subtracts_chance(data):
    first, second = (data[f"reference_seed_{s}"]["blocks.3.attention.value.weight"] for s in (0, 1))
    phi = lowrank.subspace_similarity(first, second, 20, 20)
    assert exercises.check_03_3(phi - 0.2).startswith("Exercise 3: right")
    assert "random subspaces" in exercises.check_03_3(phi)
    assert "not i · j / d²" in exercises.check_03_3(phi - 0.04)
    left = lowrank.subspace_similarity(first, second, 20, 20, side="left")
    assert "the left directions" in exercises.check_03_3(left - 0.2)


def test_exercise_4_leaves_out_rows_that_nobody_reads(data):
    counts = torch.bincount(load_corpus("reference").train, minlength=10_000)
    update = data["reference_seed_0"]["head.weight"]
    assert exercises.check_03_4(lowrank.stable_rank(update[counts > 0])).startswith("Exercise 4: right")
    assert "that never occur included" in exercises.check_03_4(lowrank.stable_rank(update))
    assert "Take the others" in exercises.check_03_4(lowrank.stable_rank(update[counts == 0]))
    assert "Roy & Vetterli" in exercises.check_03_4(lowrank.effective_rank(update[counts > 0]))


def test_exercise_5_cuts_both_sides_to_the_same_rank(data):
    name = "blocks.3.mlp.down.weight"
    W, update = data["base"][name], data["reference_seed_0"][name]
    factor = lowrank.amplification_factor(update, W, 4)
    assert exercises.check_03_5(factor).startswith("Exercise 5: right")
    assert "its inverse" in exercises.check_03_5(1 / factor)
    U, S, Vh = lowrank.svd(update)
    inside = (U[:, :4].T @ W @ Vh[:4].T).norm()
    assert "Cut ΔW to rank 4" in exercises.check_03_5(update.norm() / inside)
    assert "own four strongest" in exercises.check_03_5(S[:4].norm() / lowrank.svd(W).S[:4].norm())
