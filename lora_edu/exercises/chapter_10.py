"""Checks for the exercises of chapter 10, serving adapters: right, or which mistake was made.

Most answers are functions. They are tried on matrices drawn anew at each check.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_edu import counting, lowrank
from lora_edu.exercises.answers import in_words, judge, measured_merge, no_function, normal, real, same, tried
from lora_edu.lora import choose_ranks

OUT, IN = 9, 7  # of the small layers that the functions are tried on
MODEL, RANK, MEMORY, CACHE = "Llama-3.1-8B", 16, 24_000_000_000, 4_000_000_000  # exercise 6


def check_10_1(answer: object) -> str:
    """A function average(parts, rank) → (B, A) of that rank, nearest to the mean of the s · B_i A_i."""
    hint = "first the mean itself as one pair of factors, or as a matrix of this small size; then cut that, once."
    if refused := no_function(1, answer, "parts, rank", hint):
        return refused
    for ranks, scalings, rank in (((2, 2), (1.0, 1.0), 2), ((2, 3, 1), (2.0, 0.5, 1.0), 3)):
        parts = [
            (*normal((OUT, r), (r, IN)), s) for r, s in zip(ranks, scalings, strict=True)
        ]  # (B, A, s) of each
        call = f"with {len(parts)} adapters of ranks {ranks}, to rank {rank}"
        got, problem = tried(1, answer, call, [(B.clone(), A.clone(), s) for B, A, s in parts], rank)
        if problem:
            return problem
        if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(m, Tensor) for m in got):
            return f"Exercise 1: not yet: average must return two matrices, (B, A); got {in_words(got)}."
        B, A = got
        if B.shape != (OUT, rank) or A.shape != (rank, IN):
            return (
                f"Exercise 1: not yet: {call}: B must be ({OUT}, {rank}) and A ({rank}, {IN}); got "
                f"{tuple(B.shape)} and {tuple(A.shape)}."
            )
        if problem := _average_problem(B @ A, parts, rank):
            return f"Exercise 1: not yet: {call}: {problem}"
    return (
        "Exercise 1: right. The mean of n adapters has rank Σ r_i, and its truncation is the best that one adapter of "
        "the old size can do."
    )


def _average_problem(update: Tensor, parts: list, rank: int) -> str:
    """What is wrong with an average cut to a rank, if anything."""
    each = [s * B @ A for B, A, s in parts]
    mean = sum(each) / len(each)
    if same(update, lowrank.truncate(mean, rank)):
        return ""
    if same(update, lowrank.truncate(sum(each), rank)):
        return "that is the sum. A mean divides by the number of adapters."
    if same(update, lowrank.truncate(sum(B @ A for B, A, _ in parts) / len(parts), rank)):
        return "s is lost: the update of an adapter is s · BA."
    if same(update, sum(lowrank.truncate(one, min(rank, *one.shape)) for one in each) / len(each)):
        return "that is the mean of the updates, each cut by itself, and its rank is too high."
    if len({B.shape for B, _, _ in parts}) == 1:
        B, A = (sum(pair[side] for pair in parts) / len(parts) for side in (0, 1))
        if same(update, B @ A):
            return "that averages the factors, which brings in B₁A₂ and B₂A₁: nobody trained these."
    if same(update, lowrank.truncate(mean, rank) / len(parts)):
        return "it is divided twice: once in B and once in A."
    off = float((update - lowrank.truncate(mean, rank)).norm() / mean.norm())
    return f"another update of that rank is nearer to the mean; yours is {off:.0%} of ‖mean‖ away from it."


def check_10_2(answer: object) -> str:
    """A function enough(B, A, share) → the smallest rank that holds this share of ‖BA‖²."""
    hint = "energy is Σσ². The σ of BA are those of R_B R_Aᵀ, from two QR decompositions."
    if refused := no_function(2, answer, "B, A, share", hint):
        return refused
    for share in (0.5, 0.9, 0.99):
        U, V = (torch.linalg.qr(m).Q for m in normal((OUT, 6), (IN, 6)))
        S = torch.tensor([4.0, 3.0, 2.5, 1.5, 1.0, 0.5], dtype=torch.float64)
        (mix,) = normal((6, 6))
        B, A = U * S @ mix, torch.linalg.solve(mix, V.T)
        got, problem = tried(2, answer, f"at {share:.0%}", B.clone(), A.clone(), share)
        if problem:
            return problem
        right = _first(S.square(), share)
        number = _number(got)
        if number == right:
            continue
        wrongs = {  # where two mistakes give one number, the last one is named
            _first(torch.linalg.svdvals(A).square(), share): "those are the singular values of A alone.",
            _first(torch.linalg.svdvals(B).square(), share): "those are the singular values of B alone.",
            right
            + 1: "one too many: the first rank whose cumulative share is high enough is meant, counted from 1.",
            right - 1: "one too few. Do you count from 0?",
            _first(S, share): "that sums σ. Energy is Σσ²; Σσ is the nuclear norm.",
        }
        why = wrongs.get(number, f"Hint: {hint}") if number is not None else "the answer is one whole number."
        return f"Exercise 2: not yet: for {share:.0%} of the energy it gives {in_words(got)}: {why}"
    return (
        "Exercise 2: right. The gauge between B and A changes their own singular values, and not those of BA."
    )


def _first(values: Tensor, share: float) -> int:
    """The number of leading values, largest first, whose sum reaches this share of the whole."""
    sums = values.sort(descending=True).values.cumsum(0)
    return min(int((sums < share * sums[-1] * (1 - 1e-9)).sum()) + 1, len(values))


def check_10_3(answer: object) -> str:
    """A function spend(spectra, sides, budget) → name → rank: each next direction where σ² / (m + n) is largest."""
    hint = "one list of all directions of all matrices, sorted by σ² / (m + n); take from the top what fits."
    if refused := no_function(3, answer, "spectra, sides, budget", hint):
        return refused
    sides = {"table": (100, 10), "square": (10, 10), "thin": (60, 4)}
    for _ in range(12):
        spectra = {
            name: 3 * torch.rand(min(each), dtype=torch.float64).add(0.05).sort(descending=True).values
            for name, each in sides.items()
        }
        spectra["table"] *= 1.5
        budget = 630
        try:
            got = answer({name: S.clone() for name, S in spectra.items()}, dict(sides), budget)
        except Exception as error:
            return f"Exercise 3: not yet: it raises {type(error).__name__}: {error}"
        if not isinstance(got, Mapping) or set(got) != set(sides):
            names = ", ".join(sides)
            return f"Exercise 3: not yet: return a dictionary with a rank for each of {names}; got {in_words(got)}."
        ranks = {name: _number(rank) for name, rank in got.items()}
        if None in ranks.values():
            return f"Exercise 3: not yet: each rank is a whole number; got {in_words(dict(got))}."
        if problem := _spend_problem(ranks, spectra, sides, budget):
            return f"Exercise 3: not yet: {problem}"
    return "Exercise 3: right, and the most energy for the budget. Section 2 says what that is not: the lowest loss."


def _spend_problem(ranks: dict, spectra: Mapping[str, Tensor], sides: Mapping, budget: int) -> str:
    """What is wrong with ranks for a budget, if anything."""
    cost = {name: sum(each) for name, each in sides.items()}
    spent = sum(cost[name] * rank for name, rank in ranks.items())
    if spent > budget:
        return f"ranks {ranks} take {spent} numbers, and the budget is {budget}."
    if ranks == choose_ranks(spectra, sides, parameters=budget):
        return ""
    kept = lambda chosen: sum(float(spectra[n][:r].square().sum()) for n, r in chosen.items())
    best = kept(choose_ranks(spectra, sides, parameters=budget))
    for worth, why in (
        (
            lambda s, name: s**2,
            "that looks at σ² alone. A direction of a large matrix costs more: divide by m + n.",
        ),
        (lambda s, name: s / cost[name], "that compares σ / (m + n). Energy is σ²."),
        (lambda s, name: s**2 / math.prod(sides[name]), "a direction costs m + n numbers, not m · n."),
    ):
        if ranks == _greedy(spectra, cost, budget, worth):
            return why
    if len(set(ranks.values())) == 1:
        return "that is one rank for all. Compare the next direction of each matrix with those of the others."
    return f"ranks {ranks} keep {kept(ranks):.2f} of Σσ²; {best:.2f} can be kept for {budget} numbers."


def _greedy(spectra: Mapping[str, Tensor], cost: Mapping[str, int], budget: int, worth) -> dict[str, int]:
    """Ranks when the next direction is the one that is worth most; one that does not fit ends its matrix."""
    queue = sorted(
        ((worth(float(s), name), name) for name, S in spectra.items() for s in S), key=lambda each: -each[0]
    )
    ranks, done = dict.fromkeys(spectra, 0), set()
    for _, name in queue:
        if name in done:
            continue
        if cost[name] > budget:
            done.add(name)
            continue
        budget -= cost[name]
        ranks[name] += 1
    return ranks


def check_10_4(answer: object) -> str:
    """A function kept_along(W, update) → ⟨merged − W, ΔW⟩ / ‖ΔW‖², where merged has W's dtype."""
    hint = "merge in W's dtype, subtract W in float32, multiply entry by entry with ΔW, sum, divide by Σ ΔW²."
    if refused := no_function(4, answer, "W, update", hint):
        return refused
    for dtype, size in ((torch.bfloat16, 0.003), (torch.float16, 0.0003), (torch.bfloat16, 0.1)):
        W, update, call, value = measured_merge(4, answer, (60, 50), dtype, size, in_words)
        if isinstance(value, str):
            return value
        changed = ((W.float() + update).to(dtype).float() - W.float()).double()
        whole = update.double()
        inner = float((changed * whole).sum())
        right = inner / float(whole.square().sum())
        if abs(value - right) <= 0.005 * abs(right) + 1e-4:
            continue
        error = float((changed - whole).norm() / whole.norm())
        for other, why in (
            (1.0, "nothing is lost before the sum is brought into W's dtype."),
            (error, "that is the error, ‖ΔW − (merged − W)‖ / ‖ΔW‖. Asked for is what is there along ΔW."),
            (1 - error, "1 minus the error is not what is kept: the two don't add up to 1."),
            (
                float(changed.norm() / whole.norm()),
                "that compares the lengths. What points elsewhere counts there, too.",
            ),
            (inner / float(changed.norm() * whole.norm()), "that is the cosine. Divide by ‖ΔW‖² instead."),
        ):
            if abs(value - other) <= 0.005 * abs(other) + 1e-5:
                return f"Exercise 4: not yet: {call} it gives {value:.3g}: {why}"
        return f"Exercise 4: not yet: {call} it gives {value:.3g}. Hint: {hint}"
    return (
        "Exercise 4: right. 1 means that on average nothing is lost, however large the error; where it falls, the "
        "update shrinks, and its gain with it."
    )


