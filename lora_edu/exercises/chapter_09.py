"""Checks for the exercises of chapter 09, LoRA's variants: right, or which mistake was made.

All answers are functions. They are tried on numbers drawn anew at each check.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_edu.exercises.answers import in_words, no_function, normal, real, same, tried
from lora_edu.lora import add_lora
from lora_edu.seeds import pooled, student
from lora_edu.tinylm import TinyLM

SHAPES = ((7, 7, 2), (5, 8, 3))  # out, in, r: a square W shows no sides, the other one does
RATES = ((0.01, 16.0), (0.02, 4.0))  # rate and ratio of exercise 2: a number written into the answer shows


def check_09_1(answer: object) -> str:
    """A function dora(W, A, B, s, m) → the weight that DoRA multiplies with."""
    hint = "V = W + s B A; divide each row of V by its length, and multiply it with m."
    if refused := no_function(1, answer, "W, A, B, s, m", hint):
        return refused
    for out, into, r in SHAPES:
        W, A, B, m = normal((out, into), (r, into), (out, r), (out,))
        m, s = m.abs() + 0.5, 0.7
        call = f"with W of {out} × {into}"
        got, problem = _called(1, answer, call, W, A, B, s, m)
        if problem:
            return problem
        if not isinstance(got, Tensor) or got.shape != W.shape:
            return f"Exercise 1: not yet: {call} the answer is a matrix ({out}, {into}); got {_shown(got)}."
        if problem := _dora_problem(got, W, A, B, s, m):
            return f"Exercise 1: not yet: {call}: {problem}"
    return (
        "Exercise 1: right. A and B can only turn the rows now; how long they are is m's matter, and m starts as W's "
        "own lengths, so that the model starts as the base."
    )


def _dora_problem(got: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor) -> str:
    """What is wrong with a DoRA weight, if anything."""
    V = W + s * B @ A
    rows = V / V.norm(dim=1, keepdim=True)
    if same(got, m[:, None] * rows):
        return ""
    for other, why in (
        (rows, "the rows have length 1: m is missing."),
        (V, "that is LoRA: the lengths are never divided out."),
        (m[:, None] * V, "m is there, but the rows' own lengths are not divided out."),
        (
            m[:, None] * V / V.norm(),
            "that divides by the length of the whole matrix; each row has a length of its own.",
        ),
        (
            m[:, None] * V / W.norm(dim=1, keepdim=True),
            "that divides by the lengths of W. As A and B learn, V's lengths are others, and it is V's direction "
            "that is wanted.",
        ),
        (m[:, None] * (W + B @ A) / (W + B @ A).norm(dim=1, keepdim=True), "s is missing."),
    ):
        if same(got, other):
            return why
    columns = V / V.norm(dim=0)
    if same(got, m[:, None] * columns) or (len(m) == W.shape[1] and same(got, m * columns)):
        return (
            "the lengths are those of columns. W is (out, in) here, so that a row belongs to an output (the paper "
            "writes W the other way round and says column)."
        )
    if len(m) == W.shape[1] and same(got, m * rows):
        return "m scales the columns; write m[:, None], so that it scales the rows."
    return "it is off. Look at what is normalised, and along which side."


def check_09_2(answer: object) -> str:
    """A function groups(model, rate, ratio) → LoRA+'s parameter groups for an optimiser."""
    hint = "a list of dictionaries with 'params' and 'lr': lora_B at ratio · rate, all else that is trained at rate."
    if refused := no_function(2, answer, "model, rate, ratio", hint):
        return refused
    torch.manual_seed(0)
    model = add_lora(TinyLM(30, 20, 1, 5, 8), 2, 2, ["query", "up"])
    model.norm.weight.requires_grad_(True)
    for rate, ratio in RATES:
        call = f"of a small TinyLM at rate = {rate:g} and ratio = {ratio:g}"
        got, problem = _called(2, answer, call, model, rate, ratio)
        if problem:
            return problem
        try:
            made = torch.optim.SGD([{**group} for group in got], lr=math.nan).param_groups
            rates = {id(p): float(group["lr"]) for group in made for p in group["params"]}
        except Exception as error:
            return (
                "Exercise 2: not yet: torch.optim must take the answer, a list of {'params': [...], 'lr': ...}; it "
                f"says {type(error).__name__}: {str(error)[:100]}"
            )
        if problem := _groups_problem(rates, model, rate, ratio):
            return f"Exercise 2: not yet: {problem}"
    return (
        "Exercise 2: right. Nothing else is LoRA+: the same model, the same optimiser, two rates. With Adam a factor "
        "of 16 means that B's entries move 16 times as far."
    )


