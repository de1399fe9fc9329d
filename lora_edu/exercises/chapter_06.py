"""Checks for the exercises of chapter 06, the embedding: right, or which step went astray.

Not for the answers themselves: each right and each typical wrong one is worked out here.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A function rows_that_move(tokens, zero, V): rows of ΔW that are not zero after SGD's first step."""
    seen = lambda tokens: len(set(tokens))
    mistakes = {
        "from A = 0 it counts places. A token that stands twice has one row.": lambda tokens, zero, V: (
            len(tokens) if zero == "A" else V
        ),
        "'only those seen' is what A = 0 does. From B = 0 the step changes B, and every row of ΔW is A[t] Bᵀ.": (
            lambda tokens, zero, V: seen(tokens)
        ),
        "all rows is what B = 0 does. From A = 0 only rows of A that were looked up get a gradient.": (
            lambda tokens, zero, V: V
        ),
        "the two starts are exchanged.": lambda tokens, zero, V: V if zero == "A" else seen(tokens),
        "from B = 0 the tokens of the batch move as well.": lambda tokens, zero, V: (
            seen(tokens) if zero == "A" else V - seen(tokens)
        ),
        "from B = 0 A's gradient is zero, but B's is not: after the step B is no longer zero.": (
            lambda tokens, zero, V: seen(tokens) if zero == "A" else 0
        ),
    }
    return judge_function(
        3,
        answer,
        "tokens, zero, V",
        [([3, 7, 3, 0], "A", 20), ([3, 7, 3, 0], "B", 20), ([5, 5, 5], "A", 1000), ([5, 5, 5], "B", 1000)],
        lambda tokens, zero, V: seen(tokens) if zero == "A" else V,
        mistakes,
        hint="which factor gets a gradient in the first step, and which rows of ΔW = s · A Bᵀ does it touch?",
        why="A row of A belongs to one token, B belongs to all of them.",
    )


