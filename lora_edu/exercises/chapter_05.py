"""Checks for the exercises of chapter 05, LoRA for a linear layer: right, or which mistake was made.

Every answer is a function. It is tried on matrices drawn anew at each check, or in runs that the check trains itself.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_edu.exercises.answers import measured_merge, no_function, normal, real, same, tried

OUT, IN = 6, 5  # of the small layers that the functions are tried on
STEPS = 25
RATES = {"adam": 0.05, "sgd": 0.02}


def check_05_1(answer: object) -> str:
    """A function gradients(G, A, B, s) → (gradient of A, gradient of B), where G is the gradient by W."""
    hint = (
        "the chain rule through ΔW = s BA: what stands beside a factor is what the gradient passes through."
    )
    if refused := no_function(1, answer, "G, A, B, s", hint):
        return refused
    for s, fresh in ((1.5, True), (3.0, False), (0.25, False)):
        G, A, B = normal((OUT, IN), (2, IN), (OUT, 2))
        B = torch.zeros_like(B) if fresh else B
        where = "with B = 0" if fresh else "with neither factor zero"
        got, problem = _pair(answer, "gradients", G, A, B, s)
        if problem:
            return f"Exercise 1: not yet: {where} {problem}"
        right = _by_autograd(G, A, B, s)
        if not all(map(same, got, right)):
            found = _gradient_problem(got, right, s) or f"Hint: {hint}"
            return f"Exercise 1: not yet: {where} at s = {s:g}: {found}"
    return (
        "Exercise 1: right, and autograd says the same. At B = 0 only B gets a gradient; from the second step on A "
        "gets one, too."
    )


def _by_autograd(G: Tensor, A: Tensor, B: Tensor, s: float) -> list[Tensor]:
    """What PyTorch makes of a loss whose gradient by W is G."""
    factors = [each.clone().requires_grad_(True) for each in (A, B)]
    (s * factors[1] @ factors[0] * G).sum().backward()
    return [each.grad for each in factors]


def _gradient_problem(got: Sequence[Tensor], right: Sequence[Tensor], s: float) -> str:
    """What a wrong pair of gradients was most likely worked out from."""
    of_A, of_B = right
    if same(got[0], of_B) and same(got[1], of_A):
        return "the two are swapped. First the gradient of A, then that of B."
    for name, given, true in (("A", got[0], of_A), ("B", got[1], of_B)):
        if given.shape != true.shape:
            shapes = [" × ".join(map(str, each.shape)) for each in (true, given)]
            return f"the gradient of {name} has {name}'s own shape, {shapes[0]}; got {shapes[1]}."
    for name, given, true in (("A", got[0], of_A), ("B", got[1], of_B)):
        if same(given, true):
            continue
        if true.any() and not given.any():
            return f"the gradient of {name} is not zero: what stands beside {name} is not zero."
        if not true.any():
            return "B is zero, and it is what A's gradient passes through: that gradient is zero."
        for factor, why in (
            (1 / s, f"s is lost in the gradient of {name}: the update is s BA."),
            (
                s,
                f"that is s² in the gradient of {name}. s² belongs to the step of ΔW; a factor's gradient has s once.",
            ),
            (
                -1.0,
                f"the sign of {name}'s: that is the direction in which a step goes, the gradient is its opposite.",
            ),
        ):
            if same(given, factor * true):
                return why
        return f"the gradient of {name} is off."
    return ""


def check_05_2(answer: object) -> str:
    """A function widen(A, B, alpha, rank) → (A, B, alpha) of a higher rank: the same ΔW, and able to learn more."""
    hint = (
        "s = alpha / r must stay, and B A must stay; but a row of A and a column of B must not both be zero."
    )
    if refused := no_function(2, answer, "A, B, alpha, rank", hint):
        return refused
    for rank, wider, alpha in ((2, 4, 16.0), (1, 3, 4.0), (2, 5, 3.0)):
        A, B = normal((rank, IN), (OUT, rank))
        call = f"from r = {rank}, alpha = {alpha:g} to r = {wider}"
        got, problem = tried(2, answer, call, A.clone(), B.clone(), alpha, wider)
        if problem:
            return problem
        if not isinstance(got, tuple | list) or len(got) != 3:
            return f"Exercise 2: not yet: widen must return three things, (A, B, alpha); got {got!r}."
        matrices = _tensors(got[:2])
        if matrices is None or [tuple(each.shape) for each in matrices] != [(wider, IN), (OUT, wider)]:
            return f"Exercise 2: not yet: {call}: A must be ({wider}, {IN}) and B ({OUT}, {wider})."
        if real(got[2]) is None:
            return f"Exercise 2: not yet: alpha must be a number; got {got[2]!r}."
        if problem := _widen_problem(A, B, alpha, *matrices, float(got[2])):
            return f"Exercise 2: not yet: {call}: {problem}"
    return (
        "Exercise 2: right. alpha grows with r, so that s stays. The new directions add nothing yet, but one of "
        "their two factors is not zero, so that the other one gets a gradient."
    )


def _widen_problem(
    A: Tensor, B: Tensor, alpha: float, wide_A: Tensor, wide_B: Tensor, wide_alpha: float
) -> str:
    """What is wrong with a widened adapter, if anything."""
    rank, wider = A.shape[0], wide_A.shape[0]
    before, after = alpha / rank * B @ A, wide_alpha / wider * wide_B @ wide_A
    if not same(after, before):
        if same(wide_B @ wide_A, B @ A):
            times = wide_alpha / wider / (alpha / rank)
            why = (
                " alpha / √r is rsLoRA's; here s = alpha / r." if math.isclose(times**2, rank / wider) else ""
            )
            return f"BA is what it was, but s = alpha / r is {times:.3g} times what it was.{why}"
        return "ΔW = s BA is not what it was. What do the new rows and columns add to it?"
    if any(not wide_A[row].any() and not wide_B[:, row].any() for row in range(wider)):
        return (
            "ΔW is right, but a new row of A and its column of B are both zero. Then both gradients are zero, and "
            "the new direction never moves. Leave one of the two random."
        )
    if max(map(_rank, (wide_A, wide_B))) < wider:
        return "ΔW is right, but some directions are copies of each other: they get the same gradient and stay copies."
    return ""


def check_05_3(answer: object) -> str:
    """A function average(B1, A1, B2, A2) → (B, A) of rank 2r at most, whose update is the mean of the two."""
    hint = "½B₁A₁ + ½B₂A₂ is one product: two B's side by side times two A's above each other."
    if refused := no_function(3, answer, "B1, A1, B2, A2", hint):
        return refused
    B1, A1, B2, A2 = normal((OUT, 2), (2, IN), (OUT, 2), (2, IN))
    try:
        got = _tensors(answer(B1.clone(), A1.clone(), B2.clone(), A2.clone()))
    except Exception as error:
        return f"Exercise 3: not yet: average(B1, A1, B2, A2) raises {type(error).__name__}: {error}"
    if got is None or len(got) != 2 or any(each.dim() != 2 for each in got):
        return "Exercise 3: not yet: average must return two matrices, (B, A), and not their product."
    B, A = got
    if B.shape[1] != A.shape[0] or (B.shape[0], A.shape[1]) != (OUT, IN):
        shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
        return f"Exercise 3: not yet: B must be (out, r) and A (r, in), here ({OUT}, r) and (r, {IN}); got {shapes}."
    update, mean = B @ A, (B1 @ A1 + B2 @ A2) / 2
    if same(update, mean):
        if A.shape[0] > 4:
            return (
                f"Exercise 3: not yet: the update is right, but these factors have rank {A.shape[0]}, and that is no "
                "adapter: it is the whole matrix beside another one. Two of rank 2 fit into rank 4."
            )
        return "Exercise 3: right. The mean of two updates has rank up to 2r, so no two factors of rank r will do."
    for other, why in (
        (
            (B1 + B2) @ (A1 + A2) / 4,
            "that averages the factors. ¼(B₁ + B₂)(A₁ + A₂) holds B₁A₂ and B₂A₁, which nobody trained, and of the "
            "mean itself only half.",
        ),
        ((B1 + B2) @ (A1 + A2), "that adds the factors, which brings in B₁A₂ and B₂A₁."),
        (2 * mean, "that is the sum of the two updates. A mean needs a half: halve B, or A, not both."),
        (mean / 2, "that is half of the mean: the half is taken in B *and* in A. Take it once."),
        (B1 @ A1, "that is the first adapter alone."),
    ):
        if same(update, other):
            return f"Exercise 3: not yet: {why}"
    return f"Exercise 3: not yet: BA is not ½B₁A₁ + ½B₂A₂. Hint: {hint}"


def check_05_4(answer: object) -> str:
    """A function merge_conv1d(weight, A, B, scaling) → the merged weight, (in, out)."""
    hint = "GPT-2's Conv1D computes x W with W (in, out), so ΔW there is s (BA)ᵀ."
    if refused := no_function(4, answer, "weight, A, B, scaling", hint):
        return refused
    for inputs, outputs in ((4, 4), (3, 9)):
        W, A, B = normal((inputs, outputs), (2, inputs), (outputs, 2))
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
    """A function same_run(c, optimiser) → factors on learning rate and A₀ with which alpha · c is the same run.

    The check trains both runs and compares their losses, step by step.
    """
    hint = "s grows by c. For the same ΔW, A and B must each be 1 / √c of what they were, at every step."
    if refused := no_function(5, answer, "c, optimiser", hint):
        return refused
    target = normal((OUT, IN))[0]
    for c, optimiser in ((4.0, "adam"), (4.0, "sgd"), (0.25, "adam"), (2.5, "sgd")):
        call = f"same_run({c:g}, {optimiser!r})"
        try:
            got = answer(c, optimiser)
        except Exception as error:
            return f"Exercise 5: not yet: {call} raises {type(error).__name__}: {error}"
        if not isinstance(got, tuple | list) or len(got) != 2 or any(real(each) is None for each in got):
            return f"Exercise 5: not yet: the answer is two factors, on the learning rate and on A₀; got {got!r}."
        rate, start = map(float, got)
        if min(rate, start) <= 0:
            return f"Exercise 5: not yet: both factors are above zero; {call} gives {rate:g} and {start:g}."
        usual, other = _losses(target, optimiser), _losses(target, optimiser, c, rate, start)
        if not torch.allclose(usual, other, rtol=1e-6):
            apart = f"the losses of the two runs are up to {(usual - other).abs().max():.2g} apart"
            found = _run_problem(rate, start, c, optimiser) or f"Hint: {hint}"
            return (
                f"Exercise 5: not yet: with the factors {rate:.3g} and {start:.3g} of {call} {apart}. {found}"
            )
    return (
        "Exercise 5: right, and trained: the two runs have the same losses. Under Adam a step has the length of the "
        "learning rate; under SGD it grows with the gradient, and that grows with s."
    )


def _losses(target: Tensor, optimiser: str, c: float = 1.0, rate: float = 1.0, start: float = 1.0) -> Tensor:
    """The losses of a small run in float64 that imitates `target`, at alpha · c and with these factors."""
    generator = torch.Generator().manual_seed(0)
    A = (start * torch.randn(2, IN, generator=generator, dtype=torch.float64)).requires_grad_(True)
    B = torch.zeros(OUT, 2, dtype=torch.float64, requires_grad=True)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimiser]
    more = {"eps": 1e-300} if optimiser == "adam" else {}
    steps, losses = kind([A, B], lr=rate * RATES[optimiser], **more), []
    for _ in range(STEPS):
        steps.zero_grad()
        loss = (c * B @ A - target).square().sum() / 2
        loss.backward()
        losses.append(loss.detach())
        steps.step()
    return torch.stack(losses)


def _run_problem(rate: float, start: float, c: float, optimiser: str) -> str:
    """What wrong factors were most likely worked out from."""
    close = math.isclose
    if close(rate, 1):
        return "With the rate unchanged B moves as far as before, and s is c times as large."
    if close(start, 1):
        return "A₀ must shrink, too: B starts at zero anyway, but A does not."
    if close(rate, c**0.5) or close(rate, c):
        return "That is the wrong way round: a larger alpha needs smaller steps."
    if optimiser == "adam" and close(rate, 1 / c):
        return "That is the rate for SGD, whose step grows with the gradient. Adam's does not."
    if optimiser == "sgd" and close(rate, c**-0.5):
        return "That is the rate for Adam. SGD's step grows with the gradient, and that grows with s."
    return ""


def check_05_6(answer: object) -> str:
    """A function lost_in_merge(W, update) → ‖ΔW − (merged − W)‖ / ‖ΔW‖, where merged has W's dtype."""
    hint = "merge in W's dtype, see by how much W really changed, and compare that with ΔW."
    if refused := no_function(6, answer, "W, update", hint):
        return refused
    for dtype, size in (
        (torch.bfloat16, 0.003),
        (torch.float16, 0.001),
        (torch.bfloat16, 0.1),
        (torch.float32, 0.001),
    ):
        W, update, call, got = measured_merge(6, answer, (40, 30), dtype, size)
        if isinstance(got, str):
            return got
        changed = (W.double() + update.double()).to(dtype).double() - W.double()
        right = float((update.double() - changed).norm() / update.double().norm())
        if abs(got - right) > 0.02 * right + 1e-4:
            found = _merge_problem(got, right, changed, W, update) or f"Hint: {hint}"
            return f"Exercise 6: not yet: {call} it gives {got:.3g}. {found}"
    return (
        "Exercise 6: right. In bfloat16 a step between two numbers is up to 1/128 of their size, and a change of less "
        "than half a step is lost."
    )


