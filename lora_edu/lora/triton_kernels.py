"""The LoRA embedding on a GPU: one Triton kernel forward, one backward, each reading what it needs once.

Not for choosing when to use them: lora_embedding in functional.py does, and imports this module only then, as
Triton is slow to import and has wheels for Linux alone. With TRITON_INTERPRET=1, set before anything imports
Triton, the same kernels run on a CPU, step by step in NumPy: slow, and good for learning and testing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(
    tokens,  # (T,)
    W,  # (V, d), rows W_stride apart
    A,  # (V, r), rows A_stride apart
    B,  # (d, r)
    out,  # (T, d)
    length,  # T
    vocabulary,  # V
    width,  # d
    W_stride,
    A_stride,
    padding,  # the padding token, -1 if there is none
    scaling: tl.float64,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
):
    """A program makes a tile of out: BLOCK_T tokens × BLOCK_D columns. Tiles of the same tokens are neighbours."""
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch, in_row = t < length, c < width

    token = tl.load(tokens + t, mask=in_batch, other=-1).to(tl.int64)
    known = (token >= 0) & (token < vocabulary)
    adapted = known & (token != padding)

    update = tl.zeros((BLOCK_T, BLOCK_D), SUM)
    for start in range(0, RANK, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        in_rank = k < RANK
        a = tl.load(A + token[:, None] * A_stride + k, mask=adapted[:, None] & in_rank, other=0.0)
        b = tl.load(B + c * RANK + k[:, None], mask=in_rank[:, None] & in_row, other=0.0)
        update = tl.dot(a.to(FACTOR), b.to(FACTOR), update, input_precision="ieee", out_dtype=SUM)

    w = tl.load(W + token[:, None] * W_stride + c, mask=known[:, None] & in_row, other=0.0)
    row = w.to(SUM) + tl.full((1, 1), scaling, SUM) * update
    row = tl.where(known[:, None], row, float("nan"))
    place = out + t[:, None] * width + c
    tl.store(place, row.to(out.dtype.element_ty), mask=in_batch[:, None] & in_row)


@triton.jit
def backward_kernel(
    tokens,  # (T,)
    G,  # (T, d), the gradient of out
    A,  # (V, r), rows A_stride apart
    B,  # (d, r)
    dA_rows,  # (T, r), zero, to add to; (column blocks, T, r) if DETERMINISTIC
    dB,  # (d, r), zero, to add to; (shares, d, r) if DETERMINISTIC
    length,  # T
    vocabulary,  # V
    width,  # d
    A_stride,
    padding,  # the padding token, -1 if there is none
    blocks_each,  # token blocks in a share
    scaling: tl.float64,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):
    """A program walks down BLOCK_D columns of G, over its share of the tokens. Each number of G is read once.

    The columns' rows of B are loaded before the walk and their gradient is summed in registers until its end;
    each block of tokens adds s · G B over these columns to its rows.
    """
    s = tl.full((1, 1), scaling, SUM)
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    share, column_block = program // column_blocks, program % column_blocks
    c = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    in_row, in_rank = c < width, k < RANK
    place_in_B, in_B = c[:, None] * RANK + k, in_row[:, None] & in_rank
    b = tl.load(B + place_in_B, mask=in_B, other=0.0).to(FACTOR)
    dB_sum = tl.zeros((BLOCK_D, BLOCK_R), SUM)

    first = share * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(length, BLOCK_T))):
        t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_batch = t < length
        token = tl.load(tokens + t, mask=in_batch, other=-1).to(tl.int64)
        adapted = (token >= 0) & (token < vocabulary) & (token != padding)
        a = tl.load(A + token[:, None] * A_stride + k, mask=adapted[:, None] & in_rank, other=0.0)
        g = tl.load(G + t[:, None] * width + c, mask=in_batch[:, None] & in_row, other=0.0).to(FACTOR)
        rows = s * tl.dot(g, b, input_precision="ieee", out_dtype=SUM)
        dB_sum = tl.dot(tl.trans(g), a.to(FACTOR), dB_sum, input_precision="ieee", out_dtype=SUM)
        place_in_A, in_A = t[:, None] * RANK + k, adapted[:, None] & in_rank
        if DETERMINISTIC:
            slab = tl.cast(column_block, tl.int64) * length * RANK
            tl.store(dA_rows + slab + place_in_A, tl.where(in_A, rows, 0.0), mask=in_batch[:, None] & in_rank)
        else:
            tl.atomic_add(dA_rows + place_in_A, rows, mask=in_A, sem="relaxed")

    if DETERMINISTIC:
        tl.store(dB + tl.cast(share, tl.int64) * width * RANK + place_in_B, s * dB_sum, mask=in_B)
    else:
        tl.atomic_add(dB + place_in_B, s * dB_sum, mask=in_B, sem="relaxed")


# From tensors to kernels

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
PROGRAMS_EACH = 4  # of the backward kernel, for each of a GPU's multiprocessors


class Blocks(NamedTuple):
    """A program's tile: tokens × columns, numbers of the rank at a time; warps at work, loads on their way."""

    tokens: int
    columns: int
    rank: int
    warps: int
    stages: int


