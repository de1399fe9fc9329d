"""Explorers of chapter 06: how far a first step moves an embedding, and what bytes a step moves.

Not for measuring: bytes here are counted on paper, and the chapter checks them against live layers.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lora_edu import plots
from lora_edu.counting import spaced
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


def traffic(vocabulary: int, tokens: int, width: int = 64, rank: int = 8) -> dict[str, int]:
    """Bytes that one step (forward, backward, SGD) reads and writes, in float32 with int64 ids, by way.

    Each operation reads its inputs from memory and writes its results there; a place in the batch counts even
    if its token occurs before. 'minimum' reads each thing needed once a pass and keeps the rest in registers.
    """
    out, rows, ids = 4 * tokens * width, 4 * tokens * rank, 8 * tokens
    lora_B, lora_A = 4 * width * rank, 4 * vocabulary * rank
    peer = 12 * out + 8 * rows + 3 * ids + 6 * lora_B + 6 * lora_A
    return {
        "loralib": peer,
        "PEFT": peer,
        "ours": 8 * out + 12 * rows + 3 * ids + 6 * lora_B + 4 * lora_A,
        "ours, sparse": 8 * out + 14 * rows + 5 * ids + 6 * lora_B,
        "minimum": 3 * out + 6 * rows + 2 * ids + 6 * lora_B,
    }


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


# Published by NVIDIA: bytes a second from and to memory, dense bfloat16 operations a second in the tensor cores
CARDS = {
    "RTX 4090": (1.008e12, 165e12),
    "A100 80 GB": (2.039e12, 312e12),
    "H100 SXM": (3.35e12, 989e12),
    "H200 SXM": (4.8e12, 989e12),
}


def look_up_bytes(tokens: int, width: int, rank: int, each: int = 2) -> dict[str, int]:
    """Bytes that a forward pass reads and writes by way, `each` bytes a number (2: bfloat16), 8 an id.

    Each operation reads its inputs from memory and writes its results there; 'one pass' keeps them in registers.
    """
    out, rows, ids, lora_B = each * tokens * width, each * tokens * rank, 8 * tokens, each * width * rank
    return {
        "loralib, PEFT": 8 * out + 3 * rows + 2 * ids + lora_B,
        "PyTorch, ours": 6 * out + 5 * rows + 2 * ids + lora_B,
        "one pass": 2 * out + rows + ids + lora_B,
    }


def look_up_operations(tokens: int, width: int, rank: int) -> int:
    """Multiplications and additions of out = W[t] + s · A[t] Bᵀ: the product's, and two for s and the sum."""
    return 2 * tokens * width * (rank + 1)


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
