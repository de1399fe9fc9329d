"""Each check of chapter 12 says 'right' to the right answer and names the mistake in the typical wrong one."""

import math

import pytest
import torch
from torch.nn import functional as F

from lora_edu.exercises import chapter_12


def answer_loss(logits, tokens, starts, ends, shift=1, reduction="mean"):
    """shift: how many places before a token its logits stand."""
    nats = [
        F.cross_entropy(logits[i, start - shift : end - shift], tokens[i, start:end], reduction="none")
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]
    return (
        getattr(torch.cat(nats), reduction)()
        if reduction != "texts"
        else torch.stack([n.mean() for n in nats]).mean()
    )


def everywhere(logits, tokens, starts, ends):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def some(function, first=0, last=0):
    """The loss with the answers' bounds moved."""
    return lambda logits, tokens, starts, ends: function(logits, tokens, starts + first, ends + last)


def to_the_end(logits, tokens, starts, ends):
    return answer_loss(logits, tokens, starts, torch.full_like(ends, tokens.shape[1]))


def without_the_first(logits, tokens, starts, ends):
    longer = ends - starts > 1
    return answer_loss(logits[longer], tokens[longer], starts[longer] + 1, ends[longer])


def quantise(blocks, levels, scales=None, choose=None):
    scales = blocks.abs().amax(1) if scales is None else scales
    inside = blocks / scales[:, None]
    codes = (inside[..., None] - levels).abs().argmin(-1) if choose is None else choose(inside, levels)
    return codes, scales


def below(inside, levels):
    return (inside[..., None] >= levels).sum(-1) - 1


def above(inside, levels):
    return (inside[..., None] > levels).sum(-1)


def bits(block, group):
    return 4 + 8 / block + 32 / (block * group)


def tables(W, A, B, s, **other):
    return {"embed_tokens": W + s * A @ B.T, "lm_head": W, "tie_word_embeddings": False} | other


def in_place(W, A, B, s):
    W += s * A @ B.T
    return {"embed_tokens": W, "lm_head": W, "tie_word_embeddings": False}


def interval(a, b, tokens, levels=(0.025, 0.975), draws=2_000):
    drawn = torch.randint(len(a), (draws, len(a)))
    ratios = (a - b)[drawn].sum(1) / tokens[drawn].sum(1)
    return tuple(ratios.quantile(torch.tensor(levels, dtype=a.dtype)).tolist())


def fixed_tokens(a, b, tokens):
    drawn = torch.randint(len(a), (2_000, len(a)))
    sums = (a - b)[drawn].sum(1) / tokens.sum()
    return tuple(sums.quantile(torch.tensor([0.025, 0.975], dtype=a.dtype)).tolist())


def means_of_ratios(a, b, tokens):
    return interval((a - b) / tokens, torch.zeros_like(a), torch.ones_like(a))


def unpaired(a, b, tokens):
    def draw(nats):
        drawn = torch.randint(len(nats), (2_000, len(nats)))
        return nats[drawn].sum(1) / tokens[drawn].sum(1)

    return tuple((draw(a) - draw(b)).quantile(torch.tensor([0.025, 0.975], dtype=a.dtype)).tolist())


def rank_needed(before, after, cut, share):
    needed = None
    for r in sorted(cut, reverse=True):
        if (before - cut[r]) / (before - after) < share:
            break
        needed = r
    return needed


def first_enough(before, after, cut, share):
    return next((r for r in sorted(cut) if (before - cut[r]) / (before - after) >= share), None)