def forward_blocks(width: int, rank: int, dtype: torch.dtype) -> Blocks:
    """The forward kernel's tile: small enough for several programs a multiprocessor, nothing spilt (sm_90)."""
    columns, block_r = {2: (128, 32), 4: (64, 16), 8: (32, 16)}[dtype.itemsize]
    return Blocks(64, at_most(columns, width), at_most(block_r, rank), 4, 3)


def backward_blocks(width: int, rank: int, dtype: torch.dtype) -> Blocks:
    """The backward kernel's: as wide as its sums, columns × rank, fit into registers, nothing spilt (sm_90)."""
    block_r = at_most(256, rank)
    most, sums = {2: (256, 16384), 4: (128, 4096), 8: (64, 2048)}[dtype.itemsize]
    columns = at_most(min(most, sums // block_r), width)
    if dtype.itemsize == 2:
        return Blocks(64 if block_r <= 32 else 32, columns, block_r, 8, 3)
    return Blocks(128 // dtype.itemsize, columns, block_r, 8, 2)


def at_most(largest: int, needed: int) -> int:
    """The smallest power of two that holds `needed`, from 16, the least that tl.dot multiplies, to `largest`."""
    return max(16, min(largest, triton.next_power_of_2(needed)))


def constants(rank: int, blocks: Blocks, factor: torch.dtype, total: torch.dtype) -> dict:
    """What is compiled into a kernel; the interpreter multiplies in the sum's dtype, as NumPy has no bfloat16."""
    return {
        "RANK": rank,
        "BLOCK_T": blocks.tokens,
        "BLOCK_D": blocks.columns,
        "BLOCK_R": blocks.rank,
        "FACTOR": TRITON_DTYPES[total if INTERPRETED else factor],
        "SUM": TRITON_DTYPES[total],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,
    }


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of them is, else float32: what the kernels sum in."""
    double = any(each.dtype == torch.float64 for each in tensors)
    return torch.float64 if double else torch.float32


def look_up(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding: int = -1,
    blocks: Blocks | None = None,
) -> Tensor:
    """out[t] = W[t] + s · A[t] Bᵀ in W's dtype, by the forward kernel; W[t] alone where t is `padding`.

    A token outside the vocabulary reads nothing: its row of out is NaN. Shapes as lora_embedding's.
    """
    width, rank = lora_B.shape
    out = weight.new_empty((*tokens.shape, width))
    length = tokens.numel()
    if length:
        blocks = blocks or forward_blocks(width, rank, lora_A.dtype)
        programs = triton.cdiv(length, blocks.tokens) * triton.cdiv(width, blocks.columns)
        with torch.cuda.device_of(out):
            forward_kernel[(programs,)](
                tokens.contiguous(),
                weight,
                lora_A,
                lora_B.contiguous(),
                out,
                length,
                weight.shape[0],
                width,
                weight.stride(0),
                lora_A.stride(0),
                padding,
                scaling,
                **constants(rank, blocks, lora_A.dtype, sum_dtype(weight, lora_A)),
            )
    return out


def gradients(
    G: Tensor,
    tokens: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding: int = -1,
    deterministic: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """(s · G B, a row a token, zero at `padding`; s · Gᵀ A[tokens]), by the backward kernel, in lora_A's dtype.

    G: the gradient of out, (*tokens.shape, d). Programs add to the same numbers in any order, so that the last
    digit may change from run to run; if `deterministic`, each writes its own, which are then summed in order.
    """
    width, rank = lora_B.shape
    length, total = tokens.numel(), sum_dtype(G, lora_A)
    factor = torch.promote_types(G.dtype, lora_A.dtype)
    blocks = blocks or backward_blocks(width, rank, factor)
    column_blocks, token_blocks = triton.cdiv(width, blocks.columns), triton.cdiv(length, blocks.tokens)
    processors = torch.cuda.get_device_properties(G.device).multi_processor_count if G.is_cuda else 1
    shares = max(1, min(token_blocks, triton.cdiv(PROGRAMS_EACH * processors, column_blocks)))
    blocks_each = triton.cdiv(token_blocks, shares)
    shares = triton.cdiv(token_blocks, blocks_each) if length else 0
    rows = G.new_zeros((column_blocks if deterministic else 1, length, rank), dtype=total)
    dB = G.new_zeros((shares if deterministic else 1, width, rank), dtype=total)
    if length:
        with torch.cuda.device_of(G):
            backward_kernel[(shares * column_blocks,)](
                tokens.contiguous(),
                G.contiguous(),
                lora_A,
                lora_B.contiguous(),
                rows,
                dB,
                length,
                lora_A.shape[0],
                width,
                lora_A.stride(0),
                padding,
                blocks_each,
                scaling,
                DETERMINISTIC=deterministic,
                **constants(rank, blocks, factor, total),
            )
    rows, dB = (each.sum(0) if deterministic else each[0] for each in (rows, dB))
    return rows.to(lora_A.dtype), dB.to(lora_B.dtype)


# As operators of PyTorch's, with gradients, which torch.compile takes whole


@torch.library.custom_op("lora_edu::lora_embedding", mutates_args=())
def embedding_op(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding: int,
    scale_grad_by_freq: bool,
    deterministic: bool,
) -> Tensor:
    return look_up(tokens, weight, lora_A, lora_B, scaling, padding)


@embedding_op.register_fake
def _(tokens, weight, lora_A, lora_B, scaling, padding, scale_grad_by_freq, deterministic):
    return weight.new_empty((*tokens.shape, weight.shape[1]))


@torch.library.custom_op("lora_edu::lora_embedding_backward", mutates_args=())
def embedding_backward_op(
    G: Tensor,
    tokens: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding: int,
    scale_grad_by_freq: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    vocabulary = lora_A.shape[0]
    rows, dB = gradients(G, tokens, lora_A, lora_B, scaling, padding, deterministic)
    return gather(rows, tokens, vocabulary, padding, scale_grad_by_freq), dB


@embedding_backward_op.register_fake
def _(G, tokens, lora_A, lora_B, scaling, padding, scale_grad_by_freq, deterministic):
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def gather(rows: Tensor, tokens: Tensor, vocabulary: int, padding: int, scale_grad_by_freq: bool) -> Tensor:
    """The rows of dA, (T, r), summed token by token into (V, r): PyTorch's sort and sum, always in one order.

    Not atomic additions: with those a batch of one token repeated would wait on a single row.
    """
    known = tokens.flatten().clamp(0, vocabulary - 1)  # the row of an unknown token is zero: add it anywhere
    return torch.ops.aten.embedding_dense_backward(rows, known, vocabulary, padding, scale_grad_by_freq)


def keep(ctx, inputs, output) -> None:
    tokens, _, lora_A, lora_B, *ctx.options = inputs
    ctx.save_for_backward(tokens, lora_A, lora_B)


def backward(ctx, G: Tensor) -> tuple:
    dA, dB = embedding_backward_op(G, *ctx.saved_tensors, *ctx.options)
    return None, None, dA, dB, None, None, None, None


embedding_op.register_autograd(backward, setup_context=keep)


class SparseEmbedding(torch.autograd.Function):
    """The same with a sparse dA, (V, r), that holds a row a token of the batch. No operator may return one."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        keep(ctx, inputs, None)
        return look_up(*inputs[:6])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G: Tensor) -> tuple:
        tokens, lora_A, lora_B = ctx.saved_tensors
        scaling, padding, _, deterministic = ctx.options
        rows, dB = gradients(G, tokens, lora_A, lora_B, scaling, padding, deterministic)
        places = tokens.flatten().clamp(0, lora_A.shape[0] - 1).long()
        dA = torch.sparse_coo_tensor(places[None], rows, lora_A.shape, check_invariants=False)
        return None, None, dA, dB, None, None, None, None
