"""Checks of chapter 01's exercises: each takes an answer and returns one sentence that a student can act on.

Right answers are computed here from the same data that the chapter uses, not written down.
"""

import functools
import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from matplotlib import cbook
from torch import Tensor

from lora_edu import lowrank


def hidden_matrix() -> Tensor:
    """Exercise 6's matrix, 300 × 200: noise of standard deviation 1 with some rank-one terms hidden in it."""
    return _noise_and_terms()[0].clone()


def check_01_1(answer: int | None) -> str:
    """Degrees of freedom of the 10 000 × 100 matrices of rank 8."""
    if answer is None:
        return _open(1, "count the numbers in B and A, then those that change B and A but not the product BA")
    rows, columns, rank = 10_000, 100, 8
    stored = rank * (rows + columns)
    value, problem = _number(1, answer)
    if problem:
        return problem
    if value == stored - rank**2:
        return _right(
            1, f"r(m + n) − r² = {value:,.0f}: r² of the {stored:,} numbers stored change nothing in BA"
        )
    mistakes = {
        stored: "that is what B and A store. BG and G⁻¹A give the same product for every invertible r × r "
        "matrix G: how many of the numbers are therefore free to change nothing?",
        rows * columns: "that is a matrix of any rank; one of rank 8 has far less freedom",
        stored + rank**2: "the r² of G are no extra freedom, they are freedom that is lost: mind the sign",
        stored
        - rank: "G is an r × r matrix, not only its diagonal: scaling each pair is r of its r² numbers",
        stored - 2 * rank**2: "G and G⁻¹ are not chosen one by one: r² once, not twice",
        rank * rows * columns: "a rank-one term is two lists, m + n numbers, not a table of m · n",
        rank: "that is the rank; the question is how many numbers can be chosen freely",
    }
    return _wrong(
        1, value, mistakes, "count the numbers in B (m × r) and A (r × n) and take off those of G (r × r)"
    )


def check_01_2(answer: int | None) -> str:
    """The smallest rank that keeps 90 % of the energy of the elevation map, its mean taken off."""
    if answer is None:
        return _open(
            2, "the energy of the first r terms is the sum of their σ², as a share of the sum of all σ²"
        )
    S = _map_spectrum()
    right = lowrank.rank_for_energy(S, 0.9)
    value, problem = _number(2, answer)
    if problem:
        return problem
    if value == right:
        energy = lowrank.energy(S)
        return _right(
            2, f"rank {right - 1} keeps {energy[right - 2]:.1%} and rank {right} {energy[right - 1]:.1%}"
        )
    mistakes = {
        _first(
            S / S.sum(), 0.9
        ): "that is where Σσ reaches 90 %; energy is Σσ², and squares favour the large",
        right - 1: "that many terms are still below 90 % (counting from 0 gives the index, not the rank)",
        1: "that is with the mean height left in, which alone is rank one",
        lowrank.rank_for_energy(S, 0.99): "that is the rank for 99 %",
        len(S): "every term together keeps 100 %; stop at the first r that reaches 90 %",
    }
    return _wrong(
        2, value, mistakes, "find the first r at which the running sum of σ² is at least 0.9 of the total"
    )


def check_01_3(answer: float | None) -> str:
    """‖M − M_8‖_F for the elevation map, mean taken off, from its singular values alone."""
    if answer is None:
        return _open(
            3, "what was cut off are the terms 9, 10, …, at right angles to each other: use Pythagoras"
        )
    S, size = _map_spectrum(), _heights().numel()
    right = float(S[8:].square().sum().sqrt())
    value, problem = _number(3, answer)
    if problem:
        return problem
    if math.isclose(value, right, rel_tol=1e-3):
        return _right(
            3,
            f"√(σ_9² + σ_10² + …) = {right:,.0f} m over the whole map, "
            f"{right / math.sqrt(size):.0f} m at a typical point",
        )
    mistakes = {
        right**2: "that is the square of the distance: take the root",
        float(
            S[8:].sum()
        ): "that adds the lengths; the terms are at right angles, so add squares and take the root",
        float(
            S[8]
        ): "σ_9 is the distance in the spectral norm (the worst direction), not in the Frobenius norm",
        float(
            S[7:].square().sum().sqrt()
        ): "σ_8 is kept: the first one cut off is σ_9, which Python calls S[8]",
        float(S[9:].square().sum().sqrt()): "the first one cut off is σ_9, which Python calls S[8], not S[9]",
        float(S[:8].square().sum().sqrt()): "that is what was kept; the distance is made of what was cut off",
        right
        / math.sqrt(
            size
        ): "that is the distance at a typical point (root mean square); asked is the whole ‖·‖_F",
        1
        - float(
            lowrank.energy(S)[7]
        ): "that is the share of the energy that is missing; asked is the distance itself",
        right
        / float(
            S.square().sum().sqrt()
        ): "that is the distance as a share of ‖M‖_F; asked is the distance itself",
    }
    return _wrong(3, value, mistakes, "square σ_9, σ_10, …, add them up and take the root")


