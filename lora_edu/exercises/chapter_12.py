"""Checks for the exercises of chapter 12, the real language model: right, or which mistake was made.

All answers are functions. They are tried on numbers drawn anew at each check.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_edu.exercises.answers import in_words, no_function, normal, real, same, tried
from lora_edu.lora.quant import NF4

DRAWS = 2_000  # of exercise 5
SIZES = ((64, 256), (32, 128), (128, 512))  # block and group of exercise 3


def check_12_1(answer: object) -> str:
    """A function answer_loss(logits, tokens, starts, ends) → the mean −log p of the answers' tokens."""
    hint = (
        "logits[:, :-1] are for tokens[:, 1:]; of all texts take the places whose token lies in the answer."
    )
    if refused := no_function(1, answer, "logits, tokens, starts, ends", hint):
        return refused
    for texts, time, vocabulary in ((3, 9, 7), (4, 12, 11)):
        (logits,) = normal((texts, time, vocabulary))
        tokens = torch.randint(vocabulary, (texts, time))
        starts = 2 + torch.randperm(time - 5)[:texts]
        ends = starts + torch.tensor([1, 3, 2, 3])[:texts]  # of unequal length
        call = f"with logits ({texts}, {time}, {vocabulary})"
        got, problem = tried(
            1, answer, call, logits.clone(), tokens.clone(), starts.clone(), ends.clone(), longest=100
        )
        if problem:
            return problem
        if real(got) is None:
            return f"Exercise 1: not yet: {call} the answer is one finite number; got {in_words(got)}."
        if problem := _loss_problem(real(got), logits, tokens, starts, ends):
            return f"Exercise 1: not yet: {call} it gives {real(got):.4g}: {problem}"
    return (
        "Exercise 1: right. Every token of an answer counts alike, whichever text it stands in, and nothing of the "
        "question does."
    )


