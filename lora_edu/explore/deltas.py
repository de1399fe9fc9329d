"""Chapter 03's explorers: spectra of ΔW, what each rank keeps, two seeds, rare rows, rounding, a published fine-tune.

Each function takes matrices, state dicts or recorded figures and returns an Explorer; nothing is loaded, trained or
evaluated here.
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
    squares = {kind: [lowrank.svd(W).S.double().square() for W in group] for kind, group in updates.items()}
    by_kind = {
        kind: [float(sum(S[:r].sum() for S in group) / sum(S.sum() for S in group)) for r in ranks]
        for kind, group in squares.items()
    }
    everything = [S for group in squares.values() for S in group]
    together = [float(sum(S[:r].sum() for S in everything) / sum(S.sum() for S in everything)) for r in ranks]

    def draw(figure, r: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
        share = gain[ranks.index(r)]
        energies = [kept[ranks.index(r)] for kept in by_kind.values()]
        plots.bars(left, list(by_kind), energies, [plots.SKY] * len(by_kind), [f"{e:.0%}" for e in energies])
        left.set(
            xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="share of energy", title=f"weights: kept at r = {r}"
        )
        plots.curves(
            right,
            {"of the gain": (ranks, gain), "of the energy, all matrices": (ranks, together)},
            xscale="log",
            xlabel="rank r",
            ylabel="share kept",
            ylim=(0, 1.05),
        )
        plots.plain_ticks(right.xaxis, ranks)
        right.plot(r, share, "o", color=plots.BLUE, markersize=9)
        right.set_title(f"behaviour: {share:.0%} of the gain kept")
        return (
            f"Every ΔW cut to rank {r}: {together[ranks.index(r)]:.0%} of their energy together, held-out loss "
            f"{losses[r]:.2f} nats a token, {share:.0%} of the gain kept."
        )

    return Explorer(draw, {"r": ranks}, start={"r": 8}, labels={"r": "rank r"})


def regimes(rows: Sequence[Mapping], kinds: Sequence[str] = ("query", "up", "embedding", "head")) -> Explorer:
    """Learning rate and steps of full tuning → the spectra of its ΔW, and the gain that each rank keeps of it.

    rows: recorded runs of one seed, as `lora_edu.recording.regimes` writes them: task ("far", "near"), rate, steps,
    losses `before`, `after` and `cut` (rank → loss), `spectra` (kind → σ/‖ΔW‖ of one layer, sizes). The sliders have
    the rates and steps for which every run on the far task is there; the near task is shown where it is there, too.
    """
    runs = {(row["task"], row["rate"], row["steps"]): row for row in rows}
    rates = sorted({row["rate"] for row in rows if row["task"] == "far"})
    steps = sorted({row["steps"] for row in rows})
    steps = [n for n in steps if all(("far", rate, n) in runs for rate in rates)]
    if len(rates) < 2 or len(steps) < 2:
        raise ValueError(
            f"the map needs two rates and two numbers of steps with all runs on the far task; got rates {rates} with "
            f"steps {steps} in common"
        )
    shares = {key: share_kept(row) for key, row in runs.items()}
    far = [shares["far", rate, n] for rate in rates for n in steps]

    def draw(figure, rate: float, n: int) -> str:
        left, right = figure.subplots(1, 2)
        row = runs["far", rate, n]
        energies = {}
        for kind in kinds:
            S = torch.tensor(row["spectra"][kind]["sigma"])
            energies[kind] = (torch.arange(1, len(S) + 1), lowrank.energy(S))
        plots.curves(left, energies, xlabel="rank r", ylabel="share of energy kept", ylim=(0, 1.03))
        size = row["spectra"]["all"]["size"]
        left.set_title(f"far: gain {row['before'] - row['after']:.2f} nats, ‖ΔW‖/‖W$_o$‖ = {size:.2g}")
        for share in far:
            right.plot(list(share), list(share.values()), color="#d0d0d0", linewidth=1)
        lines = {
            f"{task} text": (list(shares[task, rate, n]), list(shares[task, rate, n].values()))
            for task in ("far", "near")
            if (task, rate, n) in runs
        }
        plots.curves(
            right, lines, xscale="log", xlabel="rank r", ylabel="share of the gain kept", ylim=(0, 1.05)
        )
        plots.plain_ticks(right.xaxis, list(far[0]))
        kept = shares["far", rate, n]
        right.set_title(f"cut to 8: {kept[8]:.0%} of the gain" + (" (far)" if len(lines) > 1 else ""))
        gain = row["before"] - row["after"]
        sentence = (
            f"Rate {rate:g}, {n} steps, far text: the loss falls by {gain:.2f} nats, ‖ΔW‖/‖W_o‖ is {size:.2g}; "
            f"cut to 1, 8, 32 the update keeps {kept[1]:.0%}, {kept[8]:.0%}, {kept[32]:.0%} of that."
        )
        if len(lines) > 1:
            other, close = runs["near", rate, n], shares["near", rate, n]
            sentence += (
                f" Near text: {other['before'] - other['after']:.2f} nats, cut to 8 {close[8]:.0%}, "
                f"‖ΔW‖/‖W_o‖ {other['spectra']['all']['size']:.2g}."
            )
        return sentence

    start = {"rate": rates[-1], "n": steps[-1]}
    return Explorer(
        draw,
        {"rate": rates, "n": steps},
        start=start,
        labels={"rate": "learning rate", "n": "steps"},
        formats={"rate": "{:g}"},
    )


def share_kept(row: Mapping) -> dict[int, float]:
    """Rank → the share of a recorded run's gain that is left when every ΔW is cut to it."""
    gain = row["before"] - row["after"]
    return {int(r): (row["before"] - loss) / gain for r, loss in row["cut"].items()}


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
    updates: Mapping[str, Tensor],
    counts: Tensor,
    thresholds: Sequence[int] = (0, 1, 3, 10, 30, 100, 300),
    start: int = 10,
) -> Explorer:
    """Drop the rows of tokens that occur less than n times: what is left of the head's ΔW, and its stable rank.

    updates: name of the optimiser → (V, d) ΔW; counts: (V,) how often the tuning text has each token. The mean row is
    taken off first: a vector common to all rows changes no prediction.
    """
    rows = {n: {name: W[counts >= n] for name, W in updates.items()} for n in thresholds}
    spectra = {
        n: {name: lowrank.svd(W - W.mean(dim=0)).S for name, W in kept.items()} for n, kept in rows.items()
    }
    stable = {name: [lowrank.stable_rank(spectra[n][name]) for n in thresholds] for name in updates}
    colours = dict(zip(updates, plots.PALETTE, strict=False))
    places = range(len(thresholds))  # evenly spaced: they grow about threefold, and one of them is 0

    def draw(figure, n: int) -> str:
        left, right = figure.subplots(1, 2)
        at = thresholds.index(n)
        number = torch.arange(1, len(next(iter(spectra[n].values()))) + 1)
        energies = {name: (number, lowrank.energy(S)) for name, S in spectra[n].items()}
        plots.curves(left, energies, xlabel="rank r", ylabel="share of energy kept", ylim=(0, 1.03))
        left.set_title(f"{int((counts >= n).sum()):,} of {len(counts):,} rows")
        plots.curves(
            right,
            {name: (places, values) for name, values in stable.items()},
            xlabel="rows of tokens that occur n times or more",
        )
        for name, values in stable.items():
            right.plot(at, values[at], "o", color=colours[name], markersize=9)
        right.set_xticks(places, ["all", *(f"{each}+" for each in thresholds[1:])])
        right.set(ylim=(0, None), ylabel="stable rank")
        right.set_title(
            "stable rank: " + ", ".join(f"{name} {values[at]:.1f}" for name, values in stable.items())
        )
        what = "All rows" if n == 0 else f"Rows of tokens that occur at least {n} time{'s' * (n > 1)}"
        parts = (
            f"{name} {float(rows[n][name].square().sum() / W.square().sum()):.0%} of its energy, stable rank "
            f"{stable[name][at]:.1f} without the mean row"
            for name, W in updates.items()
        )
        return f"{what}: {'; '.join(parts)}."

    return Explorer(draw, {"n": list(thresholds)}, start={"n": start}, labels={"n": "least count"})


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


