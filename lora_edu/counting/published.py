"""Figures in print, recomputed from the shapes: which are reproduced, and why the others are not."""

from collections.abc import Sequence
from typing import NamedTuple

from lora_edu.counting.adapters import count
from lora_edu.counting.architectures import ARCHITECTURES
from lora_edu.counting.formulas import lora_parameters, share, size, spaced


class Published(NamedTuple):
    """A figure in print, the same figure from its own settings, and why they differ where they do."""

    source: str
    what: str
    printed: str
    ours: str
    reproduced: bool
    note: str


_LORA = "LoRA paper"  # Hu et al. 2021, arXiv 2106.09685v2


def published_counts() -> list[Published]:
    """Parameter counts and sizes in the LoRA paper and around it, recomputed from the shapes.

    A figure counts as reproduced when ours, rounded to the printed digits, is the printed one.
    """
    query_value = ("query", "value")
    gpt3 = ARCHITECTURES["GPT-3 175B"]
    budget = count(gpt3, query_value, 4).parameters

    def lora(model: str, rank: int, targets: Sequence[str] = query_value) -> int:
        return count(model, targets, rank).parameters

    def row(
        source: str, what: str, printed: float, ours: float, unit: str = "M", digits: int = 1, note: str = ""
    ):
        scale = {"": 1, "%": 0.01, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "TB": 1e12, "-fold": 1}[unit]
        same = round(ours / scale, digits) == printed
        gap = "" if unit in ("%", "-fold", "") else " "
        more = 0 if same or not gap else 2
        text = spaced(printed, digits) + gap + unit, spaced(ours / scale, max(digits, more)) + gap + unit
        return Published(source, what, *text, same, note)

    return [
        row("the study note", "10 000 × 100, r = 8", 80_800, lora_parameters(10_000, 100, 8), "", 0),
        row("the study note", "… of the matrix", 8.08, share(10_000, 100, 8), "%", 2),
        row(f"{_LORA}, table 2", "RoBERTa base, r = 8", 0.3, lora("RoBERTa base", 8)),
        row(f"{_LORA}, table 2", "RoBERTa large, r = 8", 0.8, lora("RoBERTa large", 8)),
        row(
            f"{_LORA}, table 2",
            "DeBERTa-XXL, r = 8",
            4.7,
            lora("DeBERTa-XXL", 8),
            note="appendix D.2 says r = 8; the authors' scripts (examples/NLU) set r = 16",
        ),
        row("LoRA code, examples/NLU", "DeBERTa-XXL, r = 16", 4.7, lora("DeBERTa-XXL", 16)),
        row(
            f"{_LORA}, table 3",
            "GPT-2 M, r = 4",
            0.35,
            lora("GPT-2 M", 4),
            digits=2,
            note="0.1 % of the 354.92 M printed above it is 0.35 M, the prefix-tuning row's figure",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 L, r = 4",
            0.77,
            lora("GPT-2 L", 4),
            digits=2,
            note="0.1 % of 774.03 M is 0.77 M, the prefix-tuning row's figure",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 M, all parameters",
            354.92,
            ARCHITECTURES["GPT-2 M"].parameters,
            digits=2,
            note="0.1 M more than the released model has; the figure is from Li & Liang (2021)",
        ),
        row(
            f"{_LORA}, table 3",
            "GPT-2 L, all parameters",
            774.03,
            ARCHITECTURES["GPT-2 L"].parameters,
            digits=2,
        ),
        row(f"{_LORA}, table 4", "GPT-3, r = 1", 4.7, lora("GPT-3 175B", 1)),
        row(f"{_LORA}, table 4", "GPT-3, r = 8", 37.7, lora("GPT-3 175B", 8)),
        row(
            f"{_LORA}, table 4",
            "GPT-3, all parameters",
            175_255.8,
            gpt3.parameters,
            note="Brown et al. (2020), table D.1, print 174 600 M; an untied head makes it 175 221.8 M",
        ),
        row("GPT-3 paper, table D.1", "GPT-3, all parameters", 174.6, gpt3.parameters, "B"),
        row(f"{_LORA}, app. D.4", "GPT-3, r = 2 on W_v alone", 4.7, lora("GPT-3 175B", 2, ("value",))),
        row(
            f"{_LORA}, app. D.4",
            "GPT-3, r = 2 on all four",
            37.7,
            lora("GPT-3 175B", 2, ("attention",)),
            note="r = 2 on all four is table 5's 18 M; 37.7 M needs r = 4",
        ),
        row(
            f"{_LORA}, table 5",
            "GPT-3, r = 8 · 1 = 4 · 2 = 2 · 4",
            18,
            budget,
            digits=0,
            note="cut, not rounded: 18 874 368",
        ),
        row(
            f"{_LORA}, §4.2",
            "GPT-3's adapter, r = 4, 16 bits",
            35,
            size(budget, "float16"),
            "MB",
            0,
            note="36.0 MiB; 35 MB is 10 000 times less than 350 GB",
        ),
        row(f"{_LORA}, §4.2", "175 B in 16 bits", 350, size(175 * 10**9, "float16"), "GB", 0),
        row(
            f"{_LORA}, §4.2",
            "… over the adapter",
            10_000,
            size(175 * 10**9, "float16") / size(budget, "float16"),
            "-fold",
            0,
            note="350 GB over 37.7 MB; the paper says 'roughly'",
        ),
        row(
            f"{_LORA}, §4.2",
            "GPT-3, tuned fully with Adam",
            1.2,
            8 * gpt3.parameters,
            "TB",
            1,
            note="weights, gradients and two states in 16 bits; how 1.2 TB divides is not said",
        ),
        row(
            "LoRA code, README",
            "RoBERTa base, r = 8",
            0.8,
            lora("RoBERTa base", 8),
            note="the figure of RoBERTa large",
        ),
        row(
            "GPT-2 paper, table 2",
            "GPT-2",
            117,
            ARCHITECTURES["GPT-2"].parameters,
            digits=0,
            note="OpenAI's repository says so itself: 'our original parameter counts were wrong'",
        ),
        row("GPT-2's repository", "GPT-2", 124, ARCHITECTURES["GPT-2"].parameters, digits=0),
        row("its model card", "all-MiniLM-L6-v2", 22.7, ARCHITECTURES["all-MiniLM-L6-v2"].parameters),
        row("its weights", "SmolLM2-135M", 134_515_008, ARCHITECTURES["SmolLM2-135M"].parameters, "", 0),
    ]


def published_table() -> str:
    """`published_counts` as text: what is printed, what the settings give, and why not where they differ."""
    lines = [f"{'where':<24}{'what':<32}{'printed':>13}{'counted':>14}"]
    for row in published_counts():
        lines.append(
            f"{row.source:<24}{row.what:<32}{row.printed:>13}{row.ours:>14}  {'=' if row.reproduced else '≠'}"
        )
        if not row.reproduced:
            lines.append(f"    why not: {row.note}")
    return "\n".join(lines)
