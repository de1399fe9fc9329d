"""1, 8 and 64 adapters on one base, a batch of 64 rows: one mixed batch, switching, merged copies, and PEFT.

    python benchmarks/serving.py [--repeats 3] [--layers 2] [--models TinyLM Llama]

Two bases: TinyLM with its trained weights, and a Llama of random weights (width 576, 2 layers, 12 million parameters).
Each gets adapters of rank 8 and random factors on every linear layer and embedding, through PEFT's folders. Row i of
the batch uses adapter i mod n. The ways:

- mixed batch: `AdapterPool.use` with a name for each row, one forward pass;
- switching: `AdapterPool.use` with one name, one forward pass for each adapter and its rows;
- merged copies: a copy of the model for each adapter, W + ΔW in it, one forward pass for each copy and its rows.
  At most 8 copies are kept for timing, and come in turns where there are more adapters: together they are larger than
  the caches, so that a copy's weights are read from memory each time, as with 64;
- PEFT: `adapter_names=` with a name for each row, one forward pass.

Times are of a forward pass with 1 token a row (a step of generation, without its attention over the past) and with 4.
The ways take turns in an order that rotates, medians count. They are seconds of processor time on one thread, which
other programs beside it lengthen far less than seconds on the clock. Memory is measured in a process of its own for the
pool (mixed and switching are the same pool) and for the copies: what is private to it at its peak, up to and with 1, 8
and 64 adapters, over what the base alone took with the same batch of one token a row. Where there is not enough free
memory for the copies, only what they would take is written down. `products` holds the grouped product alone, in the two
ways between which `grouped_lora_linear` chooses. Writes results/serving.json and .png, after each base what is there; a
run of one base alone keeps what the same settings gave for the other.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import psutil
import torch
import torch.nn.functional as F
import transformers
from extract import Peak
from torch import nn

from lora_edu import plots
from lora_edu.data import load_checkpoint
from lora_edu.lora import AdapterPool, functional, read_adapter, write_adapter
from lora_edu.lora.adapter_files import Factors
from lora_edu.paths import write_atomically, write_json
from lora_edu.text import format_bytes
from lora_edu.tinylm import TinyLM

RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, ROWS, COPIES_KEPT = 8, 16, 64, 8
BASE, MIXED, SWITCHING, COPIES, PEFT = (
    "base alone",
    "mixed batch",
    "switching",
    "merged copies",
    "PEFT, mixed batch",
)
TINY, LLAMA = "TinyLM", "Llama"


def base(kind: str, layers: int) -> nn.Module:
    if kind == TINY:
        return TinyLM.from_state_dict(load_checkpoint("base")).eval().requires_grad_(False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def write_adapters(model: nn.Module, folder: Path, number: int) -> None:
    """Adapters of random factors on every embedding and linear layer but a tied head: folder/0, folder/1, …"""
    table = next(each for each in model.modules() if isinstance(each, nn.Embedding)).weight
    layers = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.Embedding) or (isinstance(each, nn.Linear) and each.weight is not table)
    }
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        made = {}
        for name, layer in layers.items():
            rows, columns = layer.weight.shape
            embedding = isinstance(layer, nn.Embedding)
            A = torch.randn((rows, RANK) if embedding else (RANK, columns), generator=generator) / RANK
            B = torch.randn(columns if embedding else rows, RANK, generator=generator)
            size = 0.1 * layer.weight.std() * RANK**0.5 / ALPHA * RANK  # ΔW a tenth as large as W
            made[name] = Factors(A, size * B, ALPHA, False, 0.0, embedding)
        write_adapter(folder / str(index), made)


def batch(model: nn.Module, tokens: int) -> torch.Tensor:
    vocabulary = next(each for each in model.modules() if isinstance(each, nn.Embedding)).num_embeddings
    return torch.randint(0, vocabulary, (ROWS, tokens), generator=torch.Generator().manual_seed(1))


def groups(adapters: int) -> dict[int, list[int]]:
    """Adapter → its rows."""
    return {index: list(range(index, ROWS, adapters)) for index in range(adapters)}


def logits(output) -> torch.Tensor:
    return getattr(output, "logits", output)


def in_groups(run, ids: torch.Tensor, adapters: int) -> torch.Tensor:
    """The rows of each adapter through `run(adapter, ids)`, put together again."""
    out = None
    for index, rows in groups(adapters).items():
        some = logits(run(index, ids[rows]))
        out = some.new_empty(ROWS, *some.shape[1:]) if out is None else out
        out[rows] = some
    return out


def merged_copy(model: nn.Module, folder: Path) -> nn.Module:
    copied = copy.deepcopy(model)
    for name, factors in read_adapter(folder).layers.items():
        layer = copied.get_submodule(name)
        merged = layer.weight.data + factors.delta_weight()
        layer.weight = nn.Parameter(merged, requires_grad=False)  # its own: a tied head keeps W
    return copied


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder, adapter_name="0", low_cpu_mem_usage=True).eval()


class Ways:
    """Every way to run one batch, with as many adapters as were asked for so far."""

    def __init__(self, model: nn.Module, folder: Path, ways: list[str], copies_kept: int = COPIES_KEPT):
        self.model, self.folder, self.ways, self.copies_kept = model, folder, ways, copies_kept
        pooled = MIXED in ways or SWITCHING in ways
        # copies that share the base's memory, since the pool, PEFT and the base leave hooks and wrappers in it
        self.pool = AdapterPool(shared(model)) if pooled else None
        self.copies: list[nn.Module] = []
        self.peft: nn.Module | None = None

    def grow(self, adapters: int) -> None:
        for index in range(len(self.pool.names) if self.pool else 0, adapters if self.pool else 0):
            self.pool.add(str(index), self.folder / str(index))
        if COPIES in self.ways:
            for index in range(len(self.copies), min(adapters, self.copies_kept)):
                self.copies.append(merged_copy(self.model, self.folder / str(index)))
        if PEFT in self.ways:
            if self.peft is None:
                self.peft = with_peft(shared(self.model), self.folder / "0")
            for index in range(len(self.peft.peft_config), adapters):
                self.peft.load_adapter(
                    self.folder / str(index), adapter_name=str(index), low_cpu_mem_usage=True
                )
            self.peft.eval()

    @torch.no_grad()
    def run(self, way: str, ids: torch.Tensor, adapters: int) -> torch.Tensor:
        names = [str(row % adapters) for row in range(ROWS)]
        if way == BASE:
            return logits(self.model(ids))
        if way == MIXED:
            with self.pool.use(names) as model:
                return logits(model(ids))
        if way == SWITCHING:
            return in_groups(self.switched, ids, adapters)
        if way == COPIES:
            return in_groups(lambda index, some: self.copies[index % len(self.copies)](some), ids, adapters)
        return logits(self.peft(ids, adapter_names=names))

    def switched(self, index: int, ids: torch.Tensor):
        with self.pool.use(str(index)) as model:
            return model(ids)


def shared(model: nn.Module) -> nn.Module:
    """Another model of the same modules' kinds on the very same Parameters and buffers."""
    same = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(each): each for each in same})


