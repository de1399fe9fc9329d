"""Chapter 11's explorers: what each choice of rank and matrices finds, how low the encoder's ΔW is, and a search box.

Each slider's pictures are made from recorded rows; the search box asks the kernel for a reader's own sentence.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lora_edu import lowrank, plots
from lora_edu.data.runs import method_grid, method_runs
from lora_edu.explore.counting import Calculator
from lora_edu.explore.explorer import Explorer

# Method as in data/encoder.json → how it is called, its colour and mark.
NAMES = {
    "none": "untuned",
    "bm25": "BM25",
    "lora": "LoRA, all matrices",
    "lora attention": "LoRA, attention",
    "lora MLP": "LoRA, MLP",
    "lora words": "LoRA, word embeddings",
    "full": "full tuning",
}
LOOKS = {
    "lora": (plots.BLUE, "o"),
    "lora attention": (plots.GREEN, "^"),
    "lora MLP": (plots.ORANGE, "s"),
    "lora words": (plots.PURPLE, "D"),
    "full": (plots.BLACK, "*"),
}
WIDTH = 384  # of the encoder, and 100 of TinyLM: ranks are compared as shares of it
SPECTRA_OF = ("words", "query", "value", "up", "down")  # kinds whose energy is drawn


def called(method: str, size: int | None) -> str:
    """A method and its rank in words: 'LoRA, MLP, r = 8'."""
    return NAMES[method] if size is None else f"{NAMES[method]}, r = {size}"


def gain_kept(row: Mapping, before: Mapping, by: str = "loss") -> dict[int, float]:
    """r → the share of a full tuning's gain that is left when every ΔW is cut to it.

    before: the untuned row; by: "loss" (nats a query) or "mrr", both on a quarter of the test pairs.
    """
    start, gain = before["quarter"][by], before["quarter"][by] - row["quarter"][by]
    return {int(r): (start - found[by]) / gain for r, found in row["cut"].items()}


def gain_trained(
    rows: Sequence[Mapping], before: Mapping, full: Sequence[Mapping], by: str = "loss"
) -> dict[int, float]:
    """r → the gain of LoRA trained at that rank on all matrices, as a share of full tuning's; means over seeds."""
    start = before["quarter"][by]
    gain = start - mean(row["quarter"][by] for row in full)
    runs = method_runs(rows, rows[0]["task"], rows[0]["steps"])
    found = {
        size: mean(start - row["quarter"][by] for row in each) / gain
        for (method, size), each in runs.items()
        if method == "lora"
    }
    return dict(sorted(found.items()))


def rank_and_matrices(rows: Sequence[Mapping], untuned: Mapping, bm25: Mapping) -> Explorer:
    """A rank and its matrices → the rates that were tried, and what it finds among the test pairs, beside the others.

    rows: those of runs (`load_encoder_runs`); untuned, bm25: the two without.
    """
    task, steps = rows[0]["task"], rows[0]["steps"]
    runs = method_runs(rows, task, steps)
    order = sorted(runs, key=lambda key: (list(NAMES).index(key[0]), key[1] or 0))
    grids = {key: method_grid(rows, task, *key, steps) for key in order}
    losses = [row["validation"] for grid in grids.values() for row in grid if row["validation"] is not None]
    found = {key: [row["all"]["mrr"] for row in runs[key]] for key in order}
    low = min(bm25["all"]["mrr"], untuned["all"]["mrr"])
    high = max(value for values in found.values() for value in values)

    def draw(figure: Figure, choice: tuple[str, int | None]) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
        colour, marker = LOOKS[choice[0]]
        for key in [key for key in order if key != choice] + [choice]:
            tried = [row for row in grids[key] if row["validation"] is not None]
            x, y = [row["rate"] for row in tried], [row["validation"] for row in tried]
            left.plot(x, y, marker=".", color=colour if key == choice else "#d0d0d0", linewidth=1.2)
        chosen = runs[choice][0]
        loss = next(row["validation"] for row in grids[choice] if row["rate"] == chosen["rate"])
        left.plot(chosen["rate"], loss, "o", markersize=10, markerfacecolor="none", color=colour)
        left.set(xscale="log", xlabel="learning rate", ylabel="validation, nats a query")
        left.set(ylim=(min(losses) - 0.03, max(*losses, untuned["validation"]) + 0.1))
        plots.mark_level(left, untuned["validation"], "untuned")
        left.set_title("rates tried" if len(grids[choice]) > 1 else "rate: between those of others")
        for key in order:
            shade, mark = LOOKS[key[0]]
            alike = key[0] == choice[0]
            right.plot(
                runs[key][0]["trained"],
                mean(found[key]),
                mark,
                color=shade if alike else "#c8c8c8",
                markerfacecolor=None if key == choice else "white",
            )
        right.vlines(chosen["trained"], min(found[choice]), max(found[choice]), color=colour, linewidth=3)
        right.plot(chosen["trained"], mean(found[choice]), marker, color=colour, markersize=9)
        plots.mark_level(right, untuned["all"]["mrr"], "untuned")
        plots.mark_level(right, bm25["all"]["mrr"], "BM25")
        right.set(
            xscale="log",
            xlabel="numbers trained",
            ylabel="mean reciprocal rank",
            ylim=(low - 0.03, high + 0.03),
        )
        plots.plain_ticks(right.xaxis, (1e5, 1e6, 1e7))
        right.xaxis.set_ticklabels(["100 000", "1 million", "10 million"])
        first = mean(row["all"]["recall@1"] for row in runs[choice])
        seeds = found[choice]
        spread = (
            f", {min(seeds):.3f} to {max(seeds):.3f} over {len(seeds)} seeds"
            if len(seeds) > 1
            else ", one seed"
        )
        return (
            f"{called(*choice)}: {chosen['trained']:,} numbers trained, rate {chosen['rate']:g}. The right function "
            f"comes first for {first:.1%} of the sentences; mean reciprocal rank {mean(seeds):.3f}{spread} "
            f"(untuned {untuned['all']['mrr']:.3f}, BM25 {bm25['all']['mrr']:.3f})."
        )

    start = ("lora", 8) if ("lora", 8) in order else order[0]
    return Explorer(
        draw,
        {"choice": order},
        start={"choice": start},
        size=(7.2, 3.0),
        labels={"choice": "what is trained"},
        formats={"choice": lambda choice: called(*choice)},
        density=1.25,
    )


