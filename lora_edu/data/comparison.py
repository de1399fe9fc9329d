"""How 63 tunings of Llama-3.2-3B came out that PEFT's authors published, and which of them stand for our methods.

Nothing here was measured for the course: data/peft_metamathqa.csv is a copy (data/README.md).
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping

from lora_edu.data.shipped import data_file

FILE = "peft_metamathqa.csv"
SOURCE = "huggingface/peft, method_comparison/MetaMathQA/results/*.json at commit 5d602fd (Apache-2.0), one row a run"
# Method as the recorded runs have it → (PEFT's name of it, what a run's name says). LoRA's plain runs are those whose
# name says a rank and no more: "lora" in that table holds DoRA, LoRA-FA and others, too.
COUNTERPARTS = {
    "full": ("full-finetuning", ""),
    "lora": ("lora", r"-rank\d+$"),
    "lora, rsLoRA": ("lora", r"-rank\d+-rslora$"),
    "lora, MLPs alone": ("lora", r"-rank\d+-target-mlp$"),
    "ia3": ("ia3", ""),
    "prefix": ("prefixtuning", ""),
    "prompt": ("prompt_tuning", ""),
    "p-tuning": ("ptuning", ""),
}


def load_peft_comparison() -> list[dict]:
    """The rows of data/peft_metamathqa.csv, the most accurate first: published tunings of Llama-3.2-3B, one seed each.

    A row: method, run (PEFT's names), accuracy (share of GSM8K's test questions answered right after 5 000 steps of
    4 texts of MetaMathQA), trained, total (parameters; total with the method's own), memory (the most that the
    accelerator held, bytes), seconds (of training), file_bytes (of the adapter), rank, alpha, scaling. rank and alpha
    are None where the method has none. scaling: LoRA's s, alpha / rank or, for rsLoRA, alpha / √rank; None for others.
    Source: huggingface/peft, method_comparison/MetaMathQA at commit 5d602fd.
    """
    with data_file(FILE).open(encoding="utf-8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def counterparts(rows: Iterable[Mapping]) -> dict[str, Mapping]:
    """Our method → the most accurate of the published runs that are this method (`COUNTERPARTS` says which are).

    "lora" is LoRA with its usual scaling on PEFT's usual matrices (query and value). "lora, rsLoRA" is apart because it
    has another scaling, 8 against 2, so that the two differ in more than their rank; "lora, MLPs alone" because it
    sits on other matrices. Bottleneck adapters and BitFit are not in the table. The best of several runs is picked on
    the accuracy that it is then shown with, which flatters methods with many runs. Raises ValueError for a method of
    which `rows` has no run.
    """
    rows, found = list(rows), {}
    for name, (method, pattern) in COUNTERPARTS.items():
        runs = [row for row in rows if row["method"] == method and re.search(pattern, row["run"])]
        if not runs:
            raise ValueError(
                f"no row is a published run of {name}; give counterparts all of load_peft_comparison()"
            )
        found[name] = max(runs, key=lambda row: row["accuracy"])
    return found


def _row(line: Mapping[str, str]) -> dict:
    rank, alpha = (int(line[name]) if line[name] else None for name in ("rank", "alpha"))
    scaling = None
    if line["method"] == "lora":
        scaling = alpha / (math.sqrt(rank) if line["run"].endswith("-rslora") else rank)
    return {
        "method": line["method"],
        "run": line["run"],
        "accuracy": float(line["test_accuracy"]),
        "trained": int(line["trainable_params"]),
        "total": int(line["total_params"]),
        "memory": int(line["accelerator_memory_max_bytes"]),
        "seconds": float(line["train_time_s"]),
        "file_bytes": int(line["adapter_file_bytes"]),
        "rank": rank,
        "alpha": alpha,
        "scaling": scaling,
    }
