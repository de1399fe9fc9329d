"""LoRALinear and LoRAEmbedding: equal to loralib and PEFT, and what holds while merged."""

import copy
import io
import math
import random
import shutil
import subprocess
import sys

import loralib
import parity
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_edu.lora import LoRAEmbedding, LoRALinear, lora_embedding, lora_linear, pair_optimizers
from lora_edu.lora.checks import refuse_layer

HALF = (torch.float16, torch.bfloat16)


def trained(layer: nn.Module, seed: int = 0, size: float = 0.1) -> nn.Module:
    """The layer with random factors, as after training; the padding row of an embedding stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for factor in (layer.lora_A, layer.lora_B):
        factor.data = (size * torch.randn(factor.shape, generator=generator)).to(factor.dtype)
    if getattr(layer, "padding_idx", None) is not None:
        layer.lora_A.data[layer.padding_idx] = 0
    return layer


def linear(**options) -> LoRALinear:
    return trained(LoRALinear(12, 8, rank=3, alpha=6, **options))


def embedding(**options) -> LoRAEmbedding:
    return trained(LoRAEmbedding(20, 8, rank=3, alpha=6, **options))


def example(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(10).reshape(2, 5)
    return torch.linspace(-1, 1, 24, dtype=layer.weight.dtype).reshape(2, 12)


MAKERS = (linear, embedding)

# Equality with loralib and PEFT


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_embedding_equals_loralib_and_peft(draw):
    for quantity, difference in parity.compare_embedding(parity.embedding_configuration(draw)).items():
        assert difference < 16, quantity


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_linear_equals_loralib_and_peft(draw):
    for quantity, difference in parity.compare_linear(parity.linear_configuration(draw)).items():
        assert difference < 16, quantity


def test_initial_state_is_the_plain_layer():
    for layer, plain in (
        (LoRALinear(6, 4, 2, 4), nn.Linear(6, 4)),
        (LoRAEmbedding(6, 4, 2, 4), nn.Embedding(6, 4)),
    ):
        plain.load_state_dict(layer.state_dict(), strict=False)
        x = torch.arange(6) if isinstance(plain, nn.Embedding) else torch.randn(3, 6)
        assert torch.equal(layer(x), plain(x))
        assert [name for name, each in layer.named_parameters() if each.requires_grad] == ["lora_A", "lora_B"]


def test_same_seed_same_weights_as_the_torch_layer():
    for ours, torchs in (
        (lambda: LoRALinear(6, 4, 2, 4), lambda: nn.Linear(6, 4)),
        (lambda: LoRAEmbedding(6, 4, 2, 4), lambda: nn.Embedding(6, 4)),
    ):
        torch.manual_seed(3)
        layer = ours()
        torch.manual_seed(3)
        assert torch.equal(layer.weight, torchs().weight)


def test_fresh_factors_have_the_peers_distributions():
    torch.manual_seed(0)
    ours, theirs = LoRALinear(400, 300, 16, 16), loralib.Linear(400, 300, r=16)
    assert ours.lora_A.abs().max() <= theirs.lora_A.abs().max() * 1.02
    assert torch.isclose(ours.lora_A.std(), theirs.lora_A.std(), rtol=0.05)
    assert not ours.lora_B.any()
    embedding = LoRAEmbedding(400, 300, 16, 16)
    assert abs(embedding.lora_B.std() - 1) < 0.05 and not embedding.lora_A.any()


# Gradients


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_gradcheck_embedding(draw: random.Random):
    vocabulary, width = draw.randint(2, 8), draw.randint(1, 5)
    rank = draw.randint(1, min(vocabulary, width))
    padding = draw.choice([None, draw.randrange(-vocabulary, vocabulary)])
    tokens = torch.randint(0, vocabulary, draw.choice([(), (4,), (2, 3)]))
    matrices = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((vocabulary, width), (vocabulary, rank), (width, rank))
    ]
    # W's own gradient leaves the padding row out too, which no numerical check can see.
    if padding is not None:
        matrices[0].requires_grad_(False)

    def operation(W, A, B):
        return lora_embedding(tokens, W, A, B, 1.7, padding)

    assert torch.autograd.gradcheck(operation, matrices)
    assert torch.autograd.gradgradcheck(operation, matrices)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_gradcheck_linear(inputs, outputs, with_bias):
    rank = min(inputs, outputs)
    shapes = ((2, 3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank))
    matrices = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True) if with_bias else None
    assert torch.autograd.gradcheck(lora_linear, (*matrices, 0.7, bias))
    assert torch.autograd.gradgradcheck(lora_linear, (*matrices, 0.7, bias))


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_sparse_gradient_equals_dense(draw):
    c = parity.embedding_configuration(draw)
    padding, tokens = c["padding_idx"], torch.randint(0, c["vocabulary"], c["shape"])
    layers = [
        trained(LoRAEmbedding(c["vocabulary"], c["width"], c["rank"], 4, padding, sparse=sparse))
        for sparse in (False, True)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer(tokens).pow(2).sum().backward()
    dense, sparse = (layer.lora_A.grad for layer in layers)
    assert sparse.is_sparse and torch.allclose(sparse.to_dense(), dense, atol=1e-6)
    assert torch.allclose(layers[0].lora_B.grad, layers[1].lora_B.grad, atol=1e-6)
    assert sparse._nnz() <= tokens.numel()


def test_sparse_step_does_not_grow_with_the_vocabulary():
    """Counted, not timed: bytes allocated by a step of SGD and of SparseAdam, at 1 000 and 100 000 tokens."""

    def allocated(vocabulary: int, optimizer_class) -> int:
        layer = LoRAEmbedding(vocabulary, 16, 4, 8, sparse=True)
        optimizer = pair_optimizers(layer, 1e-2, dense=torch.optim.SGD, sparse=optimizer_class)
        tokens = torch.arange(64)
        for _ in range(2):  # the second step: SparseAdam's state is there
            with torch.profiler.profile(profile_memory=True) as profile:
                optimizer.zero_grad()
                layer(tokens).pow(2).sum().backward()
                optimizer.step()
        return sum(
            max(0, event.self_device_memory_usage or event.self_cpu_memory_usage)
            for event in profile.events()
        )

    for optimizer_class in (torch.optim.SGD, torch.optim.SparseAdam):
        small, large = allocated(1_000, optimizer_class), allocated(100_000, optimizer_class)
        assert large < 1.1 * small + 4096
        assert large < 100_000 * 4  # less than one column of lora_A


# Options of the embedding


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_row_is_the_base_row_merged_or_not(padding_idx, sparse):
    layer = LoRAEmbedding(10, 4, 2, 4, padding_idx=padding_idx, sparse=sparse)
    nn.init.normal_(layer.lora_A)  # the padding row too, as in a foreign adapter
    with torch.no_grad():
        layer.weight.normal_()
    tokens = torch.arange(10)
    out = layer(tokens)
    row = padding_idx % 10
    assert torch.equal(out[row], layer.weight[row])
    out.sum().backward()
    moved = layer.lora_A.grad.to_dense().any(dim=1)
    assert not moved[row] and moved.sum() == 9
    only_padding = layer(torch.tensor([row])).sum()
    layer.zero_grad()
    only_padding.backward()
    assert not layer.lora_B.grad.any()  # B learns nothing from padding
    assert not layer.delta_weight()[row].any()
    layer.eval().merge()
    assert torch.equal(layer(tokens)[row], layer.unmerged_weight[row])
    assert torch.allclose(layer(tokens), out, atol=1e-6)


def test_peers_add_the_update_at_padding():
    """The one difference, shown: loralib's padding row moves when its lora_A row isn't zero, ours doesn't."""
    theirs = loralib.Embedding(5, 4, r=2, lora_alpha=2, padding_idx=1)
    nn.init.normal_(theirs.lora_A)
    assert not torch.equal(theirs(torch.tensor(1)), theirs.weight[1])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_max_norm_clips_the_output_and_changes_no_weight(norm_type):
    layer = trained(LoRAEmbedding(30, 6, 3, 6, max_norm=1.5, norm_type=norm_type), size=1.0)
    before = layer.weight.clone()
    out = layer(torch.arange(30))
    assert torch.equal(layer.weight, before)
    assert out.norm(norm_type, dim=1).max() <= 1.5 + 1e-5
    table = layer.weight.data + layer.delta_weight()
    expected = F.embedding(torch.arange(30), table.clone(), max_norm=1.5, norm_type=norm_type)
    assert torch.allclose(out, expected, atol=1e-5)
    out.sum().backward()
    layer.eval().merge()
    merged = layer.weight.clone()
    assert torch.allclose(layer(torch.arange(30)), out, atol=1e-5) and torch.equal(layer.weight, merged)


