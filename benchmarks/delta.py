"""`lora-edu delta` beside a plain loop of full SVDs on the same pair of checkpoints: seconds and private memory.

    python benchmarks/delta.py [--model "GPT-2 L"] [--layers 3] [--threads 2]

Makes up the pair in a temporary folder (bfloat16, the model's real shapes: a third of the layers tuned in full, a
third by LoRA of rank 16 and merged, a third not at all), then runs each way in a process of its own. The loop is
what one would write: both files loaded, `torch.linalg.svdvals` of every difference in float32. It takes minutes, so
it is given the embedding and the first `--layers` layers of each third, and both are timed on these too. Where other
programs run beside it, compare processor times.
Writes results/delta.json and .png.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from lora_edu import counting, plots
from lora_edu.paths import write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
TOOL, LOOP = "lora-edu delta", "loop of full SVDs"
SHARD = 400_000_000  # parameters in one file


def make(model: str, folder: Path, layers: int | None) -> dict[str, int]:
    """Write before/ and after/, sharded with an index; returns parameters, bytes and the largest matrix."""
    generator = torch.Generator().manual_seed(0)
    shapes = counting.ARCHITECTURES[model].shapes()
    shapes = {name: shape for name, shape in shapes.items() if wanted(name, layers)}
    for side in ("before", "after"):
        (folder / side).mkdir()
    state, held, places = {"before": {}, "after": {}}, 0, {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        W = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        state["before"][name], state["after"][name] = W, change(W, name, generator)
        held += W.numel()
        if held >= SHARD or number == len(shapes):
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            for side, part in state.items():
                save_file(part, folder / side / file)
            places |= dict.fromkeys(state["before"], file)
            state, held = {"before": {}, "after": {}}, 0
    for side in ("before", "after"):
        index = json.dumps({"weight_map": places})
        (folder / side / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return {
        "parameters": sum(sizes),
        "matrices": sum(len(shape) == 2 for shape in shapes.values()),
        "bytes_of_the_pair": sum(path.stat().st_size for path in folder.glob("*/*.safetensors")),
        "largest_matrix_in_float32": 4 * max(sizes),
    }


def layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def wanted(name: str, layers: int | None) -> bool:
    number = layer_of(name)
    return layers is None or number is None or number < 3 * layers


def change(W: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    """Layer 0, 3, 6 …: tuned in full; 1, 4, 7 …: by LoRA and merged; 2, 5, 8 …: not at all. The rest in full."""
    way = (layer_of(name) or 0) % 3
    if way == 2:
        return W.clone()
    if way == 1 and W.ndim == 2:
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        update = draw(W.shape[0], 16) @ draw(16, W.shape[1]) / 4
    else:
        update = torch.randn(W.shape, generator=generator)
    return (W.float() + 0.02 * 0.03 * update).bfloat16()


def tool(folder: Path) -> None:
    from lora_edu import delta

    delta.compare(folder / "before", folder / "after", progress=iter)


def loop(folder: Path) -> None:
    before, after = (
        {
            name: W
            for file in sorted((folder / side).glob("*.safetensors"))
            for name, W in load_file(file).items()
        }
        for side in ("before", "after")
    )
    for name, W in before.items():
        if W.ndim == 2:
            torch.linalg.svdvals(after[name].float() - W.float())


def private() -> int:
    """Bytes that no other process has and that no file backs (where the system tells these apart)."""
    process = psutil.Process()
    if Path("/proc/self/smaps_rollup").exists():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return process.memory_full_info().uss


def watched(call: Callable[[Path], None], folder: Path, threads: int) -> None:
    """Run in this process and print what it took, as JSON."""
    import lora_edu.delta  # noqa: F401 - the bare import is what memory is counted from

    torch.set_num_threads(threads)
    bare, peak, done = private(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    call(folder)
    took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    done.set()
    watcher.join()
    print(json.dumps(took | {"peak_private_bytes": peak - bare}))


def measure(way: str, folder: Path, threads: int) -> dict:
    command = [sys.executable, __file__, "--run", way, "--folder", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = {"way": way} | json.loads(done.stdout)
    print(
        f"  {way:20} {row['seconds']:8.1f} s ({row['processor_seconds']:.1f} s of processor) "
        f"{row['peak_private_bytes'] / 1e6:8.0f} MB",
        flush=True,
    )
    return row


def pair(model: str, layers: int | None, ways: list[str], threads: int) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        record = make(model, folder, layers)
        what = "all layers" if layers is None else f"embedding and {3 * layers} layers"
        print(f"{model}, {what}: {record['bytes_of_the_pair'] / 1e9:.2f} GB", flush=True)
        rows = [measure(way, folder, threads) for way in ways]
    for row in rows:
        row["peak_in_largest_matrices"] = row["peak_private_bytes"] / record["largest_matrix_in_float32"]
    return {"model": model, "what": what} | record | {"rows": rows}


@plots.style()
def draw(record: dict) -> bytes:
    figure, (seconds, memory) = plots.subplots(1, 2, size=(7.2, 2.3), sharey=True)
    rows, names = [], []
    for part in record["pairs"]:
        rows += part["rows"]
        names += [f"{row['way']}\n{part['bytes_of_the_pair'] / 1e9:.1f} GB" for row in part["rows"]]
    colours = [plots.BLUE if row["way"] == TOOL else plots.GREY for row in rows]
    took = [row["processor_seconds"] for row in rows]  # what others on the machine take is not in it
    plots.bars(seconds, names, took, colours, [f"{each:.0f} s" for each in took])
    used = [row["peak_private_bytes"] / 1e6 for row in rows]
    plots.bars(memory, names, used, colours, [f"{each:.0f} MB" for each in used])
    seconds.set(xlabel="processor time (s)")
    memory.set(xlabel="peak private memory (MB)", ylim=(len(rows) - 0.5, -0.5))
    figure.suptitle(f"ΔW of {record['pairs'][0]['model']}, bfloat16: one tensor at a time, no full SVD")
    return plots.to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="GPT-2 L", help="a name of counting.ARCHITECTURES")
    parser.add_argument("--layers", type=int, default=1, help="of each third, in the part that the loop gets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=[TOOL, LOOP], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return watched(tool if options.run == TOOL else loop, options.folder, options.threads)
    pairs = [
        pair(options.model, options.layers, [TOOL, LOOP], options.threads),
        pair(options.model, None, [TOOL], options.threads),
    ]
    record = {
        "command": f'python benchmarks/delta.py --model "{options.model}" --layers {options.layers} '
        f"--threads {options.threads}",
        "where": f"{options.threads} CPU threads, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        "pairs": pairs,
    }
    write_json(RESULTS / "delta.json", record)
    write_atomically(RESULTS / "delta.png", draw(record))


if __name__ == "__main__":
    main()
