"""Each check of chapter 07 says 'right' to the right answer and names the mistake in the typical wrong one."""

from itertools import pairwise

import pytest
import torch

from lora_edu import exercises, lowrank
from lora_edu.data import load_base_losses, load_sweeps
from lora_edu.exercises import chapter_07

CHECKS = [(k, getattr(exercises, f"check_07_{k}")) for k in range(1, 6)]


def best_pair(B, A, rank):
    U, S, Vh = lowrank.svd(B @ A)
    return U[:, :rank] * S[:rank], Vh[:rank]


@pytest.mark.parametrize(("number", "check"), CHECKS, ids=[str(k) for k, _ in CHECKS])
def test_an_open_cell_gets_a_hint_and_nonsense_a_kind_word(number, check):
    assert check(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "the answer is" in check("twelve")
    assert number == 5 or "not yet" in check(-12345.0)


def test_the_tuned_runs_are_at_the_rate_of_the_other_seeds():
    row = chapter_07.tuned_run("lora", 8)
    others = load_sweeps(method="lora", rank=8, targets="all", steps=200, text="reference", scale=1.0)
    assert row["seed"] == 0 and {each["rate"] for each in others if each["seed"] > 0} == {row["rate"]}


def test_exercise_1_finds_the_rank_that_is_worth_as_much():
    trained = chapter_07.tuned_run("lora", 2)["test"]
    cut = chapter_07.tuned_run("full")["truncated"]
    right = next(r for r in (1, 2, 4, 8, 16, 32, 64) if cut[str(r)] <= trained)
    assert ": right." in exercises.check_07_1(right)
    assert "the rank that was trained" in exercises.check_07_1(2)
    assert "wrong way round" in exercises.check_07_1(1)
    assert right <= 4 or "still above" in exercises.check_07_1(right // 2)


def test_exercise_2_compares_at_equal_gain():
    before = load_base_losses()["reference"]["code validation"]
    full, lora = (chapter_07.tuned_run(*which)["evaluations"] for which in (("full",), ("lora", 64)))

    def code_at(run, level):
        for one, two in pairwise(run):
            if two["loss"] <= level <= one["loss"]:
                part = (one["loss"] - level) / (one["loss"] - two["loss"])
                return one["code"] + part * (two["code"] - one["code"])

    of_full, of_lora = (code_at(run, chapter_07.LEVEL) for run in (full, lora))
    assert ": right." in exercises.check_07_2(of_lora - of_full)
    assert "the sign" in exercises.check_07_2(of_full - of_lora)
    assert "at equal steps, the last" in exercises.check_07_2(lora[-1]["code"] - full[-1]["code"])
    assert "at equal steps, the first" in exercises.check_07_2(lora[0]["code"] - full[0]["code"])
    assert "Subtract full tuning's, too" in exercises.check_07_2(of_lora - before)
    assert "from LoRA's" in exercises.check_07_2(of_full - before)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (32, "right"),
        (16, "unchanged means s = 0.5"),
        (64, "keeps s = 2"),
        (1, "that is s"),
        (2 * 32**0.5, "alpha / √r"),
        (8, "wrong way round"),
        (20, "too small"),
    ],
)
def test_exercise_3_carries_the_rate(answer, words):
    assert words in exercises.check_07_3(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (13, "78,000 numbers"),
        (160, "a single matrix"),
        (80, "a single block"),
        (26, "up and down"),
        (14, "rounded up: it takes 84,000"),
        (66, "not r · 100"),
        (33, "four times as wide"),
    ],
)
def test_exercise_4_counts_all_matrices(answer, words):
    assert words in exercises.check_07_4(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (best_pair, "right"),
        (lambda B, A, r: [(p := best_pair(B, A, r))[0] @ torch.eye(r).double() * 2, p[1] / 2], "right"),
        (lambda B, A, r: (B[:, :r], A[:r]), "Their order means nothing"),
        (lambda B, A, r: (best_pair(B, A, r)[0] @ torch.zeros(r, r).double(), A[:r]), "not the nearest"),
        (
            lambda B, A, r: (lowrank.svd(B @ A).U[:, :r], lowrank.svd(B @ A).Vh[:r]),
            "the singular values are lost",
        ),
        (lambda B, A, r: lowrank.truncate(B @ A, r), "two matrices"),
        (lambda B, A, r: (B, A), "here (7, 2) and (2, 9)"),
        (lambda B, A, r: B @ B, "raises"),
    ],
)
def test_exercise_5_cuts_the_product(answer, words):
    assert words in exercises.check_07_5(answer)


def test_exercise_5_knows_factors_that_were_cut_one_by_one():
    def one_by_one(B, A, r):
        """Factors of the product of B and A, each cut to rank r by itself."""
        return best_pair(lowrank.truncate(B, r), lowrank.truncate(A, r), r)

    assert "cuts B and A each by itself" in exercises.check_07_5(one_by_one)

    def twice(B, A, r):
        U, S, Vh = lowrank.svd(B @ A)
        return U[:, :r] * S[:r], S[:r, None] * Vh[:r]

    assert "in it twice" in exercises.check_07_5(twice)