def test_max_norm_of_a_fresh_layer_equals_torch():
    plain = nn.Embedding(30, 6, max_norm=1.0)
    layer = LoRAEmbedding.from_layer(plain, 2, 4)
    before = plain.weight.clone()
    ours = layer(torch.arange(30))
    assert torch.equal(plain.weight, before)
    assert torch.allclose(ours, plain(torch.arange(30)), atol=1e-6)


def test_max_norm_gradient():
    layer = trained(LoRAEmbedding(8, 4, 2, 4, max_norm=1.0, dtype=torch.float64), size=0.7)

    def out(A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, torch.arange(8))

    assert torch.autograd.gradcheck(out, (layer.lora_A, layer.lora_B))


def test_token_checks():
    layer = LoRAEmbedding(50, 4, 2, 4)
    for _ in range(2):  # then once more, merged
        with pytest.raises(IndexError, match=r"between 0 and 49 \(vocabulary size 50\); got 50"):
            layer(torch.tensor([[1, 50]]))
        with pytest.raises(IndexError, match="got -3"):
            layer(torch.tensor([-3, 60]))
        assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 4)
        layer.eval().merge()
    for bad in (50, -1):  # torch's own check on a CPU: never a wrong row
        with pytest.raises(IndexError):
            LoRAEmbedding(50, 4, 2, 4, check_tokens=False)(torch.tensor(bad))
    assert LoRAEmbedding(50, 4, 2, 4, device="meta")(torch.arange(60, device="meta")).is_meta


