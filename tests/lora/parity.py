"""Our layers beside loralib's and PEFT's on random configurations: values, gradients, merged weights.

Not a test: test_layers.py draws a few hundred configurations; `python tests/lora/parity.py 5000` tries as
many as you like and prints the worst difference.
"""

import random
import sys

import loralib
import peft
import torch
from torch import Tensor, nn

from lora_edu.lora import LoRAEmbedding, LoRALinear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def embedding_configuration(draw: random.Random) -> dict:
    vocabulary, width = draw.randint(1, 40), draw.randint(1, 24)
    return {
        "vocabulary": vocabulary,
        "width": width,
        "rank": draw.randint(1, min(vocabulary, width)),
        "alpha": draw.choice([1, 2, 8, 16, 0.5, 3.7]),
        "padding_idx": draw.choice([None, draw.randrange(-vocabulary, vocabulary)]),
        "scale_grad_by_freq": draw.choice([False, True]),
        "shape": draw.choice([(), (0,), (3, 0), (7,), (2, 5), (2, 1, 3)]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.randrange(2**31),
    }


def linear_configuration(draw: random.Random) -> dict:
    inputs, outputs = draw.randint(1, 24), draw.randint(1, 24)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rank": draw.randint(1, min(inputs, outputs)),
        "alpha": draw.choice([1, 2, 8, 16, 0.5, 3.7]),
        "bias": draw.choice([False, True]),
        "dropout": draw.choice([0.0, 0.0, 0.3]),
        "shape": draw.choice([(), (0,), (7,), (2, 5), (2, 1, 3)]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.randrange(2**31),
    }


def compare_embedding(configuration: dict) -> dict[str, float]:
    """Worst difference by quantity, in units of the dtype's epsilon and of the largest entry compared."""
    c = configuration
    torch.manual_seed(c["seed"])
    options = {
        "padding_idx": c["padding_idx"],
        "scale_grad_by_freq": c["scale_grad_by_freq"],
        "dtype": c["dtype"],
    }
    ours = LoRAEmbedding(c["vocabulary"], c["width"], c["rank"], c["alpha"], **options)
    nn.init.normal_(ours.lora_A)
    if c["padding_idx"] is not None:
        ours.lora_A.data[c["padding_idx"]] = 0
    tokens = torch.randint(0, c["vocabulary"], c["shape"])

    theirs = loralib.Embedding(c["vocabulary"], c["width"], r=c["rank"], lora_alpha=c["alpha"], **options)
    theirs.weight.data, theirs.lora_A.data, theirs.lora_B.data = (
        ours.weight.data.clone(),
        ours.lora_A.T,
        ours.lora_B.data,
    )

    base = nn.Embedding(c["vocabulary"], c["width"], **options)
    base.weight.data = ours.weight.data.clone()
    hf = adapted(base, c)
    hf.lora_embedding_A["default"].data = ours.lora_A.data.T.clone()
    hf.lora_embedding_B["default"].data = ours.lora_B.data.clone()

    def gradients(layer, A, B, transposed):
        out = layer(tokens)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        (out * weights).sum().backward()
        return {"values": out, "gradient of A": A.grad.T if transposed else A.grad, "gradient of B": B.grad}

    mine = gradients(ours, ours.lora_A, ours.lora_B, False)
    peers = {
        "loralib": gradients(theirs, theirs.lora_A, theirs.lora_B, True),
        "PEFT": gradients(hf, hf.lora_embedding_A["default"], hf.lora_embedding_B["default"], True),
    }
    return differences(ours, mine, peers, theirs, hf)


def compare_linear(configuration: dict) -> dict[str, float]:
    c = configuration
    torch.manual_seed(c["seed"])
    options = {"bias": c["bias"], "dtype": c["dtype"]}
    ours = LoRALinear(c["inputs"], c["outputs"], c["rank"], c["alpha"], c["dropout"], **options)
    nn.init.normal_(ours.lora_B)
    x = torch.randn(*c["shape"], c["inputs"], dtype=c["dtype"])

    theirs = loralib.Linear(
        c["inputs"], c["outputs"], r=c["rank"], lora_alpha=c["alpha"], lora_dropout=c["dropout"], **options
    )
    theirs.load_state_dict(ours.state_dict())

    base = nn.Linear(c["inputs"], c["outputs"], **options)
    base.load_state_dict(ours.state_dict(), strict=False)
    hf = adapted(base, c)
    hf.lora_A["default"].weight.data = ours.lora_A.data.clone()
    hf.lora_B["default"].weight.data = ours.lora_B.data.clone()

    def gradients(layer, A, B):
        torch.manual_seed(c["seed"])  # the same entries of x are dropped
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        (out * weights).sum().backward()
        return {"values": out, "gradient of A": A.grad, "gradient of B": B.grad, "gradient of x": inputs.grad}

    mine = gradients(ours, ours.lora_A, ours.lora_B)
    peers = {
        "loralib": gradients(theirs, theirs.lora_A, theirs.lora_B),
        "PEFT": gradients(hf, hf.lora_A["default"].weight, hf.lora_B["default"].weight),
    }
    return differences(ours, mine, peers, theirs, hf)


def adapted(base: nn.Module, configuration: dict) -> nn.Module:
    """PEFT's layer around `base`, in base's dtype."""
    c = configuration
    config = peft.LoraConfig(
        r=c["rank"], lora_alpha=c["alpha"], lora_dropout=c.get("dropout", 0.0), target_modules=["layer"]
    )
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))
    return model["layer"].to(c["dtype"])


def differences(ours, mine: dict, peers: dict, theirs, hf) -> dict[str, float]:
    for layer in (ours, hf):
        layer.merge()
    theirs.eval()  # loralib merges by itself
    mine["merged weight"] = ours.weight
    peers["loralib"]["merged weight"] = theirs.weight
    peers["PEFT"]["merged weight"] = hf.base_layer.weight
    return {
        f"{quantity}, {peer}": distance(mine[quantity], results[quantity])
        for peer, results in peers.items()
        for quantity in mine
    }


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach(), theirs.detach()
    largest = max(float(theirs.abs().max()), 1.0)
    return float((ours.double() - theirs.double()).abs().max()) / largest / torch.finfo(ours.dtype).eps


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for name, configuration, compare in (
        ("LoRAEmbedding", embedding_configuration, compare_embedding),
        ("LoRALinear", linear_configuration, compare_linear),
    ):
        draw, worst = random.Random(0), {}
        for _ in range(number):
            c = configuration(draw)
            for quantity, difference in compare(c).items():
                key = (str(c["dtype"]).removeprefix("torch."), quantity)
                worst[key] = max(worst.get(key, 0.0), difference)
        print(f"{name}: {number} configurations; worst difference in units of the dtype's epsilon")
        for (dtype, quantity), difference in sorted(worst.items()):
            print(f"  {dtype:9} {quantity:24} {difference:8.2f}")
