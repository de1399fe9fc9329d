"""Checks for the exercises of chapter 11, the real encoder: right, or which mistake was made.

All answers are functions. They are tried on numbers drawn anew at each check.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_edu import retrieval
from lora_edu.exercises.answers import in_words, no_function, normal, real, same, tried

SCALE = 20.0
DRAWS = 2_000  # of exercise 5


def check_11_1(answer: object) -> str:
    """A function pool(states, mask) → unit vectors: the mean of the hidden states of the tokens that are there."""
    hint = "add up the states times the mask, divide by how many tokens there are, then by the norm."
    if refused := no_function(1, answer, "states, mask", hint):
        return refused
    for texts, time, width in ((3, 5, 4), (4, 7, 6)):
        (states,) = normal((texts, time, width))
        lengths = torch.randperm(time)[:texts].sort().values + 1
        lengths[0] = time  # the longest text has no padding
        mask = (torch.arange(time) < lengths[:, None]).long()
        call = f"with states ({texts}, {time}, {width})"
        got, problem = _called(1, answer, call, states.clone(), mask.clone())
        if problem:
            return problem
        if got.shape != (texts, width):
            return (
                f"Exercise 1: not yet: {call} the answer is a tensor ({texts}, {width}), a vector for each text; got "
                f"{in_words(got)}."
            )
        if problem := _pool_problem(got, states, mask):
            return f"Exercise 1: not yet: {call}: {problem}"
    return (
        "Exercise 1: right. A text's vector must not depend on how long the longest text of its batch is; with unit "
        "vectors a product is the cosine."
    )


def _pool_problem(got: Tensor, states: Tensor, mask: Tensor) -> str:
    """What is wrong with pooled vectors, if anything."""
    there = mask[..., None].to(states.dtype)
    mean = (states * there).sum(1) / there.sum(1)
    if same(got, F.normalize(mean, dim=-1)):
        return ""
    for other, why in (
        (mean, "that is the mean, and its length is not 1. Divide each vector by its norm."),
        (F.normalize(states.mean(1), dim=-1), "padding is averaged in. Use the mask."),
        (states.mean(1), "padding is averaged in, and the vectors' length is not 1."),
        ((states * there).mean(1), "divide by the number of a text's own tokens, and then by the norm."),
        (
            F.normalize(states[:, 0], dim=-1),
            "that is the first token's state ([CLS]). This encoder takes the mean.",
        ),
        (
            F.normalize(F.normalize(states, dim=-1).mul(there).sum(1), dim=-1),
            "the norm is taken once, of the mean.",
        ),
    ):
        if same(got, other):
            return why
    return (
        "it is off. The mean of each text's own tokens, then a division by its norm over the last dimension."
    )


def check_11_2(answer: object) -> str:
    """A function info_nce(Q, D, groups) → the mean contrastive loss, a pair's own group left out of the wrong ones."""
    hint = (
        f"scores {SCALE:g} · Q Dᵀ; where two different pairs have one group, put −∞; cross-entropy with 0, 1, 2, … as "
        "the right columns."
    )
    if refused := no_function(2, answer, "Q, D, groups", hint):
        return refused
    for groups in (torch.arange(5), torch.tensor([0, 1, 0, 2, 1, 0])):
        Q, D = (F.normalize(each, dim=-1) for each in normal((len(groups), 4), (len(groups), 4)))
        twice = len(groups) - len(groups.unique())
        call = f"with {len(groups)} pairs" + (", some of one group," if twice else "")
        got, problem = _called(2, answer, call, Q.clone(), D.clone(), groups.clone(), number=True)
        if problem:
            return problem
        if problem := _loss_problem(got, Q, D, groups):
            return f"Exercise 2: not yet: {call} it gives {got:.4g}: {problem}"
    return (
        "Exercise 2: right. Every other document of the batch is a wrong answer for free, unless it answers the same "
        "sentence."
    )