def times(kind: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    model = base(kind, options.layers)
    ways = [BASE, MIXED, SWITCHING, COPIES, PEFT]
    runs, rows = Ways(model, folder, ways[1:]), []
    for adapters in options.adapters:
        runs.grow(adapters)
        for tokens in options.tokens:
            ids, taken, order = batch(model, tokens), {way: [] for way in ways}, list(ways)
            outputs = {way: runs.run(way, ids, adapters) for way in ways}  # a first call plans and allocates
            scale = float(outputs[MIXED].abs().max())
            for _ in range(options.repeats):
                for way in order:
                    began = time.process_time()
                    runs.run(way, ids, adapters)
                    taken[way].append(time.process_time() - began)
                order = order[1:] + order[:1]
            for way in ways:
                # where copies come in turns, the first turn has the right ones
                right = [row for row in range(ROWS) if way != COPIES or row % adapters < COPIES_KEPT]
                off = float((outputs[way][right] - outputs[MIXED][right]).abs().max())
                paired = [own / mixed for own, mixed in zip(taken[way], taken[MIXED], strict=True)]
                row = {"model": kind, "adapters": adapters, "tokens_a_row": tokens, "way": way}
                row |= {"median_processor_s": statistics.median(taken[way])}
                row |= {"tokens_a_second": ROWS * tokens / row["median_processor_s"]}
                row |= {"time_over_mixed": statistics.median(paired)}
                row |= {} if way == BASE else {"largest_difference_over_largest_logit": off / scale}
                rows.append(row)
                print(
                    f"{kind:8} {adapters:3} adapters {tokens:3} tokens a row  {way:18} "
                    f"{row['tokens_a_second']:9.0f} tokens a processor second {row['time_over_mixed']:7.2f} × mixed",
                    flush=True,
                )
    return rows


def memory_here(kind: str, way: str, folder: Path, layers: int, adapters: list[int]) -> list[dict]:
    """In a process of its own: its peak with the base alone, then with 1, 8, 64 adapters."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = base(kind, layers)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    runs, rows = Ways(model, folder, [way], copies_kept=10**9), []
    watch = Peak()
    watch.start()
    ids = batch(model, 1)
    runs.run(BASE, ids, 1)
    gc.collect()
    alone = watch.look()
    for number in adapters:
        factors = number * sum(path.stat().st_size for path in (folder / "0").glob("*.safetensors"))
        row = {"model": kind, "adapters": number, "way": way, "model_bytes": size}
        row["computed_extra_bytes"] = number * size if way == COPIES else factors
        if row["computed_extra_bytes"] < 0.6 * psutil.virtual_memory().available:
            runs.grow(number)
            runs.run(way, ids, number)
            row["peak_extra_bytes"] = watch.look() - alone
        if runs.pool:
            row["adapter_bytes"] = runs.pool.adapter_bytes()
        rows.append(row)
    watch.going = False
    return rows


def memory(kind: str, way: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    line = [sys.executable, __file__, "--memory-of", kind, way, str(folder), "--layers", str(options.layers)]
    line += ["--adapters", *map(str, options.adapters)]
    said = subprocess.run(line, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    rows = json.loads(said.splitlines()[-1])
    for row in rows:
        peak = format_bytes(row["peak_extra_bytes"]) if "peak_extra_bytes" in row else "not measured"
        print(f"{kind:8} {row['adapters']:3} adapters  {way:18} {peak} at the peak", flush=True)
    return rows


def products(options: argparse.Namespace, width: int = 576) -> list[dict]:
    """The grouped product alone, with a product for each adapter and with gathered factors."""
    torch.manual_seed(0)
    rows, usual = [], functional.GATHERED
    W = torch.randn(width, width)
    for tokens in options.tokens:
        x = torch.randn(ROWS, tokens, width)
        out = F.linear(x, W)
        for adapters in options.adapters:
            A, B = torch.randn(adapters, RANK, width), torch.randn(adapters, width, RANK)
            parts = {}
            for way, most in (("a product each", 0), ("gathered", 10**9)):
                functional.GATHERED = most
                parts[way] = functional.adapter_parts(
                    [row % adapters for row in range(ROWS)], adapters, 2 * RANK * width
                )
            functional.GATHERED = usual
            if adapters == 1:  # is never gathered by itself
                parts["gathered"] = [(slice(0, ROWS), torch.zeros(ROWS, dtype=torch.int64))]
            calls = {"base product": lambda x=x: F.linear(x, W)} | {
                way: lambda each=each, x=x, A=A, B=B, out=out: functional.add_by_row(out, x, A, B, each)
                for way, each in parts.items()
            }
            row = {"width": width, "rank": RANK, "rows": ROWS, "tokens_a_row": tokens, "adapters": adapters}
            for way, call in calls.items():
                taken = []
                for turn in range(4 * options.repeats + 2):
                    began = time.process_time()
                    call()
                    if turn >= 2:
                        taken.append(time.process_time() - began)
                row[f"{way}, ms"] = 1000 * statistics.median(taken)
            rows.append(row)
            print({key: round(value, 2) for key, value in row.items()}, flush=True)
    return rows


@plots.style()
def draw(record: dict) -> bytes:
    kinds = list(dict.fromkeys(row["model"] for row in record["times"]))
    tokens = list(dict.fromkeys(row["tokens_a_row"] for row in record["times"]))
    figure, axes = plots.subplots(len(kinds), len(tokens) + 1, size=(9.2, 2.6 * len(kinds)), squeeze=False)
    colours = dict(zip((MIXED, SWITCHING, COPIES, PEFT), plots.PALETTE, strict=False)) | {BASE: plots.GREY}
    numbers = list(dict.fromkeys(row["adapters"] for row in record["times"]))
    for line, kind in zip(axes, kinds, strict=True):
        for axis, count in zip(line, tokens, strict=False):
            for way, colour in colours.items():
                own = [
                    row["tokens_a_second"]
                    for row in record["times"]
                    if (row["model"], row["tokens_a_row"], row["way"]) == (kind, count, way)
                ]
                axis.plot(numbers, own, "o-", color=colour, label=way)
            axis.set(
                title=f"{kind}, {count} token{'s' * (count > 1)} a row",
                ylabel="tokens a second of processor time",
            )
        for way in (MIXED, COPIES):
            own = [row for row in record["memory"] if (row["model"], row["way"]) == (kind, way)]
            taken = [row.get("peak_extra_bytes", row["computed_extra_bytes"]) / 1e6 for row in own]
            line[-1].plot([row["adapters"] for row in own], taken, "o-", color=colours[way])
        line[-1].set(title=f"{kind}, memory over the base", ylabel="MB")
        for axis in line:
            axis.set(xscale="log", yscale="log", xlabel="adapters")
            axis.set_xticks(numbers, numbers)
            axis.minorticks_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return plots.to_png(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("repeats", 3), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--models", nargs="+", default=[TINY, LLAMA], choices=[TINY, LLAMA])
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        kind, way, folder = options.memory_of
        print(json.dumps(memory_here(kind, way, Path(folder), options.layers, options.adapters)))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given = f"--repeats {options.repeats} --layers {options.layers} --adapters {' '.join(map(str, options.adapters))} "
    given += f"--tokens {' '.join(map(str, options.tokens))}"
    record = {
        "command": f"python benchmarks/serving.py {given}",
        "where": f"1 CPU thread, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, {platform.system()} {platform.machine()}",
        "settings": {"rank": RANK, "rows": ROWS, "copies_kept_for_timing": COPIES_KEPT, "dtype": "float32"},
        "products": products(options),
        "times": [],
        "memory": [],
    }
    with tempfile.TemporaryDirectory() as place:
        for kind in options.models:
            folder = Path(place) / kind
            write_adapters(base(kind, options.layers), folder, max(options.adapters))
            record["times"] += times(kind, folder, options)
            gc.collect()
            for way in (MIXED, COPIES):
                record["memory"] += memory(kind, way, folder, options)
            whole = with_earlier(record, options.results / "serving.json")
            write_json(options.results / "serving.json", whole)
            write_atomically(options.results / "serving.png", draw(whole))


def with_earlier(record: dict, path: Path) -> dict:
    """The record with the rows of other bases that stand in the file, if they were measured with the same settings."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(earlier.get(key) != record[key] for key in ("command", "where", "settings")):
        return record
    measured = {row["model"] for row in record["times"]}
    return record | {
        key: sorted(
            record[key] + [row for row in earlier[key] if row["model"] not in measured],
            key=lambda row: row["model"] != TINY,
        )
        for key in ("times", "memory")
    }


if __name__ == "__main__":
    main()
