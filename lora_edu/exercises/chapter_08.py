"""Checks for the exercises of chapter 08, the other ways to tune: right, or which mistake was made.

Most answers are functions. They are tried on numbers drawn anew at each check.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor, nn

from lora_edu import counting
from lora_edu.exercises.answers import in_words, judge, no_function, normal, real, same, tried
from lora_edu.tinylm import TinyLM

MODEL, TOKENS = "Llama-3.2-3B", 50  # exercise 4
PAIRS = 5  # of exercise 6


class Encoder(nn.Module):
    """A small layer of T5's kind: two linear layers, one of them without a bias, a norm, a table of positions."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4, bias=False)
        self.dense = nn.Linear(4, 4)
        self.relative_attention_bias = nn.Embedding(3, 2)
        self.norm = nn.LayerNorm(4)
        self.in_proj_bias = nn.Parameter(torch.zeros(12))
        self.scale = nn.Parameter(torch.ones(4))  # neither a weight by its name nor a bias


def check_08_1(answer: object) -> str:
    """A function biases(model) → the names of the parameters that BitFit trains."""
    hint = "model.named_parameters() gives names; what they end with tells the biases, of norms too."
    if refused := no_function(1, answer, "model", hint):
        return refused
    for model in (TinyLM(30, 20, 1, 5, 8), Encoder()):
        call = f"of a {type(model).__name__}"
        try:
            got = answer(model)
            names = list(got)
        except Exception as error:
            return f"Exercise 1: not yet: {call} it raises {type(error).__name__}: {error}"
        known = dict(model.named_parameters())
        if isinstance(got, str) or not all(isinstance(each, str) and each in known for each in names):
            return (
                f"Exercise 1: not yet: {call} the answer is a list of names of parameters, such as 'norm.bias'; got "
                f"{in_words(got)}."
            )
        if problem := _bias_problem(set(names), known):
            return f"Exercise 1: not yet: {call} {problem}"
    return (
        "Exercise 1: right. In TinyLM all linear layers of the blocks and all norms have one. Llama has none, so "
        "that BitFit has nothing to train there."
    )


def _bias_problem(names: set[str], known: Mapping[str, Tensor]) -> str:
    """What is wrong with a choice of parameters, if anything."""
    right = {name for name in known if name.endswith("bias")}
    if names == right:
        return ""
    if more := sorted(names - right):
        if any("relative_attention_bias" in name for name in more):
            return "relative_attention_bias.weight is a table of positions: 'bias' is in its name, but not at the end."
        return f"{more[0]} is no bias."
    missing = sorted(right - names)
    if all("norm" in name for name in missing):
        return f"the norms' biases are missing, {missing[0]} and the like; BitFit trains them too."
    return f"{missing[0]} is missing."


def check_08_2(answer: object) -> str:
    """A function attend(q, K, V, P_K, P_V) → one head's causal attention with a prefix."""
    hint = "put P_K before K and P_V before V; token t sees all of the prefix and the text up to itself."
    if refused := no_function(2, answer, "q, K, V, P_K, P_V", hint):
        return refused
    for time, k, d in ((6, 3, 4), (5, 1, 9)):
        q, K, V, P_K, P_V = normal(*[(time, d)] * 3, *[(k, d)] * 2)
        call = f"with {time} tokens of text, {k} in the prefix and heads of {d}"
        got, problem = tried(2, answer, call, *(each.clone() for each in (q, K, V, P_K, P_V)))
        if problem:
            return problem
        if not isinstance(got, Tensor) or got.shape != (time, d):
            return (
                f"Exercise 2: not yet: {call} the answer is a tensor ({time}, {d}), a row for each token of the text; "
                f"got {in_words(got)}."
            )
        if problem := _attention_problem(got, q, K, V, P_K, P_V):
            return f"Exercise 2: not yet: {call}: {problem}"
    return (
        "Exercise 2: right. The prefix takes part in the same softmax as the text, so what it gets, the text loses; "
        "and every token sees all of it."
    )


def _attention_problem(got: Tensor, q: Tensor, K: Tensor, V: Tensor, P_K: Tensor, P_V: Tensor) -> str:
    """What is wrong with an attention to [P_K; K] and [P_V; V], if anything."""
    time, k = len(q), len(P_K)
    keys, values, root = torch.cat([P_K, K]), torch.cat([P_V, V]), math.sqrt(q.shape[1])
    seen = torch.ones(time, k + time, dtype=torch.bool).tril(k)
    text = torch.ones(time, time, dtype=torch.bool).tril()

    def attention(keys: Tensor, values: Tensor, seen: Tensor, scale: float = root) -> Tensor:
        return (q @ keys.T / scale).masked_fill(~seen, -math.inf).softmax(-1) @ values

    if same(got, attention(keys, values, seen)):
        return ""
    alone = attention(K, V, text)
    for other, why in (
        (attention(keys, values, seen, 1.0), "the scores aren't divided by √d."),
        (attention(keys, values, torch.ones_like(seen)), "a token sees those after it: the mask is missing."),
        (
            attention(keys, values, torch.ones_like(seen).tril()),
            "the mask starts at the prefix, so that token t doesn't see all that is before it (is_causal=True does "
            "this where there are more keys than queries). Move the diagonal by the prefix's length.",
        ),
        (alone, "that is the text alone: the prefix isn't there."),
        (
            alone + attention(P_K, P_V, seen[:, :k]),
            "those are two softmaxes, added. Prefix and text share one.",
        ),
        (attention(torch.cat([0 * P_K, K]), values, seen), "P_K isn't used."),
        (attention(keys, torch.cat([0 * P_V, V]), seen), "P_V isn't used."),
    ):
        if same(got, other):
            return why
    return "it is off. Look at the order of prefix and text, which must be the same in keys, values and mask."


