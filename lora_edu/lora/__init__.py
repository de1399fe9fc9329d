"""LoRA: layers, the functions under them, and adapters added to whole models and kept on disk."""

from .combine import mix
from .extract import Extracted, extract_lora
from .functional import grouped_lora_embedding, grouped_lora_linear, lora_embedding, lora_linear
from .inject import add_lora, lora_layers, merge_lora, remove_lora, trainable_parameters, unmerge_lora
from .layers import LoRAEmbedding, LoRALinear, MergeReport
from .optimizers import pair_optimizers
from .peft_format import AdapterError, load_adapter, read_adapter, save_adapter, write_adapter
from .ranks import choose_ranks
from .resizing import resize
from .serving import AdapterPool

__all__ = [
    "AdapterError",
    "AdapterPool",
    "Extracted",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "add_lora",
    "choose_ranks",
    "extract_lora",
    "grouped_lora_embedding",
    "grouped_lora_linear",
    "load_adapter",
    "lora_embedding",
    "lora_layers",
    "lora_linear",
    "merge_lora",
    "mix",
    "pair_optimizers",
    "read_adapter",
    "remove_lora",
    "resize",
    "save_adapter",
    "trainable_parameters",
    "unmerge_lora",
    "write_adapter",
]
