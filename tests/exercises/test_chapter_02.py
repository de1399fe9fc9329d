"""Each check of chapter 02 says 'right' to the right answer and names the mistake in the typical wrong one."""

import pytest
import torch

from lora_edu import exercises
from lora_edu.tuning import adjoint, sparse_projection


def count(dial, d):
    return dial.bincount(minlength=d)


def overwrite(g, dial, sign, d):
    z = torch.zeros(d)
    z[dial] = sign * g / count(dial, d)[dial].sqrt()
    return z


def summed(g, dial, sign, d):
    return torch.zeros(d).index_add(0, dial, sign * g)


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, 6, "right"),
    (1, 8, "nothing new"),
    (1, 114, "space of solutions"),
    (1, 112, "leave free"),
    (1, 120, "that is D"),
    (1, 5, "one direction short"),
    (1, 50, "too large"),
    (2, 0.9 * 64 * 48, "right"),
    (2, 2765, "right"),
    (2, 2, "doesn't know"),
    (2, 220, "degrees of freedom"),
    (2, 198, "degrees of freedom"),
    (2, 224, "LoRA's count"),
    (2, 3072, "100 %"),
    (2, 0.9**0.5 * 3072, "no root"),
    (2, 43.2, "that is a rank"),
    (3, (3_000, 10_000), "right"),
    (3, [3_000, 10_000], "right"),
    (3, (10_000, 3_000), "swapped"),
    (3, (3_000, 3_000), "both by the performance"),
    (3, (10_000, 10_000), "both by the gain"),
    (3, (3_000, 30_000), "the first is right"),
    (3, (1_000, 10_000), "the second is right"),
    (3, (2_500, 9_000), "one of the d"),
    (3, 3_000, "a pair"),
    (4, lambda g, dial, sign, d: summed(g, dial, sign, d) / count(dial, d).sqrt(), "right"),
    (4, lambda g, dial, sign, d: adjoint(g, dial, sign / count(dial, d)[dial].sqrt(), d), "right"),
    (4, summed, "length is missing"),
    (4, lambda g, dial, sign, d: summed(g, dial, sign, d) / count(dial, d), "that is the mean"),
    (4, lambda g, dial, sign, d: summed(g, dial, sign, d) * count(dial, d).sqrt(), "upside down"),
    (4, lambda g, dial, sign, d: summed(g, dial, sign**2, d) / count(dial, d).sqrt(), "signs are missing"),
    (4, overwrite, "overwrites"),
    (4, lambda g, dial, sign, d: sign * g, "one number a dial"),
    (4, lambda g, dial, sign, d: None, "must return a tensor"),
    (4, lambda g, dial, sign, d: g[d + 100], "raises IndexError"),
    (4, 3, "is a function"),
]


@pytest.mark.parametrize("k, answer, reply", CASES)
def test_the_reply_names_the_mistake(k, answer, reply):
    said = getattr(exercises, f"check_02_{k}")(answer)
    assert reply in said and said.startswith(f"Exercise {k}: ")
    assert said.startswith(f"Exercise {k}: right. ") == (reply == "right"), said


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(k):
    check = getattr(exercises, f"check_02_{k}")
    assert check(None).startswith(f"Exercise {k}: not attempted yet. Hint: ")
    for nonsense in ("soon", float("nan"), [1], object()):
        said = check(nonsense)
        assert said.startswith(f"Exercise {k}: ") and "right." not in said


def test_the_wishes_are_those_of_the_check_and_a_copy():
    found = exercises.wishes()
    assert found.shape == (8, 120) and torch.linalg.matrix_rank(found) == 6
    found.zero_()
    assert exercises.wishes().any()


def test_exercise_4s_function_is_the_packages_adjoint():
    dial, factor = sparse_projection(50, 7)
    g = torch.randn(50)
    right = summed(g, dial, factor.sign(), 7) / count(dial, 7).sqrt()
    assert torch.allclose(right, adjoint(g, dial, factor, 7), atol=1e-6)
