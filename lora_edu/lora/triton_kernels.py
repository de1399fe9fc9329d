"""The LoRA embedding on a GPU: one Triton kernel forward, one backward, each reading what it needs once.

Not for choosing when to use them: lora_embedding in functional.py does, and imports this module only then, as
Triton is slow to import and has wheels for Linux alone. With TRITON_INTERPRET=1, set before anything imports
Triton, the same kernels run on a CPU, step by step in NumPy: slow, and good for learning and testing.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


# Sizes that a table keeps (d, r, the rows' strides) are compiled in. The compiler then knows how far apart rows lie,
# and so how wide a load may be: 16 bytes a thread wherever d and r allow it, which at r = 8 or d = 100 it could not
# see from an argument. What changes from batch to batch it must not look at, or a new length would compile anew.
@triton.jit(do_not_specialize=["length", "vocabulary", "padding"])
def forward_kernel(
    tokens,  # (T,)
    W,  # (V, d), rows W_STRIDE apart
    A,  # (V, r), rows A_STRIDE apart
    B,  # (d, r)
    out,  # (T, d)
    length,  # T
    vocabulary,  # V
    padding,  # the padding token, -1 if there is none
    scaling: tl.float64,
    WIDTH: tl.constexpr,  # d
    RANK: tl.constexpr,  # r
    W_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    PERSISTENT: tl.constexpr,
    STAGES: tl.constexpr,
    HINTS: tl.constexpr,
):
    """A program makes a tile of out: BLOCK_T tokens × BLOCK_D columns, or several, if PERSISTENT.

    Tiles of the same tokens are neighbours, or of the same columns, if COLUMNS_FIRST. HINTS to the cache: what is
    written passes through, B stays.
    """
    column_blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK_D)
    token_blocks = tl.cdiv(length, BLOCK_T)
    first, programs = tl.program_id(0), tl.num_programs(0)
    last = token_blocks * column_blocks if PERSISTENT else first + 1
    for tile in tl.range(first, last, programs, num_stages=STAGES if PERSISTENT else 1):
        token_block = tile % token_blocks if COLUMNS_FIRST else tile // column_blocks
        column_block = tile // token_blocks if COLUMNS_FIRST else tile % column_blocks
        t = token_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        c = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_batch, in_row = t < length, c < WIDTH

        token = tl.load(tokens + t, mask=in_batch, other=-1).to(tl.int64)
        known = (token >= 0) & (token < vocabulary)
        adapted = known & (token != padding)

        # W first: it is nearly all of the bytes, and is on its way while A is fetched and multiplied
        w = tl.load(W + token[:, None] * W_STRIDE + c, mask=known[:, None] & in_row, other=0.0)
        update = tl.zeros((BLOCK_T, BLOCK_D), SUM)
        for start in range(0, RANK, BLOCK_R):
            k = start + tl.arange(0, BLOCK_R)
            in_rank = k < RANK
            a = tl.load(A + token[:, None] * A_STRIDE + k, mask=adapted[:, None] & in_rank, other=0.0)
            b = tl.load(
                B + c * RANK + k[:, None],
                mask=in_rank[:, None] & in_row,
                other=0.0,
                eviction_policy="evict_last" if HINTS else "",
            )
            update = tl.dot(a.to(FACTOR), b.to(FACTOR), update, input_precision="ieee", out_dtype=SUM)

        row = w.to(SUM) + tl.full((1, 1), scaling, SUM) * update
        row = tl.where(known[:, None], row, float("nan"))
        tl.store(
            out + t[:, None] * WIDTH + c,
            row.to(out.dtype.element_ty),
            mask=in_batch[:, None] & in_row,
            eviction_policy="evict_first" if HINTS else "",
        )


@triton.jit(do_not_specialize=["length", "vocabulary", "padding", "blocks_each"])
def backward_kernel(
    tokens,  # (T,)
    G,  # (T, d), the gradient of out
    A,  # (V, r), rows A_STRIDE apart
    B,  # (d, r)
    dA_rows,  # (T, r), zero, to add to; (column blocks, T, r) of anything if DETERMINISTIC
    dB,  # (d, r), zero, to add to; (shares, d, r) of anything if DETERMINISTIC
    length,  # T
    vocabulary,  # V
    padding,  # the padding token, -1 if there is none
    blocks_each,  # token blocks in a share
    scaling: tl.float64,
    WIDTH: tl.constexpr,  # d
    RANK: tl.constexpr,  # r
    A_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    HINTS: tl.constexpr,
):
    """A program walks down BLOCK_D columns of G, over its share of the tokens. Each number of G is read once.

    The columns' rows of B are loaded before the walk and their gradient is summed in registers until its end;
    each block of tokens adds s · G B over these columns to its rows. HINTS to the cache: G passes through.

    The rows are added to by d / BLOCK_D programs each, four numbers at once (sm_90), in the cache: at T = 65 536 and
    r = 16 they are 4 MB. DETERMINISTIC is the other scheme, in two passes: with 16 column blocks at d = 4096 it writes
    and reads 134 MB more, a quarter of G. (To own tokens and walk over columns would add to dB from every block of
    tokens instead: at BLOCK_T = 64 three and a half times as many additions.)
    """
    s = tl.full((1, 1), scaling, SUM)
    column_blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK_D)
    program = tl.program_id(0)
    share, column_block = program // column_blocks, program % column_blocks
    c = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    in_row, in_rank = c < WIDTH, k < RANK
    place_in_B, in_B = c[:, None] * RANK + k, in_row[:, None] & in_rank
    b = tl.load(B + place_in_B, mask=in_B, other=0.0).to(FACTOR)
    dB_sum = tl.zeros((BLOCK_D, BLOCK_R), SUM)

    first = share * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(length, BLOCK_T))):
        t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_batch = t < length
        token = tl.load(tokens + t, mask=in_batch, other=-1).to(tl.int64)
        adapted = (token >= 0) & (token < vocabulary) & (token != padding)
        a = tl.load(A + token[:, None] * A_STRIDE + k, mask=adapted[:, None] & in_rank, other=0.0)
        g = tl.load(
            G + t[:, None] * WIDTH + c,
            mask=in_batch[:, None] & in_row,
            other=0.0,
            eviction_policy="evict_first" if HINTS else "",
        ).to(FACTOR)
        rows = s * tl.dot(g, b, input_precision="ieee", out_dtype=SUM)
        # tl.trans moves nothing: the tensor cores read G's tile in shared memory either way round (wgmma)
        dB_sum = tl.dot(tl.trans(g), a.to(FACTOR), dB_sum, input_precision="ieee", out_dtype=SUM)
        place_in_A, in_A = t[:, None] * RANK + k, adapted[:, None] & in_rank
        if DETERMINISTIC:
            slab = tl.cast(column_block, tl.int64) * length * RANK
            tl.store(dA_rows + slab + place_in_A, tl.where(in_A, rows, 0.0), mask=in_batch[:, None] & in_rank)
        else:
            tl.atomic_add(dA_rows + place_in_A, rows, mask=in_A, sem="relaxed")

    if DETERMINISTIC:
        tl.store(dB + tl.cast(share, tl.int64) * WIDTH * RANK + place_in_B, s * dB_sum, mask=in_B)
    else:
        tl.atomic_add(dB + place_in_B, s * dB_sum, mask=in_B, sem="relaxed")


# From tensors to kernels

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Blocks(NamedTuple):
    """A program's tile: tokens × columns, numbers of the rank at a time; warps at work, loads on their way.

    `programs`: how many run for each of a GPU's multiprocessors, each with its share of the work; 0 (forward only):
    as many as there are tiles. `columns_first` (forward only) and `hints`: see the kernels.
    """

    tokens: int
    columns: int
    rank: int
    warps: int
    stages: int
    programs: int = 0
    columns_first: bool = False
    hints: bool = False


# Tiles that a search on a card found best, and where: (kernel, bytes a number, r, d, T) → Blocks. Written by
# `python tools/on_a_gpu.py --apply`; used on cards of the same compute capability. Empty: none has been measured yet.
MEASURED_ON: dict[str, object] = {}
MEASURED: dict[tuple[str, int, int, int, int], Blocks] = {}


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
        return Blocks(64 if block_r <= 32 else 32, columns, block_r, 8, 3, programs=4)
    return Blocks(128 // dtype.itemsize, columns, block_r, 8, 3 if dtype.itemsize == 4 else 2, programs=4)


def at_most(largest: int, needed: int) -> int:
    """The smallest power of two that holds `needed`, from 16, the least that tl.dot multiplies, to `largest`.

    So r = 8 multiplies 8 columns of zeros. They are masked, not read, and at d = 4096 the product takes less than a
    thirtieth of the time that the bytes take (an H100, by its published figures).
    """
    return max(16, min(largest, triton.next_power_of_2(needed)))


class Card(NamedTuple):
    capability: tuple[int, int]
    processors: int


@functools.cache
def card(device: torch.device) -> Card:
    """What decides the tiles and the number of programs; a CPU stands for one multiprocessor of no kind."""
    if device.type != "cuda":
        return Card((0, 0), 1)
    found = torch.cuda.get_device_properties(device)
    return Card((found.major, found.minor), found.multi_processor_count)


def blocks_for(kernel: str, width: int, rank: int, dtype: torch.dtype, length: int, where: Card) -> Blocks:
    """The tile for T = `length` tokens: the measured one of the nearest r, d and T, else by rule.

    kernel: "forward" or "backward"; dtype: what it multiplies in.
    """
    if where.capability == MEASURED_ON.get("capability"):
        found = nearest(kernel, dtype.itemsize, rank, width, triton.next_power_of_2(length))
        if found:
            return found
    return (forward_blocks if kernel == "forward" else backward_blocks)(width, rank, dtype)


@functools.cache
def nearest(kernel: str, itemsize: int, rank: int, width: int, length: int) -> Blocks | None:
    """The measured tile whose r, d and T are the fewest doublings away, of those that pad r to the same number."""
    alike = lambda key: key[:2] == (kernel, itemsize) and at_most(256, key[2]) == at_most(256, rank)
    away = lambda key: sum(
        abs(math.log2(x / max(1, y))) for x, y in zip(key[2:], (rank, width, length), strict=True)
    )
    return MEASURED[min(filter(alike, MEASURED), key=away)] if any(map(alike, MEASURED)) else None


def interpreted() -> bool:
    """Whether Triton runs these kernels in NumPy, as TRITON_INTERPRET was set when it was imported."""
    return not isinstance(forward_kernel, triton.JITFunction)


def constants(rank: int, blocks: Blocks, factor: torch.dtype, total: torch.dtype) -> dict:
    """What is compiled into both kernels; the interpreter multiplies in the sum's dtype: NumPy has no bfloat16."""
    return {
        "RANK": rank,
        "BLOCK_T": blocks.tokens,
        "BLOCK_D": blocks.columns,
        "BLOCK_R": blocks.rank,
        "FACTOR": TRITON_DTYPES[total if interpreted() else factor],
        "SUM": TRITON_DTYPES[total],
        "HINTS": blocks.hints,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,
    }


