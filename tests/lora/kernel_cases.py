"""What the Triton kernels of the LoRA embedding must do, on a GPU or, with TRITON_INTERPRET=1, on any CPU.

Run by test_triton_kernels.py in a process of its own, as Triton reads that variable when it is imported.

    TRITON_INTERPRET=1 python tests/lora/kernel_cases.py 500

prints the worst errors of 500 random cases against float64. The interpreter keeps bfloat16 as bits that NumPy
can't multiply, so there the kernels multiply in the sum's dtype, and it cuts off where a GPU rounds: what the
GPU's own half-precision products give is left to a GPU.
"""

import random
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_edu.lora import LoRAEmbedding, functional, lora_embedding, pair_optimizers
from lora_edu.lora import triton_kernels as kernels

ON = "cpu" if kernels.interpreted() else "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
gpu = pytest.mark.skipif(ON == "cpu", reason="needs a CUDA device; this is the interpreter")


def configuration(draw: random.Random) -> dict:
    """A random look-up: shapes around the blocks' edges, dtypes, and all options."""
    vocabulary, dtype = draw.choice([1, 2, 9, 60]), draw.choice(DTYPES)
    return {
        "vocabulary": vocabulary,
        "width": draw.choice([1, 3, 16, 31, 64, 100, 130, 259]),
        "rank": draw.choice([1, 2, 5, 8, 16, 17, 33, 64]),
        "shape": draw.choice([(), (0,), (1,), (7,), (64,), (3, 21), (2, 2, 50), (300,)]),
        "dtype": dtype,
        "factor_dtype": draw.choice([dtype, dtype, torch.float32]),
        "token_dtype": draw.choice([torch.int32, torch.int64]),
        "padding_idx": draw.choice([None, None, draw.randrange(-vocabulary, vocabulary)]),
        "scale_grad_by_freq": draw.random() < 0.3,
        "sparse": draw.random() < 0.3,
        "deterministic": draw.random() < 0.5,
        "seed": draw.randrange(10**6),
    }


def inputs(c: dict) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, W, lora_A, lora_B and the gradient of the output."""
    torch.manual_seed(c["seed"])
    tokens = torch.randint(c["vocabulary"], c["shape"], dtype=c["token_dtype"], device=ON)
    sides = ((c["vocabulary"], c["width"]), (c["vocabulary"], c["rank"]), (c["width"], c["rank"]))
    dtypes = (c["dtype"], c["factor_dtype"], c["factor_dtype"])
    W, A, B = (torch.randn(side, device=ON).to(dtype) for side, dtype in zip(sides, dtypes, strict=True))
    return tokens, W, A, B, torch.randn((*c["shape"], c["width"]), device=ON).to(c["dtype"])


def reference(c: dict, scaling: float, magnitudes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in float64, written as the one-hot product that a look-up stands for.

    `magnitudes`: the same sums of absolute values, against which a rounding error is to be judged.
    """
    tokens, *tensors = inputs(c)
    W, A, B, G = (each.double().abs() if magnitudes else each.double() for each in tensors)
    one_hot = torch.nn.functional.one_hot(tokens.flatten().long(), c["vocabulary"]).double()
    adapted = one_hot.clone()
    if c["padding_idx"] is not None:
        adapted[:, c["padding_idx"]] = 0
    G, counts = G.reshape(-1, c["width"]), one_hot.sum(0).clamp(min=1)
    out = one_hot @ W + scaling * adapted @ A @ B.T
    dA = scaling * adapted.T @ (G @ B)
    dA = dA / counts[:, None] if c["scale_grad_by_freq"] and not c["sparse"] else dA
    return out.reshape(*c["shape"], c["width"]), dA, scaling * G.T @ (adapted @ A)


