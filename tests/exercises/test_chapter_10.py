"""Each check of chapter 10 says 'right' to the right answer and names the mistake in the typical wrong one."""

import itertools
import math

import pytest
import torch

from lora_edu import lowrank
from lora_edu.exercises import chapter_10
from lora_edu.lora import choose_ranks


def concatenated(parts, divide=True, scaled=True):
    """B and A of the mean of the updates, exact."""
    B = torch.cat([(s if scaled else 1) * B for B, _, s in parts], 1) / (len(parts) if divide else 1)
    return B, torch.cat([A for _, A, _ in parts])


def cut(B, A, rank):
    U, S, Vh = lowrank.svd(B @ A)
    return U[:, :rank] * S[:rank], Vh[:rank]


def of_factors(parts, rank):
    return sum(B for B, _, _ in parts) / len(parts), sum(A for _, A, _ in parts) / len(parts)


def enough(B, A, share, values=None, offset=1):
    S = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T) if values is None else values
    shares = S.square().cumsum(0) / S.square().sum()
    return int((shares < share - 1e-9).sum()) + offset


def sums_sigma(B, A, share):
    S = torch.linalg.svdvals(B @ A)
    return int((S.cumsum(0) / S.sum() < share).sum()) + 1


def greedy(worth):
    def spend(spectra, sides, budget):
        cost = {name: sum(each) for name, each in sides.items()}
        return chapter_10._greedy(spectra, cost, budget, lambda s, name: worth(s, *sides[name]))

    return spend


def merged_change(W, update):
    return (W.float() + update).to(W.dtype).float() - W.float()


def grouped(x, A, B, rows):
    out = x.new_zeros(*x.shape[:-1], B.shape[1])
    for g in set(rows) - {-1}:
        mine = [i for i, row in enumerate(rows) if row == g]
        out[mine] = x[mine] @ A[g].T @ B[g].T
    return out


def per_row(x, A, B, rows):
    return x @ A[rows].mT @ B[rows].mT


LEFT = 24e9 - 4e9 - 2 * 8_030_261_248
ADAPTER = 41_943_040

# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, lambda parts, rank: cut(*concatenated(parts), rank), "right"),
    (1, lambda parts, rank: cut(*concatenated(parts, divide=False), rank), "that is the sum"),
    (1, lambda parts, rank: cut(*concatenated(parts, scaled=False), rank), "s is lost"),
    (1, of_factors, "that averages the factors"),
    (1, lambda parts, rank: concatenated(parts), "B must be (9, 2) and A (2, 7)"),
    (1, lambda parts, rank: cut(*(m / 2 for m in concatenated(parts, divide=False)), rank), "divided twice"),
    (1, lambda parts, rank: parts[0][:2], "another update of that rank is nearer"),
    (1, lambda parts, rank: sum(B @ A for B, A, _ in parts), "must return two matrices"),
    (1, lambda parts, rank: parts[0][0] @ parts[1][0], "raises RuntimeError"),
    (2, enough, "right"),
    (2, sums_sigma, "that sums σ"),
    (2, lambda B, A, share: enough(B, A, share, offset=0), "Do you count from 0"),
    (2, lambda B, A, share: enough(B, A, share, offset=2), "one too many"),
    (2, lambda B, A, share: None, "one whole number"),
    (2, lambda B, A, share: B @ B, "raises RuntimeError"),
    (3, lambda spectra, sides, budget: choose_ranks(spectra, sides, parameters=budget), "right"),
    (3, lambda spectra, sides, budget: dict.fromkeys(spectra, 3), "one rank for all"),
    (3, lambda spectra, sides, budget: dict.fromkeys(spectra, 8), "the budget is 630"),
    (3, lambda spectra, sides, budget: {"table": 1}, "a rank for each of table, square, thin"),
    (3, lambda spectra, sides, budget: dict.fromkeys(spectra, 0.5), "whole number"),
    (3, lambda spectra, sides, budget: 1 / 0, "raises ZeroDivisionError"),
    (
        4,
        lambda W, update: float((merged_change(W, update) * update).sum() / update.square().sum()),
        "right",
    ),
    (4, lambda W, update: 1.0, "before the sum is brought into W's dtype"),
    (4, lambda W, update: (merged_change(W, update) - update).norm() / update.norm(), "that is the error"),
    (
        4,
        lambda W, update: 1 - (merged_change(W, update) - update).norm() / update.norm(),
        "1 minus the error",
    ),
    (4, lambda W, update: merged_change(W, update).norm() / update.norm(), "compares the lengths"),
    (
        4,
        lambda W, update: torch.cosine_similarity(merged_change(W, update).flatten(), update.flatten(), 0),
        "that is the cosine",
    ),
    (4, lambda W, update: W.add_(1).sum(), "changes the weight it was given"),
    (4, lambda W, update: "all", "the answer is one number"),
    (5, grouped, "right"),
    (5, per_row, "−1 means no adapter"),
    (5, lambda x, A, B, rows: sum(x @ A[g].T @ B[g].T for g in range(3)), "the sum of all adapters"),
    (5, lambda x, A, B, rows: x @ A[rows[0]].T @ B[rows[0]].T, "the first row's adapter"),
    (5, lambda x, A, B, rows: x, "a row for each row of x"),
    (6, LEFT // (2 * ADAPTER), "right"),
    (6, LEFT // (4 * ADAPTER), "in float32"),
    (6, LEFT // ADAPTER, "one byte a number"),
    (6, (24e9 - 2 * 8_030_261_248) // (2 * ADAPTER), "the cache"),
    (6, (24e9 - 4e9) // (2 * ADAPTER), "the base's own"),
    (6, LEFT / (2 * ADAPTER), "round down"),
    (6, 1000, "too large"),
]


@pytest.mark.parametrize("k, answer, said", CASES)
def test_right_answers_and_typical_mistakes(k, answer, said):
    for seed in range(3):
        torch.manual_seed(seed)
        reply = getattr(chapter_10, f"check_10_{k}")(answer)
        assert reply.startswith(f"Exercise {k}:")
        assert said in reply
        assert ("not yet" in reply) == (said != "right")


@pytest.mark.parametrize(
    "worth, said",
    [
        (lambda s, m, n: s**2, "divide by m + n"),
        (lambda s, m, n: s / (m + n), "Energy is σ²"),
        (lambda s, m, n: s**2 / (m * n), "not m · n"),
    ],
)
def test_a_wrong_order_of_the_directions_is_named(worth, said):
    replies = []
    for seed in range(10):  # two orders can give the same ranks by chance
        torch.manual_seed(seed)
        replies.append(chapter_10.check_10_3(greedy(worth)))
    assert not [reply for reply in replies if "right" in reply]
    assert sum(said in reply for reply in replies) >= 4


@pytest.mark.parametrize("k", range(1, 7))
def test_open_and_nonsense_answers(k):
    check = getattr(chapter_10, f"check_10_{k}")
    assert "not attempted yet" in check(None)
    for nonsense in ("text", math.nan, [1], lambda *arguments: math.nan, lambda *arguments: "text"):
        reply = check(nonsense)
        assert reply.startswith(f"Exercise {k}:") and "right" not in reply


def test_the_best_choice_of_ranks_is_no_worse_than_any_other():
    """Brute force over all ranks: what exercise 3 calls right keeps the most energy that its budget allows."""
    torch.manual_seed(3)
    sides = {"table": (100, 10), "square": (10, 10), "thin": (60, 4)}
    spectra = {name: torch.rand(4).sort(descending=True).values for name in sides}
    kept = lambda ranks: sum(float(spectra[n][:r].square().sum()) for n, r in ranks.items())
    chosen = choose_ranks(spectra, sides, parameters=630)
    spent = sum(sum(sides[n]) * r for n, r in chosen.items())
    for each in itertools.product(range(5), repeat=3):
        ranks = dict(zip(sides, each, strict=True))
        if sum(sum(sides[n]) * r for n, r in ranks.items()) <= spent:
            assert kept(ranks) <= kept(chosen) + 1e-6