def test_the_plain_path_can_be_compiled_checked_or_not():
    for check in (True, False):
        layer = embedding(padding_idx=3, check_tokens=check)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(torch.arange(20)), layer(torch.arange(20)))


def test_int32_tokens():
    layer = embedding(padding_idx=2)
    assert torch.equal(layer(torch.arange(20)), layer(torch.arange(20, dtype=torch.int32)))


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LoRALinear(10, 8, 0, 1), ValueError, r"between 1 and 8 .*8 × 10 weight\); got 0"),
        (lambda: LoRALinear(10, 8, 9, 1), ValueError, r"between 1 and 8 .*got 9"),
        (lambda: LoRAEmbedding(10_000, 100, 128, 1), ValueError, r"between 1 and 100 .*10000 × 100 weight\)"),
        (lambda: LoRALinear(10, 8, 2.0, 1), ValueError, "whole number; got 2.0"),
        (lambda: LoRALinear(10, 8, True, 1), ValueError, "whole number; got True"),
        (lambda: LoRALinear(10, 8, 2, math.nan), ValueError, "alpha must be a finite number.*nan"),
        (lambda: LoRALinear(10, 8, 2, 0), ValueError, "alpha must be.*nothing is learnt"),
        (
            lambda: LoRALinear(10, 8, 2, 1, dropout=1.0),
            ValueError,
            "dropout must be at least 0 and below 1; got 1.0",
        ),
        (
            lambda: LoRAEmbedding(9, 4, 2, 1, sparse=True, scale_grad_by_freq=True),
            ValueError,
            "no sparse gradient",
        ),
        (lambda: LoRAEmbedding(9, 4, 2, 1, max_norm=-1.0), ValueError, "max_norm must be above 0; got -1.0"),
        (
            lambda: LoRALinear.from_layer(nn.Conv2d(3, 4, 1), 1, 1),
            TypeError,
            "nn.Linear, or Conv1D.*Conv2d is none",
        ),
        (lambda: LoRALinear.from_layer(nn.Embedding(3, 4), 1, 1), TypeError, "Embedding is none"),
        (lambda: LoRALinear.from_layer(linear(), 1, 1), TypeError, "has LoRA already"),
        (
            lambda: LoRALinear.from_layer(nn.LazyLinear(4), 1, 1),
            TypeError,
            "no weight yet; run the model once",
        ),
        (
            lambda: LoRALinear.from_layer(nn.MultiheadAttention(8, 2).out_proj, 1, 1),
            TypeError,
            "never be used",
        ),
        (lambda: LoRALinear.from_layer(weight_normed(), 1, 1), TypeError, "computes its weight"),
        (lambda: LoRALinear.from_layer(hooked(), 1, 1), TypeError, "has hooks"),
        (
            lambda: LoRALinear.from_layer(replaced(), 1, 1),
            TypeError,
            "the forward of this Linear was replaced on the layer itself.*add LoRA first",
        ),
        (lambda: LoRALinear.from_layer(quantised(), 1, 1), TypeError, "already quantised"),
        (
            lambda: LoRALinear.from_layer(float8(), 1, 1),
            TypeError,
            r"already quantised \(torch.float8_e4m3fn",
        ),
        (
            lambda: LoRAEmbedding.from_layer(Scaled(3, 4), 1, 1),
            TypeError,
            "Scaled changes what nn.Embedding computes",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def replaced():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    return layer


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def quantised():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def float8():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def test_a_subclass_that_keeps_forward_is_fine():
    class Named(nn.Linear):
        pass

    refuse_layer(Named(3, 4))


# Merging


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32).clone()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thousand_rounds_give_back_every_bit(maker, dtype):
    layer = maker(dtype=dtype).eval()
    before, parameter = bits(layer.weight), layer.weight
    changed = 0
    for _ in range(1000):
        layer.merge()
        changed += int((bits(layer.weight) != before).any())
        layer.unmerge()
    assert changed == 1000  # each merge did something
    assert torch.equal(bits(layer.weight), before) and layer.weight is parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_drift(dtype):
    """What the copy is for: loralib's subtraction doesn't give the weights back."""
    theirs = loralib.Linear(12, 8, r=3, lora_alpha=6, dtype=dtype)
    nn.init.normal_(theirs.lora_B)
    before = theirs.weight.clone()
    for _ in range(100):
        theirs.eval()
        theirs.train()
    assert not torch.equal(theirs.weight, before)