def published_spectra(
    base: Mapping[str, Tensor],
    updates: Mapping[str, Mapping[str, Tensor]],
    beside: tuple[str, Mapping[str, Tensor]],
) -> Explorer:
    """Kind of matrix → how fast its spectra fall, and how the rank for 90 % of the energy goes with depth.

    base: kind → (layers, k) singular values of the weights before tuning; updates: name of a tuning → the same of its
    ΔW; beside: another model's name and the same of its ΔW. Ranks are shown as shares of the full rank, since the two
    models differ in width.
    """
    name, other = beside

    def draw(figure, kind: str) -> str:
        left, right = figure.subplots(1, 2)
        groups = {
            "W$_o$": base[kind],
            **{title: of[kind] for title, of in updates.items()},
            name: other[kind],
        }
        energies, depths, middle = {}, {}, {}
        for title, spectra in groups.items():
            full = spectra.shape[1]
            mean = torch.stack([lowrank.energy(S) for S in spectra]).mean(0)
            energies[title] = (torch.arange(1, full + 1) / full, mean)
            shares = [lowrank.rank_for_energy(S, 0.9) / full for S in spectra]
            depths[title] = (torch.arange(1, len(spectra) + 1) / len(spectra), shares)
            middle[title] = _middle(shares)
        plots.curves(
            left,
            energies,
            xlabel="rank, as a share of the full one",
            ylabel="share of energy kept",
            ylim=(0, 1.03),
        )
        left.set_title(f"{kind}: mean over the layers")
        plots.curves(
            right,
            depths,
            xlabel="depth (1: the last layer)",
            ylabel="rank for 90 % / full rank",
            ylim=(0, 0.9),
        )
        right.get_legend().remove()
        right.set_title("rank for 90 % of the energy, by depth")
        parts = ", ".join(
            f"{title.replace('$', '').replace('W_o', 'W_o')} {share:.0%}" for title, share in middle.items()
        )
        return (
            f"{kind}: the share of the full rank that 90 % of the energy takes (median over layers): {parts}."
        )

    return Explorer(
        draw,
        {"kind": list(base)},
        start={"kind": next(iter(base))},
        labels={"kind": "matrix"},
        size=(7.2, 3.1),
    )


