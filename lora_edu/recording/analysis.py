"""What the weights of the recorded runs look like: directions that runs share, spectra, intruder directions.

Makes the numbers of data/sweeps.json for which weights are needed that do not ship. Nothing is trained here.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from statistics import mean

import torch
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data.runs import RANKS, tuned_runs, usual_runs

KINDS = ("embedding", "query", "key", "value", "output", "up", "down", "head")
BLOCKS = KINDS[1:-1]
STRONGEST = 10  # directions of the tuned W that are looked at for intruders, as Shuttleworth et al. (2024) do
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


# ---- from a recorded state dict ----------------------------------------------------------------------------------


def factors(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → (lora_A, lora_B) as stored, in float32; empty for a run that has none."""
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return {
        name: (state[f"{name}.lora_A"].float(), state[f"{name}.lora_B"].float()) for name in sorted(layers)
    }


def updates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer → ΔW in the weight's own shape: BA (s = 1), for the embedding ABᵀ; for full tuning ΔW as it stands."""
    found = {
        name: A @ B.T if kind_of(name) == "embedding" else B @ A for name, (A, B) in factors(state).items()
    }
    return found or {
        name.removesuffix(".weight"): dW.float()
        for name, dW in sorted(state.items())
        if dW.dim() == 2 and name.endswith(".weight")
    }


def kind_of(layer: str) -> str:
    """blocks.3.attention.query → query."""
    return layer.rpartition(".")[2]


# ---- two runs ----------------------------------------------------------------------------------------------------


