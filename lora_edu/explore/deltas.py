"""Chapter 03's explorers: spectra of ΔW, what each rank keeps, two seeds, rare rows, rounding.

Each function takes matrices or state dicts and returns an Explorer; nothing is loaded, trained or evaluated here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_edu import lowrank, plots
from lora_edu.explore.explorer import Explorer


def spectra_by_kind(
    weights: Mapping[str, Sequence[Tensor]], updates: Mapping[str, Sequence[Tensor]]
) -> Explorer:
    """Kind of matrix → spectra of W_o and of ΔW (every layer a line), and the energy that each rank keeps of both.

    weights, updates: kind → matrices of that kind, one a layer. Beside them, noise of the same shape.
    """

    def draw(figure, kind: str) -> str:
        left, right = figure.subplots(1, 2)
        before, change = ([lowrank.svd(W).S for W in group[kind]] for group in (weights, updates))
        shape = updates[kind][0].shape
        noise = lowrank.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0))).S
        number = torch.arange(1, len(noise) + 1)
        rows = {"W$_o$": before, "ΔW": change, "noise": [noise]}
        falling = {name: (number, torch.stack([S / S[0] for S in group], 1)) for name, group in rows.items()}
        kept = {
            name: (number, torch.stack([lowrank.energy(S) for S in group], 1)) for name, group in rows.items()
        }
        plots.curves(left, falling, xlabel="number k", ylabel="σ$_k$ / σ$_1$", ylim=(0, 1.03))
        plots.curves(right, kept, xlabel="rank r", ylabel="share of energy kept", ylim=(0, 1.03))
        ranks = {
            name: _middle([lowrank.rank_for_energy(S, 0.9) for S in group]) for name, group in rows.items()
        }
        left.set_title(f"{kind}, {shape[0]:,} × {shape[1]}")
        right.set_title(
            f"rank for 90 %: W$_o$ {ranks['W$_o$']:g}, ΔW {ranks['ΔW']:g}, noise {ranks['noise']:g}"
        )
        return (
            f"{kind}: 90 % of the energy takes rank {ranks['W$_o$']:g} in W_o, {ranks['ΔW']:g} in ΔW and "
            f"{ranks['noise']:g} in noise of that shape (median over layers)."
        )

    return Explorer(draw, {"kind": list(updates)}, start={"kind": "query"}, labels={"kind": "matrix"})


def truncation(
    updates: Mapping[str, Sequence[Tensor]], losses: Mapping[int, float], before: float, after: float
) -> Explorer:
    """Rank r of every truncated ΔW → energy kept in each kind, and the share of the tuning gain that is kept.

    losses: rank → held-out loss of W_o + truncated ΔW; before, after: that of the base and of the tuned model.
    """
    ranks = list(losses)
    gain = [(before - loss) / (before - after) for loss in losses.values()]
    curves = {
        kind: torch.stack([lowrank.energy(lowrank.svd(W).S) for W in group]).mean(0)
        for kind, group in updates.items()
    }
    mean_energy = [float(torch.stack([c[r - 1] for c in curves.values()]).mean()) for r in ranks]

    def draw(figure, r: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
        share = gain[ranks.index(r)]
        energies = [float(curve[r - 1]) for curve in curves.values()]
        plots.bars(left, list(curves), energies, [plots.SKY] * len(curves), [f"{e:.0%}" for e in energies])
        left.set(
            xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="share of energy", title=f"weights: kept at r = {r}"
        )
        plots.curves(
            right,
            {"of the gain": (ranks, gain), "of the energy, mean of the kinds": (ranks, mean_energy)},
            xscale="log",
            xlabel="rank r",
            ylabel="share kept",
            ylim=(0, 1.05),
        )
        plots.plain_ticks(right.xaxis, ranks)
        right.plot(r, share, "o", color=plots.BLUE, markersize=9)
        right.set_title(f"behaviour: {share:.0%} of the gain kept")
        return f"Every ΔW cut to rank {r}: held-out loss {losses[r]:.2f} nats a token, {share:.0%} of the gain kept."

    return Explorer(draw, {"r": ranks}, start={"r": 8}, labels={"r": "rank r"})


def two_seeds(first: Mapping[str, Tensor], second: Mapping[str, Tensor], most: int = 40) -> Explorer:
    """Kind of matrix → similarity of the two runs' ΔW, φ(i, j) for all i, j, and along i = j beside chance."""

    def draw(figure, kind: str) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
        grid = lowrank.similarity_grid(first[kind], second[kind], most, most)
        dimension = first[kind].shape[1]
        number = torch.arange(1, most + 1)
        chance = number / dimension
        image = plots.heat(left, grid, "φ(i, j) of two seeds", "j (seed 1)", "i (seed 0)")
        figure.colorbar(image, ax=left, shrink=0.85)
        plots.curves(
            right,
            {"two seeds": (number, grid.diagonal()), "chance, i/d": (number, chance)},
            xlabel="i = j",
            ylim=(0, 1),
        )
        at = 8
        right.set_title(f"{kind}: φ({at}, {at}) = {grid[at - 1, at - 1]:.2f}, chance {at / dimension:.2f}")
        return (
            f"{kind}: the first {at} directions of two seeds overlap by {grid[at - 1, at - 1]:.2f}, "
            f"where chance would give {at / dimension:.2f}."
        )

    return Explorer(draw, {"kind": list(first)}, start={"kind": "query"}, labels={"kind": "matrix"})


