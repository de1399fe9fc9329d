"""LoRA: layers, the functions under them, and adapters added to whole models and kept on disk."""

from .functional import lora_embedding, lora_linear
from .layers import LoRAEmbedding, LoRALinear, MergeReport
from .optimizers import pair_optimizers

__all__ = ["LoRAEmbedding", "LoRALinear", "MergeReport", "lora_embedding", "lora_linear", "pair_optimizers"]
