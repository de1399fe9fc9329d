"""Each check of chapter 08 says 'right' to the right answer and names the mistake in the typical wrong one."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lora_edu.exercises import chapter_08


def names(model):
    return [name for name, _ in model.named_parameters()]


def attend(q, K, V, P_K, P_V, seen=None, scale=None):
    k, time = len(P_K), len(q)
    seen = torch.ones(time, k + time, dtype=torch.bool).tril(k) if seen is None else seen
    keys, values = torch.cat([P_K, K]), torch.cat([P_V, V])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)


def two_softmaxes(q, K, V, P_K, P_V):
    text = F.scaled_dot_product_attention(q, K, V, is_causal=True)
    return text + F.scaled_dot_product_attention(q, P_K, P_V)


def everything_seen(q, K, V, P_K, P_V):
    return attend(q, K, V, P_K, P_V, torch.ones(len(q), len(q) + len(P_K), dtype=torch.bool))


def from_the_top_left(q, K, V, P_K, P_V):
    return F.scaled_dot_product_attention(q, torch.cat([P_K, K]), torch.cat([P_V, V]), is_causal=True)


def fold(W, b, l_in, l_out):
    return l_out[:, None] * W * l_in, l_out * b


def front(points, better=lambda one, other: one != other and one[0] <= other[0] and one[1] <= other[1]):
    return {name for name in points if not any(better(other, points[name]) for other in points.values())}


def both_smaller(one, other):
    return one[0] < other[0] and one[1] < other[1]


def without_twins(points):
    return set({points[name]: name for name in sorted(front(points), reverse=True)}.values())


def ranks(values):
    return [sorted(values).index(each) for each in values]


def p_value(x, y, ranked=ranks, size=abs, enough=lambda one, found: one >= found - 1e-9):
    x, y = ranked(x), ranked(y)
    mean = sum(x) / len(x)
    product = lambda order: size(sum((a - mean) * b for a, b in zip(x, order, strict=True)))
    orders = list(itertools.permutations(y))
    return sum(enough(product(order), product(y)) for order in orders) / len(orders)


def by_formula(x, y):
    """With ρ = 1 − 6 Σd² / (n (n² − 1)) in floating-point numbers: equal ones differ in the last digit."""
    n = len(x)
    rho = lambda order: (
        1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks(x), order, strict=True)) / (n * (n**2 - 1))
    )
    orders = list(itertools.permutations(ranks(y)))
    return sum(abs(rho(order)) >= abs(rho(ranks(y))) for order in orders) / len(orders)


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, lambda model: [name for name in names(model) if name.endswith("bias")], "right"),
    (1, lambda model: [name for name in names(model) if "bias" in name], "table of positions"),
    (
        1,
        lambda model: [n for n in names(model) if n.endswith("bias") and "norm" not in n],
        "the norms' biases are missing",
    ),
    (1, names, "is no bias"),
    (1, lambda model: [name for name in names(model) if not name.endswith("weight")], "scale is no bias"),
    (1, lambda model: [name for name in names(model) if name.endswith(".bias")], "in_proj_bias is missing"),
    (1, lambda model: [], "is missing"),
    (1, lambda model: [p for p in model.parameters() if p.dim() == 1], "a list of names"),
    (1, lambda model: model.biases, "raises AttributeError"),
    (2, attend, "right"),
    (2, two_softmaxes, "two softmaxes"),
    (2, everything_seen, "the mask is missing"),
    (2, from_the_top_left, "the mask starts at the prefix"),
    (2, lambda q, K, V, P_K, P_V: attend(q, K, V, P_K, P_V, scale=1.0), "divided by √d"),
    (2, lambda q, K, V, P_K, P_V: attend(q, K, V, 0 * P_K, P_V), "P_K isn't used"),
    (2, lambda q, K, V, P_K, P_V: attend(q, K, V, P_K, 0 * P_V), "P_V isn't used"),
    (2, lambda q, K, V, P_K, P_V: F.scaled_dot_product_attention(q, K, V, is_causal=True), "text alone"),
    (2, lambda q, K, V, P_K, P_V: torch.cat([P_V, V]), "a row for each token of the text"),
    (2, lambda q, K, V, P_K, P_V: attend(q, K, V, P_V, P_K), "it is off"),
    (2, lambda q, K, V, P_K, P_V: q @ V, "raises RuntimeError"),
    (3, fold, "right"),
    (3, lambda W, b, l_in, l_out: fold(W, b, l_out, l_in), "the sides are mixed up"),
    (3, lambda W, b, l_in, l_out: (fold(W, b, l_in, l_out)[0], b), "so it is scaled too"),
    (3, lambda W, b, l_in, l_out: (fold(W, b, l_in, l_out)[0], l_in * l_out * b), "and the bias doesn't"),
    (3, lambda W, b, l_in, l_out: (l_out[:, None] * W, l_out * b), "l_in is missing"),
    (3, lambda W, b, l_in, l_out: (W * l_in, l_out * b), "l_out is missing"),
    (3, lambda W, b, l_in, l_out: (W, l_out * b), "W itself"),
    (3, lambda W, b, l_in, l_out: (W.T[:1], b), "W' must be"),
    (3, lambda W, b, l_in, l_out: W, "must return a matrix and a bias"),
    (3, lambda W, b, l_in, l_out: l_out @ W @ l_in @ W, "raises RuntimeError"),
    (4, 2 * 28 * 50 * 8 * 128, "right"),
    (4, 2 * 28 * 50 * 3072, "there are 8"),
    (4, 28 * 50 * 1024, "keys and values are two"),
    (4, 2 * 50 * 1024, "that is one layer"),
    (4, 50 * 3072, "that is a prompt"),
    (4, 2 * 28 * 1024, "one token"),
    (4, 4 * 28 * 50 * 1024, "not a byte"),
    (4, 1e9, "too large"),
    (5, front, "right"),
    (5, lambda points: front(points, both_smaller), "One of the two numbers may be equal"),
    (
        5,
        lambda points: front(points, lambda one, other: one[0] <= other[0] and one[1] < other[1]),
        "is beaten by",
    ),
    (5, lambda points: front({n: (c, -loss) for n, (c, loss) in points.items()}), "a large loss for good"),
    (5, without_twins, "both stay"),
    (5, lambda points: {min(points, key=points.get), "d", "twin of d"}, "is missing"),
    (5, lambda points: list(points), "is beaten by"),
    (5, lambda points: list(points.values()), "names of points"),
    (5, lambda points: 1 / 0, "raises ZeroDivisionError"),
    (6, p_value, "right"),
    (6, lambda x, y: p_value(x, y, enough=lambda one, found: one > found + 1e-9), "use ≥"),
    (6, lambda x, y: 1 - p_value(x, y), "1 − p"),
    (6, lambda x, y: math.factorial(len(x)) * p_value(x, y), "divide by n!"),
    (6, lambda x, y: 120 * p_value(x, y), "not yet"),
    (6, by_formula, "differ in the last digit"),
    (6, lambda x, y: "small", "the answer is one number"),
    (6, lambda x, y: x @ y, "raises TypeError"),
]


@pytest.mark.parametrize("k, answer, said", CASES)
def test_right_answers_and_typical_mistakes(k, answer, said):
    for seed in range(3):
        torch.manual_seed(seed)
        reply = getattr(chapter_08, f"check_08_{k}")(answer)
        assert reply.startswith(f"Exercise {k}:")
        assert said in reply
        assert ("not yet" in reply) == (said != "right")


@pytest.mark.parametrize(
    "wrong, said",
    [({"size": lambda value: value}, "counts one side"), ({"ranked": list}, "take their ranks")],
)
def test_another_p_is_found_out(wrong, said):
    replies = []
    for seed in range(10):
        torch.manual_seed(seed)
        replies.append(chapter_08.check_08_6(lambda x, y: p_value(x, y, **wrong)).lower())
    assert not [reply for reply in replies if "right" in reply]
    assert [reply for reply in replies if said in reply]


@pytest.mark.parametrize("k", range(1, 7))
def test_open_and_nonsense_answers(k):
    check = getattr(chapter_08, f"check_08_{k}")
    assert "not attempted yet" in check(None)
    for nonsense in ("text", math.nan, [1], lambda *arguments: math.nan, lambda *arguments: "text"):
        reply = check(nonsense)
        assert reply.startswith(f"Exercise {k}:") and "right" not in reply


def test_the_prefix_of_the_exercise_is_the_published_one():
    """PEFT's table: prefix tuning with 50 tokens trains 2 867 200 numbers in Llama-3.2-3B."""
    assert "right" in chapter_08.check_08_4(2_867_200)


def test_four_things_cannot_come_below_two_of_24_orders():
    assert chapter_08._share([1, 2, 3, 4], [5, 6, 7, 8]) == 2 / math.factorial(4)