def _groups_problem(rates: Mapping[int, float], model: nn.Module, usual: float, ratio: float) -> str:
    """What is wrong with the rates of a model's parameters (by id), if anything."""
    for name, parameter in model.named_parameters():
        rate = rates.get(id(parameter))
        if not parameter.requires_grad:
            if rate is not None:
                return f"{name} is frozen; leave it out."
            continue
        if rate is None:
            return f"{name} is trained too, and in no group."
        if math.isnan(rate):
            return f"the group with {name} has no 'lr'; then its rate is the optimiser's own."
        wanted = usual * ratio if name.endswith("lora_B") else usual
        if math.isclose(rate, wanted):
            continue
        if name.endswith("lora_A") and math.isclose(rate, usual * ratio):
            return "the larger rate is B's: A x adds up over all inputs, B's sum has r terms only."
        if math.isclose(rate, usual / ratio):
            return f"{name} gets rate / ratio. A has the rate that is given, and B ratio times it."
        return f"{name} gets {rate:g}; it must be {wanted:g} where rate = {usual:g} and ratio = {ratio:g}."
    return ""


def check_09_3(answer: object) -> str:
    """A function start(W, r, s) → (A, B, W_res) of PiSSA."""
    hint = "W = UΣVᵀ: B = U_r √(Σ_r / s), A = √(Σ_r / s) V_rᵀ, and W_res = W − s B A."
    if refused := no_function(3, answer, "W, r, s", hint):
        return refused
    for out, into, r in SHAPES:
        for s in (1.0, 0.25):
            (W,) = normal((out, into))
            call = f"with W of {out} × {into}, r = {r} and s = {s:g}"
            got, problem = _called(3, answer, call, W, r, s)
            if problem:
                return problem
            if (
                not isinstance(got, tuple | list)
                or len(got) != 3
                or not all(isinstance(m, Tensor) for m in got)
            ):
                return (
                    f"Exercise 3: not yet: start must return three matrices (A, B, W_res); got {_shown(got)}."
                )
            shapes = [(r, into), (out, r), (out, into)]
            if [tuple(each.shape) for each in got] != shapes:
                return (
                    f"Exercise 3: not yet: {call}: A must be {shapes[0]}, B {shapes[1]} and W_res {shapes[2]}; got "
                    f"{', '.join(str(tuple(each.shape)) for each in got)}."
                )
            if problem := _start_problem(*got, W, r, s):
                return f"Exercise 3: not yet: {call}: {problem}"
    return (
        "Exercise 3: right. W_res + s B A is W, so nothing changes at the start; and what is trained is the part of W "
        "that it had most of."
    )


