"""The figures of one ΔW beside dense float64 computations, and the marks on what rounding could have made."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lora_edu import lowrank
from lora_edu.delta import files, measure

ALL = ("relative_norm", "stable_rank", "effective_rank", "rank_50", "rank_90", "rank_99")
FORMATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROOM = 2**40


def fuzz(examples: int) -> settings:
    """Every example overwrites the two files in the test's folder."""
    quiet = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet)


def random_matrix(rows: int, columns: int, seed: int = 0, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return draw(rows, columns) if rank is None else draw(rows, rank) @ draw(rank, columns)


def planted(rows: int, columns: int, relative: float, weight: Tensor, rank: int = 8, seed: int = 1) -> Tensor:
    update = random_matrix(rows, columns, seed, rank)
    return update * (relative * weight.norm() / update.norm())


def store(path, before: Tensor, after: Tensor) -> tuple[files.Stored, files.Stored]:
    path.mkdir(exist_ok=True)
    found = []
    for name, tensor in (("before", before), ("after", after)):
        save_file({"w": tensor.contiguous()}, path / f"{name}.safetensors")
        found.append(files.read_header(path / f"{name}.safetensors")["w"])
    return tuple(found)


def figures(path, before: Tensor, after: Tensor, exact: bool = False, room: int = ROOM) -> measure.Figures:
    return measure.measure(*store(path, before, after), exact, room)


def check_against_dense(found: measure.Figures, delta: Tensor, weight: Tensor) -> None:
    """Everything from one float64 SVD; a rank may differ only where the energy is at its threshold."""
    S = torch.linalg.svdvals(delta.flatten(1).double())
    shares = S.square().cumsum(0) / S.square().sum()
    assert found.delta_norm == pytest.approx(float(S.norm()), rel=1e-6)
    assert found.relative_norm == pytest.approx(float(S.norm() / weight.double().norm()), rel=1e-6)
    assert found.stable_rank == pytest.approx(float((S / S[0]).square().sum()), rel=1e-4)
    assert found.effective_rank == pytest.approx(lowrank.effective_rank(S), rel=measure.ENTROPY_ERROR)
    for share, rank in ((0.5, found.rank_50), (0.9, found.rank_90), (0.99, found.rank_99)):
        assert shares[rank - 1] >= share - 1e-5
        assert rank == 1 or shares[rank - 2] <= share + 1e-5


# --- against dense computations -----------------------------------------------------------------------------


@fuzz(60)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    rank=st.none() | st.integers(1, 5),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    room=st.sampled_from([0, ROOM]),
    seed=st.integers(0, 1000),
)
def test_every_figure_is_that_of_a_dense_float64_svd(tmp_path, shape, formats, rank, size, room, seed):
    weight = random_matrix(*shape, seed)
    update = random_matrix(*shape, seed + 1, rank and min(rank, *shape))
    before, after = (size * weight).to(formats[0]), (size * (weight + update)).to(formats[1])
    found = figures(tmp_path, before, after, room=room)
    assert found.shape == shape
    if before.double().equal(after.double()):  # the change was too small for the format
        assert found.status == "equal"
        return
    check_against_dense(found, after.double() - before.double(), before)


@pytest.mark.parametrize("shape", [(400, 400), (900, 300), (300, 900), (3000, 100)])
@pytest.mark.parametrize("rank", [1, 8, 30, None])
def test_both_ways_to_a_spectrum_agree_with_a_dense_one(tmp_path, shape, rank):
    """A head from a sketch where the rest is nothing, the whole spectrum where it is not, on tall and wide alike."""
    weight = random_matrix(*shape).float()
    update = random_matrix(*shape, seed=1, rank=rank).float() * 0.1
    after = weight + update
    found = figures(tmp_path, weight, after)
    check_against_dense(found, after.double() - weight.double(), weight)
    fits = rank is not None and rank <= min(shape) // 16
    assert found.method == ("head" if fits else "full")
    assert rank is None or found.above == rank


