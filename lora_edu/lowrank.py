"""Singular values and what they tell: truncation, energy, ranks, subspaces, random-matrix and rounding noise.

For looking at matrices after the fact: results carry no gradients. Low-rank layers are in lora/.
Half precision is computed, and returned, in float32: rounding a rank-8 matrix back would give it full rank.
"""

import functools
import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_edu.text import check_rank


class Factors(NamedTuple):
    """A matrix as U · diag(S) · Vh: U (m, r) and Vhᵀ (n, r) have orthonormal columns, S (r,) falls."""

    U: Tensor
    S: Tensor
    Vh: Tensor


class RandomizedFactors(Factors):
    """Factors that unpack as `U, S, Vh` and know how good they are.

    error: ‖matrix − U diag(S) Vh‖_F, measured on the matrix, not estimated; relative_error: the same over
    ‖matrix‖_F; power_iterations: how many were done (0 where the exact SVD was the cheaper way).
    """

    error: float
    relative_error: float
    power_iterations: int


# --- the decomposition ----------------------------------------------------------------------------------


def svd(matrix: Tensor) -> Factors:
    """The thin SVD, matrix = U diag(S) Vh, of an (m, n) matrix: U (m, k), S (k,), Vh (k, n), k = min(m, n).

    Raises ValueError for anything that is not a finite, non-empty matrix of real numbers.
    """
    return Factors(*torch.linalg.svd(_matrix(matrix), full_matrices=False))