def check_08_3(answer: object) -> str:
    """A function fold(W, b, l_in, l_out) → (W', b') with W' x + b' = l_out ⊙ (W (l_in ⊙ x) + b)."""
    hint = "l_out scales the rows of W and the bias, l_in the columns of W."
    if refused := no_function(3, answer, "W, b, l_in, l_out", hint):
        return refused
    for out, inside in ((6, 6), (8, 5)):
        W, b, l_in, l_out = normal((out, inside), (out,), (inside,), (out,))
        call = f"with W of {out} × {inside}"
        got, problem = tried(3, answer, call, *(each.clone() for each in (W, b, l_in, l_out)))
        if problem:
            return problem
        if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(m, Tensor) for m in got):
            return (
                f"Exercise 3: not yet: fold must return a matrix and a bias, (W', b'); got {in_words(got)}."
            )
        folded, bias = got
        if folded.shape != W.shape or bias.shape != b.shape:
            return (
                f"Exercise 3: not yet: {call}: W' must be ({out}, {inside}) and b' ({out},); got "
                f"{tuple(folded.shape)} and {tuple(bias.shape)}."
            )
        if problem := _folding_problem(folded, bias, W, b, l_in, l_out):
            return f"Exercise 3: not yet: {call}: {problem}"
    return (
        "Exercise 3: right. diag(l_out) W diag(l_in) is a matrix like W: nothing is left to compute when the model is "
        "used. No non-linearity stood between the factors and W."
    )


def _folding_problem(folded: Tensor, bias: Tensor, W: Tensor, b: Tensor, l_in: Tensor, l_out: Tensor) -> str:
    """What is wrong with a weight and a bias that scales were folded into, if anything."""
    if not same(folded, l_out[:, None] * W * l_in):
        if same(folded, W):
            return "W' is W itself."
        if W.shape[0] == W.shape[1] and same(folded, l_in[:, None] * W * l_out):
            return "the sides are mixed up: W is (out, in), so l_out scales its rows and l_in its columns."
        for other, name in ((l_out[:, None] * W, "l_in"), (W * l_in, "l_out")):
            if same(folded, other):
                return f"{name} is missing in W'."
        return "W' is off. Hint: l_out scales the rows, l_in the columns."
    if same(bias, l_out * b):
        return ""
    if same(bias, b):
        return "the bias is added before l_out scales the sum, so it is scaled too."
    if b.shape == l_in.shape and same(bias, l_in * l_out * b):
        return "l_in scales what comes into W, and the bias doesn't."
    return "b' is off. Hint: l_out scales all that comes out of the layer."


def check_08_4(answer: object) -> str:
    """How many numbers a prefix of 50 tokens has in Llama-3.2-3B, whose queries share keys and values."""
    model = counting.ARCHITECTURES[MODEL]
    keys = model.key_value_heads * model.head_width
    right = 2 * model.layers * TOKENS * keys
    return judge(
        4,
        answer,
        right,
        {
            2
            * model.layers
            * TOKENS
            * model.width: "that counts the 24 heads of the queries. Three of them share one "
            "head of keys and values: there are 8.",
            right // 2: "keys and values are two.",
            right // model.layers: "that is one layer; each of the 28 has a prefix of its own.",
            TOKENS
            * model.width: "that is a prompt, 50 embeddings. A prefix has keys and values in every layer.",
            right // TOKENS: "that is one token.",
            2 * right: "a number, not a byte: in half precision each takes two.",
        },
        hint="2 (keys and values) · layers · tokens · heads of keys · numbers a head.",
        why="The published run trains 2 867 200 numbers, exactly these.",
        tolerance=1e-9,
    )


def check_08_5(answer: object) -> str:
    """A function front(points) → the names that no other point beats; points: name → (cost, loss)."""
    hint = "a point is beaten by another that is nowhere worse (cost and loss) and somewhere better."
    if refused := no_function(5, answer, "points", hint):
        return refused
    corner = {
        "a": (1, 5.0),
        "b": (2, 4.0),
        "c": (3, 3.9),
        "d": (4, 1.0),
        "e": (3, 4.5),
        "f": (4, 2.0),
        "g": (5, 1.0),
    }
    drawn = {name: tuple(torch.randint(1, 7, (2,)).tolist()) for name in "hijklmno"}
    for points in (corner | {"twin of d": corner["d"]}, drawn):
        try:
            got = answer(dict(points))
            names = set(got)
        except Exception as error:
            return f"Exercise 5: not yet: with points {points} it raises {type(error).__name__}: {error}"
        if isinstance(got, str) or not names <= set(points):
            return (
                f"Exercise 5: not yet: the answer is a list or set of names of points; got {in_words(got)}."
            )
        if problem := _front_problem(names, points):
            return f"Exercise 5: not yet: with {points} it gives {sorted(names)}: {problem}"
    return (
        "Exercise 5: right. What is on the front depends on what counts as the cost: change it, and other methods "
        "stand there."
    )


