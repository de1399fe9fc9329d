"""Four bits a number: NF4 with double quantisation, and the 4-bit blocks of GGUF files, as the frozen W of a layer.

Not for LoRA on top (layers.py) nor for whole models (quantised_models.py). No library is needed: bitsandbytes and gguf
are what tests compare with, code for code.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.text import format_bytes

# QLoRA (Dettmers et al. 2023), appendix E, in float32; `normal_levels` derives them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
LEVELS = {
    "nf4": NF4,
    "q4_0": tuple(range(-8, 8)),
    "q4_1": tuple(range(16)),
}  # a code's value before its scale
BLOCKS = tuple(2**power for power in range(5, 13))  # bitsandbytes' sizes for NF4
GGUF_BLOCK = 32
SECOND_BLOCK = 256  # scales that share one scale of their own (QLoRA, section 3)
NUMBERS_AT_ONCE = 2**18  # decoded at a time: 1 MB in float32


class Quantised(NamedTuple):
    """A matrix W (rows, columns) in four bits a number: W = levels[code] · scale, + minimum where there is one.

    A scale belongs to a block of `block` numbers that follow each other in W, row after row.

    format: "nf4", "q4_0" or "q4_1". codes: (blocks · block / 2,) uint8, two a byte, the first in the high half; after
    the last number of W there are codes of 0. scales: (blocks,) float32 (NF4) or float16 (GGUF), or uint8 where they
    are quantised themselves: then second_scales, (blocks / 256 rounded up,) float32, and mean_scale, () float32, lead
    back to them. minima: (blocks,) float16, of q4_1.
    """

    format: str
    shape: tuple[int, int]
    block: int
    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    second_scales: Tensor | None = None
    mean_scale: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        fields = ("codes", "scales", "minima", "second_scales", "mean_scale")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits a number of W, all included: NF4 4.5 in blocks of 64, 4.127 with double quantisation; Q4_1 5."""
        return 8 * self.nbytes / math.prod(self.shape)


