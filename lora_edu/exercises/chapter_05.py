"""Checks for the exercises of chapter 05, LoRA for a linear layer: right, or which mistake was made.

Every right and every typical wrong answer is computed here from the exercise's own numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edu.exercises.answers import judge, no_function, same

SMALL_G = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
SMALL_A = torch.tensor([[1.0, 0.0, 1.0]])
SMALL_ALPHA = 3.0


def check_05_1(answer: object) -> str:
    """(gradient of A, gradient of B) of a fresh layer, whose B is zero, at alpha = 3, r = 1."""
    hint = "∂L/∂A = s Bᵀ G and ∂L/∂B = s G Aᵀ, each in the shape of its factor, with s = alpha / r."
    if answer is None:
        return f"Exercise 1: not attempted yet. Hint: {hint}"
    pair = _tensors(answer)
    if pair is None or len(pair) != 2:
        return (
            f"Exercise 1: the answer is a pair of matrices, (gradient of A, gradient of B); got {answer!r}."
        )
    of_A, of_B = pair
    s = SMALL_ALPHA / SMALL_A.shape[0]
    right = s * SMALL_G @ SMALL_A.T
    zero_A, shape = (
        torch.zeros_like(SMALL_A),
        "{} is the shape of {}'s gradient, the same as {}'s own; got {}.",
    )
    if same(of_A, right) and same(of_B, zero_A):
        problem = "the two are swapped. The gradient of A has B in it, which is zero; that of B has A in it."
    elif of_A.shape != SMALL_A.shape:
        problem = shape.format("1 × 3", "A", "A", " × ".join(map(str, of_A.shape)))
    elif of_B.shape != right.shape:
        problem = shape.format("2 × 1", "B", "B", " × ".join(map(str, of_B.shape)))
    elif of_A.any() and not of_B.any():
        problem = "it is the other way round: B = 0 kills the gradient of A, s Bᵀ G, and A is not zero."
    elif of_A.any():
        problem = "the gradient of A is s Bᵀ G, and B is zero."
    elif not of_B.any():
        problem = "both zero would mean that nothing ever moves. B's gradient is s G Aᵀ, and A is not zero."
    elif same(of_B, right):
        return (
            "Exercise 1: right. B = 0 hides the data from A; B moves first, and A from the second step on, "
            "when B is no longer zero."
        )
    elif same(of_B, right / s):
        problem = f"s is lost: alpha / r = {s:g} stands in front of G Aᵀ."
    elif same(of_B, right * s):
        problem = "that is s² G Aᵀ. s² belongs to the first step of ΔW; the gradient of B has s once."
    elif same(of_B, -right):
        problem = "the sign: that is the direction in which a step goes, the gradient is its opposite."
    else:
        problem = f"A's gradient is right, B's is not. Hint: {hint}"
    return f"Exercise 1: not yet: {problem}"


def check_05_2(answer: object) -> str:
    """The alpha with which an adapter of r = 8, alpha = 16, padded with zeros to r = 16, has the same ΔW."""
    rank, alpha, wider = 8, 16, 16
    right = alpha * wider / rank
    mistakes = {
        alpha: "with alpha unchanged s = alpha / r falls from 2 to 1, and ΔW is halved.",
        alpha * rank / wider: "that is the wrong way round: s would be 0.5, a quarter of what it was.",
        alpha * (wider / rank) ** 0.5: "that belongs to s = alpha / √r (rsLoRA). Here s = alpha / r.",
        alpha / rank: "that is s. It has to stay the same; asked for is alpha = s r.",
        alpha
        * (wider / rank) ** 2: "that doubles ΔW. The padded factors have the same product BA, so s must "
        "stay the same.",
    }
    return judge(
        2,
        answer,
        right,
        mistakes,
        hint="the zeros add nothing to BA, so s = alpha / r must stay what it was.",
        why="BA is the same, so s = alpha / r must be: alpha grows with r.",
        tolerance=1e-6,
    )


def check_05_3(answer: object) -> str:
    """A function average(B1, A1, B2, A2) → (B, A) whose update is the mean of the two updates."""
    hint = "½B₁A₁ + ½B₂A₂ is one product: [½B₁ ½B₂] times A₁ above A₂, of rank 2r."
    if refused := no_function(3, answer, "B1, A1, B2, A2", hint):
        return refused
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 2), (2, 5), (6, 2), (2, 5)]
    B1, A1, B2, A2 = (torch.randn(*each, generator=generator, dtype=torch.float64) for each in shapes)
    try:
        got = _tensors(answer(B1.clone(), A1.clone(), B2.clone(), A2.clone()))
    except Exception as error:
        return f"Exercise 3: not yet: average(B1, A1, B2, A2) raises {type(error).__name__}: {error}"
    if got is None or len(got) != 2 or any(each.dim() != 2 for each in got):
        return "Exercise 3: not yet: average must return two matrices, (B, A), and not their product."
    B, A = (each.double() for each in got)
    if B.shape[1] != A.shape[0] or (B.shape[0], A.shape[1]) != (6, 5):
        shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
        return f"Exercise 3: not yet: B must be (out, r) and A (r, in), here (6, r) and (r, 5); got {shapes}."
    update, mean = B @ A, (B1 @ A1 + B2 @ A2) / 2
    if same(update, mean):
        return "Exercise 3: right. The mean of two updates has rank up to 2r, so no two factors of rank r will do."
    if same(update, (B1 + B2) @ (A1 + A2) / 4):
        problem = (
            "that averages the factors. ¼(B₁ + B₂)(A₁ + A₂) holds B₁A₂ and B₂A₁, which nobody trained, "
            "and of the mean itself only half."
        )
    elif same(update, (B1 + B2) @ (A1 + A2)):
        problem = "that adds the factors, which brings in B₁A₂ and B₂A₁."
    elif same(update, 2 * mean):
        problem = "that is the sum of the two updates. A mean needs a half: halve B, or A, not both."
    elif same(update, mean / 2):
        problem = "that is half of the mean: the half is taken in B *and* in A. Take it once."
    else:
        problem = f"BA is not ½B₁A₁ + ½B₂A₂. Hint: {hint}"
    return f"Exercise 3: not yet: {problem}"


def check_05_4(answer: object) -> str:
    """A function merge_conv1d(weight, A, B, scaling) → the merged weight, (in, out)."""
    hint = "GPT-2's Conv1D computes x W with W (in, out), so ΔW there is s (BA)ᵀ."
    if refused := no_function(4, answer, "weight, A, B, scaling", hint):
        return refused
    generator = torch.Generator().manual_seed(6)
    for inputs, outputs in ((4, 4), (3, 9)):
        W, A, B = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((inputs, outputs), (2, inputs), (outputs, 2))
        )
        call, before, update = f"with a weight of {inputs} × {outputs}", W.clone(), (B @ A).T
        try:
            got = answer(W, A.clone(), B.clone(), 2.0)
        except Exception as error:
            why = "BA is (out, in), the weight (in, out). " if "size" in str(error) else ""
            return f"Exercise 4: not yet: {call} it raises {type(error).__name__}: {error}. {why}Hint: {hint}"
        if not isinstance(got, Tensor):
            return f"Exercise 4: not yet: merge_conv1d must return a tensor; got {got!r}."
        if not torch.equal(W, before):
            return (
                "Exercise 4: not yet: it changes the weight it was given. Whoever wants to unmerge needs that "
                "one; return a new tensor."
            )
        if same(got, W + 2 * update):
            continue
        return f"Exercise 4: not yet: {_conv1d_problem(got, W, update) or f'{call} it is off. Hint: {hint}'}"
    return (
        "Exercise 4: right. On a square weight the shapes agree either way: only the values tell whether it was "
        "transposed."
    )


def _conv1d_problem(got: Tensor, W: Tensor, update: Tensor) -> str:
    """What a wrong merged weight was most likely worked out from."""
    if W.shape[0] == W.shape[1] and same(got, W + 2 * update.T):
        return "not transposed. This weight is square, so nothing complains: Conv1D computes x W, its ΔW is s (BA)ᵀ."
    if same(got, W + update):
        return "s is lost."
    if same(got, W - 2 * update):
        return "that unmerges: W − ΔW."
    if same(got, 2 * update):
        return "that is ΔW alone. Add it to the weight."
    if same(got, (W + 2 * update).T):
        return "the result is (out, in). Keep the weight's own shape, (in, out)."
    return ""


def check_05_5(answer: object) -> str:
    """The learning rate that keeps an Adam run the same when alpha goes from 16 to 64 and A₀ is halved."""
    rate, c = 1e-3, 64 / 16
    right = rate / c**0.5
    mistakes = {
        rate / c: "that is the rate for SGD, whose step grows with the gradient. Adam's step does not: √c.",
        rate: "with the rate unchanged B moves as far as before, and s is four times as large.",
        rate * c**0.5: "that is the wrong way round: a larger alpha needs a smaller step.",
        rate * c: "that is the wrong way round, and it is √c: a larger alpha needs a smaller step.",
        1 / c**0.5: "that is the factor on the learning rate. Asked for is the rate.",
    }
    return judge(
        5,
        answer,
        right,
        mistakes,
        hint="s grows by c = 4. For the same ΔW, A and B must each be 1 / √c of what they were, at all steps.",
        why="s grows by 4, A and B shrink by 2 each, and so does the length of an Adam step.",
        tolerance=1e-6,
    )


def check_05_6(answer: object) -> str:
    """By what factor the first SGD step of ΔW grows when alpha is doubled, all else unchanged."""
    return judge(
        6,
        answer,
        4,
        {
            2: "s is in it twice: once in the gradient of B, once where ΔW = s BA is put together.",
            1: "that would be Adam's step of B. SGD's grows with the gradient.",
            8: "A is unchanged, so it is s², not s³.",
            2**0.5: "nothing here takes a root. ΔW = −η s² G AᵀA.",
            0.25: "that is the wrong way round.",
        },
        hint="ΔW after the first step is −η s² G AᵀA.",
        why="s² has doubled twice: under SGD alpha is a learning rate, squared.",
        tolerance=1e-6,
    )


def _tensors(answer: object) -> list[Tensor] | None:
    """The parts of a tuple or list as tensors, None if they are none."""
    if not isinstance(answer, Sequence | Tensor) or isinstance(answer, str):
        return None
    try:
        return [torch.as_tensor(each).detach().double() for each in answer]
    except (TypeError, ValueError, RuntimeError):
        return None