# (check, answer, what the reply must say), each answer written out as a student would work it out
CASES = [
    (1, answer_loss, "right"),
    (1, everywhere, "question and all"),
    (1, lambda *given: answer_loss(*given, shift=0), "shift one against the other"),
    (1, lambda *given: answer_loss(*given, shift=-1), "goes the other way"),
    (1, without_the_first, "first token is left out"),
    (1, some(answer_loss, 1, 1), "counts instead of its first"),
    (1, some(answer_loss, 0, 1), "the place after the answer"),
    (1, some(answer_loss, 0, -1), "its end, which is learnt"),
    (1, to_the_end, "after the answer counts"),
    (1, lambda *given: answer_loss(*given, reduction="texts"), "the texts' means"),
    (1, lambda *given: answer_loss(*given, reduction="sum"), "the sum, not the mean"),
    (1, lambda *given: -answer_loss(*given), "the sign"),
    (1, lambda *given: answer_loss(*given) + 3, "it is off"),
    (1, lambda *given: "small", "one finite number"),
    (1, lambda *given: given[0], "one finite number"),
    (1, lambda logits, tokens, starts, ends: logits @ tokens, "raises"),
    (2, quantise, "right"),
    (2, lambda x, levels: quantise(x, levels, x.amax(1)), "not the largest magnitude"),
    (2, lambda x, levels: quantise(x, levels, x.abs().max().expand(len(x))), "each block has its own"),
    (2, lambda x, levels: quantise(x, levels, x.std(1)), "standard deviation"),
    (2, lambda x, levels: quantise(x, levels, x.abs().mean(1)), "mean magnitude"),
    (2, lambda x, levels: (quantise(x, levels)[0], 1 / x.abs().amax(1)), "turned over"),
    (2, lambda x, levels: quantise(x, levels, x.abs().amax(1) + 1), "the scales are off"),
    (2, lambda x, levels: quantise(x, levels, choose=below), "the level below"),
    (2, lambda x, levels: quantise(x, levels, choose=above), "the level above"),
    (2, lambda x, levels: ((x[..., None] - levels).abs().argmin(-1), x.abs().amax(1)), "as they are"),
    (2, lambda x, levels: (quantise(x, levels)[0] - 8, x.abs().amax(1)), "from 0 to 15"),
    (2, lambda x, levels: (levels[quantise(x, levels)[0]], x.abs().amax(1)), "those are the levels"),
    (2, lambda x, levels: quantise(x, levels, choose=lambda y, _: ((y + 1) * 7.5).round()), "evenly spaced"),
    (2, lambda x, levels: (quantise(x, levels)[0].flip(0), x.abs().amax(1)), "some codes are off"),
    (2, lambda x, levels: quantise(x, levels)[0][0], "two tensors"),
    (2, lambda x, levels: (x[0], x.abs().amax(1)), "codes are (6, 64)"),
    (2, lambda x, levels: x @ levels, "raises RuntimeError"),
    (3, bits, "right"),
    (3, lambda block, group: 4 + 32 / block, "quantised once"),
    (3, lambda block, group: 4 + 8 / block, "own scales are missing"),
    (3, lambda block, group: 4 + 8 / block + 32 / group, "group · block numbers"),
    (3, lambda block, group: 4 + 8 / block + 8 / (block * group), "32 bits each"),
    (3, lambda block, group: 4 + 40 / block, "not one a block"),
    (3, lambda block, group: bits(block, group) - 4, "code itself"),
    (3, lambda block, group: bits(block, group) / 8, "bytes"),
    (3, lambda block, group: 4.127, "it gives 4.127"),
    (3, lambda block, group: "few", "one number"),
    (3, lambda block, group: block[0], "raises TypeError"),
    (4, tables, "right"),
    (4, in_place, "in place"),
    (4, lambda W, A, B, s: tables(W, A, B, s, lm_head=W + s * A @ B.T), "the head is W + ΔW, too"),
    (4, lambda W, A, B, s: tables(W, A, B, s, embed_tokens=W), "is lost"),
    (4, lambda W, A, B, s: tables(W, A, B, 1), "s is missing"),
    (4, lambda W, A, B, s: tables(0 * W, A, B, s), "ΔW alone"),
    (4, lambda W, A, B, s: tables(W, -A, B, s), "embed_tokens is off"),
    (4, lambda W, A, B, s: tables(W, A, B, s, lm_head=0 * W), "lm_head is off"),
    (4, lambda W, A, B, s: tables(W, A, B, s, tie_word_embeddings=True), "has to be False"),
    (4, lambda W, A, B, s: tables(W, A, B, s, lm_head=None), "lm_head is a table"),
    (4, lambda W, A, B, s: W + s * A @ B.T, "a dictionary with"),
    (4, lambda W, A, B, s: {"embed_tokens": W}, "a dictionary with"),
    (4, lambda W, A, B, s: W + s * B @ A, "raises RuntimeError"),
    (5, interval, "right"),
    (5, lambda a, b, tokens: interval(b, a, tokens), "that is b − a"),
    (5, lambda a, b, tokens: interval(a, b, tokens, levels=(0.05, 0.95)), "for 90 %"),
    (5, fixed_tokens, "not drawn"),
    (5, means_of_ratios, "own nats a token"),
    (5, lambda a, b, tokens: interval(a, b, torch.ones_like(a)), "nats an answer"),
    (5, unpaired, "each by itself"),
    (5, lambda a, b, tokens: ((a - b).sum() / tokens.sum(),) * 2, "no width"),
    (
        5,
        lambda a, b, t: tuple(((a - b) / t).quantile(torch.tensor([0.025, 0.975]).double())),
        "single answers",
    ),
    (5, lambda a, b, tokens: interval(a, b, tokens)[::-1], "low is above high"),
    (5, lambda a, b, tokens: (5.0, 5.1), "it is off"),
    (5, lambda a, b, tokens: ("a", "b"), "two numbers"),
    (5, lambda a, b, tokens: (a - b).mean(), "raises TypeError"),
    (6, rank_needed, "right"),
    (6, first_enough, "Every larger one"),
    (6, lambda before, after, cut, share: max(cut), "Look for the smallest"),
    (6, lambda before, after, cut, share: None, "at least that share stays"),
    (6, lambda before, after, cut, share: rank_needed(before, after, cut, share) or max(cut), "None"),
    (6, lambda before, after, cut, share: 5, "none of the ranks"),
    (6, lambda before, after, cut, share: 4, "of the gain stays"),
    (6, lambda before, after, cut, share: "few", "a rank, or None"),
    (6, lambda before, after, cut, share: before - cut, "raises TypeError"),
]


@pytest.mark.parametrize("k, answer, said", CASES)
def test_right_answers_and_typical_mistakes(k, answer, said):
    for seed in range(3):
        torch.manual_seed(seed)
        reply = getattr(chapter_12, f"check_12_{k}")(answer)
        assert reply.startswith(f"Exercise {k}:")
        assert said in reply, reply
        assert ("not yet" in reply) == (said != "right")


@pytest.mark.parametrize("k", range(1, 7))
def test_an_open_exercise_gets_a_hint_and_nonsense_a_word(k):
    check = getattr(chapter_12, f"check_12_{k}")
    assert check(None).startswith(f"Exercise {k}: not attempted yet. Hint: ")
    for nonsense in ("all", math.nan, 3):
        assert check(nonsense).startswith(f"Exercise {k}: the answer is a function of (")
