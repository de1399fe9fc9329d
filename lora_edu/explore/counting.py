"""Explorers of chapter 04: what rank, shape and choice of matrices cost, and a calculator for one's own.

The counting itself is lora_edu.counting's.
"""

import html
from collections.abc import Callable

import ipywidgets as widgets
from matplotlib.figure import Figure

from lora_edu import counting, plots
from lora_edu.counting import spaced
from lora_edu.explore.explorer import Explorer
from lora_edu.text import format_bytes

SHAPES = {
    "10 000 × 100 (our table)": (10_000, 100),
    "100 × 100 (our W_q)": (100, 100),
    "768 × 768 (RoBERTa base)": (768, 768),
    "4096 × 4096 (Llama-3-8B, W_q)": (4096, 4096),
    "128 256 × 4096 (Llama-3-8B, table)": (128_256, 4096),
}
CHOICES = {
    "W_q and W_v": ("query", "value"),
    "all of attention": ("attention",),
    "MLP": ("mlp",),
    "attention and MLP": ("linear",),
    "embedding alone": ("embedding",),
    "everything": ("all",),
}
MODELS = ("TinyLM", "GPT-2", "Gemma-2B", "Llama-3-8B", "GPT-3 175B")
SYMBOLS = {"query": "W_q", "key": "W_k", "value": "W_v", "output": "W_o", "query_key_value": "c_attn"}


def percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}" if value < 1 else f"{value:.0%}"


def rank_and_shape() -> Explorer:
    """How much of a matrix its adapter is, for a rank and a shape; where A and B stop saving anything."""

    def draw(figure: Figure, shape: str, r: int) -> str:
        rows, columns = SHAPES[shape]
        area, curve = figure.subplots(1, 2, width_ratios=(1, 1.5))
        share, even = counting.share(rows, columns, r), counting.break_even_rank(rows, columns)
        numbers = counting.lora_parameters(rows, columns, r)
        plots.area_in_area(area, share, f"A and B\n{percent(share)}", f"W: {spaced(rows * columns)}")
        area.set_title("areas: numbers to train")
        ranks = sorted({1, 2, 4, 8, 16, 32, 64, 100, 256, 1024, min(rows, columns)} | {r})
        ranks = [rank for rank in ranks if rank <= min(rows, columns)]
        plots.share_of_rank(curve, ranks, [counting.share(rows, columns, rank) for rank in ranks], r, even)
        curve.set(xlim=(0.9, 6000), ylim=(1e-4, 3))
        curve.set_title(f"{rows} × {columns}: break-even at r = {even:.4g}")
        return (
            f"At r = {r}, A and B of a {rows} × {columns} matrix hold {spaced(numbers)} numbers, "
            f"{percent(share)} of the {spaced(rows * columns)} in W; break-even is at r = {even:.4g}."
        )

    return Explorer(
        draw,
        {"shape": list(SHAPES), "r": [1, 2, 4, 8, 16, 64, 100]},
        start={"shape": "10 000 × 100 (our table)", "r": 8},
    )


