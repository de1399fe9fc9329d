"""Chapter 01's checks: right answers pass, each typical mistake is told by name, nothing is asked twice."""

import math

import pytest
import torch

from lora_edu import exercises, lowrank
from lora_edu.exercises import chapter_01

S = chapter_01._map_spectrum()
SIZE = chapter_01._heights().numel()
CUT = float(S[8:].square().sum().sqrt())
CHECKS = [getattr(exercises, f"check_01_{k}") for k in range(1, 7)]
NUMBERED = list(enumerate(CHECKS, 1))


@pytest.mark.parametrize("number, check", NUMBERED)
def test_an_open_cell_gets_a_hint(number, check):
    assert check(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")


@pytest.mark.parametrize("number, check", NUMBERED)
@pytest.mark.parametrize("answer", ["twelve", [1, 2], math.nan, torch.ones(3)])
def test_an_answer_that_is_no_number_is_said_to_be_none(number, check, answer):
    message = check(answer)
    assert message.startswith(f"Exercise {number}: give ")


@pytest.mark.parametrize(
    "number, answer, words",
    [
        (1, 80_736, "r² of the 80,800 numbers"),
        (2, 9, "Rank 8 keeps 89.6% and rank 9 91.0%"),
        (3, torch.tensor(CUT), "52 m at a typical point"),
        (4, 0.64, "max(i, j) / d = 0.64"),
        (4, 0.637, "max(i, j) / d = 0.64"),
        (6, 5, "6 are in there"),
    ],
)
def test_the_right_answer_is_right_and_says_why(number, answer, words):
    message = CHECKS[number - 1](answer)
    assert message.startswith(f"Exercise {number}: right. ") and words in message


@pytest.mark.parametrize(
    "number, answer, words",
    [
        (1, 80_800, "BG and G⁻¹A give the same product"),
        (1, 80_864, "mind the sign"),
        (1, 80_792, "not only its diagonal"),
        (1, 1_000_000, "a matrix of any rank"),
        (1, 8, "That is the rank"),
        (1, 12, "count the numbers in B"),
        (2, 64, "where Σσ reaches 90 %"),
        (2, 8, "counting from 0"),
        (2, 1, "mean height left in"),
        (2, 33, "the rank for 99 %"),
        (2, 344, "stop at the first r"),
        (3, CUT**2, "take the root"),
        (3, float(S[8:].sum()), "add squares"),
        (3, float(S[8]), "spectral norm"),
        (3, float(S[7:].square().sum().sqrt()), "σ_8 is kept"),
        (3, CUT / math.sqrt(SIZE), "at a typical point"),
        (3, CUT / float(S.square().sum().sqrt()), "share of ‖M‖_F"),
        (3, 1 - float(lowrank.energy(S)[7]), "share of the energy that is missing"),
        (4, 0, "not at right angles"),
        (4, 5.12, "φ divides it by min(i, j)"),
        (4, 0.08, "the larger one remains"),
        (4, 0.0512, "twice over"),
        (4, 0.3, "what share of each of the 8"),
        (6, 6, "how can you tell"),
        (6, 200, "every singular value of noise is above zero"),
        (6, lowrank.rank_for_energy(exercises.hidden_matrix(), 0.9), "most of that energy is noise"),
    ],
)
def test_a_typical_mistake_is_told_by_name(number, answer, words):
    message = CHECKS[number - 1](answer)
    assert message.startswith(f"Exercise {number}: not yet. ")
    assert words.lower() in message.lower() and not message.endswith(("..", "?."))


# --- exercise 5: a function ----------------------------------------------------------------------------


def sketch(matrix, rank, extra=10, power=2):
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + extra, dtype=matrix.dtype)).Q
    for _ in range(power):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    return Q, torch.linalg.svd(Q.T @ matrix, full_matrices=False)


def near_best(matrix, rank, **options):
    Q, (U, S, Vh) = sketch(matrix, rank, **options)
    return Q @ (U[:, :rank] * S[:rank]) @ Vh[:rank]


def not_orthonormal(matrix, rank):
    Q = matrix @ torch.randn(matrix.shape[1], rank, dtype=matrix.dtype)
    return Q @ Q.T @ matrix


@pytest.mark.parametrize(
    "answer, words",
    [
        (near_best, "right. "),
        (lambda matrix, rank: near_best(matrix, rank, extra=0, power=0), "2 % are allowed"),
        (lambda matrix, rank: near_best(matrix, rank + 10), "has rank 26, not 16"),
        (lambda matrix, rank: sketch(matrix, rank)[1], "not its three factors"),
        (lambda matrix, rank: lowrank.truncate(matrix, rank), "calls svd on a 300 × 200 matrix"),
        (lambda matrix, rank: near_best(matrix, rank).T, "of the same shape, (300, 200); got (200, 300)"),
        (lambda matrix, rank: near_best(matrix, rank) / 0, "NaN or infinite"),
        (lambda matrix, rank: matrix.nonsense, "stopped with AttributeError"),
        (lambda matrix, rank: None, "got NoneType"),
        (not_orthonormal, "orthonormal columns"),
        (torch.ones(300, 200), "give the function itself"),
    ],
)
def test_a_function_is_tried_and_told_what_is_wrong(answer, words):
    torch.manual_seed(0)
    message = exercises.check_01_5(answer)
    assert message.startswith("Exercise 5: ") and words in message


def test_the_guard_against_large_decompositions_is_gone_afterwards():
    exercises.check_01_5(lambda matrix, rank: torch.linalg.svd(matrix))
    assert len(torch.linalg.svdvals(torch.eye(150))) == 150


def test_with_the_mean_left_in_one_term_has_nine_tenths_of_the_energy():
    assert (
        lowrank.rank_for_energy(chapter_01._heights(), 0.9) == 1
    )  # the mistake that check 2 names for the answer 1


def test_the_hidden_matrix_holds_five_terms_that_show_and_one_that_cannot():
    matrix, strengths = chapter_01._noise_and_terms()
    rows, columns = matrix.shape
    visible = (rows * columns) ** 0.25
    assert sum(strength > visible for strength in strengths) == 5 and len(strengths) == 6
    singular = torch.linalg.svdvals(matrix)
    edge = lowrank.random_matrix_edge(rows, columns)
    assert singular[4] > 1.2 * edge and singular[5] < edge
