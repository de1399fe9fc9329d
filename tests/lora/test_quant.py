"""Four bits a number: codes equal to bitsandbytes' and gguf's, products equal to the decoded weight's, never whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu.lora import QuantisedLinear, dequantise, quant, quantise_gguf, quantise_nf4, quantised_linear
from lora_edu.lora.quant import (
    NF4,
    dynamic_levels,
    from_gguf,
    normal_levels,
    quantise,
    relative_error,
    to_gguf,
)

FORMATS = ("nf4", "q4_0", "q4_1")


def matrix(rows, columns, seed=0, dtype=torch.float32):
    """Normal numbers, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator)
    return (numbers * torch.rand(rows, 1, generator=generator)).to(dtype)


# ---- the formats -------------------------------------------------------------------------------------------


def test_the_levels_follow_from_the_normal_quantiles():
    assert torch.allclose(normal_levels(), torch.tensor(NF4), rtol=0, atol=3e-7)
    assert sorted(NF4) == list(NF4) and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1


def test_the_dynamic_levels_are_256_sorted_and_finer_towards_zero():
    levels = dynamic_levels()
    assert len(levels) == 256 == len(levels.unique()) and levels[-1] == 1 and (levels == 0).sum() == 1
    assert levels[0] == pytest.approx(-0.993, abs=1e-3) and levels[levels > 0].min() < 1e-6


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (lambda W: quantise_nf4(W), 4 + 8 / 64 + 32 / (64 * 256)),
        (lambda W: quantise_nf4(W, double=False), 4.5),
        (lambda W: quantise_nf4(W, 128, double=False), 4.25),
        (lambda W: quantise_gguf(W, "q4_0"), 4.5),
        (lambda W: quantise_gguf(W, "q4_1"), 5.0),
    ],
)
def test_bits_a_number(make, bits):
    quantised = make(matrix(256, 256))
    assert quantised.bits == pytest.approx(bits, abs=6e-4)  # the mean scale is four bytes more
    stored = sum(each.numel() * each.element_size() for each in quantised.tensors.values())
    assert quantised.nbytes == stored


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 200), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 99)
)
def test_every_number_goes_to_a_nearest_level_of_its_block(rows, columns, block, double, seed):
    W = matrix(rows, columns, seed)
    quantised = quantise_nf4(W, block, double)
    decoded = dequantise(quantised)
    assert decoded.shape == W.shape
    scales = quant.first_scales(quantised).repeat_interleave(block)[: W.numel()].view_as(W)
    exact = F.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block).abs().amax(1)
    if not double:
        assert torch.equal(quant.first_scales(quantised), exact)
        off = (W[..., None] - scales[..., None] * torch.tensor(NF4)).abs().amin(-1)
        assert torch.allclose((W - decoded).abs(), off, atol=1e-6)
    else:  # a block's scale is off by at most half a step of the coarsest decade
        assert (quant.first_scales(quantised) - exact).abs().max() <= 0.0071 * exact.max() + 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_on_the_levels_comes_back_bit_for_bit(format):
    decoded = dequantise(quantise(matrix(24, 96), format, double=False))
    again = dequantise(quantise(decoded, format, double=False))
    assert torch.allclose(
        again, decoded, rtol=2e-3 if format != "nf4" else 0, atol=1e-3 if format != "nf4" else 0
    )


def test_zero_and_constant_blocks():
    W = torch.zeros(4, 64)
    W[1], W[2] = 3.0, -2.0
    for format in FORMATS:
        for double in (False, True):
            decoded = dequantise(quantise(W, format, double=double))
            assert torch.allclose(decoded, W, atol=0.02), format


def test_what_each_format_loses_of_normal_numbers():
    """NF4 9 % of the norm in blocks of 64. Its levels are equally likely, not of the least error: Q4_0's lose less."""
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    errors = {format: relative_error(W, quantise(W, format)) for format in FORMATS}
    assert 0.088 < errors["nf4"] < 0.097
    assert errors["q4_1"] < errors["q4_0"] < relative_error(W, quantise_nf4(W, 32)) < errors["nf4"]
    assert relative_error(W, quantise_nf4(W)) == pytest.approx(
        float((W - dequantise(quantise_nf4(W))).norm() / W.norm()), rel=1e-5
    )


# ---- references --------------------------------------------------------------------------------------------

