"""Each check of chapter 05 says 'right' to the right answer and names the mistake in the typical wrong one."""

import math

import pytest
import torch

from lora_edu.exercises import chapter_05
from lora_edu.lora import LoRALinear


def by_autograd(G, A, B, s):
    A, B = A.requires_grad_(True), B.requires_grad_(True)
    (s * B @ A * G).sum().backward()
    return A.grad, B.grad


def widened(new_A, new_B=lambda *shape: torch.zeros(*shape), alpha=lambda alpha, r, rank: alpha * rank / r):
    """An answer to exercise 2 that appends these rows and columns."""

    def widen(A, B, given, rank):
        r, more = A.shape[0], rank - A.shape[0]
        wide_A = torch.cat([A, new_A(more, A.shape[1])])
        return wide_A, torch.cat([B, new_B(B.shape[0], more)], 1), alpha(given, r, rank)

    return widen


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def split_in_copies(A, B, alpha, rank):
    """The same ΔW from copies of the last direction, each with its share of B."""
    r, copies = A.shape[0], rank - A.shape[0] + 1
    wide_A = torch.cat([A[:-1], A[-1:].repeat(copies, 1)])
    return wide_A, torch.cat([B[:, :-1], B[:, -1:].repeat(1, copies) / copies], 1), alpha * rank / r


def same_run(c, optimiser):
    return (c**-0.5 if optimiser == "adam" else 1 / c), c**-0.5


def lost(W, update):
    merged = (W.float() + update).to(W.dtype)
    return float((update - (merged.float() - W.float())).norm() / update.norm())


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, lambda G, A, B, s: (s * B.T @ G, s * G @ A.T), "right"),
    (1, by_autograd, "right"),
    (1, lambda G, A, B, s: (s * G @ A.T, s * B.T @ G), "swapped"),
    (1, lambda G, A, B, s: (B.T @ G, G @ A.T), "s is lost"),
    (1, lambda G, A, B, s: (s**2 * B.T @ G, s**2 * G @ A.T), "has s once"),
    (1, lambda G, A, B, s: (-s * B.T @ G, -s * G @ A.T), "the sign"),
    (1, lambda G, A, B, s: (s * B.T @ G, s * A @ G.T), "B's own shape, 6 × 2; got 2 × 6"),
    (1, lambda G, A, B, s: (0 * A, s * G @ A.T), "the gradient of A is not zero"),  # as at the first step
    (1, lambda G, A, B, s: (0 * A, 0 * B), "the gradient of B is not zero"),
    (1, lambda G, A, B, s: (s * A, s * G @ A.T), "that gradient is zero"),
    (1, lambda G, A, B, s: (s * B.T @ G, s * G @ A.T + 1), "the gradient of B is off"),
    (1, lambda G, A, B, s: s * B.T @ G, "must return two matrices"),
    (1, lambda G, A, B, s: (G @ A, 0), "raises RuntimeError"),
    (2, widened(random, zeros), "right"),
    (2, widened(zeros, random), "right"),
    (2, widened(zeros, zeros), "never moves"),
    (2, widened(random, zeros, lambda alpha, r, rank: alpha), "0.5 times what it was"),
    (2, widened(random, zeros, lambda alpha, r, rank: alpha * r / rank), "0.25 times"),
    (2, widened(random, zeros, lambda alpha, r, rank: alpha * math.sqrt(rank / r)), "rsLoRA"),
    (2, widened(random, random), "ΔW = s BA is not what it was"),
    (2, split_in_copies, "stay copies"),
    (2, lambda A, B, alpha, rank: (A, B, alpha), "A must be (4, 5) and B (6, 4)"),
    (2, lambda A, B, alpha, rank: (A, B), "three things"),
    (2, lambda A, B, alpha, rank: (*widened(random, zeros)(A, B, alpha, rank)[:2], None), "must be a number"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1) / 2, torch.cat([A1, A2])), "right"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1), torch.cat([A1, A2]) / 2), "right"),
    (3, lambda B1, A1, B2, A2: ((B1 @ A1 + B2 @ A2) / 2, torch.eye(5)), "no adapter"),  # the way around
    (3, lambda B1, A1, B2, A2: ((B1 + B2) / 2, (A1 + A2) / 2), "averages the factors"),
    (3, lambda B1, A1, B2, A2: (B1 + B2, A1 + A2), "adds the factors"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1), torch.cat([A1, A2])), "sum of the two"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1) / 2, torch.cat([A1, A2]) / 2), "half of the mean"),
    (3, lambda B1, A1, B2, A2: (B1 @ A1 + B2 @ A2) / 2, "two matrices"),
    (3, lambda B1, A1, B2, A2: (torch.cat([A1, A2]), torch.cat([B1, B2], 1)), "must be (out, r)"),
    (3, lambda B1, A1, B2, A2: (B1, A1), "first adapter alone"),
    (3, lambda B1, A1, B2, A2: (B2, A1), "BA is not"),
    (3, lambda B1, A1: (B1, A1), "raises TypeError"),
    (4, lambda W, A, B, s: W + s * (B @ A).T, "right"),
    (4, lambda W, A, B, s: W + s * A.T @ B.T, "right"),
    (4, lambda W, A, B, s: W + s * B @ A, "not transposed"),
    (4, lambda W, A, B, s: W + (B @ A).T, "s is lost"),
    (4, lambda W, A, B, s: W - s * (B @ A).T, "unmerges"),
    (4, lambda W, A, B, s: s * (B @ A).T, "ΔW alone"),
    (4, lambda W, A, B, s: W.T + s * B @ A, "own shape"),
    (4, lambda W, A, B, s: W.add_(s * (B @ A).T), "changes the weight"),
    (4, lambda W, A, B, s: None, "return a tensor"),
    (4, lambda W, A, B, s: W + s * A @ B, "raises RuntimeError"),
    (5, same_run, "right"),
    (5, lambda c, optimiser: (torch.tensor(same_run(c, optimiser)[0]), c**-0.5), "right"),
    (5, lambda c, optimiser: (1 / c, c**-0.5), "the rate for SGD"),
    (5, lambda c, optimiser: (c**-0.5, c**-0.5), "the rate for Adam"),
    (5, lambda c, optimiser: (1, c**-0.5), "rate unchanged"),
    (5, lambda c, optimiser: (c**-0.5, 1), "A₀ must shrink"),
    (5, lambda c, optimiser: (c**0.5, c**-0.5), "wrong way round"),
    (5, lambda c, optimiser: (0.5, 0.5), "the rate for Adam"),  # right for the first case only
    (5, lambda c, optimiser: (0, 0), "above zero"),
    (5, lambda c, optimiser: c**-0.5, "two factors"),
    (6, lost, "right"),
    (6, lambda W, u: float((u - (W + u.to(W.dtype)).float() + W.float()).norm() / u.norm()), "right"),
    (6, lambda W, u: float((u - ((W.float() + u) - W.float())).norm() / u.norm()), "Nothing is lost before"),
    (
        6,
        lambda W, u: float(((W.float() + u).to(W.dtype).float() - W.float()).norm() / u.norm()),
        "change of W",
    ),
    (6, lambda W, u: float(((W.float() + u).to(W.dtype) == W).double().mean()), "counts entries"),
    (6, lambda W, u: lost(W, u) ** 2, "a share of the energy"),
    (6, lambda W, u: lost(W, u) * u.norm() / W.float().norm(), "a share of ‖W‖"),
    (6, lambda W, u: lost(W.add_(u.to(W.dtype)), u), "changes the weight"),
    (6, lambda W, u: (u, W), "one number"),
]


