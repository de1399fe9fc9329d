"""Chapter 01's checks: right answers pass, each typical mistake is told by name, no way around an exercise passes."""

import math

import numpy as np
import pytest
import torch

from lora_edu import lowrank
from lora_edu.exercises import chapter_01 as exercises

CHECKS = {k: getattr(exercises, f"check_01_{k}") for k in range(1, 7)}
svd, eigh, qr = torch.linalg.svd, torch.linalg.eigh, torch.linalg.qr  # names of one's own hide nothing


def told(number, answer):
    torch.manual_seed(0)
    message = CHECKS[number](answer)
    assert message.startswith(f"Exercise {number}: ") and not message.endswith(("..", "?."))
    return message


@pytest.mark.parametrize("number", CHECKS)
def test_an_open_cell_gets_a_hint(number):
    assert told(number, None).startswith(f"Exercise {number}: not attempted yet. Hint: ")


@pytest.mark.parametrize("number", CHECKS)
@pytest.mark.parametrize("answer", ["twelve", [1, 2], math.nan, torch.ones(3)])
def test_nonsense_is_never_right(number, answer):
    message = told(number, answer)
    assert "right." not in message
    assert number == 1 or "the answer is a function of (" in message


@pytest.mark.parametrize("number", range(2, 7))
def test_a_function_that_returns_nothing_or_stops_is_told_so(number):
    assert "not yet" in told(number, lambda *arguments: None)
    assert "stops with AttributeError" in told(number, lambda first, *rest: first.nonsense)
    assert "stops with TypeError" in told(number, lambda: 1)


# --- 1: a number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, words",
    [
        (80_736, "right. r(m + n) − r² = 80,736: r² of the 80,800 numbers"),
        (80_800, "BG and G⁻¹A give the same product"),
        (80_864, "mind the sign"),
        (80_792, "not only its diagonal"),
        (80_672, "r² once, not twice"),
        (1_000_000, "a matrix of any rank"),
        (8_000_000, "not a table of m · n"),
        (8, "that is the rank"),
        (12, "too small. Hint: count the numbers in B"),
    ],
)
def test_degrees_of_freedom(answer, words):
    assert words in told(1, answer)


# --- 2: rank for a share of the energy -----------------------------------------------------------------


def rank_for(S, share):
    energy = np.cumsum(np.asarray(S) ** 2)
    return 1 + int(np.searchsorted(energy, share * energy[-1]))


def cumulative(S, share):
    squares = S.square()
    return squares.cumsum(0) / squares.sum()


@pytest.mark.parametrize(
    "answer, words",
    [
        (rank_for, "right. For 90 % the map takes rank 9, for 99 % rank 33"),
        (lambda S, share: torch.tensor(rank_for(S, share)), "right. "),
        (
            lambda S, share: next(r for r in range(1, len(S) + 1) if cumulative(S, share)[r - 1] >= share),
            "right. ",
        ),
        (lambda S, share: int((cumulative(S, share) <= share).sum()) + 1, "At least the share means ≥"),
        (lambda S, share: int((S.cumsum(0) / S.sum() < share).sum()) + 1, "where Σσ reaches"),
        (lambda S, share: rank_for(S, share) - 1, "an index, not a rank"),
        (lambda S, share: rank_for(S, share) + 1, "one too many"),
        (lambda S, share: len(S) - rank_for(S, share), "left out"),
        (lambda S, share: 9, "σ = 4, 2, 2, 1, 1 and 90% it says 9, too large"),
        (lambda S, share: S, "is one number"),
        (lowrank.rank_for_energy, "calls lowrank.rank_for_energy"),
        (lambda S, share: 1 + int((lowrank.energy(S) < share).sum()), "calls lowrank.energy"),
    ],
)
def test_rank_for_a_share(answer, words):
    message = told(2, answer)
    assert words in message and ("right." in message) == words.startswith("right.")


# --- 3: all distances ----------------------------------------------------------------------------------


def distances(S):
    return [math.sqrt(math.fsum(float(x) ** 2 for x in S[r:])) for r in range(len(S) + 1)]