def how_low(
    cuts: Mapping[str, Mapping],
    trained: Mapping[int, float],
    before: Mapping,
    spectra: Mapping[str, Mapping[str, Tensor]],
    small: Mapping[str, Mapping[int, float]],
) -> Explorer:
    """A full tuning and a rank r → the share of its gain that stays when every ΔW is cut to r, and each kind's energy.

    cuts: name → recorded row of a full tuning; trained: r → the gain of LoRA trained at r, as a share of tuned full
    tuning's; before: the untuned row; spectra: name → matrix → σ; small: name → r → share kept in TinyLM.
    """
    shares = {name: gain_kept(row, before) for name, row in cuts.items()}
    on_ranks = {name: gain_kept(row, before, "mrr") for name, row in cuts.items()}
    ranks = list(next(iter(shares.values())))
    lowest = min(0.0, *(value for share in shares.values() for value in share.values()))

    def draw(figure: Figure, run: str, r: int) -> str:
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        above = lambda share: {key: value for key, value in share.items() if key}
        place = lambda share, width: (
            [100 * key / width for key in above(share)],
            list(above(share).values()),
        )
        for (name, share), line in zip(small.items(), itertools.cycle(("--", ":", "-.")), strict=False):
            left.plot(*place(share, 100), line, color=plots.GREY, linewidth=1.2, label=name)
        for name, share in shares.items():
            if name != run:
                left.plot(*place(share, WIDTH), color="#d0d0d0")
        left.plot(*place(shares[run], WIDTH), color=plots.VERMILION, marker="o", label=f"{run}, cut")
        left.plot(
            *place(trained, WIDTH), color=plots.BLUE, marker="s", label="LoRA trained at r (of tuned full)"
        )
        left.axvline(100 * max(r, 0.4) / WIDTH, color=plots.BLACK, linewidth=0.8)
        left.set(
            xscale="log",
            xlabel="r in % of the width",
            ylabel="share of its run's gain",
            ylim=(lowest - 0.05, 1.2),
        )
        plots.plain_ticks(left.xaxis, (0.3, 1, 3, 10, 50))
        left.legend(fontsize=7, loc="lower right")
        kept = {}
        for kind in SPECTRA_OF:
            sigma = spectra[run][kind]
            energy = lowrank.energy(sigma)
            right.plot(range(1, len(energy) + 1), energy, label=kind)
            kept[kind] = float(energy[r - 1]) if r else 0.0
        right.axvline(max(r, 0.7), color=plots.BLACK, linewidth=0.8)
        right.set(xscale="log", xlabel="rank r", ylabel="energy kept, middle layer", ylim=(0, 1.03))
        plots.plain_ticks(right.xaxis, (1, 4, 16, 64, 384))
        right.legend(fontsize=7, loc="upper left")
        learnt = (
            f"; LoRA trained at {r} gains {trained[r]:.0%} of tuned full tuning's" if r in trained else ""
        )
        return (
            f"{run}: with every ΔW cut to r = {r} ({100 * r / WIDTH:.2g} % of the width), {shares[run][r]:.0%} of the "
            f"gain in nats and {on_ranks[run][r]:.0%} of that in mean reciprocal rank stay{learnt}. Energy kept: "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in kept.items())
            + "."
        )

    return Explorer(
        draw,
        {"run": list(cuts), "r": ranks},
        start={"run": next(iter(cuts)), "r": 8 if 8 in ranks else ranks[0]},
        size=(7.2, 3.2),
        labels={"run": "full tuning", "r": "cut to r"},
        density=1.25,
    )


def middle_layer(sigma: Mapping[str, Tensor], kind_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Kind → the singular values of the middle one of its matrices, of one run's (matrix → σ)."""
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(sigma):
        kinds.setdefault(kind_of(name), []).append(sigma[name])
    return {kind: layers[len(layers) // 2] for kind, layers in kinds.items()}


def search_box(
    sentence: str, systems: Mapping[str, Callable[[str], Tensor]], names: Sequence[str], best: int = 5
) -> Calculator:
    """A field for a sentence above the functions that each system finds for it; the kernel answers at each change.

    systems: name → function: a sentence → its scores with all functions (n,); names: what the n functions are called.
    Without a kernel: the answer to the sentence it started with.
    """

    def answer(query: str) -> str:
        if not query.strip():
            raise ValueError("Say in a sentence what the function does.")
        blocks = []
        for name, scores_of in systems.items():
            scores = scores_of(query)
            top = torch.topk(scores, min(best, len(names)))
            rows = [
                f"  {score:5.2f}  {names[place]}"
                for score, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            blocks.append("\n".join([name, *rows]))
        return "\n\n".join(blocks)

    field = widgets.Text(
        value=sentence,
        description="find",
        tooltip="what the function does",
        layout=widgets.Layout(width="min(100%, 42rem)"),
    )
    return Calculator(answer, {"query": field})