def _start_problem(A: Tensor, B: Tensor, rest: Tensor, W: Tensor, r: int, s: float) -> str:
    """What is wrong with a start of PiSSA, if anything."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    top = (U[:, :r] * S[:r]) @ Vh[:r]
    if not same(rest + s * B @ A, W):
        if same(rest, W):
            return "W_res is W itself, so that the model starts at W + s B A. Take s B A out of it."
        if same(rest + B @ A, W):
            return "W_res is W − B A. LoRA adds s B A, so take s times it out."
        return "W_res + s B A isn't W: the model would start somewhere else."
    if not same(s * B @ A, top):
        if same(s * B @ A, (U[:, -r:] * S[-r:]) @ Vh[-r:]):
            return "these are the smallest singular directions; PiSSA trains the largest."
        if same(B @ A, top):
            return "the model starts as the base, but B A itself is the first r directions of W: s B A should be."
        return "the model starts as the base, but s B A isn't the best matrix of rank r to W."
    held = torch.diag((A @ A.T).diagonal())  # Σ/s, in any order of the directions
    if not same(A @ A.T, held) or not same(B.T @ B, held):
        return (
            "s B A is right, but Σ/s isn't shared: each factor gets the root of it. (AdamW takes other steps of ΔW "
            "from another sharing, as section 8 shows.)"
        )
    return ""


def check_09_4(answer: object) -> str:
    """A function smallest(groups, n, t) → the difference of two means of n seeds whose interval just leaves out 0."""
    hint = "pool: s² = Σ (x − its group's mean)² / Σ (n_g − 1); then t(Σ (n_g − 1)) · s · √(2/n)."
    if refused := no_function(4, answer, "groups, n, t", hint):
        return refused
    t = lambda freedom: student(0.975, freedom)
    for sizes, n in (((3, 3, 3, 3), 3), ((2, 5, 3), 4)):
        groups = [(each + 10 * k).tolist() for k, each in enumerate(normal(*[(size,) for size in sizes]))]
        call = f"with groups of {', '.join(map(str, sizes))} runs and n = {n}"
        got, problem = _called(4, answer, call, [list(group) for group in groups], n, t)
        if problem:
            return problem
        value = real(got)
        if value is None:
            return f"Exercise 4: not yet: {call} the answer is one number; got {_shown(got)}."
        if problem := _smallest_problem(value, groups, n, t):
            return f"Exercise 4: not yet: {call} it gives {value:.4g}: {problem}"
    return (
        "Exercise 4: right. Four times the seeds halve it. And it is what an interval just shows: a true difference "
        "of this size is missed every other time."
    )


def _smallest_problem(value: float, groups: Sequence[Sequence[float]], n: int, t: Callable) -> str:
    """What is wrong with the smallest difference that shows, if anything."""
    deviation, freedom = pooled(groups)
    right = t(freedom) * deviation * math.sqrt(2 / n)
    if math.isclose(value, right, rel_tol=1e-6):
        return ""
    runs = [x for group in groups for x in group]
    inside = deviation**2 * freedom
    all_alike = math.sqrt(sum((x - sum(runs) / len(runs)) ** 2 for x in runs) / (len(runs) - 1))
    single = [pooled([group]).deviation for group in groups]
    for other, why in (
        (right / math.sqrt(2), "that is the error of one mean. A difference has two: √(2/n)."),
        (right / math.sqrt(2 / n), "that is for single runs; a mean of n runs is surer by √n."),
        (
            t(freedom) * math.sqrt(inside / len(runs)) * math.sqrt(2 / n),
            "the squares are divided by the number of runs. Each group has given away one, for its mean.",
        ),
        (
            t(len(runs) - 1) * all_alike * math.sqrt(2 / n),
            "that is the spread of all runs together, in which the settings' own differences are. Each run counts "
            "from its group's mean.",
        ),
        (
            t(len(runs) - 1) * deviation * math.sqrt(2 / n),
            "t is asked for another freedom: it is Σ (n_g − 1).",
        ),
        (
            t(freedom) * sum(single) / len(single) * math.sqrt(2 / n),
            "that is the mean of the deviations. Pool their squares, each with its n_g − 1.",
        ),
        (deviation * math.sqrt(2 / n), "t is missing."),
        (right * deviation, "that has the variance where the deviation belongs."),
    ):
        if math.isclose(value, other, rel_tol=1e-6):
            return why
    return "it is off. Hint: the squares inside the groups, Σ (n_g − 1), and √(2/n)."


def check_09_5(answer: object) -> str:
    """A function tuned(losses) → the best rate, None where it isn't between two others; losses: rate → loss or None."""
    hint = "a run that blew up (None) is worse than any other; a best at either end of the sorted rates isn't tuned."
    if refused := no_function(5, answer, "losses", hint):
        return refused
    first, second, third = (5 + 0.1 * normal((3,))[0].abs().sort().values).tolist()
    cases = (
        ({0.02: first, 0.005: third, 0.01: second, 0.04: third}, 0.02, "the best lies inside"),
        (
            {0.02: first, 0.01: second, 0.005: third},
            None,
            "the largest rate is the best: nobody knows what 0.04 gives",
        ),
        ({0.04: third, 0.01: first, 0.02: second}, None, "the smallest rate is the best"),
        (
            {0.02: first, 0.01: second, 0.04: None},
            0.02,
            "0.04 was tried and blew up, so 0.02 has a neighbour",
        ),
        ({0.02: None, 0.01: None}, None, "every run blew up"),
        ({0.01: first}, None, "one rate is no grid"),
    )
    for losses, right, why in cases:
        shown = {rate: loss if loss is None else round(loss, 2) for rate, loss in losses.items()}
        got, problem = _called(5, answer, f"with {shown}", dict(losses))
        if problem:
            return problem
        if got is None if right is None else (real(got) is not None and math.isclose(real(got), right)):
            continue
        if real(got) is None and got is not None:
            return f"Exercise 5: not yet: the answer is a rate or None; got {_shown(got)}."
        if real(got) is not None and real(got) not in losses:
            return f"Exercise 5: not yet: with {shown} it gives {real(got):.4g}, which is no rate of these."
        return f"Exercise 5: not yet: with {shown} it gives {got}; it must be {right}: {why}."
    return (
        "Exercise 5: right. A best at the edge says only that the grid was too small; a comparison at "
        "one rate has nothing but edges."
    )