def _loss_problem(got: float, Q: Tensor, D: Tensor, groups: Tensor) -> str:
    """What is wrong with a contrastive loss, if anything."""
    n, eye = len(groups), torch.eye(len(groups), dtype=torch.bool)
    same_group = groups[:, None] == groups

    def loss(hidden: Tensor, scale: float = SCALE, turned: bool = False) -> float:
        scores = (scale * (D @ Q.T if turned else Q @ D.T)).masked_fill(hidden, -math.inf)
        return float(F.cross_entropy(scores, torch.arange(n)))

    right = loss(same_group & ~eye)
    near = lambda other: abs(got - other) <= 1e-6 * max(1.0, abs(other))
    if near(right):
        return ""
    for other, why in (
        (loss(torch.zeros_like(eye)), "pairs of one group are wrong answers to each other there. Mask them."),
        (
            loss(same_group & ~eye, turned=True),
            "rows are queries, columns documents: that is Q Dᵀ, not D Qᵀ.",
        ),
        (loss(same_group & ~eye, scale=1.0), f"the scores are not multiplied by {SCALE:g}."),
        (right * n, "that is the sum over the queries, not the mean."),
        (loss(same_group & ~eye, scale=1 / SCALE), f"multiply by {SCALE:g}, don't divide."),
        (
            (right + loss(same_group & ~eye, turned=True)) / 2,
            "each sentence among the functions is enough: one direction.",
        ),
        (
            float(F.cross_entropy((SCALE * Q @ D.T).masked_fill(same_group & ~eye, 0.0), torch.arange(n))),
            "0 is a cosine like any other: put −∞ there.",
        ),
        (-right, "the sign is turned round: the loss is −log of a probability."),
    ):
        if near(other):
            return why
    if math.isinf(got) or math.isnan(got):
        return "a right answer was masked, too: each pair has its own group. Leave the diagonal as it is."
    return "it is off. Mask first, then a softmax over each row."


def check_11_3(answer: object) -> str:
    """A function mrr(scores, groups) → the mean reciprocal rank; any document of the query's group is right."""
    hint = "of each row the best score among the right columns; its rank is 1 + how many wrong ones have as much."
    if refused := no_function(3, answer, "scores, groups", hint):
        return refused
    tied = torch.zeros(4, 4, dtype=torch.float64)
    drawn = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0])
    cases = [(normal((7, 7))[0], torch.arange(7)), (normal((8, 8))[0], drawn), (tied, torch.arange(4))]
    for scores, groups in cases:
        equal = bool((scores == 0).all())
        twice = len(groups.unique()) < len(groups)
        call = (
            "where all scores are equal"
            if equal
            else "where groups recur"
            if twice
            else "without groups that recur"
        )
        got, problem = _called(3, answer, call, scores.clone(), groups.clone(), number=True)
        if problem:
            return problem
        if problem := _mrr_problem(got, scores, groups, equal):
            return f"Exercise 3: not yet: {call} it gives {got:.4g}: {problem}"
    return (
        "Exercise 3: right. A tie counts against the system: else one that gives every document the same score would "
        "find everything."
    )


def _mrr_problem(got: float, scores: Tensor, groups: Tensor, equal: bool) -> str:
    """What is wrong with a mean reciprocal rank, if anything."""
    n = len(groups)
    places = retrieval.ranks(scores, groups, groups).double()
    near = lambda other: abs(got - float(other)) < 1e-6
    if near((1 / places).mean()):
        return ""
    own = 1 + ((scores >= scores.diagonal()[:, None]) & ~torch.eye(n, dtype=torch.bool)).sum(1).double()
    others = [
        (1 / own).mean(), "only the pair's own document counts as right. Others of its group answer as well.",
        1 / places.mean(), "that is one over the mean rank. Take the reciprocals first, then the mean.",
        places.mean(), "that is the mean rank. Take the reciprocals.",
        (1 / (places + 1)).mean(), "the best document has rank 1.",
        (1 / retrieval.ranks(-scores, groups, groups).double()).mean(), "that takes small scores for good.",
        (1 / retrieval.ranks(scores.T, groups, groups).double()).mean(), "that ranks down the columns, not along rows.",
        (places == 1).double().mean(), "that is recall@1.",
    ]  # fmt: skip
    if equal and got > float((1 / places).mean()) + 1e-6:
        return "a wrong document with the same score must stand before the right one: count ≥, not >."
    for other, why in zip(others[::2], others[1::2], strict=True):
        if near(other):
            return why
    return (
        "it is off. Wrong documents that score at least as much as the best right one, plus 1, is the rank."
    )


