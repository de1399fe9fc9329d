"""Each check of chapter 00 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest

from lora_edu import exercises
from lora_edu.data import adapter_folder
from lora_edu.data.shipped import data_file

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
