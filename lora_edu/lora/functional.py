"""The mathematics of LoRA as functions of tensors: linear layer, embedding, merging, an adapter a row.

Not for state: the layers that hold the weights are in layers.py.
"""

import os
from collections.abc import Sequence
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor


def triton_version() -> tuple[int, ...]:
    """(3, 7) for 3.7.1, (0,) where there is none. Asks without importing it, which takes its time."""
    try:
        return tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0,)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on a CPU, slowly
# Before 3.5 it can't multiply in float64; before 3.7 its interpreter can't loop over NumPy 2.4's numbers
TRITON = triton_version() >= ((3, 7) if INTERPRETED else (3, 5))
TRITON_RANKS = range(1, 257)
ROWS_AT_ONCE = 2**22  # elements of ΔW computed at a time while merging: 16 MB in float32
GATHERED = (
    2**17
)  # numbers of gathered factors, for each adapter present, from which it gets a product of its own

# Which rows of a batch, and the adapter of all of them (an int) or of each (a tensor).
Part = tuple[slice | Tensor, int | Tensor]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """h = W x + b + s · B A x: a frozen linear layer and its low-rank update (LoRA paper, eq. 3).

    x: (..., in); weight W: (out, in); lora_A: (r, in); lora_B: (out, r); bias: (out,); returns (..., out).
    `dropout` is the probability with which an entry of x is hidden from the update only. The update is
    computed in lora_A's dtype, the result has the dtype of W x.
    """
    base = F.linear(x, weight, bias)
    low = low_rank_part(x, lora_A, scaling, dropout)
    return base.add_(F.linear(low, lora_B))  # in place: no third array as large as the output


