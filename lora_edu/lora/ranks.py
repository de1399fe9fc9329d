"""How many directions each matrix gets: by a fixed rank, by energy, by error, or from one budget for all of them.

Singular values in, ranks out. Where the values come from, and what is made of the ranks, is not known here.
"""

import heapq
import operator
from collections.abc import Mapping

import torch
from torch import Tensor


def choose_ranks(
    spectra: Mapping[str, Tensor],
    sides: Mapping[str, tuple[int, int]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    parameters: int | None = None,
    most: Mapping[str, int] | None = None,
    norms: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """The rank of each matrix, 0 where none is worth having. Exactly one of the four rules is given.

    spectra: name → singular values of ΔW, largest first: all of them, or the first ones where `norms` has ‖ΔW‖_F
    of that name. sides: name → (m, n); rank r costs r · (m + n) parameters. most: name → a rank not to be
    exceeded, such as the number of directions that rounding could not have made.

    rank: the same for all, less where there are fewer singular values above 0. energy: the least r with
    Σ_{k ≤ r} σ_k² ≥ energy · ‖ΔW‖_F², matrix by matrix, 0 < energy ≤ 1. error: the least r with
    ‖ΔW − ΔW_r‖_F ≤ error · ‖ΔW‖_F, 0 ≤ error < 1. Where `most`, or the end of a shorter list of singular values,
    comes before that, it is the answer.

    parameters: one budget for all together. The next direction always goes where it brings the most energy for each
    parameter, σ² / (m + n), as long as it fits. Squares fall within a matrix, so this solves the Lagrangian
    relaxation: for the parameters it spends up to the first direction that does not fit, no other ranks keep more.
    For the whole budget it is exact where all matrices cost the same; else it keeps less than the best choice by
    less than the energy of that first direction, which is at most a single σ².

    Raises ValueError for another number of rules, for a value out of its range, or for a name without sides.
    """
    rules = {"rank": rank, "energy": energy, "error": error, "parameters": parameters}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of rank, energy, error and parameters; got {' and '.join(given) or 'none'}"
        )
    _check(rules)
    unknown = [name for name in spectra if name not in sides]
    if unknown:
        raise ValueError(f"each matrix needs its sides (m, n); {unknown[0]} has none")
    squares = {name: _squares(values) for name, values in spectra.items()}
    limits = {
        name: min(int((each > 0).sum()), *([most[name]] if most and name in most else []), each.numel())
        for name, each in squares.items()
    }
    if rank is not None:
        return {name: min(operator.index(rank), limit) for name, limit in limits.items()}
    if parameters is not None:
        return _greedy(squares, sides, limits, operator.index(parameters))
    missing = 1 - energy if energy is not None else error**2
    chosen = {}
    for name, each in squares.items():
        total = float(each.sum()) if norms is None or name not in norms else norms[name] ** 2
        chosen[name] = min(_least(each, total, missing), limits[name])
    return chosen


def _check(rules: Mapping[str, float | None]) -> None:
    for name in ("rank", "parameters"):
        value = rules[name]
        if value is None:
            continue
        try:
            whole = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            whole = None
        if whole is None or whole < 1:
            raise ValueError(f"{name} must be a whole number above 0; got {value!r}")
    energy, error = rules["energy"], rules["error"]
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1 (0.9 keeps 90 % of ‖ΔW‖²); got {energy!r}")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error must be at least 0 and below 1 (0.1: ‖ΔW − ΔW_r‖ ≤ 0.1 ‖ΔW‖); got {error!r}")


def _squares(values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach().double().cpu()
    if values.ndim != 1 or not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be one axis of finite numbers, none below 0")
    if (values[1:] > values[:-1]).any():
        raise ValueError("singular values must fall, largest first")
    return values.square()


def _least(squares: Tensor, total: float, missing: float) -> int:
    """The smallest r with total − Σ_{k ≤ r} σ_k² ≤ missing · total; all that there are where none is enough."""
    unseen = max(total - float(squares.sum()), 0.0)
    tails = (
        squares.flip(0).cumsum(0).flip(0)
    )  # summed from the small end, so that a small tail keeps its digits
    left = torch.cat([tails, tails.new_zeros(1)]) + unseen
    enough = (left <= missing * total * (1 + 1e-12)).nonzero()  # for 1 − 0.9, which is less than 0.1
    return int(enough[0]) if enough.numel() else squares.numel()


def _greedy(
    squares: Mapping[str, Tensor],
    sides: Mapping[str, tuple[int, int]],
    limits: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Energy gained per parameter, largest first; a matrix whose next direction doesn't fit is done."""
    costs = {name: sum(sides[name]) for name in squares}
    lists = {name: each.tolist() for name, each in squares.items()}
    ranks = dict.fromkeys(squares, 0)
    waiting = [(-lists[name][0] / costs[name], name) for name, limit in limits.items() if limit > 0]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if costs[name] > budget:
            continue
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(waiting, (-lists[name][ranks[name]] / costs[name], name))
    return ranks
