"""Ways to tune a model behind one call, `make_tunable`, and one file for each.

Not for training itself: `lora_edu.training.fit` trains whatever these leave trainable.
"""

from torch import nn

from .frozen import frozen_A
from .full import full
from .lora import lora
from .subspace import Subspace, adjoint, project, remove_subspace, sparse_projection, subspace

__all__ = [
    "Subspace",
    "adjoint",
    "frozen_A",
    "full",
    "lora",
    "make_tunable",
    "project",
    "remove_subspace",
    "sparse_projection",
    "subspace",
]


def make_tunable(model: nn.Module, method: str = "lora", **options) -> nn.Module:
    """Make a model ready for one way to tune it; returns the model, changed in place.

    method: "full" (every weight), "lora" (options of `lora_edu.lora.add_lora`), "frozen_A" (LoRA whose random factor
    stays as it is drawn) or "subspace" (a random subspace of `dimension` numbers). The options are those of the
    function of the same name in this package. What an optimiser should get is then
    `lora_edu.lora.trainable_parameters(model)`, and nothing else requires a gradient.

    Raises ValueError for a method that is not one of these.
    """
    methods = {"full": full, "lora": lora, "frozen_A": frozen_A, "subspace": subspace}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(map(repr, methods))}; got {method!r}")
    methods[method](model, **options)
    return model
