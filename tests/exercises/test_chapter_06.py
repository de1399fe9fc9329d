"""Each check of chapter 06 says 'right' to the right answer and names the mistake in the typical wrong one."""

import math

import pytest
import torch
from torch.nn import functional as F

from lora_edu.counting.traffic import linear_bytes, look_up_bytes
from lora_edu.exercises import chapter_06 as exercises

W, A, B = exercises.loralib_factors()
s = 16 / 3


def look_up(tokens, W, A, B, scaling):
    return W[tokens] + scaling * A[tokens] @ B.T


def simulated(tokens, zero, V):
    """Exercise 3 by doing it: one step of SGD on random numbers."""
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(side, 2, generator=generator) for side in (V, 6))
    A, B = (A * (zero == "B")).requires_grad_(), (B * (zero == "A")).requires_grad_()
    G = torch.randn(len(tokens), 6, generator=generator)
    ((A[torch.tensor(tokens)] @ B.T) * G).sum().backward()
    with torch.no_grad():
        return int(((A - 0.1 * A.grad) @ (B - 0.1 * B.grad).T).ne(0).any(dim=1).sum())


def padded(r):
    return max(16, 2 ** math.ceil(math.log2(r)))


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, s * (B @ A).T[7], "right"),
    (1, (s * (B @ A).T[7]).tolist(), "right"),
    (1, s * A[:, [7]].T @ B.T, "right"),
    (1, (B @ A).T[7], "s is forgotten"),
    (1, 16 * (B @ A).T[7], "s = alpha / r"),
    (1, W[7] + s * (B @ A).T[7], "W + ΔW"),
    (1, s * A.reshape(20, 3)[7] @ B.T, "loralib and ours are mixed"),
    (1, s * A[:, 7] @ B.reshape(3, 4), "not by transposing"),
    (1, s * B @ A, "a token a column"),
    (1, s * (B @ A).T, "all of ΔW"),
    (1, A[:, 7], "d = 4 numbers"),
    (1, torch.zeros(4), "Hint"),
    (1, "eight", "got 'eight'"),
    (2, 3, "right"),
    (2, 8, "counts places"),
    (2, 6, "repeats are counted"),
    (2, 4, "padding row"),
    (2, 0, "its gradient is not"),
    (2, 20, "looked up"),
    (3, lambda tokens, zero, V: len(set(tokens)) if zero == "A" else V, "right"),
    (3, simulated, "right"),
    (3, lambda tokens, zero, V: len(tokens) if zero == "A" else V, "counts places"),
    (3, lambda tokens, zero, V: len(set(tokens)), "only those seen"),
    (3, lambda tokens, zero, V: V, "all rows is what B = 0 does"),
    (3, lambda tokens, zero, V: V if zero == "A" else len(set(tokens)), "exchanged"),
    (3, lambda tokens, zero, V: len(set(tokens)) if zero == "A" else V - len(set(tokens)), "as well"),
    (3, lambda tokens, zero, V: len(set(tokens)) if zero == "A" else 0, "B's is not"),
    (3, lambda tokens, zero, V: 7, "too large"),
    (3, lambda tokens: 3, "raises TypeError"),
    (3, 20, "is a function"),
    (4, lambda d, r, each: 8 + each * (2 * d + r), "right"),
    (4, lambda d, r, each: 8 + each * (d + r), "the write is forgotten"),
    (4, lambda d, r, each: each * (d + r + d), "id has to be read"),
    (4, lambda d, r, each: 2 * d + r, "`each` bytes"),
    (4, lambda d, r, each: 8 + each * 2 * d, "A's row"),
    (4, lambda d, r, each: each * (1 + 2 * d + r), "whatever a number takes"),
    (4, lambda d, r, each: 8 + each * (2 * d + r + d * r), "once for the whole batch"),
    (4, lambda d, r, each: each * 10_000 * (d + r), "too large"),
    (4, lambda d, r, each: float("nan"), "it gives nan"),
    (4, lambda d, r, each: None, "is no number"),
    (4, 840, "is a function"),
    (5, look_up, "right"),
    (5, lambda t, W, A, B, s: F.embedding(t, W) + s * F.linear(F.embedding(t, A), B), "right"),
    (5, lambda t, W, A, B, s: (W + s * A @ B.T)[t], "Look up first"),
    (5, lambda t, W, A, B, s: W[t] + s * F.one_hot(t, len(W)).float() @ A @ B.T, "Look up first"),
    (5, lambda t, W, A, B, s: W[t] + A[t] @ B.T, "s is forgotten"),
    (5, lambda t, W, A, B, s: s * A[t] @ B.T, "add W[tokens]"),
    (5, lambda t, W, A, B, s: s * (W[t] + A[t] @ B.T), "W is scaled too"),
    (5, lambda t, W, A, B, s: W[t] + s * A[t] @ B, "raises"),
    (5, lambda t, W, A, B, s: W[t] - s * A[t] @ B.T, "values differ"),
    (5, lambda t, W, A, B, s: None, "return its result"),
    (5, lambda t, W, A, B, s: W, "(2, 5, 6)"),
    (5, 8, "is a function"),
    (6, lambda r: 1 - r / padded(r), "right"),
    (6, lambda r: r / padded(r), "share that is used"),
    (6, lambda r: padded(r) / r - 1, "of all R"),
    (6, lambda r: padded(r) - r, "how many numbers"),
    (6, lambda r: 100 * (1 - r / padded(r)), "per cent"),
    (6, lambda r: 1 - r / (16 * math.ceil(r / 16)), "33 needs 64"),
    (6, lambda r: 1 - r / 2 ** math.ceil(math.log2(r)), "at least 16"),
    (6, lambda r: 1 - r / 64, "too large"),
    (6, 0.375, "is a function"),
    (7, lambda N, d, r: 2 * (5 * N * d + 4 * N * r + 2 * d * r), "right"),
    (7, lambda N, d, r: 5 * N * d + 4 * N * r + 2 * d * r, "2 bytes each"),
    (7, lambda N, d, r: 4 * (5 * N * d + 4 * N * r + 2 * d * r), "not 4"),
    (7, lambda N, d, r: 2 * (4 * N * d + 4 * N * r + 2 * d * r), "one array of N · d is missing"),
    (7, lambda N, d, r: 2 * (2 * N * d + 4 * N * r + 2 * d * r), "left out"),
    (7, lambda N, d, r: 2 * (5 * N * d + 2 * N * r + 2 * d * r), "s * low"),
    (7, lambda N, d, r: 2 * (5 * N * d + 4 * N * r), "A and B"),
    (7, lambda N, d, r: 2 * (7 * N * d + 4 * N * r + 2 * d * r + d * d), "x @ W.T"),
    (7, lambda N, d, r: 2 * (7 * N * d + 2 * N * r + 2 * d * r), "as loralib does it"),
    (7, lambda N, d, r: 2 * N * d, "too small"),
    (7, 8, "is a function"),
    (8, (8, 1), "right"),
    (8, [8, 1], "right"),
    (8, torch.tensor([8, 1]), "right"),
    (8, (7, 4), "What lies behind"),
    (8, (8, 0), "k = 3"),
    (8, (11, 1), "not rows"),
    (8, (1, 8), "(column, row)"),
    (8, (2, 2), "divide by 3"),
    (8, 25, "a pair"),
]


