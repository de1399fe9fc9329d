"""Each check of chapter 06 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest
import torch
from torch.nn import functional as F

from lora_edu import exercises

W, A, B = exercises.loralib_factors()
s = 16 / 3


def look_up(tokens, W, A, B, scaling):
    return W[tokens] + scaling * A[tokens] @ B.T


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
    (3, 10_000, "right"),
    (3, 5, "only those seen"),
    (3, 0, "B's is not"),
    (3, 8, "that is r"),
    (3, 9995, "as well"),
    (4, 8 + 4 * (100 + 8 + 100), "right"),
    (4, 8 + 4 * (100 + 8), "the write is forgotten"),
    (4, 4 * (100 + 8 + 100), "id has to be read"),
    (4, 208, "4 bytes each"),
    (4, 808, "A's row"),
    (4, 4 * 10_000 * 108, "all V rows"),
    (4, 4 * 8 * 10_100, "all of A and B"),
    (4, 840 + 4 * 800, "once for the whole batch"),
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
    (6, 0.375, "right"),
    (6, 20 / 32, "share that is used"),
    (6, 0.6, "of all R"),
    (6, 37.5, "per cent"),
    (6, 44 / 64, "32 is enough"),
    (6, "half", "one number"),
    (7, 2 * 4096 * 17 / (8 + 2 * (4096 + 16 + 4096)), "right"),
    (7, 2 * 4096 * 17 / (8 + 2 * (4096 + 16)), "the write is forgotten"),
    (7, 2 * 4096 * 17 / (8 + 4 * (4096 + 16 + 4096)), "2 bytes a number"),
    (7, 2 * 4096 * 17 / (8 + 4 * 4096), "A's row"),
    (7, 4096 * 17 / (8 + 2 * (4096 + 16 + 4096)), "two operations"),
    (7, float("nan"), "not yet"),
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
    """Exercises 1 to 3 on our own layer: the checks' arithmetic is not only arithmetic."""
    from lora_edu.lora import LoRAEmbedding

    layer = LoRAEmbedding(20, 4, 3, 16)
    layer.lora_A.data, layer.lora_B.data = A.T.contiguous(), B
    assert ": right." in check(1)(layer.delta_weight()[7])

    layer = LoRAEmbedding(20, 4, 3, 16, padding_idx=0)
    layer(torch.tensor([[3, 7, 3, 0], [7, 0, 12, 3]])).square().sum().backward()
    assert ": right." in check(2)(int((layer.lora_A.grad != 0).any(dim=1).sum()))

    layer = LoRAEmbedding(10_000, 100, 8, 16)
    layer.lora_A.data, layer.lora_B.data = torch.randn(10_000, 8), torch.zeros(100, 8)
    layer(torch.arange(5)).square().sum().backward()
    layer.lora_B.data -= 0.1 * layer.lora_B.grad
    assert ": right." in check(3)(int((layer.delta_weight() != 0).any(dim=1).sum()))


def test_exercise_8_is_what_the_memory_holds():
    table = torch.arange(60.0).reshape(20, 3)
    assert ": right." in check(8)((table == table.flatten()[7 * 3 + 4]).nonzero()[0])
