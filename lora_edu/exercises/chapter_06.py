"""Checks for the exercises of chapter 06, the embedding: right, or which step went astray.

Not for the answers themselves: each right and each typical wrong one is worked out here.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu import counting
from lora_edu.exercises.answers import judge, no_function

ALPHA, TOKEN = 16, 7  # of exercise 1
PLACES, PADDING = [[3, 7, 3, 0], [7, 0, 12, 3]], 0  # of exercise 2


@functools.cache
def loralib_factors() -> tuple[Tensor, Tensor, Tensor]:
    """(W, lora_A, lora_B) of an embedding as loralib stores them: (20, 4), (3, 20) and (4, 3)."""
    generator = torch.Generator().manual_seed(6)
    W, lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in ((20, 4), (3, 20), (4, 3)))
    return W, lora_A, lora_B


def check_06_1(answer: object) -> str:
    """Row 7 of ΔW from loralib's lora_A and lora_B, alpha = 16."""
    if answer is None:
        return (
            "Exercise 1: not attempted yet. Hint: ΔW = s · (BA)ᵀ with s = alpha / r. Which part of lora_A "
            "belongs to one token?"
        )
    W, A, B = loralib_factors()
    right = ALPHA / 3 * (B @ A[:, TOKEN])
    try:
        given = torch.as_tensor(answer, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        return f"Exercise 1: the answer is a tensor of 4 numbers; got {answer!r}."
    if given.shape == (1, 4) or given.shape == (4, 1):
        given = given.flatten()
    if given.shape == (20, 4) and torch.allclose(given, ALPHA / 3 * (B @ A).T, atol=1e-4):
        return "Exercise 1: not yet: that is all of ΔW. Take the row of token 7."
    if given.shape == (4, 20):
        return "Exercise 1: not yet: BA is (d, V), with a token a column. The table has a token a row: transpose."
    if given.shape != (4,):
        return f"Exercise 1: not yet: a row of ΔW has d = 4 numbers; got the shape {tuple(given.shape)}."
    mistakes = {
        "s is forgotten: multiply by alpha / r = 16 / 3.": B @ A[:, TOKEN],
        "that is alpha · (BA)ᵀ. The factor is s = alpha / r, so that r can change without the size.": ALPHA
        * (B @ A[:, TOKEN]),
        "that is W + ΔW, what a look-up gives. Leave W's row out.": W[TOKEN] + right,
        "the shapes of loralib and ours are mixed: reshaping (3, 20) to (20, 3) is no transposing. The column "
        "lora_A[:, 7] is the token's.": ALPHA / 3 * (A.reshape(20, 3)[TOKEN] @ B.T),
        "lora_B's shape (4, 3) was changed by reshaping, not by transposing.": ALPHA
        / 3
        * (A[:, TOKEN] @ B.reshape(3, 4)),
    }
    if torch.allclose(given, right, atol=1e-4):
        return (
            "Exercise 1: right. Column 7 of loralib's lora_A is row 7 of ours; r numbers make the whole row."
        )
    for diagnosis, wrong in mistakes.items():
        if torch.allclose(given, wrong, atol=1e-4):
            return f"Exercise 1: not yet: {diagnosis}"
    return "Exercise 1: not yet. Hint: s · lora_B @ (the column of lora_A that belongs to token 7)."


def check_06_2(answer: object) -> str:
    """How many rows of a fresh lora_A get a gradient that is not zero."""
    flat = [token for row in PLACES for token in row]
    different = set(flat)
    mistakes = {
        len(flat): "that counts places. A token that stands twice has one row; its gradients add up there.",
        len(flat) - flat.count(PADDING): "the padding is rightly left out, but repeats are counted: a token "
        "has one row.",
        len(different): "that counts the padding row. Row `padding_idx` gets no gradient.",
        0: "A is zero, but its gradient is not: it is s · Σ G B, and B is random.",
        20: "only rows that were looked up get a gradient. That is what starting A at zero is for.",
    }
    return judge(
        2,
        answer,
        len(different - {PADDING}),
        mistakes,
        hint="which different tokens stand in the batch, and which of them is the padding?",
        why="Tokens 3, 7 and 12, each once, however often they occur.",
        tolerance=1e-9,
    )


def check_06_3(answer: object) -> str:
    """Rows of ΔW that move in the first step of random A, zero B, with 5 different tokens in the batch."""
    mistakes = {
        5: "only those seen is what zero A and random B does. Here the step changes B, and every row of ΔW is "
        "A[t] Bᵀ.",
        0: "A's gradient is zero while B is, but B's is not: after the step B is no longer zero.",
        8: "that is r. How many rows does A Bᵀ have that are not zero once B is not?",
        10_000 - 5: "the tokens of the batch move as well.",
        100: "that is d, the number of columns.",
    }
    return judge(
        3,
        answer,
        10_000,
        mistakes,
        hint="which factor gets a gradient in the first step, and which rows of ΔW = s · A Bᵀ does it touch?",
        why="B belongs to all tokens. A step on five moves all 10 000, the others in random directions.",
        tolerance=1e-9,
    )


def check_06_4(answer: object) -> str:
    """Bytes a token that a forward pass must move: V = 10 000, d = 100, r = 8, float32, int64 ids."""
    d, r, number, identity = 100, 8, 4, 8
    right = identity + number * (d + r + d)
    everything = number * counting.lora_parameters(10_000, d, r)
    mistakes = {
        number * (d + r)
        + identity: "the write is forgotten: the output's d numbers have to go to memory too.",
        number * (d + r): "the write is forgotten (d numbers), and so is the token's id (8 bytes).",
        number * (d + r + d): "nearly: the token's id has to be read too, 8 bytes.",
        number * (d + d) + identity: "A's row is forgotten: r more numbers.",
        d + r + d: "that is the number of numbers. float32 takes 4 bytes each.",
        d + r + d + 1: "that is the number of numbers. float32 takes 4 bytes each, the id 8.",
        number * 10_000 * d: "that is all V rows of W. A look-up reads one.",
        number * 10_000 * (d + r): "that is all V rows. A look-up reads one row of W and one of A.",
        everything: "that is all of A and B. A look-up reads one row of A; B is shared by the batch.",
        right
        + number * r * d: "B is read once for the whole batch, not once a token: leave it out, as the task "
        "says.",
    }
    return judge(
        4,
        answer,
        right,
        mistakes,
        hint="the id, a row of W, a row of A, and the row that is written.",
        why=f"8 + 4 · (100 + 8 + 100). A plain look-up moves {identity + number * 2 * d}: LoRA adds 4 %, for "
        "any vocabulary.",
        tolerance=1e-9,
    )


def check_06_5(answer: object) -> str:
    """A function look_up(tokens, W, lora_A, lora_B, scaling) in our layout, without building the table."""
    hint = "W[tokens] and lora_A[tokens] are rows; B's transpose turns r numbers into d."
    if refused := no_function(5, answer, "tokens, W, lora_A, lora_B, scaling", hint):
        return refused
    generator = torch.Generator().manual_seed(0)
    V, d, r, scaling = 5000, 6, 3, 2.5
    tokens = torch.randint(V, (2, 5), generator=generator)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((V, d), (V, r), (d, r)))
    try:
        with _Largest() as largest:
            got = answer(tokens, W, A, B, scaling)
    except Exception as error:
        return f"Exercise 5: not yet: for W (5000, 6), lora_A (5000, 3), lora_B (6, 3) it raises {error}"
    if not isinstance(got, Tensor):
        return f"Exercise 5: not yet: it returns {got!r}. Does it return its result?"
    update = A[tokens] @ B.T
    right = W[tokens] + scaling * update
    if got.shape != right.shape:
        return f"Exercise 5: not yet: for tokens (2, 5) the result is (2, 5, 6); got {tuple(got.shape)}."
    mistakes = {
        "s is forgotten.": W[tokens] + update,
        "that is ΔW's part alone: add W[tokens].": scaling * update,
        "W is scaled too: s belongs to the update only.": scaling * (W[tokens] + update),
    }
    for diagnosis, wrong in mistakes.items():
        if torch.allclose(got, wrong, atol=1e-4):
            return f"Exercise 5: not yet: {diagnosis}"
    if not torch.allclose(got, right, atol=1e-4):
        return f"Exercise 5: not yet: the values differ from W[t] + s · A[t] Bᵀ. Hint: {hint}"
    if largest.numbers >= V:
        return (
            f"Exercise 5: not yet: the values are right, but on the way a tensor of {largest.numbers} numbers was "
            "made, for 10 tokens. Look up first, multiply afterwards."
        )
    return "Exercise 5: right. It reads r + d numbers a token, whatever V is."


