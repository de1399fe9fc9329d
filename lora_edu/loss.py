"""The loss of a language model: cross-entropy of the next token, all logits at once only where that has to be.

Not for training (training.py). It knows no way of tuning: a head that adds to h Wᵀ supplies what it adds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats. inputs, targets: (batch, time) int64.

    Where the model is `head(hidden(inputs))` and the head's product is known (see `_sliceable`) the logits of the whole
    batch (16 × 256 × 10 000 numbers: 164 MB) are never held at once: `HeadLoss` goes through them in slices. Any other
    model is called: it returns logits (batch, time, vocabulary), alone, first in a tuple or, as those of transformers
    do, as `.logits`. Raises TypeError for anything else.
    """
    head = getattr(model, "head", None)
    if not (hasattr(model, "hidden") and isinstance(head, nn.Module) and _sliceable(head)):
        return F.cross_entropy(_logits(model(inputs), targets).flatten(0, 1), targets.flatten())
    hidden = model.hidden(inputs).flatten(0, 1)
    part = head.low_rank_part(hidden) if hasattr(head, "low_rank_part") else None
    low, lora_B = part or (None, None)
    return HeadLoss.apply(hidden, head.weight, targets.flatten(), low, lora_B)


def _sliceable(head: nn.Module) -> bool:
    """Is what this head computes h Wᵀ, or that and a low-rank part which it supplies by `low_rank_part`?

    Not with a bias, a weight stored transposed, hooks, or a `forward` that is neither nn.Linear's nor of the class that
    has `low_rank_part`: going past it would leave something out.
    """
    if getattr(head, "bias", None) is not None or getattr(head, "transposed", False):
        return False
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return False
    owner = next(kind for kind in type(head).__mro__ if "forward" in vars(kind))
    return owner is nn.Linear or "low_rank_part" in vars(owner)


def _logits(output: object, targets: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) and logits else logits
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != targets.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(
            f"the model must return logits (batch, time, vocabulary) for targets {tuple(targets.shape)}, alone or as "
            f"`.logits`; got {got}. Give fit a `loss` of your own for another kind of model"
        )
    return logits


class HeadLoss(torch.autograd.Function):
    """mean cross-entropy of softmax(z) against targets, in slices of 256 tokens; gradients made on the way.

    hidden h (tokens, width), weight W (vocabulary, width), targets (tokens,) → scalar. z = h Wᵀ, and with LoRA
    z = h Wᵀ + low Bᵀ for low = s · h Aᵀ (tokens, r) and lora_B (vocabulary, r): ΔW is never formed. With p =
    softmax(z), the one-hot target y and g = (p − y) / tokens: ∂/∂h = g W, ∂/∂W = gᵀ h, ∂/∂low = g B, ∂/∂B = gᵀ low.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, low: Tensor | None, lora_B: Tensor | None
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_low, needs_B = ctx.needs_input_grad
        x, table = (
            (hidden, weight) if low is None else (torch.cat([hidden, low], 1), torch.cat([weight, lora_B], 1))
        )
        width, tokens, total = hidden.shape[1], len(targets), hidden.new_zeros(())
        grad_x = torch.empty_like(x) if needs_hidden or needs_low else None
        trained = slice(0 if needs_weight else width, None if needs_B else width)  # columns of the table
        grad_table = torch.zeros_like(table[:, trained]) if needs_weight or needs_B else None
        for start in range(0, tokens, 256):
            rows, y = x[start : start + 256], targets[start : start + 256, None]
            z = rows @ table.T
            z -= z.amax(dim=1, keepdim=True)
            right = z.gather(1, y)
            sums = z.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - right).sum()
            if grad_x is not None or grad_table is not None:
                z /= sums * tokens
                z.scatter_add_(1, y, torch.full_like(right, -1 / tokens))
            if grad_x is not None:
                torch.mm(z, table, out=grad_x[start : start + 256])
            if grad_table is not None:
                grad_table.addmm_(z.T, rows[:, trained])
        ctx.width = width
        ctx.save_for_backward(grad_x, grad_table)
        return total / tokens

    @staticmethod
    def backward(ctx, grad: Tensor):
        (grad_x, grad_table), width = ctx.saved_tensors, ctx.width
        needs_hidden, needs_weight, _, needs_low, needs_B = ctx.needs_input_grad
        first = width if needs_weight else 0  # where B's columns begin in grad_table
        return (
            grad * grad_x[:, :width] if needs_hidden else None,
            grad * grad_table[:, :width] if needs_weight else None,
            None,
            grad * grad_x[:, width:] if needs_low else None,
            grad * grad_table[:, first:] if needs_B else None,
        )