def by_subtraction(S):
    kept = torch.cat([S.new_zeros(1), S.square().cumsum(0)])
    return (kept[-1] - kept).clamp(min=0).sqrt()


@pytest.mark.parametrize(
    "answer, words",
    [
        (distances, "right. The map, for instance, is 19,4"),
        (lambda S: np.array(distances(S)), "right. "),
        (lambda S: torch.tensor(distances(S)), "right. "),
        (by_subtraction, "add the squares from the small end"),
        (lambda S: torch.tensor(distances(S)) ** 2, "take the root"),
        (lambda S: distances(S)[1:], "at r = 0 everything is cut off"),
        (lambda S: distances(S)[:-1], "the distance is 0"),
        (lambda S: distances(S)[::-1], "order is reversed"),
        (lambda S: torch.cat([torch.zeros(1), S.square().cumsum(0).sqrt()]), "that is what is kept"),
        (lambda S: torch.tensor(distances(S)) / S.norm(), "share of ‖M‖"),
        (lambda S: (torch.tensor(distances(S)) / S.norm()) ** 2, "share of the energy that is missing"),
        (lambda S: [float(S[r:].sum()) for r in range(len(S) + 1)], "lengths at right angles do not add"),
        (lambda S: torch.cat([S, torch.zeros(1)]), "spectral norm"),
        (lambda S: S, "spectral norm"),
        (lambda S: [1.0, 2.0], "there are 6 distances"),
        (lambda S: torch.arange(6.0), "the distance at r = 0 is not 0"),
        (lambda S: "far", "a tensor of numbers; got str"),
    ],
)
def test_distances(answer, words):
    message = told(3, answer)
    assert words in message and ("right." in message) == words.startswith("right.")


# --- 4: similarity of what two matrices write ----------------------------------------------------------


def left(A, B, i, j):
    P = svd(A).U[:, :i]
    return torch.linalg.matrix_norm(P @ P.T @ svd(B).U[:, :j]) ** 2 / min(i, j)


@pytest.mark.parametrize(
    "answer, words",
    [
        (left, "right. Two random 30 × 20 matrices"),
        (lambda A, B, i, j: left(A, B, i, j).numpy(), "right. "),
        (
            lambda A, B, i, j: lowrank.subspace_similarity(A, B, i, j, side="left"),
            "calls lowrank.subspace_similarity",
        ),
        (lambda A, B, i, j: left(A.T, B.T, i, j), "what the matrices read"),
        (lambda A, B, i, j: left(A, B, i, j) * min(i, j), "so that φ lies in [0, 1]"),
        (lambda A, B, i, j: left(A, B, i, j) * min(i, j) / max(i, j), "not by max(i, j)"),
        (lambda A, B, i, j: (left(A, B, i, j) * min(i, j)) ** 0.5 / min(i, j), "the norm is squared"),
        (lambda A, B, i, j: left(A, B, j, i), "is not"),
        (lambda A, B, i, j: (A[:, :i].T @ B[:, :j]).square().sum() / min(i, j), "is not"),
        (lambda A, B, i, j: svd(A).U, "one number"),
    ],
)
def test_similarity_of_left_directions(answer, words):
    message = told(4, answer)
    assert words in message and ("right." in message) == words.startswith("right.")


# --- 5: near-best without decomposing anything large ----------------------------------------------------


def sketch(matrix, rank, extra=10, power=2):
    Q = qr(matrix @ torch.randn(matrix.shape[1], rank + extra, dtype=matrix.dtype)).Q
    for _ in range(power):
        Q = qr(matrix @ qr(matrix.T @ Q).Q).Q
    return Q, svd(Q.T @ matrix, full_matrices=False)


def near_best(matrix, rank, **options):
    Q, (U, S, Vh) = sketch(matrix, rank, **options)
    return Q @ (U[:, :rank] * S[:rank]) @ Vh[:rank]


def alternating(matrix, rank):
    A = torch.randn(rank, matrix.shape[1], dtype=matrix.dtype)
    for _ in range(30):
        B = torch.linalg.lstsq(A.T, matrix.T).solution.T
        A = torch.linalg.lstsq(B, matrix).solution
    return B @ A


