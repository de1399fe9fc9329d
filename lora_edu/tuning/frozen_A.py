"""LoRA with its random factor frozen: the fair rival of a random subspace, since this too is one.

Not plain LoRA, where both factors are trained (`lora_edu.lora.add_lora`).
"""

import torch
from torch import nn

from lora_edu.lora import add_lora, lora_layers

EVERYWHERE = (nn.Linear, nn.Embedding)


def frozen_A(
    model: nn.Module, rank: int, alpha: float | None = None, targets=EVERYWHERE, *, seed: int = 0, **options
) -> nn.Module:
    """Add LoRA and train in each layer only the factor that starts at zero; returns the model, changed in place.

    The other factor stays as `seed` draws it, so ΔW is a *linear* function of what is trained: of lora_B (out, r) in a
    linear layer, where lora_A is random, and of lora_A (V, r) in an embedding, where lora_B is random. What is
    trained is a point in a subspace of r · out (or r · V) dimensions a layer, as in a random subspace, but every ΔW in
    it has rank ≤ r. Zhang et al. (2023, LoRA-FA) train this to save memory.

    `alpha` is the rank (s = 1) unless given; `options`: those of `add_lora`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(model, rank, rank if alpha is None else alpha, targets, **options)
    for layer in lora_layers(model).values():
        random = layer.lora_B if isinstance(layer, nn.Embedding) else layer.lora_A
        random.requires_grad_(False)
    return model
