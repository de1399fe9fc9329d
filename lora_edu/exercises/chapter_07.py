"""Checks for the exercises of chapter 07, training with LoRA: right, or which comparison was unfair.

Right and typical wrong answers are computed from the recorded runs and from the exercise's own numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data import load_base_losses, load_sweeps
from lora_edu.exercises.answers import judge, no_function, same

LEVEL = 4.2  # exercise 2: loss on held-out docstrings at which forgetting is compared
BUDGET, BLOCKS, WIDTH, INNER = 80_000, 6, 100, 400  # exercise 4


def tuned_run(method: str, rank: int | None = None) -> dict:
    """The recorded run of seed 0, 200 steps, at the tuned rate: that of the other seeds, or the only one there is."""
    usual = {
        "method": method,
        "rank": rank,
        "text": "reference",
        "targets": "all",
        "steps": 200,
        "scale": 1.0,
    }
    rows = load_sweeps(**usual, patience=None)
    at = lambda row: (row["rate"], row["embedding"])
    (tuned,) = {at(row) for row in rows if row["seed"] > 0} or {at(row) for row in rows}
    return next(row for row in rows if row["seed"] == 0 and at(row) == tuned)


def check_07_1(answer: object) -> str:
    """The smallest rank to which full tuning's ΔW can be cut and still do as well as LoRA trained at r = 2."""
    trained = tuned_run("lora", 2)["test"]
    cut = {int(r): loss for r, loss in tuned_run("full")["truncated"].items() if r.isdigit() and r != "0"}
    right = min(r for r, loss in cut.items() if loss <= trained)
    worse = max(r for r, loss in cut.items() if loss > trained)
    mistakes = {
        2: f"that is the rank that was trained. Cut to 2 the loss is {cut[2]:.2f}, trained at 2 it is {trained:.2f}.",
        1: "the comparison is the wrong way round: a lower loss is better.",
        worse: f"cut to {worse} the loss is {cut[worse]:.2f}, still above the trained one, {trained:.2f}.",
    }
    return judge(
        1,
        answer,
        right,
        {rank: words for rank, words in mistakes.items() if rank != right},
        hint='look for the first r in the row\'s "truncated" whose loss is not above the trained test loss.',
        why=f"A trained rank of 2 is worth a truncated one of {right}, with 1/{right // 2} of the numbers.",
        tolerance=1e-6,
    )


def check_07_2(answer: object) -> str:
    """Nats more that LoRA of rank 64 has lost on code than full tuning, when both stand at LEVEL on docstrings."""
    before = load_base_losses()["reference"]["code validation"]
    full, lora = (tuned_run(*which)["evaluations"] for which in (("full",), ("lora", 64)))
    right = on_code(lora) - on_code(full)
    mistakes = {
        lora[-1]["code"]
        - full[-1]["code"]: "that compares at equal steps, the last of each. One has learnt more "
        "by then, so it may also have forgotten more: compare where both have learnt the same.",
        lora[0]["code"] - full[0]["code"]: "that compares at equal steps, the first evaluation of each. "
        "Find for each run the place where its loss on docstrings is the same.",
        on_code(lora) - before: "that is LoRA's loss against the base. Subtract full tuning's, too.",
        on_code(full) - before: "that is full tuning's loss against the base. Subtract it from LoRA's.",
        -right: "the sign: LoRA's minus full tuning's.",
    }
    return judge(
        2,
        answer,
        right,
        mistakes,
        hint=f"for each run find where the loss on docstrings comes down to {LEVEL:g}, on a straight line "
        "between two evaluations, and read off the loss on code there.",
        why="Both have learnt the same there. Before blaming the method, look at the two learning rates.",
        tolerance=0.01,
    )


def on_code(run: Sequence[dict]) -> float:
    """Loss on code where the loss on docstrings, which falls along the run, comes down to LEVEL."""
    falling = sorted(run, key=lambda each: each["loss"])
    return float(np.interp(LEVEL, [each["loss"] for each in falling], [each["code"] for each in falling]))