def errors(c: dict, scaling: float = 1.7) -> dict[str, float]:
    """Largest difference from float64, divided by the largest sum of magnitudes, for out, dA and dB."""
    tokens, W, A, B, G = inputs(c)
    A.requires_grad_(), B.requires_grad_()
    assert functional.triton_serves(tokens, W, A, B)
    options = {key: c[key] for key in ("padding_idx", "scale_grad_by_freq", "sparse", "deterministic")}
    out = lora_embedding(tokens, W, A, B, scaling, **options)
    out.backward(G)
    assert out.dtype == W.dtype and out.shape == G.shape and A.grad.is_sparse == c["sparse"]
    results = (out.detach(), A.grad.to_dense() if c["sparse"] else A.grad, B.grad)
    found = {}
    exact, sizes = reference(c, scaling), reference(c, scaling, magnitudes=True)
    for name, ours, right, size in zip(("out", "dA", "dB"), results, exact, sizes, strict=True):
        apart = (ours.double() - right).abs()
        found[name] = float(apart.max() / size.max().clamp(min=1e-9)) if apart.numel() else 0.0
    return found


def tolerance(c: dict, name: str) -> float:
    """Two units of the last place; in half precision PyTorch sums a token's n rows on a CPU with n roundings."""
    dtype = c["dtype"] if name == "out" else c["factor_dtype"]
    rows = torch.Size(c["shape"]).numel() if ON == "cpu" and name == "dA" and dtype.itemsize == 2 else 0
    return (2 + rows) * torch.finfo(dtype).eps


# Right, for every shape, dtype and option


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_equals_the_one_hot_product_in_float64(draw):
    c = configuration(draw)
    for name, error in errors(c).items():
        assert error <= tolerance(c, name), (name, error, c)