def check_06_4(answer: object) -> str:
    """A function bytes_a_token(d, r, each): what a forward pass must move for a token, without B."""
    mistakes = {
        "the write is forgotten: the output's d numbers have to go to memory too.": lambda d, r, each: (
            8 + each * (d + r)
        ),
        "the write is forgotten (d numbers), and so is the token's id (8 bytes).": lambda d, r, each: (
            each * (d + r)
        ),
        "nearly: the token's id has to be read too, 8 bytes.": lambda d, r, each: each * (2 * d + r),
        "A's row is forgotten: r more numbers.": lambda d, r, each: 8 + each * 2 * d,
        "that is the number of numbers. Each takes `each` bytes.": lambda d, r, each: 2 * d + r,
        "that is the number of numbers, the id among them. Each takes `each` bytes, the id 8.": lambda d, r, each: (
            2 * d + r + 1
        ),
        "the numbers don't take `each` bytes; the id is right.": lambda d, r, each: 8 + 2 * d + r,
        "the id takes 8 bytes, whatever a number takes.": lambda d, r, each: each * (2 * d + r + 1),
        "B is read once for the whole batch, not once a token: leave it out.": lambda d, r, each: (
            8 + each * (2 * d + r + d * r)
        ),
    }
    return judge_function(
        4,
        answer,
        "d, r, each",
        [(100, 8, 4), (4096, 16, 2), (64, 1, 8)],
        lambda d, r, each: 8 + each * (d + r + d),
        mistakes,
        hint="the id, a row of W, a row of A, and the row that is written.",
        why="V is not in it. At d = 100 and r = 8 in float32 a plain look-up moves 808 bytes, and LoRA adds 4 %.",
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
    """A function idle(r): the share of padding in a product over r, padded to a power of two from 16."""
    padded = lambda r: max(16, 1 << (r - 1).bit_length())
    mistakes = {
        "that is the share that is used. The rest is padding.": lambda r: r / padded(r),
        "that is the padding for each number used; the share is of all R.": lambda r: (padded(r) - r) / r,
        "that is how many numbers are padding; the share is of all R.": lambda r: padded(r) - r,
        "that is R. How much of it is padding?": padded,
        "in per cent that is right; the share is between 0 and 1.": lambda r: (
            100 * (padded(r) - r) / padded(r)
        ),
        "R is at least 16: the tensor cores multiply nothing smaller.": lambda r: (
            1 - r / (1 << (r - 1).bit_length())
        ),
        "R is a power of two, not a multiple of 16: 33 needs 64.": lambda r: 1 - r / (16 * -(-r // 16)),
        "R is 16 only while r fits into it.": lambda r: (16 - r) / 16,
    }
    return judge_function(
        6,
        answer,
        "r",
        [(20,), (3,), (16,), (33,), (64,)],
        lambda r: (padded(r) - r) / padded(r),
        mistakes,
        hint="which power of two holds r, and is it at least 16?",
        why="At r = 8 it is a half, and on the slope of the roofline it costs nothing.",
    )


def check_06_7(answer: object) -> str:
    """A function added_bytes(N, d, r): what LoRA adds to a (d, d) linear layer's forward pass in bfloat16."""
    numbers = lambda N, d, r: 5 * N * d + 4 * N * r + 2 * d * r
    mistakes = {
        "that is the number of numbers. bfloat16 takes 2 bytes each.": numbers,
        "bfloat16 takes 2 bytes a number, not 4.": lambda N, d, r: 4 * numbers(N, d, r),
        "one array of N · d is missing: x read again, up written, and three for out.add_(up).": lambda N, d, r: (
            2 * (numbers(N, d, r) - N * d)
        ),
        "out.add_(up) reads out as well as up, and writes it.": lambda N, d, r: (
            2 * (numbers(N, d, r) - 2 * N * d)
        ),
        "the last operation, out.add_(up), is left out.": lambda N, d, r: 2 * (numbers(N, d, r) - 3 * N * d),
        "s * low reads low and writes it: 2 N r numbers.": lambda N, d, r: 2 * (numbers(N, d, r) - 2 * N * r),
        "A and B have to be read too.": lambda N, d, r: 2 * (numbers(N, d, r) - 2 * d * r),
        "that includes x @ W.T. What does LoRA add to it?": lambda N, d, r: (
            2 * (numbers(N, d, r) + 2 * N * d + d * d)
        ),
        "that is s applied to up, as loralib does it. Here s is applied to low.": lambda N, d, r: (
            2 * (numbers(N, d, r) - 2 * N * r + 2 * N * d)
        ),
        "that is one pass, which keeps all but A and B in registers.": lambda N, d, r: 2 * 2 * d * r,
    }
    return judge_function(
        7,
        answer,
        "N, d, r",
        [(100, 64, 4), (16_384, 4096, 16), (7, 10, 3)],
        lambda N, d, r: 2 * numbers(N, d, r),
        mistakes,
        hint="write down each operation's inputs and result: which are N × d, which N × r, which d × r?",
        why="5 N d + 4 N r + 2 d r numbers. Nearly all of it is five arrays of N × d, for 0.8 % of the operations.",
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


def judge_function(
    k: int,
    answer: object,
    arguments: str,
    tried: Sequence[tuple],
    right: Callable[..., float],
    mistakes: Mapping[str, Callable[..., float]],
    hint: str,
    why: str,
) -> str:
    """What to tell someone who wrote this function for exercise k, from what it gives for some arguments.

    mistakes: diagnosis → the function that someone writes who makes it; it is told from all results together.
    """
    if refused := no_function(k, answer, arguments, hint):
        return refused
    got = []
    for each in tried:
        shown = ", ".join(map(repr, each))
        try:
            given = answer(*each)
        except Exception as error:
            return f"Exercise {k}: not yet: for ({shown}) it raises {type(error).__name__}: {error}"
        try:
            got.append(float(given))
        except (TypeError, ValueError):
            return f"Exercise {k}: not yet: for ({shown}) it returns {given!r}, which is no number."
        if not math.isfinite(got[-1]):
            return f"Exercise {k}: not yet: for ({shown}) it gives {got[-1]}."
    close = lambda one, other: abs(one - other) <= 1e-9 * max(1.0, abs(other))
    agrees = lambda function: all(
        close(value, function(*each)) for value, each in zip(got, tried, strict=True)
    )
    if agrees(right):
        return f"Exercise {k}: right. {why}"
    for diagnosis, wrong in mistakes.items():
        if agrees(wrong):
            return f"Exercise {k}: not yet: {diagnosis}"
    value, each = next((v, e) for v, e in zip(got, tried, strict=True) if not close(v, right(*e)))
    size = "small" if value < right(*each) else "large"
    shown = ", ".join(map(repr, each))
    return f"Exercise {k}: not yet: for ({shown}) it gives {value:.12g}, which is too {size}. Hint: {hint}"


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
