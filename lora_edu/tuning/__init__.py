"""Ways to tune a model that aren't `add_lora`'s own: one file each, a function that changes a model in place.

Not for training itself: `lora_edu.training.fit` trains whatever these leave trainable.
"""

from .applied import applied
from .bitfit import bitfit, remove_bitfit
from .bottleneck import Bottleneck, bottleneck, remove_bottleneck
from .files import load_tuned, save_tuned, stored_parameters, trained_parameters
from .frozen_A import frozen_A
from .ia3 import fold_ia3, ia3, remove_ia3
from .p_tuning import fold_p_tuning, p_tuning, remove_p_tuning
from .prefix_tuning import fold_prefix_tuning, prefix_tuning, remove_prefix_tuning
from .prompt_tuning import prompt_tuning, remove_prompt_tuning
from .subspace import Subspace, adjoint, project, remove_subspace, sparse_projection, subspace

__all__ = [
    "Bottleneck",
    "Subspace",
    "adjoint",
    "applied",
    "bitfit",
    "bottleneck",
    "fold_ia3",
    "fold_p_tuning",
    "fold_prefix_tuning",
    "frozen_A",
    "ia3",
    "load_tuned",
    "p_tuning",
    "prefix_tuning",
    "project",
    "prompt_tuning",
    "remove_bitfit",
    "remove_bottleneck",
    "remove_ia3",
    "remove_p_tuning",
    "remove_prefix_tuning",
    "remove_prompt_tuning",
    "remove_subspace",
    "save_tuned",
    "sparse_projection",
    "stored_parameters",
    "subspace",
    "trained_parameters",
]
