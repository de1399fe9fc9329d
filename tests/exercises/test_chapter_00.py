"""Each check of chapter 00 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest
import torch

from lora_edu.data import adapter_folder
from lora_edu.data.shipped import data_file
from lora_edu.exercises import chapter_00 as exercises

BASE = data_file("base.safetensors").stat().st_size / 1e6
ADAPTER = (adapter_folder("reference_r8") / "adapter_model.safetensors").stat().st_size / 1e6

# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, 4 * (400 + 100), "right"),
    (1, 400 * 4 + 4 * 100, "right"),
    (1, 4 * 400 * 100, "*plus*"),
    (1, 400 * 100, "frozen"),
    (1, 400 * 100 + 2000, "counts W, too"),
    (1, 1600, "B alone"),
    (1, 400, "A alone"),
    (1, 500, "r = 1"),
    (1, 0.05, "share of W"),
    (1, 5, "per cent"),
    (1, 4000, "twice as much"),
    (2, 20 * BASE / (BASE + 20 * ADAPTER), "right"),
    (2, round(20 * BASE / (BASE + 20 * ADAPTER), 1), "right"),
    (2, 20 * BASE / (20 * ADAPTER), "leaves out the base"),
    (2, (BASE + 20 * ADAPTER) / (20 * BASE), "wrong way round"),
    (2, 20 * (BASE + ADAPTER) / (BASE + 20 * ADAPTER), "adds nothing"),
    (2, 21 * BASE / (BASE + 20 * ADAPTER), "do not need the base"),
    (2, 20 * BASE / (20 * (BASE + ADAPTER)), "once, not once for each"),
    (2, 20, "one base alone"),
    (2, 1, "as large as the base"),
    (2, 20 * BASE, "merged models' MB"),
    (2, BASE + 20 * ADAPTER, "MB of the base and its 20 adapters"),
]


def check(number):
    return getattr(exercises, f"check_00_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == ("right." in said)
    assert reply in said


@pytest.mark.parametrize("number", [1, 2])
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "got 'eight'" in check(number)("eight")
    assert "too small. Hint" in check(number)(1e-9)
    assert "too large. Hint" in check(number)(1e18)
    assert "right." not in check(number)(float("nan"))


def right(x, W, A, B, s):
    return torch.nn.functional.linear(x, W + s * B @ A)  # by another way than the check's


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (right, "right. "),
        (lambda x, W, A, B, s: right(x, W, A, B, s).float(), "right. "),
        (lambda x, W, A, B, s: right(x, W, A, B, s).T, "lies on its side"),
        (lambda x, W, A, B, s: right(x, W, A, B, 1), "s is missing"),
        (lambda x, W, A, B, s: s * right(x, W, A, B, 1), "before BA only"),
        (lambda x, W, A, B, s: x @ W.T, "W alone"),
        (lambda x, W, A, B, s: s * x @ (B @ A).T, "update alone"),
        (lambda x, W, A, B, s: right(x, W, A, B, -s), "sign is wrong"),
        (lambda x, W, A, B, s: right(x, W, A, B, 1 / s), "does not divide"),
        (lambda x, W, A, B, s: right(x, W, A, 3 * B, s), "other numbers"),
        (lambda x, W, A, B, s: W @ x + s * B @ A @ x, "stops with RuntimeError"),
        (lambda x, W, A, B, s: x @ W.T + s * (x @ B) @ A, "stops with RuntimeError"),
        (lambda x: x, "stops with TypeError"),
        (lambda x, W, A, B, s: None, "got NoneType"),
        (torch.ones(5, 11), "the answer is a function of (x, W, A, B, s)"),
        (None, "not attempted yet. Hint: "),
    ],
)
def test_the_formula_is_tried_and_told_what_is_wrong(answer, reply):
    said = exercises.check_00_3(answer)
    assert said.startswith("Exercise 3: ") and reply in said
    assert ("right." in said) == (reply == "right. ")
