"""Checks for the exercises of chapter 03, fine-tuning deltas: right, or which step of the analysis went astray.

Right and typical wrong answers are computed from the shipped checkpoints and the reader's own text.
"""

from functools import cache

import torch
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.exercises.answers import judge

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
    """The stable rank of the head's ΔW on the rows of tokens that occur."""
    counts = torch.bincount(load_corpus("reference").train, minlength=10_000)
    update = load_checkpoint("reference_seed_0")["head.weight"]
    mistakes = {
        lowrank.stable_rank(
            update
        ): "that is the stable rank of all rows, those of tokens that never occur included.",
        lowrank.stable_rank(
            update[counts == 0]
        ): "those are the rows of tokens that never occur. Take the others.",
        lowrank.effective_rank(
            update[counts > 0]
        ): "that is the effective rank (Roy & Vetterli) of the right rows. The stable rank is ‖ΔW‖_F² / σ₁².",
    }
    return judge(
        4,
        answer,
        lowrank.stable_rank(update[counts > 0]),
        mistakes,
        hint="`counts > 0` picks the rows; `lowrank.stable_rank` takes a matrix.",
        why="The rows that the text never reads had pulled the spectrum into one direction.",
        tolerance=5e-3,
    )


def check_03_5(answer: object) -> str:
    """The amplification factor of a fully tuned ΔW at r = 4."""
    name = "blocks.3.mlp.down.weight"
    W, update = load_checkpoint("base")[name], load_checkpoint("reference_seed_0")[name]
    U, S, Vh = lowrank.svd(update)
    inside = float((U[:, :4].T @ W @ Vh[:4].T).norm())
    own = float(lowrank.svd(W).S[:4].norm())
    mistakes = {
        float(update.norm())
        / inside: "the numerator has all of ΔW, the denominator four directions of W. Cut ΔW to "
        "rank 4 as well.",
        inside / float(S[:4].norm()): "that is its inverse: ‖UᵀWV‖ goes below.",
        float(S[:4].norm())
        / own: "below you have W in its own four strongest directions. Project it on ΔW's.",
        float(
            S[:4].norm() / W.norm()
        ): "below you have all of W. Project it on ΔW's four strongest directions.",
    }
    return judge(
        5,
        answer,
        lowrank.amplification_factor(update, W, 4),
        mistakes,
        hint="‖ΔW₄‖ / ‖U₄ᵀ W V₄‖, with U₄ and V₄ the four strongest directions of ΔW.",
        why="In these directions ΔW is louder than W: tuning raised what the base had hardly used.",
        tolerance=5e-3,
    )
