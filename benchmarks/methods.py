"""What each way of tuning costs beside its loss: memory of a step, seconds of a step, of a token, bytes on disk.

    python benchmarks/methods.py [--repeats 3] [--rounds 15] [--layers 6] [--timed-layers 4] [--models …] [--only …]

The methods are those of the recorded runs, each at a middle size. Two models: TinyLM with its trained weights, on 4
texts of 192 tokens with fit's loss, which goes through the logits in slices; and GPT-2 (6 layers of width 768; 4 where
something is timed) with random weights, a vocabulary of 5 000, so that logits don't hide the rest, and a head of its
own, on 2 texts of 64 tokens, no dropout. Everything in float32, on one thread.

- `memory`: the most that is private to a process at any moment of two training steps, over what it had with the model
  loaded and nothing else; a process (a fork) for each method. glibc is told to give freed memory back at once
  (MALLOC_MMAP_THRESHOLD_), so that this is memory in use. Beside it what `counting.training_memory` predicts, part by
  part, less the weights that were there before. With fit's loss on TinyLM the softmax, which is never kept, is left out
  of the prediction, and the gradient of the hidden states, which is kept instead, is in it; `all logits` is the plain
  loss. The prediction adds up what is alive in a step; activations go while gradients come, so less is alive at once,
  and the logits and their gradient, temporaries, come on top.
- `steps`: seconds of processor time of a training step (loss, gradients, AdamW), methods in turns in an order that
  rotates; medians, and medians of the ratios to full tuning in the same round.
- `tokens`: afterwards. TinyLM has no cache: a token is `generate`'s whole forward pass of 64 tokens. GPT-2 has one: the
  64 tokens are read once (`reading`), then one token at a time; each timed call is one token at the same place. `cache`
  is what the cache holds.
- `disk`: bytes of what `save_tuned`, `save_adapter` or, for full tuning, the model's safetensors file takes.

Writes results/methods.json and .png. `--only` measures some of the four parts and keeps what there is of the others.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from extract import Peak, in_a_fork, memory_rows, ready_to_fork
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_edu import counting, plots, timing
from lora_edu.data import load_checkpoint
from lora_edu.lora import add_lora, lora_layers, merge_lora, save_adapter
from lora_edu.loss import next_token_loss
from lora_edu.paths import write_atomically, write_json
from lora_edu.recording.methods import apply
from lora_edu.text import format_bytes
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import fold_ia3, fold_p_tuning, save_tuned, stored_parameters

RESULTS = Path(__file__).parent / "results"
TINY, GPT2 = "TinyLM", "GPT-2"
LOSSES = {TINY: ("in slices", "all logits"), GPT2: ("all logits",)}
BATCHES = {TINY: (4, 192), GPT2: (2, 64)}
VOCABULARY = 5_000
TRAINED = {  # name → method and size
    "full": ("full", None),
    "LoRA 4": ("lora", 4),
    "LoRA everywhere 4": ("lora everywhere", 4),
    "bottleneck 8": ("bottleneck", 8),
    "BitFit": ("bitfit", None),
    "(IA)³": ("ia3", None),
    "prefix 16": ("prefix", 16),
    "prompt 16": ("prompt", 16),
    "prompt 64": ("prompt", 64),
    "P-Tuning 16": ("p-tuning", 16),
}
BASE, MERGED, UNMERGED, FOLDED = "base", "LoRA 4, merged", "LoRA 4, not merged", "(IA)³, folded"
USED = {  # name → method and size
    BASE: ("full", None),
    MERGED: ("lora", 4),
    UNMERGED: ("lora", 4),
    "bottleneck 8": ("bottleneck", 8),
    "BitFit": ("bitfit", None),
    FOLDED: ("ia3", None),
    "(IA)³, not folded": ("ia3", None),
    "prefix 16": ("prefix", 16),
    "prefix 64": ("prefix", 64),
    "prompt 16": ("prompt", 16),
    "prompt 64": ("prompt", 64),
    "P-Tuning 16, folded": ("p-tuning", 16),
}
TARGETS = {
    "lora": ["c_attn", "c_proj", "c_fc"],
    "lora everywhere": ["c_attn", "c_proj", "c_fc", "wte", "lm_head"],
}
TEXT = 64  # tokens before the one that is generated


def base(kind: str, layers: int) -> nn.Module:
    if kind == TINY:
        return TinyLM.from_state_dict(load_checkpoint("base"))
    import transformers  # here: TinyLM's own processes measure without it

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def architecture(kind: str, layers: int) -> counting.Architecture:
    if kind == TINY:
        return counting.tinylm()
    return counting.gpt2(GPT2, layers, 768, 12, VOCABULARY, tied=False)


def put_on(model: nn.Module, method: str, size: int | None) -> nn.Module:
    if method in TARGETS and not isinstance(model, TinyLM):
        torch.manual_seed(0)  # as `apply` does: merged and not merged are then the same adapter
        return add_lora(model, size, size, TARGETS[method])
    return apply(model, method, size)


def on_paper(method: str, size: int | None) -> dict:
    """A method as `counting` has it."""
    if method.startswith("lora"):
        return {"method": "lora", "rank": size, "targets": "all" if method == "lora everywhere" else "linear"}
    return {"method": method, "size": size}


def tokens(kind: str, batch: int, time: int) -> Tensor:
    vocabulary = 10_000 if kind == TINY else VOCABULARY
    return torch.randint(0, vocabulary, (batch, time), generator=torch.Generator().manual_seed(1))


def full_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(logits(model, inputs).flatten(0, 1), targets.flatten())


def training_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable = next_token_loss
) -> Callable[[], None]:
    """A function that does one step of AdamW on this batch, as `fit` does it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, inputs, targets).backward()
        optimizer.step()

    return step


