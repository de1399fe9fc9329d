"""Bytes on paper: what grows with the vocabulary, what a pass saves, and a linear layer's chain as PyTorch runs it."""

import loralib
import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu.counting.traffic import (
    linear_bytes,
    linear_operations,
    look_up_bytes,
    look_up_operations,
    traffic,
)
from lora_edu.lora import LoRALinear


@pytest.mark.parametrize(("vocabulary", "tokens"), [(1000, 64), (1_000_000, 2048)])
def test_only_the_dense_ways_grow_with_the_vocabulary(vocabulary, tokens):
    moved, larger = traffic(vocabulary, tokens), traffic(2 * vocabulary, tokens)
    assert moved["minimum"] < moved["ours, sparse"] < moved["loralib"] == moved["PEFT"]
    for name in moved:
        grows = {"loralib": 6, "PEFT": 6, "ours": 4}.get(name, 0)
        assert larger[name] - moved[name] == grows * 4 * 8 * vocabulary


def test_a_look_up_does_half_the_rank_in_operations_a_byte_and_one_pass_moves_a_quarter():
    for rank in (4, 16, 64):
        moved = look_up_bytes(65_536, 4096, rank)
        intensity = look_up_operations(65_536, 4096, rank) / moved["one pass"]
        assert abs(intensity / ((rank + 1) / 2) - 1) < 0.02
        assert 3.9 < moved["loralib, PEFT"] / moved["one pass"] < 4.01
        assert moved["one pass"] < moved["PyTorch, ours"] < moved["loralib, PEFT"]


class Watch(TorchDispatchMode):
    """Adds up the bytes that each operation of a linear layer reads and writes."""

    moved = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__ in ("mm", "addmm", "mul", "add", "add_"):
            tensors = [*(each for each in args if isinstance(each, torch.Tensor)), out]
            self.moved += sum(each.numel() * each.element_size() for each in tensors)
        return out


def test_a_linear_layer_moves_what_the_paper_says():
    tokens, inputs, outputs, rank = 64, 48, 80, 4
    x, paper = torch.randn(tokens, inputs), linear_bytes(tokens, inputs, outputs, rank, each=4)
    base = nn.Linear(inputs, outputs, bias=False)
    config = peft.LoraConfig(r=rank, target_modules=["layer"])
    hf = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]
    layers = {
        "plain": nn.Linear(inputs, outputs, bias=False),
        "loralib, PEFT": hf,
        "PyTorch, ours": LoRALinear(inputs, outputs, rank, 8, bias=False),
    }
    for way, layer in layers.items():
        with torch.no_grad(), Watch() as watch:
            layer(x)
        assert watch.moved == paper[way], way
    theirs = loralib.Linear(inputs, outputs, r=rank, bias=False)
    with torch.no_grad(), Watch() as watch:
        theirs(x)
    assert watch.moved == paper["loralib, PEFT"]
    assert paper["plain"] < paper["one pass"] < paper["summed in the product"] < paper["PyTorch, ours"]


def test_a_linear_layers_update_is_few_operations_and_many_bytes():
    """Llama's 4096 × 4096 at r = 16: under a hundredth of the operations, twice the bytes."""
    operations, moved = linear_operations(16_384, 4096, 4096, 16), linear_bytes(16_384, 4096, 4096, 16)
    assert operations["LoRA"] / operations["plain"] == 2 * 16 / 4096
    assert 2.4 < (moved["PyTorch, ours"] - moved["one pass"]) / (16_384 * 4096 * 2) / 2 < 2.6
