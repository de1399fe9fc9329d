"""Explorers of chapter 05: what A lets through, the two gradients, and the slider that does nothing.

They draw what the chapter's own training loop returns; nothing is trained here.
"""

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lora_edu import plots
from lora_edu.explore.explorer import Explorer

ALPHAS = (1, 2, 4, 8, 16, 32, 64)
USUAL = 16  # the alpha that the others are compared with
RELEASED = ("nothing", "learning rate", "A₀", "both")  # what no longer moves along with alpha


def seen_through(gradient: Tensor) -> Explorer:
    """A gradient G as a picture beside the mean of G AᵀA over several draws of A.

    gradient: (out, in), any numbers; each A is (r, in), normal with variance 1 / r, so that the mean of AᵀA is
    the identity.
    """
    G = gradient.float()
    span = 2.5 * float(G.std())

    def draw(figure: Figure, r: int, draws: int) -> str:
        left, right = figure.subplots(1, 2)
        seen = mean_through(G, r, draws)
        cosine = float((seen * G).sum() / (seen.norm() * G.norm()))
        plots.picture(left, G, "the gradient G", -span, span)
        scale = float(seen.std() / G.std())
        name = "G AᵀA" if draws == 1 else f"mean of {draws} G AᵀA"
        plots.picture(right, seen, f"{name}: cosine {cosine:.2f}", -span * scale, span * scale)
        many = "one A" if draws == 1 else f"{draws} draws of A"
        return (
            f"A gradient of {G.shape[0]} × {G.shape[1]} seen through {many} of rank {r}: together "
            f"{r * draws} random directions of {G.shape[1]}, cosine with the gradient {cosine:.2f}."
        )

    return Explorer(
        draw,
        {"r": [1, 8, 64], "draws": [1, 4, 16, 64, 256]},
        start={"r": 8, "draws": 1},
        size=(7.2, 2.6),
        labels={"r": "rank r", "draws": "draws of A"},
        colours=24,
        density=1,
    )


def mean_through(G: Tensor, r: int, draws: int, seed: int = 0) -> Tensor:
    """The mean of G AᵀA over `draws` matrices A, drawn one after another from one seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(draws * r, G.shape[1], generator=generator, dtype=G.dtype)  # all A's below each other
    return (G @ rows.T) @ rows / (draws * r)


def gradient_norms(
    run: Callable[[int, float], tuple[Sequence[float], Sequence[float], Sequence[float]]],
) -> Explorer:
    """The norms of the gradients of A and B along a run, for a rank and an alpha.

    run(r, alpha) → (norms of A's gradient, norms of B's, loss as a share of the first), one number a step.
    """

    def draw(figure: Figure, r: int, alpha: float) -> str:
        norms, losses = figure.subplots(1, 2, width_ratios=(1.4, 1))
        of_A, of_B, loss = run(r, alpha)
        steps = range(len(of_A))
        plots.curves(norms, {"B": (steps, of_B), "A": (steps, of_A)}, xlabel="step")
        norms.set(
            ylim=(0, 1.35 * max(*of_A, *of_B)), title=f"norm of the gradient, s = {alpha}/{r} = {alpha / r:g}"
        )
        norms.legend(loc="upper right")
        plots.curves(losses, {"loss": (steps, loss)}, xlabel="step", ylabel="loss, share of the first")
        losses.set(ylim=(0, 1.3))
        losses.set_title(f"loss after {len(loss)} steps: {loss[-1]:.2f}")
        return (
            f"r = {r}, alpha = {alpha}, s = {alpha / r:g}: at the first step A's gradient is {of_A[0]:.2g} and "
            f"B's {of_B[0]:.2g}; after {len(of_A)} steps they are {of_A[-1]:.2g} and {of_B[-1]:.2g}, the "
            f"loss is {loss[-1]:.2f} of the first."
        )

    return Explorer(
        draw,
        {"r": [1, 2, 4, 8, 16], "alpha": [1, 4, 16, 64]},
        start={"r": 8, "alpha": 16},
        labels={"r": "rank r"},
        density=1.25,
    )


def alpha_that_does_nothing(run: Callable[[float, float, float], Sequence[float]]) -> Explorer:
    """alpha on a slider, learning rate and A₀ moving along; a second one sets either of these two free.

    run(alpha, rate, start) → the loss at each step, where `rate` and `start` are factors on the usual learning
    rate and on the usual A₀. With c = alpha / 16 both are 1 / √c unless set free.
    """
    usual = run(USUAL, 1.0, 1.0)
    moved = {(alpha, release): factors(alpha, release) for alpha in ALPHAS for release in RELEASED}
    losses = {key: run(key[0], *moved[key]) for key in moved}
    top = 1.1 * max(max(usual), 1.0)

    def draw(figure: Figure, release: str, alpha: int) -> str:
        curve, knobs = figure.subplots(1, 2, width_ratios=(1.5, 1))
        loss, (rate, start) = losses[alpha, release], moved[alpha, release]
        for other in ALPHAS:
            curve.plot(losses[other, release], color="#c8c8c8", linewidth=1)
        curve.plot(usual, color=plots.ORANGE, linewidth=4, label=f"alpha = {USUAL}")
        curve.plot(loss, color=plots.BLUE, label=f"alpha = {alpha}")
        apart = max(abs(one - other) for one, other in zip(loss, usual, strict=True))
        same = apart < 1e-9
        curve.set(xlabel="step", ylabel="loss, share of the first", ylim=(0, top))
        curve.set_title("one curve" if same else f"up to {apart:.2g} apart")
        curve.legend(loc="upper right")
        values = [alpha / USUAL, rate, start]
        plots.factors(knobs, ["alpha", "learning rate", "A₀"], values)
        knobs.set_title("times the usual")
        fate = "the run is the same" if same else f"the loss is up to {apart:.2g} off"
        return (
            f"alpha = {alpha}, set free: {release}. alpha times {values[0]:.3g}, learning rate times {rate:.3g}, "
            f"A₀ times {start:.3g}: {fate}."
        )

    return Explorer(
        draw,
        {"release": list(RELEASED), "alpha": list(ALPHAS)},
        start={"release": RELEASED[0], "alpha": 64},
        labels={"release": "set free"},
        density=1.25,
    )


def factors(alpha: float, release: str) -> tuple[float, float]:
    """Factors on the learning rate and on A₀ for an alpha: 1 / √(alpha / 16), or 1 where it stays."""
    along = (USUAL / alpha) ** 0.5
    return {
        RELEASED[0]: (along, along),
        RELEASED[1]: (1.0, along),
        RELEASED[2]: (along, 1.0),
        RELEASED[3]: (1.0, 1.0),
    }[release]