def low_rank_part(x: Tensor, lora_A: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """s · A x: (..., in) → (..., r), in lora_A's dtype. B times this is what LoRA adds to a linear layer's output."""
    x = F.dropout(x, dropout) if dropout > 0 else x
    return scaling * F.linear(x.to(lora_A.dtype), lora_A)


def lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """out[t] = W[t] + s · A[t] Bᵀ, and W[t] alone where t is `padding_idx`.

    tokens: any shape, integers below V; weight W: (V, d); lora_A: (V, r), one row a token; lora_B: (d, r);
    returns (*tokens.shape, d). A look-up reads r + d numbers a token, whatever V is.

    With the gradient G of out, row t of A receives s · Σ G B over the places where t stands (divided by their
    number with `scale_grad_by_freq`), B receives s · Gᵀ A[tokens]; the padding row of A receives nothing.
    With `sparse` A's gradient holds only the rows that were looked up, so that a step costs the same for every V.

    On CUDA, with W frozen, this is one Triton kernel forward and one backward (triton_kernels.py), where Triton
    3.5 or later is installed; elsewhere PyTorch's operations give the same. `deterministic` asks the kernels for
    sums in a fixed order, at the price of memory; PyTorch's operations below keep one anyway. The kernels'
    gradient can't be differentiated again, and torch.compile takes them whole unless `sparse`.
    A token outside 0 … V − 1 raises IndexError on a CPU; the kernels give it a row of NaN, and PyTorch's own
    operations stop the program on CUDA. LoRAEmbedding checks first.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    if (tokens.is_cuda or INTERPRETED) and TRITON and triton_serves(tokens, weight, lora_A, lora_B):
        from . import triton_kernels

        if sparse and torch.compiler.is_compiling():
            raise RuntimeError(
                "the sparse gradient of a LoRA embedding can't be compiled: no operator may return a sparse "
                "tensor. Take sparse=False, or leave this layer out with torch.compiler.disable"
            )
        padding = -1 if padding_idx is None else padding_idx
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        options = (scaling, padding, scale_grad_by_freq, deterministic, sparse)
        return triton_kernels.embed(tokens, weight, lora_A, lora_B, *options)
    return plain_lora_embedding(
        tokens, weight, lora_A, lora_B, scaling, padding_idx, scale_grad_by_freq, sparse
    )


def plain_lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """lora_embedding by PyTorch's own operations, on any device; `padding_idx` is not negative."""
    base = F.embedding(tokens, weight, padding_idx, None, 2.0, scale_grad_by_freq, sparse)
    rows = F.embedding(tokens, lora_A, None, None, 2.0, scale_grad_by_freq, sparse)
    if padding_idx is not None:  # masks the gradient too
        rows = rows.masked_fill((tokens == padding_idx).unsqueeze(-1), 0.0)
    return base.add_(F.linear(scaling * rows, lora_B))


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter: Sequence[int] | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y[i] = W x[i] + b + B[g(i)] A[g(i)] x[i]: a linear layer where every row of the batch has its own adapter.

    x: (batch, …, in); weight W: (out, in); lora_A: (n, r, in) and lora_B: (n, out, r), n adapters of one rank, s
    multiplied into one of the two; adapter g: (batch,), 0 … n − 1, or −1 for W alone; returns (batch, …, out).
    W multiplies the whole batch once, whatever n is; a row with −1 is W x[i] + b bit for bit. This is the batched
    LoRA product of Punica (Chen et al. 2023, its SGMV operator) and S-LoRA (Sheng et al. 2023).

    Either each adapter present multiplies its rows, which costs some calls an adapter, or the factors are gathered,
    one copy a row, and multiplied by two batched products, which costs rows · r (in + out) copied numbers: that is
    done while they are fewer than GATHERED an adapter present. Measured on one core (float32, r = 8, 64 rows of one
    token, medians) with 1, 8 and 64 adapters at 576 × 576, where the base product takes 1.3 ms: 0.1, 0.9 and 3.3 ms
    for a product each, 1.0, 1.1 and 0.8 ms gathered (benchmarks/serving.py).

    For inference: the sum is taken in place. Raises ValueError for an adapter's number that isn't there.
    """
    parts = adapter_parts(adapter, len(lora_A), lora_A[0].numel() + lora_B[0].numel(), x.device)
    return add_by_row(F.linear(x, weight, bias), x, lora_A, lora_B, parts)


def grouped_lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter: Sequence[int] | Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """out[i, t] = W[t] + A[g(i)][t] B[g(i)]ᵀ for row i and its token t, and W[t] alone where t is `padding_idx`.

    tokens: (batch, …), integers below V; weight W: (V, d); lora_A: (n, V, r) and lora_B: (n, d, r), s multiplied into
    one of the two; adapter g: (batch,), 0 … n − 1, or −1 for W alone; returns (batch, …, d). See grouped_lora_linear.
    """
    parts = adapter_parts(adapter, len(lora_A), lora_B[0].numel(), tokens.device)
    return add_by_row(F.embedding(tokens, weight), tokens, lora_A, lora_B, parts, True, padding_idx)


def adapter_parts(
    adapter: Sequence[int] | Tensor, adapters: int, size: int, device: torch.device | str | None = None
) -> list[Part]:
    """The products that a batch needs, from the adapter of each row (−1: none); see grouped_lora_linear.

    adapters: how many there are; size: the numbers to gather for a row, r (in + out) of a linear layer, r · d of an
    embedding. Rows that stand next to one another come as a slice, so that nothing is copied.
    """
    numbers = adapter.tolist() if isinstance(adapter, Tensor) else [int(each) for each in adapter]
    if strangers := [each for each in numbers if not -1 <= each < adapters]:
        raise ValueError(
            f"an adapter's number must be between 0 and {adapters - 1}, or −1 for the base; got {strangers[0]}"
        )
    rows_of: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        if number >= 0:
            rows_of.setdefault(number, []).append(row)
    adapted = sorted(row for rows in rows_of.values() for row in rows)
    if len(rows_of) > 1 and len(adapted) * size < GATHERED * len(rows_of):
        slots = torch.tensor([numbers[row] for row in adapted], device=device)
        return [(_selection(adapted, device), slots)]
    return [(_selection(rows, device), number) for number, rows in rows_of.items()]


def _selection(rows: list[int], device: torch.device | str | None) -> slice | Tensor:
    together = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=device)


def add_by_row(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Sequence[Part],
    embedding: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """What the adapters of `parts` add to a layer's output, added in place; returns the output.

    out: (batch, …, out) of the base; x: the layer's input, (batch, …, in), or (batch, …) tokens of an embedding. The
    factors are as in grouped_lora_linear or grouped_lora_embedding.
    """
    batch, width = out.shape[0], out.shape[-1]
    out = out.contiguous()
    flat_out = out.view(batch, -1, width)
    flat = x.reshape(batch, -1) if embedding else x.reshape(batch, -1, x.shape[-1]).to(lora_A.dtype)
    for rows, adapter in parts:
        one, some = isinstance(adapter, int), flat[rows]
        if embedding:
            low = lora_A[adapter if one else adapter[:, None], some]
            if padding_idx is not None:
                low = low.masked_fill((some == padding_idx).unsqueeze(-1), 0.0)
        else:
            low = F.linear(some, lora_A[adapter]) if one else torch.bmm(some, lora_A[adapter].mT)
        right = lora_B[adapter].mT
        if isinstance(rows, slice) and out.dtype == lora_B.dtype:
            target = flat_out[rows]  # a view
            if one:
                target.view(-1, width).addmm_(low.view(-1, low.shape[-1]), right)
            else:
                target.baddbmm_(low, right)
        elif isinstance(rows, slice):
            flat_out[rows] += low @ right
        else:
            flat_out.index_add_(0, rows, (low @ right).to(out.dtype))
    return out


def triton_serves(tokens: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the kernels can do this look-up: W frozen, rows in one piece, dtypes and a card that they know."""
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (
        not (weight.requires_grad and torch.is_grad_enabled())
        and weight.shape == (lora_A.shape[0], lora_B.shape[0])
        and lora_A.shape[1] == lora_B.shape[1]
        and tokens.dtype in (torch.int32, torch.int64)
        and weight.dtype in floating
        and lora_A.dtype in floating
        and lora_A.dtype == lora_B.dtype
        and lora_B.shape[1] in TRITON_RANKS
        and tokens.device == weight.device == lora_A.device == lora_B.device
        and weight.stride(1) == 1
        and lora_A.stride(1) == 1
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in (weight, lora_A, lora_B))
        and (not tokens.is_cuda or torch.cuda.get_device_properties(tokens.device).major >= 8)
    )


