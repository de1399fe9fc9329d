"""Each check of chapter 09 says 'right' to the right answer and names the mistake in the typical wrong one."""

import math
import statistics

import pytest
import torch

from lora_edu.exercises import chapter_09


def dora(W, A, B, s, m, lengths=lambda V, W: V.norm(dim=1, keepdim=True)):
    V = W + s * B @ A
    return m[:, None] * V / lengths(V, W)


def groups(model, rate, ratio, a=1.0, b=None, end=""):
    b = ratio if b is None else b
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n.endswith(end)]
    return [
        {"params": [p for n, p in named if n.endswith("lora_B")], "lr": b * rate},
        {"params": [p for n, p in named if n.endswith("lora_A")], "lr": a * rate},
        {"params": [p for n, p in named if "lora_" not in n], "lr": rate},
    ]


def without_rate(groups):
    """The last group's rate left to the optimiser."""
    return [*groups[:-1], {"params": groups[-1]["params"]}]


def one_each(groups):
    """A group for each parameter, its parameters as a generator, which can be read once."""
    return [
        {"params": (each for each in [p]), "lr": group["lr"]} for group in groups for p in group["params"]
    ]


def start(W, r, s, which=slice(None), share=0.5, divide=True, taken=None):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = (U[:, -r:], S[-r:], Vh[-r:]) if which == "last" else (U[:, :r], S[:r], Vh[:r])
    S = S / s if divide else S
    A, B = S[:, None] ** (1 - share) * Vh, U * S**share
    return A, B, W - (s if taken is None else taken) * B @ A


def by_eigenvectors(W, r, s):
    """PiSSA's start without an SVD: V and Σ² are the eigenvectors and eigenvalues of Wᵀ W."""
    squares, V = torch.linalg.eigh(W.T @ W)
    root, V = (squares[-r:].sqrt() / s).sqrt(), V[:, -r:]
    A, B = (V * root).T, W @ V / (s * root)
    return A, B, W - s * B @ A


def smallest(groups, n, t, wrong=""):
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    runs = [x for group in groups for x in group]
    if wrong == "n":
        return t(freedom) * math.sqrt(squares / len(runs)) * math.sqrt(2 / n)
    if wrong == "all":
        return t(len(runs) - 1) * statistics.stdev(runs) * math.sqrt(2 / n)
    if wrong == "mean":
        return t(freedom) * statistics.mean(map(statistics.stdev, groups)) * math.sqrt(2 / n)
    if wrong == "freedom":
        return t(len(runs) - 1) * math.sqrt(squares / freedom) * math.sqrt(2 / n)
    return t(freedom) * math.sqrt(squares / freedom) * math.sqrt(2 / n)


def tuned(losses, blown=math.inf, edges=False):
    loss = {rate: blown if each is None else each for rate, each in losses.items()}
    loss = {rate: each for rate, each in loss.items() if each is not None}
    best, rates = min(loss, key=loss.get, default=None), sorted(loss)
    if edges:
        return best
    return best if rates and rates[0] < best < rates[-1] and loss[best] < math.inf else None


def interior(losses):
    """The best of the rates that are not at an edge, though one at the edge may be better."""
    inside = sorted(losses)[1:-1]
    return min((rate for rate in inside if losses[rate] is not None), key=losses.get, default=None)


def step(A, B, G, rate, wrong=""):
    inverse = torch.linalg.inv
    for_A, for_B = inverse(B.T @ B), inverse(A @ A.T)
    if wrong == "swapped":
        for_A, for_B = for_B, for_A
    if wrong == "plain":
        for_A = for_B = torch.eye(len(A), dtype=A.dtype)
    if wrong == "B alone":
        for_A = torch.eye(len(A), dtype=A.dtype)
    if wrong == "uphill":
        rate = -rate
    new_B = B - rate * G @ A.T @ for_B
    if wrong == "in turns":
        return A - rate * inverse(new_B.T @ new_B) @ new_B.T @ G, new_B
    return A - rate * for_A @ B.T @ G, new_B


