"""What the tensors of a checkpoint are to LoRA, by names and shapes alone: tables, transposed weights, ties, experts.

Nothing is read here but config.json. Which tensor of one file is which of another: delta/pairing.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_edu.delta.files import Stored, experts_of
from lora_edu.delta.pairing import EMBEDDINGS as TABLES
from lora_edu.delta.pairing import HEADS, canonical, module_of
from lora_edu.lora.extract import EMBEDDINGS

LARGEST_CONFIG = 4 * 2**20
OWN_INDICES = (
    "embed_positions",
)  # of OPT, Bart and others: computes which rows it takes, so LoRA can't follow
GATED, DOWN = "gate_up_proj", "down_proj"


def config_of(path: Path) -> dict:
    """config.json in a checkpoint's folder; empty where there is none that can be read."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_CONFIG:
            return {}
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def is_table(name: str) -> bool:
    """Whether a matrix is an nn.Embedding's, by the name of its module."""
    module = module_of(name)
    return module in EMBEDDINGS or module in TABLES or module.endswith(("_embedding", "_embeddings"))


def transposed_modules(tensors: Mapping[str, Stored]) -> set[str]:
    """Last parts of the names of modules whose weight is stored (in, out), as in GPT-2's Conv1D.

    A bias is as long as the output is wide: that tells it, of any weight that isn't square, and those named alike
    are of one kind.
    """
    votes: dict[str, int] = {}
    for name, stored in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if not name.endswith(".weight") or bias is None or len(stored.shape) != 2 or is_table(name):
            continue
        rows, columns = stored.shape
        if rows != columns and bias.shape in ((rows,), (columns,)):
            module = module_of(name)
            votes[module] = votes.get(module, 0) + (1 if bias.shape == (columns,) else -1)
    found = {module for module, count in votes.items() if count > 0}
    return found | ({"c_attn", "c_proj", "c_fc", "q_attn"} if "c_fc" in found or "c_attn" in found else set())


def tied_modules(name: str, tensors: Mapping[str, Stored], config: Mapping) -> list[str]:
    """The other modules that share a token table which the file holds once, by names of the base's class.

    A head of its own in the file, or tie_word_embeddings false, says that there is none.
    """
    if module_of(name) not in TABLES or len(tensors[name].shape) != 2:
        return []
    prefix = canonical(name).removesuffix(".weight").rpartition(".")[0]
    prefix = f"{prefix}." if prefix else ""
    known = {canonical(each): each for each in tensors}
    text = config.get("text_config")
    flag = config.get(
        "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
    )
    head = flag is not False and not any(
        module_of(each) in HEADS and tensors[each].shape == tensors[name].shape and each != name
        for each in tensors
    )
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    found = []
    if module_of(name) == "shared":
        sides = [f"{prefix}{side}." for side in ("encoder", "decoder")]
        found += [f"{side}embed_tokens" for side in sides if any(each.startswith(side) for each in known)]
    if head and architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        found.append("lm_head")
    if head and architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        roots = {"cls.predictions.": "decoder", "lm_head.": "decoder", "vocab_": "projector"}
        found += [
            f"{root}{end}" for root, end in roots.items() if any(each.startswith(root) for each in known)
        ]
    return [each for each in found if f"{each}.weight" not in known]


def is_stack(name: str, stored: Stored) -> bool:
    return len(stored.shape) == 3 and experts_of(name, stored.shape)


def is_router(layer: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether a layer chooses among experts stacked beside it: a module of its own kind, and no nn.Linear."""
    block, _, last = layer.rpartition(".")
    start = f"{block}.experts."
    return last in ("router", "gate") and any(
        canonical(name).startswith(start) and is_stack(name, stored) for name, stored in tensors.items()
    )


def stored_in_out(name: str, tensors: Mapping[str, Stored]) -> bool | None:
    """Whether a stack of experts is stored (E, in, out); None where names and shapes don't say.

    The hidden size is the side that gate_up_proj and down_proj have in common, and gate_up_proj makes two of the other.
    """
    module = name.rpartition(".")[0]
    gated, down = (tensors.get(f"{module}.{each}") for each in (GATED, DOWN))
    if gated is None or down is None or len(gated.shape) != 3 or len(down.shape) != 3:
        return None
    (_, a, b), (_, c, d) = gated.shape, down.shape
    if a == d and b == 2 * c:
        return True
    return False if b == c and a == 2 * d else None


def one_by_one(
    layer: str, experts: int, sides: tuple[int, int], tensors: Mapping[str, Stored]
) -> list[list[str]]:
    """For a stack of experts that the base's files hold one by one: for each expert the weights that its rows are of.

    gate_up_proj is gate_proj over up_proj, or w1 over w3; down_proj is w2. transformers 5 stacks what Mixtral's and
    Qwen's files hold apart, and calls Mixtral's block_sparse_moe mlp. Empty where that is not so.
    """
    block = re.sub(r"(\.base_layer)+$", "", layer).removesuffix(".experts").rpartition(".")[0]
    pattern = re.compile(rf"(?:.+\.)?{re.escape(block)}\.[^.]+\.experts\.(\d+)\.([^.]+)\.weight")
    found: dict[tuple[int, str], str] = {}
    for name in tensors:
        if match := pattern.fullmatch(canonical(name)):
            found[int(match[1]), match[2]] = name
    for parts in (("gate_proj", "up_proj"), ("w1", "w3"), ("down_proj",), ("w2",)):
        names = [[found.get((expert, part), "") for part in parts] for expert in range(experts)]
        stored = [tensors.get(name) for each in names for name in each]
        if all(each is not None and each.shape == (sides[0] // len(parts), sides[1]) for each in stored):
            return names
    return []


def expert_blocks(names: Iterable[str]) -> set[str]:
    """Modules that hold experts stored one by one: model.layers.0.block_sparse_moe."""
    found = (re.match(r"(.+)\.experts\.\d+\.[^.]+\.weight$", name) for name in names)
    return {match[1] for match in found if match}
