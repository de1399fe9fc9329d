"""LoRA: layers, the functions under them, and adapters added to whole models and kept on disk."""

from .combine import mix
from .extract import Extracted, extract_lora
from .functional import grouped_lora_embedding, grouped_lora_linear, lora_embedding, lora_linear
from .inject import add_lora, lora_layers, merge_lora, remove_lora, trainable_parameters, unmerge_lora
from .layers import LoRAEmbedding, LoRALinear, LoRAQuantisedLinear, MergeReport
from .optimizers import pair_optimizers
from .peft_format import AdapterError, load_adapter, read_adapter, save_adapter, write_adapter
from .quant import Quantised, QuantisedLinear, dequantise, quantise_gguf, quantise_nf4, quantised_linear
from .quantised_models import QuantiseReport, dequantise_model, quantise_from_gguf, quantise_model
from .ranks import choose_ranks
from .resizing import resize
from .serving import AdapterPool

__all__ = [
    "AdapterError",
    "AdapterPool",
    "Extracted",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAQuantisedLinear",
    "MergeReport",
    "QuantiseReport",
    "Quantised",
    "QuantisedLinear",
    "add_lora",
    "choose_ranks",
    "dequantise",
    "dequantise_model",
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
    "quantise_from_gguf",
    "quantise_gguf",
    "quantise_model",
    "quantise_nf4",
    "quantised_linear",
    "read_adapter",
    "remove_lora",
    "resize",
    "save_adapter",
    "trainable_parameters",
    "unmerge_lora",
    "write_adapter",
]
