"""Checks for the exercises of chapter 02, intrinsic dimension: right, or which mistake was made.

Every right and every typical wrong answer is computed here from the exercise's own numbers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edu.exercises.answers import judge, no_function

WISHES = torch.cat([torch.eye(6).repeat_interleave(20, 1), torch.eye(2).repeat_interleave(60, 1)])  # 8 sums
BASE, FULL = 0.20, 0.40
CURVE = {100: 0.24, 300: 0.28, 1_000: 0.33, 3_000: 0.365, 10_000: 0.383, 30_000: 0.39}


def wishes() -> Tensor:
    """Exercise 1's eight wishes for 120 parameters: (8, 120), in each row the parameters that are summed."""
    return WISHES.clone()


def check_02_1(answer: object) -> str:
    """The intrinsic dimension of eight sums, two of which say nothing new."""
    count, size = WISHES.shape
    right = int(torch.linalg.matrix_rank(WISHES))
    return judge(
        1,
        answer,
        right,
        {
            count: "two of the eight rows are sums of the other six: they ask nothing new (if they can be met at all).",
            size - right: "that is the dimension of the space of solutions. Asked for is the smallest random "
            "subspace that meets it.",
            size - count: "that is what eight independent wishes would leave free; count what they ask.",
            size: "that is D, the number of parameters.",
            math.ceil(0.9 * right): "that would be 90 %. Asked for is all of it.",
            right - 1: "one direction short: it leaves one independent wish unmet.",
        },
        hint="how many of the rows are linearly independent?",
        why="The dimension is the rank of what the task asks, whatever the number of parameters.",
        tolerance=1e-6,
    )


def check_02_2(answer: object) -> str:
    """d₉₀ for a 64 × 48 matrix that shall be equal to a given matrix of rank 2."""
    rows, columns, rank = 64, 48, 2
    size = rows * columns
    right = 0.9 * size
    free = rank * (rows + columns - rank)
    return judge(
        2,
        answer,
        right,
        {
            rank: "that is the rank. A random subspace doesn't know that the target is of low rank.",
            free: f"{free} are the degrees of freedom of a matrix of rank {rank}. The subspace is random, it is not "
            "the family of such matrices.",
            0.9
            * free: "nine tenths of the degrees of freedom of rank 2: but the subspace doesn't know of rank 2.",
            rank
            * (
                rows + columns
            ): "that is LoRA's count of numbers. The random subspace knows nothing of rank 2.",
            size: "that is 100 %; d₉₀ is where 90 % of the squared error is gone.",
            math.sqrt(0.9) * size: "the share of the *squared* error is d / D already, no root.",
            0.9 * columns: "that is a rank. Asked for is the dimension of the subspace.",
        },
        hint="every entry is asked for, so a random subspace of d dimensions takes d / D of the squared error away.",
        why="All D entries are asked for, so 0.9 D dimensions are needed: low rank, high dimension.",
        tolerance=2e-3,
    )


def check_02_3(answer: object) -> str:
    """(d₉₀ of the performance, d₉₀ of the gain), as the smallest d in the table that is good enough."""
    hint = (
        "performance is the accuracy itself, the gain is what was added to the base's: two thresholds, then the "
        "smallest d at or above each."
    )
    if answer is None:
        return f"Exercise 3: not attempted yet. Hint: {hint}"
    try:
        pair = [float(each) for each in answer]
    except (TypeError, ValueError):
        pair = []
    if isinstance(answer, str) or len(pair) != 2:
        return f"Exercise 3: the answer is a pair, (d₉₀ of the performance, d₉₀ of the gain); got {answer!r}."
    smallest = lambda level: next((d for d, accuracy in CURVE.items() if accuracy >= level), math.inf)
    performance, gain = 0.9 * FULL, BASE + 0.9 * (FULL - BASE)
    right = [smallest(performance), smallest(gain)]
    if pair == right:
        return (
            "Exercise 3: right. The performance counts what the base could do already, so its d₉₀ is the smaller one; "
            "say which one you mean."
        )
    if pair == right[::-1]:
        problem = "the two are swapped: the gain's threshold is the higher one."
    elif pair[0] == pair[1] == right[0]:
        problem = f"both by the performance. 90 % of the gain is {BASE} + 0.9 · ({FULL} − {BASE}) = {gain:g}."
    elif pair[0] == pair[1] == right[1]:
        problem = f"both by the gain. 90 % of the performance is 0.9 · {FULL} = {performance:g}."
    elif any(each not in CURVE for each in pair):
        problem = "each has to be one of the d in the table, the smallest that is good enough."
    elif pair[0] == right[0]:
        problem = f"the first is right. The gain's threshold is {gain:g}."
    elif pair[1] == right[1]:
        problem = f"the second is right. The performance's threshold is {performance:g}."
    else:
        problem = f"the thresholds are {performance:g} and {gain:g}; take the smallest d at or above each."
    return f"Exercise 3: not yet: {problem}"


def check_02_4(answer: object) -> str:
    """A function (gradient, dial, sign, d) → Pᵀ gradient for the P of section 3, columns of length 1."""
    hint = "each dial collects sign · gradient of its weights, divided by the root of their number."
    if refused := no_function(4, answer, "gradient, dial, sign, d", hint):
        return refused
    generator = torch.Generator().manual_seed(4)
    size, d = 23, 5
    dial = torch.randperm(size, generator=generator) % d
    sign = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    g = torch.randn(size, generator=generator)
    counts = dial.bincount(minlength=d)
    try:
        got = answer(g.clone(), dial.clone(), sign.clone(), d)
    except Exception as error:
        return f"Exercise 4: not yet: the function raises {type(error).__name__}: {error}"
    if not isinstance(got, Tensor | Sequence):
        return f"Exercise 4: not yet: it must return a tensor of d numbers; got {got!r}."
    try:
        got = torch.as_tensor(got).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return f"Exercise 4: not yet: it must return a tensor of d numbers; got {got!r}."
    if tuple(got.shape) != (d,):
        return (
            f"Exercise 4: not yet: Pᵀ g has one number a dial, ({d},); got {tuple(got.shape)}. "
            "Several weights on a dial have to be *added* there."
        )
    g, sign = g.double(), sign.double()
    zeros = torch.zeros(d, dtype=torch.float64)
    sums = zeros.index_add(0, dial, sign * g)
    last = zeros.clone()
    last[dial] = sign * g
    near = lambda other: torch.allclose(got, other, atol=1e-5)
    if near(sums / counts.sqrt()):
        return (
            "Exercise 4: right. The gradient of z is a signed sum over each dial's weights: what pulls them in "
            "opposite directions cancels, and that is what a subspace can't see."
        )
    if near(sums):
        problem = "the length is missing: P's entries are ±1/√n for a dial of n weights."
    elif near(sums / counts):
        problem = (
            "that is the mean. P's entries are ±1/√n, so that a column has length 1; a mean divides by n."
        )
    elif near(sums * counts.sqrt()):
        problem = "the root is upside down: P's entries are ±1/√n."
    elif near(zeros.index_add(0, dial, g) / counts.sqrt()):
        problem = "the signs are missing: a weight that turns backwards has a gradient that counts backwards."
    elif near(last / counts.sqrt()) or near(last):
        problem = (
            "z[dial] = … keeps one weight of each dial and overwrites the others. They have to be added."
        )
    else:
        problem = f"the numbers are off. Hint: {hint}"
    return f"Exercise 4: not yet: {problem}"