LARGE = {"padding_idx": 0, "scale_grad_by_freq": True, "sparse": False, "seed": 1, "token_dtype": torch.int64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_rank_256_and_several_blocks_of_everything(dtype, deterministic):
    c = {"vocabulary": 70, "width": 150, "rank": 256, "shape": (90,), "dtype": dtype, "factor_dtype": dtype}
    c |= LARGE | {"deterministic": deterministic}
    for name, error in errors(c).items():
        assert error <= 4 * tolerance(c, name), name  # longer sums than elsewhere


def test_one_token_repeated():
    """65 536 times on a GPU, whose additions to one row must not wait for one another; fewer on the interpreter."""
    torch.manual_seed(0)
    times = 8192 if ON == "cpu" else 65_536
    tokens = torch.full((times,), 3, device=ON)
    W, A, B = (torch.randn(side, device=ON) for side in ((5, 16), (5, 2), (16, 2)))
    G = torch.randn(times, 16, device=ON)
    A.requires_grad_(), B.requires_grad_()
    lora_embedding(tokens, W, A, B, 0.5).backward(G)
    total = G.double().sum(0)
    assert torch.allclose(A.grad[3].double(), 0.5 * total @ B.double(), rtol=1e-3, atol=1e-2)
    assert torch.allclose(B.grad.double(), 0.5 * total[:, None] * A[3].double(), rtol=1e-3, atol=1e-2)
    assert not A.grad[[0, 1, 2, 4]].any()


def test_a_table_of_more_than_two_to_the_31_numbers():
    """The last row lies beyond 32-bit offsets. Rows that nobody reads are never in memory on a CPU."""
    vocabulary, width = 2**27 + 3, 17
    try:
        W = torch.empty(vocabulary, width, dtype=torch.float16, device=ON)
        A = torch.empty(vocabulary, 17, dtype=torch.float16, device=ON)
    except RuntimeError:
        pytest.skip("no room for 9 GB of addresses")
    tokens = torch.tensor([vocabulary - 1, 0, vocabulary - 2], device=ON)
    W[tokens], A[tokens] = torch.randn(2, 3, 17, device=ON).half()
    B = torch.randn(17, 17, device=ON).half()
    out = kernels.look_up(tokens, W, A, B, 1.7)
    exact = W[tokens].double() + 1.7 * A[tokens].double() @ B.double().T
    assert torch.allclose(out.double(), exact, rtol=2e-3, atol=2e-3)
    dB = kernels.gradients(out, tokens, A, B, 1.7)[1]
    assert torch.allclose(dB.double(), 1.7 * out.double().T @ A[tokens].double(), rtol=2e-3, atol=0.1)


def test_padding_is_the_row_of_W_bit_for_bit():
    c = {"vocabulary": 9, "width": 33, "rank": 4, "shape": (40,), "dtype": torch.bfloat16, "seed": 3}
    tokens, W, A, B, _ = inputs(c | {"factor_dtype": torch.bfloat16, "token_dtype": torch.int32})
    out = lora_embedding(tokens, W, A, B, 1.7, padding_idx=-3)
    assert torch.equal(out[tokens == 6], W[6].expand(int((tokens == 6).sum()), -1))


@pytest.mark.parametrize("token", [-1, 9, 2**31 - 1])
def test_an_unknown_token_is_nan_and_touches_nothing(token):
    c = {"vocabulary": 9, "width": 33, "rank": 4, "shape": (5,), "dtype": torch.float32, "seed": 3}
    tokens, W, A, B, G = inputs(c | {"factor_dtype": torch.float32, "token_dtype": torch.int64})
    A.requires_grad_(), B.requires_grad_()
    lora_embedding(tokens[1:], W, A, B, 1.7).backward(G[1:])
    expected, A.grad, B.grad = (A.grad, B.grad), None, None
    tokens[0] = token
    out = lora_embedding(tokens, W, A, B, 1.7)
    assert out[0].isnan().all() and out[1:].isfinite().all()
    out.backward(G)
    assert torch.allclose(A.grad, expected[0]) and torch.allclose(B.grad, expected[1], atol=1e-5)


def test_the_layer_names_an_unknown_token():
    layer = LoRAEmbedding(50, 4, 2, 4, device=ON)
    with pytest.raises(IndexError, match=r"between 0 and 49 \(vocabulary size 50\); got 50"):
        layer(torch.tensor([[1, 50]], device=ON))
    layer.check_tokens = False
    assert layer(torch.tensor([[1, 50]], device=ON)).isnan().any(-1).tolist() == [[False, True]]


def test_tables_with_gaps_between_rows_and_B_in_any_order():
    torch.manual_seed(0)
    tokens = torch.randint(9, (20,), device=ON)
    W, A = torch.randn(9, 70, device=ON)[:, 3:40], torch.randn(9, 30, device=ON)[:, :5]
    B = torch.randn(5, 37, device=ON).T
    exact = W[tokens] + 1.7 * A[tokens] @ B.T
    assert torch.allclose(lora_embedding(tokens, W, A, B, 1.7), exact, atol=1e-5)


def test_deterministic_sums_are_the_same_bit_for_bit():
    c = {"vocabulary": 60, "width": 259, "rank": 8, "shape": (300,), "dtype": torch.float32, "seed": 5}
    tokens, _, A, B, G = inputs(c | {"factor_dtype": torch.float32, "token_dtype": torch.int64})
    first, again = (kernels.gradients(G, tokens, A, B, 1.7, deterministic=True) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_any_block_sizes_give_the_same():
    """Whatever a search on a card may choose: sides, order, programs that make several tiles, hints to the cache."""
    c = {"vocabulary": 60, "width": 100, "rank": 20, "shape": (70,), "dtype": torch.float64, "seed": 6}
    tokens, W, A, B, G = inputs(c | {"factor_dtype": torch.float64, "token_dtype": torch.int64})
    out, (rows, dB) = kernels.look_up(tokens, W, A, B, 1.7), kernels.gradients(G, tokens, A, B, 1.7)
    plain = kernels.Blocks(32, 32, 32, warps=4, stages=2)
    tiles = [
        kernels.Blocks(*sides, warps=4, stages=2) for sides in ((16, 16, 32), (32, 64, 16), (128, 128, 64))
    ]
    tiles += [plain._replace(programs=programs) for programs in (1, 3)]
    tiles += [plain._replace(columns_first=True), plain._replace(hints=True)]
    tiles += [plain._replace(columns_first=True, hints=True, programs=2)]
    for blocks in tiles:
        assert torch.allclose(kernels.look_up(tokens, W, A, B, 1.7, blocks=blocks), out), blocks
        if blocks.rank >= 20:
            walking = blocks._replace(programs=max(1, blocks.programs))
            ours = kernels.gradients(G, tokens, A, B, 1.7, blocks=walking)
            assert torch.allclose(ours[0], rows) and torch.allclose(ours[1], dB), blocks


def test_tiles_that_were_measured_serve_their_card_and_what_is_nearest(monkeypatch):
    found, narrow = kernels.Blocks(16, 64, 16, 4, 3, hints=True), kernels.Blocks(16, 32, 16, 4, 3)
    table = {("forward", 2, 16, 4096, 65_536): found, ("forward", 2, 16, 512, 65_536): narrow}
    monkeypatch.setattr(kernels, "MEASURED", table)
    monkeypatch.setattr(kernels, "MEASURED_ON", {"capability": (9, 0)})
    kernels.nearest.cache_clear()
    tile = lambda width, rank, dtype=torch.bfloat16, capability=(9, 0), kernel="forward": kernels.blocks_for(
        kernel, width, rank, dtype, 1000, kernels.Card(capability, 132)
    )
    assert tile(4096, 16) == tile(8192, 8) == found and tile(600, 16) == narrow
    for other in ({"rank": 17}, {"rank": 16, "dtype": torch.float32}, {"rank": 16, "capability": (8, 9)}):
        expected = kernels.forward_blocks(4096, other["rank"], other.get("dtype", torch.bfloat16))
        assert tile(4096, **other) == expected
    assert tile(4096, 16, kernel="backward") == kernels.backward_blocks(4096, 16, torch.bfloat16)
    kernels.nearest.cache_clear()


def test_gradients_of_A_and_B_keep_no_more_memory_than_their_own():
    """Both are summed in one piece; B's gradient, which an optimiser may hold, is not a view of it."""
    c = {"vocabulary": 60, "width": 40, "rank": 4, "shape": (300,), "dtype": torch.float32, "seed": 5}
    tokens, _, A, B, G = inputs(c | {"factor_dtype": torch.float32, "token_dtype": torch.int64})
    dB = kernels.gradients(G, tokens, A, B, 1.7)[1]
    assert dB.untyped_storage().nbytes() == dB.nbytes


# As operators of PyTorch's


def operator_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    c = {"vocabulary": 6, "width": 4, "rank": 3, "shape": (2, 3), "dtype": dtype, "seed": 7}
    tokens, W, A, B, G = inputs(c | {"factor_dtype": dtype, "token_dtype": torch.int64})
    return tokens, W, A.requires_grad_(), B.requires_grad_(), G


@pytest.mark.parametrize(("padding", "by_frequency"), [(-1, False), (2, True)])
def test_operator_opcheck(padding, by_frequency):
    tokens, W, A, B, G = operator_inputs()
    options = (1.7, padding, by_frequency, True)
    torch.library.opcheck(kernels.embedding_op, (tokens, W, A, B, *options))
    A, B = A.detach(), B.detach()
    torch.library.opcheck(kernels.embedding_backward_op, (G, tokens, A, B, *options))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_operator_gradcheck(padding_idx):
    tokens, W, A, B, _ = operator_inputs(torch.float64)
    operation = lambda A, B: lora_embedding(tokens, W, A, B, 1.7, padding_idx, deterministic=True)
    assert torch.autograd.gradcheck(operation, (A, B))


def test_operator_compiles_whole():
    tokens, W, A, B, G = operator_inputs()
    operation = lambda *args: lora_embedding(*args, 1.7, 2)
    compiled = torch.compile(operation, fullgraph=True, backend="inductor" if ON == "cuda" else "aot_eager")
    results = []
    for each in (operation, compiled):
        out = each(tokens, W, A, B)
        out.backward(G)
        results.append((out, A.grad, B.grad))
        A.grad = B.grad = None
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*results, strict=True))
    layer = LoRAEmbedding(50, 4, 2, 4, check_tokens=False, device=ON)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), layer(tokens))


