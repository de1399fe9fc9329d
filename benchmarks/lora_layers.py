"""LoRAEmbedding and LoRALinear beside loralib, PEFT and the plain torch layer, in one process.

    python benchmarks/lora_layers.py [--repeats 15] [--threads 2]

For each: the forward pass, forward and backward, and a whole training step (with Adam; SparseAdam where the
gradient is sparse). The ways take turns in an order that rotates, medians count. Writes results/lora_layers.json
and .png. Not for what the ways compute: tests/lora holds that they compute the same.
"""

import argparse
import platform
import statistics
import time
import warnings
from importlib import metadata
from pathlib import Path

import loralib
import peft
import torch
from torch import nn

from lora_edu import plots
from lora_edu.lora import LoRAEmbedding, LoRALinear, pair_optimizers, trainable_parameters
from lora_edu.paths import write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, TOKENS = 8, 16, 2048
VOCABULARIES, EMBEDDING_WIDTH = (10_000, 128_256, 1_000_000), 64
WIDTHS, ROWS = (768, 4096), 256
PLAIN, LORALIB, PEFT, OURS, SPARSE = "plain torch layer", "loralib", "PEFT", "lora_edu", "lora_edu, sparse"
MEASURES = ("forward", "forward and backward", "step")


def with_peft(layer: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])
    return peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": layer.requires_grad_(False)}))[
        "layer"
    ]


def embeddings(vocabulary: int) -> tuple[dict[str, nn.Module], torch.Tensor]:
    size = (vocabulary, EMBEDDING_WIDTH)
    layers = {
        PLAIN: nn.Embedding(*size),
        LORALIB: loralib.Embedding(*size, r=RANK, lora_alpha=ALPHA),
        PEFT: with_peft(nn.Embedding(*size)),
        OURS: LoRAEmbedding(*size, RANK, ALPHA),
        SPARSE: LoRAEmbedding(*size, RANK, ALPHA, sparse=True),
    }
    return layers, torch.randint(0, vocabulary, (8, TOKENS // 8))


def linears(width: int) -> tuple[dict[str, nn.Module], torch.Tensor]:
    layers = {
        PLAIN: nn.Linear(width, width),
        LORALIB: loralib.Linear(width, width, r=RANK, lora_alpha=ALPHA),
        PEFT: with_peft(nn.Linear(width, width)),
        OURS: LoRALinear(width, width, RANK, ALPHA),
    }
    loralib.mark_only_lora_as_trainable(layers[LORALIB])
    return layers, torch.randn(4, ROWS // 4, width, requires_grad=True)


def seconds(
    layer: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, upstream: torch.Tensor
) -> dict:
    """The gradient from above is given, as in the middle of a model; x gets one too where it can have it."""
    with torch.no_grad():
        began = time.perf_counter()
        layer(x)
        forward = time.perf_counter() - began
    optimizer.zero_grad()
    x.grad = None
    began = time.perf_counter()
    layer(x).backward(upstream)
    both = time.perf_counter() - began
    optimizer.step()
    return {"forward": forward, "forward and backward": both, "step": time.perf_counter() - began}


def measure(name: str, layers: dict[str, nn.Module], x: torch.Tensor, repeats: int) -> list[dict]:
    optimizers = {
        way: pair_optimizers(layer, 1e-4)
        if way in (OURS, SPARSE)
        else torch.optim.Adam(trainable_parameters(layer))
        for way, layer in layers.items()
    }
    upstream = torch.randn_like(layers[OURS](x))
    times = {way: {measure: [] for measure in MEASURES} for way in layers}
    order = list(layers)
    for turn in range(repeats + 2):
        for way in order:
            for key, value in seconds(layers[way], optimizers[way], x, upstream).items():
                if turn >= 2:  # the first two plan, allocate and make the optimiser's state
                    times[way][key].append(value)
        order = order[1:] + order[:1]
    rows = []
    for key in MEASURES:
        medians = {way: statistics.median(times[way][key]) for way in layers}
        peer = min((LORALIB, PEFT), key=medians.get)
        for way, median in medians.items():
            # round by round, whose ways ran next to one another; then the median
            paired = [theirs / own for theirs, own in zip(times[peer][key], times[way][key], strict=True)]
            row = {"layer": name, "way": way, "measure": key, "median_s": median}
            row |= {"faster_peer": peer, "ratio_to_faster_peer": statistics.median(paired)}
            rows.append(row)
            ratio = row["ratio_to_faster_peer"]
            print(f"{name:28} {key:21} {way:18} {1000 * median:9.3f} ms {ratio:7.2f}×", flush=True)
    return rows


def draw(rows: list[dict]) -> bytes:
    figure, axes = plots.subplots(1, 2, sharex=False)
    for axis, kind in zip(axes, ("Embedding", "Linear"), strict=True):
        own = [row for row in rows if row["measure"] == "step" and kind in row["layer"]]
        names = list(dict.fromkeys(row["layer"] for row in own))
        for place, way in enumerate((PLAIN, LORALIB, PEFT, OURS, SPARSE)):
            heights = {row["layer"]: 1000 * row["median_s"] for row in own if row["way"] == way}
            at = [names.index(name) + 0.16 * (place - 2) for name in heights]
            axis.barh(at, heights.values(), 0.15, color=plots.PALETTE[place], label=way)
        axis.set(yticks=range(len(names)), yticklabels=[name.partition(" ")[2] for name in names])
        axis.set(xscale="log", xlabel="milliseconds a training step")
        axis.invert_yaxis()
    axes[0].set_title("Embedding: sparse does not grow with V")
    axes[1].set_title("Linear: the update is a small part")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return plots.to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    rows = []
    for vocabulary in VOCABULARIES:
        name = f"Embedding {vocabulary:,} × {EMBEDDING_WIDTH}".replace(",", " ")
        rows += measure(name, *embeddings(vocabulary), options.repeats)
    for width in WIDTHS:
        rows += measure(f"Linear {width} × {width}", *linears(width), options.repeats)
    record = {
        "command": f"python benchmarks/lora_layers.py --repeats {options.repeats} --threads {options.threads}",
        "where": f"{options.threads} CPU threads, torch {torch.__version__}, loralib {metadata.version('loralib')}, "
        f"peft {peft.__version__}, {platform.system()} {platform.machine()}",
        "settings": {"rank": RANK, "tokens": TOKENS, "rows": ROWS, "dtype": "float32", "optimiser": "Adam"},
        "rows": rows,
    }
    write_json(RESULTS / "lora_layers.json", record)
    write_atomically(RESULTS / "lora_layers.png", draw(rows))


if __name__ == "__main__":
    main()
