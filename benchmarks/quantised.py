"""A frozen linear layer in four bits beside the float one: error, bytes, time forwards and backwards, peak memory.

    python benchmarks/quantised.py [--repeats 5]

The ways: float32 (nn.Linear, frozen); NF4 with double quantisation and GGUF's Q4_1, decoded a few rows at a time
(QuantisedLinear); NF4 decoded whole in the forward pass and kept for the backward one, which is what F.linear on a
decoded W does; and bitsandbytes' Linear4bit where it is installed. Time is processor time of one forward and one
backward pass that gives x its gradient, as under LoRA; the ways take turns, the ratio to float32 is the median of
paired rounds. Error is ‖W − Wq‖ / ‖W‖, of a normal matrix and of TinyLM's, whose rows GGUF's blocks of 32 don't fit.
Peak memory is measured in a process of its own for each way, over what it holds before the first pass: a layer of
2048 × 4096, whose float weight has 34 MB, and 16 rows.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from extract import private
from torch import nn

from lora_edu import plots
from lora_edu.data import load_checkpoint
from lora_edu.lora import QuantisedLinear, dequantise
from lora_edu.lora.quant import quantise, relative_error
from lora_edu.paths import write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
FLOAT, NF4, Q4_1, WHOLE, BNB = "float32", "NF4", "Q4_1", "NF4, decoded whole", "bitsandbytes"
SHAPES = [(1536, 576), (2048, 2048)]  # (out, in): SmolLM2's widest, and one of a model of a billion
ROWS = [16, 256]
LARGE = (2048, 4096)


class WholeDecoded(nn.Module):
    """A layer that decodes W as a whole: autograd keeps it from the forward pass to the backward one."""

    def __init__(self, layer: QuantisedLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantise(self.layer.quantised), self.layer.bias)


def layer(way: str, rows: int, columns: int) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows).requires_grad_(False)
    if way == FLOAT:
        return plain
    if way == BNB:
        import bitsandbytes

        theirs = bitsandbytes.nn.Linear4bit(columns, rows, compute_dtype=torch.float32, quant_type="nf4")
        theirs.load_state_dict(plain.state_dict())
        return theirs.requires_grad_(False).to("cpu")
    ours = QuantisedLinear.from_layer(plain, "q4_1" if way == Q4_1 else "nf4")
    return WholeDecoded(ours) if way == WHOLE else ours


def ways() -> list[str]:
    return [FLOAT, NF4, Q4_1, WHOLE, *([BNB] if importlib.util.find_spec("bitsandbytes") else [])]


def once(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x.grad = None
    out = module(x)
    out.backward(out.detach())
    return out.detach()


def times(repeats: int) -> list[dict]:
    found = []
    for rows, columns in SHAPES:
        layers = {way: layer(way, rows, columns) for way in ways()}
        for count in ROWS:
            x = torch.randn(count, columns, requires_grad=True)
            outputs = {way: once(each, x) for way, each in layers.items()}  # a first call plans and allocates
            taken, order = {way: [] for way in layers}, list(layers)
            for _ in range(repeats):
                for way in order:
                    began = time.process_time()
                    once(layers[way], x)
                    taken[way].append(time.process_time() - began)
                order = order[1:] + order[:1]
            for way in layers:
                paired = [own / float32 for own, float32 in zip(taken[way], taken[FLOAT], strict=True)]
                row = {"out": rows, "in": columns, "rows": count, "way": way}
                row |= {"median_ms": 1000 * statistics.median(taken[way])}
                row |= {"time_over_float": statistics.median(paired)}
                if way in (WHOLE, BNB):
                    off = (outputs[way] - outputs[NF4]).abs().max() / outputs[NF4].abs().max()
                    row |= {"largest_difference_to_NF4": float(off)}
                found.append(row)
                print(
                    f"{rows} × {columns}, {count:4} rows  {way:20} {row['median_ms']:8.2f} ms "
                    f"{row['time_over_float']:6.2f} × float32",
                    flush=True,
                )
    return found


def errors() -> list[dict]:
    base = load_checkpoint("base")
    trained = {name: each.float() for name, each in base.items() if each.ndim == 2 and min(each.shape) >= 64}
    matrices = {"normal": [torch.randn(1536, 576, generator=torch.Generator().manual_seed(0))]}
    matrices["TinyLM"] = list(trained.values())
    found = []
    for kind, some in matrices.items():
        for name, options in {
            "NF4": ("nf4",),
            "NF4, scales in float32": ("nf4", 64, False),
            "Q4_1": ("q4_1",),
            "Q4_0": ("q4_0",),
        }.items():
            fitting = [each for each in some if options[0] == "nf4" or each.shape[1] % 32 == 0]
            if not fitting:
                continue
            quantised = [quantise(each, *options) for each in fitting]
            off = [relative_error(each, four) for each, four in zip(fitting, quantised, strict=True)]
            size = sum(each.nbytes for each in quantised)
            row = {
                "weights": kind,
                "format": name,
                "matrices": len(off),
                "median_error": statistics.median(off),
            }
            row |= {"bits_a_number": 8 * size / sum(each.numel() for each in fitting)}
            found.append(row)
            print(
                f"{kind:8} {name:24} {row['median_error']:.4f} {row['bits_a_number']:.3f} bits a number",
                flush=True,
            )
    return found


def memory_here(way: str) -> dict:
    """In a process of its own: the most private bytes while passes run, over those before the first."""
    torch.set_num_threads(1)
    module, x = layer(way, *LARGE), torch.randn(16, LARGE[1], requires_grad=True)
    process, most, going = psutil.Process(), [0], [True]
    once(nn.Linear(8, 8), torch.randn(2, 8, requires_grad=True))  # what autograd itself takes
    held = private(process)

    def watch():
        while going[0]:
            most[0] = max(most[0], private(process))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for _ in range(8):
        once(module, x)
    going[0] = False
    watcher.join()
    stored = sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))
    return {"way": way, "stored_bytes": stored, "peak_extra_bytes": max(most[0] - held, 0)}


def memory() -> list[dict]:
    found = []
    for way in ways():
        line = [sys.executable, __file__, "--memory-of", way]
        said = subprocess.run(line, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        found.append(json.loads(said.splitlines()[-1]))
        row = found[-1]
        stored, peak = row["stored_bytes"] / 1e6, row["peak_extra_bytes"] / 1e6
        print(f"{way:20} {stored:6.1f} MB stored, {peak:6.1f} MB more at the peak", flush=True)
    return found


@plots.style()
def draw(record: dict) -> bytes:
    figure, axes = plots.subplots(1, 3, size=(9.2, 3.0))
    names = list(dict.fromkeys(row["way"] for row in record["times"]))
    colours = dict(zip(names, (plots.GREY, *plots.PALETTE), strict=False))
    shape = SHAPES[-1]
    for way in names:
        own = [row for row in record["times"] if row["way"] == way and (row["out"], row["in"]) == shape]
        axes[0].plot(
            [row["rows"] for row in own],
            [row["time_over_float"] for row in own],
            "o-",
            color=colours[way],
            label=way,
        )
    axes[0].set(
        title=f"Time, {shape[0]} × {shape[1]}", xlabel="rows of x", ylabel="time over float32", xscale="log"
    )
    axes[0].set_xticks(ROWS, ROWS)
    axes[0].minorticks_off()
    places = range(len(names))
    rows = {row["way"]: row for row in record["memory"]}
    for axis, key, title in (
        (axes[1], "stored_bytes", "Stored"),
        (axes[2], "peak_extra_bytes", "More at the peak"),
    ):
        axis.bar(places, [rows[way][key] / 1e6 for way in names], color=[colours[way] for way in names])
        axis.set(title=f"{title}, {LARGE[0]} × {LARGE[1]}", ylabel="MB")
        axis.set_xticks([])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    return plots.to_png(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of)))
        return
    torch.set_num_threads(1)
    rival = importlib.util.find_spec("bitsandbytes")
    versions = {"torch": torch.__version__}
    if rival:
        from importlib.metadata import version

        versions["bitsandbytes"] = version("bitsandbytes")
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    record = {
        "command": f"python benchmarks/quantised.py --repeats {options.repeats}",
        "where": f"1 CPU thread, {named}, {platform.system()} {platform.machine()}",
        "errors": errors(),
        "memory": memory(),
        "times": times(options.repeats),
    }
    write_json(options.results / "quantised.json", record)
    write_atomically(options.results / "quantised.png", draw(record))


if __name__ == "__main__":
    main()
