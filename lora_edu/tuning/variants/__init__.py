"""LoRA's variants, one file each: the few lines in which each differs from LoRA, and nothing else.

Those with another start or optimiser act on `add_lora`'s own layers (rsLoRA is add_lora's `rank_stabilised`); those
that compute something else stand beside a layer and come off, fold and are saved (`save_tuned`) like the other methods
of this room.
"""

from .adalora import AdaLoRA, RankBudget, adalora, fold_adalora, orthogonality, remove_adalora
from .dora import DoRA, dora, fold_dora, remove_dora
from .lora_ga import first_gradient, lora_ga
from .lora_plus import lora_plus
from .lora_xs import LoRAXS, fold_lora_xs, lora_xs, remove_lora_xs
from .muon import Muon, orthogonalised
from .pissa import pissa
from .scaled import change_basis, scale_gradients, scaled_steps
from .start import as_lora
from .updates import deltas
from .vera import VeRA, fold_vera, remove_vera, vera

__all__ = [
    "AdaLoRA",
    "DoRA",
    "LoRAXS",
    "Muon",
    "RankBudget",
    "VeRA",
    "adalora",
    "as_lora",
    "change_basis",
    "deltas",
    "dora",
    "first_gradient",
    "fold_adalora",
    "fold_dora",
    "fold_lora_xs",
    "fold_vera",
    "lora_ga",
    "lora_plus",
    "lora_xs",
    "orthogonalised",
    "orthogonality",
    "pissa",
    "remove_adalora",
    "remove_dora",
    "remove_lora_xs",
    "remove_vera",
    "scale_gradients",
    "scaled_steps",
    "vera",
]
