"""A language model small enough to build a hundred times, and what tests ask of it."""

import torch
import torch.nn.functional as F
from torch import nn

from lora_edu.lora import trainable_parameters


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.output(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Tiny(nn.Module):
    """A language model small enough to build a hundred times."""

    def __init__(self, vocabulary=30, width=8, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(24).reshape(2, 12)


def tiny(seed: int = 0, **options) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**options)


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()


def portrait(model: nn.Module) -> dict:
    """Everything about a model that a failed call must leave alone."""
    return {
        "modules": [(name, id(each), each.training) for name, each in model.named_modules()],
        "parameters": [
            (name, id(each), each.requires_grad, each.dtype, each.data_ptr())
            for name, each in model.named_parameters(remove_duplicate=False)
        ],
        "attributes": sorted(vars(model)),
        "sums": [float(each.detach().double().sum()) for each in model.parameters()],
    }