def launch(kernel, programs: int, **arguments) -> None:
    """Runs `programs` of the kernel on the current device; the one place that does."""
    kernel[(programs,)](**arguments)


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

    A token outside the vocabulary reads nothing: its row of out is NaN. Shapes as lora_embedding's. One launch, if
    tokens and lora_B are contiguous.
    """
    width, rank = lora_B.shape
    out = weight.new_empty((*tokens.shape, width))
    length, total = tokens.numel(), sum_dtype(weight, lora_A)
    factor = (
        total if total == torch.float64 else lora_A.dtype
    )  # a product is not summed in a wider dtype than its own
    if length:
        where = card(out.device)
        blocks = blocks or blocks_for("forward", width, rank, factor, length, where)
        tiles = triton.cdiv(length, blocks.tokens) * triton.cdiv(width, blocks.columns)
        with torch.cuda.device_of(out):
            launch(
                forward_kernel,
                min(tiles, blocks.programs * where.processors) if blocks.programs else tiles,
                tokens=tokens.contiguous(),
                W=weight,
                A=lora_A,
                B=lora_B.contiguous(),
                out=out,
                length=length,
                vocabulary=weight.shape[0],
                padding=padding,
                scaling=scaling,
                WIDTH=width,
                W_STRIDE=weight.stride(0),
                A_STRIDE=lora_A.stride(0),
                COLUMNS_FIRST=blocks.columns_first,
                PERSISTENT=blocks.programs > 0,
                STAGES=blocks.stages,
                **constants(rank, blocks, factor, total),
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
    length, total, where = tokens.numel(), sum_dtype(G, lora_A), card(G.device)
    factor = torch.promote_types(G.dtype, lora_A.dtype)
    blocks = blocks or blocks_for("backward", width, rank, factor, length, where)
    column_blocks, token_blocks = triton.cdiv(width, blocks.columns), triton.cdiv(length, blocks.tokens)
    shares = max(1, min(token_blocks, triton.cdiv(blocks.programs * where.processors, column_blocks)))
    blocks_each = triton.cdiv(token_blocks, shares)
    shares = triton.cdiv(token_blocks, blocks_each) if length else 0
    rows, dB = room(G, column_blocks, shares, length, (width, rank), total, deterministic)
    if length:
        with torch.cuda.device_of(G):
            launch(
                backward_kernel,
                shares * column_blocks,
                tokens=tokens.contiguous(),
                G=G.contiguous(),
                A=lora_A,
                B=lora_B.contiguous(),
                dA_rows=rows,
                dB=dB,
                length=length,
                vocabulary=lora_A.shape[0],
                padding=padding,
                blocks_each=blocks_each,
                scaling=scaling,
                WIDTH=width,
                A_STRIDE=lora_A.stride(0),
                DETERMINISTIC=deterministic,
                **constants(rank, blocks, factor, total),
            )
    if deterministic:
        return rows.sum(0).to(lora_A.dtype), dB.sum(0).to(lora_B.dtype)
    return rows[0].to(lora_A.dtype), dB[0].to(
        lora_B.dtype, copy=True
    )  # else it would keep the rows in memory


def room(
    like: Tensor,
    column_blocks: int,
    shares: int,
    length: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Where the backward kernel puts A's rows, (·, T, r), and B's gradient, (·, d, r).

    Zeros to add to, in one piece: one launch fills both. If `deterministic` every number is written, once: no zeros.
    """
    width, rank = shape
    if deterministic:
        return tuple(
            like.new_empty((pieces, side, rank), dtype=dtype)
            for pieces, side in ((column_blocks, length), (shares, width))
        )
    begin = triton.cdiv(width * rank, 16) * 16  # so that the rows, too, begin at a multiple of 16 bytes
    both = like.new_zeros(begin + length * rank, dtype=dtype)
    return both[begin:].view(1, length, rank), both[: width * rank].view(1, width, rank)


