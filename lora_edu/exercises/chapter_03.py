"""Checks for the exercises of chapter 03, fine-tuning deltas: right, or which step of the analysis went astray.

Right and typical wrong answers are computed from the shipped checkpoints; a reader's function is tried on small
matrices that it has not seen.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data import load_checkpoint
from lora_edu.exercises.answers import judge, no_function, same

LOSSES = {"base": 5.60, "tuned": 3.60, "truncated": 4.10}  # exercise 2, nats a token


@cache
def rounded_pair() -> tuple[Tensor, Tensor]:
    """Exercise 1: two checkpoints of one matrix in bfloat16, before and after an update of low rank."""
    W = load_checkpoint("base")["blocks.2.mlp.up.weight"]
    update = lowrank.truncate(load_checkpoint("reference_seed_0")["blocks.2.mlp.up.weight"], 5)
    U, _, Vh = lowrank.svd(update)
    update = (U[:, :5] * torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])) @ Vh[:5]
    update *= 0.004 * W.norm() / update.norm()
    return W.bfloat16(), (W + update).bfloat16()


def check_03_1(answer: object) -> str:
    """The rank of the update between two bfloat16 files."""
    before, after = rounded_pair()
    difference = after.float() - before.float()
    S = lowrank.svd(difference).S
    floor = float(lowrank.rounding_floor(before, torch.bfloat16)[0])
    mistakes = {
        lowrank.numerical_rank(
            difference
        ): "that is the rank of update and rounding together, and rounding has full "
        "rank. Which singular values could rounding alone have made?",
        lowrank.rank_for_energy(
            S, 0.9
        ): "that is the rank for 90 % of the energy, but part of that energy is "
        "rounding. Compare the singular values with `lowrank.rounding_floor`.",
        lowrank.rank_for_energy(
            S, 0.99
        ): "that is the rank for 99 % of the energy, but part of that energy is "
        "rounding. Compare the singular values with `lowrank.rounding_floor`.",
        lowrank.stable_rank(
            S
        ): "the stable rank is no count of directions. Count singular values above the floor.",
    }
    return judge(
        1,
        answer,
        float((S > floor).sum()),
        mistakes,
        hint="compare the singular values of after − before with "
        "`lowrank.rounding_floor(before.float(), torch.bfloat16)`.",
        why="Five singular values stand above what rounding alone could make; the rest of the spectrum is rounding.",
    )


def check_03_2(answer: object) -> str:
    """The share of the tuning gain that a truncated update keeps."""
    before, after, cut = (LOSSES[name] for name in ("base", "tuned", "truncated"))
    mistakes = {
        after
        / cut: "that is a ratio of losses. It is near 1 for *any* update, even none: subtract the base first.",
        cut / before: "that is a ratio of losses. Not tuning at all would score 1: subtract the base first.",
        1 - (before - cut) / (before - after): "that is the share that is lost.",
        (before - cut)
        / before: "measure the gain against the full gain, before − after, not against the loss.",
        (cut - after): "that is what is lost in nats. The question asks for a share of the gain.",
        (before - cut): "that is the gain in nats. Divide by the gain of the full update.",
    }
    return judge(
        2,
        answer,
        (before - cut) / (before - after),
        mistakes,
        hint="what is the gain of the full update, and how much of it does the truncated one reach?",
        why="1.50 of 2.00 nats: a share of the gain starts from the base, which scores 0.",
    )


def check_03_3(answer: object) -> str:
    """By how much two seeds' 20 strongest directions overlap beyond chance."""
    name = "blocks.3.attention.value.weight"
    first, second = (load_checkpoint(f"reference_seed_{seed}")[name] for seed in (0, 1))
    phi = lowrank.subspace_similarity(first, second, 20, 20)
    chance = lowrank.chance_similarity(20, 20, 100)
    left = lowrank.subspace_similarity(first, second, 20, 20, side="left")
    mistakes = {
        phi: "that is φ itself. Two random subspaces of 20 directions in 100 dimensions overlap too: subtract that.",
        left - chance: "those are the left directions, of the outputs. The exercise asks for the right ones.",
        phi - 20 * 20 / 100**2: "chance is max(i, j) / d, not i · j / d².",
        (phi - chance)
        / (1 - chance): "that is the excess as a share of what is possible: a good number, but the "
        "exercise asks for φ minus chance.",
        phi / chance: "that is how many times chance it is. The exercise asks for the difference.",
    }
    return judge(
        3,
        answer,
        phi - chance,
        mistakes,
        hint="`lowrank.subspace_similarity` of the two ΔW, minus max(i, j) / d.",
        why=f"φ(20, 20) is {phi:.2f}, and {chance:.2f} of it chance would give as well.",
        tolerance=5e-3,
    )


