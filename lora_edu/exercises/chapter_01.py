"""Checks of chapter 01's exercises: one number, five functions that are tried on matrices the chapter does not show.

A function is watched while it runs: it may not call `lora_edu.lowrank` (that is what it is asked to write), and that
of exercise 5 may decompose nothing large. The guards know what torch computes, not who wrote it. Right answers are
computed here.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType

import torch
from matplotlib import cbook
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu import lowrank
from lora_edu.exercises.answers import judge, no_function

THIN = 64  # exercise 5: what is decomposed has at most so many rows or columns
HIDDEN = (70, 62, 55, 48, 42, 10)  # strengths of the terms in exercise 6's matrix


def hidden_matrix() -> Tensor:
    """Exercise 6's matrix, 300 × 200: noise of standard deviation 1 with six rank-one terms hidden in it."""
    return _noise_and_terms(300, 200, HIDDEN, seed=3)


def check_01_1(answer: object) -> str:
    """Degrees of freedom of the 10 000 × 100 matrices of rank 8."""
    rows, columns, rank = 10_000, 100, 8
    stored = rank * (rows + columns)
    right = stored - rank**2
    mistakes = {
        stored: "that is what B and A store. BG and G⁻¹A give the same product for every invertible r × r "
        "matrix G: how many of the numbers are therefore free to change nothing?",
        rows * columns: "that is a matrix of any rank; one of rank 8 has far less freedom.",
        stored + rank**2: "the r² of G are no extra freedom, they are freedom that is lost: mind the sign.",
        stored
        - rank: "G is an r × r matrix, not only its diagonal: scaling each pair is r of its r² numbers.",
        stored - 2 * rank**2: "G and G⁻¹ are not chosen one by one: r² once, not twice.",
        rank * rows * columns: "a rank-one term is two lists, m + n numbers, not a table of m · n.",
        rank: "that is the rank; the question is how many numbers can be chosen freely.",
    }
    return judge(
        1,
        answer,
        right,
        mistakes,
        hint="count the numbers in B (m × r) and A (r × n) and take off those of G (r × r).",
        why=f"r(m + n) − r² = {right:,.0f}: r² of the {stored:,} numbers stored change nothing in BA.",
        tolerance=1e-9,
    )


def check_01_2(answer: object) -> str:
    """A function (S, share) → the smallest rank that keeps at least this share of Σσ²."""
    hint = "the energy of the first r terms is the sum of their σ²; compare it with the share of the sum of all σ²."
    if refused := no_function(2, answer, "S, share", hint):
        return refused
    equal, steep = torch.ones(4, dtype=torch.float64), torch.tensor([4.0, 2, 2, 1, 1], dtype=torch.float64)
    cases = [
        (steep, 0.9),
        (steep, 0.5),
        (_map_spectrum(), 0.9),
        (_map_spectrum(), 0.99),
        (equal, 0.5),
        (equal, 1.0),
    ]
    mistakes: dict[str, Callable[[Tensor, float], float]] = {
        "that is where Σσ reaches the share; energy is Σσ², and squares favour the large.": lambda S, share: (
            _first(S, share)
        ),
        "that is one too few: counting from 0 gives an index, not a rank.": lambda S, share: (
            _first(S.square(), share) - 1
        ),
        "that is one too many.": lambda S, share: _first(S.square(), share) + 1,
        "that is the rank that is left out, not the one that is kept.": lambda S, share: (
            len(S) - _first(S.square(), share)
        ),
    }
    found = []
    for S, share in cases:
        value, problem = _tried(2, answer, S.clone(), share)
        if not problem and (value := _as_number(value)) is None:
            problem = "Exercise 2: not yet: the rank is one number; the function returns something else."
        if problem:
            return problem
        found.append(value)
    right = [_first(S.square(), share) for S, share in cases]
    if found == right:
        return f"Exercise 2: right. For 90 % the map takes rank {right[2]}, for 99 % rank {right[3]}."
    if found[:4] == right[:4]:
        return (
            "Exercise 2: not yet: nearly. With four equal singular values, rank 2 keeps 50 % exactly, and rank 4 all; "
            f"yours says {found[4]:g} and {found[5]:g}. At least the share means ≥."
        )
    for diagnosis, mistake in mistakes.items():
        if found[:4] == [mistake(S, share) for S, share in cases[:4]]:
            return f"Exercise 2: not yet: {diagnosis}"
    wrong = next(k for k in range(4) if found[k] != right[k])
    size = "too small" if found[wrong] < right[wrong] else "too large"
    where = "σ = 4, 2, 2, 1, 1" if wrong < 2 else "the map's spectrum"
    return f"Exercise 2: not yet: for {where} and {cases[wrong][1]:.0%} it says {found[wrong]:g}, {size}. Hint: {hint}"


