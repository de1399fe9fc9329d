"""Explorers of chapter 06: how far a first step moves an embedding, what bytes a step moves, what a card has shown.

Not for measuring: bytes are counted on paper (counting/traffic.py), a card's figures are read from a record.
"""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lora_edu import plots
from lora_edu.counting import spaced
from lora_edu.counting.traffic import CARDS, look_up_bytes, look_up_operations, traffic
from lora_edu.explore.explorer import Explorer
from lora_edu.text import format_bytes


def first_step(
    embedding: Tensor,
    linear: Tensor,
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    alphas: tuple[float, ...] = (1, 8, 16, 32, 64),
) -> Explorer:
    """How far Adam's first step moves an entry of an embedding and of a linear layer, by r and alpha.

    embedding, linear: gradients with respect to the table's rows in use (rows, d) and to a weight (out, in).
    """
    moves = {
        "embedding": {r: first_move(embedding, r, "A") for r in ranks},
        "linear layer": {r: first_move(linear, r, "B") for r in ranks},
    }

    def draw(figure: Figure, r: int, alpha: float) -> str:
        curve, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
        series = {name: (ranks, [alpha * by_rank[q] for q in ranks]) for name, by_rank in moves.items()}
        plots.curves(
            curve, series, xscale="log", yscale="log", xlabel="rank r", ylabel="move / learning rate"
        )
        curve.set_ylim(3e-3, 200)
        curve.set_title("falls as 1 / √r in both")
        plots.plain_log(curve, ranks, (0.01, 0.1, 1, 10, 100))
        here = {name: alpha * by_rank[r] for name, by_rank in moves.items()}
        for height, colour in zip(here.values(), plots.PALETTE, strict=False):
            curve.plot(r, height, "o", color=colour, markersize=7)
        times = here["embedding"] / here["linear layer"]
        texts = [f"{value:.3g}" for value in here.values()]
        plots.bars(bars, list(here), list(here.values()), [plots.BLUE, plots.VERMILION], texts)
        bars.set(xlabel="move / learning rate", xticks=[])
        bars.set_title(f"embedding: {times:.0f} times as far")
        return (
            f"At r = {r} and alpha = {alpha:g} Adam's first step moves a typical entry of an embedding row "
            f"by {texts[0]} learning rates and one of a linear weight by {texts[1]}: {times:.0f} times as far."
        )

    return Explorer(draw, {"r": list(ranks), "alpha": list(alphas)}, start={"r": 8, "alpha": 16})


def first_move(gradient: Tensor, rank: int, zero: str, seed: int = 0) -> float:
    """Root mean square of ΔW / (alpha · learning rate) after Adam's first step, which is a step of signs.

    gradient: of the weight, (rows, columns). zero "A": rows get a zero factor, columns a normal one (an
    embedding). zero "B": columns get a Kaiming-uniform one (a linear layer).
    """
    generator = torch.Generator().manual_seed(seed)
    columns = gradient.shape[1]
    if zero == "A":
        other = torch.randn(columns, rank, generator=generator)
    else:
        other = (2 * torch.rand(columns, rank, generator=generator) - 1) / columns**0.5
    move = torch.sign(gradient @ other) @ other.T / rank
    return float(move.square().mean().sqrt())


def bytes_moved() -> Explorer:
    """What a step moves by each implementation and at the least, for a vocabulary and a number of tokens."""
    colours = [plots.VERMILION, plots.ORANGE, plots.SKY, plots.BLUE, plots.GREY]

    def draw(figure: Figure, vocabulary: int, tokens: int) -> str:
        axes = figure.subplots()
        moved = traffic(vocabulary, tokens)
        said = {name: format_bytes(number) for name, number in moved.items()}
        plots.log_bars(axes, list(moved), list(moved.values()), colours, list(said.values()))
        axes.set(xlim=(1e4, 3e10), xlabel="bytes read and written in a step")
        axes.set_xticks([1e4, 1e6, 1e8, 1e10], ["10 kB", "1 MB", "100 MB", "10 GB"])
        least = moved["minimum"]
        peer, sparse = moved["loralib"] / least, moved["ours, sparse"] / least
        axes.set_title(f"loralib and PEFT move {peer:.3g} times the minimum, a sparse gradient {sparse:.2g}")
        return (
            f"With {spaced(vocabulary)} tokens in the vocabulary and {spaced(tokens)} in the batch (d = 64, "
            f"r = 8) loralib and PEFT move {said['loralib']} a step, ours {said['ours']}, "
            f"with a sparse gradient {said['ours, sparse']}; {format_bytes(least)} would do."
        )

    return Explorer(
        draw,
        {
            "vocabulary": [1000, 10_000, 50_257, 128_256, 256_000, 1_000_000],
            "tokens": [64, 512, 2048, 8192, 65_536],
        },
        start={"vocabulary": 128_256, "tokens": 2048},
        labels={"vocabulary": "vocabulary V", "tokens": "tokens in the batch"},
        formats={"vocabulary": spaced, "tokens": spaced},
    )