def decisions_kept(
    names: Sequence[str],
    changed: Mapping[int, Sequence[bool]],
    intervals: Mapping[int, tuple[float, float]],
    energy: Mapping[int, float],
    most: int = 17,
) -> Explorer:
    """Rank r of every cut ΔW → how many decisions stay, and which of them one doubling of the rank brings back.

    names: of what is decided; changed: rank → whether each decision is another one than the tuned model's; intervals:
    rank → that of the share that stays; energy: rank → share of ‖ΔW‖² that is kept.
    """
    ranks = list(changed)
    kept = [1 - sum(changed[r]) / len(names) for r in ranks]
    places = range(len(ranks))

    def draw(figure, r: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        at = ranks.index(r)
        low, high = zip(*(intervals[each] for each in ranks), strict=True)
        left.fill_between(places, low, high, color=plots.BLUE, alpha=0.2, linewidth=0)
        plots.curves(
            left,
            {"of the decisions": (places, kept), "of the energy": (places, [energy[each] for each in ranks])},
        )
        left.plot(at, kept[at], "o", color=plots.BLUE, markersize=9)
        left.set_xticks(places, [str(each) for each in ranks])
        left.set(xlabel="rank r of every ΔW", ylabel="share kept", ylim=(0, 1.03))
        left.set_title(f"r = {r}: {kept[at]:.0%} of {len(names)} decisions")
        after = changed[ranks[at + 1]] if at + 1 < len(ranks) else [False] * len(names)
        back = [name for name, now, then in zip(names, changed[r], after, strict=True) if now and not then]
        shown = back[:most] + ([f"and {len(back) - most} more"] if len(back) > most else [])
        right.set_axis_off()
        next_rank = f"r = {ranks[at + 1]}" if at + 1 < len(ranks) else "the whole ΔW"
        right.set_title(f"changed at r = {r}, back with {next_rank}: {len(back)}")
        right.text(
            0, 0.98, "\n".join(shown), va="top", fontsize=8, transform=right.transAxes, linespacing=1.25
        )
        low, high = intervals[r]
        return (
            f"Every ΔW cut to rank {r}: {energy[r]:.0%} of the energy and {kept[at]:.0%} of the {len(names)} "
            f"decisions stay ({low:.0%} to {high:.0%}); {sum(changed[r])} change, {len(back)} of these come back with "
            f"{next_rank}."
        )

    return Explorer(draw, {"r": ranks}, start={"r": 8}, labels={"r": "rank r"}, size=(7.2, 3.6))


def _middle(values: Sequence[float]) -> float:
    """The median."""
    return float(torch.tensor(values, dtype=torch.float64).median())