def normal_levels(offset: float = 0.9677083) -> Tensor:
    """NF4's sixteen levels from the normal quantiles (QLoRA, section 3 and appendix E): (16,) float32.

    Eight quantiles of N(0, 1) above 0 and seven below, evenly spaced in probability between `offset` and one half,
    divided by the largest; 0 itself is a level. The offset is 1 − (1/30 + 1/32) / 2 to seven digits, and the
    probabilities are rounded to float32, as they were when the published levels were made.
    """
    above, below = (torch.linspace(offset, 0.5, count)[:-1].double() for count in (9, 8))
    quantiles = (-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0))
    levels = torch.cat([each.float() for each in quantiles])
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """The 256 levels in [−1, 1] of the dynamic 8-bit type (Dettmers 2015, arXiv 1511.04561): (256,) float32, sorted.

    Seven decades; decade i, from 10^(i−7) to 10^(i−6), has 2^i levels of either sign, in the middles of 2^i equal
    parts of [0.1, 1]. 0 and 1 are levels, too.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


# ---- quantising --------------------------------------------------------------------------------------------


def quantise_nf4(weight: Tensor, block: int = 64, double: bool = True) -> Quantised:
    """W in NF4: each block divided by its largest magnitude, each number then the nearest of sixteen levels.

    weight: (rows, columns), any floating dtype; the codes are those of its float32 values. `double` quantises the
    scales to eight bits, less their mean, in blocks of 256 (QLoRA, section 3). The last block is filled up with zeros,
    which change no scale. A tensor without data (meta) gives tensors without data. Codes, scales and the numbers they
    lead back to are those of bitsandbytes.

    Raises TypeError for a weight that is no floating point, ValueError for one that is no matrix, has no number, or
    has an entry that is infinite or NaN, and for another size of block than 32, 64, …, 4096.
    """
    _check(weight)
    if block not in BLOCKS:
        raise ValueError(f"block must be a power of two from {BLOCKS[0]} to {BLOCKS[-1]}; got {block!r}")
    numbers = _in_blocks(weight, block)
    absmax = numbers.abs().amax(1)
    inside = (numbers * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = _pack(nearest(inside, numbers.new_tensor(NF4)))
    shape = tuple(weight.shape)
    if not double:
        return Quantised("nf4", shape, block, codes, absmax)
    mean = absmax.mean()
    centred = F.pad(absmax - mean, (0, -len(absmax) % SECOND_BLOCK)).view(-1, SECOND_BLOCK)
    second = centred.abs().amax(1)
    levels = dynamic_levels().to(weight.device)
    scales = nearest((centred * (1 / second.clamp(min=1e-38))[:, None]).clamp(-1, 1), levels)
    return Quantised("nf4", shape, block, codes, scales.flatten()[: len(absmax)], None, second, mean)


def quantise_gguf(weight: Tensor, format: str = "q4_1") -> Quantised:
    """W in GGUF's 4-bit blocks of 32, as the `gguf` package rounds: W = d (q − 8) ("q4_0") or d q + m ("q4_1").

    weight: (rows, columns), columns a multiple of 32, any floating dtype. d and m are float16; q goes from 0 to 15.
    Raises what `quantise_nf4` raises, and ValueError for other columns, another format, or a d beyond float16.
    """
    _check(weight)
    if format not in ("q4_0", "q4_1"):
        raise ValueError(f'GGUF\'s formats here are "q4_0" and "q4_1"; got {format!r}')
    _check_columns(weight.shape, format)
    numbers = _in_blocks(weight, GGUF_BLOCK)
    if format == "q4_0":
        largest = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))
        minima, d = None, largest / -8
        codes = numbers * _inverse(d) + 8.5
    else:
        minima = numbers.amin(1, keepdim=True)
        d = (numbers.amax(1, keepdim=True) - minima) / 15
        codes = (numbers - minima) * _inverse(d) + 0.5
        minima = _half(minima.flatten(), "minimum")
    packed = _pack(codes.trunc().clamp(0, 15).to(torch.uint8))
    return Quantised(format, tuple(weight.shape), GGUF_BLOCK, packed, _half(d.flatten(), "scale"), minima)


def quantise(weight: Tensor, format: str = "nf4", block: int = 64, double: bool = True) -> Quantised:
    """W in NF4 (`quantise_nf4`) or in GGUF's "q4_0" or "q4_1" (`quantise_gguf`, which has blocks of its own)."""
    if format not in LEVELS:
        raise ValueError(f"format must be one of {', '.join(LEVELS)}; got {format!r}")
    return quantise_nf4(weight, block, double) if format == "nf4" else quantise_gguf(weight, format)


def quantise_like(weight: Tensor, other: Quantised) -> Quantised:
    """W in the format and the blocks of `other`."""
    return quantise(weight, other.format, other.block, other.second_scales is not None)


def from_gguf(blocks: Tensor, shape: tuple[int, int], format: str) -> Quantised:
    """The 4-bit blocks of a GGUF file, none of them changed: they are only laid out anew.

    blocks: uint8, rows · columns / 32 blocks of 18 bytes (q4_0: d in float16, then 16 bytes of codes) or 20 (q4_1: d,
    m, codes), in any shape of so many bytes. Byte j of a block's codes holds number j in its low half, number j + 16
    in its high half.
    Raises ValueError for another number of bytes, columns that are no multiple of 32, or another format.
    """
    if format not in ("q4_0", "q4_1"):
        raise ValueError(f'blocks of four bits are "q4_0" or "q4_1"; got {format!r}')
    rows, columns = shape
    _check_columns(shape, format)
    head = 2 if format == "q4_0" else 4
    size = rows * columns // GGUF_BLOCK * (head + 16)
    if blocks.dtype != torch.uint8 or blocks.numel() != size:
        raise ValueError(
            f"{rows} × {columns} numbers in {format} are {size} bytes (uint8); got {blocks.numel()} of {blocks.dtype}"
        )
    blocks = blocks.reshape(-1, head + 16)
    numbers = blocks[:, :head].contiguous().view(torch.float16)
    halves = blocks[:, head:]
    codes = _pack(torch.cat([halves & 15, halves >> 4], 1))
    minima = numbers[:, 1].clone() if format == "q4_1" else None
    return Quantised(format, (rows, columns), GGUF_BLOCK, codes, numbers[:, 0].clone(), minima)