def check_10_5(answer: object) -> str:
    """A function added(x, A, B, rows) → what LoRA adds: row i gets B_g A_g x_i with g = rows[i], none where g = −1."""
    hint = "for each adapter that occurs: the rows that use it, their product with its A and B, put back in place."
    if refused := no_function(5, answer, "x, A, B, rows", hint):
        return refused
    for rows in ([1, 0, 1, 2], [-1, 2, 0, -1, 2], [-1, -1]):
        x, A, B = normal((len(rows), 3, IN), (3, 2, IN), (3, OUT, 2))
        call = f"with rows {rows}"
        got, problem = tried(5, answer, call, x.clone(), A.clone(), B.clone(), list(rows))
        if problem:
            return problem
        if not isinstance(got, Tensor) or got.shape != (len(rows), 3, OUT):
            return (
                f"Exercise 5: not yet: {call} the answer is a tensor ({len(rows)}, 3, {OUT}), a row for each row of x; "
                f"got {in_words(got)}."
            )
        each = torch.stack([x @ A[g].T @ B[g].T for g in range(3)])  # (3, rows, 3, OUT)
        right = torch.stack([each[g, i] if g >= 0 else 0 * each[0, i] for i, g in enumerate(rows)])
        if same(got, right):
            continue
        last = torch.stack([each[g, i] for i, g in enumerate(rows)])
        for other, why in (
            (last, "−1 means no adapter. In Python it names the last one, and those rows got it."),
            (each.sum(0), "every row got the sum of all adapters."),
            (each[max(rows)], f"every row got adapter {max(rows)}."),
            (each[rows[0]] if rows[0] >= 0 else last, "every row got the first row's adapter."),
        ):
            if same(got, other):
                return f"Exercise 5: not yet: {call}: {why}"
        return f"Exercise 5: not yet: {call} it is off. Hint: {hint}"
    return (
        "Exercise 5: right. Rows that share an adapter share its product, and no factor is copied; the kernels of "
        "Punica and S-LoRA do this on a GPU in one launch."
    )