@pytest.mark.parametrize("maker", MAKERS)
def test_merging_is_asked_for_idempotent_and_equal(maker):
    layer = maker(dtype=torch.float64)
    x, out = example(layer), layer(example(layer))
    layer.eval()
    assert not layer.merged and torch.equal(layer(x), out)
    report = layer.merge()
    once = layer.weight.clone()
    assert layer.merged and layer.merge() == report and torch.equal(layer.weight, once)
    assert torch.allclose(layer(x), out, rtol=0, atol=1e-12)
    assert torch.allclose(once - layer.unmerged_weight, layer.delta_weight(), rtol=0, atol=1e-12)
    layer.train()
    assert layer.merged  # nor does train() unmerge
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), out)


@pytest.mark.parametrize("maker", MAKERS)
def test_bytes_while_merged(maker):
    layer = maker(dtype=torch.bfloat16)
    report = layer.merge()
    assert report.extra_bytes == layer.weight.numel() * 2 == layer.unmerged_weight.untyped_storage().nbytes()
    assert layer.weight.untyped_storage().nbytes() == report.extra_bytes
    layer.unmerge()
    assert layer.unmerged_weight is None


@pytest.mark.parametrize("maker", MAKERS)
def test_merged_forward_is_the_plain_layer(maker):
    layer = maker().eval()
    layer.merge()
    plain = nn.Embedding(20, 8) if maker is embedding else nn.Linear(12, 8)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if maker is linear:
            plain.bias.copy_(layer.bias)
    assert torch.equal(layer(example(layer)), plain(example(layer)))


def test_bfloat16_reports_what_rounding_swallowed():
    """ΔW a thousandth of W: bfloat16 keeps 8 bits, so most of it is lost; float32 loses next to nothing."""
    torch.manual_seed(0)
    W = torch.randn(256, 256).bfloat16()
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = LoRALinear(256, 256, 8, 8, dtype=dtype)
        layer.weight.data = W.to(dtype)
        A, B = torch.randn(8, 256), torch.randn(256, 8)
        size = 0.001 * W.float().norm() / (B @ A).norm()
        layer.lora_A.data, layer.lora_B.data = A.to(dtype), (B * size).to(dtype)
        lost[dtype] = layer.merge().swallowed
        kept = layer.weight.double() - layer.unmerged_weight.double()
        exact = layer.lora_B.double() @ layer.lora_A.double()
        assert math.isclose(
            lost[dtype], float((kept - exact).detach().norm() / exact.detach().norm()), rel_tol=1e-3
        )
    assert 0.3 < lost[torch.bfloat16] < 1 and lost[torch.float32] < 1e-4
    assert LoRALinear(4, 4, 1, 1).merge().swallowed == 0  # ΔW = 0