def check_01_3(answer: object) -> str:
    """A function S → ‖M − M_r‖_F for r = 0, 1, …, n, from the singular values alone, accurate for small ones too."""
    hint = (
        "what is cut off at r are the terms r + 1, r + 2, …, at right angles to each other: use Pythagoras."
    )
    if refused := no_function(3, answer, "S", hint):
        return refused
    S = torch.tensor([6.0, 3, 2, 2, 1], dtype=torch.float64)
    falling = 10.0 ** -torch.arange(14, dtype=torch.float64)
    squares = S.square()
    tails = torch.stack([squares[r:].sum() for r in range(len(S) + 1)])
    right = tails.sqrt()
    got = []
    for spectrum in (S, falling):
        value, problem = _tried(3, answer, spectrum.clone())
        if problem:
            return problem
        try:
            got.append(torch.as_tensor(value, dtype=torch.float64).flatten())
        except (TypeError, ValueError, RuntimeError):
            return f"Exercise 3: not yet: the result is a tensor of numbers; got {type(value).__name__}."
    found, small = got
    if found.shape == right.shape and torch.allclose(found, right, rtol=1e-4, atol=1e-6):
        exact = torch.stack([falling[r:].square().sum().sqrt() for r in range(len(falling) + 1)])
        if torch.allclose(small, exact, rtol=1e-4, atol=1e-18):
            return "Exercise 3: right. The map, for instance, is " + _map_distance()
        return (
            "Exercise 3: not yet: right for σ = 6, 3, 2, 2, 1. But where each σ is a tenth of the one before, the "
            "small distances drown in the rounding of the large ones (or become NaN): add the squares from the "
            "small end."
        )
    kept = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    mistakes = [
        (tails, "these are the squares of the distances: take the root."),
        (right[1:], "the first entry is missing: at r = 0 everything is cut off."),
        (right[:-1], "the last entry is missing: at r = n nothing is cut off, and the distance is 0."),
        (kept.sqrt(), "that is what is kept; the distance is made of what is cut off."),
        (right.flip(0), "the order is reversed: r = 0, where everything is cut off, comes first."),
        (right / right[0], "that is the share of ‖M‖; asked is the distance itself."),
        (
            1 - kept / kept[-1],
            "that is the share of the energy that is missing; asked is the distance itself.",
        ),
        (
            torch.stack([S[r:].sum() for r in range(len(S) + 1)]),
            "lengths at right angles do not add; squares do.",
        ),
        (
            torch.cat([S, S.new_zeros(1)]),
            "σ_(r+1) is the distance in the spectral norm, not in the Frobenius norm.",
        ),
        (S, "σ_(r+1) is the distance in the spectral norm, not in the Frobenius norm."),
    ]
    for mistake, diagnosis in mistakes:
        if found.shape == mistake.shape and torch.allclose(found, mistake, rtol=1e-4, atol=1e-6):
            return f"Exercise 3: not yet: {diagnosis}"
    if found.shape != right.shape:
        return (
            f"Exercise 3: not yet: for 5 singular values there are 6 distances, r = 0 … 5; got {len(found)}."
        )
    r = next(r for r in range(len(S) + 1) if not math.isclose(found[r], right[r], rel_tol=1e-4, abs_tol=1e-6))
    return f"Exercise 3: not yet: for σ = 6, 3, 2, 2, 1 the distance at r = {r} is not {found[r]:.6g}. Hint: {hint}"