def by_pseudo_inverses(A, B, G, rate):
    """(Bᵀ B)⁻¹ Bᵀ is B's pseudo-inverse, Aᵀ (A Aᵀ)⁻¹ A's."""
    return A - rate * torch.linalg.pinv(B) @ G, B - rate * G @ torch.linalg.pinv(A)


def in_place(W, r, s):
    A, B, rest = start(W, r, s)
    return A, B, W.copy_(rest)


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, dora, "right"),
    (1, lambda W, A, B, s, m: torch.diag(m) @ torch.nn.functional.normalize(W + s * B @ A, dim=1), "right"),
    (1, lambda W, A, B, s, m: dora(W, A, B, s, m, lambda V, W: V.abs().sum(1, keepdim=True)), "it is off"),
    (1, lambda W, A, B, s, m: W + s * B @ A, "that is LoRA"),
    (1, lambda W, A, B, s, m: dora(W, A, B, s, torch.ones_like(m)), "m is missing"),
    (1, lambda W, A, B, s, m: m[:, None] * (W + s * B @ A), "not divided out"),
    (1, lambda W, A, B, s, m: dora(W, A, B, s, m, lambda V, W: V.norm(dim=0)), "those of columns"),
    (1, lambda W, A, B, s, m: dora(W, A, B, s, m, lambda V, W: V.norm()), "the whole matrix"),
    (1, lambda W, A, B, s, m: dora(W, A, B, s, m, lambda V, W: W.norm(dim=1, keepdim=True)), "lengths of W"),
    (1, lambda W, A, B, s, m: dora(W, A, B, 1.0, m), "s is missing"),
    (1, lambda W, A, B, s, m: m * dora(W, A, B, s, torch.ones_like(m)), "m scales the columns"),
    (1, lambda W, A, B, s, m: m, "the answer is a matrix"),
    (1, lambda W, A, B, s, m: W + A @ B, "raises RuntimeError"),
    (2, groups, "right"),
    (2, lambda model, rate, ratio: groups(model, rate, ratio, a=ratio, b=1.0), "the larger rate is B's"),
    (2, lambda model, rate, ratio: groups(model, rate, ratio, a=1 / ratio, b=1.0), "gets"),
    (2, lambda model, rate, ratio: groups(model, rate, ratio, a=1.0, b=1 / ratio), "rate / ratio"),
    (2, lambda model, rate, ratio: groups(model, rate, ratio, end="lora_B"), "in no group"),
    (2, lambda model, rate, ratio: groups(model, rate, ratio)[:2], "norm.weight is trained too"),
    (2, lambda model, rate, ratio: [{"params": list(model.parameters()), "lr": rate}], "is frozen"),
    (2, lambda model, rate, ratio: list(model.parameters()), "torch.optim must take the answer"),
    (2, lambda model, rate, ratio: model.factors, "raises AttributeError"),
    (2, lambda model, rate, ratio: groups(model, rate, 16), "ratio = 4"),
    (2, lambda model, rate, ratio: groups(model, 0.01, ratio), "rate = 0.02"),
    (2, lambda model, rate, ratio: without_rate(groups(model, rate, ratio)), "has no 'lr'"),
    (2, lambda model, rate, ratio: tuple(groups(model, rate, ratio)), "right"),
    (2, lambda model, rate, ratio: (group for group in groups(model, rate, ratio)), "right"),
    (2, lambda model, rate, ratio: one_each(groups(model, rate, ratio)), "right"),
    (3, start, "right"),
    (3, lambda W, r, s: list(by_eigenvectors(W, r, s)), "right"),
    (3, lambda W, r, s: start(W, r, s, taken=0.0), "W_res is W itself"),
    (3, lambda W, r, s: start(W, r, s, taken=1.0), "W − B A"),
    (3, lambda W, r, s: start(W, r, s, which="last"), "the smallest singular directions"),
    (3, lambda W, r, s: start(W, r, s, share=1.0), "isn't shared"),
    (3, lambda W, r, s: start(W, r, s, divide=False), "s B A should be"),
    (3, lambda W, r, s: (start(W, r, s)[1], start(W, r, s)[0], W), "A must be"),
    (3, lambda W, r, s: start(W, r, s)[0], "three matrices"),
    (3, in_place, "changes a matrix"),
    (4, smallest, "right"),
    (4, lambda g, n, t: torch.tensor(smallest(g, n, t), dtype=torch.float64), "right"),
    (4, lambda g, n, t: smallest(g, 2 * n, t), "not yet"),
    (4, lambda g, n, t: smallest(g, n, t, "n"), "given away one"),
    (4, lambda g, n, t: smallest(g, n, t, "all"), "all runs together"),
    (4, lambda g, n, t: smallest(g, n, t) / math.sqrt(2), "the error of one mean"),
    (4, lambda g, n, t: smallest(g, n, t) * math.sqrt(n / 2), "for single runs"),
    (4, lambda g, n, t: smallest(g, n, lambda freedom: 1.0), "t is missing"),
    (4, lambda g, n, t: smallest(g, n, t, "mean"), "mean of the deviations"),
    (4, lambda g, n, t: smallest(g, n, t, "freedom"), "another freedom"),
    (4, lambda g, n, t: "small", "one number"),
    (5, tuned, "right"),
    (5, lambda losses: tuned(dict(sorted(losses.items(), reverse=True))), "right"),
    (5, lambda losses: interior(losses), "the largest rate is the best"),
    (5, lambda losses: tuned(losses, edges=True), "the largest rate is the best"),
    (5, lambda losses: tuned(losses, blown=None), "blew up"),
    (5, lambda losses: tuned(losses, blown=0.0), "blew up"),
    (5, lambda losses: min(losses.values()), "no rate of these"),
    (5, lambda losses: "0.02", "it must be"),
    (5, lambda losses: losses, "a rate or None"),
    (6, step, "right"),
    (6, lambda A, B, G, rate: by_pseudo_inverses(A, B, G, rate), "right"),
    (6, lambda A, B, G, rate: (A, step(A, B, G, rate)[1]), "A doesn't move"),
    (6, lambda A, B, G, rate: step(A, B, G, rate, "plain"), "plain SGD"),
    (6, lambda A, B, G, rate: step(A, B, G, rate, "swapped"), "the inverses are exchanged"),
    (6, lambda A, B, G, rate: step(A, B, G, rate, "in turns"), "uses the new B"),
    (6, lambda A, B, G, rate: step(A, B, G, rate, "uphill"), "goes uphill"),
    (6, lambda A, B, G, rate: step(A, B, G, rate, "B alone"), "only B's gradient"),
    (6, lambda A, B, G, rate: (A, B), "it is off"),
    (6, lambda A, B, G, rate: step(A, B, G, rate)[::-1], "of A's and B's shapes"),
]