def test_merging_in_slices_changes_nothing(monkeypatch):
    layer, other = embedding(), embedding()
    other.load_state_dict(layer.state_dict())
    layer.merge()
    monkeypatch.setattr("lora_edu.lora.functional.ROWS_AT_ONCE", 24)
    other.merge()
    assert torch.allclose(layer.weight, other.weight, rtol=1e-6)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("broken", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merging_what_is_not_finite_is_refused(maker, broken, value):
    layer = maker()
    getattr(layer, broken).data[1, 1] = value
    before = {name: each.clone() for name, each in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be finite in torch.float32.*Nothing was merged"):
        layer.merge()
    assert not layer.merged
    for name, each in layer.state_dict().items():
        assert torch.equal(each, before[name]) or name == broken


def test_merging_that_overflows_half_precision_is_refused():
    layer = linear(dtype=torch.float16)
    layer.weight.data.fill_(65504)
    layer.lora_A.data.fill_(10)
    layer.lora_B.data.fill_(10)
    with pytest.raises(
        ValueError, match=r"must be finite in torch.float16; the update makes 96 of its entries"
    ):
        layer.merge()


@pytest.mark.parametrize("maker", MAKERS)
def test_training_a_merged_layer_raises_and_inference_works(maker):
    layer = maker()
    layer.merge()
    x = example(layer)
    with pytest.raises(RuntimeError, match=r"is merged.*unmerge\(\) to train it"):
        layer(x)
    with torch.no_grad():
        in_training_mode = layer(x)
    with torch.inference_mode():
        layer(x)
    assert torch.equal(layer.eval()(x), in_training_mode)
    layer.train().requires_grad_(False)  # nothing to train: the plain layer
    layer(x)


def test_backward_through_a_weight_merged_in_between_raises():
    layer = linear()
    x = example(layer).requires_grad_()
    out = layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("maker", MAKERS)
def test_state_dict_while_merged_is_the_unmerged_state(maker):
    layer = maker()
    before = {name: each.clone() for name, each in layer.state_dict().items()}
    layer.merge()
    assert {"weight", "lora_A", "lora_B"} <= set(layer.state_dict())
    for name, each in layer.state_dict().items():
        assert torch.equal(each, before[name]), name
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other = maker()
    other.lora_A.data.zero_()
    other.merge()
    other.load_state_dict(torch.load(saved))
    assert not other.merged  # loading unmerges first
    for name, each in other.state_dict().items():
        assert torch.equal(each, before[name]), name


@pytest.mark.parametrize("maker", MAKERS)
def test_moving_to_another_dtype_while_merged(maker):
    layer, never_merged = maker(), maker()
    never_merged.load_state_dict(layer.state_dict())
    layer.merge()
    merged = layer.weight.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.unmerged_weight.dtype == layer.lora_A.dtype == torch.bfloat16
    assert torch.equal(layer.weight, merged.bfloat16())
    layer.unmerge()
    assert torch.equal(layer.weight, never_merged.to(torch.bfloat16).weight)


@pytest.mark.parametrize("maker", MAKERS)
def test_deepcopy_while_merged(maker):
    layer = maker().eval()
    original = layer.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    assert twin.merged and torch.equal(twin(example(layer)), layer(example(layer)))
    twin.unmerge()
    assert torch.equal(twin.weight, original) and layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, original)


# Life in torch


@pytest.mark.parametrize("maker", MAKERS)
def test_state_dict_round_trip_and_plain_checkpoint(maker):
    layer, other = maker(), maker()
    other.lora_A.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(example(layer)), other(example(layer)))
    plain = nn.Embedding(20, 8) if maker is embedding else nn.Linear(12, 8)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["lora_A", "lora_B"] and not missing.unexpected_keys


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_dtype_and_device_moves(maker, dtype):
    layer = maker().to(dtype)
    out = layer(example(layer))
    assert out.dtype == dtype
    out.sum().backward()
    assert layer.lora_A.grad.dtype == dtype
    meta = maker().to("meta")
    assert meta.lora_A.device.type == meta.weight.device.type == "meta"
    assert (
        meta(example(layer).to("meta").to(meta.weight.dtype if maker is linear else torch.long)).shape
        == out.shape
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_factors_in_another_dtype_than_the_weight(maker):
    """As PEFT keeps them: a bfloat16 table, float32 factors; rounded once, at the end."""
    layer = maker()
    layer.weight.data = layer.weight.data.bfloat16()
    if maker is linear:
        layer.bias.data = layer.bias.data.bfloat16()
    x = example(layer)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().pow(2).sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    layer.eval().merge()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.allclose(layer(x).float(), out.float(), atol=0.05)


@pytest.mark.parametrize("maker", MAKERS)
def test_autocast(maker):
    layer = maker()
    x, exact = example(layer), layer(example(layer))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        plain = nn.functional.embedding(x, layer.weight) if maker is embedding else F.linear(x, layer.weight)
    assert out.dtype == plain.dtype  # what the torch layer gives under autocast
    assert torch.allclose(out.float(), exact, atol=0.05)
    out.float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("maker", MAKERS)
def test_deepcopy_and_pickle(maker):
    layer = maker()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(example(layer)), layer(example(layer)))
    twin.lora_A.data.zero_()
    assert layer.lora_A.any()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(example(layer)), layer(example(layer)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "sparse"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compile(backend, sparse):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile's default backend needs a C++ compiler")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = trained(LoRAEmbedding(20, 12, 3, 6, padding_idx=1, sparse=sparse))
            self.linear = linear()

        def forward(self, tokens):
            return self.linear(self.embedding(tokens))

    model = Both()
    tokens = torch.arange(10).reshape(2, 5)
    expected = model(tokens)
    expected.sum().backward()
    gradients = {
        name: each.grad.clone().to_dense() for name, each in model.named_parameters() if each.requires_grad
    }
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    out = compiled(tokens)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    for name, each in model.named_parameters():
        assert name not in gradients or torch.allclose(each.grad.to_dense(), gradients[name], atol=1e-6)
    model.eval()
    model.linear.merge()
    model.embedding.merge()
    assert torch.allclose(compiled(tokens), expected, atol=1e-6)
    model.linear.unmerge()
    assert torch.allclose(compiled(tokens), expected, atol=1e-6)


def test_from_layer_shares_weights():
    plain = nn.Linear(12, 8, bias=False)
    table = nn.Embedding(20, 8, padding_idx=-2, scale_grad_by_freq=True)
    for original, layer in (
        (plain, LoRALinear.from_layer(plain, 2, 4, dropout=0.1)),
        (table, LoRAEmbedding.from_layer(table, 2, 4)),
    ):
        assert layer.weight is original.weight and not original.weight.requires_grad
        assert set(layer.state_dict()) == {"weight", "lora_A", "lora_B"}
    assert layer.padding_idx == 18 and layer.scale_grad_by_freq


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(6, 10)
    layer = trained(LoRALinear.from_layer(conv, 3, 6))
    assert layer.lora_A.shape == (3, 10) and layer.lora_B.shape == (6, 3)
    x = torch.randn(2, 5, 10)
    update = layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), conv(x) + update, atol=1e-5)
    assert layer.delta_weight().shape == conv.weight.shape == (10, 6)
    out = layer(x)
    layer.eval().merge()
    assert torch.allclose(layer(x), out, atol=1e-5)
    assert torch.allclose(conv(x), out, atol=1e-5)  # the original shares the merged weight