def batch(kind: str) -> tuple[Tensor, Tensor]:
    texts, length = BATCHES[kind]
    ids = tokens(kind, texts, length + 1)
    return ids[:, :-1], ids[:, 1:]


# ---- memory --------------------------------------------------------------------------------------------------


def memory_here(kind: str, layers: int) -> list[dict]:
    """Every method in a fork of this process, which has the model and has done no step: what two steps take over it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, rows = base(kind, layers), []
    ready_to_fork()
    for loss in LOSSES[kind]:
        for name in TRAINED:
            peak = in_a_fork(partial(peak_of, kind, model, name, loss), f"{name} on {kind}")
            rows.append({"model": kind, "loss": loss, "way": name, "peak_bytes": peak})
    return [row | {"model_bytes": sum(4 * each.numel() for each in model.parameters())} for row in rows]


def peak_of(kind: str, model: nn.Module, name: str, loss: str) -> int:
    # What torch loads and allocates at its first step, once for all sizes, is no part of a method.
    training_step(nn.Linear(8, 8), torch.ones(2, 8), torch.ones(2, 8), lambda m, x, y: F.mse_loss(m(x), y))()
    inputs, targets = batch(kind)
    with torch.no_grad():
        model(inputs[:1, :2])
    gc.collect()
    watch = Peak()
    alone = watch.look()
    watch.most = 0
    watch.start()
    put_on(model, *TRAINED[name])
    step = training_step(model, inputs, targets, full_loss if loss == "all logits" else next_token_loss)
    for _ in range(2):
        step()
        watch.look()
    watch.going = False
    return watch.most - alone


def predicted(kind: str, name: str, layers: int, loss: str) -> dict:
    """Bytes over the model's own weights, part by part."""
    texts, length = BATCHES[kind]
    ours, way = architecture(kind, layers), on_paper(*TRAINED[name])
    memory = counting.training_memory(ours, **way, batch=texts, sequence=length)
    activations = memory.activations
    if loss == "in slices":
        activations += 4 * texts * length * (ours.width - ours.vocabulary)
    added = memory.weights - 4 * ours.parameters
    parts = {
        "added": added,
        "gradients": memory.gradients,
        "optimiser": memory.optimiser,
        "activations": activations,
    }
    return {"predicted_bytes": sum(parts.values()), "parts": parts}


def memory(kind: str, options: argparse.Namespace) -> list[dict]:
    rows = []
    for row in memory_rows(__file__, "--memory-of", kind, "--layers", str(options.layers)):
        rows.append(row | predicted(kind, row["way"], options.layers, row["loss"]))
        print(
            f"{kind:7} {row['loss']:10} {row['way']:18} {format_bytes(row['peak_bytes']):>9} at the peak, "
            f"{format_bytes(rows[-1]['predicted_bytes']):>9} predicted",
            flush=True,
        )
    return rows


# ---- time ----------------------------------------------------------------------------------------------------


def shared(model: nn.Module) -> nn.Module:
    """Another model of the same modules' kinds on the very same Parameters and buffers."""
    same = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(each): each for each in same})