def check_06_6(answer: object) -> str:
    """Share of padding in a product over r = 20, padded to a power of two from 16."""
    mistakes = {
        20 / 32: "that is the share that is used. The rest is padding.",
        12 / 20: "that is the padding for each number used; the share is of all R.",
        12: "that is how many numbers are padding; the share is of all R = 32.",
        32: "that is R. How much of it is padding?",
        37.5: "in per cent that is right; the share is between 0 and 1.",
        12 / 16: "R is 32, not 16: the block has to hold all 20.",
        44 / 64: "that pads to 64; 32 is enough.",
    }
    return judge(
        6,
        answer,
        12 / 32,
        mistakes,
        hint="which power of two holds 20?",
        why="12 of 32. Below r = 16 it is more: at r = 8 a half, and on the slope of the roofline it costs nothing.",
        tolerance=1e-6,
    )


def check_06_7(answer: object) -> str:
    """Operations a byte of a look-up in one pass: d = 4096, r = 16, bfloat16, ids of 8 bytes, without B."""
    d, r = 4096, 16
    operations, numbers = 2 * d * (r + 1), d + r + d
    mistakes = {
        operations / (8 + 2 * (d + r)): "the write is forgotten: the output's d numbers go to memory too.",
        operations / (8 + 4 * numbers): "bfloat16 takes 2 bytes a number, not 4.",
        operations / (8 + numbers): "that is operations a number. bfloat16 takes 2 bytes each.",
        operations / (8 + 2 * 2 * d): "A's row is forgotten: r more numbers.",
        operations / (2 * numbers): "nearly: the token's id has to be read too, 8 bytes.",
        (8 + 2 * numbers) / operations: "that is bytes for each operation: turn it round.",
        operations / 2 / (8 + 2 * numbers): "a multiplication and an addition are two operations.",
        operations: "that is the operations a token. Divide by the bytes it moves.",
    }
    return judge(
        7,
        answer,
        operations / (8 + 2 * numbers),
        mistakes,
        hint="the bytes: the id, a row of W, a row of A, and the row that is written.",
        why="About r / 2. An H100's ridge, by its published figures, is at 295: bytes are all that counts.",
        tolerance=1e-4,
    )