def similarity(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict:
    """Kind → what → {"i,j": φ(i, j)}, mean over the layers; i and j are powers of two up to each run's rank.

    what: BA for the right directions of the two ΔW; in linear layers also A for the rows of the two A and B for the
    columns of the two B. Chance is max(i, j) / dimension, the dimension being `columns` (for B: `rows`).
    """
    of_first, of_second = factors(first), factors(second)
    updates_1, updates_2 = updates(first), updates(second)
    found = {}
    for kind in KINDS:
        layers = [name for name in updates_1 if kind_of(name) == kind and name in updates_2]
        if not layers:
            continue
        grids = {"BA": [_grid(updates_1[name], updates_2[name], "right") for name in layers]}
        if kind != "embedding" and of_first and of_second:
            pairs = [(of_first[name], of_second[name]) for name in layers]
            grids["A"] = [_grid(A, other, "right") for (A, _), (other, _) in pairs]
            grids["B"] = [_grid(B, other, "left") for (_, B), (_, other) in pairs]
        rows, columns = updates_1[layers[0]].shape
        found[kind] = {"rows": rows, "columns": columns} | {
            what: {at: _rounded(mean(grid[at] for grid in each)) for at in each[0]}
            for what, each in grids.items()
        }
        found[kind]["cosine"] = _rounded(mean(_cosine(updates_1[n], updates_2[n]) for n in layers))
    return found


def captured(update: Mapping[str, Tensor], whole: Mapping[str, Tensor], rank: int) -> dict:
    """Kind → what share of ‖whole‖² lies in the `rank` strongest right directions of an update, mean over layers.

    Beside it `best`, the share in whole's own strongest directions (no other can hold more), and `chance`, rank
    over dimension.
    """
    found = {}
    for kind in KINDS:
        layers = [name for name in update if kind_of(name) == kind]
        held, best = [], []
        for name in layers:
            V = lowrank.svd(update[name]).Vh[:rank].T
            held.append(float((whole[name] @ V).square().sum() / whole[name].square().sum()))
            best.append(float(lowrank.energy(lowrank.svd(whole[name]).S)[rank - 1]))
        if layers:
            chance = rank / whole[layers[0]].shape[1]
            found[kind] = {"held": _rounded(mean(held)), "best": _rounded(mean(best)), "chance": chance}
    return found


def _grid(one: Tensor, other: Tensor, side: str) -> dict[str, float]:
    """{"i,j": φ} at the powers of two up to the ranks of the two."""
    i, j = (min(64, lowrank.numerical_rank(each)) for each in (one, other))
    grid = lowrank.similarity_grid(one, other, i, j, side)
    powers = [2**k for k in range(7)]
    return {f"{a},{b}": float(grid[a - 1, b - 1]) for a in powers if a <= i for b in powers if b <= j}


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


# ---- one run -----------------------------------------------------------------------------------------------------


def spectra(update: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict:
    """Kind → ‖ΔW‖ / ‖W_o‖, stable rank and the rank that holds 90 % of the energy, means over the layers."""
    found = {}
    for kind in KINDS:
        layers = [name for name in update if kind_of(name) == kind]
        if layers:
            values = [lowrank.svd(update[name]).S for name in layers]
            size = [float(update[name].norm() / base[f"{name}.weight"].norm()) for name in layers]
            found[kind] = {
                "size": _rounded(mean(size)),
                "stable": _rounded(mean(map(lowrank.stable_rank, values))),
                "ninety": _rounded(mean(lowrank.rank_for_energy(S, 0.9) for S in values)),
            }
    return found


def intruders(update: Mapping[str, Tensor], base: Mapping[str, Tensor], draws: int = 5) -> dict:
    """How many of the ten strongest left directions of W_o + ΔW are unlike all of W_o's, mean over block matrices.

    Unlike: the largest |cosine| with a left direction of W_o is below a threshold (Shuttleworth et al. 2024). found:
    threshold → number; shuffled: the same with ΔW's singular values in random directions, mean of `draws`, which is
    what a change of that size and rank does whatever its directions.
    """
    generator = torch.Generator().manual_seed(0)
    found, shuffled = [], []
    for name in (name for name in update if kind_of(name) in BLOCKS):
        W = base[f"{name}.weight"].float()
        old, S = lowrank.svd(W).U, lowrank.svd(update[name]).S
        found.append(nearest(old, W + update[name]))
        for _ in range(draws):
            left, right = (_orthonormal(side, len(S), generator) for side in W.shape)
            shuffled.append(nearest(old, W + (left * S) @ right.T))
    return {
        what: {str(t): _rounded(float((torch.stack(each) < t).sum(1).double().mean())) for t in THRESHOLDS}
        for what, each in (("found", found), ("shuffled", shuffled))
    }


def nearest(old: Tensor, tuned: Tensor) -> Tensor:
    """Largest |cosine| of each of the ten strongest left directions of `tuned` with a column of `old`: (10,)."""
    return (lowrank.svd(tuned).U[:, :STRONGEST].T @ old).abs().amax(1)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def _rounded(value: float) -> float:
    return round(float(value), 3)


# ---- all of it ---------------------------------------------------------------------------------------------------


def analyse(
    rows: Iterable[Mapping], read: Callable[[str], Mapping[str, Tensor]], base: Mapping[str, Tensor]
) -> dict:
    """All numbers about weights that chapter 07 shows; runs that are not there are left out.

    read: name of a run → its recorded state dict; base: the base model's. pairs: `similarity` of two runs of
    different seeds, and of two of the same seed at two rates; captured: how much of full tuning's ΔW (seed 1) lies in
    the directions of LoRA of seed 0, and of full tuning of seed 0; spectra and intruders: of the runs of seed 0.
    """
    rows = list(rows)
    runs = tuned_runs(rows)
    state = cache(lambda name: read(name))
    delta = cache(lambda name: updates(state(name)))
    pairs = [((8, 0), (64, 1)), ((64, 0), (64, 1)), ((8, 0), (8, 1)), ((None, 0), (None, 1))]
    pairs += [((r, 0), (None, 1)) for r in RANKS]
    pairs = [(runs[one], runs[other]) for one, other in pairs if one in runs and other in runs]
    for other in usual_runs(rows):  # the same seed, another rate: how much the shared start does
        own = runs.get((8, 0))
        if own and all(other[key] == own[key] for key in ("rank", "seed", "embedding")) and other is not own:
            pairs.append((own, other))
    singles = [runs[r, 0] for r in (*RANKS, None) if (r, 0) in runs]
    whole = delta(runs[None, 1]["name"]) if (None, 1) in runs else {}
    widest = min((min(dW.shape) for dW in whole.values()), default=0)
    return {
        "pairs": [
            {"first": _about(one), "second": _about(other)}
            | {"kinds": similarity(state(one["name"]), state(other["name"]))}
            for one, other in pairs
        ],
        "captured": [
            _about(run) | {"directions": r, "kinds": captured(delta(run["name"]), whole, r)}
            for run in singles
            for r in ([run["rank"]] if run["rank"] else RANKS)
            if r <= widest
        ],
        "spectra": [_about(run) | {"kinds": spectra(delta(run["name"]), base)} for run in singles],
        "intruders": [_about(run) | intruders(delta(run["name"]), base) for run in singles],
    }


def _about(run: Mapping) -> dict:
    return {key: run[key] for key in ("method", "rank", "seed", "rate")}