def _merge_problem(got: float, right: float, changed: Tensor, W: Tensor, update: Tensor) -> str:
    """What a wrong share was most likely worked out from."""
    kept = float(changed.norm() / update.double().norm())
    if abs(got) < 1e-3:
        return "Nothing is lost before the sum is brought into W's dtype."
    for other, why in (
        (kept, "That is how large the change of W is. Lost is the difference between it and ΔW."),
        (1 - kept, "The norms do not subtract: entries that are rounded up change W by more than ΔW."),
        (float((changed == 0).double().mean()), "That counts entries. Asked for is the norm."),
        (right**2, "That is the square, a share of the energy. Asked for is the norm."),
        (
            right * float(update.norm() / W.float().norm()),
            "That is a share of ‖W‖. Asked for is a share of ‖ΔW‖.",
        ),
    ):
        if abs(got - other) <= 0.02 * abs(other) + 1e-6:
            return why
    return ""


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-6))


def _pair(answer: Callable, name: str, *arguments: object) -> tuple[list[Tensor], str]:
    """The two matrices that a function returns for copies of these arguments, or what is wrong with them."""
    copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    try:
        got = answer(*copies)
    except Exception as error:
        return [], f"{name} raises {type(error).__name__}: {error}"
    pair = _tensors(got)
    if pair is None or len(pair) != 2 or any(each.dim() != 2 for each in pair):
        return [], f"{name} must return two matrices; got {got!r}."
    return pair, ""


def _tensors(answer: object) -> list[Tensor] | None:
    """The parts of a tuple or list as tensors, None if they are none."""
    if not isinstance(answer, Sequence | Tensor) or isinstance(answer, str):
        return None
    try:
        return [torch.as_tensor(each).detach().double() for each in answer]
    except (TypeError, ValueError, RuntimeError):
        return None