def check_09_6(answer: object) -> str:
    """A function step(A, B, G, rate) → (A', B') after a step that depends on B A alone; G = ∂loss/∂W."""
    hint = "∇B = G Aᵀ and ∇A = Bᵀ G; multiply ∇B by (A Aᵀ)⁻¹ from the right and ∇A by (Bᵀ B)⁻¹ from the left."
    if refused := no_function(6, answer, "A, B, G, rate", hint):
        return refused
    for out, into, r in SHAPES:
        A, B, G = normal((r, into), (out, r), (out, into))
        call = f"with W of {out} × {into} and r = {r}"
        got, problem = _called(6, answer, call, A, B, G, 0.1)
        if problem:
            return problem
        if (
            not isinstance(got, tuple | list)
            or len(got) != 2
            or not all(isinstance(each, Tensor) for each in got)
            or (got[0].shape, got[1].shape) != (A.shape, B.shape)
        ):
            return f"Exercise 6: not yet: {call} the answer is (A', B') of A's and B's shapes; got {_shown(got)}."
        if problem := _step_problem(*got, A, B, G, 0.1):
            return f"Exercise 6: not yet: {call}: {problem}"
    return (
        "Exercise 6: right. B' A' is the same whichever factors of B A one starts from: the M's cancel. To first order "
        "W moves by −η (G P + Q G), with P and Q the projections on A's rows and B's columns."
    )


def _step_problem(A1: Tensor, B1: Tensor, A: Tensor, B: Tensor, G: Tensor, rate: float) -> str:
    """What is wrong with a step of scaled gradient descent, if anything."""
    inverse = torch.linalg.inv
    for_B, for_A = inverse(A @ A.T), inverse(B.T @ B)
    right_A, right_B = A - rate * for_A @ B.T @ G, B - rate * G @ A.T @ for_B
    if same(A1, right_A) and same(B1, right_B):
        return ""
    swapped_A, swapped_B = A - rate * for_B @ B.T @ G, B - rate * G @ A.T @ for_A
    after_B, after_A = right_B, right_A
    others = (
        (
            (A - rate * B.T @ G, B - rate * G @ A.T),
            "that is plain SGD: its step depends on how B A is split.",
        ),
        ((swapped_A, swapped_B), "the inverses are exchanged: ∇B gets (A Aᵀ)⁻¹ and ∇A (Bᵀ B)⁻¹."),
        ((2 * A - right_A, 2 * B - right_B), "the sign is wrong: this goes uphill."),
        (
            (A - rate * inverse(after_B.T @ after_B) @ after_B.T @ G, right_B),
            "A's step uses the new B. Both steps are made from the old factors.",
        ),
        (
            (right_A, B - rate * G @ after_A.T @ inverse(after_A @ after_A.T)),
            "B's step uses the new A. Both steps are made from the old factors.",
        ),
        ((A - rate * B.T @ G, right_B), "only B's gradient is scaled."),
        ((right_A, B - rate * G @ A.T), "only A's gradient is scaled."),
        ((A, right_B), "A doesn't move."),
        ((right_A, B), "B doesn't move."),
    )
    for (other_A, other_B), why in others:
        if same(A1, other_A) and same(B1, other_B):
            return why
    return "it is off. Try it from B M and M⁻¹ A: B' A' must stay."


def _called(k: int, answer: Callable, call: str, *arguments: object) -> tuple[object, str]:
    """(what came back, what to say where the call raised something or changed what it was given)."""
    copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    got, problem = tried(k, answer, call, *copies, longest=120)
    if problem:
        return None, problem
    for given, copy in zip(arguments, copies, strict=True):
        if isinstance(given, Tensor) and not torch.equal(given, copy):
            return None, f"Exercise {k}: not yet: {call} it changes a matrix that it was given."
    return got, ""


def _shown(value: object) -> str:
    """What somebody returned, in a few words; of several tensors their shapes."""
    if isinstance(value, tuple | list) and value and all(isinstance(each, Tensor) for each in value):
        return f"tensors {', '.join(str(tuple(each.shape)) for each in value)}"
    return in_words(value)