# With gradients: as operators of PyTorch's, which torch.compile takes whole, and as a function for every other call


def embed(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding: int,
    scale_grad_by_freq: bool,
    deterministic: bool,
    sparse: bool,
) -> Tensor:
    """The look-up with its gradient; `sparse` is not for torch.compile.

    An operator's way through PyTorch's dispatcher takes a CPU several times as long as a function's, and at 4096 tokens
    longer than a GPU needs for the work: so it is for the compiler only, which can't look into the kernels.
    """
    inputs = (tokens, weight, lora_A, lora_B, scaling, padding, scale_grad_by_freq, deterministic)
    return embedding_op(*inputs) if torch.compiler.is_compiling() else Embedding.apply(*inputs, sparse)


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


def scatter(rows: Tensor, tokens: Tensor, lora_A: Tensor) -> Tensor:
    """The rows of dA as a sparse (V, r) tensor that holds one for each place, repeats too."""
    places = tokens.flatten().clamp(0, lora_A.shape[0] - 1).long()
    return torch.sparse_coo_tensor(places[None], rows, lora_A.shape, check_invariants=False)


def keep(ctx, inputs, output) -> None:
    tokens, _, lora_A, lora_B, *ctx.options = inputs
    ctx.save_for_backward(tokens, lora_A, lora_B)


def backward(ctx, G: Tensor) -> tuple:
    dA, dB = embedding_backward_op(G, *ctx.saved_tensors, *ctx.options)
    return None, None, dA, dB, None, None, None, None


embedding_op.register_autograd(backward, setup_context=keep)


class Embedding(torch.autograd.Function):
    """The same as embedding_op, and with `sparse`, the last input, a sparse gradient of A."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        keep(ctx, inputs, None)
        return look_up(*inputs[:6])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G: Tensor) -> tuple:
        tokens, lora_A, lora_B = ctx.saved_tensors
        scaling, padding, by_frequency, deterministic, sparse = ctx.options
        rows, dB = gradients(G, tokens, lora_A, lora_B, scaling, padding, deterministic)
        vocabulary = lora_A.shape[0]
        dense = lambda: gather(rows, tokens, vocabulary, padding, by_frequency)
        dA = scatter(rows, tokens, lora_A) if sparse else dense()
        return None, None, dA, dB, None, None, None, None, None