def check_03_4(answer: object) -> str:
    """A function stable_rank_of_rows(update, counts, least): rows read often enough, the common row taken off."""
    hint = (
        "`update[counts >= least]` picks the rows; subtract their mean row; then `lowrank.stable_rank`, which is "
        "‖·‖²_F / σ₁²."
    )
    if refused := no_function(4, answer, "update, counts, least", hint):
        return refused
    generator = torch.Generator().manual_seed(4)
    update = torch.randn(60, 8, generator=generator) * torch.linspace(2, 0.2, 8)
    update += 1.5 * torch.randn(8, generator=generator)  # a row that all have in common
    counts = torch.arange(60) % 6
    update[counts < 2] *= 3  # what nobody reads moved most
    for least in (3, 1):
        got = _number(4, answer, update.clone(), counts.clone(), least)
        if isinstance(got, str):
            return got
        rows = update[counts >= least]
        centred = rows - rows.mean(dim=0)
        S = lowrank.svd(centred).S
        mistakes = {
            lowrank.stable_rank(
                rows
            ): "the row that all rows have in common is still in it: subtract the mean row.",
            lowrank.stable_rank(
                rows - update.mean(dim=0)
            ): "that is the mean of all rows. Take the mean of the rows that stay.",
            lowrank.stable_rank(
                update - update.mean(dim=0)
            ): "no row was left out: `update[counts >= least]`.",
            lowrank.stable_rank(update): "no row was left out, and the mean row is still in it.",
            lowrank.stable_rank(
                update[counts > least] - update[counts > least].mean(dim=0)
            ): "`counts > least` leaves out the tokens that occur exactly `least` times; they stay (≥).",
            lowrank.stable_rank(
                update[counts < least] - update[counts < least].mean(dim=0)
            ): "those are the rows to leave out. Take the others.",
            lowrank.stable_rank(
                rows - rows.mean(dim=1, keepdim=True)
            ): "that is each row's own mean. The common row is the mean over the rows, `mean(dim=0)`.",
            lowrank.effective_rank(
                S
            ): "that is the effective rank (Roy & Vetterli). The stable rank is ‖·‖²_F / σ₁².",
            float(S.square().sum().sqrt() / S[0]): "the squares are missing: ‖·‖²_F / σ₁².",
        }
        if said := _judged(4, got, lowrank.stable_rank(S), mistakes, hint):
            return said
    return "Exercise 4: right. Rows that nobody reads, and a row common to all, had pulled it into one direction."


def check_03_5(answer: object) -> str:
    """A function amplification(W, dW, r) from singular vectors: how much louder ΔW is than W where ΔW is loudest."""
    hint = "‖ΔW_r‖ / ‖U_rᵀ W V_r‖, with U_r and V_r the r strongest directions of ΔW; of its Vh take rows."
    if refused := no_function(5, answer, "W, dW, r", hint):
        return refused
    generator = torch.Generator().manual_seed(5)
    for rows, columns, r in ((12, 9, 3), (7, 10, 2)):
        W, dW = (torch.randn(rows, columns, generator=generator) for _ in range(2))
        got = _number(5, answer, W.clone(), dW.clone(), r)
        if isinstance(got, str):
            return got
        U, S, Vh = lowrank.svd(dW)
        cut, inside = float(S[:r].norm()), float((U[:, :r].T @ W @ Vh[:r].T).norm())
        mistakes = {
            float(dW.norm())
            / inside: "the numerator has all of ΔW, the denominator r directions of W. Cut ΔW to "
            "rank r as well.",
            inside / cut: "that is its inverse: ‖U_rᵀ W V_r‖ goes below.",
            cut
            / float(
                lowrank.svd(W).S[:r].norm()
            ): "below you have W in its own r strongest directions. Project it on ΔW's.",
            cut / float(W.norm()): "below you have all of W. Project it on ΔW's r strongest directions.",
            (cut / inside) ** 2: "that is its square: the norms, not their squares.",
            float(S[0])
            / float(torch.linalg.matrix_norm(U[:, :r].T @ W @ Vh[:r].T, 2)): "those are spectral norms. "
            "The paper takes Frobenius norms.",
        }
        if said := _judged(5, got, lowrank.amplification_factor(dW, W, r), mistakes, hint):
            return said
    return (
        "Exercise 5: right. And a factor of 3 says little by itself: give it a ΔW with random directions, and see what "
        "chance makes."
    )


