"""`lora-edu extract` beside a loop of full SVDs and what others have: processor time, memory, error over the optimum.

    python benchmarks/extract.py [--rank 16] [--hidden 2048] [--layers 2] [--vocabulary 32000] [--threads 1]
        [--mergekit PYTHON] [--peft PYTHON] [--lycoris PYTHON]

Makes up a Llama of float32 before and after a fine-tune whose ΔW has a known spectrum (σ_k = 1/k in every matrix),
in a temporary folder: 1.3 GB as it stands. Then each way runs in a process of its own and is watched from
outside. The rivals are named by the interpreters of environments of their own; none of them is imported here. The loop
is what one would write: `torch.linalg.svd` of every difference, the first r singular vectors kept.
PEFT's `convert_to_lora` takes PEFT layers, not checkpoints: it is given ΔW as a LoKr layer of one full factor. LyCORIS
does linear layers only: its own `extract_linear` is called for each. Where other programs run beside it, compare
processor times. Writes results/extract.json and .png.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_edu import plots
from lora_edu.lora import read_adapter
from lora_edu.paths import write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
OURS, LOOP, MERGEKIT = "lora-edu extract", "loop of full SVDs", "mergekit"
PEFT, LYCORIS = "PEFT convert_to_lora", "LyCORIS extract_linear"
REFLECTIONS = 6

# What runs in another interpreter: it may import only what is installed there. `factors` is each way's own.
WALK = """
import sys
from safetensors import safe_open
from safetensors.torch import save_file
before, after, out, rank = sys.argv[1:5]
made = {}
with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
    for name in old.keys():
        W = old.get_tensor(name)
        if W.ndim == 2 and (TABLES or "embed" not in name):
            B, A = factors(new.get_tensor(name) - W, int(rank))
            made[name] = B.contiguous(), A.contiguous()
save_file({f"{n}/{i}": t for n, pair in made.items() for i, t in zip("BA", pair)}, out)
"""
FACTORS = {
    LOOP: """
import torch
TABLES = True
def factors(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]
""",
    LYCORIS: """
from lycoris.utils import extract_linear
TABLES = False
def factors(delta, rank):
    (A, B, _), _ = extract_linear(delta, "fixed", rank)
    return B, A
""",
    PEFT: """
import torch
from peft import LoKrConfig, convert_to_lora, get_peft_model
TABLES = False
def factors(delta, rank):
    base = torch.nn.ModuleDict({"x": torch.nn.Linear(*delta.T.shape, bias=False)})
    config = LoKrConfig(r=max(delta.shape), alpha=max(delta.shape), target_modules=["x"], decompose_factor=1)
    model = get_peft_model(base, config)
    layer = model.base_model.model["x"]
    with torch.no_grad():
        layer.lokr_w1["default"].fill_(1.0)
        layer.lokr_w2["default"].copy_(delta)
    _, state = convert_to_lora(model, rank=rank)
    A, B = (next(t for k, t in state.items() if f"lora_{f}" in k) for f in "AB")
    return B, A
""",
}


def shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    wide = 11 * hidden // 4
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for k in range(layers):
        at = f"model.layers.{k}."
        found |= {f"{at}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        found |= {f"{at}mlp.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (hidden, wide)}
        found |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,)}


def reflected(matrix: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random Householder reflections from both sides: other singular vectors, the same singular values."""
    for _ in range(REFLECTIONS):
        for side in (0, 1):
            v = torch.randn(matrix.shape[side], generator=generator)
            v /= v.norm()
            if side:
                matrix.addr_(matrix @ v, v, alpha=-2)
            else:
                matrix.addr_(v, v @ matrix, alpha=-2)
    return matrix