def _loss_problem(got: float, logits: Tensor, tokens: Tensor, starts: Tensor, ends: Tensor) -> str:
    """What is wrong with a loss on the answers alone, if anything."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")  # of tokens 1 …
    places = torch.arange(1, tokens.shape[1])
    within = lambda first, last: (places >= first[:, None]) & (places < last[:, None])
    answers = within(starts, ends)
    right = float(each[answers].mean())
    near = lambda other: abs(got - float(other)) <= 1e-6 * max(1.0, abs(float(other)))
    if near(right):
        return ""
    unshifted = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    here = torch.arange(tokens.shape[1])
    own = (here >= starts[:, None]) & (here < ends[:, None])
    before = F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none")
    of_texts = torch.stack([row[there].mean() for row, there in zip(each, answers, strict=True)])
    none = torch.zeros_like(starts)
    for other, why in (
        (each.mean(), "every token counts there, question and all. Take the answers' tokens only."),
        (unshifted[own].mean(), "logits at a place are for the next token: shift one against the other."),
        (before[own[:, :-1]].mean(), "the shift goes the other way: logits[:, :-1] belong to tokens[:, 1:]."),
        (each[within(starts + 1, ends)].mean(), "each answer's first token is left out."),
        (each[within(starts + 1, ends + 1)].mean(), "the token after the answer counts instead of its first."),
        (each[within(starts, ends + 1)].mean(), "`ends` is the place after the answer; its token doesn't count."),
        (each[within(starts, ends - 1)].mean(), "each answer's last token is left out: its end, which is learnt, too."),
        (each[within(starts, none + tokens.shape[1])].mean(), "what comes after the answer counts, too."),
        (of_texts.mean(), "that is the mean of the texts' means. A token of a short answer then counts more."),
        (each[answers].sum(), "that is the sum, not the mean."),
        (-right, "the sign is turned round: the loss is −log of a probability."),
    ):  # fmt: skip
        if near(other):
            return why
    return "it is off. Which places of the logits are for the answers' tokens?"


def check_12_2(answer: object) -> str:
    """A function quantise(blocks, levels) → (codes, scales) of four bits a number."""
    hint = "scales = blocks.abs().amax(1); then the argmin of |number / scale − level| over the levels."
    if refused := no_function(2, answer, "blocks, levels", hint):
        return refused
    for levels in (torch.tensor(NF4).double(), torch.cat([-torch.ones(1), torch.rand(14), torch.ones(1)])):
        levels = levels.double().sort().values
        (blocks,) = normal((6, 64))
        blocks = blocks * torch.rand(6, 1, dtype=torch.float64) - 0.2
        blocks[0, 0] = -1.2 * blocks[0].abs().max()  # the largest magnitude is a negative number's
        call = "with blocks (6, 64)"
        got, problem = tried(2, answer, call, blocks.clone(), levels.clone(), longest=100)
        if problem:
            return problem
        try:
            codes, scales = (each.double() for each in got)
        except (TypeError, ValueError, AttributeError):
            return f"Exercise 2: not yet: {call} the answer is two tensors, (codes, scales); got {in_words(got)}."
        if codes.shape != blocks.shape or scales.numel() != len(blocks):
            return (
                f"Exercise 2: not yet: {call} codes are (6, 64) and scales (6,); got {tuple(codes.shape)} and "
                f"{tuple(scales.shape)}."
            )
        if problem := _codes_problem(codes, scales.flatten(), blocks, levels):
            return f"Exercise 2: not yet: {problem}"
    return (
        "Exercise 2: right. One large number in a block makes the scale large, and all others coarse: so blocks are "
        "short."
    )


def _codes_problem(codes: Tensor, scales: Tensor, blocks: Tensor, levels: Tensor) -> str:
    """What is wrong with codes and scales, if anything."""
    largest = blocks.abs().amax(1)
    nearest = lambda inside: (inside[..., None] - levels).abs().argmin(-1).double()
    inside = blocks / largest[:, None]
    if same(scales, largest) and same(codes, nearest(inside)):
        return ""
    if not same(scales, largest):
        for other, why in (
            (blocks.amax(1), "the scale is the largest number, not the largest magnitude: −3 is as far from 0 as 3."),
            (blocks.abs().max().expand(len(blocks)), "one scale for all: each block has its own."),
            (blocks.std(1), "the scale is the standard deviation: numbers lie beyond ±1, where no level is."),
            (blocks.abs().mean(1), "the scale is the mean magnitude: numbers lie beyond ±1, where no level is."),
            (1 / largest, "the scales are turned over: number = level · scale."),
        ):  # fmt: skip
            if same(scales, other):
                return why
        return "the scales are off. Each is its block's largest magnitude."
    below = torch.searchsorted(levels, inside.contiguous(), right=True) - 1
    over = torch.searchsorted(levels, inside.contiguous())
    for other, why in (
        (below.double(), "the codes are those of the level below each number. The nearest may be the one above."),
        (over.double(), "the codes are those of the level above each number. The nearest may be the one below."),
        (nearest(blocks), "the numbers are compared with the levels as they are. Divide them by their scale first."),
        (nearest(inside) - 8, "the codes are indices of levels, from 0 to 15."),
        (levels[nearest(inside).long()], "those are the levels. Return their indices."),
        (torch.round((inside + 1) * 7.5), "that takes the levels as evenly spaced."),
    ):  # fmt: skip
        if same(codes, other):
            return why
    return "some codes are off. Compare each number / scale with all sixteen levels."


def check_12_3(answer: object) -> str:
    """A function bits(block, group) → bits a number of NF4 with double quantisation."""
    hint = "4, plus 8 bits shared by a block, plus 32 bits shared by group · block numbers."
    if refused := no_function(3, answer, "block, group", hint):
        return refused
    for block, group in SIZES:
        call = f"with blocks of {block} and groups of {group}"
        got, problem = tried(3, answer, call, block, group, longest=100)
        if problem:
            return problem
        value = real(got)
        if value is None:
            return f"Exercise 3: not yet: {call} the answer is one number; got {in_words(got)}."
        right = 4 + 8 / block + 32 / (block * group)
        if abs(value - right) < 1e-9:
            continue
        for other, why in (
            (4 + 32 / block, "that is NF4 with scales in float32, quantised once."),
            (4 + 8 / block, "the scales' own scales are missing: 32 bits for each group of blocks."),
            (4 + 8 / block + 32 / group, "a group is one of scales: group · block numbers share its 32 bits."),
            (4 + 8 / block + 8 / (block * group), "the second scales are float32, so 32 bits each."),
            (4 + 40 / block, "the second scale is one for a whole group, not one a block."),
            (right - 4, "the four bits of the code itself are missing."),
            (right / 8, "that is bytes."),
        ):  # fmt: skip
            if abs(value - other) < 1e-9:
                return f"Exercise 3: not yet: {call} it gives {value:.5g}: {why}"
        return f"Exercise 3: not yet: {call} it gives {value:.5g}. Hint: {hint}"
    return (
        f"Exercise 3: right. With blocks of 64 and groups of 256, {4 + 32 / 64:g} bits become "
        f"{4 + 8 / 64 + 32 / (64 * 256):.3f}: for a base of 65 billion numbers that is 3 GB less."
    )


def check_12_4(answer: object) -> str:
    """A function merged_tables(W, A, B, s) → the two tables and the setting that a merged model is saved with."""
    hint = '{"embed_tokens": W + s · A Bᵀ, "lm_head": W, "tie_word_embeddings": False}.'
    if refused := no_function(4, answer, "W, A, B, s", hint):
        return refused
    for tokens, width, r in ((9, 5, 2), (12, 7, 3)):
        W, A, B = normal((tokens, width), (tokens, r), (width, r))
        before, s = W.clone(), 0.5
        call = f"with W ({tokens}, {width})"
        got, problem = tried(4, answer, call, W, A.clone(), B.clone(), s, longest=100)
        if problem:
            return problem
        if problem := _tables_problem(got, W, before, A, B, s):
            return f"Exercise 4: not yet: {call}: {problem}"
    return (
        "Exercise 4: right. The head never had LoRA, so it keeps W; and a config that says the two are one would have "
        "either of them lost."
    )


def _tables_problem(got: object, W: Tensor, before: Tensor, A: Tensor, B: Tensor, s: float) -> str:
    """What is wrong with what shall be saved, if anything."""
    names = ("embed_tokens", "lm_head", "tie_word_embeddings")
    if not isinstance(got, Mapping) or set(got) != set(names):
        return f"the answer is a dictionary with {', '.join(names)}; got {in_words(got)}."
    table, head, tied = (got[name] for name in names)
    for name, each in (("embed_tokens", table), ("lm_head", head)):
        if not isinstance(each, Tensor) or each.shape != before.shape:
            return f"{name} is a table {tuple(before.shape)}; got {in_words(each)}."
    merged = before + s * A @ B.T
    if not torch.equal(W, before):
        return "it changes W in place, and the head, which has the same tensor, with it. Make a new table."
    if same(head, merged):
        return "the head is W + ΔW, too. LoRA sat on the embedding alone; the head has learnt with W."
    if same(table, before):
        return "the embedding is W: what LoRA has learnt is lost."
    if same(table, before + A @ B.T):
        return "s is missing."
    if same(table, s * A @ B.T):
        return "that is ΔW alone, without W."
    if not same(table, merged):
        return "embed_tokens is off: W + s · A Bᵀ, with a row of A for each token."
    if not same(head, before):
        return "lm_head is off: the head keeps W."
    if tied is not False:
        return "tie_word_embeddings has to be False: a program that reads True keeps one of the two tables."
    return ""


def check_12_5(answer: object) -> str:
    """A function interval(a, b, tokens) → (low, high) of the difference in nats a token, a paired bootstrap's."""
    hint = (
        f"draw n answers {DRAWS:,} times with replacement; each time the sum of a − b over the sum of tokens; then "
        "the 2.5 and 97.5 % quantiles."
    )
    if refused := no_function(5, answer, "a, b, tokens", hint):
        return refused
    n = 300
    tokens = torch.randint(2, 60, (n,)).double()
    hard = tokens * (2.5 + torch.randn(n, dtype=torch.float64))
    apart = tokens * 0.5 + 0.8 * tokens.sqrt() * torch.randn(n, dtype=torch.float64)
    # in short answers the two differ more, so that a mean of ratios is another number
    b, a = hard, hard + apart + 6.0
    try:
        got = answer(a.clone(), b.clone(), tokens.clone())
        low, high = (real(each) for each in got)
    except Exception as error:
        return f"Exercise 5: not yet: it raises {type(error).__name__}: {str(error)[:100]}"
    if low is None or high is None:
        return f"Exercise 5: not yet: the answer is two numbers, (low, high); got {in_words(got)}."
    if low > high:
        return "Exercise 5: not yet: low is above high."
    if problem := _interval_problem(low, high, a, b, tokens):
        return f"Exercise 5: not yet: it gives {low:.3f} to {high:.3f}: {problem}"
    return (
        "Exercise 5: right. Sum first, divide then: a mean of the answers' own nats a token would let a short answer "
        "count as much as a long one."
    )