def test_package_imports_neither_peer():
    code = "import sys, lora_edu.lora; print(sorted({'peft', 'loralib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Optimisers


def test_pairing_moves_only_rows_looked_up_and_schedules_both():
    layer = embedding(sparse=True)
    before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = pair_optimizers(layer, lr=0.1, sparse_lr=0.01)
    assert [type(each) for each in optimizer.optimizers] == [torch.optim.SparseAdam, torch.optim.Adam]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    tokens = torch.tensor([3, 5, 3])
    for _ in range(2):
        optimizer.zero_grad()
        layer(tokens).pow(2).sum().backward()
        optimizer.step()
        schedule.step()
    moved = (layer.lora_A != before[0]).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3, 5] and not torch.equal(layer.lora_B, before[1])
    assert [group["lr"] for each in optimizer.optimizers for group in each.param_groups] == [0.0025, 0.025]


def test_paired_optimizer_resumes():
    def run(steps, layer, optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            layer(torch.tensor([step % 3, 5])).pow(2).sum().backward()
            optimizer.step()

    layer = embedding(sparse=True)
    optimizer = pair_optimizers(layer, 0.1)
    run(3, layer, optimizer)
    twin = copy.deepcopy(layer)
    resumed = pair_optimizers(twin, 0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.1]
    for each in (optimizer, resumed):
        run(3, layer if each is optimizer else twin, each)
    assert torch.equal(layer.lora_A, twin.lora_A) and torch.equal(layer.lora_B, twin.lora_B)


def test_pairing_without_sparse_layers_is_a_plain_optimizer():
    assert type(pair_optimizers(embedding(), 0.1)) is torch.optim.Adam
    with pytest.raises(ValueError, match="no trainable parameter; add_lora it first"):
        pair_optimizers(nn.Linear(3, 3).requires_grad_(False), 0.1)