def make(folder: Path, options: argparse.Namespace) -> dict:
    """before/ and after/, a file each with a config.json."""
    generator = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for name, shape in shapes(options.hidden, options.layers, options.vocabulary).items():
        W = 0.02 * torch.randn(shape, generator=generator) if len(shape) == 2 else torch.ones(shape)
        before[name] = W
        if len(shape) == 2:
            delta = torch.zeros(shape)
            k = torch.arange(min(shape))
            delta[k, k] = 1 / (k + 1.0)
            after[name] = W + reflected(delta, generator)
        else:
            after[name] = W
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": 11 * options.hidden // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.hidden // 64),
        "num_key_value_heads": max(1, options.hidden // 64),
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    for side, state in (("before", before), ("after", after)):
        (folder / side).mkdir()
        save_file(state, folder / side / "model.safetensors", metadata={"format": "pt"})
        (folder / side / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {
        "parameters": sum(each.numel() for each in before.values()),
        "matrices": sum(each.ndim == 2 for each in before.values()),
        "bytes_of_the_pair": sum(path.stat().st_size for path in folder.glob("*/model.safetensors")),
        "largest_matrix_in_float32": 4 * max(each.numel() for each in before.values()),
    }


def commands(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Way → the line that runs it."""
    before, after = (folder / side / "model.safetensors" for side in ("before", "after"))
    found = {
        OURS: [sys.executable, "-m", "lora_edu.cli", "extract", str(folder / "before"), str(folder / "after"),
               str(folder / OURS), "--rank", str(options.rank), "--quiet"],
    }  # fmt: skip
    rivals = {LOOP: sys.executable, PEFT: options.peft, LYCORIS: options.lycoris}
    for way, interpreter in rivals.items():
        if interpreter:
            out = str(folder / f"{way}.safetensors")
            found[way] = [
                interpreter,
                "-c",
                FACTORS[way] + WALK,
                str(before),
                str(after),
                out,
                str(options.rank),
            ]
    if options.mergekit:
        tool = Path(options.mergekit).with_name("mergekit-extract-lora")
        found[MERGEKIT] = [str(tool), "--model", str(folder / "after"), "--base-model", str(folder / "before"),
                           "--out-path", str(folder / MERGEKIT), "--max-rank", str(options.rank), "--embed-lora",
                           "--no-copy-tokenizer", "--quiet"]  # fmt: skip
    return found


def private(process: psutil.Process) -> int:
    """Bytes that no other process has and that no file backs, where the system tells these apart."""
    place = Path(f"/proc/{process.pid}/smaps_rollup")
    try:
        if place.exists():
            lines = place.read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
        return process.memory_full_info().uss
    except (OSError, StopIteration, psutil.Error):
        return 0  # it has just ended


class Peak(threading.Thread):
    """Looks at the private memory of this process a hundred times a second, and remembers the most."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.most, self.going = psutil.Process(), 0, True

    def look(self) -> int:
        self.most = max(self.most, private(self.process))
        return self.most

    def run(self):
        while self.going:
            self.look()
            time.sleep(0.01)


def memory_rows(*line: str) -> list[dict]:
    """The rows that a program prints as JSON in its last line: one that forks, with one thread and an allocator that
    gives memory back. SystemExit where the system doesn't fork."""
    if not hasattr(os, "fork"):
        raise SystemExit(
            "memory is measured in forks, which this system doesn't have; leave it out with --only"
        )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *line],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def ready_to_fork() -> None:
    """Loads what torch loads at its first step, once for all forks; no backward pass, which forks can't share."""
    small = torch.nn.Parameter(torch.zeros(1))
    small.grad = torch.zeros(1)
    torch.optim.AdamW([small]).step()


def in_a_fork(do: Callable[[], object], what: str) -> object:
    """What do() returns, by way of JSON, in a process of its own that has all that this one has; SystemExit with
    `what` where it fails."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(do()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)  # never back into the parent's loop
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1] or not said:
        raise SystemExit(f"{what} failed")
    return json.loads(said)


def watched(command: list[str], threads: int) -> dict:
    """Seconds, processor seconds and peak private memory of a program; what it printed where it failed."""
    settings = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    began, peak, used = time.perf_counter(), 0, 0.0
    with tempfile.TemporaryFile() as said:
        environment = os.environ | settings | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        running = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        process = psutil.Process(running.pid)
        while running.poll() is None:
            peak = max(peak, private(process))
            with contextlib.suppress(psutil.Error):
                used = sum(process.cpu_times()[:2])
            time.sleep(0.02)
        said.seek(0)
        output = said.read().decode("utf-8", "replace")
    row = {"seconds": time.perf_counter() - began, "processor_seconds": used, "peak_private_bytes": peak}
    return row | ({"failed": output[-600:]} if running.returncode else {})


def factors(way: str, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensor → (left, right) with left right for its ΔW, as a way wrote it."""
    if way in (OURS, MERGEKIT):
        found = {}
        for name, each in read_adapter(folder / way).layers.items():
            left, right = each.products()[0]
            found[f"{name}.weight"] = each.scaling * left.float(), right.float()
        return found
    held = load_file(folder / f"{way}.safetensors")
    return {
        name.removesuffix("/A"): (held[name.removesuffix("A") + "B"], held[name])
        for name in held
        if name.endswith("/A")
    }


def errors(way: str, folder: Path, rank: int) -> dict:
    """How far each ΔW is missed, over the least that its known spectrum allows at this rank."""
    made, ratios = factors(way, folder), {}
    with (
        safe_open(folder / "before" / "model.safetensors", "pt") as old,
        safe_open(folder / "after" / "model.safetensors", "pt") as new,
    ):
        for name in old.keys():  # noqa: SIM118 (not a dictionary)
            if name not in made:
                continue
            left, right = made[name]
            missed = new.get_tensor(name) - old.get_tensor(name)
            missed.addmm_(left, right, alpha=-1)
            k = torch.arange(rank + 1, min(missed.shape) + 1, dtype=torch.float64)
            ratios[name] = float(torch.linalg.vector_norm(missed, dtype=torch.float64)) / math.sqrt(
                float((1 / k).square().sum())
            )
    return {
        "matrices": len(ratios),
        "entries": sum(made[name][0].shape[0] * made[name][1].shape[1] for name in ratios),
        "worst_error_over_optimal": max(ratios.values()),
        "mean_error_over_optimal": sum(ratios.values()) / len(ratios),
    }


def measure(way: str, command: list[str], folder: Path, options: argparse.Namespace, largest: int) -> dict:
    bare = watched(
        [command[0] if way != MERGEKIT else options.mergekit, "-c", "import torch"], options.threads
    )
    row = {"way": way} | watched(command, options.threads)
    row["peak_private_bytes"] -= bare["peak_private_bytes"]
    row["peak_in_largest_matrices"] = row["peak_private_bytes"] / largest
    row["processor_seconds_to_import_torch"] = bare["processor_seconds"]
    if "failed" not in row:
        row |= errors(way, folder, options.rank)
    print(
        f"  {way:24} {row['processor_seconds']:8.1f} s of processor  {row['peak_in_largest_matrices']:5.2f} largest "
        f"matrices  {row.get('worst_error_over_optimal', math.nan):.5f} of the optimum at worst"
        + (f"\n{row['failed']}" if "failed" in row else ""),
        flush=True,
    )
    return row


@plots.style()
def draw(record: dict) -> bytes:
    rows = [row for row in record["rows"] if "failed" not in row]
    figure, (seconds, memory) = plots.subplots(1, 2, size=(7.2, 0.5 + 0.4 * len(rows)), sharey=True)
    names = [row["way"] for row in rows]
    colours = [plots.BLUE if row["way"] == OURS else plots.GREY for row in rows]
    rates = [1e-6 * row["entries"] / row["processor_seconds"] for row in rows]
    plots.bars(seconds, names, rates, colours, [f"{each:.3g}" for each in rates])
    used = [row["peak_in_largest_matrices"] for row in rows]
    plots.bars(memory, names, used, colours, [f"{each:.1f}" for each in used])
    seconds.set(xlabel="million entries a second of processor time")
    memory.set(xlabel="peak memory (largest matrices)", ylim=(len(rows) - 0.5, -0.5))
    size = record["bytes_of_the_pair"] / 1e9
    figure.suptitle(f"An adapter of rank {record['rank']} out of a pair of {size:.1f} GB")
    return plots.to_png(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rank", 16), ("hidden", 2048), ("layers", 2), ("vocabulary", 32000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("mergekit", "peft", "lycoris"):
        parser.add_argument(
            f"--{name}", metavar="PYTHON", help=f"the interpreter of an environment with {name}"
        )
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        record = make(folder, options)
        print(f"{record['bytes_of_the_pair'] / 1e9:.2f} GB, {record['matrices']} matrices", flush=True)
        largest = record["largest_matrix_in_float32"]
        rows = [
            measure(way, line, folder, options, largest) for way, line in commands(folder, options).items()
        ]
    loop = next(row for row in rows if row["way"] == LOOP)
    for row in rows:
        if "entries" in row:
            rates = [each["processor_seconds"] / each["entries"] for each in (loop, row)]
            row["times_faster_than_the_loop"] = rates[0] / rates[1]
    given = [
        f"--{name} {getattr(options, name)}" for name in ("rank", "hidden", "layers", "vocabulary", "threads")
    ]
    record |= {
        "command": f"python benchmarks/extract.py {' '.join(given)}",
        "where": f"{options.threads} CPU threads, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        "rank": options.rank,
        "rows": rows,
        "not_run": {
            "gradience": "audits and truncates adapters; it extracts none from checkpoints (0.11.0)",
            "afterburn": "compares checkpoints; it writes no adapter (0.6.3)",
        },
    }
    write_json(options.results / "extract.json", record)
    write_atomically(options.results / "extract.png", draw(record))


if __name__ == "__main__":
    main()