def _interval_problem(low: float, high: float, a: Tensor, b: Tensor, tokens: Tensor) -> str:
    """What is wrong with an interval for the difference in nats a token, if anything."""
    n, difference = len(a), a - b
    total = float(tokens.sum())
    ratio = float(difference.sum()) / total
    # a ratio of sums varies as the mean of (Δ − ratio · tokens) / mean tokens does (delta method)
    spread = lambda each: float(each.std()) / math.sqrt(n)
    error = spread(difference - ratio * tokens) * n / total
    middle, half = (low + high) / 2, (high - low) / 2
    of_answers = difference / tokens
    at = lambda place, width: abs(middle - place) < width / 2 and abs(half / width - 1) < 0.11
    if at(ratio, 1.96 * error):
        return ""
    of_a, of_b = (float(each.sum()) / total for each in (a, b))
    unpaired = math.hypot(*(spread(x - x_mean * tokens) * n / total for x, x_mean in ((a, of_a), (b, of_b))))
    for place, width, why in (
        (-ratio, 1.96 * error, "that is b − a."),
        (ratio, 1.645 * error, "that is an interval for 90 %: 5 % lie outside on each side."),
        (
            ratio,
            1.96 * spread(difference) * n / total,
            "the tokens are not drawn: divide by the sum of the tokens that the drawn answers have.",
        ),
        (
            float(of_answers.mean()),
            1.96 * spread(of_answers),
            "that is the mean of the answers' own nats a token. Sum the nats, sum the tokens, divide then.",
        ),
        (
            float(difference.mean()),
            1.96 * spread(difference),
            "that is nats an answer. Divide by the tokens.",
        ),
    ):
        if at(place, width):
            return why
    if high - low < 1e-9:
        return "it has no width. Draw with replacement: without it every resample is the same."
    if abs(middle - ratio) < unpaired and abs(half / (1.96 * unpaired) - 1) < 0.15:
        return "a and b are drawn each by itself. Draw the answers, and take both systems' nats there."
    if half > 10 * error:
        return "those are quantiles of single answers. Sum over n drawn ones first."
    return (
        "it is off. The same drawn answers for a, b and tokens; sums over them; then quantiles of the ratios."
    )