def test_operator_refuses_to_compile_a_sparse_gradient():
    tokens, W, A, B, _ = operator_inputs()
    compiled = torch.compile(
        lambda: lora_embedding(tokens, W, A, B, 1.7, sparse=True), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="can't be compiled: no operator may return a sparse"):
        compiled()


def test_operator_trains_a_layer_as_pytorch_does(monkeypatch):
    tables = []
    for triton_there in (True, False):
        monkeypatch.setattr(functional, "TRITON", triton_there)
        for sparse in (True, False):
            torch.manual_seed(0)
            layer = LoRAEmbedding(30, 20, 4, 8, padding_idx=5, sparse=sparse, device=ON)
            optimizer = pair_optimizers(layer, 0.1, torch.optim.SGD, torch.optim.SGD)
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                optimizer.zero_grad()
                layer(torch.randint(30, (4, 6), generator=generator).to(ON)).square().mean().backward()
                optimizer.step()
            tables.append(layer.delta_weight())
    assert tables[0].any() and all(torch.allclose(each, tables[0], atol=1e-5) for each in tables)


def test_operator_is_left_to_pytorch_where_the_kernels_do_not_serve():
    """A trained table, rows in pieces, rank 257, ids of another dtype, shapes that don't fit."""
    tokens, W, A, B, _ = operator_inputs(torch.float64)
    W = W.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda W: lora_embedding(tokens, W, A, B, 1.7), (W,))
    with torch.no_grad():
        assert functional.triton_serves(tokens, W, A, B)
    W = W.detach()
    assert not functional.triton_serves(tokens, W.T.contiguous().T, A, B)
    assert not functional.triton_serves(tokens.to(torch.uint8), W, A, B)
    assert not functional.triton_serves(tokens, W, A[:5], B)
    assert not functional.triton_serves(tokens, W, A, B.float())
    wide = torch.randn(300, 257, device=ON)
    assert not functional.triton_serves(tokens, torch.randn(300, 300, device=ON), wide, wide)
    exact = W[tokens] + 1.7 * A[tokens] @ B.T
    assert torch.allclose(lora_embedding(tokens, W.T.contiguous().T, A, B, 1.7), exact)


