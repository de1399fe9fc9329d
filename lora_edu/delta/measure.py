"""The figures of one ΔW = after − before, and which of them rounding could have made. No files' names, no printing.

A pair is read twice, a few rows at a time: once for norms and the rounding floor, once for ΔW itself in float32.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_edu import lowrank
from lora_edu.delta.files import BLOCK, FORMATS, Stored, blocks

ALLOWANCE = 1.05  # the largest singular value of a draw of noise lies within 5 % of the edge
BY_CHANCE = (
    5  # standard deviations: of 4500 pairs that differed by rounding alone one was 4.08 above its mean
)
ALONE = 4 / 3  # one rounding can be that much more than its average: what is rounded away is then ΔW itself
CHANGE = 0.1  # a figure is marked where rounding may have changed it by more than this share
ENTROPY_ERROR = 0.01  # what a sketch may leave uncertain of the effective rank
RESOLUTION = 4 * torch.finfo(torch.float32).eps  # singular values below that share of σ₁ are our own rounding
LARGE = 512  # smaller sides below that take no time worth saving
SHAKY = (
    64 * torch.finfo(torch.float32).eps
)  # float32's error in σ² over σ₁², four times what was ever measured
SHARES = (0.5, 0.9, 0.99)
MARKABLE = ("relative_norm", "stable_rank", "effective_rank", "rank_50", "rank_90", "rank_99")


class Figures(NamedTuple):
    """What is known of one ΔW. Norms are Frobenius; None is what could not be, or was not, computed.

    sides: the shape as a matrix (Stored.sides).
    status: "measured", "floor" (measured; rounding alone makes as large a norm), "equal" (ΔW is 0), "not finite".
    formats: in which the entries of before and after are precise, say "BF16 in F32" for upcast ones.
    floor: norm of what rounding puts into ΔW; edge: the largest singular value it could have. above: how
    many of ΔW's are larger. roundings: whose were counted, "both", "after" or "none".
    missing: why there is no ‖W‖, in a word. experts: how many matrices the figures are medians of.
    marked: the figures that rounding may have changed by more than a tenth.
    method: "full", "head" (a sketch that holds all but a negligible rest) or "factors" (of an adapter).
    spectrum: (k, σ_k, share of ‖ΔW‖² in the first k) at the ranks k of `rank_grid`; of experts, the widest one's.
    """

    status: str
    shape: tuple[int, ...]
    sides: tuple[int, int]
    formats: tuple[str, ...]
    weight_norm: float | None = None
    delta_norm: float | None = None
    unchanged: float | None = None
    floor: float | None = None
    edge: float | None = None
    roundings: str = "both"
    above: int | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    rank_50: int | None = None
    rank_90: int | None = None
    rank_99: int | None = None
    method: str | None = None
    marked: tuple[str, ...] = ()
    note: str = ""
    missing: str = ""
    experts: int | None = None
    spectrum: tuple[tuple[int, float, float], ...] = ()

    @property
    def relative_norm(self) -> float | None:
        return self._relative(self.delta_norm)

    @property
    def relative_floor(self) -> float | None:
        return self._relative(self.floor)

    def _relative(self, norm: float | None) -> float | None:
        return norm / self.weight_norm if norm is not None and self.weight_norm else None


class Spectrum(NamedTuple):
    """Singular values, largest first; those that are left out (of a head) have a negligible sum."""

    values: Tensor
    method: str


# --- two tensors on disk ------------------------------------------------------------------------------------


def measure(before: Stored, after: Stored, before_is_exact: bool, room: int) -> Figures:
    """The figures of two stored tensors of one shape; a spectrum only where they are matrices.

    before_is_exact: tuning started from `before` as it is stored, so that only `after` was rounded.
    room: bytes of memory that may be used, besides the fixed cost of a block of rows.
    """
    known, scale = norms(before, after, before_is_exact)
    if known.edge is None or len(before.shape) < 2:
        return known
    found = _spectrum(lambda: difference(before, after, scale), before.sides, known.edge * scale, room)
    return _with_ranks(known, found, known.edge * scale)._replace(
        marked=known.marked + _marked(found.values, known.edge * scale),
        spectrum=_thinned(found.values, scale),
    )


def norms(
    before: Stored, after: Stored, before_is_exact: bool = False, tight: bool = True
) -> tuple[Figures, float]:
    """(the figures of two stored tensors that need no spectrum, a power of two that brings ΔW's entries to size 1).

    edge: None where ΔW is zero or not finite, so that there is no spectrum. Unless `tight`, it is only a bound from
    above, which spares another pass over both files.
    """
    grids = [precise_format(each) for each in (before, after)]
    formats = tuple(_called(each, grid) for each, grid in zip((before, after), grids, strict=True))
    dtypes = [FORMATS[grid] for grid in grids]
    scan = _scan(before, after, dtypes)
    known = Figures("measured", before.shape, before.sides, formats)
    if not math.isfinite(scan.weight + scan.delta):
        where = [
            f"{count} in {name}" for name, count in zip(("BEFORE", "AFTER"), scan.bad, strict=True) if count
        ]
        note = f"NaN or infinite: {', '.join(where) or 'its norm'}"
        return known._replace(status="not finite", note=note), 1.0
    known = known._replace(
        weight_norm=scan.weight, delta_norm=scan.delta, unchanged=1 - scan.changed / max(before.size, 1)
    )
    if not scan.changed:
        return known._replace(status="equal", floor=None), 1.0
    noise = _noise(scan, before_is_exact)
    floor, edge = noise.floor, ALLOWANCE * _largest_singular_value(noise, before, after, dtypes, tight)
    known = known._replace(floor=floor, edge=edge, roundings=noise.roundings)
    by_chance = max((ALLOWANCE * floor) ** 2, floor**2 + BY_CHANCE * noise.spread)
    marked = ("relative_norm",) if by_chance > (1 - (1 - CHANGE) ** 2) * scan.delta**2 else ()
    if scan.delta**2 <= by_chance:
        known = known._replace(status="floor")
    return known._replace(marked=marked), 2.0 ** min(-math.frexp(scan.largest)[1], 1000)


def precise_format(stored: Stored) -> str:
    """The format whose numbers the entries are: bfloat16 in a float32 file is as coarse as before it was upcast."""
    coarser = {"F64": ("BF16", "F16", "F32"), "F32": ("BF16", "F16"), "F16": ("BF16",), "BF16": ()}
    left = {format: _spare_bits(stored.format) - _spare_bits(format) for format in coarser[stored.format]}
    if stored.size == 0 or not left:
        return stored.format
    integer = {"F64": torch.int64, "F32": torch.int32, "F16": torch.int16}[stored.format]
    normal = torch.finfo(FORMATS[stored.format]).smallest_normal
    for _, (block,) in blocks(stored):
        bits = block.view(integer)
        for format, width in list(left.items()):
            # numbers below the normal ones have fewer bits anyway
            if ((bits & (2**width - 1) != 0) & (block.abs() >= normal)).any():
                del left[format]
        if not left:
            return stored.format
    return next(iter(left))


def _spare_bits(format: str) -> int:
    """Bits of the fraction: 7 of bfloat16, 10 of float16, 23 of float32, 52 of float64."""
    return round(-math.log2(torch.finfo(FORMATS[format]).eps))


def _called(stored: Stored, grid: str) -> str:
    return grid if grid == stored.format else f"{grid} in {stored.format}"


class _Scan(NamedTuple):
    """Norms, and of each file its format's steps: their squares summed by row and by column, their fourth powers
    summed, and the largest."""

    weight: float
    delta: float
    largest: float
    changed: int
    bad: tuple[int, int]
    steps: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    fourths: tuple[float, float]
    largest_steps: tuple[float, float]


def _scan(before: Stored, after: Stored, grids: list[torch.dtype]) -> _Scan:
    rows, columns = before.sides
    dtype = _common(before, after)
    weight = delta = largest = 0.0
    changed, bad, fourths, highest = 0, [0, 0], [0.0, 0.0], [0.0, 0.0]
    by_row = [torch.zeros(rows, dtype=torch.float64) for _ in grids]
    by_column = [torch.zeros(columns, dtype=torch.float64) for _ in grids]
    for which, pair in blocks(before, after):
        old, new = (each.to(dtype) for each in pair)
        difference = new - old
        weight += _squared(old)
        delta += _squared(difference)
        changed += int(difference.count_nonzero())
        largest = max(largest, float(difference.abs().max()) if difference.numel() else 0.0)
        for index, (block, grid) in enumerate(zip((old, new), grids, strict=True)):
            if not math.isfinite(delta):
                bad[index] += block.numel() - int(block.isfinite().sum())
            squares = lowrank.rounding_step(block, grid).double().square_()
            by_row[index][which] += squares.sum(1)
            by_column[index] += squares.sum(0)
            fourths[index] += _squared(squares)
            highest[index] = max(highest[index], math.sqrt(float(squares.max())))
    return _Scan(
        math.sqrt(weight),
        math.sqrt(delta),
        largest,
        changed,
        tuple(bad),
        tuple(zip(by_row, by_column, strict=True)),
        tuple(fourths),
        tuple(highest),
    )


def _common(before: Stored, after: Stored) -> torch.dtype:
    return torch.float64 if "F64" in (before.format, after.format) else torch.float32


def _squared(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def difference(before: Stored, after: Stored, scale: float) -> Tensor:
    """scale · ΔW in float32. The scale brings its entries to size 1, so that no square is too large or small."""
    dtype = _common(before, after)
    delta = torch.empty(before.sides, dtype=torch.float32)
    for which, (old, new) in blocks(before, after):
        difference = new.to(dtype) - old.to(dtype)
        delta[which] = difference * scale if scale < 2.0**100 else difference.double() * scale
    return delta


# --- what rounding could have made --------------------------------------------------------------------------


class _Noise(NamedTuple):
    """What rounding puts into ΔW, entry by entry: independent errors, of a variance and a size that are known.

    roundings: whose were counted, "both" or "after". floor: the noise's norm; spread: standard deviation of the
    norm's square. rows, columns: variances summed by row and by column; scale: what they were multiplied by.
    largest_error: half a step of each file counted, at its largest entry.
    """

    roundings: str
    floor: float
    spread: float
    rows: Tensor
    columns: Tensor
    scale: float
    largest_error: float


def _noise(scan: _Scan, before_is_exact: bool) -> _Noise:
    """A rounding is off by step/√12 in the mean square, each entry by itself, and by step/2 at most.

    The norm adds the squares up; its square has the variance Σ step⁴/180, which counts where a few large entries
    make most of it.
    Both files are counted, since nobody can see whether tuning started from BEFORE as it is stored. If it did,
    that is too much by √2 at most, which makes up for the worst case of one rounding (4/3).
    But where AFTER is stored far more finely, BEFORE's rounding would be in ΔW in full: ΔW below it shows that
    it is not.
    """
    (old_rows, old_columns), (new_rows, new_columns) = scan.steps
    alone, other = (math.sqrt(float(rows.sum()) / 12) for rows in (old_rows, new_rows))
    least = min(0.8 * alone**2, alone**2 - BY_CHANCE * math.sqrt(scan.fourths[0] / 180))
    if before_is_exact or (other < alone / 8 and scan.delta**2 < least):
        rows, columns, fourths, scale, whose = new_rows, new_columns, scan.fourths[1], ALONE**2, "after"
        error = scan.largest_steps[1] / 2
    else:
        rows, columns, scale, whose = old_rows + new_rows, old_columns + new_columns, 1.0, "both"
        # the square of a sum varies by four times the product of the two variances as well
        fourths = sum(scan.fourths) + 180 * 4 / 144 * math.sqrt(math.prod(scan.fourths))
        error = sum(scan.largest_steps) / 2
    rows, columns = (scale / 12 * each for each in (rows, columns))
    floor = math.sqrt(float(rows.sum()))
    return _Noise(whose, floor, scale * math.sqrt(fourths / 180), rows, columns, scale, error)


def _largest_singular_value(
    noise: _Noise, before: Stored, after: Stored, dtypes: list[torch.dtype], tight: bool = True
) -> float:
    """The largest singular value that the noise can have, were none of its roundings but a few worse than average.

    Of independent noise whose size differs from entry to entry it is at most about that of the noisiest row plus
    that of the noisiest column (Bandeira & van Handel 2016, theorem 1.1): σ(√m + √n) where all are alike, and
    never above twice the truth. Their theorem has a second term, for single entries that stand out. It counts
    where an entry's largest error h is so much above the rest that it makes a singular value of its own, that is
    if h⁴ is more than the variance R of its row times the variance C of its column; the singular value is then
    √((h² + R)(h² + C)) / h (Benaych-Georges & Nadakuditi 2012, section 3.1, there for R and C of equal entries).
    Two large entries of one row or column, both off by as much as can be, are such an h = √(h₁² + h₂²).
    """
    R, C = float(noise.rows.max()), float(noise.columns.max())
    edge = math.sqrt(R) + math.sqrt(C)
    # h² can be twice the square of the largest error: below √(RC) of the noisiest lines no pair stands out
    squared = 2 * noise.largest_error**2
    if squared <= math.sqrt(R) * math.sqrt(C):
        return edge
    if not tight:  # h² + R + C + RC/h² grows with all three from there on
        return math.sqrt((squared + R) * (squared + C) / squared)
    loudest = _Loudest(noise.columns.numel())
    for which, pair in blocks(before, after):
        steps = [
            lowrank.rounding_step(each.to(_common(before, after)), dtype).double()
            for each, dtype in zip(pair, dtypes, strict=True)
        ]
        counted = steps if noise.roundings == "both" else steps[1:]
        errors = sum(counted) / 2
        variances = noise.scale / 12 * sum(step**2 for step in counted)
        edge = max(edge, _standing_out(errors, variances, noise.rows[which], noise.columns))
        loudest.add(errors.T, variances.T, noise.rows[which])
    return max(edge, loudest.standing_out(noise.columns))


def _standing_out(errors: Tensor, variances: Tensor, own: Tensor, across: Tensor) -> float:
    """The largest singular value that the two largest errors of a line make, over all lines.

    errors, variances: (lines, entries). own: (lines,), the variance of each; across: (entries,) or (lines,
    entries), that of the lines that cross it.
    """
    errors, places = errors.topk(min(2, errors.shape[1]), dim=1)
    variances = variances.gather(1, places)
    crossing = across[places] if across.ndim == 1 else across.gather(1, places)
    R, C = own - variances.sum(1), (crossing - variances).amax(1)
    R, C, squared = R.clamp_(min=0), C.clamp_(min=0), errors.square().sum(1)
    alone = ((squared + R) * (squared + C) / squared).sqrt()
    return float(torch.where(squared > R.sqrt() * C.sqrt(), alone, R.sqrt() + C.sqrt()).max())


class _Loudest:
    """The two largest errors of each column, of all the rows seen so far."""

    def __init__(self, columns: int):
        self.errors = self.variances = self.across = torch.zeros(columns, 0, dtype=torch.float64)

    def add(self, errors: Tensor, variances: Tensor, across: Tensor) -> None:
        """Some rows more: (columns, rows) of errors and variances, (rows,) of what crosses."""
        errors, places = errors.topk(min(2, errors.shape[1]), dim=1)
        self.errors = torch.cat([self.errors, errors], 1)
        self.variances = torch.cat([self.variances, variances.gather(1, places)], 1)
        self.across = torch.cat([self.across, across[places]], 1)
        self.errors, kept = self.errors.topk(min(2, self.errors.shape[1]), dim=1)
        self.variances, self.across = self.variances.gather(1, kept), self.across.gather(1, kept)

    def standing_out(self, own: Tensor) -> float:
        return _standing_out(self.errors, self.variances, own, self.across)


def _above(values: Tensor, edge: float) -> int:
    return int((values > max(edge, RESOLUTION * float(values[0]))).sum())


def _ranks(values: Tensor) -> dict[str, float]:
    ranks = {f"rank_{round(100 * share)}": lowrank.rank_for_energy(values, share) for share in SHARES}
    return {
        "stable_rank": lowrank.stable_rank(values),
        "effective_rank": lowrank.effective_rank(values),
    } | ranks


def _with_ranks(known: Figures, found: Spectrum, edge: float) -> Figures:
    return known._replace(**_ranks(found.values), above=_above(found.values, edge), method=found.method)


def rank_grid(most: int) -> list[int]:
    """The ranks at which a spectrum is kept: each up to 32, then eight in an octave, and the last."""
    ranks = list(range(1, min(most, 32) + 1))
    step = 4
    while ranks[-1] < most:
        ranks.append(min(ranks[-1] + step, most))
        step *= 2 if ranks[-1] == 16 * step else 1
    return ranks


def _thinned(values: Tensor, scale: float = 1.0) -> tuple[tuple[int, float, float], ...]:
    """A spectrum at the ranks of the grid, the singular values divided by `scale`."""
    shares = lowrank.energy(values)
    return tuple((k, float(values[k - 1]) / scale, float(shares[k - 1])) for k in rank_grid(len(values)))


def _marked(values: Tensor, edge: float) -> tuple[str, ...]:
    """The figures that change by more than a tenth (a rank: and by more than 1) without what is below the edge."""
    count = _above(values, edge)
    if not count:
        return MARKABLE[1:]
    with_all, without = _ranks(values), _ranks(values[:count])
    least = {name: 1 if name.startswith("rank_") else 0 for name in with_all}
    return tuple(
        name
        for name, value in with_all.items()
        if abs(value - without[name]) > max(CHANGE * value, least[name])
    )


# --- spectra ------------------------------------------------------------------------------------------------


def _spectrum(build: Callable[[], Tensor], sides: tuple[int, int], edge: float, room: int) -> Spectrum:
    """Singular values of the float32 matrix that `build` makes: the head alone where the rest is negligible.

    Else the whole: from the Gram matrix of the smaller side (a third to a half of the time of an SVD), summed in
    float64 (then exact to 10⁻⁸ σ₁) unless the spectrum is so flat that float32 does, or, where its two copies would
    not fit into `room`, by a float32 SVD without vectors.
    """
    delta = build()
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    head, flat = _head(tall, edge)
    if head is not None:
        return Spectrum(head, "head")
    smaller = min(sides)
    if 16 * smaller**2 > room or 4 * math.prod(sides) + 8 * smaller**2 > room:
        return Spectrum(torch.linalg.svdvals(delta).double(), "full")
    if flat and smaller >= LARGE:
        squares = torch.linalg.eigvalsh(_gram(tall, torch.float32)).double().clamp_(min=0)
        if _sharp(squares):
            return Spectrum(squares.sqrt_().flip(0), "full")
    gram = _gram(tall, torch.float64)
    del delta, tall  # the eigenvalue routine needs a copy of the Gram matrix
    return Spectrum(torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0), "full")


def _gram(tall: Tensor, dtype: torch.dtype) -> Tensor:
    """Lower triangle of AᵀA (what `eigvalsh` reads), summed over a few rows of A at a time."""
    rows, columns = tall.shape
    gram = torch.zeros(columns, columns, dtype=dtype)
    step, wide = max(64, BLOCK // columns), max(64, -(-columns // 8))
    if (
        dtype == torch.float32
    ):  # nothing to convert, so larger pieces cost nothing; each sum is rounded less often
        step = max(1024, step)
    for first in range(0, rows, step):
        block = tall[first : first + step].to(dtype)
        for left in range(0, columns, wide):
            right = left + wide
            gram[left:right, :right].addmm_(block[:, left:right].T, block[:, :right])
    return gram


def _sharp(squares: Tensor) -> bool:
    """Whether float32's error in σ², SHAKY · σ₁², changes the singular values together by less than 10⁻³ of their sum.

    By Weyl's theorem no σ² is off by more; σ then by δ/2σ, or √δ where it is smaller than that.
    """
    shift = SHAKY * float(squares[-1])
    values = squares.sqrt()
    return float((shift / 2 / values.clamp(min=math.sqrt(shift) / 2)).sum()) <= 1e-3 * float(values.sum())


def _head(tall: Tensor, edge: float, most: int = 272, probes: int = 8) -> tuple[Tensor | None, bool]:
    """(the leading singular values from one random sketch, or None; whether so many directions are alike that there
    is no head).

    The sketch (Halko, Martinsson & Tropp 2011) is an eighth of the smaller side wide, so that trying costs little. It
    isn't tried where the moments say that it must fail: with nearly all energy in w directions, (Σσ²)² is at most
    w Σσ⁴ (Cauchy–Schwarz), and Σσ⁴ = E‖AᵀA g‖² for random g. Fresh random vectors tell the norm τ of what it misses.
    Only if no figure depends on that is it taken: by Mirsky's theorem all singular values together are off by at
    most √n τ, which bounds the effective rank (Fannes & Audenaert).
    """
    columns = tall.shape[1]
    width = min(most, columns // 8)
    if width < 4:
        return None, False
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(columns, width, generator=generator)
    total = math.sqrt(sum(_squared(part) for part in tall.split(max(1, BLOCK // columns))))
    images = tall @ torch.randn(columns, probes, generator=generator)
    if total**4 > 2 * width * _squared(tall.T @ images) / probes:
        return None, True
    Q = torch.linalg.qr(tall @ directions).Q
    images -= Q @ (Q.T @ images)
    # √2: a mean over 8 vectors is hardly ever half of what it estimates
    missing = math.sqrt(2 * _squared(images) / probes)
    if missing > 1e-3 * total:
        return None, False
    values = torch.linalg.svdvals(Q.T @ tall).double()
    share = math.sqrt(columns) * missing / float(values.sum())
    if share <= 0:
        return values, False
    uncertain = share * math.log(columns) - share * math.log(min(share, 1 / math.e))
    # where half of the sketch stands above the edge, there may be more of such past it
    hides = float(values[width // 2]) > 0.8 * max(edge, RESOLUTION * float(values[0]))
    return (None if hides or uncertain > math.log1p(ENTROPY_ERROR) else values), False


# --- adapters -----------------------------------------------------------------------------------------------


def measure_adapter(
    base: Stored | None,
    products: list[tuple[Tensor, Tensor]],
    scaling: float,
    shape: tuple[int, ...],
    missing: str = "",
) -> Figures:
    """The figures of an adapter's ΔW = s · left right, from its factors: ΔW itself is never made.

    products: a pair (left, right) for each expert, else one. base: where ‖W‖ can be read; `missing` says why not.
    An adapter holds ΔW and not a rounded sum with W: there is no rounding floor, and nothing is marked.
    """
    parts = [_of_product(left, right, scaling, shape[-2:]) for left, right in products]
    found = together_as_one(parts, shape) if len(parts) > 1 else parts[0]._replace(shape=shape)
    sides = found.sides if base is None or (len(shape) > 2 and len(parts) > 1) else base.sides
    own = _name(products[0][1].dtype)
    weight = None if base is None else math.sqrt(sum(_squared(block) for _, (block,) in blocks(base)))
    found = found._replace(
        sides=sides, formats=(base.format if base else "-", own), weight_norm=weight, missing=missing
    )
    if weight is not None and not math.isfinite(weight):
        return found._replace(status="not finite", weight_norm=None, note="NaN or infinite entries in BEFORE")
    return found


def _of_product(left: Tensor, right: Tensor, scaling: float, shape: tuple[int, ...]) -> Figures:
    """s · left right from the triangular factors of both: singular values of an r × r matrix (LAPACK's QR)."""
    sides = (left.shape[0], right.shape[1])
    known = Figures("measured", shape, sides, (), roundings="none", method="factors")
    R_left, R_right = (torch.linalg.qr(each.double(), mode="r").R for each in (left, right.T))
    if not (torch.isfinite(R_left).all() and torch.isfinite(R_right).all()):
        return known._replace(status="not finite", note="NaN or infinite entries in the factors")
    values = torch.linalg.svdvals(scaling * R_left @ R_right.T)
    norm = float(torch.linalg.vector_norm(values))
    if not norm:
        return known._replace(status="equal", delta_norm=0.0)
    return known._replace(delta_norm=norm, spectrum=_thinned(values), **_ranks(values))


def together_as_one(parts: list[Figures], shape: tuple[int, ...]) -> Figures:
    """Figures of a stack of matrices: norms of all together, medians of the rest, and the worst in the note.

    Marked is what is marked in half of them or more. An expert that is equal before and after counts for norms only.
    """
    status = [each.status for each in parts]
    known = [each for each in parts if each.stable_rank is not None]
    first = known[0] if known else parts[0]
    whole = first._replace(shape=shape, experts=len(parts))
    for name in ("weight_norm", "delta_norm", "floor"):
        values = [getattr(each, name) for each in parts if getattr(each, name) is not None]
        whole = whole._replace(**{name: math.sqrt(sum(value**2 for value in values)) if values else None})
    for name in ("unchanged", "edge", "above", *MARKABLE[1:]):
        values = [getattr(each, name) for each in known if getattr(each, name) is not None]
        middle = statistics.median_high if name.startswith(("rank_", "above")) else statistics.median
        whole = whole._replace(**{name: middle(values) if values else None})
    marks = [name for name in MARKABLE if 2 * sum(name in each.marked for each in parts) >= len(parts)]
    worst = max(known, key=lambda each: each.rank_90, default=None)
    told = f"{len(parts)} experts, medians"
    if worst is not None:
        told += f"; the widest, expert {parts.index(worst)}, takes rank {worst.rank_90} for 90 %"
        whole = whole._replace(spectrum=worst.spectrum)
    unlike = {state: status.count(state) for state in dict.fromkeys(status) if state != "measured"}
    told += "".join(f"; {count} {state}" for state, count in unlike.items())
    common = status[0] if len(set(status)) == 1 else "not finite" if "not finite" in status else "measured"
    return whole._replace(status=common, marked=tuple(marks), note=told)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, each in FORMATS.items() if each == dtype)