SHAPES = [(1536, 576), (100, 100), (7, 13), (3, 1000), (300, 333), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_codes_are_those_of_bitsandbytes(shape, block, dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here").functional
    W = matrix(*shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(W, blocksize=block, quant_type="nf4")
    quantised = quantise_nf4(W, block, double=False)
    packed, whole = packed.flatten(), W.numel() // 2
    assert torch.equal(packed[:whole], quantised.codes[:whole])
    assert W.numel() % 2 == 0 or packed[whole] >> 4 == quantised.codes[whole] >> 4
    assert torch.equal(state.absmax, quantised.scales)
    if shape[1] % 2 == 0:  # for an odd width bitsandbytes compiles its way back, which takes a minute
        assert torch.equal(bnb.dequantize_4bit(packed[:, None], state), dequantise(quantised).to(dtype))


@pytest.mark.parametrize("shape", [(1536, 576), (300, 333)])
def test_double_quantisation_is_that_of_bitsandbytes(shape):
    """Its CPU kernel takes the farther of two levels now and then, near the middle; ours is the nearer one there."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here").functional
    W = matrix(*shape)
    assert torch.equal(bnb.create_dynamic_map(), dynamic_levels())
    _, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    quantised = quantise_nf4(W)
    assert torch.equal(state.offset, quantised.mean_scale)
    assert torch.equal(state.state2.absmax, quantised.second_scales)
    exact, levels = quantise_nf4(W, double=False).scales - quantised.mean_scale, dynamic_levels()
    second = quantised.second_scales.repeat_interleave(256)[: len(exact)]
    other = state.absmax != quantised.scales
    assert other.float().mean() < 0.005
    ours, theirs = (
        (levels[each.int()] * second - exact).abs()[other] for each in (quantised.scales, state.absmax)
    )
    assert (ours <= theirs + 1e-6).all()
    # and its general rule, in float64, which takes the nearest: the same codes, all of them
    some = len(exact) // 256 * 256
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(exact[:some].double(), levels, 256)
    assert torch.equal(codes, quantised.scales[:some])


@pytest.mark.parametrize("format", ["q4_0", "q4_1"])
def test_gguf_s_blocks_are_those_of_gguf(format):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed here")
    kind = gguf.GGMLQuantizationType[format.upper()]
    W = matrix(50, 96)
    W[3, :32], W[4] = 0.0, 2.0
    raw = torch.from_numpy(gguf.quants.quantize(W.numpy(), kind))
    quantised = quantise_gguf(W, format)
    assert torch.equal(to_gguf(quantised).flatten(), raw.flatten())
    read = from_gguf(raw, (50, 96), format)
    assert all(torch.equal(each, quantised.tensors[name]) for name, each in read.tensors.items())
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)), dequantise(read))


@pytest.mark.parametrize("format", ["q4_0", "q4_1"])
def test_any_bytes_of_a_file_come_back_unchanged(format):
    size = 12 * 3 * (18 if format == "q4_0" else 20)
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = from_gguf(raw, (12, 96), format)
    assert torch.equal(to_gguf(read).flatten(), raw)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = to_gguf(quant.rows_in_order(read, order))
    assert torch.equal(moved.view(12, -1), raw.view(12, -1)[order])


# ---- the product -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 40),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([1, 100, 2**18]),
    st.booleans(),
)
def test_the_product_is_that_of_the_decoded_weight(format, rows, columns, double, at_once, bias):
    columns *= 32 if format != "nf4" else 13
    weight = quantise(matrix(rows, columns), format, double=double)
    x = torch.randn(3, 2, columns, dtype=torch.float64, requires_grad=True)
    b = torch.randn(rows, dtype=torch.float64) if bias else None
    expected = F.linear(x, dequantise(weight).double(), b)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    usual, quant.NUMBERS_AT_ONCE = quant.NUMBERS_AT_ONCE, at_once
    try:
        out = quantised_linear(x, weight, b)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    finally:
        quant.NUMBERS_AT_ONCE = usual
    assert torch.allclose(out, expected) and torch.allclose(gradient, wanted)


def test_gradients_of_first_and_second_order():
    weight = quantise_nf4(matrix(30, 20), 32)
    x = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)
    call = lambda x, bias: quantised_linear(x, weight, bias).square()
    assert torch.autograd.gradcheck(call, (x, bias)) and torch.autograd.gradgradcheck(call, (x, bias))


class Largest(TorchDispatchMode):
    """The most bytes that one tensor of any operation has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.most = max(self.most, each.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("format", FORMATS)
def test_a_float_copy_of_the_weight_never_stands_nor_is_kept(format):
    """W has 8 MB in float32; nothing made forwards or backwards is larger than its codes, and no float is kept."""
    layer = QuantisedLinear(2048, 1024, format=format)
    layer.take(QuantisedLinear.from_quantised(quantise(matrix(1024, 2048), format), layer.bias))
    x, kept = torch.randn(8, 2048, requires_grad=True), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        Largest() as made,
    ):
        layer(x).sum().backward()
    assert made.most <= 4 * quant.NUMBERS_AT_ONCE + 64 < 4 * 1024 * 2048 / 7
    assert all(each.numel() <= 1024 * 2048 / 32 for each in kept if each.is_floating_point())


def test_dtypes_and_autocast_as_in_a_float_layer():
    layer = nn.Linear(64, 48)
    quantised = QuantisedLinear.from_layer(layer)
    plain = nn.Linear(64, 48)
    plain.weight, plain.bias = nn.Parameter(dequantise(quantised.quantised)), layer.bias
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = quantised(x), plain(x)
    assert out.dtype == wanted.dtype == torch.bfloat16 and torch.allclose(out, wanted, atol=0.05)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    half = QuantisedLinear.from_layer(nn.Linear(64, 48).bfloat16())
    assert half.dtype == torch.bfloat16 and half(x.detach().bfloat16()).dtype == torch.bfloat16


# ---- the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_is_saved_and_loaded(format, tmp_path):
    layer = QuantisedLinear.from_layer(nn.Linear(96, 40), format)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    there = QuantisedLinear(96, 40, format=format)
    there.load_state_dict(state)
    x = torch.randn(3, 96)
    assert torch.equal(there(x), layer(x))
    meta = QuantisedLinear(96, 40, format=format, device="meta")
    meta.load_state_dict(state, assign=True)
    assert torch.equal(dequantise(meta.quantised), dequantise(layer.quantised))
    with pytest.raises(RuntimeError, match="size mismatch"):
        QuantisedLinear(64, 40, format=format).load_state_dict(state)


@pytest.mark.parametrize("format", FORMATS)
def test_another_dtype_leaves_the_weight_alone(format):
    layer = QuantisedLinear.from_layer(nn.Linear(96, 40), format)
    before = {name: each.clone() for name, each in layer.quantised.tensors.items()}
    for change in (layer.bfloat16, layer.double, layer.half):
        change()
        now = layer.quantised.tensors
        assert all(
            torch.equal(now[name], each) and now[name].dtype == each.dtype for name, each in before.items()
        )
    assert layer.dtype == torch.float16 == layer.bias.dtype


def test_a_layer_says_what_it_is():
    said = repr(QuantisedLinear.from_layer(nn.Linear(512, 512, bias=False)))
    assert said == (
        "QuantisedLinear(in_features=512, out_features=512, bias=False, nf4, 4.127 bits a number, 135 kB)"
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: quantise_nf4(torch.ones(4, 4, dtype=torch.int64)),
            TypeError,
            "floating point.*got torch.int64",
        ),
        (lambda: quantise_nf4([[1.0]]), TypeError, "floating point.*got list"),
        (lambda: quantise_nf4(torch.ones(4)), ValueError, r"a matrix .*got the shape \(4,\)"),
        (lambda: quantise_nf4(torch.ones(0, 4)), ValueError, r"at least one number; got the shape \(0, 4\)"),
        (lambda: quantise_nf4(torch.tensor([[1.0, math.nan]])), ValueError, "finite.*1 of 2 are not"),
        (lambda: quantise_nf4(torch.tensor([[1e300]]).double()), ValueError, "finite in float32"),
        (
            lambda: quantise_nf4(torch.ones(4, 4), block=48),
            ValueError,
            "a power of two from 32 to 4096; got 48",
        ),
        (
            lambda: quantise_gguf(torch.ones(4, 40)),
            ValueError,
            r"multiple of 32; got 4 × 40.*NF4 takes any shape",
        ),
        (lambda: quantise_gguf(torch.ones(4, 32), "q8_0"), ValueError, '"q4_0" and "q4_1"; got \'q8_0\''),
        (lambda: quantise_gguf(1e6 * torch.ones(4, 32)), ValueError, r"float16, at most 65504.*needs 1e\+06"),
        (lambda: quantise(torch.ones(4, 32), "fp4"), ValueError, "one of nf4, q4_0, q4_1; got 'fp4'"),
        (
            lambda: from_gguf(torch.zeros(10, dtype=torch.uint8), (4, 32), "q4_1"),
            ValueError,
            r"4 × 32 numbers in q4_1 are 80 bytes \(uint8\); got 10",
        ),
        (lambda: quant.rows_in_order(quantise_nf4(torch.ones(4, 32)), [0]), ValueError, "blocks of 64"),
        (lambda: QuantisedLinear(8, 8)(torch.ones(2, 7)), ValueError, r"8 numbers in a row; got \(2, 7\)"),
        (lambda: QuantisedLinear(8, 8)(torch.ones(2, 8).int()), TypeError, "x must be floating point"),
        (
            lambda: QuantisedLinear.from_quantised(quantise_nf4(torch.ones(4, 8)), torch.ones(8)),
            ValueError,
            r"4 × 8 weight has 4 numbers; got \(8,\)",
        ),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