def check_11_4(answer: object) -> str:
    """A function leak_free(train, test) → the pairs of test with no module and no summary of train."""
    hint = "collect train's modules and its summaries (lower case, single spaces) in sets, and keep what is in neither."
    if refused := no_function(4, answer, "train, test", hint):
        return refused
    letters = [chr(97 + int(i)) for i in torch.randperm(26)[:6]]
    a, b, c, d, e, f = letters
    train = [(f"{a}.py", "Return the name."), (f"{b}.py", f"Close   {b} now."), (f"{b}.py", "Read all lines")]
    test = [
        (f"{a}.py", "Something new here."),
        (f"{c}.py", "Return the name."),
        (f"{d}.py", "return   the NAME."),
        (f"{d}.py", f"close {b} now."),
        (f"{e}.py", f"Open {e} again."),
        (f"{f}.py", "Read all lines of a file."),
        (f"{f}.py", "Readall lines"),
    ]
    try:
        got = [tuple(each) for each in answer(list(train), list(test))]
    except Exception as error:
        return f"Exercise 4: not yet: it raises {type(error).__name__}: {error}"
    if [each for each in got if each not in test]:
        return "Exercise 4: not yet: the answer is a list of pairs (module, summary) of test, as they were."
    if got == test[4:]:
        return (
            "Exercise 4: right. Both kinds of leak are there in the library: helpers of one module resemble one "
            "another, and the same first line stands in many."
        )
    for case, why in (
        (
            test[0],
            f"{test[0]} stays, though training has its module: functions of a module share names and habits.",
        ),
        (test[1], f"{test[1]} stays, though training has the same summary."),
        (test[2], f"{test[2]} stays. It is a summary of training but for capitals and spaces."),
        (test[3], f"{test[3]} stays. Training's own spaces and capitals have to be made plain, too."),
    ):
        if case in got:
            return f"Exercise 4: not yet: {why}"
    missing = next((each for each in test[4:] if each not in got), None)
    if missing is None:
        return "Exercise 4: not yet: each pair once, in the order of test."
    return f"Exercise 4: not yet: {missing} is gone, though neither its module nor its whole summary is in training."


def check_11_5(answer: object) -> str:
    """A function interval(a, b) → (low, high) of the mean of a − b, from a paired bootstrap over the questions."""
    hint = (
        f"draw n questions {DRAWS:,} times with replacement; of the means of a − b the 2.5 and 97.5 % quantiles. With "
        "fewer draws the bounds are too rough."
    )
    if refused := no_function(5, answer, "a, b", hint):
        return refused
    hard = torch.randn(300, dtype=torch.float64)
    a = 0.5 + hard + 0.2 * torch.randn(300, dtype=torch.float64)
    b = 0.4 + hard + 0.2 * torch.randn(300, dtype=torch.float64)
    try:
        got = answer(a.clone(), b.clone())
        low, high = (real(each) for each in got)
    except Exception as error:
        return f"Exercise 5: not yet: it raises {type(error).__name__}: {error}"
    if low is None or high is None:
        return f"Exercise 5: not yet: the answer is two numbers, (low, high); got {in_words(got)}."
    difference, n = a - b, len(a)
    error = float(difference.std()) / math.sqrt(n)
    middle, half = (low + high) / 2, (high - low) / 2
    wide = half / error  # 1.96 is right
    unpaired = math.hypot(float(a.std()), float(b.std())) / math.sqrt(n) / error
    if low > high:
        return "Exercise 5: not yet: low is above high."
    if abs(middle + float(difference.mean())) < error < abs(middle):
        return "Exercise 5: not yet: that is b − a."
    for size, why in (
        (1.645, "that is an interval for 90 %: 5 % lie outside on each side. Take 2.5 and 97.5 %."),
        (2.576, "that is an interval for 99 %. Take 2.5 and 97.5 %."),
        (
            1.96 * unpaired,
            "a and b are drawn each by itself. Draw the questions, and take both systems' numbers there.",
        ),
        (1.96 * math.sqrt(n), "those are quantiles of single differences. Take means of n of them first."),
    ):
        if abs(wide / size - 1) < 0.11 and abs(wide / 1.96 - 1) > 0.11:
            return f"Exercise 5: not yet: it gives {low:.3f} to {high:.3f}: {why}"
    if half < 1e-9:
        return (
            "Exercise 5: not yet: it has no width. Draw with replacement: without it every mean is the same."
        )
    if abs(wide / 1.96 - 1) > 0.11 or abs(middle - float(difference.mean())) > error:
        return f"Exercise 5: not yet: it gives {low:.3f} to {high:.3f}, which is off. Hint: {hint}"
    return (
        "Exercise 5: right. What makes a question hard for both cancels in the difference; here an interval that "
        "ignores the pairs is several times as wide."
    )