def table_and_square() -> Explorer:
    """An embedding beside a square matrix of the same width: the smaller share where V > d, the larger number."""

    def draw(figure: Figure, vocabulary: int, width: int) -> str:
        curve, columns = figure.subplots(1, 2, width_ratios=(1.25, 1))
        widths = [64, 100, 256, 384, 768, 1024, 2048, 4096, 8192]
        table, square = counting.share(vocabulary, width, 8), counting.share(width, width, 8)
        for name, rows, colour in (("d × d", None, plots.VERMILION), ("V × d", vocabulary, plots.BLUE)):
            shares = [counting.share(rows or d, d, 8) for d in widths]
            curve.plot(widths, shares, color=colour, label=name)
        curve.plot([width, width], [table, square], "o", color=plots.BLACK, markersize=5)
        curve.set(xscale="log", yscale="log", xlabel="width d", ylabel="share at r = 8", ylim=(5e-4, 0.4))
        plots.plain_log(curve, (100, 1000, 4096), (0.001, 0.01, 0.1))
        curve.legend()
        curve.set_title(f"share: {percent(table)} of the table, {percent(square)} of a square")
        shapes = (vocabulary, width), (width, width), (4 * width, width)
        numbers = [counting.lora_parameters(*shape, 8) for shape in shapes]
        plots.bars(
            columns,
            ["V × d", "d × d", "4d × d"],
            numbers,
            [plots.BLUE, plots.VERMILION, plots.GREY],
            [spaced(number) for number in numbers],
        )
        columns.set(xlabel="numbers in A and B", xticks=[])
        columns.set_title(f"number: {numbers[0] / numbers[1]:.3g} times a square's")
        return (
            f"At V = {spaced(vocabulary)}, d = {width} and r = 8 the embedding's adapter is "
            f"{percent(table)} of its table (a square matrix's: {percent(square)}) and holds "
            f"{spaced(numbers[0])} numbers (a square matrix's: {spaced(numbers[1])})."
        )

    return Explorer(
        draw,
        {
            "vocabulary": [1000, 10_000, 50_257, 128_256, 256_000],
            "width": [100, 384, 768, 4096],
        },
        start={"vocabulary": 10_000, "width": 100},
        labels={"vocabulary": "vocabulary V", "width": "width d"},
        formats={"vocabulary": spaced},
    )


def which_matrices() -> Explorer:
    """What a choice of matrices costs in a real model: numbers to train, and a training step's memory."""

    def draw(figure: Figure, model: str, targets: str) -> str:
        numbers, memory = figure.subplots(1, 2, width_ratios=(1, 1.2))
        chosen = counting.count(model, CHOICES[targets], 8)
        rows = other_rows(chosen)
        inside, tied = {(row.role, row.name) for row in chosen.rows}, chosen.architecture.tied
        millions = [row.parameters / 1e6 for row in rows]
        plots.bars(
            numbers,
            [label(row, tied) for row in rows],
            millions,
            [plots.BLUE if (row.role, row.name) in inside else "#c8c8c8" for row in rows],
            [f"{value:.3g}" for value in millions],
        )
        numbers.set(xlabel="million numbers in A and B, r = 8")
        numbers.set_title(f"{chosen.parameters / 1e6:.3g} M, {percent(chosen.share)} of the model")
        step = {"dtype": "bfloat16", "sequence": 256, "batch": 1}
        full = counting.training_memory(model, **step)
        lora = counting.training_memory(model, "lora", 8, CHOICES[targets], **step)
        unit, scale = ("GB", 1e9) if full.total > 1e9 else ("MB", 1e6)
        names = {
            "weights": "weights",
            "gradients": "gradients",
            "optimiser": "Adam's state",
            "activations": "activations",
        }
        parts = {text: [getattr(way, name) / scale for way in (full, lora)] for name, text in names.items()}
        plots.stacked_bars(
            memory, ["full", "LoRA"], parts, f"{unit}: bfloat16, AdamW, one text of 256 tokens"
        )
        memory.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28))
        memory.set_title(f"memory: {format_bytes(full.total)} against {format_bytes(lora.total)}")
        return (
            f"{model}, LoRA on {targets} at r = 8: {spaced(chosen.parameters)} numbers to train, "
            f"{percent(chosen.share)} of the model; a step needs {format_bytes(lora.total)}, "
            f"full tuning {format_bytes(full.total)}."
        )

    return Explorer(
        draw,
        {"model": list(MODELS), "targets": list(CHOICES)},
        start={"model": "GPT-2", "targets": "W_q and W_v"},
        size=(7.2, 3.2),
        density=1.25,
    )


def label(row: counting.Row, tied: bool) -> str:
    return "head (tied)" if tied and row.role == "head" else SYMBOLS.get(row.role, row.role)


def other_rows(chosen: counting.Count) -> list[counting.Row]:
    """The chosen kinds of matrices and all others, in the model's order; q, k, v apart if chosen."""
    model, rank = chosen.architecture, chosen.rank
    rows = [*counting.count(model, "all", rank).rows]
    if any(row.role == "query" for row in chosen.rows):
        rows = [row for row in rows if row.role != "query_key_value"]
        rows += counting.count(model, ("query", "key", "value"), rank).rows
    order = ("embedding", "query_key_value", "query", "key", "value", "output", "gate", "up", "down", "head")
    return sorted(dict.fromkeys(rows), key=lambda row: order.index(row.role))


