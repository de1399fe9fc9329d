"""`lora-edu count`: the command line alone."""

import sys
from collections.abc import Iterable, Sequence

from lora_edu.counting.adapters import count
from lora_edu.counting.architectures import ARCHITECTURES, Architecture
from lora_edu.counting.formulas import BYTES, OPTIMISERS, dtype_name, optimiser_name
from lora_edu.counting.models import architecture
from lora_edu.counting.published import published_table
from lora_edu.counting.training_step import Memory, training_flops, training_memory
from lora_edu.text import format_bytes, whole_number

BAD_INPUT = 2  # exit status: a model, a target or a number that can't be counted


def report(
    model: str | Architecture,
    targets: str | Iterable[str] = ("query", "value"),
    rank: int = 8,
    *,
    dtype: str = "bfloat16",
    optimiser: str = "adamw",
    batch: int = 1,
    sequence: int | None = None,
) -> str:
    """What `lora-edu count` prints: the adapter's parameters and file, a training step's memory and FLOPs."""
    model, dtype, optimiser = architecture(model), dtype_name(dtype), optimiser_name(optimiser)
    counted = count(model, targets, rank)
    batch = whole_number("batch", batch)
    sequence = min(model.context, 512) if sequence is None else whole_number("sequence", sequence)
    packed = BYTES[dtype] < 2
    own = "float32" if packed else dtype
    lines = [
        f"{model.name}: LoRA of rank {rank}",
        "",
        str(counted),
        "",
        f"the adapter on disk, {own}: {format_bytes(counted.bytes(own))}",
    ]
    if not model.understood:
        return "\n".join([*lines, f"(memory and FLOPs of {model.name}'s attention are not worked out)"])
    step = {"dtype": dtype, "optimiser": optimiser, "batch": batch, "sequence": sequence}
    ways = {} if packed else {"full tuning": training_memory(model, "full", **step)}
    ways["LoRA"] = training_memory(model, "lora", rank, targets, **step)
    lines += ["", f"a training step of {batch} × {sequence} tokens, {dtype}, {optimiser}:"]
    lines.append(f"{'':<13}" + "".join(f"{name:>13}" for name in (*Memory._fields, "total", "FLOPs")))
    for name, memory in ways.items():
        method = "full" if name == "full tuning" else "lora"
        work = training_flops(model, method, rank, targets, batch=batch, sequence=sequence).total
        cells = [format_bytes(part) for part in (*memory, memory.total)] + [f"{work:.2e}"]
        lines.append(f"{name:<13}" + "".join(f"{cell:>13}" for cell in cells))
    if packed:
        lines.append("(full tuning needs weights of 16 bits or more)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`lora-edu count MODEL --rank R --targets …`; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.published:
            print(published_table())
        elif options.model is None:
            print("\n".join(map(repr, ARCHITECTURES.values())))
        else:
            print(_answer(options))
    except ValueError as error:
        print(f"lora-edu count: {error}", file=sys.stderr)
        print("Nothing was counted.")  # where a pipe takes only what goes to the standard output
        return BAD_INPUT
    return 0


def _answer(options) -> str:
    return report(
        options.model,
        [part for target in options.targets for part in target.split(",") if part],
        options.rank,
        dtype=options.dtype,
        optimiser=options.optimiser,
        batch=options.batch,
        sequence=options.sequence,
    )


def _parser():
    import argparse  # here: whoever imports the formulas needs no command line

    parser = argparse.ArgumentParser(
        prog="lora-edu count", description="Parameters, bytes and FLOPs of LoRA on a model's real shapes."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="e.g. 'GPT-2 XL' or llama-3.1-8b; or your own: its config.json, or the folder that holds it; "
        "without it: the list",
    )
    parser.add_argument("--rank", type=int, default=8, help="default 8")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["query", "value"],
        metavar="TARGET",
        help="query value embedding …, a group (attention, mlp, linear, all-linear, all) or a module's name "
        "(c_attn); default: query value",
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"of the weights: {', '.join(BYTES)}; or bf16 …")
    parser.add_argument("--optimiser", "--optimizer", default="adamw", help=", ".join(OPTIMISERS))
    parser.add_argument("--batch", type=int, default=1, help="texts in a step; default 1")
    parser.add_argument(
        "--sequence", type=int, default=None, help="tokens in a text; default 512 or the context"
    )
    parser.add_argument("--published", action="store_true", help="the counts in print, recomputed")
    return parser