def check_01_4(answer: float | None) -> str:
    """The average similarity φ of random subspaces with 8 and 64 dimensions in a space of 100."""
    if answer is None:
        return _open(
            4, "a unit vector has the share 64/100 of its square in a random subspace of 64 dimensions"
        )
    i, j, dimension = 8, 64, 100
    right = lowrank.chance_similarity(i, j, dimension)
    value, problem = _number(4, answer)
    if problem:
        return problem
    if math.isclose(value, right, rel_tol=0.02):
        return _right(
            4, f"chance gives max(i, j) / d = {right:.2f}: so much two runs that share nothing would show"
        )
    mistakes = {
        0: "random subspaces are not at right angles: 64 of 100 dimensions are most of the space",
        i * j / dimension: "that is the average of ‖UᵀV‖_F²; φ divides it by min(i, j)",
        min(i, j)
        / dimension: "that is min(i, j) / d: φ divides by the smaller dimension, so the larger one remains",
        i
        * j
        / dimension**2: "that is each vector's share twice over; add up over the 8 vectors and divide by 8",
        64: "φ lies between 0 and 1: give 0.64 for 64 %",
        1: "only a subspace that lies in the other has φ = 1",
    }
    return _wrong(
        4, value, mistakes, "what share of each of the 8 unit vectors falls into 64 of 100 dimensions?"
    )


def check_01_5(answer: Callable[[Tensor, int], Tensor] | None) -> str:
    """A function (matrix, rank) → near-best matrix of that rank, that decomposes nothing large."""
    if answer is None:
        return _open(
            5, "multiply the matrix by a few random columns; power iterations turn them to its strongest ones"
        )
    if not callable(answer):
        return f"Exercise 5: give the function itself, without calling it; got {type(answer).__name__}."
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(draw(300, 200)).Q, torch.linalg.qr(draw(200, 200)).Q
    S = 1 / torch.arange(1, 201, dtype=torch.float64)
    matrix, rank = (U * S) @ V.T, 16
    try:
        with _no_large_decomposition(100):
            result = answer(matrix.clone(), rank)
    except _TooLarge as problem:
        return f"Exercise 5: {problem}. Decompose only the thin matrices that the sketch gives."
    except Exception as problem:
        return f"Exercise 5: your function stopped with {type(problem).__name__}: {problem}"
    if isinstance(result, tuple | list) and len(result) == 3:
        return "Exercise 5: return the matrix itself, U · diag(S) · Vh, not its three factors."
    if not isinstance(result, Tensor) or result.shape != matrix.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        return f"Exercise 5: the result must be a matrix of the same shape, (300, 200); got {shape}."
    if not torch.isfinite(result).all():
        return "Exercise 5: the result has NaN or infinite entries. Take qr between repeated products."
    found = lowrank.numerical_rank(result, 1e-8)
    if found > rank:
        return f"Exercise 5: the result has rank {found}, not {rank}: cut the small SVD to {rank} terms."
    excess = float(torch.linalg.matrix_norm(matrix - result) / S[rank:].square().sum().sqrt()) - 1
    if excess > 1:
        return (
            f"Exercise 5: the result is {1 + excess:.1f} times as far off as the best one. Q must have "
            "orthonormal columns (qr) before Q Qᵀ M is a projection."
        )
    if excess > 0.02:
        return (
            f"Exercise 5: close, but {excess:.1%} farther off than the best; 2 % are allowed. This spectrum "
            "(1/k) falls slowly: draw some extra columns, or add a power iteration, Q ← qr(M · qr(Mᵀ Q))."
        )
    return _right(
        5, f"{excess:.2%} farther off than the best matrix of rank {rank}, and nothing large was decomposed"
    )