def to_gguf(weight: Quantised) -> Tensor:
    """The blocks as a GGUF file holds them: (blocks, 18) for q4_0, (blocks, 20) for q4_1, uint8."""
    _check_columns(weight.shape, weight.format)
    codes = _unpack(weight.codes).view(-1, GGUF_BLOCK)
    numbers = [each for each in (weight.scales, weight.minima) if each is not None]
    return torch.cat(
        [torch.stack(numbers, 1).view(torch.uint8), codes[:, :16] | codes[:, 16:] << 4],
        1,
    )


def rows_in_order(weight: Quantised, order: Tensor) -> Quantised:
    """The same rows in another order, none decoded: row i is the old row order[i].

    Raises ValueError where a block holds numbers of two rows.
    """
    rows, columns = weight.shape
    if columns % weight.block or weight.second_scales is not None:
        raise ValueError(
            f"rows can only change places where each has blocks and scales of its own; these have {columns} numbers, "
            f"in blocks of {weight.block}"
        )
    moved = {name: each.view(rows, -1)[order].flatten() for name, each in weight.tensors.items()}
    return weight._replace(**moved)


# ---- and back ----------------------------------------------------------------------------------------------


def dequantise(weight: Quantised) -> Tensor:
    """All of W: (rows, columns) float32, which is eight times as large as what is stored, or nearly."""
    return _decode(weight, 0, weight.shape[0], first_scales(weight))


def relative_error(weight: Tensor, quantised: Quantised) -> float:
    """‖W − decoded‖_F / ‖W‖_F, 0 where W is zero; W is compared a few rows at a time."""
    scales, off, whole = first_scales(quantised), 0.0, 0.0
    for start, stop in pieces(quantised):
        rows = weight[start:stop].detach().double()
        off += float((rows - _decode(quantised, start, stop, scales)).square().sum())
        whole += float(rows.square().sum())
    return math.sqrt(off / whole) if whole else 0.0


def first_scales(weight: Quantised) -> Tensor:
    """The scale of each block, (blocks,) float32, decoded where scales are quantised themselves."""
    if weight.second_scales is None:
        return weight.scales.float()
    levels = dynamic_levels().to(weight.scales.device)
    second = weight.second_scales.repeat_interleave(SECOND_BLOCK)[: len(weight.scales)]
    return levels[weight.scales.int()] * second + weight.mean_scale