def clip_norm(rows: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Rows longer than `max_norm` scaled down to it, in a new tensor; rows: (..., d).

    The same values as `torch.nn.Embedding(max_norm=…)`, which rescales its table in place.
    """
    norms = rows.norm(norm_type, dim=-1, keepdim=True)
    return torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)


def delta(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype | None = None) -> Tensor:
    """ΔW = s · left right, for factors (rows, r) and (r, columns), computed in float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (scaling * (left.to(wide) @ right.to(wide))).to(dtype or left.dtype)


def merged_weight(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> tuple[Tensor, float]:
    """W + s · left right, rounded once to W's dtype, and the share of ΔW that this rounding swallowed.

    weight W: (rows, columns); left: (rows, r); right: (r, columns). The share is ‖ΔW − (merged − W)‖_F /
    ‖ΔW‖_F, 0 if ΔW is 0. Works on a few rows at a time: beside the result it needs 150 MB, not a second
    table.
    """
    merged = torch.empty_like(weight)
    wide = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    lost, whole = 0.0, 0.0
    step = max(1, ROWS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        update = delta(left[rows], right, scaling, wide)
        before = weight[rows].to(wide)
        merged[rows] = before + update
        if weight.device.type != "meta":
            lost += float((merged[rows].double() - before.double() - update).norm()) ** 2
            whole += float(update.double().norm()) ** 2
    return merged, (lost / whole) ** 0.5 if whole > 0 else 0.0