@pytest.mark.parametrize(("rows", "columns", "power"), [(600, 560, 0.0), (520, 1300, 0.1), (560, 560, 1.0)])
def test_a_large_flat_spectrum_is_that_of_float64(tmp_path, rows, columns, power, monkeypatch):
    """In float32 where that is sharp enough, else not: either way the figures are those of a dense SVD."""
    weight = random_matrix(rows, columns).float()
    U, S, Vh = torch.linalg.svd(random_matrix(rows, columns, 1), full_matrices=False)
    delta = ((U * S * torch.arange(1.0, len(S) + 1) ** -power) @ Vh).float()
    asked = []
    gram = measure._gram
    monkeypatch.setattr(measure, "_gram", lambda tall, dtype: asked.append(dtype) or gram(tall, dtype))
    after = weight + delta
    found = figures(tmp_path, weight, after)
    check_against_dense(found, after.double() - weight.double(), weight)
    assert asked == ([torch.float32] if power < 1 else [torch.float64]), asked


@fuzz(60)
@given(data=st.data())
def test_the_bound_on_the_edge_is_one(tmp_path, data):
    """Whatever stands out, the edge that spares a pass is not below the one that takes it."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    before = torch.randn(rows, columns, generator=generator) ** data.draw(st.sampled_from([1, 3, 7]))
    dtype = data.draw(st.sampled_from(FORMATS))
    after = (before * (1 + torch.rand(rows, columns, generator=generator))).to(dtype)
    pair = store(tmp_path, before.to(dtype), after)
    exact = data.draw(st.booleans())
    tight, loose = (measure.norms(*pair, exact, each)[0].edge for each in (True, False))
    assert (tight is None) == (loose is None) and (tight is None or loose >= tight * (1 - 1e-12))


def test_a_spectrum_that_falls_slowly_is_never_cut_to_its_head(tmp_path):
    """1/k and 0.97^k: most of the energy is in the head, but the effective rank is not."""
    U, V = (torch.linalg.qr(random_matrix(400, 400, seed)).Q for seed in (1, 2))
    k = torch.arange(1, 401, dtype=torch.float64)
    for S in (1 / k, 1 / k**2, 0.97**k):
        after = ((U * S) @ V.T).float()
        found = figures(tmp_path, torch.zeros_like(after), after)
        S_stored = torch.linalg.svdvals(after.double())
        assert found.effective_rank == pytest.approx(lowrank.effective_rank(S_stored), rel=0.01)
        assert found.rank_99 == lowrank.rank_for_energy(S_stored, 0.99)


def test_known_singular_values_come_out(tmp_path):
    U, V = (torch.linalg.qr(random_matrix(side, 8, side)).Q for side in (300, 200))
    S = torch.tensor([8.0, 4, 4, 2, 1, 1, 1, 1], dtype=torch.float64)
    weight = torch.zeros(300, 200, dtype=torch.float64)
    weight[0, 0] = 100.0
    found = figures(tmp_path, weight, weight + (U * S) @ V.T)
    assert found.relative_norm == pytest.approx(math.sqrt(104) / 100)
    assert found.stable_rank == pytest.approx(104 / 64)
    assert (found.rank_50, found.rank_90, found.rank_99, found.above) == (1, 3, 7, 8)  # 64, 96, 103 of 104
    p = S / S.sum()
    assert found.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=0.01)


@pytest.mark.parametrize("size", [1e-310, 1e-150, 1e-42, 1e-30, 1e30, 1e140])
def test_very_large_and_very_small_entries(tmp_path, size):
    dtype = torch.float64 if not 1e-43 < size < 1e38 else torch.float32
    update = torch.zeros(40, 30, dtype=torch.float64)
    update[0, 0], update[1, 1] = 4, 3
    found = figures(tmp_path, torch.zeros(40, 30, dtype=dtype), (size * update).to(dtype))
    assert found.stable_rank == pytest.approx(25 / 16, rel=0.01)
    assert (found.rank_50, found.rank_90) == (1, 2)
    assert found.relative_norm is None, "W is zero"


def test_a_block_at_a_time_is_the_same_as_all_at_once(tmp_path, monkeypatch):
    weight = random_matrix(123, 45).float()
    pair = weight, weight + 0.01 * random_matrix(123, 45, 1).float()
    whole = figures(tmp_path, *pair)
    monkeypatch.setattr(files, "BLOCK", 100)
    monkeypatch.setattr(measure, "BLOCK", 100)
    parts = figures(tmp_path, *pair)
    for name in ("delta_norm", "floor", "edge", "effective_rank", "stable_rank"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert parts.rank_90 == whole.rank_90


def test_vectors_scalars_and_tensors_of_four_axes(tmp_path):
    vector = random_matrix(1, 50)[0].float()
    found = figures(tmp_path, vector, vector * 1.5)
    assert found.relative_norm == pytest.approx(0.5) and found.rank_90 is None and found.shape == (50,)
    assert figures(tmp_path, torch.tensor(2.0), torch.tensor(3.0)).relative_norm == pytest.approx(0.5)
    before, update = random_matrix(24, 60).reshape(24, 5, 3, 4), random_matrix(24, 60, 1, rank=2)
    found = figures(tmp_path, before.float(), (before + update.reshape(24, 5, 3, 4)).float())
    assert found.rank_99 == 2 and found.above == 2 and found.shape == (24, 5, 3, 4)
    before, after = before[None, None], before[None, None] + update.reshape(1, 1, 24, 5, 3, 4)
    again = figures(tmp_path, before.float(), after.float())
    assert again.sides == found.sides == (24, 60) and again.stable_rank == pytest.approx(found.stable_rank)


def test_equal_tensors_and_entries_that_are_not_finite(tmp_path):
    weight = random_matrix(20, 10).float()
    found = figures(tmp_path, weight, weight)
    assert (
        found.status == "equal" and found.delta_norm == 0 and found.rank_90 is None and found.unchanged == 1
    )
    broken = weight.clone()
    broken[3, 4], broken[0, 0] = math.nan, math.inf
    for pair, where in (((weight, broken), "2 in AFTER"), ((broken, weight), "2 in BEFORE")):
        found = figures(tmp_path, *pair)
        assert found.status == "not finite" and found.note.endswith(where) and found.delta_norm is None


# --- the rounding floor -------------------------------------------------------------------------------------

WEIGHTS = {
    "alike": lambda rows, columns, seed: random_matrix(rows, columns, seed) * 0.02,
    "rows of many sizes": lambda rows, columns, seed: (
        random_matrix(rows, columns, seed) * torch.exp(1.5 * random_matrix(rows, 1, seed + 9))
    ),
    "one loud column": lambda rows, columns, seed: (
        random_matrix(rows, columns, seed) * torch.cat([torch.ones(columns - 1), torch.tensor([50.0])])
    ),
    "heavy tails": lambda rows, columns, seed: 0.02 * random_matrix(rows, columns, seed) ** 3,
}


@fuzz(40)
@given(
    weight=st.sampled_from(sorted(WEIGHTS)),
    shape=st.sampled_from([(120, 120), (300, 60), (60, 300), (400, 200)]),
    formats=st.sampled_from(
        [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float64),
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.float32, torch.float32),
        ]
    ),
    seed=st.integers(0, 10_000),
)
@example(  # a few large rows make most of the norm, by chance less than they do on average
    weight="rows of many sizes", shape=(300, 60), formats=(torch.bfloat16, torch.float32), seed=500
)
@example(  # by chance 10 % more than on average
    weight="rows of many sizes", shape=(60, 300), formats=(torch.float32, torch.bfloat16), seed=1221
)
@example(  # one large entry changed by a whole step, five times what it does on average
    weight="heavy tails", shape=(120, 120), formats=(torch.bfloat16, torch.bfloat16), seed=1433
)
@example(  # two of them in one row
    weight="heavy tails", shape=(120, 120), formats=(torch.float16, torch.float16), seed=1164
)
def test_a_pair_that_differs_by_rounding_alone_is_marked_in_every_figure(
    tmp_path, weight, shape, formats, seed
):
    """Two formats of one matrix; or one format, and noise far below its step that makes some entries flip."""
    W = WEIGHTS[weight](*shape, seed)
    step = lowrank.rounding_step(W.float(), formats[1]).double()
    nudge = 0.05 * step * random_matrix(*shape, seed + 1) if formats[0] == formats[1] else 0
    found = figures(tmp_path, W.to(formats[0]), (W + nudge).to(formats[1]))
    assert found.status == "floor"
    assert set(found.marked) == set(ALL)
    assert found.above == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_dominating_entries_are_not_counted_as_a_change(tmp_path, dtype):
    """Cubes of Gaussians; by its rows and columns alone 16 of these 300 pairs had a change "above rounding"."""
    counted = []
    for seed in range(1200, 1350):
        W = WEIGHTS["heavy tails"](120, 120, seed)
        step = lowrank.rounding_step(W.float(), dtype).double()
        found = figures(
            tmp_path, W.to(dtype), (W + 0.05 * step * random_matrix(120, 120, seed + 1)).to(dtype)
        )
        if found.above or set(found.marked) != set(ALL):
            counted.append(seed)
    assert counted == []


def edge_of(tmp_path, step: Tensor, exact: bool = False) -> float:
    """The edge for weights that lie in the middle of their binade, so that their bfloat16 step is `step`."""
    W = step * 2.0**7 * 1.5
    after = torch.where(torch.arange(W.numel()).reshape(W.shape) == 0, W + step, W)  # something changed
    return figures(tmp_path, W.bfloat16(), after.bfloat16(), exact).edge / measure.ALLOWANCE


def test_the_edge_of_one_entry_a_pair_of_them_and_of_all_alike(tmp_path):
    """By hand: each entry is off by a step at most, by 1/√6 of it in the mean square (two roundings)."""
    quiet, n = torch.full((80, 80), 2.0**-20, dtype=torch.float64), 80
    alike = edge_of(tmp_path, quiet)
    assert alike == pytest.approx(2 * math.sqrt(n / 6) * 2.0**-20)
    one = quiet.clone()
    one[3, 5] = 1.0
    assert edge_of(tmp_path, one) == pytest.approx(1.0, rel=1e-3), "the one entry, off by its whole step"
    assert edge_of(tmp_path, one, exact=True) == pytest.approx(4 / 3 * 2 / math.sqrt(12), rel=1e-3)
    for place, edge in (((3, 60), math.sqrt(2)), ((70, 5), math.sqrt(2)), ((70, 60), 1.0)):
        two = one.clone()
        two[place] = 1.0
        assert edge_of(tmp_path, two) == pytest.approx(edge, rel=1e-3), "in one row or column they add up"
    louder = quiet.clone()
    louder[3, 5] = 4 * 2.0**-20  # 16 is more than √(RC) = 79/6: a singular value of its own, but hardly
    R, h = (n - 1) / 6, 4.0
    assert edge_of(tmp_path, louder) >= (h * h + R) / h * 2.0**-20
    hidden = quiet.clone()
    hidden[3, 5] = 2 * 2.0**-20  # 4 + 1 is less than that: in the crowd, only its row and column count
    assert edge_of(tmp_path, hidden) == pytest.approx(2 * math.sqrt((n - 1 + 4) / 6) * 2.0**-20)


def test_what_the_edge_of_a_loud_entry_costs_in_power(tmp_path):
    """A planted rank 8 of 0.6 % is still found where the largest entries are 15 times the average (Gaussians cubed)."""
    found = []
    for seed in range(6):
        W = WEIGHTS["heavy tails"](120, 120, seed)
        after = W + planted(120, 120, 0.006, W, seed=seed + 77)
        found.append(figures(tmp_path, W.bfloat16(), after.bfloat16()).above)
    assert sum(found) >= 45 and max(found) == 8


@fuzz(25)
@given(
    weight=st.sampled_from(sorted(WEIGHTS)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_the_floor_is_the_noise_that_rounding_makes_and_the_edge_its_largest_singular_value(
    tmp_path, weight, dtype, seed
):
    """Norm within 5 %, or 30 % where few entries make most of it; the edge above the truth, and below 2.3 times it.

    Where few entries make most of it, they are seldom as far off as they can be: a whole step, with two roundings.
    """
    W = WEIGHTS[weight](250, 150, seed)
    update = 3 * lowrank.rounding_step(W.float(), dtype).double() * random_matrix(250, 150, seed + 1)
    before, after = W.to(dtype), (W + update).to(dtype)
    noise = after.double() - before.double() - update
    found = figures(tmp_path, before, after)
    top = float(torch.linalg.svdvals(noise)[0])
    assert found.floor == pytest.approx(float(noise.norm()), rel=0.05 if weight == "alike" else 0.3)
    possible = float(lowrank.rounding_step(W.float(), dtype).max()) if weight == "heavy tails" else 0.0
    assert top < found.edge < 2.3 * max(top, possible)


@pytest.mark.parametrize("relative", [0.01, 0.003, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_planted_rank_8_is_found_above_the_floor_in_every_format(tmp_path, dtype, relative):
    """512 × 512. In bfloat16 the rank for 90 % reads 8, then about 160, then about 230: marked, and 8 above it."""
    W = random_matrix(512, 512) * 0.02
    found = figures(tmp_path, W.to(dtype), (W + planted(512, 512, relative, W)).to(dtype))
    assert found.above == 8
    if dtype == torch.float32:
        assert found.rank_90 <= 8 and found.rank_99 == 8 and not found.marked
        assert found.effective_rank == pytest.approx(8, abs=0.3)
    else:
        assert "effective_rank" in found.marked and found.effective_rank > 10
    if dtype == torch.float16 or relative == 0.01:
        assert found.rank_90 <= 8 and "rank_90" not in found.marked and "relative_norm" not in found.marked
        assert found.relative_norm == pytest.approx(relative, rel=0.05)
    elif dtype == torch.bfloat16:
        assert found.rank_90 > 80 and {"rank_90", "rank_99", "relative_norm"} <= set(found.marked)
        assert (found.status == "floor") == (relative == 0.001)


def test_an_update_of_full_rank_well_above_the_floor_is_not_marked(tmp_path):
    W = random_matrix(300, 100) * 0.02
    found = figures(tmp_path, W.bfloat16(), (W + 0.1 * 0.02 * random_matrix(300, 100, 1)).bfloat16())
    assert found.status == "measured" and found.marked == () and found.above == 100


def test_half_precision_in_a_float32_file_counts_as_what_it_is(tmp_path):
    W = random_matrix(200, 100) * 0.02
    after = W + planted(200, 100, 0.003, W)
    as_stored = figures(tmp_path, W.bfloat16(), after.bfloat16())
    upcast = figures(tmp_path, W.bfloat16().float(), after.bfloat16().float())
    assert upcast.formats == ("BF16 in F32",) * 2 and as_stored.formats == ("BF16",) * 2
    assert upcast.floor == pytest.approx(as_stored.floor) and upcast.marked == as_stored.marked
    assert figures(tmp_path, W.half().double(), after.float()).formats == ("F16 in F64", "F32")
    assert figures(tmp_path, W.bfloat16().half(), after.half()).formats == ("BF16 in F16", "F16")


def test_tuning_from_the_stored_base_into_a_finer_format_is_recognised(tmp_path):
    """ΔW is smaller than the base's rounding, which would be in it in full had tuning started before that."""
    W = (random_matrix(200, 100) * 0.02).bfloat16()
    gentle = figures(tmp_path, W, W.float() + planted(200, 100, 1e-4, W.double()).float())
    assert gentle.roundings == "after" and gentle.rank_90 <= 8 and gentle.marked == ()
    master = random_matrix(200, 100) * 0.02
    other = figures(tmp_path, master.bfloat16(), (master + planted(200, 100, 1e-4, master)).float())
    assert other.roundings == "both" and other.status == "floor"