def pieces(weight: Quantised) -> list[tuple[int, int]]:
    """(first row, row after the last) of pieces to decode one by one: NUMBERS_AT_ONCE at most, or else the fewest rows
    with which a block ends, as no block lies in two pieces."""
    rows, columns = weight.shape
    together = weight.block // math.gcd(weight.block, columns)  # rows after which a block ends with the row
    step = max(NUMBERS_AT_ONCE // (columns * together), 1) * together
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _decode(weight: Quantised, start: int, stop: int, scales: Tensor) -> Tensor:
    """Rows `start` to `stop`, (rows, columns) float32; `start` begins a block."""
    columns, block = weight.shape[1], weight.block
    first, last = start * columns // block, -(-stop * columns // block)
    levels = torch.tensor(LEVELS[weight.format], dtype=torch.float32, device=scales.device)
    # One look-up for both numbers of a byte: a pair of float32 travels as one int64.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64).flatten()
    packed = weight.codes[first * block // 2 : last * block // 2].int()
    numbers = pairs.index_select(0, packed).view(torch.float32).view(-1, block)
    numbers.mul_(scales[first:last, None])
    if weight.minima is not None:
        numbers.add_(weight.minima[first:last, None].float())
    return numbers.flatten()[: (stop - start) * columns].view(-1, columns)


class _Product(torch.autograd.Function):
    """x Wᵀ, and grad W on the way back, each with W decoded a piece at a time: forward keeps the codes, not W."""

    @staticmethod
    def forward(ctx, x, about, names, *tensors):
        weight = Quantised(*about, **dict(zip(names, tensors, strict=True)))
        ctx.save_for_backward(*tensors)
        ctx.about, ctx.names = about, names
        flat, scales = x.reshape(-1, x.shape[-1]), first_scales(weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = out.view(len(flat), weight.shape[0])
        for start, stop in pieces(weight):
            rows[:, start:stop] = flat @ _decode(weight, start, stop, scales).to(x.dtype).T
        return out

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.needs_input_grad[0]:
            return (None,) * (3 + len(ctx.names))
        weight = Quantised(*ctx.about, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        flat, scales = gradient.reshape(-1, weight.shape[0]), first_scales(weight)
        into = gradient.new_zeros(len(flat), weight.shape[1])
        for start, stop in pieces(weight):
            into.addmm_(flat[:, start:stop], _decode(weight, start, stop, scales).to(gradient.dtype))
        return into.view(*gradient.shape[:-1], weight.shape[1]), *(None,) * (2 + len(ctx.names))


def quantised_linear(x: Tensor, weight: Quantised, bias: Tensor | None = None) -> Tensor:
    """h = W x + b with a frozen W of four bits: (..., columns) → (..., rows), in x's dtype.

    W is decoded a few rows at a time, forwards and again backwards, and never stands as a whole; nothing of it is kept
    for the backward pass but the codes that are there anyway. bias: (rows,). Under autocast as F.linear.
    Raises TypeError for an x that is no floating point, ValueError for one of another width.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point; got {x.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have {weight.shape[1]} numbers in a row; got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tensors = weight.tensors
    out = _Product.apply(x, weight[:3], tuple(tensors), *tensors.values())
    return out if bias is None else out.add_(bias)


class QuantisedLinear(nn.Module):
    """h = W x + b with W frozen in four bits; in place of nn.Linear, for inference and under LoRA.

    x: (..., in) → (..., out). The buffers are those of `Quantised`, so `state_dict` holds them (safetensors stores
    them) and loading needs a layer of the same shape and format: `QuantisedLinear(in, out, …)` is one, of zeros.
    `.to(dtype)` and `.half()` change `dtype`, the bias, and the dtype that LoRA's factors will have, never W. There is
    no attribute `weight`: `dequantise(layer.quantised)` is the whole of W as numbers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "nf4",
        block: int = 64,
        double: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        room = torch.empty(out_features, in_features, device="meta")
        empty = quantise(room, format, block, double)
        made = lambda each: torch.zeros(each.shape, dtype=each.dtype, device=device)
        self._take(empty._replace(**{name: made(each) for name, each in empty.tensors.items()}))
        like = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("_like", like, persistent=False)
        self.bias = nn.Parameter(like.new_zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_quantised(
        cls, weight: Quantised, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> "QuantisedLinear":
        """A layer on these very tensors. bias: (rows,), or a Parameter, which is shared."""
        rows, columns = weight.shape
        if bias is not None and bias.shape != (rows,):
            raise ValueError(
                f"the bias of a {rows} × {columns} weight has {rows} numbers; got {tuple(bias.shape)}"
            )
        layer = cls(columns, rows, bias is not None, device="meta", dtype=dtype)
        layer._take(weight)
        layer._like = torch.empty(0, device=weight.codes.device, dtype=dtype)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def from_layer(
        cls, layer: nn.Linear, format: str = "nf4", block: int = 64, double: bool = True
    ) -> "QuantisedLinear":
        """An nn.Linear quantised; its bias is shared. Raises what `quantise_nf4` and `quantise_gguf` raise."""
        quantised = quantise(layer.weight, format, block, double)
        return cls.from_quantised(quantised, layer.bias, layer.weight.dtype).train(layer.training)

    @property
    def quantised(self) -> Quantised:
        """W as it is stored."""
        return Quantised(*self._about, **{name: self._buffers[name] for name in self._stored})

    @property
    def dtype(self) -> torch.dtype:
        """What the layer stands for: the dtype of the weight that was quantised, or the last `.to(dtype)`."""
        return self._like.dtype

    def forward(self, x: Tensor) -> Tensor:
        return quantised_linear(x, self.quantised, self.bias)

    def extra_repr(self) -> str:
        quantised = self.quantised
        kind = f"{quantised.format}, {quantised.bits:.3f} bits a number, {format_bytes(quantised.nbytes)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def take(self, other: "QuantisedLinear") -> None:
        """Make the other's W, bias and dtype this layer's: the tensors are shared."""
        self._take(other.quantised)
        self._like, self.bias = other._like, other.bias

    def _take(self, weight: Quantised) -> None:
        for name in getattr(self, "_stored", ()):
            delattr(self, name)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        self._about, self._stored = weight[:3], tuple(weight.tensors)
        self.out_features, self.in_features = weight.shape

    def _apply(self, change, *options, **named):
        """As torch's, but scales keep their dtype: a model turned to bfloat16 has the same W."""
        before = {name: each for name, each in self._buffers.items() if each is not None and name != "_like"}
        super()._apply(change, *options, **named)
        for name, each in before.items():
            after = self._buffers[name]
            if after.dtype != each.dtype:
                self._buffers[name] = each.to(after.device)
        return self


def weight_like(layer: nn.Module) -> Tensor:
    """A tensor of the weight's device and dtype: the weight, or an empty one where that is quantised."""
    quantised = isinstance(layer, QuantisedLinear)
    return torch.empty(0, dtype=layer.dtype, device=layer.codes.device) if quantised else layer.weight


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the layer's weight, quantised or not."""
    return layer.quantised.shape if isinstance(layer, QuantisedLinear) else tuple(layer.weight.shape)


# ---- helpers -----------------------------------------------------------------------------------------------


def nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest level, uint8; of two as near, the lower one. levels: sorted, (levels,)."""
    return torch.bucketize(numbers, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _check(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"only a tensor of floating point can be quantised; got {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"a weight must be a matrix (rows, columns) of at least one number; got the shape {tuple(weight.shape)}"
        )
    if not weight.is_meta and not (finite := torch.isfinite(weight.float())).all():
        raise ValueError(
            f"every number must be finite in float32 to have a nearest level; {int((~finite).sum())} of "
            f"{weight.numel()} are not. Mend the weight first"
        )


def _check_columns(shape: tuple[int, ...], format: str) -> None:
    if format not in ("q4_0", "q4_1") or shape[1] % GGUF_BLOCK or not shape[1]:
        raise ValueError(
            f"GGUF's blocks are {GGUF_BLOCK} numbers of one row, so columns must be a multiple of {GGUF_BLOCK}; got "
            f"{shape[0]} × {shape[1]} in {format}. NF4 takes any shape: it fills up the last block with zeros"
        )


def _in_blocks(weight: Tensor, block: int) -> Tensor:
    """(blocks, block) float32, filled up with zeros."""
    flat = weight.detach().reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _half(numbers: Tensor, what: str) -> Tensor:
    half = numbers.half()
    if not half.is_meta and not torch.isfinite(half).all():
        raise ValueError(
            f"a {what} of GGUF's blocks is float16, at most 65504; this weight needs {float(numbers.abs().max()):.3g}"
        )
    return half


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half."""
    return (codes.flatten()[::2] << 4) | codes.flatten()[1::2]


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).flatten()