def rare_rows(
    updates: Mapping[str, Tensor], counts: Tensor, thresholds: Sequence[int] = (0, 1, 3, 10, 30, 100, 300)
) -> Explorer:
    """Drop the rows of tokens that occur less than n times: what is left of the head's ΔW, and its spectrum.

    updates: name of the optimiser → (V, d) ΔW; counts: (V,) how often the tuning text has each token.
    """
    total = {name: W.square().sum() for name, W in updates.items()}

    def draw(figure, n: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
        kept = {name: W[counts >= n] for name, W in updates.items()}
        shares = {name: float(W.square().sum() / total[name]) for name, W in kept.items()}
        spectra = {name: lowrank.svd(W).S for name, W in kept.items()}
        colours = [plots.BLUE, plots.VERMILION][: len(shares)]
        plots.bars(left, list(shares), list(shares.values()), colours, [f"{s:.0%}" for s in shares.values()])
        left.set(xlim=(0, 1.3), xticks=[0, 0.5, 1], xlabel="share of ‖ΔW‖² left")
        left.set_title(f"{int((counts >= n).sum()):,} of {len(counts):,} rows")
        number = torch.arange(1, len(next(iter(spectra.values()))) + 1)
        plots.curves(
            right,
            {name: (number, lowrank.energy(S)) for name, S in spectra.items()},
            xlabel="rank r",
            ylabel="share of energy kept",
            ylim=(0, 1.03),
        )
        ranks = {name: lowrank.stable_rank(S) for name, S in spectra.items()}
        right.set_title("stable rank: " + ", ".join(f"{name} {rank:.1f}" for name, rank in ranks.items()))
        what = "All rows" if n == 0 else f"Rows of tokens that occur at least {n} time{'s' * (n > 1)}"
        parts = (
            f"{name} {shares[name]:.0%} of its energy, stable rank {ranks[name]:.1f}" for name in updates
        )
        return f"{what}: {'; '.join(parts)}."

    return Explorer(draw, {"n": list(thresholds)}, start={"n": 0}, labels={"n": "least count"})


def rounding(
    weight: Tensor, update: Tensor, sizes: Sequence[float] = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
) -> Explorer:
    """A low-rank ΔW of relative size ‖ΔW‖/‖W‖, both models stored in a format: what their difference looks like.

    weight: W_o; update: a ΔW of low rank, scaled to each size. The dashed line is the rounding floor.
    """
    formats = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    direction = update * (weight.norm() / update.norm())
    true = lowrank.numerical_rank(update)

    def draw(figure, size: float, format: str) -> str:
        dtype = formats[format]
        old, new = weight.to(dtype).float(), (weight + size * direction).to(dtype).float()
        found = new - old
        # The shipped base is float16 already: there only the tuned weights were rounded.
        floor = float(lowrank.rounding_floor(weight, dtype, roundings=1 if old.equal(weight) else 2)[0])
        S = lowrank.svd(found).S
        rank = lowrank.rank_for_energy(S, 0.9)
        above = int((1.05 * floor < S).sum())
        axes = figure.subplots()
        plots.spectrum(
            axes, S.clamp(min=1e-9), kept=above, edge=floor, edge_name="rounding floor", ylim=(1e-7, 3)
        )
        axes.set_title(f"ΔW of rank {true} read back from {format}: 90 % of the energy takes rank {rank}")
        return (
            f"‖ΔW‖/‖W‖ = {size:g} in {format}: the difference of the files needs rank {rank} for 90 % of its energy; "
            f"{above} singular values stand above the rounding floor."
        )

    return Explorer(
        draw,
        {"format": list(formats), "size": list(sizes)},
        start={"format": "bfloat16", "size": sizes[len(sizes) // 2]},
        labels={"size": "‖ΔW‖/‖W‖"},
        formats={"size": "{:g}"},
    )


def _middle(values: Sequence[float]) -> float:
    """The median."""
    return float(torch.tensor(values, dtype=torch.float64).median())