# What only a GPU can show


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
def test_memory_beyond_the_outputs_and_the_rows_of_A(sparse):
    vocabulary, width, rank, length = 32_000, 2048, 16, 16_384
    W, A, B = (
        torch.randn(side, device=ON, dtype=torch.bfloat16)
        for side in ((vocabulary, width), (vocabulary, rank), (width, rank))
    )
    A.requires_grad_(), B.requires_grad_()
    tokens = torch.randint(vocabulary, (length,), device=ON)
    G = torch.randn(length, width, device=ON, dtype=torch.bfloat16)
    for _ in range(2):  # the first compiles
        A.grad = B.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = lora_embedding(tokens, W, A, B, 1.7, sparse=sparse)
        forward = torch.cuda.max_memory_allocated() - before
        out.backward(G)
        both = torch.cuda.max_memory_allocated() - before
    output, rows = 2 * length * width, length * rank
    assert forward <= 1.01 * output
    assert both <= 1.01 * output + 40 * rows + 8 * (vocabulary + 4 * width) * rank


@gpu
@pytest.mark.gpu
def test_a_cuda_graph_holds_the_unchecked_layer():
    layer = LoRAEmbedding(1000, 256, 8, 16, check_tokens=False, device=ON, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_A)
    tokens = torch.randint(1000, (128,), device=ON)
    with torch.no_grad():
        layer(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(tokens)
        tokens.copy_(torch.randint(1000, (128,), device=ON))
        graph.replay()
        assert torch.equal(out, layer(tokens))


def main(cases: int) -> None:
    """The worst error by dtype and result, over random cases."""
    worst, count, draw = Counter(), Counter(), random.Random(0)
    for _ in range(cases):
        c = configuration(draw)
        for name, error in errors(c).items():
            dtype = c["dtype"] if name == "out" else c["factor_dtype"]
            worst[dtype, name] = max(worst[dtype, name], error)
            count[dtype, name] += 1
    print(f"{cases} cases on {ON}; largest difference from float64 / largest sum of magnitudes")
    for dtype in DTYPES:
        words = [
            f"{name} {worst[dtype, name]:.1e} ({count[dtype, name]} cases)" for name in ("out", "dA", "dB")
        ]
        print(f"{str(dtype).removeprefix('torch.'):9}", ", ".join(words))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
