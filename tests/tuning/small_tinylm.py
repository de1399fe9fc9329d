"""TinyLM with a vocabulary of 40, which the tests of LoRA's variants share, and random numbers in what is trained."""

import torch
from torch import nn

from lora_edu.lora import trainable_parameters
from lora_edu.tinylm import TinyLM

TOKENS = torch.arange(24).reshape(2, 12)
LAYERS = ["query", "mlp.down", "head"]


def small(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 16} | options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def moved(model, seed=1):
    """The model with random numbers in whatever is trained, near enough to where they start."""
    generator = torch.Generator().manual_seed(seed)
    for each in trainable_parameters(model):
        each.data += 0.3 * torch.randn(each.shape, generator=generator).to(each)
    return model
