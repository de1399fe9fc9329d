"""What each of LoRA's variants costs beside plain LoRA: seconds and memory of a step, what is held, bytes on disk.

    python benchmarks/variants.py [--repeats 10] [--only …]

The variants are those of the recorded runs, prepared as there (TinyLM, the blocks' matrices, r = 4 or as many trained
numbers), on the far task's 4 texts of 192 tokens with fit's loss; float32, one thread.

- `steps`: seconds of processor time of a training step (loss, gradients, clipping, the optimiser and what hangs on it),
  variants in turns in an order that rotates; medians, and medians of the ratios to LoRA in the same round. `start`:
  seconds of putting the variant on (SVDs of PiSSA and LoRA-XS, eight gradients of LoRA-GA), once.
- `memory`: the most that is private to a process at any moment of two steps, over what it had before the model was
  loaded; a process (a fork) for each variant, as in methods.py, whose notes hold here. What is made and let go while
  the variant is put on is not in it. `held` counts bytes read off the tensors after two steps: weights and what is kept
  of the old ones, gradients, and what the optimiser (and AdaLoRA's budget) remembers.
- `disk`: bytes of what `save_adapter` or `save_tuned` writes. LoRA that started in W is saved as plain LoRA of rank 2r.

Writes results/variants.json and .png. `--only` measures some of the three parts and keeps what there is of the others.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from extract import Peak, in_a_fork, memory_rows, ready_to_fork
from torch import Tensor, nn

from lora_edu import plots, timing
from lora_edu.lora import lora_layers, save_adapter
from lora_edu.loss import next_token_loss
from lora_edu.paths import write_atomically, write_json
from lora_edu.recording.methods import BATCH, CONTEXT, texts
from lora_edu.recording.variants import SIZES, prepare
from lora_edu.text import format_bytes
from lora_edu.training import Batches
from lora_edu.tuning import save_tuned
from lora_edu.tuning.variants import as_lora

RESULTS = Path(__file__).parent / "results"
LORA = "lora"
STARTED = ("pissa", "lora-ga")  # in W: what is saved is of rank 2r


def prepared(method: str) -> tuple[nn.Module, torch.optim.Optimizer, dict]:
    """A variant at its first recorded size; the rate is one at which nothing blows up."""
    about = {"task": "far", "method": method, "size": SIZES[method][0], "rate": 1e-4, "steps": 100, "seed": 0}
    return prepare(about)


def batch() -> tuple[Tensor, Tensor]:
    return Batches(texts("far")["train"], batch=BATCH, context=CONTEXT, seed=0)(0)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, told: dict) -> Callable[[], None]:
    """A function that does one step on this batch, as `fit` does it."""
    inputs, targets = batch()
    loss = told.get("loss", next_token_loss)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    budget = getattr(optimizer, "budget", None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, inputs, targets).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if budget is not None:  # always one of the steps in which it weighs and chooses
            budget.done = budget.steps // 2

    return step


# ---- memory --------------------------------------------------------------------------------------------------


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor in dictionaries, lists and the like."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors_of(key)
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of each storage once: weights (and what is kept of old ones), gradients, the optimiser's state."""
    old = [layer._weight_before for layer in model.modules() if hasattr(layer, "_weight_before")]
    budget = getattr(optimizer, "budget", None)
    parts = {
        "weights": [*model.parameters(), *model.buffers(), *tensors_of(old)],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimiser": [
            *tensors_of(list(optimizer.state.values())),
            *(
                tensors_of([list(budget.sensitivity.values()), list(budget.uncertainty.values())])
                if budget
                else ()
            ),
        ],
    }
    found = {}
    for part, tensors in parts.items():
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        found[part] = sum(each.nbytes() for each in storages.values())
    return found


