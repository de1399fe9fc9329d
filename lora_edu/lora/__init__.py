"""LoRA: layers, the functions under them, and adapters added to whole models and kept on disk."""

from .functional import lora_embedding, lora_linear
from .inject import add_lora, lora_layers, merge_lora, remove_lora, trainable_parameters, unmerge_lora
from .layers import LoRAEmbedding, LoRALinear, MergeReport
from .optimizers import pair_optimizers

__all__ = [
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "add_lora",
    "lora_embedding",
    "lora_layers",
    "lora_linear",
    "merge_lora",
    "pair_optimizers",
    "remove_lora",
    "trainable_parameters",
    "unmerge_lora",
]