def check_06_8(answer: object) -> str:
    """The entry of A, (V, 3), that lies 4 places behind the beginning of row 7."""
    if answer is None:
        return "Exercise 8: not attempted yet. Hint: in memory row 8 begins where row 7 ends."
    try:
        row, column = (int(each) for each in answer)
    except (TypeError, ValueError):
        return f"Exercise 8: the answer is a pair (row, column); got {answer!r}."
    mistakes = {
        (7, 4): "row 7 has columns 0, 1 and 2. What lies behind them?",
        (8, 4): "row 8 has columns 0, 1 and 2 too.",
        (1, 8): "that is (column, row).",
        (8, 0): "that is k = 3, the first number behind the row.",
        (11, 0): "that goes 4 rows on. k counts numbers, not rows.",
        (11, 1): "that goes 4 rows on. k counts numbers, not rows.",
        (7, 1): "the address doesn't wrap round within the row; it goes on into the next.",
    }
    if (row, column) == divmod(7 * 3 + 4, 3):
        return "Exercise 8: right. The next token's second coordinate, and nothing says that it is wrong."
    if diagnosis := mistakes.get((row, column)):
        return f"Exercise 8: not yet: {diagnosis}"
    return f"Exercise 8: not yet: ({row}, {column}). Hint: the numbers lie at 7 · 3 + k; divide by 3."


class _Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that an operation really made (no view)."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            inputs = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
            if out.untyped_storage().data_ptr() not in inputs:
                self.numbers = max(self.numbers, out.numel())
        return out
