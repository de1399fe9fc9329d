"""The course's base model: a small decoder-only transformer, vocabulary 10 000 × width 100.

Written to be read: every matrix has the name that the chapters use. Not for training tricks; they are in training.py.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TinyLM(nn.Module):
    """tokens (batch, time) int64 → logits (batch, time, vocabulary).

    A pre-norm transformer (Radford et al. 2019, GPT-2) with rotary positions (Su et al. 2021, eq. 34), GELU and a
    head of its own (not tied to the embedding). Linear layers of the blocks have biases, the head has none.
    """

    def __init__(
        self, vocabulary: int = 10_000, width: int = 100, layers: int = 6, heads: int = 5, context: int = 256
    ):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(
                f"width / heads must be an even whole number (rotary positions turn pairs); got {width} / {heads}"
            )
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.reset_parameters(layers)

    def reset_parameters(self, layers: int) -> None:
        """GPT-2's initial scales: 0.02 times what the width asks for, outputs of a block smaller with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
                if name.endswith(("output.weight", "down.weight")):
                    parameter.data.div_(math.sqrt(2 * layers))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: (batch, time) → (batch, time, width)."""
        if tokens.shape[-1] > self.context:
            raise ValueError(f"at most {self.context} tokens fit into the context; got {tokens.shape[-1]}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], heads: int = 5, context: int = 256) -> "TinyLM":
        """The model whose weights are given; vocabulary, width and depth are read from their shapes."""
        vocabulary, width = state["embedding.weight"].shape
        layers = sum(name.endswith("attention.query.weight") for name in state)
        model = cls(vocabulary, width, layers, heads, context)
        model.load_state_dict(state)
        return model

    @torch.no_grad()
    def generate(self, tokens: Tensor, length: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
        """`length` more tokens after a 1-D prompt, drawn at a temperature (0: the likeliest): (prompt + length,)."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self.head(self.hidden(tokens[None, -self.context :])[0, -1])
            if temperature > 0:
                drawn = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
            else:
                drawn = logits.argmax(0, keepdim=True)
            tokens = torch.cat([tokens, drawn])
        return tokens


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal multi-head attention: W_q, W_k, W_v and W_o are `query`, `key`, `value` and `output`."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        pairs = width // heads // 2
        angle = torch.arange(context)[:, None] / 10_000 ** (torch.arange(pairs) / pairs)
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.turn(self.by_head(self.query(x))), self.turn(self.by_head(self.key(x)))
        mixed = F.scaled_dot_product_attention(query, key, self.by_head(self.value(x)), is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))

    def by_head(self, y: Tensor) -> Tensor:
        """(batch, time, width) → (batch, heads, time, width / heads)."""
        batch, time, width = y.shape
        return y.view(batch, time, self.heads, width // self.heads).transpose(1, 2)

    def turn(self, y: Tensor, start: int = 0) -> Tensor:
        """Rotary positions from `start` on: each pair of numbers is turned by an angle that grows with the position."""
        first, second = y.chunk(2, dim=-1)
        at = slice(start, start + y.shape[-2])
        cosine, sine = self.cosine[at].to(y.dtype), self.sine[at].to(y.dtype)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class MLP(nn.Module):
    """down(GELU(up(x))), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
