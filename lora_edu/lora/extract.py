"""A full fine-tune becomes an adapter: ΔW = W_f − W_o of two state dicts, cut to factors, matrix by matrix.

Tensors in memory; checkpoints on disk are adapters/extract.py's. How many directions each gets: ranks.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_edu import lowrank

from .adapter_files import Factors
from .ranks import choose_ranks

FIRST = 32  # directions looked for where no rank is asked for; doubled until they are enough
RESOLUTION = 4 * torch.finfo(torch.float32).eps  # singular values below that share of σ₁ are our own rounding
ALLOWANCE = 1.05  # over the edge of noise, for a single draw of it
EMBEDDINGS = (
    "embed_tokens", "wte", "wpe", "word_embeddings", "shared", "tok_embeddings", "embedding", "embed_in", "embed",
    "position_embeddings", "token_type_embeddings", "relative_attention_bias", "word_embedding",
)  # fmt: skip


class Leading(NamedTuple):
    """The first directions of ΔW: U (m, k), S (k,), Vh (k, n), none of them below the rounding floor.

    norm: ‖ΔW‖_F. exhausted: what is left is below the floor, or nothing. error: ‖ΔW − U S Vh‖_F, measured.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    norm: float
    exhausted: bool
    error: float


class Extracted(NamedTuple):
    """What `extract_lora` found.

    layers: name of the layer → its factors, as `write_adapter` takes them. errors: name → ‖ΔW − s BA‖_F / ‖ΔW‖_F.
    rounding: name → the share of ‖ΔW‖_F² that rounding to the tensors' dtypes puts there, at most 1. left: name of a
    tensor that changed → why it is not in the adapter.
    """

    layers: dict[str, Factors]
    errors: dict[str, float]
    rounding: dict[str, float]
    left: dict[str, str]


def extract_lora(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    parameters: int | None = None,
    embeddings: tuple[str, ...] = (),
    transposed: tuple[str, ...] = (),
) -> Extracted:
    """LoRA factors with B A close to ΔW = after − before, for every matrix that changed.

    before, after: state dicts of one model. Exactly one of rank, energy, error and parameters says how many directions
    each matrix gets (`choose_ranks`). No direction is taken that rounding to the stored dtypes could have made.
    The truncated SVD U S Vᵀ is split evenly: lora_B = U √S, lora_A = √S Vᵀ, alpha = r, so that s = 1.
    Which matrices are an nn.Embedding's is taken from their names; more are named in `embeddings`, and weights stored
    (in, out), as GPT-2's Conv1D has them, in `transposed` (ends of module names, such as "c_attn").
    Matrices only: biases, norms and stacks of more axes that changed are named in `left`. Of a table with more rows
    after than before, the common rows are taken; the new ones are named there, too.

    Raises ValueError as `choose_ranks` does, and where nothing changed.
    """
    rules = {"rank": rank, "energy": energy, "error": error, "parameters": parameters}
    choose_ranks({}, {}, **rules)  # refuses them before the work
    pairs, left = _pairs(before, after)
    if not pairs and not left:
        raise ValueError("before and after are equal: there is no ΔW to extract")
    noise = {name: _rounding(*pair) for name, pair in pairs.items()}

    def lead(name: str, count: int | None) -> Leading:
        old, new = pairs[name]
        return leading(new.float() - old.float(), count, missing(rules), noise[name][0])

    sides = {name: tuple(old.shape) for name, (old, _) in pairs.items()}
    ranks, heads = choose(list(pairs), sides, rules, lead)
    layers, errors = {}, {}
    for name, head in heads.items():
        if not ranks[name]:
            left[f"{name}.weight"] = unchosen(head)
            continue
        last = name.rpartition(".")[2]
        table = last in (*EMBEDDINGS, *embeddings)
        layers[name] = factors(*lowrank.halves(head, ranks[name]), table, last in transposed)
        errors[name] = remaining(head, ranks[name])
    rounding = {name: min(noise[name][1] / head.norm, 1.0) ** 2 for name, head in heads.items()}
    return Extracted(layers, errors, rounding, left)