def roofline(tokens: int = 65_536, width: int = 4096) -> Explorer:
    """What a card allows a forward pass at most, from published figures, by rank; nothing in it is measured."""
    colours = plots.PALETTE[:3]

    def draw(figure: Figure, card: str, r: int) -> str:
        roof, bars = figure.subplots(1, 2, width_ratios=(1.25, 1))
        bandwidth, peak = CARDS[card]
        operations, ways = look_up_operations(tokens, width, r), look_up_bytes(tokens, width, r)
        at_best = {way: max(moved / bandwidth, operations / peak) for way, moved in ways.items()}
        points = {way: (operations / moved, operations / at_best[way]) for way, moved in ways.items()}
        plots.roofline(roof, bandwidth, peak, points)
        roof.set_title(f"the ridge: {peak / bandwidth:.0f} operations a byte")
        texts = [f"{1e3 * seconds:.3g} ms" for seconds in at_best.values()]
        plots.bars(bars, list(ways), [1e3 * seconds for seconds in at_best.values()], colours, texts)
        bars.set(xlabel="ms, at best", xlim=(0, 7))
        bars.set_title(
            f"at best {at_best['loralib, PEFT'] / at_best['one pass']:.2g} times as fast in one pass"
        )
        intensity = points["one pass"][0]
        return (
            f"{card} (published: {bandwidth / 1e12:.3g} TB/s, {peak / 1e12:.0f} · 10¹² operations a second): "
            f"{spaced(tokens)} tokens at d = {width}, r = {r} take loralib's chain {texts[0]} at best and one pass "
            f"{texts[2]}, with {intensity:.3g} operations a byte."
        )

    return Explorer(
        draw, {"card": list(CARDS), "r": [4, 8, 16, 64, 256]}, start={"card": "H100 SXM", "r": 16}
    )


NOT_MEASURED = """\
No GPU figure has been measured yet. On a machine with a CUDA device, in the course's folder, these measure:
python tools/on_a_gpu.py --out DIR
python tools/on_a_gpu.py --apply DIR"""


def measured_on_a_gpu(record: Mapping | None) -> str | plots.Shown:
    """Forward passes as measured: below the roof that the card's own copy sets, and in milliseconds, by way.

    record: benchmarks/results/gpu_embedding.json, whose first row's shape is drawn; None where there is none, which
    is then said.
    """
    if record is None:
        return NOT_MEASURED
    first = record["rows"][0]
    shape = {key: first[key] for key in ("vocabulary", "width", "tokens", "rank")}
    rows = {
        row["way"]: row
        for row in record["rows"]
        if row["measure"] == "forward" and row.items() >= shape.items()
    }
    operations = look_up_operations(shape["tokens"], shape["width"], shape["rank"])
    least, speed = first["least_bytes"], record["copy_bytes_per_s"]
    peak = next((card[1] for name, card in CARDS.items() if name.split()[0] in record["device"]), 1e15)
    figure, (roof, times) = plots.subplots(1, 2, width_ratios=(1, 1.1))
    points = {way: (operations / least, operations / row["median_s"]) for way, row in rows.items()}
    plots.roofline(roof, speed, peak, points)
    roof.set_title("measured, below the roof of a copy")
    milliseconds = [1e3 * row["median_s"] for row in rows.values()]
    colours = [plots.PALETTE[place % len(plots.PALETTE)] for place in range(len(rows))]
    plots.bars(times, list(rows), milliseconds, colours, [f"{each:.3g}" for each in milliseconds])
    times.set(xlabel="milliseconds", xlim=(0, 1.3 * max(milliseconds)))
    times.set_title("a forward pass")
    shares = ", ".join(f"{way} {least / row['median_s'] / speed:.0%}" for way, row in rows.items())
    sentence = (
        f"Recorded on {record['device']}, {record['date']}, by {record['command']}: a forward pass of "
        f"{spaced(shape['tokens'])} tokens at d = {shape['width']}, r = {shape['rank']} in bfloat16, as a share of the "
        f"speed of a copy of the bytes it must move: {shares}."
    )
    return plots.show(figure, sentence)
