"""What LoRA and other ways to tune cost on paper: parameters, bytes and FLOPs, for any shape and for known models.

Plain Python, no torch: it starts at once and runs anywhere. It measures nothing; chapter 04 does.
"""

from lora_edu.counting.adapters import GROUPS, Count, Row, adapted, count
from lora_edu.counting.architectures import (
    ARCHITECTURES,
    Architecture,
    Entry,
    Matrix,
    bert,
    deberta,
    gpt2,
    gpt3,
    llama,
    tinylm,
)
from lora_edu.counting.command import main, report
from lora_edu.counting.formulas import (
    BYTES,
    OPTIMISERS,
    backward_flops,
    break_even_rank,
    forward_flops,
    lora_parameters,
    optimiser_bytes,
    share,
    size,
    spaced,
)
from lora_edu.counting.methods import METHODS, Trained, trained
from lora_edu.counting.models import architecture, from_config, read_config
from lora_edu.counting.published import Published, published_counts, published_table
from lora_edu.counting.training_step import Flops, Memory, saved_numbers, training_flops, training_memory

__all__ = [
    "ARCHITECTURES",
    "BYTES",
    "GROUPS",
    "METHODS",
    "OPTIMISERS",
    "Architecture",
    "Count",
    "Entry",
    "Flops",
    "Matrix",
    "Memory",
    "Published",
    "Row",
    "Trained",
    "adapted",
    "architecture",
    "backward_flops",
    "bert",
    "break_even_rank",
    "count",
    "deberta",
    "forward_flops",
    "from_config",
    "gpt2",
    "gpt3",
    "llama",
    "lora_parameters",
    "main",
    "optimiser_bytes",
    "published_counts",
    "published_table",
    "read_config",
    "report",
    "saved_numbers",
    "share",
    "size",
    "spaced",
    "tinylm",
    "trained",
    "training_flops",
    "training_memory",
]
