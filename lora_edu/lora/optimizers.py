"""Optimisers for models in which some gradients are sparse: one object that steps both kinds.

Not for choosing a learning rate.
"""

from collections.abc import Callable

import torch
from torch import nn

from .layers import LoRAEmbedding


class PairedOptimizer(torch.optim.Optimizer):
    """Two optimisers behind one: step, zero_grad, state_dict and learning-rate schedules act on both."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

    def state_dict(self) -> dict:
        """As of one optimiser: states and groups by a parameter's number, counted through all of them."""
        whole, first = {"state": {}, "param_groups": []}, 0
        for each in self.optimizers:
            part = each.state_dict()
            whole["state"] |= {first + index: values for index, values in part["state"].items()}
            for group in part["param_groups"]:
                numbers = [first + index for index in group["params"]]
                whole["param_groups"].append(group | {"params": numbers})
            first += _held(each)
        return whole

    def load_state_dict(self, state_dict: dict) -> None:
        groups, first = iter(state_dict["param_groups"]), 0
        for each in self.optimizers:
            last = first + _held(each)
            part = [next(groups) for _ in each.param_groups]
            part = [group | {"params": [index - first for index in group["params"]]} for group in part]
            state = {n - first: values for n, values in state_dict["state"].items() if first <= n < last}
            each.load_state_dict({"state": state, "param_groups": part})
            first = last
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


def _held(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def pair_optimizers(
    model: nn.Module,
    lr: float,
    dense: type[torch.optim.Optimizer] = torch.optim.Adam,
    sparse: type[torch.optim.Optimizer] = torch.optim.SparseAdam,
    sparse_lr: float | None = None,
) -> torch.optim.Optimizer:
    """An optimiser for all trainable parameters: `sparse` where the gradient is sparse, `dense` elsewhere.

    SparseAdam moves only the rows that a batch has looked up; Adam moves every row that ever had a gradient,
    at each step, by its momentum: the two are different methods wherever a token is missing from a batch. For
    SGD without momentum, which is the same either way, pass `dense=torch.optim.SGD, sparse=torch.optim.SGD`.
    `sparse_lr`: the embeddings' own learning rate. If nothing is sparse, the result is a plain `dense`
    optimiser.
    """
    embeddings = [module for module in model.modules() if isinstance(module, LoRAEmbedding) and module.sparse]
    looked_up = {id(module.lora_A): module.lora_A for module in embeddings if module.lora_A.requires_grad}
    rest = [each for each in model.parameters() if each.requires_grad and id(each) not in looked_up]
    parts = []
    if looked_up:
        parts.append(sparse(list(looked_up.values()), lr=lr if sparse_lr is None else sparse_lr))
    if rest:
        parts.append(dense(rest, lr=lr))
    if not parts:
        raise ValueError("the model has no trainable parameter; add_lora it first")
    return parts[0] if len(parts) == 1 else PairedOptimizer(*parts)
