"""Full tuning: every weight is trained. The yardstick of the others."""

from torch import nn


def full(model: nn.Module) -> nn.Module:
    """Let every parameter require a gradient; returns the model."""
    return model.requires_grad_(True)