def check_07_3(answer: object) -> str:
    """alpha for a program with s = alpha / r, so that one rate carries from r = 8 to 32 as under s ∝ 1 / √r."""
    rank, alpha, wider = 8, 16, 32
    s = alpha / rank
    right = s * (rank / wider) ** 0.5 * wider
    mistakes = {
        alpha: f"alpha unchanged means s = {alpha / wider:g}: with alpha / r the steps shrink too fast.",
        s * wider: f"that keeps s = {s:g}. Between s ∝ 1 / r and s constant stands s ∝ 1 / √r.",
        s * (rank / wider) ** 0.5: "that is s. The program wants alpha = s r.",
        s * wider**0.5: "that is alpha for a program with s = alpha / √r. This one divides by r.",
        alpha * (rank / wider) ** 0.5: "the wrong way round: this makes s even smaller than alpha unchanged.",
    }
    return judge(
        3,
        answer,
        right,
        mistakes,
        hint="s is 2 at r = 8; it should fall as 1 / √r, and the program computes alpha / r.",
        why="s falls from 2 to 1 while r grows fourfold, so alpha doubles.",
        tolerance=1e-6,
    )


def check_07_4(answer: object) -> str:
    """The largest rank with which LoRA on TinyLM's MLP matrices stays within BUDGET numbers."""
    each = WIDTH + INNER
    right = BUDGET // (each * 2 * BLOCKS)
    mistakes = {
        BUDGET // each: "that is the rank for a single matrix. There are two in each of six blocks.",
        BUDGET // (2 * each): "that is the rank for a single block. There are six.",
        BUDGET // (BLOCKS * each): "each block has two such matrices, up and down.",
        right + 1: f"that is rounded up: it takes {(right + 1) * each * 2 * BLOCKS:,} numbers.",
        BUDGET // (2 * BLOCKS * WIDTH): "a matrix of 400 × 100 costs r (400 + 100), not r · 100.",
        BUDGET
        // (
            2 * BLOCKS * 2 * WIDTH
        ): "the MLP is four times as wide inside: r (400 + 100), not r (100 + 100).",
    }
    return judge(
        4,
        answer,
        right,
        mistakes,
        hint="a matrix costs r (out + in); count the matrices.",
        why=f"12 matrices at 500 r: {right * each * 2 * BLOCKS:,} numbers.",
        tolerance=1e-6,
    )


def check_07_5(answer: object) -> str:
    """A function shrink(B, A, rank) → (B, A) of that rank, whose product is as near to BA as can be."""
    hint = "the nearest matrix of lower rank is the truncated SVD of the product BA (chapter 01)."
    if refused := no_function(5, answer, "B, A, rank", hint):
        return refused
    generator = torch.Generator().manual_seed(7)
    B, A = (torch.randn(*each, generator=generator, dtype=torch.float64) for each in ((7, 4), (4, 9)))
    try:
        got = answer(B.clone(), A.clone(), 2)
        small_B, small_A = (torch.as_tensor(each).detach().double() for each in got)
    except (TypeError, ValueError) as error:
        return (
            f"Exercise 5: not yet: shrink must return two matrices, (B, A), and not their product ({error})."
        )
    except Exception as error:
        return f"Exercise 5: not yet: shrink(B, A, 2) raises {type(error).__name__}: {error}"
    if small_B.shape != (7, 2) or small_A.shape != (2, 9):
        shapes = f"{tuple(small_B.shape)} and {tuple(small_A.shape)}"
        return f"Exercise 5: not yet: B must be (out, rank) and A (rank, in), here (7, 2) and (2, 9); got {shapes}."
    update = small_B @ small_A
    if same(update, lowrank.truncate(B @ A, 2)):
        return (
            "Exercise 5: right. No other pair of this rank is nearer to BA, and it does not depend on which of the "
            "many pairs with the same BA you were given."
        )
    if same(update, B[:, :2] @ A[:2]):
        problem = (
            "that keeps the first columns of B and rows of A. Their order means nothing: (BM)(M⁻¹A) is the same "
            "adapter, and this would keep something else of it."
        )
    elif same(update, lowrank.truncate(B, 2) @ lowrank.truncate(A, 2)):
        problem = "that cuts B and A each by itself. What counts is the product: cut BA."
    elif same(update, lowrank.svd(B @ A).U[:, :2] @ lowrank.svd(B @ A).Vh[:2]):
        problem = "the singular values are lost: put S into one of the two factors, or √S into both."
    elif same(update, _with_values(B @ A, 2)):
        problem = "the singular values are in it twice: put S into one of the two factors, or √S into both."
    else:
        problem = f"its product is not the nearest one. Hint: {hint}"
    return f"Exercise 5: not yet: {problem}"


def _with_values(product: Tensor, rank: int) -> Tensor:
    U, S, Vh = lowrank.svd(product)
    return (U[:, :rank] * S[:rank] ** 2) @ Vh[:rank]
