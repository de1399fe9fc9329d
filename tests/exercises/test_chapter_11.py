"""Each check of chapter 11 says 'right' to the right answer and names the mistake in the typical wrong one."""

import math

import pytest
import torch
from torch.nn import functional as F

from lora_edu.exercises import chapter_11


def mean(states, mask):
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def pool(states, mask):
    return F.normalize(mean(states, mask), dim=-1)


def info_nce(Q, D, groups, scale=20.0, hidden=None, reduction="mean"):
    same = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool)
    scores = (scale * Q @ D.T).masked_fill(same if hidden is None else hidden, -math.inf)
    return F.cross_entropy(scores, torch.arange(len(Q)), reduction=reduction)


def places(scores, groups, right=None, enough=torch.ge):
    right = groups[:, None] == groups if right is None else right
    best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    return 1 + (enough(scores, best) & ~right).sum(1).double()


def mrr(scores, groups, **options):
    return (1 / places(scores, groups, **options)).mean()


def plain(summary):
    return " ".join(summary.lower().split())


def leak_free(train, test, modules=True, clean=plain):
    seen = {module for module, _ in train} if modules else set()
    said = {clean(summary) for _, summary in train}
    return [each for each in test if each[0] not in seen and clean(each[1]) not in said]


def interval(a, b, levels=(0.025, 0.975), draws=2_000):
    means = (a - b)[torch.randint(len(a), (draws, len(a)))].mean(1)
    return tuple(means.quantile(torch.tensor(levels, dtype=a.dtype)).tolist())


def unpaired(a, b):
    draw = lambda values: values[torch.randint(len(values), (2_000, len(values)))].mean(1)
    return tuple((draw(a) - draw(b)).quantile(torch.tensor([0.025, 0.975], dtype=a.dtype)).tolist())


def kept(before, after, cut):
    return {r: (before - loss) / (before - after) for r, loss in cut.items()}


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, pool, "right"),
    (1, mean, "its length is not 1"),
    (1, lambda states, mask: F.normalize(states.mean(1), dim=-1), "padding is averaged in. Use"),
    (1, lambda states, mask: states.mean(1), "and the vectors' length"),
    (1, lambda states, mask: (states * mask[..., None]).mean(1), "number of a text's own tokens"),
    (1, lambda states, mask: F.normalize(states[:, 0], dim=-1), "[CLS]"),
    (1, lambda states, mask: pool(F.normalize(states, dim=-1), mask), "taken once"),
    (1, lambda states, mask: F.normalize(mean(states, mask), dim=0), "it is off"),
    (1, lambda states, mask: states, "a vector for each text"),
    (1, lambda states, mask: 3, "the answer is a tensor"),
    (1, lambda states, mask: states @ mask, "raises"),
    (2, info_nce, "right"),
    (2, lambda Q, D, groups: info_nce(Q, D, torch.arange(len(Q))), "Mask them"),
    (2, lambda Q, D, groups: info_nce(D, Q, groups), "not D Qᵀ"),
    (2, lambda Q, D, groups: info_nce(Q, D, groups, scale=1.0), "not multiplied by 20"),
    (2, lambda Q, D, groups: info_nce(Q, D, groups, reduction="sum"), "not the mean"),
    (2, lambda Q, D, groups: -info_nce(Q, D, groups), "the sign"),
    (2, lambda Q, D, groups: info_nce(Q, D, groups, hidden=groups[:, None] == groups), "diagonal"),
    (2, lambda Q, D, groups: info_nce(Q, D, groups) + 1, "it is off"),
    (2, lambda Q, D, groups: "small", "the answer is one number"),
    (2, lambda Q, D, groups: Q @ D, "raises RuntimeError"),
    (3, mrr, "right"),
    (3, lambda s, g: mrr(s, g, right=torch.eye(len(g), dtype=torch.bool)), "Others of its group"),
    (3, lambda s, g: 1 / places(s, g).mean(), "one over the mean rank"),
    (3, lambda s, g: places(s, g).mean(), "that is the mean rank"),
    (3, lambda s, g: (1 / (places(s, g) + 1)).mean(), "has rank 1"),
    (3, lambda s, g: mrr(-s, g), "small scores for good"),
    (3, lambda s, g: mrr(s.T, g), "down the columns"),
    (3, lambda s, g: (places(s, g) == 1).double().mean(), "recall@1"),
    (3, lambda s, g: mrr(s, g, enough=torch.gt), "count ≥, not >"),
    (3, lambda s, g: 2.0, "it is off"),
    (3, lambda s, g: "good", "the answer is one number"),
    (3, lambda s, g: s @ g, "raises RuntimeError"),
    (4, leak_free, "right"),
    (4, lambda train, test: leak_free(train, test, modules=False), "has its module"),
    (4, lambda train, test: leak_free(train, test, clean=str), "capitals and spaces"),
    (4, lambda train, test: [each for each in test if each[0] not in dict(train)], "the same summary"),
    (4, lambda train, test: leak_free(train, test)[:-1], "is gone"),
    (4, lambda train, test: leak_free(train, test)[::-1], "in the order of test"),
    (4, lambda train, test: train, "of test, as they were"),
    (4, lambda train, test: test.modules, "raises AttributeError"),
    (5, interval, "right"),
    (5, lambda a, b: interval(b, a), "that is b − a"),
    (5, lambda a, b: interval(a, b, levels=(0.05, 0.95)), "for 90 %"),
    (5, unpaired, "each by itself"),
    (5, lambda a, b: tuple((a - b).quantile(torch.tensor([0.025, 0.975]).double())), "single differences"),
    (5, lambda a, b: ((a - b).mean(),) * 2, "no width"),
    (5, lambda a, b: interval(a, b)[::-1], "low is above high"),
    (5, lambda a, b: interval(a + 1, b), "which is off"),
    (5, lambda a, b: ("a", "b"), "two numbers"),
    (5, lambda a, b: (a - b).mean(), "raises TypeError"),
    (6, kept, "right"),
    (6, lambda x, y, cut: {r: 1 - share for r, share in kept(x, y, cut).items()}, "that is lost"),
    (6, lambda x, y, cut: {r: y / loss for r, loss in cut.items()}, "divides losses"),
    (6, lambda x, y, cut: {r: (x - loss) / x for r, loss in cut.items()}, "the whole gain"),
    (6, lambda x, y, cut: {r: x - loss for r, loss in cut.items()}, "gain in nats"),
    (6, lambda x, y, cut: {r: min(1, max(0, s)) for r, s in kept(x, y, cut).items()}, "below 0 or above 1"),
    (6, lambda x, y, cut: dict.fromkeys(cut, 0.5), "at r = 1 it gives 0.5"),
    (6, lambda x, y, cut: {1: 0.5}, "a dictionary rank → share"),
    (6, lambda x, y, cut: x - cut, "raises TypeError"),
]


@pytest.mark.parametrize("k, answer, said", CASES)
def test_right_answers_and_typical_mistakes(k, answer, said):
    for seed in range(3):
        torch.manual_seed(seed)
        reply = getattr(chapter_11, f"check_11_{k}")(answer)
        assert reply.startswith(f"Exercise {k}:")
        assert said in reply, reply
        assert ("not yet" in reply) == (said != "right")


@pytest.mark.parametrize("k", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_a_word(k):
    check = getattr(chapter_11, f"check_11_{k}")
    assert check(None).startswith(f"Exercise {k}: not attempted yet. Hint: ")
    for nonsense in ("all", math.nan, 3):
        assert check(nonsense).startswith(f"Exercise {k}: the answer is a function of (")
