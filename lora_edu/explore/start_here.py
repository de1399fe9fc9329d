"""Chapter 00's explorer: the rank of a ready-made adapter against what the model then writes.

It shows texts and numbers that the chapter hands it; nothing is loaded, drawn from a model or evaluated here.
"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from lora_edu import plots
from lora_edu.explore.explorer import Explorer
from lora_edu.text import format_bytes

QUOTED = 70  # characters of a text that the sentence under its picture repeats


def what_each_rank_writes(
    prompt: str,
    texts: Mapping[int, str],
    losses: Mapping[int, float],
    sizes: Mapping[int, int],
    full: tuple[int, float],
) -> Explorer:
    """Rank r of an adapter → what the model writes after the prompt, beside loss and size on disk of every rank.

    texts: r → prompt and continuation, 0 for the base without an adapter; losses: r → nats a token, 0 too;
    sizes: r → bytes of the adapter; full: bytes and loss of full tuning.
    """
    low, high = min(full[1], *losses.values()), max(losses.values())

    def draw(figure: Figure, r: int) -> str:
        page, cost = figure.subplots(1, 2, width_ratios=[1.85, 1])
        who = f"With the adapter of rank {r}" if r else "The base, without an adapter"
        plots.page_of_text(page, texts[r], who, prompt)
        plots.loss_against_size(cost, sizes, losses)
        cost.plot(full[0] / 1e6, full[1], "s", color=plots.VERMILION)
        cost.annotate("full", (full[0] / 1e6, full[1]), (0, 7), textcoords="offset points", ha="center")
        base = plots.mark_level(cost, losses[0], "the base")
        if r:
            cost.plot(sizes[r] / 1e6, losses[r], "o", color=plots.BLUE, markersize=10)
        else:
            base[0].set(color=plots.BLUE, linewidth=2.5)
        cost.set(xlim=(0.05, 9), ylim=(low - 0.25, high + 0.35))
        size = f", {format_bytes(sizes[r])}" if r else ""
        cost.set_title(f"{losses[r]:.2f} nats a token{size}")
        begins = " ".join(texts[r].removeprefix(prompt).split())[:QUOTED]
        return (
            f"{who}{size}: {losses[r]:.2f} nats a token on held-out docstrings. "
            f"After “{prompt}” it writes “{begins} …”."
        )

    return Explorer(
        draw,
        {"r": list(texts)},
        start={"r": 8},
        size=(7.2, 3.1),
        labels={"r": "rank r"},
        formats={"r": lambda r: str(r) if r else "0 (the base)"},
        colours=32,
    )