def not_orthonormal(matrix, rank):
    Q = matrix @ torch.randn(matrix.shape[1], rank, dtype=matrix.dtype)
    return Q @ Q.T @ matrix


@pytest.mark.parametrize(
    "answer, words",
    [
        (near_best, "right. "),
        (alternating, "right. "),
        (lambda matrix, rank: near_best(matrix.float(), rank), "right. "),
        (lambda matrix, rank: near_best(matrix, rank, extra=0, power=0), "2 % are allowed"),
        (lambda matrix, rank: near_best(matrix, rank + 10), "has rank 26, not 16"),
        (lambda matrix, rank: sketch(matrix, rank)[1], "not its three factors"),
        (lambda matrix, rank: near_best(matrix, rank).T, "of the same shape, (400, 300); got (300, 400)"),
        (lambda matrix, rank: near_best(matrix, rank) / 0, "NaN or infinite"),
        (lambda matrix, rank: None, "got NoneType"),
        (not_orthonormal, "orthonormal columns"),
    ],
)
def test_near_best_is_tried_and_told_what_is_wrong(answer, words):
    message = told(5, answer)
    assert words in message and ("right." in message) == words.startswith("right.")


def cut(U, S, Vh, rank):
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def by_gram(matrix, rank, decompose):
    V = decompose(matrix.T @ matrix)[1].flip(1)[:, :rank].real
    return matrix @ V @ V.T


def swallowing(matrix, rank):
    try:
        return cut(*svd(matrix), rank)
    except Exception:
        return near_best(matrix, rank)


def by_rows(matrix, rank):
    return torch.from_numpy(cut(*np.linalg.svd(np.stack([row.numpy() for row in matrix]), False), rank))


WAYS_AROUND = {
    "torch.linalg.svd": lambda matrix, rank: cut(*torch.linalg.svd(matrix), rank),
    "an alias of it": lambda matrix, rank: cut(*svd(matrix, full_matrices=False), rank),
    "torch.svd": lambda matrix, rank: (lambda U, S, V: cut(U, S, V.T, rank))(*torch.svd(matrix)),
    "a method": lambda matrix, rank: (lambda U, S, V: cut(U, S, V.T, rank))(*matrix.svd()),
    "of the transpose": lambda matrix, rank: cut(*svd(matrix.T, full_matrices=False), rank).T,
    "in a batch": lambda matrix, rank: cut(*(x[0] for x in svd(matrix[None], full_matrices=False)), rank),
    "on a detached copy": lambda matrix, rank: cut(*svd(matrix.detach().data, full_matrices=False), rank),
    "except Exception": swallowing,
    "eigh of the Gram matrix": lambda matrix, rank: by_gram(matrix, rank, eigh),
    "eig of it": lambda matrix, rank: by_gram(matrix, rank, torch.linalg.eig),
    "svdvals": lambda matrix, rank: near_best(matrix, rank) * bool(torch.linalg.svdvals(matrix)[0]),
    "the nuclear norm": lambda matrix, rank: (
        near_best(matrix, rank) * bool(torch.linalg.matrix_norm(matrix, "nuc"))
    ),
    "pinv": lambda matrix, rank: near_best(matrix, rank) * bool(torch.linalg.pinv(matrix).sum()),
    "qr of all of it": lambda matrix, rank: qr(matrix).Q @ near_best(qr(matrix).R, rank),
    "lstsq": lambda matrix, rank: (
        near_best(matrix, rank) * bool(torch.linalg.lstsq(matrix, matrix).solution.sum())
    ),
    "lowrank.truncate": lowrank.truncate,
    "lowrank.randomized_svd": lambda matrix, rank: cut(*lowrank.randomized_svd(matrix, rank), rank),
    "torch.svd_lowrank": lambda matrix, rank: (lambda U, S, V: cut(U, S, V.T, rank))(
        *torch.svd_lowrank(matrix, rank + 10, niter=3)
    ),
    "np.linalg.svd": lambda matrix, rank: torch.from_numpy(cut(*np.linalg.svd(matrix, False), rank)),
    "np.linalg.svd of .numpy()": lambda matrix, rank: torch.from_numpy(
        cut(*np.linalg.svd(matrix.numpy(), False), rank)
    ),
    "row by row into numpy": by_rows,
    "a list": lambda matrix, rank: torch.tensor(cut(*np.linalg.svd(matrix.tolist(), False), rank)),
    "from_dlpack": lambda matrix, rank: torch.from_numpy(
        cut(*np.linalg.svd(np.from_dlpack(matrix), False), rank)
    ),
}