def _front_problem(names: set[str], points: Mapping[str, tuple[float, float]]) -> str:
    """What is wrong with a front, if anything."""
    right = _front(points)
    if names == right:
        return ""
    turned = {name: (cost, -loss) for name, (cost, loss) in points.items()}
    if names == _front(turned):
        return "that takes a large loss for good."
    for name in sorted(names - right):
        better = next(other for other in points if _beats(points[other], points[name]))
        one, other = points[name], points[better]
        ties = " One of the two numbers may be equal." if one[0] == other[0] or one[1] == other[1] else ""
        return f"{name} {one} is beaten by {better} {other}.{ties}"
    name = min(right - names)
    if any(other != name and points[other] == points[name] for other in points):
        return f"{name} has a twin with the same two numbers. Neither beats the other: both stay."
    return f"{name} {points[name]} is missing: no other is nowhere worse and somewhere better."


def _front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    return {name for name in points if not any(_beats(other, points[name]) for other in points.values())}


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and tuple(one) != tuple(other)


def check_08_6(answer: object) -> str:
    """A function p_value(x, y) → the share of all orders of y whose |rank correlation| with x is as large."""
    hint = "itertools.permutations gives all orders of y's ranks; count those with |Σ| ≥ the one found, divide by n!."
    if refused := no_function(6, answer, "x, y", hint):
        return refused
    agreeing = [0.1, 0.5, 2.0, 7.0, 30.0]
    drawn = [each.tolist() for each in normal((PAIRS,), (PAIRS,))]
    for x, y in ((agreeing, [-value for value in agreeing]), drawn, ([1.0, 2, 3, 90], [1.0, 90, 2, 3])):
        try:
            got = answer(list(x), list(y))
        except Exception as error:
            return f"Exercise 6: not yet: it raises {type(error).__name__}: {error}"
        value, right = real(got), _share(x, y)
        if value is None:
            return f"Exercise 6: not yet: the answer is one number; got {in_words(got)}."
        if abs(value - right) < 1e-9:
            continue
        shown = f"for x = {[round(v, 2) for v in x]}, y = {[round(v, 2) for v in y]} it gives {value:.4g}"
        for other, why in (
            (_share(x, y, strict=True), "the order that was found counts too: use ≥, not >."),
            (
                _share(x, y, sided=True),
                "that counts one side. An order as far from chance the other way counts too: |ρ|.",
            ),
            (_share(x, y, ranked=False), "that correlates the values. Take their ranks first."),
            (
                _by_formula(x, y),
                "correlations that are equal differ in the last digit when computed. Compare whole numbers, or with "
                "a small margin.",
            ),
            (1 - right, "that is 1 − p."),
            (right * math.factorial(len(x)), "that is how many orders; divide by n!."),
        ):
            if abs(value - other) < 1e-9:
                return f"Exercise 6: not yet: {shown}: {why}"
        return f"Exercise 6: not yet: {shown}. Hint: {hint}"
    return (
        "Exercise 6: right. With n things the smallest p there is is 2 / n!: four methods cannot come below 0.08, "
        "however well two tables agree."
    )


def _share(
    x: Sequence[float], y: Sequence[float], sided: bool = False, strict: bool = False, ranked: bool = True
) -> float:
    """The share of all orders of y that correlate with x at least as strongly as y does."""
    ranks: Callable[[Iterable[float]], list[float]] = lambda values: [sorted(values).index(v) for v in values]
    x, y = (ranks(x), ranks(y)) if ranked else (list(x), list(y))
    centre = [value - sum(x) / len(x) for value in x]
    size = (lambda value: value) if sided else abs
    product = lambda order: size(sum(a * b for a, b in zip(centre, order, strict=True)))
    found, margin = product(y), 1e-9 * (1 if strict else -1)
    return sum(product(order) > found + margin for order in permutations(y)) / math.factorial(len(y))


def _by_formula(x: Sequence[float], y: Sequence[float]) -> float:
    """The share by ρ = 1 − 6 Σd² / (n (n² − 1)), compared without a margin: some orders that tie are lost."""
    n = len(x)
    first, second = ([sorted(values).index(each) for each in values] for values in (x, y))

    def strength(order: Sequence[int]) -> float:
        apart = sum((one - other) ** 2 for one, other in zip(first, order, strict=True))
        return abs(1 - 6 * apart / (n * (n**2 - 1)))

    return sum(strength(order) >= strength(second) for order in permutations(second)) / math.factorial(n)