def svd_of_product(left: Tensor, right: Tensor) -> Factors:
    """The thin SVD of left · right, (m, r) · (r, n), from QR of both factors; their product is never made.

    left = Q₁R₁, rightᵀ = Q₂R₂ and R₁R₂ᵀ = U′SV′ᵀ, which is r × r at most: U = Q₁U′, V = Q₂V′. So S has min(m, n, r)
    entries, and the work is (m + n) r² in place of m n min(m, n). In float64, since two roundings come together.
    Raises ValueError for factors that don't fit each other or aren't finite.
    """
    left, right = _factors(left, right)
    (Q_left, R_left), (Q_right, R_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    return Factors(Q_left @ U, S, Vh @ Q_right.T)


def halves(found: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """(U√Σ, √ΣVᵀ), (m, r) and (r, n), of the first r directions: their product is the truncation to rank r.

    found: an SVD, or anything with its first directions as U, S and Vh.
    """
    root = found.S[:rank].sqrt()
    return found.U[:, :rank] * root, root[:, None] * found.Vh[:rank]


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """S of `svd_of_product` alone, (min(m, n, r),) float64, largest first: half the work."""
    left, right = _factors(left, right)
    R_left, R_right = (torch.linalg.qr(each, mode="r").R for each in (left, right.T))
    return torch.linalg.svdvals(R_left @ R_right.T)


def _factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    left, right = _matrix(left, "left").double(), _matrix(right, "right").double()
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"left must have as many columns as right has rows; got {_shape(left)} and {_shape(right)}"
        )
    return left, right


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of the given rank, Σ_{k ≤ r} σ_k u_k v_kᵀ (Eckart & Young 1936; Mirsky 1960).

    Nearest in the Frobenius norm, at distance √(Σ_{k > r} σ_k²), and in the spectral norm, at σ_{r+1}.
    Where σ_r = σ_{r+1} there are several nearest ones; this is one of them.
    """
    matrix = _matrix(matrix)
    rank = check_rank(rank, matrix.shape, "matrix")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def randomized_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    share: float | None = None,
    oversampling: int = 10,
    power_iterations: int | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
) -> RandomizedFactors:
    """The leading part of the SVD from a random sketch (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    Give either `rank`, or `share`: then the rank grows until the result holds that share of ‖matrix‖_F².
    Sketch Y = AΩ with rank + oversampling columns, Q = orth(Y), B = QᵀA, and the small SVD of B. A power
    iteration replaces Ω by orth(Bᵀ). At least one is done, then as many as the spectrum asks for: until one
    more lowers the squared error by less than `tolerance` of itself (a fixed number: `power_iterations`).
    With fewer than about 5 extra columns (`oversampling`) that rule can be fooled by an unlucky start.
    Where the sketch would be half as large as the matrix, the exact SVD is taken instead.
    The same seed gives the same sketch on every device; the global random state is left alone.
    """
    if (rank is None) == (share is None):
        raise ValueError("give either rank (how many singular values) or share (of the energy), and only one")
    if oversampling < 0:
        raise ValueError(f"oversampling must be 0 or more extra columns; got {oversampling}")
    if power_iterations is not None and power_iterations < 0:
        raise ValueError(
            f"power_iterations must be 0 or more, or None to let the spectrum decide; got {power_iterations}"
        )
    matrix = _matrix(matrix)
    smaller = min(matrix.shape)
    if rank is not None:
        rank = check_rank(rank, matrix.shape, "matrix")
    if share is not None:
        _check_share(share)
    # Squares of very large or small entries would overflow or vanish, so work on entries of size 1.
    scale = max(abs(float(extreme)) for extreme in torch.aminmax(matrix)) or 1.0
    A = matrix / scale
    total = _squared_norm(A)

    width = rank + oversampling if rank is not None else 32 + oversampling
    generator = torch.Generator().manual_seed(seed)
    directions, iterations = A.new_empty(A.shape[1], 0), 0
    while 2 * width <= smaller:
        fresh = torch.randn(A.shape[1], width - directions.shape[1], generator=generator, dtype=torch.float32)
        directions = torch.cat([directions, fresh.to(A)], dim=1)
        Q, B, done = _sketch(A, directions, rank or width, total, power_iterations, tolerance)
        iterations += done
        U, S, Vh = torch.linalg.svd(B, full_matrices=False)
        if rank is not None:
            return _measured(A, scale, total, Q @ U[:, :rank], S[:rank], Vh[:rank], iterations)
        # The last few of the sketch are under-estimates: only a rank that leaves them out is taken.
        found = _smallest_rank(S.double().square(), total, share)
        if found is not None and found <= width - oversampling:
            return _measured(A, scale, total, Q @ U[:, :found], S[:found], Vh[:found], iterations)
        directions, width = Vh.T, 2 * width
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = rank if rank is not None else rank_for_energy(S, share)
    return _measured(A, scale, total, U[:, :kept], S[:kept], Vh[:kept], iterations)


def _sketch(
    A: Tensor, directions: Tensor, rank: int, total: float, power_iterations: int | None, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """Q (m, l) with orthonormal columns, B = QᵀA (l, n), and the number of power iterations done."""
    most = 30 if power_iterations is None else power_iterations
    Q = torch.linalg.qr(A @ directions).Q
    B = Q.T @ A
    captured = _captured(B, rank)
    noise = torch.finfo(A.dtype).eps * total
    for done in range(most):
        Q = torch.linalg.qr(A @ torch.linalg.qr(B.T).Q).Q
        B = Q.T @ A
        before, captured = captured, _captured(B, rank)
        if power_iterations is None and captured - before <= tolerance * max(total - captured, 0.0) + noise:
            return Q, B, done + 1
    return Q, B, most


def _captured(B: Tensor, rank: int) -> float:
    """Energy of the `rank` strongest directions of B, from its small Gram matrix."""
    return float(torch.linalg.eigvalsh((B @ B.T).double())[-rank:].sum())


def _measured(
    A: Tensor, scale: float, total: float, U: Tensor, S: Tensor, Vh: Tensor, iterations: int
) -> RandomizedFactors:
    """The factors of scale · A, with the error that multiplying them back shows."""
    missing = math.sqrt(_squared_norm(torch.addmm(A, U * S, Vh, alpha=-1)))
    factors = RandomizedFactors(U, S * scale, Vh)
    factors.error = missing * scale
    factors.relative_error = missing / math.sqrt(total) if total else 0.0
    factors.power_iterations = iterations
    return factors


# --- one number from a spectrum -------------------------------------------------------------------------
# These take singular values (one axis, largest first), or a matrix and compute its singular values first.


def energy(singular_values: Tensor) -> Tensor:
    """Cumulative share of ‖·‖_F², Σ_{k ≤ r} σ_k² / Σ_k σ_k² for r = 1, 2, …: float64 (k,), its last entry 1.

    Of a zero matrix nothing can be missing: all ones.
    """
    squares = _squares(singular_values)
    total = squares.sum()
    if total == 0:
        return torch.ones_like(squares)
    return (1 - (_tails(squares)[1:] / total)).clamp(0, 1)


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest r whose energy is at least `share`, 0 < share ≤ 1. Of a zero matrix: 0."""
    _check_share(share)
    squares = _squares(singular_values)
    return _smallest_rank(squares, float(squares.sum()), share)


def stable_rank(singular_values: Tensor) -> float:
    """‖·‖_F² / ‖·‖₂² = Σ σ_k² / σ_1² (Rudelson & Vershynin 2007): at most the rank, deaf to tiny σ.

    Of a zero matrix: 0.
    """
    squares = _squares(singular_values)
    return float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0


def effective_rank(singular_values: Tensor) -> float:
    """exp(−Σ p_k ln p_k) with p_k = σ_k / Σ σ (Roy & Vetterli 2007, definition 1): k equal σ give k.

    Of a zero matrix: 0.
    """
    S = _squares(singular_values).sqrt()
    if S[0] == 0:
        return 0.0
    p = S / S.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def numerical_rank(matrix: Tensor, tolerance: float | None = None) -> int:
    """How many singular values exceed `tolerance`; without one, σ_1 · max(m, n) · ε, the rounding of the SVD.

    ε is that of the dtype computed in. A rank-8 matrix *stored* in half precision has full rank, since what
    was rounded away is noise; `rounding_floor(…)[0]` is the tolerance that looks past it.
    """
    matrix = _matrix(matrix)
    S = torch.linalg.svdvals(matrix)
    if tolerance is None:
        tolerance = float(S[0]) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    elif not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more (a singular value to exceed); got {tolerance}")
    return int(S.gt(tolerance).sum())


# --- subspaces ------------------------------------------------------------------------------------------


def subspace_similarity(A: Tensor, B: Tensor, i: int, j: int, side: str = "right") -> float:
    """φ(A, B, i, j) = ‖U_Aⁱᵀ U_Bʲ‖_F² / min(i, j), in [0, 1] (LoRA paper, §7.2, equation 4).

    U_Aⁱ holds the i strongest singular directions of A: the right ones, as in the paper for its A of shape
    (r, d), or with side="left" those of the columns, for B of shape (d, r). 1 means that the smaller subspace
    lies in the larger. Chance is not 0: see `chance_similarity`. Raises ValueError where i or j exceeds the
    rank of its matrix: the directions past it are arbitrary.
    """
    return float(similarity_grid(A, B, i, j, side)[-1, -1])


def similarity_grid(A: Tensor, B: Tensor, i: int, j: int, side: str = "right") -> Tensor:
    """φ(A, B, a, b) for all a ≤ i, b ≤ j at the price of one, at [a − 1, b − 1] (LoRA paper, figure 3)."""
    U_A, U_B = _directions(A, i, side, "A", "i"), _directions(B, j, side, "B", "j")
    if U_A.shape[0] != U_B.shape[0]:
        what = "columns" if side == "right" else "rows"
        raise ValueError(
            f"A and B must have as many {what} as each other (their {side} directions are compared); "
            f"got {_shape(A)} and {_shape(B)}"
        )
    dtype = torch.promote_types(U_A.dtype, U_B.dtype)
    overlap = (U_A.to(dtype).T @ U_B.to(device=U_A.device, dtype=dtype)).double().square()
    a = torch.arange(1, i + 1, device=overlap.device)[:, None]
    b = torch.arange(1, j + 1, device=overlap.device)[None, :]
    return (overlap.cumsum(0).cumsum(1) / torch.minimum(a, b)).clamp(0, 1)


def chance_similarity(i: int, j: int, dimension: int) -> float:
    """What `subspace_similarity` is on average for random subspaces of the space: max(i, j) / dimension.

    E ‖U_Aᵀ U_B‖_F² = i · j / d, divided by min(i, j).
    """
    for name, value in (("i", i), ("j", j)):
        if not 1 <= value <= dimension:
            raise ValueError(
                f"{name} must be between 1 and {dimension} (the dimension of the space); got {value}"
            )
    return max(i, j) / dimension


def amplification_factor(delta: Tensor, weight: Tensor, rank: int) -> float:
    """‖ΔW_r‖_F / ‖U_rᵀ W V_r‖_F: how much louder ΔW is than W in ΔW's own r strongest directions.

    LoRA paper, §7.3. U_r, V_r: the top r left and right singular directions of ΔW. The paper's ΔW has rank r
    already; of a fully tuned one only the truncated part ΔW_r belongs in the numerator. inf where W is 0.
    """
    delta, weight = _matrix(delta, "delta"), _matrix(weight, "weight")
    if delta.shape != weight.shape:
        raise ValueError(f"delta and weight must have one shape; got {_shape(delta)} and {_shape(weight)}")
    rank = check_rank(rank, delta.shape, "delta")
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    _check_directions(S, delta, rank, "delta", "rank")
    dtype = torch.promote_types(delta.dtype, weight.dtype)
    U, Vh, weight = U.to(dtype), Vh.to(dtype), weight.to(device=U.device, dtype=dtype)
    present = float(torch.linalg.matrix_norm(U[:, :rank].T @ weight @ Vh[:rank].T))
    return float(torch.linalg.vector_norm(S[:rank])) / present if present else math.inf


# --- two models -----------------------------------------------------------------------------------------


def deltas(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], matrices_only: bool = False
) -> dict[str, Tensor]:
    """name → ΔW = after − before for every floating-point tensor of two state dicts, in float32 (or float64).

    Biases and norms too, so that before + deltas is after; `matrices_only` leaves those out. Integer tensors
    (token positions, counters) are no weights and are left out. Raises ValueError naming the tensors that
    only one of the two has or whose shapes differ.
    """
    problems = []
    for title, here, there in (("before", before, after), ("after", after, before)):
        only = [name for name in here if name not in there]
        if only:
            problems.append(f"only in {title}: {_some(only)}")
    shared = [name for name in before if name in after]
    unlike = [name for name in shared if before[name].shape != after[name].shape]
    if unlike:
        shapes = (f"{name} {tuple(before[name].shape)} → {tuple(after[name].shape)}" for name in unlike)
        problems.append(f"shapes differ: {_some(shapes)}")
    if problems:
        raise ValueError(
            "the two state dicts must hold the same tensors in the same shapes; " + "; ".join(problems)
        )
    difference = {}
    for name in shared:
        old, new = before[name].detach(), after[name].detach()
        if not (old.is_floating_point() and new.is_floating_point()) or (matrices_only and old.ndim != 2):
            continue
        dtype = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
        difference[name] = new.to(device=old.device, dtype=dtype) - old.to(dtype)
    return difference


# --- what noise looks like ------------------------------------------------------------------------------


def random_matrix_edge(rows: int, columns: int, sigma: float = 1.0) -> float:
    """σ(√m + √n): where the singular values of an (m, n) matrix of independent noise end.

    Marchenko & Pastur 1967. σ is the standard deviation of an entry. The largest singular value fluctuates
    about the edge by a share of order m^(−2/3).
    """
    _check_noise(rows, columns, sigma)
    return sigma * (math.sqrt(rows) + math.sqrt(columns))


def marchenko_pastur(singular_values: Tensor, rows: int, columns: int, sigma: float = 1.0) -> Tensor:
    """Density of the min(m, n) singular values of (m, n) noise at the given places; integrates to 1.

    p(s) = √((s₊² − s²)(s² − s₋²)) / (π σ² min(m, n) s) for s₋ < s < s₊, where s± = σ|√m ± √n|
    (Marchenko & Pastur 1967).
    """
    _check_noise(rows, columns, sigma)
    s = torch.as_tensor(singular_values).double()
    upper, lower = (
        sigma * (math.sqrt(rows) + math.sqrt(columns)),
        sigma * abs(math.sqrt(rows) - math.sqrt(columns)),
    )
    inside = ((upper**2 - s**2) * (s**2 - lower**2)).clamp(min=0).sqrt()
    # A square matrix has s₋ = 0, where √(s²)/s is 1.
    small = torch.finfo(torch.float64).tiny
    return inside / (math.pi * sigma**2 * min(rows, columns) * s.clamp(min=small))


@functools.lru_cache(maxsize=4096)
def product_noise_edge(rows: int, columns: int, rank: int, draws: int = 40, seed: int = 0) -> float:
    """The largest singular value in `draws` products of independent Gaussian factors, each of Frobenius norm 1.

    (m, r) · (r, n): what an update s · BA without structure looks like, were it scaled to ‖ΔW‖ = 1. A singular value
    above it has a chance of about 1 in draws + 1 to be noise of that norm and rank (parallel analysis: Horn 1965).
    With r far below m and n all r are nearly equal, 1/√r. The factors themselves are not drawn, but the triangles of
    their QR: χ_{m − i + 1} on the diagonal and normal above it (Bartlett 1933; Muirhead 1982, theorem 3.2.14).
    """
    _check_noise(rows, columns, 1.0)
    if operator.index(rank) < 1 or operator.index(draws) < 1:
        raise ValueError(f"rank and draws must be at least 1; got {rank} and {draws}")
    generator = np.random.default_rng(seed)
    largest = 0.0
    for _ in range(draws):
        product = _triangle(rows, rank, generator) @ _triangle(columns, rank, generator).T
        values = np.linalg.svd(product, compute_uv=False)
        largest = max(largest, float(values[0] / np.linalg.norm(values)))
    return largest


def _triangle(rows: int, rank: int, generator: np.random.Generator) -> np.ndarray:
    """R of the QR of an (m, r) matrix of standard normal entries; for m < r the matrix itself."""
    if rows < rank:
        return generator.standard_normal((rows, rank))
    above = np.triu(generator.standard_normal((rank, rank)), 1)
    return above + np.diag(np.sqrt(generator.chisquare(np.arange(rows, rows - rank, -1))))


def denoising_threshold(rows: int, columns: int, sigma: float = 1.0) -> float:
    """The singular value below which cutting off beats keeping, for a low-rank signal plus noise of size σ.

    λ(β) √n σ with β = m / n ≤ 1, λ(β) = √(2(β + 1) + 8β / (β + 1 + √(β² + 14β + 1))); 4/√3 · √n σ when square
    (Gavish & Donoho 2014, equation 11). It lies above `random_matrix_edge`: a direction barely out of the
    noise points too far off to be worth keeping.
    """
    _check_noise(rows, columns, sigma)
    n = max(rows, columns)
    beta = min(rows, columns) / n
    return (
        math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
        * math.sqrt(n)
        * sigma
    )


def rounding_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a floating-point format, at the size of each value.

    2^⌊log₂|w|⌋ · ε, and no less than the format's smallest number. A rounding is off by up to half of it, and
    by step/√12 on average (root mean square). `values` in float32 or float64; so is the result.
    """
    information = torch.finfo(dtype)
    integer, exponent_bits = (
        (torch.int64, 0x7FF0_0000_0000_0000) if values.dtype == torch.float64 else (torch.int32, 0x7F80_0000)
    )
    power = values.contiguous().view(integer).bitwise_and(exponent_bits).view(values.dtype)
    return power.clamp_(min=information.smallest_normal).mul_(information.eps)


def rounding_floor(weight: Tensor, dtype: torch.dtype, roundings: int = 2, seed: int = 0) -> Tensor:
    """Singular values, largest first, of the noise that storing weights in `dtype` puts into ΔW = W_f − W_o.

    A rounding adds an error uniform within half a step of the format at that entry's size; a draw of it is
    decomposed. roundings: 2 when both checkpoints were rounded, 1 when tuning started from the rounded one.
    What of ΔW's spectrum lies below the first entry, rounding alone could have made (one draw: allow 5 %).
    Where ΔW is smaller than a step, two roundings go together, and the noise is less than this; with one
    rounding it can be a third more, since what is rounded away is then ΔW itself.
    """
    weight = _matrix(weight, "weight")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point format such as torch.bfloat16; got {dtype}")
    if operator.index(roundings) < 1:
        raise ValueError(f"roundings must be 1 (one checkpoint was rounded) or 2 (both); got {roundings}")
    if weight.abs().max() > torch.finfo(dtype).max:
        raise ValueError(f"weight must stay within ±{torch.finfo(dtype).max:g} to be stored in {dtype}")
    step = rounding_step(weight, dtype)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.zeros(weight.shape)
    for _ in range(roundings):
        noise += torch.rand(weight.shape, generator=generator) - 0.5
    return torch.linalg.svdvals(noise.to(step) * step)


# --- what comes in --------------------------------------------------------------------------------------


def _matrix(value: Tensor, name: str = "matrix") -> Tensor:
    """`value` as a detached, dense, finite float32 or float64 matrix, or a ValueError saying what is off."""
    matrix = torch.as_tensor(value).detach()
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must have two axes (rows, columns); got shape {tuple(matrix.shape)}. "
            "Reshape it, or take one matrix at a time"
        )
    if matrix.numel() == 0:
        raise ValueError(f"{name} must have at least one row and one column; got {_shape(matrix)}")
    if matrix.is_complex() or matrix.dtype == torch.bool:
        raise ValueError(f"{name} must hold real numbers; got {matrix.dtype}")
    if matrix.layout is not torch.strided:
        matrix = matrix.to_dense()
    if not matrix.is_floating_point():
        matrix = matrix.double()
    elif matrix.dtype is not torch.float64:
        matrix = matrix.float()
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(matrix)):
        bad = ~torch.isfinite(matrix)
        row, column = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite; {int(bad.sum())} of its {matrix.numel()} entries are NaN or infinite, "
            f"the first at [{row}, {column}]. Look there before decomposing it"
        )
    return matrix


def _spectrum(value: Tensor) -> Tensor:
    values = torch.as_tensor(value).detach()
    if values.ndim == 2:
        return torch.linalg.svdvals(_matrix(values)).double()
    if values.ndim != 1 or values.numel() == 0 or values.is_complex():
        raise ValueError(
            "give singular values (one axis, at least one of them, real) or a matrix (two axes); "
            f"got shape {tuple(values.shape)} of {values.dtype}"
        )
    values = values.double()
    if not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"singular values must be finite and not negative; got {_some(values.tolist())}")
    if (values[1:] > values[:-1]).any():
        raise ValueError(
            "singular values must fall, largest first: sort them with .sort(descending=True).values"
        )
    return values


def _squares(value: Tensor) -> Tensor:
    """Squared singular values, the largest scaled to 1 (or all 0): nothing overflows or vanishes."""
    S = _spectrum(value)
    return (S / S[0]).square() if S[0] > 0 else S


def _tails(squares: Tensor) -> Tensor:
    """Σ_{k > r} for r = 0 … k: summed from the small end, so that a small tail keeps its digits."""
    sums = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _smallest_rank(squares: Tensor, total: float, share: float) -> int | None:
    """The smallest r with Σ_{k > r} σ_k² ≤ (1 − share) · total, None if these σ don't reach it."""
    unseen = max(total - float(squares.sum()), 0.0)
    missing = _tails(squares) + unseen
    # The hair's breadth is for 1 − 0.9 being less than 0.1; a share of 1 stays exact.
    enough = (missing <= (1 - share) * total * (1 + 1e-12)).nonzero()
    return int(enough[0]) if enough.numel() else None


def _squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _directions(matrix: Tensor, count: int, side: str, name: str, letter: str) -> Tensor:
    if side not in ("right", "left"):
        raise ValueError(
            f'side must be "right" (directions of the rows) or "left" (of the columns); got {side!r}'
        )
    matrix = _matrix(matrix, name)
    if not 1 <= operator.index(count) <= min(matrix.shape):
        raise ValueError(
            f"{letter} must be between 1 and {min(matrix.shape)} "
            f"(the smaller side of the {_shape(matrix)} {name}); got {count}"
        )
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    _check_directions(S, matrix, count, name, letter)
    return Vh[:count].T if side == "right" else U[:, :count]


def _check_directions(S: Tensor, matrix: Tensor, count: int, name: str, letter: str) -> None:
    rank = int(S.gt(S[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    if rank == 0:
        raise ValueError(f"{name} is zero: it has no strongest directions")
    if count > rank:
        raise ValueError(
            f"{name} has rank {rank}, so its directions past that are arbitrary: "
            f"take {letter} ≤ {rank}, not {count}"
        )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(
            f"share must be above 0 and at most 1 (0.9 asks for 90 % of the energy); got {share}"
        )


def _check_noise(rows: int, columns: int, sigma: float) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"a matrix must have at least one row and one column; got {rows} × {columns}")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be above 0 (the standard deviation of one entry); got {sigma}")


def _shape(matrix: Tensor) -> str:
    return " × ".join(str(side) for side in matrix.shape)


def _some(items, most: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
