"""What the course works on: text that every reader has (`corpus`), what ships, by name (`shipped`), and a table of
tunings that others published (`comparison`)."""

from lora_edu.data.comparison import counterparts, load_peft_comparison
from lora_edu.data.corpus import Corpus, load_corpus, load_package
from lora_edu.data.shipped import (
    adapter_folder,
    load_analysis,
    load_base_losses,
    load_checkpoint,
    load_deltas,
    load_encoder_runs,
    load_encoder_spectra,
    load_llm_functions,
    load_llm_memory,
    load_llm_runs,
    load_llm_spectra,
    load_methods,
    load_mixtures,
    load_regimes,
    load_sweeps,
    load_variants,
)

__all__ = [
    "Corpus",
    "adapter_folder",
    "counterparts",
    "load_analysis",
    "load_base_losses",
    "load_checkpoint",
    "load_corpus",
    "load_deltas",
    "load_encoder_runs",
    "load_encoder_spectra",
    "load_llm_functions",
    "load_llm_memory",
    "load_llm_runs",
    "load_llm_spectra",
    "load_methods",
    "load_mixtures",
    "load_package",
    "load_peft_comparison",
    "load_regimes",
    "load_sweeps",
    "load_variants",
]
