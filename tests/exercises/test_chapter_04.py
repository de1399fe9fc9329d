"""Each check of chapter 04 says 'right' to the right answer and names the mistake in the typical wrong one."""

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_edu.exercises import chapter_04
from lora_edu.lora import add_lora


def linears(model, names):
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names
    ]


def of_each(count):
    """An answer to exercise 2 that counts each chosen layer so."""
    return lambda model, names, rank: sum(count(layer, rank) for layer in linears(model, names))


def by_adding(model, names, rank):
    """The way around: let the package do it, on the model it was given."""
    add_lora(model, rank=rank, alpha=rank, targets=list(names))
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def by_ending(model, names, rank):
    found = [layer for name, layer in model.named_modules() if name.endswith(tuple(names))]
    return sum(rank * (layer.in_features + layer.out_features) for layer in found)


def ranks(printed, digits, at, most=64):
    return [r for r in range(1, most + 1) if round(r * at / 1e6, digits) == printed]


def batch(budget, held, extra, text, each=4):
    return max(0, (budget - each * (held + extra)) // (each * text))


def backward(rows, columns, rank, needed):
    """On paper: W's gradient, or A's and B's; and the input's, if it is needed."""
    if not rank:
        return 2 * rows * columns * (1 + needed)
    return 4 * rank * rows + 2 * rank * columns + needed * (2 * rows * columns + 2 * rank * columns)


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, lambda i, o: (i * o - 1) // (i + o), "right"),
    (1, lambda i, o: max([0, *(r for r in range(1, min(i, o) + 1) if r * (i + o) < i * o)]), "right"),
    (1, lambda i, o: i * o / (i + o), "whole number"),
    (1, lambda i, o: i * o // (i + o), "saves nothing"),  # wrong only where it comes out even
    (1, lambda i, o: min(i, o), "largest rank there is"),
    (1, lambda i, o: min(i, o) // 2, "square"),
    (1, lambda i, o: {(10_000, 100): 99, (1024, 4096): 819}.get((i, o)), "gives None"),  # a table of results
    (2, of_each(lambda layer, r: r * (layer.in_features + layer.out_features)), "right"),
    (2, by_adding, "changes the model"),
    (2, by_ending, "Hint"),  # 'rank_proj' ends in 'k_proj'
    (2, of_each(lambda layer, r: 2 * r * layer.in_features), "takes every matrix for a square"),
    (2, of_each(lambda layer, r: r * layer.in_features), "B is missing"),
    (2, of_each(lambda layer, r: layer.weight.numel()), "W itself"),
    (2, of_each(lambda layer, r: r * sum(layer.weight.shape) + layer.out_features), "biases are frozen"),
    (2, lambda model, names, r: 4 * 40, "one layer"),
    (2, lambda model, names, r: 0, "No layer was found"),
    (2, lambda model, names, r: None, "return its result"),
    (3, ranks, "right"),
    (3, lambda *case: tuple(ranks(*case)), "right"),
    (3, lambda *case: ranks(*case, most=7), "there are 3 ranks"),
    (3, lambda *case: ranks(*case)[:1], "there are 3 ranks"),
    (3, lambda p, n, at: [r for r in range(1, 65) if int(r * at / 1e6 * 10**n) == round(p * 10**n)], "cuts"),
    (3, lambda p, n, at: [r for r in range(1, 65) if abs(r * at / 1e6 - p) < 0.05], "comes nearest"),
    (3, lambda p, n, at: [r for r in range(1, 65) if round(r * at, n) == p], "divided by a million"),
    (3, lambda p, n, at: round(p * 1e6 / at), "a list of ranks"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 3 * trained, kept * n), "right"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 0, kept * n), "Gradients and Adam"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, trained, kept * n), "two numbers"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 2 * trained, kept * n), "One of four"),
    (4, lambda budget, held, trained, kept, n: batch(budget, 0, 3 * trained, kept * n), "One of four"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 3 * held, kept * n), "trains everything"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 3 * trained, kept), "each token"),
    (4, lambda budget, held, trained, kept, n: batch(budget, held, 3 * trained, kept * n, 1), "4 bytes"),
    (4, lambda budget, held, trained, kept, n: (budget - 4 * held - 12 * trained) // (4 * kept * n), "is 0"),
    (4, lambda budget, held, trained, kept, n: (budget / 4 - held - 3 * trained) / (kept * n), "round down"),
    (
        5,
        lambda shapes, budget, each: min(budget // (each * sum(map(sum, shapes))), *map(min, shapes)),
        "right",
    ),
    (5, lambda shapes, budget, each: budget // (each * sum(map(sum, shapes))), "smallest side, here 64"),
    (5, lambda shapes, budget, each: budget / (each * sum(map(sum, shapes))), "round down"),
    (5, lambda shapes, budget, each: -(-budget // (each * sum(map(sum, shapes)))), "one rank too many"),
    (5, lambda shapes, budget, each: budget // sum(map(sum, shapes)), "in bytes"),
    (5, lambda shapes, budget, each: budget // (each * sum(shapes[0])), "first matrix alone"),
    (5, lambda shapes, budget, each: budget // (each * sum(a * b for a, b in shapes)), "A and B hold"),
    (5, lambda shapes, budget, each: budget // (each * sum(2 * max(s) for s in shapes)), "for a square"),
    (6, backward, "right"),
    (6, lambda i, o, r, needed: backward(i, o, r, needed) / 2, "two FLOPs"),
    (6, lambda i, o, r, needed: backward(i, o, r, True), "nothing goes back through W"),
    (6, lambda i, o, r, needed: backward(i, o, r, False), "comes back through W"),
    (6, lambda i, o, r, needed: backward(i, o, r, needed) + 2 * i * o, "nobody computes it"),
    (6, lambda i, o, r, needed: backward(i, o, r, needed) - 2 * r * i, "Two products have B's size"),
    (6, lambda i, o, r, needed: backward(i, o, r, needed) - 2 * r * o, "A's size is missing"),
]


def check(number):
    return getattr(chapter_04, f"check_04_{number}")


@pytest.mark.parametrize(("number", "answer", "reply"), CASES)
def test_each_answer_gets_the_reply_it_deserves(number, answer, reply):
    said = check(number)(answer)
    assert said.startswith(f"Exercise {number}: ")
    assert (reply == "right") == (": right." in said)
    assert reply in said


@pytest.mark.parametrize("number", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_an_answer(number):
    assert check(number)(None).startswith(f"Exercise {number}: not attempted yet. Hint: ")
    assert "is a function of (" in check(number)(8) and "got 8" in check(number)(8)
    assert "raises TypeError" in check(number)(lambda: 8)
    for odd in (torch.ones(2), [1, "x"], {}, -12345, 0.5):
        assert ": not yet: " in check(number)(lambda *case, odd=odd: odd)


@pytest.mark.parametrize("number", range(1, 7))
def test_results_learnt_by_heart_are_no_answer(number):
    """What is right for the cases of one check is not for those that the next one draws."""
    right = {case[0]: case[1] for case in reversed(CASES) if case[2] == "right"}[number]
    known = {}

    def learn(*case):
        known[repr(case)] = right(*case)
        return known[repr(case)]

    random.seed(1)
    assert ": right." in check(number)(learn)
    random.seed(2)
    assert ": not yet: " in check(number)(lambda *case: known.get(repr(case), 7))


def test_the_checks_leave_triton_alone_until_they_are_asked():
    """Chapter 06 tells Triton to interpret before anything imports it."""
    program = "import sys; from lora_edu.exercises import chapter_06; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