def steps(kind: str, options: argparse.Namespace) -> list[dict]:
    frozen, inputs_targets = base(kind, options.timed_layers), batch(kind)
    calls = {}
    for name, (method, size) in TRAINED.items():
        own = method in ("full", "bitfit")  # these train the model's own numbers
        model = put_on(copy.deepcopy(frozen) if own else shared(frozen), method, size)
        calls[name] = training_step(model, *inputs_targets)
    return rows_of(kind, timing.in_turns(calls, options.repeats), "full", "step_over_full")


def rows_of(kind: str, seconds: dict[str, list[float]], to: str, ratio: str) -> list[dict]:
    over, rows = timing.ratios(seconds, to), []
    for name, each in seconds.items():
        rows.append(
            {"model": kind, "way": name, "median_processor_s": statistics.median(each), ratio: over[name]}
        )
        print(
            f"{kind:7} {name:20} {1000 * statistics.median(each):9.2f} ms {over[name]:6.3f} × {to}",
            flush=True,
        )
    return rows


class Reading:
    """A text that was read once, and the cache that stands for it: one more token at a time, always the same one."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor):
        output = model(input_ids=ids, use_cache=True)
        # transformers calls it `cache` or, before, `past_key_values`
        self.name = next(
            name for name in ("cache", "past_key_values") if name in signature(model.forward).parameters
        )
        self.model, self.cache = model, output[self.name]
        self.next = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def token(self) -> Tensor:
        """(1, vocabulary) logits after one more token, and the cache as it was before."""
        output = self.model(input_ids=self.next, use_cache=True, **{self.name: self.cache})
        self.cache.crop(-1)
        return output.logits[:, -1]

    def cached(self) -> int:
        return self.cache.get_seq_length()


def used(kind: str, layers: int) -> dict[str, nn.Module]:
    """Name → a model as it is used after tuning, all numbers of the method set as if trained."""
    frozen, found = base(kind, layers).eval(), {}
    for name, (method, size) in USED.items():
        own = method == "bitfit" or name in (MERGED, FOLDED)  # these change the model's own numbers
        model = put_on(copy.deepcopy(frozen) if own else shared(frozen), method, size).eval()
        if lora_layers(model) or method == "ia3":
            generator = torch.Generator().manual_seed(2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        if name == MERGED:
            merge_lora(model)
        elif name == FOLDED:
            fold_ia3(model)
        elif method == "p-tuning":
            fold_p_tuning(model)
        found[name] = model
    return found


@torch.no_grad()
def generated(kind: str, options: argparse.Namespace) -> list[dict]:
    models, ids = used(kind, options.timed_layers), tokens(kind, 1, TEXT)
    off = {
        name: float(
            (logits(models[name], ids) - logits(models[twin], ids)).abs().max()
            / logits(models[twin], ids).std()
        )
        for name, twin in ((MERGED, UNMERGED), (FOLDED, "(IA)³, not folded"))
    }
    if kind == TINY:
        calls = {name: partial(model.generate, ids[0], 1, 0.0) for name, model in models.items()}
        rows = rows_of(kind, timing.in_turns(calls, options.rounds), BASE, "token_over_base")
    else:
        reading = timing.in_turns(
            {name: partial(Reading, each, ids) for name, each in models.items()}, options.repeats
        )
        read = {name: Reading(model, ids) for name, model in models.items()}
        rows = rows_of(
            kind,
            timing.in_turns({name: each.token for name, each in read.items()}, options.rounds, warm=2),
            BASE,
            "token_over_base",
        )
        over = timing.ratios(reading, BASE)
        for row in rows:
            name = row["way"]
            row["reading_processor_s"], row["reading_over_base"] = (
                statistics.median(reading[name]),
                over[name],
            )
            row["cached_tokens"] = read[name].cached()
            row["cache_bytes"] = 4 * 2 * options.timed_layers * 768 * read[name].cached()
    for row in rows:
        if row["way"] in off:
            row["largest_difference_over_std_of_logits"] = off[row["way"]]
    return rows


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return getattr(output, "logits", output)


# ---- disk ----------------------------------------------------------------------------------------------------


def disk(kind: str, options: argparse.Namespace) -> list[dict]:
    rows, whole = [], architecture(kind, options.layers)
    for name, (method, size) in TRAINED.items():
        model = put_on(base(kind, options.layers), method, size)
        with tempfile.TemporaryDirectory() as place:
            if method == "full":
                save_file(model.state_dict(), Path(place) / "model.safetensors", metadata={"format": "pt"})
                numbers = sum(p.numel() for p in model.parameters())
            elif lora_layers(model):
                save_adapter(model, place)
                numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
            else:
                save_tuned(model, place)
                numbers = stored_parameters(model)
            files = {path.name: path.stat().st_size for path in sorted(Path(place).iterdir())}
        counted = counting.trained(whole, **on_paper(method, size))
        if counted.stored != numbers:
            raise SystemExit(f"{name} on {kind}: {numbers} numbers stored, counting says {counted.stored}")
        row = {"model": kind, "way": name, "bytes": sum(files.values()), "files": files}
        rows.append(row | {"stored": numbers, "trained": counted.parameters})
        print(f"{kind:7} {name:18} {format_bytes(row['bytes']):>9}, {numbers} numbers", flush=True)
    return rows


# ---- all of it -----------------------------------------------------------------------------------------------

PARTS = {"memory": memory, "steps": steps, "tokens": generated, "disk": disk}


@plots.style()
def draw(record: dict) -> bytes:
    figure, axes = plots.subplots(2, 2, size=(9.2, 6.4))
    for axis, kind in zip(axes[0], (TINY, GPT2), strict=True):
        rows = [row for row in record["memory"] if row["model"] == kind and row["loss"] == LOSSES[kind][0]]
        names = [row["way"] for row in rows]
        measured = [row["peak_bytes"] / 1e6 for row in rows]
        marks = [row["predicted_bytes"] / 1e6 for row in rows]
        clear = ["      " if mark > each else "" for each, mark in zip(measured, marks, strict=True)]
        texts = [f"{space}{each:.0f}" for space, each in zip(clear, measured, strict=True)]
        plots.bars(axis, names, measured, [plots.BLUE] * len(rows), texts)
        axis.plot(marks, range(len(rows)), "|", color=plots.VERMILION, markersize=13, markeredgewidth=2)
        axis.set(title=f"{kind}: memory of a step over the model", xlabel="MB (red: predicted)")
        axis.set_xlim(0, 1.25 * max(*measured, *marks))
    for axis, part, ratio, title, label in (
        (axes[1][0], "steps", "step_over_full", "a training step", "processor time over full tuning's"),
        (axes[1][1], "tokens", "token_over_base", "a generated token", "processor time over the base's"),
    ):
        own = {
            kind: {r["way"]: [r[ratio]] for r in record[part] if r["model"] == kind} for kind in (TINY, GPT2)
        }
        plots.dots_by_kind(
            axis, {kind: each for kind, each in own.items() if each}, title=title, xlabel=label
        )
        axis.axvline(1, color=plots.GREY, linewidth=1)
    return plots.to_png(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("repeats", 3), ("rounds", 15), ("layers", 6), ("timed-layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--models", nargs="+", default=[TINY, GPT2], choices=[TINY, GPT2])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, options.layers)))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given = f"--repeats {options.repeats} --rounds {options.rounds} --layers {options.layers}"
    given += f" --timed-layers {options.timed_layers}"
    head = {
        "command": f"python benchmarks/methods.py {given}",
        "where": f"1 CPU thread, torch {torch.__version__}, transformers {version('transformers')}, "
        f"{platform.system()} {platform.machine()}",
        "settings": {"texts and tokens of a step": BATCHES, "text before a token": TEXT, "dtype": "float32"},
    }
    head = json.loads(json.dumps(head))  # as it is read back
    for part in options.only:
        for kind in options.models:
            began = time.perf_counter()
            rows = PARTS[part](kind, options)
            print(f"{part} of {kind}: {time.perf_counter() - began:.0f} s", flush=True)
            keep(options.results, head, part, kind, rows)


def keep(folder: Path, head: dict, part: str, kind: str, rows: list[dict]) -> None:
    """Put the rows into the file, beside what the same settings gave before; the picture once all is there."""
    path = folder / "methods.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(earlier.get(key) == head[key] for key in head)
    record = head | {each: earlier.get(each, []) if same else [] for each in PARTS}
    others = [row for row in record[part] if row["model"] != kind]
    record[part] = sorted(rows + others, key=lambda row: row["model"] != TINY)
    write_json(path, record)
    if all({row["model"] for row in record[each]} == {TINY, GPT2} for each in PARTS):
        write_atomically(folder / "methods.png", draw(record))


if __name__ == "__main__":
    main()