def check_12_6(answer: object) -> str:
    """A function rank_needed(before, after, cut, share) → the smallest rank from which on that share stays, or None."""
    hint = "the share at r is (before − cut[r]) / (before − after); go from the largest rank down while it is enough."
    if refused := no_function(6, answer, "before, after, cut, share", hint):
        return refused
    drawn = torch.rand(2, dtype=torch.float64).tolist()
    before, after = 3.0 + drawn[0], 2.0 - drawn[1]
    shares = {1: 0.3, 2: 0.92, 4: 0.85, 8: 0.95, 16: 0.97, 64: 1.01}  # 2 is enough by itself, but 4 is not
    losses = {r: before - part * (before - after) for r, part in shares.items()}
    few = {r: losses[r] for r in (1, 4)}
    cases = ((losses, 0.9, 8), (losses, 0.2, 1), (losses, 0.96, 16), (few, 0.9, None))
    for cut, part, right in cases:
        shuffled = {r: cut[r] for r in sorted(cut, key=lambda r: (r * 7) % 5)}
        call = f"with a share of {part:g} and ranks {', '.join(map(str, cut))}"
        got, problem = tried(6, answer, call, before, after, dict(shuffled), part, longest=100)
        if problem:
            return problem
        if (got is None and right is None) or (got is not None and right is not None and real(got) == right):
            continue
        if got is not None and real(got) is None:
            return f"Exercise 6: not yet: {call} the answer is a rank, or None; got {in_words(got)}."
        problem = _rank_problem(got, before, after, cut, part, right)
        return f"Exercise 6: not yet: {call} it gives {in_words(got)}: {problem}"
    return (
        "Exercise 6: right. It says how low one tuning is, by its gain and not by its energy; another rate or another "
        "model has another number."
    )


def _rank_problem(
    got: object, before: float, after: float, cut: Mapping, part: float, right: int | None
) -> str:
    """What is wrong with a rank that is said to be enough."""
    kept = {r: (before - loss) / (before - after) for r, loss in cut.items()}
    if got is None:
        return f"at r = {right} and above, at least that share stays."
    if real(got) not in kept:
        return "that is none of the ranks."
    if right is None:
        return "at the largest rank less than that share stays, so there is no such rank: None."
    enough = [r for r, each in kept.items() if each >= part]
    if real(got) == min(enough) < right:
        return (
            "there it is enough, but at a larger rank it is not. Every larger one has to keep the share, too."
        )
    if real(got) == max(enough) > right:
        return "a smaller rank is enough. Look for the smallest."
    losses = [r for r, loss in cut.items() if loss <= after / part]
    if losses and real(got) == min(losses):
        return "that compares losses. The gain counts from the loss before tuning."
    return f"there {kept[int(real(got))]:.2f} of the gain stays. Look for the smallest with the share from there on."
