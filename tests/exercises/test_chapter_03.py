"""Chapter 03's checks: right answers pass, each typical mistake is told by name, nonsense is refused kindly."""

import pytest
import torch

from lora_edu import lowrank
from lora_edu.data import load_checkpoint
from lora_edu.exercises import chapter_03 as exercises

CHECKS = [getattr(exercises, f"check_03_{k}") for k in range(1, 7)]


@pytest.fixture(scope="module")
def data():
    return {name: load_checkpoint(name) for name in ("base", "reference_seed_0", "reference_seed_1")}


@pytest.mark.parametrize("number, check", list(enumerate(CHECKS, 1)))
def test_an_open_cell_gets_a_hint_and_nonsense_a_kind_word(number, check):
    assert check(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    expected = "the answer is one number" if number < 4 else "the answer is a function of ("
    assert expected in check("twelve") and "got 'twelve'" in check("twelve")
    assert ("not yet" if number < 4 else "got nan") in check(float("nan"))


def test_exercise_1_tells_rounding_from_rank():
    before, after = exercises.rounded_pair()
    assert before.dtype == after.dtype == torch.bfloat16
    difference = after.float() - before.float()
    S = lowrank.svd(difference).S
    above = int((lowrank.rounding_floor(before.float(), torch.bfloat16)[0] < S).sum())
    assert above == 5 and exercises.check_03_1(above).startswith("Exercise 1: right")
    assert "rounding has full rank" in exercises.check_03_1(lowrank.numerical_rank(difference))
    assert "part of that energy is rounding" in exercises.check_03_1(lowrank.rank_for_energy(S, 0.9))


def test_exercise_2_subtracts_the_base():
    assert exercises.check_03_2(0.75).startswith("Exercise 2: right")
    for answer, words in (
        (3.6 / 4.1, "Subtract the base first|subtract the base first"),
        (4.1 / 5.6, "subtract the base first"),
        (0.25, "the share that is lost"),
        (1.5 / 5.6, "against the full gain"),
        (0.5, "lost in nats"),
        (1.5, "gain in nats"),
    ):
        message = exercises.check_03_2(answer)
        assert any(word in message for word in words.split("|")), message


def test_exercise_3_subtracts_chance(data):
    first, second = (data[f"reference_seed_{s}"]["blocks.3.attention.value.weight"] for s in (0, 1))
    phi = lowrank.subspace_similarity(first, second, 20, 20)
    assert exercises.check_03_3(phi - 0.2).startswith("Exercise 3: right")
    assert "random subspaces" in exercises.check_03_3(phi)
    assert "not i · j / d²" in exercises.check_03_3(phi - 0.04)
    left = lowrank.subspace_similarity(first, second, 20, 20, side="left")
    assert "the left directions" in exercises.check_03_3(left - 0.2)


def read_rows(update, counts, least):
    rows = update[counts >= least]
    return lowrank.stable_rank(rows - rows.mean(dim=0))


def of(rank):
    """A function of exercise 4 that forms the rows by `rank`."""
    return lambda update, counts, least: lowrank.stable_rank(rank(update, counts, least))


WRONG_ROWS = {
    "still in it: subtract the mean row": of(lambda u, c, n: u[c >= n]),
    "mean of the rows that stay": of(lambda u, c, n: u[c >= n] - u.mean(0)),
    "no row was left out: ": of(lambda u, c, n: u - u.mean(0)),
    "no row was left out, and": of(lambda u, c, n: u),
    "they stay (≥)": of(lambda u, c, n: u[c > n] - u[c > n].mean(0)),
    "those are the rows to leave out": of(lambda u, c, n: u[c < n] - u[c < n].mean(0)),
    "each row's own mean": of(lambda u, c, n: u[c >= n] - u[c >= n].mean(1, keepdim=True)),
    "Roy & Vetterli": lambda u, c, n: lowrank.effective_rank(u[c >= n] - u[c >= n].mean(0)),
    "Does it return its result?": lambda u, c, n: None,
    "it raises": lambda u, c, n: u @ u,
    "Hint: ": lambda u, c, n: 0.5,
}


def test_exercise_4_reads_rows_without_what_they_have_in_common():
    assert exercises.check_03_4(read_rows).startswith("Exercise 4: right")
    for words, wrong in WRONG_ROWS.items():
        message = exercises.check_03_4(wrong)
        assert "not yet" in message and words in message, message


def parts(W, dW, r):
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return S[:r].norm(), (U[:, :r].T @ W @ Vh[:r].T).norm()


def test_exercise_5_cuts_both_sides_to_the_same_rank():
    right = lambda W, dW, r: torch.div(*parts(W, dW, r))
    assert exercises.check_03_5(right).startswith("Exercise 5: right")
    for words, wrong in {
        "its inverse": lambda W, dW, r: 1 / right(W, dW, r),
        "Cut ΔW to rank r": lambda W, dW, r: dW.norm() / parts(W, dW, r)[1],
        "own r strongest": lambda W, dW, r: parts(W, dW, r)[0] / torch.linalg.svdvals(W)[:r].norm(),
        "all of W": lambda W, dW, r: parts(W, dW, r)[0] / W.norm(),
        "its square": lambda W, dW, r: right(W, dW, r) ** 2,
        "it raises": lambda W, dW, r: dW[:, :r].T @ W @ dW[:r],
        "Hint: ": lambda W, dW, r: 1.0,
    }.items():
        message = exercises.check_03_5(wrong)
        assert "not yet" in message and words in message, message


def cut_if(condition):
    """A function of exercise 6 that cuts where the condition on name, tensor and kind holds."""
    return lambda delta, kind, r: {
        name: lowrank.truncate(dW, r) if condition(name, dW, kind) else dW for name, dW in delta.items()
    }


def in_place(delta, kind, r):
    for name, dW in delta.items():
        if dW.dim() == 2 and name.split(".")[-2] == kind:
            dW.copy_(lowrank.truncate(dW, r))
    return delta


def test_exercise_6_cuts_one_kind_and_leaves_the_rest():
    right = cut_if(lambda name, dW, kind: dW.dim() == 2 and name.split(".")[-2] == kind)
    assert exercises.check_03_6(right).startswith("Exercise 6: right")
    for words, wrong in {
        "not of the kind 'up'": cut_if(lambda name, dW, kind: dW.dim() == 2),
        "update.weight was changed": cut_if(lambda name, dW, kind: dW.dim() == 2 and kind in name),
        "was not cut": cut_if(lambda name, dW, kind: False),
        "is not in the result": lambda delta, kind, r: {
            name: lowrank.truncate(dW, r) for name, dW in delta.items() if ".up.w" in name
        },
        "is not the nearest matrix of rank 2 (yours has rank 3)": lambda delta, kind, r: right(
            delta, kind, r + 1
        ),
        "changes the ΔW that it was given": in_place,
        "it raises": lambda delta, kind, r: delta[kind],
        "it returns None": lambda delta, kind, r: None,
    }.items():
        message = exercises.check_03_6(wrong)
        assert "not yet" in message and words in message, message