def check_11_6(answer: object) -> str:
    """A function kept(before, after, cut) → rank → the share of the gain that a cut keeps; losses, lower is better."""
    hint = "(before − loss of the cut) / (before − after), for each rank."
    if refused := no_function(6, answer, "before, after, cut", hint):
        return refused
    drawn = torch.rand(4, dtype=torch.float64).sort(descending=True).values.tolist()
    before, after = 3.0 + drawn[0], 1.0
    losses = {1: before + 0.1, 4: 1.0 + drawn[1], 16: 1.0 + drawn[3] / 2, 64: 0.98}
    try:
        given = answer(before, after, dict(losses))
        got = {int(r): real(share) for r, share in given.items()} if isinstance(given, Mapping) else {}
    except Exception as error:
        return f"Exercise 6: not yet: it raises {type(error).__name__}: {error}"
    if set(got) != set(losses) or None in got.values():
        return f"Exercise 6: not yet: the answer is a dictionary rank → share, for the ranks {list(losses)}."
    right = {r: (before - loss) / (before - after) for r, loss in losses.items()}
    agrees = lambda rule: all(abs(got[r] - rule(loss)) < 1e-6 for r, loss in losses.items())
    gain = before - after
    for rule, why in (
        (lambda loss: (loss - after) / gain, "that is the share that is lost."),
        (lambda loss: after / loss, "that divides losses. The gain counts from the loss before tuning."),
        (
            lambda loss: (before - loss) / before,
            "that divides by the loss before tuning, not by the whole gain.",
        ),
        (lambda loss: before - loss, "that is the gain in nats. Divide by that of the whole update."),
        (lambda loss: 100 * (before - loss) / gain, "that is in per cent; a share of the whole is 1."),
        (lambda loss: max(0.0, (before - loss) / gain), "a share may be below 0: a cut can do harm."),
        (
            lambda loss: min(1.0, max(0.0, (before - loss) / gain)),
            "a share may be below 0 or above 1, and it says something: a cut can do harm, and it can help.",
        ),
    ):
        if agrees(rule):
            return f"Exercise 6: not yet: {why}"
    if not agrees(lambda loss: (before - loss) / gain):
        r = next(r for r in losses if abs(got[r] - right[r]) >= 1e-6)
        return f"Exercise 6: not yet: at r = {r} it gives {got[r]:.4g}. Hint: {hint}"
    return (
        "Exercise 6: right. A cut that is worse than no tuning keeps less than nothing, and one that beats the whole "
        "update keeps more than all."
    )


def _called(
    k: int, answer: Callable, call: str, *arguments: object, number: bool = False
) -> tuple[Tensor | float | None, str]:
    """As `answers.tried`, for a function that gives a tensor, or a number."""
    got, problem = tried(k, answer, call, *arguments)
    if problem:
        return None, problem
    if number:  # which may be infinite: that is a mistake with a name
        try:
            return float(got), ""
        except (TypeError, ValueError, RuntimeError):
            return None, f"Exercise {k}: not yet: {call} the answer is one number; got {in_words(got)}."
    if isinstance(got, Tensor):
        return got, ""
    return None, f"Exercise {k}: not yet: {call} the answer is a tensor; got {in_words(got)}."
