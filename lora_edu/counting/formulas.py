"""LoRA on one matrix: its numbers, bytes and FLOPs, and how they are printed. Knows no model."""

from collections.abc import Iterable
from typing import NamedTuple

from lora_edu.text import check_rank, did_you_mean, whole_number

# Bytes a number takes. int4 is the packed weight alone: the scales that come with it depend on the format.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int4": 0.5}
# Other names of the same widths. NF4 and FP4 differ from int4 in their values, not in their size.
SHORT = {
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
    "fp8": "float8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "8bit": "int8",
    "4bit": "int4",
    "nf4": "int4",
    "fp4": "int4",
}


class State(NamedTuple):
    """What an optimiser keeps: so many numbers for each trained one, and a counter for each trained tensor."""

    numbers: int
    width: int | None  # bytes of each; None: as wide as the trained number
    counter: int  # bytes; torch's Adam counts its steps in a float32 scalar for each tensor


OPTIMISERS = {
    "sgd": State(0, None, 0),
    "momentum": State(1, None, 0),
    "adam": State(2, None, 4),
    "adamw": State(2, None, 4),
    "adamw-8bit": State(2, 1, 0),
}
# Names that training scripts use (transformers' `optim`).
ALSO = {
    "adamw-torch": "adamw",
    "adamw-torch-fused": "adamw",
    "paged-adamw-32bit": "adamw",
    "adamw8bit": "adamw-8bit",
    "adamw-bnb-8bit": "adamw-8bit",
    "paged-adamw-8bit": "adamw-8bit",
}


def lora_parameters(rows: int, columns: int, rank: int) -> int:
    """|Θ| = r (rows + columns): the numbers in A and B of one adapted matrix.

    For the paper's square matrices this is its 2 · d_model · r (Hu et al. 2021, §5.1).
    Raises ValueError for a rank that no rows × columns matrix can need.
    """
    _check_shape(rows, columns)
    check_rank(rank, (rows, columns))
    return rank * (rows + columns)


def share(rows: int, columns: int, rank: int) -> float:
    """r (rows + columns) / (rows · columns): the adapter's numbers as a share of the matrix's own."""
    return lora_parameters(rows, columns, rank) / (rows * columns)


def break_even_rank(rows: int, columns: int) -> float:
    """rows · columns / (rows + columns): the r at which A and B hold as many numbers as the matrix itself.

    Half the width for a square matrix; close to the smaller side for a long one, and always below it.
    """
    _check_shape(rows, columns)
    return rows * columns / (rows + columns)


def forward_flops(rows: int, columns: int, rank: int = 0) -> int:
    """FLOPs of one input vector through W, and through A and B beside it when rank > 0: 2 io + 2 r (i + o).

    A multiplication and an addition count as two. The sum of the two paths, the bias and the scaling are left
    out: they grow with i + o, not with io. A look-up in an embedding costs none; there LoRA adds 2 r d.
    """
    _check_shape(rows, columns)
    return 2 * rows * columns + (2 * lora_parameters(rows, columns, rank) if rank else 0)


def backward_flops(rows: int, columns: int, rank: int = 0) -> int:
    """FLOPs of the backward pass for one input vector; rank 0 means that W itself is trained.

    Full tuning: 2 io for the gradient of the input and 2 io for that of W. LoRA: 2 io for the gradient of the
    input through W, and 4 r (i + o) for A and B; the second 2 io is what it saves.
    """
    _check_shape(rows, columns)
    if not rank:
        return 4 * rows * columns
    return 2 * rows * columns + 4 * lora_parameters(rows, columns, rank)


def size(parameters: int, dtype: str = "float32") -> float:
    """Bytes of so many numbers of a dtype, by its own name or a short one ("bf16")."""
    return parameters * BYTES[dtype_name(dtype)]


def optimiser_bytes(parameters: int, tensors: int, dtype: str = "float32", optimiser: str = "adamw") -> float:
    """Bytes of an optimiser's state for so many trained numbers in so many tensors."""
    state = OPTIMISERS[optimiser_name(optimiser)]
    width = BYTES[dtype_name(dtype)] if state.width is None else state.width
    return parameters * state.numbers * width + tensors * state.counter


# --- names and checks ---------------------------------------------------------------------------------------


def dtype_name(dtype: object) -> str:
    """The name in BYTES of a dtype: "bf16", "BFloat16" and torch.bfloat16 are "bfloat16". ValueError if unknown."""
    name = str(dtype).removeprefix("torch.").lower()
    return known(BYTES, SHORT.get(name, name), "dtype", dtype)


def optimiser_name(optimiser: str) -> str:
    """The name in OPTIMISERS of an optimiser, in any case, with - or _. Raises ValueError if unknown."""
    name = str(optimiser).lower().replace("_", "-")
    return known(OPTIMISERS, ALSO.get(name, name), "optimiser", optimiser)


def known(table: Iterable[str], name: str, what: str, given: object) -> str:
    """`name` if it stands in the table; else a ValueError that shows what was given and what is near it."""
    if name in table:
        return name
    raise ValueError(
        f"unknown {what} {str(given)!r}{did_you_mean(str(given), table)} There are: {', '.join(table)}"
    )


def _check_shape(rows: int, columns: int) -> None:
    whole_number("rows", rows)
    whole_number("columns", columns)


# --- as text ------------------------------------------------------------------------------------------------


def spaced(number: float, digits: int = 0) -> str:
    """A number as the course prints it: 80 800."""
    return f"{number:,.{digits}f}".replace(",", " ")
