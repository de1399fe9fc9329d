"""Recorded rows are read without what made them."""

import subprocess
import sys

READERS = "from lora_edu.data.runs import best, by_dimension, levels, tuned_full, tuned_runs"
LOADED = f"{READERS}\nimport sys\nprint(*sorted(m for m in sys.modules if m.startswith('lora_edu')))"


def test_reading_a_row_loads_neither_training_nor_tuning_nor_lora():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "lora_edu",
        "lora_edu.data",
        "lora_edu.data.corpus",
        "lora_edu.data.runs",
        "lora_edu.data.shipped",
        "lora_edu.paths",
    ]