def check(number):
    return getattr(chapter_05, f"check_05_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == (": right" in said)
    assert reply in said


@pytest.mark.parametrize("number", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "is a function of (" in check(number)(8) and "got 8" in check(number)(8)
    assert "raises TypeError" in check(number)(lambda: 8)
    for odd in (torch.ones(2), [1, "x"], {}, -12345, "eight", (float("nan"), 1.0)):
        assert ": not yet: " in check(number)(lambda *case, odd=odd: odd)


def test_the_first_exercise_agrees_with_the_layer():
    """G as the gradient of W: feed the unit vectors and weight the outputs by G."""

    def by_layer(G, A, B, s):
        layer = LoRALinear(5, 6, rank=2, alpha=2 * s, dtype=torch.float64)
        layer.lora_A.data.copy_(A)
        layer.lora_B.data.copy_(B)
        (layer(torch.eye(5, dtype=torch.float64)).T * G).sum().backward()
        return layer.lora_A.grad, layer.lora_B.grad

    assert ": right" in check(1)(by_layer)


def test_the_last_exercise_agrees_with_the_report_of_a_merge():
    def by_report(W, update):
        layer = LoRALinear.from_layer(
            torch.nn.Linear(30, 40, dtype=W.dtype), 30, 30, lora_dtype=torch.float32
        )
        layer.weight.data.copy_(W)
        layer.lora_A.data.copy_(torch.eye(30))
        layer.lora_B.data.copy_(update)
        return layer.merge().swallowed

    assert ": right" in check(6)(by_report)


def test_a_rectangular_weight_alone_would_not_do():
    """Who transposes only where shapes force it is caught by the square weight."""

    def by_shape(W, A, B, s):
        update = s * B @ A
        return W + (update if update.shape == W.shape else update.T)

    assert "not transposed" in check(4)(by_shape)
