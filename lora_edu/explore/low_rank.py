"""Chapter 01's explorers: what rank r keeps of a photograph and of a map, and what noise hides.

Each function takes the matrix that it explores and returns an Explorer; nothing is loaded or trained here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_edu import lowrank, plots
from lora_edu.explore.explorer import Explorer

RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def photograph_rank(photograph: Tensor, ranks: Sequence[int] = RANKS) -> Explorer:
    """r on a photograph (grey, 0 to 1): the picture cut to rank r, what is missing, and the spectrum.

    The mean grey is taken off before the cut and put back after it.
    """
    mean = photograph.mean()
    U, S, Vh = lowrank.svd(photograph - mean)
    kept = lowrank.energy(S)
    share = lambda r: r * sum(photograph.shape) / photograph.numel()

    def draw(figure, r: int) -> str:
        cut, missing, spectrum = figure.subplots(1, 3, width_ratios=[1, 1, 1.35])
        truncated = mean + (U[:, :r] * S[:r]) @ Vh[:r]
        plots.picture(cut, truncated, f"rank {r}")
        plots.picture(missing, photograph - truncated, "what is missing", low=-0.5, high=0.5)
        plots.spectrum(spectrum, S, kept=r, title=f"{percent(kept[r - 1])} of the energy kept")
        return f"Cut to rank {r}: {percent(kept[r - 1])} of the energy in {share(r):.1%} of the numbers."

    return Explorer(
        draw,
        {"r": list(ranks)},
        start={"r": nearest(ranks, 8)},
        labels={"r": "rank r"},
        colours=40,
        density=1.2,
    )


def elevation_rank(heights: Tensor, row: int = 100, ranks: Sequence[int] = RANKS) -> Explorer:
    """r on a map of heights in metres: the hills under light, whole and cut to rank r, and the heights along one row.

    The mean height is taken off before the cut and put back after it.
    """
    mean = heights.mean()
    U, S, Vh = lowrank.svd(heights - mean)
    kept = lowrank.energy(S)
    kilometres = torch.arange(heights.shape[1]) * 0.074

    def draw(figure, r: int) -> str:
        original, hills, line = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
        truncated = mean + (U[:, :r] * S[:r]) @ Vh[:r]
        off = float((heights - truncated).square().mean().sqrt())
        # Every second point will do: so small, a panel has no more pixels than that.
        titles = {original: "measured", hills: f"rank {r}: {percent(kept[r - 1])} of the energy"}
        for axes, map_ in ((original, heights), (hills, truncated)):
            plots.relief(axes, map_[::2, ::2], titles[axes], step=(148, 186))
            axes.axhline(row / 2, color=plots.VERMILION, linestyle="--", linewidth=1)
        plots.profile(line, kilometres, {"measured": heights[row], f"rank {r}": truncated[row]})
        line.set(ylim=(200, 1000), title=f"along the row; map off by {off:.0f} m")
        return (
            f"The map cut to rank {r} keeps {percent(kept[r - 1])} of the energy "
            f"and is off by {off:.0f} m (root mean square)."
        )

    return Explorer(
        draw,
        {"r": list(ranks)},
        start={"r": nearest(ranks, 8)},
        labels={"r": "rank r"},
        colours=64,
        density=1,
    )


def hidden_direction(
    strengths: Sequence[float] = (0, 0.5, 1, 1.25, 1.5, 2, 3), sizes: Sequence[int] = (50, 200, 400)
) -> Explorer:
    """One direction of strength θ√n in n × n noise of deviation 1: does the spectrum show it, and how truly?

    Two sliders: θ, and n (the larger the matrix, the sharper the edge and the change at θ = 1).
    """
    largest = max(sizes)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(largest, largest, generator=generator, dtype=torch.float64)
    left, right = torch.randn(2, largest, generator=generator, dtype=torch.float64)

    def draw(figure, strength: float, size: int) -> str:
        axes = figure.subplots()
        u, v = (torch.nn.functional.normalize(side[:size], dim=0) for side in (left, right))
        U, S, _ = lowrank.svd(noise[:size, :size] + strength * math.sqrt(size) * torch.outer(u, v))
        # In units of √n, as if the noise had the deviation 1/√n: the picture is then the same for every n.
        S = S / math.sqrt(size)
        edge = lowrank.random_matrix_edge(size, size, 1 / math.sqrt(size))
        places = torch.linspace(0.001, edge, 200, dtype=torch.float64)
        found = float(U[:, 0] @ u) ** 2
        outside = S[edge < S]
        law = lowrank.marchenko_pastur(places, size, size, 1 / math.sqrt(size))
        plots.noise_histogram(axes, S, (places, law), edge)
        axes.set(xlim=(0, 3.7), ylim=(0, 1.0), xlabel="singular value / √n")
        axes.set_title(f"strength {strength:g}√n: overlap of what is found with what was hidden {found:.0%}")
        above = {0: "nothing stands", 1: "one singular value stands"}.get(
            len(outside), f"{len(outside)} stand"
        )
        return (
            f"Strength {strength:g}√n in {size} × {size} noise: {above} above the edge at 2√n; "
            f"the top direction's overlap with the hidden one is {found:.0%}."
        )

    return Explorer(
        draw,
        {"strength": list(strengths), "size": list(sizes)},
        start={"strength": nearest(strengths, 1.5), "size": nearest(sizes, 200)},
        labels={"strength": "strength θ", "size": "size n"},
        formats={"strength": "{:g}√n"},
    )


def noisy_photograph(
    photograph: Tensor, levels: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2), seed: int = 0
) -> Explorer:
    """Noise of deviation σ on a photograph (grey, 0 to 1): before, cut where the noise says, the spectrum."""
    mean = photograph.mean()
    rows, columns = photograph.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=photograph.dtype)

    def draw(figure, sigma: float) -> str:
        before, after, spectrum = figure.subplots(1, 3, width_ratios=[1, 1, 1.35])
        noisy = photograph + sigma * noise
        U, S, Vh = lowrank.svd(noisy - mean)
        edge = lowrank.random_matrix_edge(rows, columns, sigma)
        rank = int((lowrank.denoising_threshold(rows, columns, sigma) < S).sum())
        above = int((edge < S).sum())
        # ‖clean − cut‖² falls by 2σ u·(clean v) − σ² with each term kept: where it is least, the cut is best.
        gains = (2 * S * (U * ((photograph - mean) @ Vh.T)).sum(0) - S.square()).cumsum(0)
        best = int(gains.argmax()) + 1 if gains.max() > 0 else 0
        # Every second pixel will do: noise is what no picture format packs well.
        plots.picture(before, noisy[::2, ::2], f"noise σ = {sigma:g}", low=-sigma, high=1 + sigma)
        plots.picture(after, mean + (U[:, :rank] * S[:rank]) @ Vh[:rank], f"cut to rank {rank}")
        plots.spectrum(
            spectrum, S, kept=rank, edge=edge, most=130, ylim=(1, 300), title=f"{above} above the edge"
        )
        return (
            f"With noise of σ = {sigma:g}, {above} of {len(S)} singular values stand above its edge. Gavish and "
            f"Donoho's threshold cuts at rank {rank}; closest to the clean photograph is rank {best}."
        )

    return Explorer(
        draw,
        {"sigma": list(levels)},
        start={"sigma": nearest(levels, 0.2)},
        labels={"sigma": "noise σ"},
        colours=24,
        density=1.2,
    )


def percent(share: float) -> str:
    """One decimal, or two where one would round up to all of it."""
    return f"{share:.1%}" if share < 0.9985 else f"{share:.2%}"


def nearest(values: Sequence[float], wanted: float) -> float:
    """The slider's value that lies nearest to the one wanted: where to start, whatever values were asked for."""
    return min(values, key=lambda value: abs(value - wanted))
