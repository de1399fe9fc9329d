"""LoRA as one of the ways to tune. The layers themselves are in `lora_edu.lora`."""

from torch import nn

from lora_edu.lora import add_lora

EVERYWHERE = (nn.Linear, nn.Embedding)


def lora(model: nn.Module, rank: int, alpha: float | None = None, targets=EVERYWHERE, **options) -> nn.Module:
    """`add_lora` on every linear layer and embedding unless told otherwise, with alpha = rank (s = 1) by default."""
    return add_lora(model, rank, rank if alpha is None else alpha, targets, **options)