def check(number):
    return getattr(exercises, f"check_06_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == (": right." in said)
    assert reply in said


@pytest.mark.parametrize("number", range(1, 9))
def test_an_open_exercise_gets_a_hint(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")


def test_the_answers_are_what_a_layer_does():
    """Exercises 1 and 2 on our own layer: the checks' arithmetic is not only arithmetic."""
    from lora_edu.lora import LoRAEmbedding

    layer = LoRAEmbedding(20, 4, 3, 16)
    layer.lora_A.data, layer.lora_B.data = A.T.contiguous(), B
    assert ": right." in check(1)(layer.delta_weight()[7])

    layer = LoRAEmbedding(20, 4, 3, 16, padding_idx=0)
    layer(torch.tensor([[3, 7, 3, 0], [7, 0, 12, 3]])).square().sum().backward()
    assert ": right." in check(2)(int((layer.lora_A.grad != 0).any(dim=1).sum()))


def test_exercises_4_and_7_are_the_bytes_that_the_chapter_counts():
    N, d, r = 512, 64, 8
    per_token = lambda d, r, each: (look_up_bytes(1, d, r, each)["one pass"]) - each * d * r
    assert ": right." in check(4)(per_token)
    linear = lambda N, d, r: (lambda moved: moved["PyTorch, ours"] - moved["plain"])(linear_bytes(N, d, d, r))
    assert linear(N, d, r) > 0 and ": right." in check(7)(linear)


def test_exercise_8_is_what_the_memory_holds():
    table = torch.arange(60.0).reshape(20, 3)
    assert ": right." in check(8)((table == table.flatten()[7 * 3 + 4]).nonzero()[0])
