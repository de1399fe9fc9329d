"""LoRA's variants, one file each: the few lines in which each differs from LoRA, and nothing else.

Those with another start or optimiser act on `add_lora`'s own layers; those that compute something else stand beside a
layer and come off, fold and are saved (`save_tuned`) like the other methods of this room.
"""

from .dora import DoRA, dora, fold_dora, remove_dora
from .pissa import pissa
from .start import as_lora
from .updates import deltas

__all__ = ["DoRA", "as_lora", "deltas", "dora", "fold_dora", "pissa", "remove_dora"]