def test_before_exact_counts_one_rounding(tmp_path):
    W = (random_matrix(200, 100) * 0.02).bfloat16()
    update = planted(200, 100, 0.003, W.double())
    both = figures(tmp_path, W, W.float() + update.float())
    exact = figures(tmp_path, W, W.float() + update.float(), exact=True)
    assert both.roundings == "both" and exact.roundings == "after"
    assert exact.floor < both.floor / 1000 and exact.marked == () and "relative_norm" not in exact.marked


@fuzz(20)
@given(size=st.floats(0.05, 2.0), rank=st.sampled_from([1, 8, None]), seed=st.integers(0, 1000))
def test_one_rounding_of_an_exact_base_stays_below_the_edge(tmp_path, size, rank, seed):
    """What is rounded away may be ΔW itself, so it is no independent noise; both ways of counting cover it."""
    W = (random_matrix(200, 150, seed) * 0.02).bfloat16()
    update = random_matrix(200, 150, seed + 1, rank)
    update *= (
        size
        * lowrank.rounding_step(W.float(), torch.bfloat16).double().mean()
        / update.square().mean().sqrt()
    )
    after = (W.double() + update).bfloat16()
    for exact in (False, True):
        found = figures(tmp_path, W, after, exact)
        if found.status == "equal":
            continue
        lost = float(torch.linalg.svdvals(after.double() - W.double() - update)[0])
        assert found.edge > lost or lost <= float(torch.linalg.svdvals(update)[0]) * 1.0001