def memory_here() -> list[dict]:
    """Every variant in a fork of this process, which has read the text and done no step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batch()
    ready_to_fork()
    return [{"way": method} | in_a_fork(partial(measured, method), method) for method in SIZES]


def measured(method: str) -> dict:
    # what torch loads and allocates at its first step, once for all sizes, is no part of a variant
    tiny = nn.Linear(8, 8)
    tiny(torch.ones(2, 8)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    gc.collect()
    watch = Peak()
    alone = watch.look()
    model, optimizer, told = prepared(method)
    step = step_of(model, optimizer, told)
    gc.collect()
    watch.most = 0
    watch.start()
    for _ in range(2):
        step()
        watch.look()
    watch.going = False
    return {"peak_bytes": watch.most - alone, "held": held(model, optimizer)}


def memory(options: argparse.Namespace) -> list[dict]:
    rows = memory_rows(__file__, "--memory-here")
    for row in rows:
        parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in row["held"].items())
        print(f"{row['way']:14} {format_bytes(row['peak_bytes']):>9} at the peak; held: {parts}", flush=True)
    return rows


# ---- time and disk -------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace) -> list[dict]:
    calls, start, rows = {}, {}, []
    prepared(LORA)  # reads what all need
    for method in SIZES:
        began = time.process_time()
        ready = prepared(method)
        start[method] = time.process_time() - began
        calls[method] = step_of(*ready)
    seconds = timing.in_turns(calls, options.repeats, warm=2)
    over = timing.ratios(seconds, LORA)
    for method, each in seconds.items():
        middle = statistics.median(each)
        row = {"way": method, "median_processor_s": middle, "step_over_lora": over[method]}
        rows.append(row | {"start_processor_s": start[method]})
        print(
            f"{method:14} {1000 * middle:8.1f} ms a step {over[method]:6.3f} × LoRA's; start {start[method]:.2f} s",
            flush=True,
        )
    return rows


def disk(options: argparse.Namespace) -> list[dict]:
    rows = []
    for method in SIZES:
        model = prepared(method)[0]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if method in STARTED:
            as_lora(model)
        with tempfile.TemporaryDirectory() as place:
            (save_adapter if lora_layers(model) else save_tuned)(model, place)
            size = sum(path.stat().st_size for path in Path(place).iterdir())
        rows.append({"way": method, "bytes": size, "trained": trained})
        print(f"{method:14} {format_bytes(size):>9}, {trained} numbers trained", flush=True)
    return rows


# ---- all of it -----------------------------------------------------------------------------------------------

PARTS = {"steps": steps, "memory": memory, "disk": disk}


@plots.style()
def draw(record: dict) -> bytes:
    figure, axes = plots.subplots(1, 3, size=(9.2, 3.2))
    shown = (
        ("steps", "step_over_lora", 1, "a training step", "processor time over LoRA's"),
        ("memory", "peak_bytes", 1e6, "memory of a step", "MB at the peak"),
        ("disk", "bytes", 1e3, "file", "kB"),
    )
    for axis, (part, key, unit_size, title, unit) in zip(axes, shown, strict=True):
        rows = record[part]
        values = [row[key] / unit_size for row in rows]
        texts = [f"{each:.2f}" if part == "steps" else f"{each:,.0f}" for each in values]
        plots.bars(axis, [row["way"] for row in rows], values, [plots.BLUE] * len(rows), texts)
        axis.set(title=title, xlabel=unit, xlim=(0, 1.3 * max(values)))
    return plots.to_png(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_here:
        print(json.dumps(memory_here()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = options.results / "variants.json"
    head = {
        "command": f"python benchmarks/variants.py --repeats {options.repeats}",
        "where": f"1 CPU thread, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        "settings": {
            "sizes": {name: sizes[0] for name, sizes in SIZES.items()},
            "texts": BATCH,
            "tokens": CONTEXT,
        },
    }
    for part in options.only:
        began = time.perf_counter()
        rows = PARTS[part](options)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(earlier.get(key) == head[key] for key in head)
        record = head | {each: earlier.get(each, []) if same else [] for each in PARTS} | {part: rows}
        write_json(path, record)
        if all(record[each] for each in PARTS):
            write_atomically(options.results / "variants.png", draw(record))


if __name__ == "__main__":
    main()
