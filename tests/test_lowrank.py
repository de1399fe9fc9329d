"""lowrank.py against identities of linear algebra, for any shape, rank and dtype; not for its speed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu import lowrank
from lora_edu.data import load_checkpoint

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
sides = st.integers(1, 24)
seeds = st.integers(0, 10**6)
few = settings(max_examples=60, deadline=None)


def random_matrix(rows, columns, seed=0, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    matrix = draw(rows, columns) if rank is None else draw(rows, rank) @ draw(rank, columns)
    return matrix.to(dtype)


def with_spectrum(S, rows, columns, seed=0):
    S = torch.as_tensor(S, dtype=torch.float64)
    U = torch.linalg.qr(random_matrix(rows, len(S), seed)).Q
    V = torch.linalg.qr(random_matrix(columns, len(S), seed + 1)).Q
    return (U * S) @ V.T


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.double()))


def slack(matrix):
    """What rounding in the dtype computed in may leave of a matrix of this size."""
    eps = torch.finfo(torch.float64 if matrix.dtype == torch.float64 else torch.float32).eps
    return 50 * eps * max(matrix.shape) * max(norm(matrix), 1e-30)


# --- svd and truncate ----------------------------------------------------------------------------------


@few
@given(sides, sides, st.integers(0, 24), seeds, st.sampled_from(DTYPES))
def test_svd_multiplies_back_for_any_shape_rank_and_dtype(rows, columns, rank, seed, dtype):
    matrix = random_matrix(rows, columns, seed, rank, dtype)
    U, S, Vh = lowrank.svd(matrix)
    assert U.shape == (rows, min(rows, columns)) and Vh.shape == (min(rows, columns), columns)
    assert norm((U * S) @ Vh - matrix.to(S.dtype)) <= slack(matrix)
    identity = torch.eye(len(S), dtype=torch.float64)
    assert (
        norm(U.double().T @ U.double() - identity) < 1e-4
        and norm(Vh.double() @ Vh.double().T - identity) < 1e-4
    )
    assert (S[:-1] >= S[1:]).all() and (S >= 0).all()


@few
@given(sides, sides, seeds, st.data())
def test_truncation_is_off_by_exactly_what_was_cut_and_no_random_rival_is_closer(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = random_matrix(rows, columns, seed)
    truncated = lowrank.truncate(matrix, rank)
    S = torch.linalg.svdvals(matrix)
    assert norm(matrix - truncated) == pytest.approx(float(S[rank:].square().sum().sqrt()), abs=slack(matrix))
    spectral = float(torch.linalg.matrix_norm(matrix - truncated, 2))
    assert spectral == pytest.approx(float(S[rank]) if rank < len(S) else 0, abs=slack(matrix))
    assert lowrank.numerical_rank(truncated) == rank
    # The best rival with these random rows: project on them.
    rival_rows = torch.linalg.qr(random_matrix(columns, rank, seed + 1)).Q
    assert norm(matrix - matrix @ rival_rows @ rival_rows.T) >= norm(matrix - truncated) - slack(matrix)


def test_half_precision_comes_back_in_float32_so_that_the_rank_survives():
    matrix = random_matrix(30, 20, dtype=torch.bfloat16)
    truncated = lowrank.truncate(matrix, 3)
    assert truncated.dtype == torch.float32 and lowrank.numerical_rank(truncated) == 3
    assert lowrank.numerical_rank(truncated.bfloat16()) == 20


def test_zero_matrix_and_one_row():
    zero = torch.zeros(4, 7)
    assert norm(lowrank.truncate(zero, 2)) == 0
    assert lowrank.energy(zero).tolist() == [1, 1, 1, 1]
    assert (lowrank.rank_for_energy(zero, 0.9), lowrank.numerical_rank(zero)) == (0, 0)
    assert (lowrank.stable_rank(zero), lowrank.effective_rank(zero)) == (0, 0)
    row = torch.tensor([[3.0, 0.0, 4.0]])
    assert lowrank.svd(row).S.tolist() == pytest.approx([5.0])
    assert lowrank.stable_rank(row) == lowrank.effective_rank(row) == lowrank.rank_for_energy(row, 1.0) == 1


def test_parameters_numpy_and_integers_are_taken_and_left_alone():
    parameter = torch.nn.Parameter(torch.randn(5, 4))
    assert not lowrank.truncate(parameter, 2).requires_grad
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.allclose(lowrank.truncate(pixels, 3), torch.arange(12, dtype=torch.float64).reshape(3, 4))
    assert lowrank.numerical_rank(pixels) == 2


# --- one number from a spectrum ------------------------------------------------------------------------

spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=30).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@few
@given(spectra, st.floats(0.01, 1.0), st.sampled_from([1e-200, 1e-30, 1.0, 1e30, 1e150]))
def test_energy_rises_to_one_and_rank_for_energy_is_the_first_to_reach_the_share(S, share, scale):
    S = S * scale
    energy = lowrank.energy(S)
    assert energy[-1] == 1 and (energy[1:] >= energy[:-1]).all()
    rank = lowrank.rank_for_energy(S, share)
    if float(S[0]) == 0:
        assert rank == 0
        return
    assert energy[rank - 1] >= share - 1e-9
    assert rank == 1 or energy[rank - 2] < share + 1e-9


@few
@given(spectra.filter(lambda S: float(S[0]) > 1e-3))
def test_stable_and_effective_rank_lie_between_one_and_the_rank(S):
    rank = int((S > 0).sum())
    assert 1 - 1e-9 <= lowrank.stable_rank(S) <= rank + 1e-9
    assert 1 - 1e-9 <= lowrank.effective_rank(S) <= rank + 1e-9
    assert lowrank.stable_rank(S * 7) == pytest.approx(lowrank.stable_rank(S))
    assert lowrank.effective_rank(S * 7) == pytest.approx(lowrank.effective_rank(S))


@pytest.mark.parametrize("count", [1, 10, 100])
def test_equal_singular_values_count_themselves(count):
    S = torch.full((count,), 3.0)
    assert lowrank.stable_rank(S) == pytest.approx(count) and lowrank.effective_rank(S) == pytest.approx(
        count
    )
    assert lowrank.rank_for_energy(S, 0.9) == max(1, math.ceil(0.9 * count - 1e-9))


def test_effective_rank_takes_the_entropy_of_sigma_and_not_of_its_square():
    # Roy & Vetterli's p_k is σ_k / Σσ: for (3, 1) that is (3/4, 1/4).
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert lowrank.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


def test_a_matrix_stands_for_its_singular_values():
    matrix = random_matrix(9, 6)
    S = lowrank.svd(matrix).S
    for measure in (lowrank.stable_rank, lowrank.effective_rank):
        assert measure(matrix) == pytest.approx(measure(S))
    assert torch.allclose(lowrank.energy(matrix), lowrank.energy(S))
    assert lowrank.rank_for_energy(matrix, 0.7) == lowrank.rank_for_energy(S, 0.7)


@few
@given(sides, sides, seeds, st.data())
def test_numerical_rank_is_the_number_of_factors(rows, columns, seed, data):
    rank = data.draw(st.integers(0, min(rows, columns)))
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator().manual_seed(seed)
        left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=dtype)).Q[:, :rank]
        right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=dtype)).Q[:, :rank]
        assert lowrank.numerical_rank(left @ right.T) == rank
        assert lowrank.numerical_rank(1e-12 * left @ right.T) == rank


# --- randomised ----------------------------------------------------------------------------------------

k = torch.arange(1, 301, dtype=torch.float64)
SPECTRA = {
    "1/k": 1 / k,
    "0.9^k": 0.9**k,
    "flat with a rank-16 signal": torch.where(k <= 16, 4.0, 1.0).double(),
    "slow, k^-0.3": k**-0.3,
    "flat": torch.ones(300, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomized_error_is_within_two_percent_of_optimal_and_measured(name, rank, dtype):
    S = SPECTRA[name]
    for shape, seed in (((400, 300), 0), ((300, 500), 1)):
        matrix = with_spectrum(S, *shape, seed=seed).to(dtype)
        factors = lowrank.randomized_svd(matrix, rank)
        U, found, Vh = factors
        error = norm(matrix.double() - (U.double() * found.double()) @ Vh.double())
        optimal = float(S[rank:].square().sum().sqrt())
        assert error <= 1.02 * optimal + slack(matrix)
        assert factors.error == pytest.approx(error, rel=1e-3, abs=slack(matrix))
        assert factors.relative_error == pytest.approx(error / norm(matrix), rel=1e-3, abs=1e-4)
        assert U.dtype == dtype and norm(U.T @ U - torch.eye(rank, dtype=dtype)) < 1e-4


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_randomized_rank_grows_until_it_holds_the_share(name, share):
    S = SPECTRA[name]
    matrix = with_spectrum(S, 400, 300)
    factors = lowrank.randomized_svd(matrix, share=share)
    needed = lowrank.rank_for_energy(S, share)
    assert needed <= len(factors.S) <= needed + 1 + needed // 50
    assert 1 - factors.relative_error**2 >= share - 1e-9


def test_power_iterations_follow_the_spectrum():
    iterations = {
        name: lowrank.randomized_svd(with_spectrum(S, 300, 300), 16).power_iterations
        for name, S in SPECTRA.items()
    }
    assert iterations["flat"] < iterations["1/k"] <= iterations["slow, k^-0.3"]
    fixed = lowrank.randomized_svd(with_spectrum(SPECTRA["1/k"], 300, 300), 16, power_iterations=0)
    assert fixed.power_iterations == 0 and fixed.error > 1.02 * float(
        SPECTRA["1/k"][16:].square().sum().sqrt()
    )


@few
@given(sides, sides, st.integers(0, 5), seeds, st.sampled_from(DTYPES), st.data())
def test_randomized_is_right_for_small_deficient_and_half_precision_matrices(
    rows, columns, true, seed, dtype, data
):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = random_matrix(rows, columns, seed, true, dtype)
    U, S, Vh = lowrank.randomized_svd(
        matrix, rank, oversampling=data.draw(st.sampled_from([5, 10])), seed=seed
    )
    best = lowrank.truncate(matrix, rank)
    assert U.shape == (rows, rank) and Vh.shape == (rank, columns)
    # The sketch is wider than the true rank is high, so it misses nothing but half precision's rounding.
    excess = norm(matrix.double() - ((U * S) @ Vh).double()) - 1.02 * norm(matrix.double() - best.double())
    assert excess <= 20 * slack(matrix)


def test_randomized_handles_zero_and_extreme_scales():
    zero = lowrank.randomized_svd(torch.zeros(200, 150), 4)
    assert zero.error == zero.relative_error == 0 and zero.S.abs().max() == 0
    assert len(lowrank.randomized_svd(torch.zeros(200, 150), share=0.9).S) == 0
    base = with_spectrum(SPECTRA["1/k"], 320, 300).float()
    plain = lowrank.randomized_svd(base, 8)
    for scale in (1e-30, 1e30):
        scaled = lowrank.randomized_svd(base * scale, 8)
        assert torch.allclose(scaled.S / scale, plain.S, rtol=1e-4)
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3)


def test_randomized_is_repeatable_and_leaves_the_global_random_state_alone():
    matrix = random_matrix(200, 180)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = lowrank.randomized_svd(matrix, 5), lowrank.randomized_svd(matrix, 5)
    assert torch.equal(first.S, second.S) and torch.equal(torch.rand(3), expected)
    assert not torch.equal(lowrank.randomized_svd(matrix, 5, seed=1).U, first.U)


def test_randomized_on_the_update_of_a_tuned_model():
    update = load_checkpoint("reference_seed_0")
    matrices = {name: delta for name, delta in update.items() if delta.ndim == 2}
    assert len(matrices) >= 26  # embedding, head, and six in each of four blocks
    for name, delta in matrices.items():
        S = torch.linalg.svdvals(delta.double())
        for rank in (1, 8, 16, 32):
            found = lowrank.randomized_svd(delta, rank).error
            assert found <= 1.02 * float(S[rank:].square().sum().sqrt()), (name, rank)


# --- subspaces -----------------------------------------------------------------------------------------


@few
@given(st.integers(1, 6), st.integers(1, 6), st.integers(12, 20), seeds)
def test_subspace_similarity_is_equation_4(i, j, dimension, seed):
    A, B = random_matrix(6, dimension, seed), random_matrix(7, dimension, seed + 1)
    V_A, V_B = torch.linalg.svd(A).Vh[:i].T, torch.linalg.svd(B).Vh[:j].T
    expected = norm(V_A.T @ V_B) ** 2 / min(i, j)
    assert lowrank.subspace_similarity(A, B, i, j) == pytest.approx(expected)
    assert lowrank.subspace_similarity(A.T, B.T, i, j, side="left") == pytest.approx(expected)
    assert lowrank.subspace_similarity(B, A, j, i) == pytest.approx(expected)
    assert float(lowrank.similarity_grid(A, B, 6, 6)[i - 1, j - 1]) == pytest.approx(expected)
    mixing = torch.linalg.qr(random_matrix(6, 6, seed + 2)).Q
    assert lowrank.subspace_similarity(A, mixing @ A, i, i) == pytest.approx(1)


@pytest.mark.parametrize("i, j, dimension", [(1, 1, 20), (4, 16, 50), (8, 64, 100)])
def test_chance_similarity_is_the_mean_over_random_subspaces(i, j, dimension):
    draws = [
        lowrank.subspace_similarity(
            random_matrix(i, dimension, 2 * s), random_matrix(j, dimension, 2 * s + 1), i, j
        )
        for s in range(200)
    ]
    error = 4 * np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - lowrank.chance_similarity(i, j, dimension)) < error


def test_amplification_factor_of_a_known_case():
    # ΔW is 5 times W in the direction it shares with W, and W has nothing in ΔW's second direction.
    weight, delta = torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.diag(torch.tensor([10.0, 0.0, 4.0]))
    assert lowrank.amplification_factor(delta, weight, 1) == pytest.approx(5)
    assert lowrank.amplification_factor(delta, weight, 2) == pytest.approx(math.sqrt(116) / 2)
    assert lowrank.amplification_factor(torch.diag(torch.tensor([0.0, 0.0, 4.0])), weight, 1) == math.inf


@few
@given(st.integers(1, 5), seeds)
def test_amplification_factor_truncates_the_numerator(rank, seed):
    delta, weight = random_matrix(8, 6, seed), random_matrix(8, 6, seed + 1)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    expected = float(S[:rank].norm()) / norm(U[:, :rank].T @ weight @ Vh[:rank].T)
    assert lowrank.amplification_factor(delta, weight, rank) == pytest.approx(expected)
    truncated = lowrank.truncate(delta, rank)
    assert lowrank.amplification_factor(truncated, weight, rank) == pytest.approx(expected)


# --- two models ----------------------------------------------------------------------------------------


def test_deltas_of_two_state_dicts():
    before = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2), "positions": torch.arange(4)}
    after = {
        "w": torch.full((2, 3), 1.5),
        "b": torch.ones(2, dtype=torch.float64),
        "positions": torch.arange(4),
    }
    found = lowrank.deltas(before, after)
    assert (
        list(found) == ["w", "b"] and found["w"].dtype == torch.float32 and found["b"].dtype == torch.float64
    )
    assert torch.equal(found["w"], torch.full((2, 3), 0.5))
    assert list(lowrank.deltas(before, after, matrices_only=True)) == ["w"]


def test_deltas_name_what_does_not_match():
    before = {"embedding.weight": torch.ones(5, 2), "old.weight": torch.ones(1), "same": torch.ones(1)}
    after = {"embedding.weight": torch.ones(6, 2), "new.weight": torch.ones(1), "same": torch.ones(1)}
    with pytest.raises(ValueError) as problem:
        lowrank.deltas(before, after)
    message = str(problem.value)
    assert "only in before: old.weight" in message and "only in after: new.weight" in message
    assert "embedding.weight (5, 2) → (6, 2)" in message and "same" not in message.replace("the same", "")


# --- noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns, sigma", [(300, 300, 1.0), (800, 200, 0.02), (150, 900, 3.0)])
def test_noise_follows_marchenko_and_pastur_up_to_its_edge(rows, columns, sigma):
    S = torch.linalg.svdvals(random_matrix(rows, columns) * sigma)
    edge = lowrank.random_matrix_edge(rows, columns, sigma)
    assert float(S[0]) == pytest.approx(edge, rel=0.03)
    grid = torch.linspace(0, edge * 1.1, 4001, dtype=torch.float64)
    density = lowrank.marchenko_pastur(grid, rows, columns, sigma)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=2e-3)
    for share in (0.25, 0.5, 0.75):
        place = float(torch.quantile(S, share))
        below = grid <= place
        assert float(torch.trapezoid(density[below], grid[below])) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("rows, columns", [(300, 300), (400, 100)])
def test_the_denoising_threshold_is_where_keeping_begins_to_pay(rows, columns):
    threshold = lowrank.denoising_threshold(rows, columns)
    assert threshold > lowrank.random_matrix_edge(rows, columns)
    if rows == columns:
        assert threshold == pytest.approx(4 / math.sqrt(3) * math.sqrt(rows))
    gains = []
    for factor in (0.8, 1.2):  # a signal that shows up below, then above the threshold
        u, v = (torch.nn.functional.normalize(random_matrix(side, 1, 7), dim=0) for side in (rows, columns))
        signal = factor * threshold * 0.8 * u @ v.T
        noisy = signal + random_matrix(rows, columns, 1)
        gains.append(norm(signal) ** 2 - norm(signal - lowrank.truncate(noisy, 1)) ** 2)
    assert gains[0] < 0 < gains[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (1000, 100)])
def test_the_rounding_floor_is_the_spectrum_of_real_rounding_and_finds_the_planted_rank(dtype, shape):
    weight = random_matrix(*shape) * 0.02
    planted = random_matrix(*shape, seed=1, rank=8)
    planted *= 0.01 * norm(weight) / norm(planted)
    both = (weight + planted).to(dtype).double() - weight.to(dtype).double()
    base = weight.to(dtype).double()
    one = (base + planted).to(dtype).double() - base
    for found, roundings in ((both, 2), (one, 1)):
        floor = lowrank.rounding_floor(weight, dtype, roundings)
        noise = torch.linalg.svdvals(found - planted)
        assert float(noise[0]) == pytest.approx(float(floor[0]), rel=0.05)
        assert float(noise.median()) == pytest.approx(float(floor.median()), rel=0.05)
        assert lowrank.numerical_rank(found) == min(shape)
        assert lowrank.numerical_rank(found, tolerance=1.05 * float(floor[0])) == 8


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.floats(2**-13, 60_000.0),
    st.booleans(),
)
def test_the_rounding_step_is_the_distance_to_the_next_number(dtype, size, negative):
    value = torch.tensor([-size if negative else size]).to(dtype)
    away = torch.nextafter(value, torch.full_like(value, math.copysign(math.inf, value)))
    step = (away.double() - value.double()).abs()
    for values in (value.float(), value.double()):
        assert lowrank.rounding_step(values, dtype).double() == step


def test_the_rounding_floor_of_a_zero_weight_is_next_to_nothing():
    assert float(lowrank.rounding_floor(torch.zeros(6, 4), torch.bfloat16)[0]) < 1e-38


# --- bad input -----------------------------------------------------------------------------------------

one = torch.ones(4, 3)
BAD = {
    "three axes": (lambda: lowrank.svd(torch.ones(2, 2, 2)), "two axes.*\\(2, 2, 2\\)"),
    "empty": (lambda: lowrank.svd(torch.ones(0, 5)), "at least one row and one column; got 0 × 5"),
    "NaN": (
        lambda: lowrank.svd(torch.tensor([[1.0, 2.0], [3.0, math.nan]])),
        "finite; 1 of its 4.*\\[1, 1\\]",
    ),
    "infinite": (lambda: lowrank.randomized_svd(one.half() * math.inf, 1), "12 of its 12 entries"),
    "complex": (lambda: lowrank.svd(one.to(torch.complex64)), "real numbers; got torch.complex64"),
    "rank above": (
        lambda: lowrank.truncate(one, 4),
        "between 1 and 3 .the smaller side of the 4 × 3 matrix.; got 4",
    ),
    "rank zero": (lambda: lowrank.randomized_svd(one, 0), "between 1 and 3"),
    "no rank": (lambda: lowrank.randomized_svd(one), "either rank .* or share"),
    "both": (lambda: lowrank.randomized_svd(one, 1, share=0.5), "either rank .* or share"),
    "oversampling": (
        lambda: lowrank.randomized_svd(one, 1, oversampling=-1),
        "oversampling must be 0 or more",
    ),
    "iterations": (
        lambda: lowrank.randomized_svd(one, 1, power_iterations=-1),
        "power_iterations must be 0 or more",
    ),
    "share 90": (lambda: lowrank.rank_for_energy(torch.ones(3), 90), "above 0 and at most 1 .*; got 90"),
    "share 0": (lambda: lowrank.randomized_svd(one, share=0.0), "above 0 and at most 1"),
    "negative": (lambda: lowrank.energy(torch.tensor([2.0, -1.0])), "not negative; got 2.0, -1.0"),
    "rising": (lambda: lowrank.energy(torch.tensor([1.0, 2.0])), "largest first: sort"),
    "no values": (lambda: lowrank.stable_rank(torch.ones(0)), "at least one of them"),
    "widths": (
        lambda: lowrank.subspace_similarity(torch.eye(3), torch.eye(4), 1, 1),
        "as many columns.*3 × 3 and 4 × 4",
    ),
    "i too large": (
        lambda: lowrank.subspace_similarity(torch.eye(3), torch.eye(3), 4, 1),
        "i must be between 1 and 3",
    ),
    "deficient": (
        lambda: lowrank.subspace_similarity(torch.eye(3), torch.ones(3, 3), 1, 2),
        "B has rank 1.*j ≤ 1, not 2",
    ),
    "no such side": (lambda: lowrank.subspace_similarity(one, one, 1, 1, side="top"), 'side must be "right"'),
    "chance": (lambda: lowrank.chance_similarity(8, 64, 32), "j must be between 1 and 32"),
    "no delta": (lambda: lowrank.amplification_factor(0 * one, one, 1), "delta is zero"),
    "low delta": (lambda: lowrank.amplification_factor(one, one, 2), "delta has rank 1.*rank ≤ 1, not 2"),
    "unlike": (lambda: lowrank.amplification_factor(one, one.T, 1), "4 × 3 and 3 × 4"),
    "tolerance": (lambda: lowrank.numerical_rank(one, -1.0), "tolerance must be 0 or more"),
    "sigma": (lambda: lowrank.random_matrix_edge(3, 3, 0.0), "sigma must be above 0"),
    "no rows": (lambda: lowrank.denoising_threshold(0, 3), "at least one row"),
    "integer format": (lambda: lowrank.rounding_floor(one, torch.int8), "floating-point format"),
    "too large for it": (lambda: lowrank.rounding_floor(one * 1e6, torch.float16), "within ±65504"),
    "roundings": (lambda: lowrank.rounding_floor(one, torch.float16, 0), "roundings must be 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_the_rule(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rank_that_is_no_whole_number():
    with pytest.raises(ValueError, match=r"rank must be a whole number; got 2\.5"):
        lowrank.truncate(one, 2.5)


# --- CUDA ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_what_the_cpu_gives(dtype):
    matrix = with_spectrum(SPECTRA["1/k"], 400, 300).to(dtype)
    there = matrix.cuda()
    U, S, _ = lowrank.svd(there)
    assert U.is_cuda and torch.allclose(S.cpu(), lowrank.svd(matrix).S, rtol=1e-3, atol=1e-4)
    assert torch.allclose(lowrank.truncate(there, 5).cpu(), lowrank.truncate(matrix, 5), atol=1e-4)
    ours, theirs = lowrank.randomized_svd(there, 8), lowrank.randomized_svd(matrix, 8)
    assert ours.U.is_cuda and ours.error == pytest.approx(theirs.error, rel=1e-2)
    assert len(lowrank.randomized_svd(there, share=0.9).S) == len(lowrank.randomized_svd(matrix, share=0.9).S)
    assert lowrank.rank_for_energy(there, 0.9) == lowrank.rank_for_energy(matrix, 0.9)
    assert lowrank.subspace_similarity(there, there, 3, 5) == pytest.approx(1, abs=1e-4)
    assert lowrank.amplification_factor(there, there, 4) == pytest.approx(1, abs=1e-4)
    floors = [lowrank.rounding_floor(m, torch.bfloat16)[0].item() for m in (there, matrix)]
    assert floors[0] == pytest.approx(floors[1], rel=1e-3)
    assert list(lowrank.deltas({"w": matrix}, {"w": there})) == ["w"]