def check_01_6(answer: int | None) -> str:
    """How many of the terms hidden in `hidden_matrix()` can be told from its noise."""
    if answer is None:
        return _open(6, "singular values of noise end at σ(√m + √n); count those that lie clearly above")
    matrix, strengths = _noise_and_terms()
    S = torch.linalg.svdvals(matrix)
    edge = lowrank.random_matrix_edge(*matrix.shape)
    right = int(S.gt(edge).sum())
    value, problem = _number(6, answer)
    if problem:
        return problem
    if value == right:
        faint = min(strengths)
        return _right(
            6,
            f"{right} stand above {edge:.1f}. {len(strengths)} are in there: one has the strength {faint}, "
            f"less than (mn)^¼ = {math.prod(matrix.shape) ** 0.25:.1f}, and no look at the spectrum shows it",
        )
    mistakes = {
        len(S): "every singular value of noise is above zero; what matters is how far up noise reaches",
        len(strengths): "that many are hidden there, but how can you tell? Count what stands above the edge",
        lowrank.rank_for_energy(
            S, 0.9
        ): "that is the rank for 90 % of the energy, and most of that energy is noise",
        int(S.gt(math.sqrt(max(matrix.shape))).sum()): "the edge is the sum √m + √n, not the larger root",
        int(S.gt(math.sqrt(sum(matrix.shape))).sum()): "the edge is √m + √n, not √(m + n)",
    }
    return _wrong(6, value, mistakes, f"noise of deviation 1 reaches up to √300 + √200 = {edge:.1f}")


# --- the data that the answers come from ---------------------------------------------------------------


def _heights() -> Tensor:
    return torch.from_numpy(cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype(np.float64))


@functools.cache
def _map_spectrum() -> Tensor:
    heights = _heights()
    return torch.linalg.svdvals(heights - heights.mean())


@functools.cache
def _noise_and_terms() -> tuple[Tensor, list[int]]:
    strengths = [70, 62, 55, 48, 42, 10]
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(draw(side, len(strengths))).Q for side in (300, 200))
    return draw(300, 200) + (U * torch.tensor(strengths, dtype=torch.float64)) @ V.T, strengths


def _first(shares: Tensor, level: float) -> int:
    return int((shares.cumsum(0) < level).sum()) + 1


class _TooLarge(Exception):
    pass


def _no_large_decomposition(most: int) -> mock._patch:
    """While it lasts, decompositions of matrices whose smaller side exceeds `most` raise _TooLarge."""

    def guarded(name: str, original: Callable) -> Callable:
        def call(matrix, *args, **options):
            if min(matrix.shape[-2:]) > most:
                shape = " × ".join(str(side) for side in matrix.shape)
                raise _TooLarge(f"your function calls {name} on a {shape} matrix")
            return original(matrix, *args, **options)

        return call

    names = ("svd", "svdvals", "eigh", "eig", "qr")
    return mock.patch.multiple(
        torch.linalg, **{name: guarded(name, getattr(torch.linalg, name)) for name in names}
    )


# --- the sentences -------------------------------------------------------------------------------------


def _number(exercise: int, answer) -> tuple[float, str]:
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return math.nan, f"Exercise {exercise}: give one number; got {type(answer).__name__}."
    if not math.isfinite(value):
        return value, f"Exercise {exercise}: give a finite number; got {value}."
    return value, ""


def _open(exercise: int, hint: str) -> str:
    return f"Exercise {exercise}: not attempted yet. Hint: {hint}."


def _right(exercise: int, why: str) -> str:
    return f"Exercise {exercise}: right. {_sentence(why)}"


def _wrong(exercise: int, value: float, mistakes: dict[float, str], hint: str) -> str:
    for mistake, diagnosis in mistakes.items():
        near = 1e-3 if isinstance(mistake, float) else 0  # whole numbers are meant exactly
        if math.isclose(value, mistake, rel_tol=near, abs_tol=1e-9):
            return f"Exercise {exercise}: not yet. {_sentence(diagnosis)}"
    return f"Exercise {exercise}: not yet. {_sentence('try this: ' + hint)}"


def _sentence(text: str) -> str:
    """With a capital, unless it opens with a formula, and a full stop."""
    formula = not text[0].isascii() or text[1] == "("
    return (text if formula else text[0].upper() + text[1:]) + ("" if text.endswith("?") else ".")
