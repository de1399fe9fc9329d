"""Ways to tune a model that aren't `add_lora`'s own: one file each, a function that changes a model in place.

Not for training itself: `lora_edu.training.fit` trains whatever these leave trainable.
"""

from .frozen_A import frozen_A
from .subspace import Subspace, adjoint, project, remove_subspace, sparse_projection, subspace

__all__ = [
    "Subspace",
    "adjoint",
    "frozen_A",
    "project",
    "remove_subspace",
    "sparse_projection",
    "subspace",
]