def _pairs(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Layer → its weight before and after, where it changed; and what else changed, with the reason."""
    pairs, left = {}, {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or not (old.is_floating_point() and new.is_floating_point()):
            continue
        old, new, why = _comparable(old.detach(), new.detach())
        if why:
            left[name] = why
        if old is None or torch.equal(old, new):
            continue
        if old.ndim != 2 or not name.endswith(".weight"):
            left[name] = "a vector" if old.ndim < 2 else "no matrix of a layer's"
        else:
            pairs[name.removesuffix(".weight")] = (old, new)
    return pairs, left


def unchosen(head: Leading) -> str:
    """Why a matrix gets no direction."""
    if not len(head.S):
        return "no direction above the rounding floor"
    return "no direction of it was worth its parameters"


def choose(
    names: Sequence[str],
    sides: Mapping[str, tuple[int, int]],
    rules: Mapping[str, float | None],
    lead: Callable[[str, int | None], Leading],
    groups: Mapping[str, str] | None = None,
    copies: Mapping[str, int] | None = None,
) -> tuple[dict[str, int], dict[str, Leading]]:
    """(rank of each matrix, its leading directions), asking `lead(name, count)` for no more of these than it takes.

    With one budget for all nobody knows beforehand how far into a spectrum it reaches: whichever matrix is given all
    the directions that are known of it is asked for twice as many. groups: matrices that must share one rank, name →
    group; they are chosen as one matrix whose squares are the sums of theirs. copies: how often a matrix is stored.
    """
    groups = {name: (groups or {}).get(name, name) for name in names}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(groups[name], []).append(name)
    heads = {name: lead(name, first_count(rules)) for name in names}
    times = {name: (copies or {}).get(name, 1) for name in names}
    cost = {
        group: tuple(sum(times[name] * sides[name][axis] for name in each) for axis in (0, 1))
        for group, each in members.items()
    }
    while True:
        spectra = {group: _together([heads[name].S for name in each]) for group, each in members.items()}
        norms = {group: math.hypot(*(heads[name].norm for name in each)) for group, each in members.items()}
        chosen = choose_ranks(spectra, cost, **rules, norms=norms)
        ranks = {name: chosen[groups[name]] for name in names}
        short = [name for name in names if not heads[name].exhausted and len(heads[name].S) <= ranks[name]]
        if rules["parameters"] is None or not short:
            return ranks, heads
        worth = {name: float(heads[name].S[-1]) ** 2 / sum(sides[name]) for name in short}
        # the others may be short only because these, not known far enough, left them their part of the budget
        for name in (name for name in short if 4 * worth[name] >= max(worth.values())):
            heads[name] = lead(name, 2 * len(heads[name].S))


def _together(spectra: Sequence[Tensor]) -> Tensor:
    """Singular values whose squares are the sums, place by place."""
    squares = torch.zeros(max(map(len, spectra)), dtype=torch.float64)
    for each in spectra:
        squares[: len(each)] += each.double().square()
    return squares.sqrt()


def leading(
    delta: Tensor, rank: int | None, left: float | None, edge: float, norm: float | None = None
) -> Leading:
    """As many of ΔW's leading directions as are asked for, by randomised SVD; none at or below `edge`.

    delta: (m, n). Either `rank` directions, or so many that at most the share `left` of ‖ΔW‖_F² is left: then the
    sketch is doubled until it holds them, or until it reaches the edge. norm: ‖ΔW‖_F, where it is known.
    """
    smaller = min(delta.shape)
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) if norm is None else norm
    count = min(rank if rank is not None else FIRST, smaller)
    while True:
        found = lowrank.randomized_svd(delta, count)
        above = int((found.S > max(edge, RESOLUTION * float(found.S[0]))).sum())
        exhausted = above < count or count == smaller
        if rank is not None or exhausted or found.error**2 <= left * norm**2:
            break
        count = min(2 * count, smaller)
    error = math.sqrt(found.error**2 + float(found.S[above:].double().square().sum()))
    return Leading(found.U[:, :above], found.S[:above], found.Vh[:above], norm, exhausted, error)


def remaining(head: Leading, rank: int) -> float:
    """‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of the first directions of a measured head: what it left, and those that are cut."""
    cut = float(head.S[rank:].double().square().sum())
    return math.sqrt(head.error**2 + cut) / head.norm if head.norm else 0.0


def factors(left: Tensor, right: Tensor, embedding: bool = False, transposed: bool = False) -> Factors:
    """Factors with ΔW = left right and s = 1, of a linear layer (out, in), a Conv1D (in, out) or an embedding."""
    if embedding:
        A, B = left, right.T
    elif transposed:
        A, B = left.T, right.T
    else:
        A, B = right, left
    return Factors(A.contiguous(), B.contiguous(), float(left.shape[1]), False, 0.0, embedding)


def _comparable(old: Tensor, new: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    """The two, of a table that grew their common rows, and what of them can't be expressed."""
    if old.shape == new.shape:
        return old, new, ""
    if old.ndim == new.ndim == 2 and old.shape[1] == new.shape[1]:
        rows = min(len(old), len(new))
        told = f"rows {rows} to {max(len(old), len(new)) - 1} are in one of the two alone"
        if len(new) < len(old):
            return old, torch.cat([new.to(old), old[rows:]]), told
        return old, new[:rows], told
    return None, None, f"{tuple(old.shape)} before, {tuple(new.shape)} after"


def _rounding(old: Tensor, new: Tensor) -> tuple[float, float]:
    """(the largest singular value, the norm) that rounding both to their dtypes can have put into ΔW.

    σ_max ≤ √(max row variance) + √(max column variance) (Bandeira & van Handel 2016, theorem 1.1).
    """
    variances = sum(
        lowrank.rounding_step(each.double() if each.dtype == torch.float64 else each.float(), each.dtype)
        .double()
        .square()
        / 12
        for each in (old, new)
    )
    rows, columns = variances.sum(1), variances.sum(0)
    return ALLOWANCE * (float(rows.max()) ** 0.5 + float(columns.max()) ** 0.5), float(rows.sum()) ** 0.5


def first_count(rules: Mapping[str, float | None]) -> int | None:
    """How many directions of each matrix to ask for first; None where the energy that they leave decides."""
    return FIRST if rules["parameters"] is not None else rules["rank"]


def missing(rules: Mapping[str, float | None]) -> float | None:
    """The share of ‖ΔW‖_F² that a rule allows to be left out, matrix by matrix; None where it counts otherwise."""
    if rules["energy"] is not None:
        return 1 - rules["energy"]
    return rules["error"] ** 2 if rules["error"] is not None else None
