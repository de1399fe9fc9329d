"""Each check of chapter 04 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest

from lora_edu import counting, exercises

SAVED = sum(counting.saved_numbers("GPT-2", "lora", 8, "c_attn").values())
MODEL, ADAPTER, ACTIVATIONS = 124_439_808, 12 * 8 * (768 + 2304), 2 * 64 * SAVED

# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, 1024 * 4096 / (1024 + 4096), "right"),
    (1, 819, "right"),
    (1, 512, "square"),  # half the short side
    (1, 1024, "largest rank"),
    (1, 2048, "half the long side"),
    (1, 2560, "mean of the sides"),
    (1, 5120 / (1024 * 4096), "inverse"),
    (2, 96 * 2 * 4 * 2 * 12_288 * 2, "right"),
    (2, 96 * 4 * 2 * 12_288 * 2, "one matrix a layer"),
    (2, 96 * 4 * 12_288 * 2, "A *and* a B"),
    (2, 96 * 2 * 4 * 2 * 12_288 * 4, "2 bytes a number"),
    (2, 2 * 4 * 2 * 12_288 * 2, "one layer"),
    (2, 35_000_000, "what the paper prints"),
    (2, 36.0, "MiB"),
    (3, 48 * 8 * (1600 + 4800), "right"),
    (3, 48 * 8 * 9600, "q, k and v apart"),
    (3, 8 * 6400, "one layer"),
    (3, 48 * 8 * 3200, "1600 × 1600"),
    (3, 48 * 6400, "r = 1"),
    (3, 48 * 1600 * 4800, "c_attn itself"),
    (4, 4 * (MODEL + 4 * ADAPTER + ACTIVATIONS), "right"),
    (4, 4 * (MODEL + 4 * ADAPTER), "activations are left out"),
    (4, 4 * (4 * ADAPTER + ACTIVATIONS - ADAPTER), "weights are left out"),
    (4, 4 * 3 * ADAPTER, "only what training adds"),
    (4, 4 * (MODEL + 2 * ADAPTER + ACTIVATIONS), "Adam's two numbers"),
    (4, 4 * (MODEL + 3 * ADAPTER + ACTIVATIONS), "one of four is left out"),
    (4, MODEL + 4 * ADAPTER + ACTIVATIONS, "float32 takes 4 bytes"),
    (5, 10_000_000 // (2 * 32 * (4096 + 4096 + 1024 + 4096)), "right"),
    (5, 10_000_000 // (2 * 32 * 2 * 8192), "takes W_v for a square"),
    (5, 10_000_000 // (4 * 32 * (8192 + 5120)), "bfloat16 takes 2"),
    (5, 12, "round down"),
    (5, 10_000_000 / (2 * 32 * (8192 + 5120)), "round down"),
    (5, 10_000_000 // (2 * (8192 + 5120)), "one layer"),
    (6, lambda rows, columns, budget: min(budget // (rows + columns), rows, columns), "right"),
    (6, lambda rows, columns, budget: budget // (rows + columns), "smaller side"),
    (6, lambda rows, columns, budget: budget / (rows + columns), "round down"),
    (6, lambda rows, columns, budget: -(-budget // (rows + columns)), "one rank too many"),
    (6, lambda rows, columns, budget: budget // (rows * columns), "not r · rows · columns"),
    (6, lambda rows, columns, budget: None, "return its result"),
    (6, lambda rows, columns: 8, "raises TypeError"),
    (6, 8, "is a function"),
]


def check(number):
    return getattr(exercises, f"check_04_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == ("right." in said)
    assert reply in said


@pytest.mark.parametrize("number", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "got 'eight'" in check(number)("eight")


@pytest.mark.parametrize("number", range(1, 6))
def test_an_undiagnosed_number_is_told_its_side_and_the_hint(number):
    assert "too small. Hint" in check(number)(1e-9)
    assert "too large. Hint" in check(number)(1e18)