def check_01_4(answer: object) -> str:
    """A function (A, B, i, j) → φ(i, j) of the left singular vectors of two matrices with equally many rows."""
    hint = (
        "take the first i columns of the one U and the first j of the other, as section 7 takes rows of Vh."
    )
    if refused := no_function(4, answer, "A, B, i, j", hint):
        return refused
    generator = torch.Generator().manual_seed(5)
    A, B = (torch.randn(30, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    wide = torch.randn(30, 45, generator=generator, dtype=torch.float64)
    cases = [(A, B, 4, 9), (B, A, 9, 4), (A, 3 * A, 5, 5), (A, wide, 4, 9)]
    right = [lowrank.subspace_similarity(*case, side="left") for case in cases]
    found: list[float] = []
    near = lambda values: all(
        math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(found, values, strict=False)
    )
    for k, case in enumerate(cases):
        if k == 3 and not near(right):
            break  # the matrices of unequal width are for those who have the formula
        value, problem = _tried(4, answer, *(x.clone() if isinstance(x, Tensor) else x for x in case))
        if not problem and (value := _as_number(value)) is None:
            problem = "Exercise 4: not yet: φ is one number; the function returns something else."
        if problem:
            return problem
        found.append(value)
    if near(right):
        chance = lowrank.chance_similarity(4, 9, 30)
        return (
            f"Exercise 4: right. Two random 30 × 20 matrices have φ(4, 9) = {right[0]:.2f}; chance gives "
            f"{chance:.2f} on average."
        )
    norms = [math.sqrt(x * min(i, j)) for x, (_, _, i, j) in zip(right, cases, strict=True)]
    sizes = [(i, j) for _, _, i, j in cases]
    mistakes = [
        (
            [lowrank.subspace_similarity(*case) for case in cases[:3]],
            "that compares right singular vectors, what the matrices read.",
        ),
        ([x**2 for x in norms], "divide by min(i, j), so that φ lies in [0, 1]."),
        (
            [x**2 / max(size) for x, size in zip(norms, sizes, strict=True)],
            "divide by min(i, j), not by max(i, j): φ is 1 where the smaller subspace lies in the larger one.",
        ),
        (
            [x / min(size) for x, size in zip(norms, sizes, strict=True)],
            "the norm is squared in the formula.",
        ),
    ]
    for values, diagnosis in mistakes:
        if near(values):
            return f"Exercise 4: not yet: {diagnosis}"
    return (
        f"Exercise 4: not yet: for two random 30 × 20 matrices, φ(4, 9) is not {found[0]:.3g}. Hint: {hint}"
    )


def check_01_5(answer: object) -> str:
    """A function (matrix, rank) → near-best matrix of that rank, that decomposes nothing large."""
    hint = "multiply the matrix by a few random columns; power iterations turn them to its strongest ones."
    if refused := no_function(5, answer, "matrix, rank", hint):
        return refused
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(draw(400, 300)).Q, torch.linalg.qr(draw(300, 300)).Q
    S = 1 / torch.arange(1, 301, dtype=torch.float64)
    matrix, rank = (U * S) @ V.T, 16
    try:
        with _OnlyInTorch(), _OnlyThin():
            result, problem = _tried(5, answer, matrix.clone(), rank)
    except _Refused as refusal:
        return f"Exercise 5: not yet: {refusal}"
    if problem:
        return problem
    if isinstance(result, tuple | list) and len(result) == 3:
        return "Exercise 5: not yet: return the matrix itself, U · diag(S) · Vh, not its three factors."
    if not isinstance(result, Tensor) or result.shape != matrix.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        return f"Exercise 5: not yet: the result must be a matrix of the same shape, (400, 300); got {shape}."
    precise = result.dtype == torch.float64
    result = result.detach().double()
    if not torch.isfinite(result).all():
        return (
            "Exercise 5: not yet: the result has NaN or infinite entries. Take qr between repeated products."
        )
    found = lowrank.numerical_rank(result, 1e-8 if precise else 1e-4)
    if found > rank:
        return f"Exercise 5: not yet: the result has rank {found}, not {rank}: cut the small SVD to {rank} terms."
    excess = float(torch.linalg.matrix_norm(matrix - result) / S[rank:].square().sum().sqrt()) - 1
    if excess > 1:
        return (
            f"Exercise 5: not yet: the result is {1 + excess:.1f} times as far off as the best one. Q must have "
            "orthonormal columns (qr) before Q Qᵀ M is a projection."
        )
    if excess > 0.02:
        return (
            f"Exercise 5: not yet: close, but {excess:.1%} farther off than the best; 2 % are allowed. This spectrum "
            "(1/k) falls slowly: draw some extra columns, or add a power iteration, Q ← qr(M · qr(Mᵀ Q))."
        )
    return (
        f"Exercise 5: right. {excess:.2%} farther off than the best matrix of rank {rank}, and torch decomposed "
        f"nothing whose smaller side is above {THIN}."
    )


def check_01_6(answer: object) -> str:
    """A function (matrix, sigma) → how many singular values stand above the edge σ(√m + √n) of the noise."""
    hint = "singular values of noise end at σ(√m + √n); count those that lie above."
    if refused := no_function(6, answer, "matrix, sigma", hint):
        return refused
    hidden = hidden_matrix()
    between = _noise_and_terms(300, 200, (70, 60, 25, 23), seed=4)  # the last two end above the edge
    noise = _noise_and_terms(60, 2000, (), seed=6)
    cases = [(hidden, 1.0), (3 * hidden, 3.0), (hidden.T, 1.0), (between, 1.0), (noise / 2, 0.5)]
    found = []
    for matrix, sigma in cases:
        value, problem = _tried(6, answer, matrix.clone(), sigma)
        if not problem and (value := _as_number(value)) is None:
            problem = "Exercise 6: not yet: the count is one number; the function returns something else."
        if problem:
            return problem
        found.append(value)

    def above(limit: Callable[[int, int, float], float]) -> list[int]:
        return [int((torch.linalg.svdvals(M) > limit(*M.shape, sigma)).sum()) for M, sigma in cases]

    right = above(lowrank.random_matrix_edge)
    if found == right:
        return (
            f"Exercise 6: right. In the hidden matrix {right[0]} stand above √300 + √200 = "
            f"{lowrank.random_matrix_edge(300, 200):.1f}. {len(HIDDEN)} terms are in there: one has the strength "
            f"{HIDDEN[-1]}, less than (mn)^¼ = {60_000**0.25:.1f}, and no look at the spectrum shows it."
        )
    mistakes = {
        "sigma is not used: noise of deviation 3 reaches three times as far.": lambda m, n, s: (
            m**0.5 + n**0.5
        ),
        "that is Gavish and Donoho's threshold: what is worth keeping. What is no noise begins at the edge.": (
            lowrank.denoising_threshold
        ),
        "the edge is the sum √m + √n, not the larger root.": lambda m, n, s: s * max(m, n) ** 0.5,
        "the edge is the sum √m + √n, not twice a root.": lambda m, n, s: 2 * s * max(m, n) ** 0.5,
        "the edge is √m + √n, not √(m + n).": lambda m, n, s: s * (m + n) ** 0.5,
        "that counts every singular value. Those of noise are above zero, too; what matters is how far they reach.": (
            lambda m, n, s: 0.0
        ),
    }
    for diagnosis, limit in mistakes.items():
        if found == above(limit):
            return f"Exercise 6: not yet: {diagnosis}"
    wrong = next(k for k in range(len(cases)) if found[k] != right[k])
    (m, n), sigma = cases[wrong][0].shape, cases[wrong][1]
    size = "too few" if found[wrong] < right[wrong] else "too many"
    return (
        f"Exercise 6: not yet: {found[wrong]:g} is {size} for a {m} × {n} matrix with noise of {sigma:g}. "
        f"Hint: {hint}"
    )


# --- what the answers come from ------------------------------------------------------------------------


@functools.cache
def _map_spectrum() -> Tensor:
    heights = torch.from_numpy(
        cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype("float64")
    )
    return torch.linalg.svdvals(heights - heights.mean())


def _map_distance() -> str:
    S, size = _map_spectrum(), 344 * 403
    off = float(S[8:].square().sum().sqrt())
    return f"{off:,.0f} m from its best cut to rank 8, {off / math.sqrt(size):.0f} m at a typical point."


def _noise_and_terms(rows: int, columns: int, strengths: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(draw(side, len(strengths))).Q for side in (rows, columns))
    return draw(rows, columns) + (U * torch.tensor(strengths, dtype=torch.float64)) @ V.T


def _first(terms: Tensor, share: float) -> int:
    """The smallest count of leading terms whose sum is at least this share of the sum of all."""
    sums = terms.cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1


def _as_number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


# --- how a function is tried ---------------------------------------------------------------------------


class _Refused(BaseException):
    """What the student's function may not do in this exercise, in words. `except Exception` does not catch it."""


def _tried(k: int, answer: Callable, *arguments: object) -> tuple[object, str]:
    """(result, "") of the student's function, or (None, what went wrong)."""
    with _OwnWork() as work:
        try:
            result = answer(*arguments)
        except Exception as error:
            return None, f"Exercise {k}: not yet: your function stops with {type(error).__name__}: {error}"
    if work.called:
        name = work.called[0]
        return (
            None,
            f"Exercise {k}: not yet: your function calls {name}. It is right, but here write it yourself.",
        )
    return result, ""


def _ready_made() -> Mapping[CodeType, str]:
    """Code of the functions that the exercises ask to write → how they are called."""
    ours = {
        f.__code__: f"lowrank.{name}"
        for name, f in vars(lowrank).items()
        if getattr(f, "__module__", None) == lowrank.__name__ and hasattr(f, "__code__")
    }
    return ours | {f.__code__: f"torch.{f.__name__}" for f in (torch.svd_lowrank, torch.pca_lowrank)}


class _OwnWork:
    """While it lasts, calls of ready-made functions are noted, under whatever name they are called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self._known = _ready_made()

    def __enter__(self) -> "_OwnWork":
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in self._known:
            self.called.append(self._known[frame.f_code])


class _OnlyThin(TorchDispatchMode):
    """While it lasts, torch's kernels that decompose or invert refuse a matrix whose smaller side exceeds THIN.

    It sees the operations that are really computed, so torch.svd, pinv, eigh of MᵀM or an alias make no difference.
    """

    HARMLESS = ("linalg_vector_norm", "linalg_cross", "linalg_matrix_exp")
    OTHERS = ("geqrf", "cholesky", "cholesky_inverse", "ormqr", "triangular_solve")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's hook: else the first operation imports its whole compiler, for nothing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removeprefix("_")
        decomposes = name in self.OTHERS or (name.startswith("linalg_") and name not in self.HARMLESS)
        if decomposes and args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
            rows, columns = args[0].shape[-2:]
            if min(rows, columns) > THIN:
                raise _Refused(
                    f"your function takes {name.removeprefix('linalg_')} of a {rows} × {columns} matrix. Decompose "
                    "only the thin matrices that the sketch gives."
                )
        return func(*args, **(kwargs or {}))


class _OnlyInTorch(TorchFunctionMode):
    """While it lasts, no tensor is turned into a NumPy array or a list, where nobody sees what is computed."""

    WAYS_OUT = ("numpy", "__array__", "tolist", "__dlpack__", "storage", "untyped_storage", "data_ptr")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.WAYS_OUT:
            raise _Refused(
                "your function takes the numbers out of torch (NumPy, a list), where the check cannot see what is "
                "decomposed. Stay in torch."
            )
        return func(*args, **(kwargs or {}))