@pytest.mark.parametrize("k, answer, said", CASES)
def test_right_answers_and_typical_mistakes(k, answer, said):
    for seed in range(3):
        torch.manual_seed(seed)
        reply = getattr(chapter_09, f"check_09_{k}")(answer)
        assert reply.startswith(f"Exercise {k}:")
        assert said in reply
        assert ("not yet" in reply) == (said != "right")


@pytest.mark.parametrize("k", range(1, 7))
def test_open_and_nonsense_answers(k):
    check = getattr(chapter_09, f"check_09_{k}")
    assert "not attempted yet" in check(None)
    for nonsense in ("text", math.nan, [1], lambda *arguments: math.nan, lambda *arguments: "text"):
        reply = check(nonsense)
        assert reply.startswith(f"Exercise {k}:") and "right" not in reply


def test_the_right_step_is_the_same_from_another_factoring():
    """What exercise 6 asks for, by itself: B' A' from B M and M⁻¹ A."""
    A, B, G, M = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 6), (5, 2), (5, 6), (2, 2)))
    one, other = step(A, B, G, 0.1), step(torch.linalg.inv(M) @ A, B @ M, G, 0.1)
    assert torch.allclose(one[1] @ one[0], other[1] @ other[0], rtol=1e-8)
    one, other = step(A, B, G, 0.1, "plain"), step(torch.linalg.inv(M) @ A, B @ M, G, 0.1, "plain")
    assert not torch.allclose(one[1] @ one[0], other[1] @ other[0], rtol=1e-2)