def check_10_6(answer: object) -> str:
    """How many adapters of rank 16 fit beside a base in bfloat16, in the memory that is left."""
    numbers = counting.count(MODEL, "all-linear", RANK).parameters
    model = 2 * counting.ARCHITECTURES[MODEL].parameters
    left = MEMORY - CACHE - model
    right = left // (2 * numbers)
    return judge(
        6,
        answer,
        right,
        {
            left // (4 * numbers): "that is with factors in float32. In bfloat16 a number takes two bytes.",
            left // numbers: "that counts one byte a number; bfloat16 has two.",
            (MEMORY - model) // (2 * numbers): "the 4 GB that the cache needs are missing.",
            (MEMORY - CACHE) // (2 * numbers): "the base's own 16 GB are missing.",
            left / (2 * numbers): "a part of an adapter is of no use: round down.",
            MEMORY // model: "that is how many merged models fit.",
        },
        hint=f"base {model:,} bytes; an adapter r · Σ (m + n) = {numbers:,} numbers, of two bytes each.",
        why="Merged, each of them would take the 16 GB of the base again: there would be room for one.",
        tolerance=1e-6,
    )


def _number(value: object) -> int | None:
    """A whole number, None for anything else."""
    number = real(value)
    return int(number) if number is not None and number == int(number) else None
