"""Each check of chapter 05 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest
import torch

from lora_edu import exercises
from lora_edu.lora import LoRALinear

# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, ([[0, 0, 0]], [[3], [-3]]), "right"),
    (1, (torch.zeros(1, 3), torch.tensor([[3.0], [-3.0]])), "right"),
    (1, ([[0, 0, 0]], [[0], [0]]), "nothing ever moves"),
    (1, ([[0, 0, 0]], [[1], [-1]]), "s is lost"),
    (1, ([[0, 0, 0]], [[9], [-9]]), "s² G Aᵀ"),
    (1, ([[0, 0, 0]], [[-3], [3]]), "the sign"),
    (1, ([[3], [-3]], [[0, 0, 0]]), "swapped"),
    (1, ([[0, 0, 0]], [[3, -3]]), "2 × 1 is the shape of B's gradient"),
    (1, ([[0], [0], [0]], [[3], [-3]]), "1 × 3 is the shape of A's gradient"),
    (1, ([[3, 9, -3]], [[0], [0]]), "other way round"),
    (1, ([[3, 9, -3]], [[3], [-3]]), "B is zero"),
    (1, ([[0, 0, 0]], [[5], [1]]), "B's is not"),
    (2, 32, "right"),
    (2, 16, "halved"),
    (2, 8, "wrong way round"),
    (2, 16 * 2**0.5, "rsLoRA"),
    (2, 2, "that is s"),
    (2, 64, "doubles ΔW"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1) / 2, torch.cat([A1, A2])), "right"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1), torch.cat([A1, A2]) / 2), "right"),
    (3, lambda B1, A1, B2, A2: ((B1 + B2) / 2, (A1 + A2) / 2), "averages the factors"),
    (3, lambda B1, A1, B2, A2: (B1 + B2, A1 + A2), "adds the factors"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1), torch.cat([A1, A2])), "sum of the two"),
    (3, lambda B1, A1, B2, A2: (torch.cat([B1, B2], 1) / 2, torch.cat([A1, A2]) / 2), "half of the mean"),
    (3, lambda B1, A1, B2, A2: (B1 @ A1 + B2 @ A2) / 2, "two matrices"),
    (3, lambda B1, A1, B2, A2: (torch.cat([A1, A2]), torch.cat([B1, B2], 1)), "must be (out, r)"),
    (3, lambda B1, A1, B2, A2: (B1, A1), "BA is not"),
    (3, lambda B1, A1: (B1, A1), "raises TypeError"),
    (3, 7, "is a function"),
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
    (4, 7, "is a function"),
    (5, 5e-4, "right"),
    (5, 2.5e-4, "SGD"),
    (5, 1e-3, "unchanged"),
    (5, 2e-3, "wrong way round"),
    (5, 0.5, "factor on the learning rate"),
    (6, 4, "right"),
    (6, 2, "twice"),
    (6, 1, "Adam"),
    (6, 8, "not s³"),
    (6, 0.25, "wrong way round"),
]


def check(number):
    return getattr(exercises, f"check_05_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == (": right." in said)
    assert reply in said


@pytest.mark.parametrize("number", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "got 'eight'" in check(number)("eight")


@pytest.mark.parametrize("number", [2, 5, 6])
def test_an_undiagnosed_number_is_told_its_side_and_the_hint(number):
    assert "too small. Hint" in check(number)(1e-9)
    assert "too large. Hint" in check(number)(1e18)


def test_the_first_exercise_agrees_with_autograd():
    """G as the gradient of W: feed the unit vectors and weight the outputs by G."""
    from lora_edu.exercises import chapter_05

    layer = LoRALinear(3, 2, rank=1, alpha=chapter_05.SMALL_ALPHA)
    layer.lora_A.data.copy_(chapter_05.SMALL_A)
    (layer(torch.eye(3)).T * chapter_05.SMALL_G).sum().backward()
    assert ": right." in check(1)((layer.lora_A.grad, layer.lora_B.grad))


def test_a_rectangular_weight_alone_would_not_do():
    """Who transposes only where shapes force it is caught by the square weight."""

    def by_shape(W, A, B, s):
        update = s * B @ A
        return W + (update if update.shape == W.shape else update.T)

    assert "not transposed" in check(4)(by_shape)