@pytest.mark.parametrize("way", WAYS_AROUND)
def test_no_way_around_the_fifth_passes(way):
    message = told(5, WAYS_AROUND[way])
    assert "not yet: your function " in message and "stops with" not in message


def test_what_was_watched_is_free_afterwards():
    for answer in (WAYS_AROUND["torch.linalg.svd"], WAYS_AROUND["np.linalg.svd"], near_best):
        exercises.check_01_5(answer)
    assert len(torch.linalg.svdvals(torch.eye(150))) == 150 and torch.eye(3).tolist()[0][0] == 1
    assert lowrank.truncate(torch.eye(3), 1).shape == (3, 3)


# --- 6: what is no noise -------------------------------------------------------------------------------


def visible(matrix, sigma, edge=lambda m, n: math.sqrt(m) + math.sqrt(n)):
    return int(torch.count_nonzero(torch.linalg.svdvals(matrix) > sigma * edge(*matrix.shape)))


@pytest.mark.parametrize(
    "answer, words",
    [
        (visible, "right. In the hidden matrix 5 stand above √300 + √200 = 31.5. 6 terms are in there"),
        (lambda matrix, sigma: torch.tensor(visible(matrix, sigma)), "right. "),
        (lambda matrix, sigma: visible(matrix, 1), "sigma is not used"),
        (
            lambda matrix, sigma: int(
                (torch.linalg.svdvals(matrix) > lowrank_threshold(*matrix.shape, sigma)).sum()
            ),
            "what is worth keeping",
        ),
        (lambda matrix, sigma: visible(matrix, sigma, lambda m, n: max(m, n) ** 0.5), "not the larger root"),
        (lambda matrix, sigma: visible(matrix, sigma, lambda m, n: 2 * max(m, n) ** 0.5), "not twice a root"),
        (lambda matrix, sigma: visible(matrix, sigma, lambda m, n: (m + n) ** 0.5), "not √(m + n)"),
        (lambda matrix, sigma: min(matrix.shape), "counts every singular value"),
        (lambda matrix, sigma: 5, "5 is too many for a 300 × 200 matrix"),
        (lambda matrix, sigma: 6, "6 is too many"),
        (lambda matrix, sigma: 0, "0 is too few"),
        (
            lambda matrix, sigma: int(
                (torch.linalg.svdvals(matrix) > lowrank.random_matrix_edge(*matrix.shape, sigma)).sum()
            ),
            "calls lowrank.random_matrix_edge",
        ),
    ],
)
def test_what_stands_above_the_edge(answer, words):
    message = told(6, answer)
    assert words in message and ("right." in message) == words.startswith("right.")


def lowrank_threshold(m, n, sigma):
    """Gavish and Donoho's equation 11, written out."""
    beta = min(m, n) / max(m, n)
    root = math.sqrt(beta**2 + 14 * beta + 1)
    return sigma * math.sqrt(max(m, n) * (2 * (beta + 1) + 8 * beta / (beta + 1 + root)))


def test_the_hidden_matrix_holds_five_terms_that_show_and_one_that_cannot():
    matrix = exercises.hidden_matrix()
    rows, columns = matrix.shape
    visible_from = (rows * columns) ** 0.25
    assert sum(strength > visible_from for strength in exercises.HIDDEN) == 5 and len(exercises.HIDDEN) == 6
    singular = torch.linalg.svdvals(matrix)
    edge = lowrank.random_matrix_edge(rows, columns)
    assert singular[4] > 1.2 * edge and singular[5] < edge