class Calculator(widgets.VBox):
    """Fields for a reader's own numbers above the text that answers them, by the kernel, at each change.

    Without a kernel: the text for the values it started with.
    """

    def __init__(self, answer: Callable[..., str], fields: dict[str, widgets.ValueWidget]):
        self.answer, self.fields = answer, fields
        self.output = widgets.HTML()
        for field in fields.values():
            field.observe(self.update, names="value")
        self.update()
        row = widgets.Layout(flex_flow="row wrap", width="100%")
        super().__init__([widgets.HBox(list(fields.values()), layout=row), self.output])

    @property
    def text(self) -> str:
        """The answer for the values as they are, or what is wrong with them."""
        try:
            return self.answer(**{name: field.value for name, field in self.fields.items()})
        except ValueError as error:
            return str(error)

    def update(self, _=None) -> None:
        self.output.value = f'<pre role="status" aria-live="polite">{html.escape(self.text)}</pre>'

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": self.text}


def matrix_report(rows: int, columns: int, rank: int, copies: int, dtype: str, optimiser: str) -> str:
    """LoRA of one rank on so many rows × columns matrices: numbers, bytes, FLOPs."""
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"matrices must be a whole number, 1 or more; got {copies!r}")
    each, share = counting.lora_parameters(rows, columns, rank), counting.share(rows, columns, rank)
    own = dtype if counting.BYTES[dtype] >= 2 else "float32"
    trained = copies * each
    state = counting.optimiser_bytes(trained, 2 * copies, own, optimiser)
    lines = [
        f"numbers in W          {spaced(copies * rows * columns)}",
        f"numbers in A and B    {spaced(trained)}, {percent(share)} of them",
        f"break-even rank       {counting.break_even_rank(rows, columns):.4g}",
        f"W in {dtype:<17}{format_bytes(counting.size(copies * rows * columns, dtype))}",
        f"A and B in {own:<11}{format_bytes(counting.size(trained, own))}",
        f"their gradients       {format_bytes(counting.size(trained, own))}",
        f"state of {optimiser:<13}{format_bytes(state)}",
    ]
    if counting.BYTES[dtype] >= 2:
        full = counting.size(copies * rows * columns, dtype)
        whole = full + counting.optimiser_bytes(copies * rows * columns, copies, dtype, optimiser)
        lines.append(f"tuned fully instead   {format_bytes(whole)} of gradients and state")
    forward = counting.forward_flops(rows, columns, rank) / counting.forward_flops(rows, columns)
    step = [
        counting.forward_flops(rows, columns, r) + counting.backward_flops(rows, columns, r)
        for r in (rank, 0)
    ]
    lines += [
        f"FLOPs of a forward    {forward:.3f} times those of W alone",
        f"FLOPs of a step       {step[0] / step[1]:.3f} times those of full tuning",
    ]
    return "\n".join(lines)


def calculator(
    rows: int = 4096,
    columns: int = 4096,
    rank: int = 8,
    copies: int = 64,
    dtype: str = "bfloat16",
    optimiser: str = "adamw",
) -> Calculator:
    """LoRA on matrices of the reader's own: any shape, rank, dtype and optimiser."""
    style = {"description_width": "5.5em"}
    layout = widgets.Layout(width="13em")

    def number(name: str, value: int) -> widgets.IntText:
        return widgets.IntText(value, description=name, continuous_update=True, style=style, layout=layout)

    def choice(name: str, value: str, options) -> widgets.Dropdown:
        return widgets.Dropdown(
            value=value, options=list(options), description=name, style=style, layout=layout
        )

    return Calculator(
        matrix_report,
        {
            "rows": number("rows", rows),
            "columns": number("columns", columns),
            "rank": number("rank r", rank),
            "copies": number("matrices", copies),
            "dtype": choice("dtype", dtype, counting.BYTES),
            "optimiser": choice("optimiser", optimiser, counting.OPTIMISERS),
        },
    )