def check_03_6(answer: object) -> str:
    """A function cut_one_kind(delta, kind, r): the matrices of one kind cut to rank r, all else as it is."""
    hint = (
        "a matrix has `dW.dim() == 2`; its kind is the last part but one of its name, `name.split('.')[-2]`."
    )
    if refused := no_function(6, answer, "delta, kind, r", hint):
        return refused
    generator = torch.Generator().manual_seed(6)
    names = ["blocks.0.mlp.up", "blocks.0.attention.output", "blocks.1.mlp.up", "blocks.1.attention.output"]
    delta = {f"{name}.weight": torch.randn(6, 5, generator=generator) for name in [*names, "head", "update"]}
    delta |= {"blocks.1.mlp.up.bias": torch.randn(6, generator=generator)}
    before = {name: dW.clone() for name, dW in delta.items()}
    try:
        got = answer(delta, "up", 2)
    except Exception as error:
        return f"Exercise 6: not yet: for a state dict of {len(delta)} tensors it raises {error}"
    if not isinstance(got, Mapping):
        return f"Exercise 6: not yet: it returns {got!r}; a dictionary, name → tensor, is asked for."
    if changed := [name for name in before if not delta[name].equal(before[name])]:
        return f"Exercise 6: not yet: it changes the ΔW that it was given ({changed[0]}). Build a new dictionary."
    if missing := [name for name in before if name not in got]:
        return f"Exercise 6: not yet: {missing[0]} is not in the result. What is not cut stays as it is."
    for name, dW in before.items():
        wanted = name.split(".")[-2] == "up" and dW.dim() == 2
        if not isinstance(got[name], Tensor) or got[name].shape != dW.shape:
            return f"Exercise 6: not yet: {name} has another shape than before, {tuple(dW.shape)}."
        if wanted and same(got[name], dW):
            return f"Exercise 6: not yet: {name} is of the kind 'up' and was not cut."
        if wanted and not torch.allclose(got[name], lowrank.truncate(dW, 2), atol=1e-5):
            rank = lowrank.numerical_rank(got[name], 1e-4)
            return f"Exercise 6: not yet: {name} is not the nearest matrix of rank 2 (yours has rank {rank})."
        if not wanted and not same(got[name], dW):
            return (
                f"Exercise 6: not yet: {name} was changed, and it is not of the kind 'up'. Compare the kind with ==: "
                "other names may hold the same letters, and a bias is no matrix."
            )
    return "Exercise 6: right. With it you can ask of any model which kind of matrix can stand a cut."


def _number(k: int, answer: object, *arguments) -> float | str:
    """What a reader's function returns, or what to tell them if that is no number."""
    try:
        got = answer(*arguments)
    except Exception as error:
        shapes = ", ".join(str(tuple(each.shape) if isinstance(each, Tensor) else each) for each in arguments)
        return f"Exercise {k}: not yet: for ({shapes}) it raises {error}"
    try:
        return float(got)
    except (TypeError, ValueError, RuntimeError):
        return (
            f"Exercise {k}: not yet: it returns {got!r}; one number is asked for. Does it return its result?"
        )


def _judged(k: int, got: float, right: float, mistakes: Mapping[float, str], hint: str) -> str | None:
    """What to tell someone whose function gave this number, or None where it is right."""
    if abs(got - right) <= 1e-3 * right:
        return None
    for wrong, diagnosis in mistakes.items():
        if abs(got - wrong) <= 1e-3 * abs(wrong):
            return f"Exercise {k}: not yet: {diagnosis}"
    return (
        f"Exercise {k}: not yet: for a small example it gives {got:.4g} in place of {right:.4g}. Hint: {hint}"
    )
