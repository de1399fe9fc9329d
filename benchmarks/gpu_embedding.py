"""The LoRA embedding on one GPU: our kernels beside loralib, PEFT, a plain look-up, torch.compile and whoever is there.

    python benchmarks/gpu_embedding.py [--minutes 7] [--repeats 15] [--rehearse]

bfloat16; forward, forward and backward, and a whole step with Adam (SparseAdam where the gradient is sparse).
CUDA events behind a short sleep, so that the time is the GPU's and not the launches'; inputs take turns and
together exceed the cache; a batch has no token twice, so that each row is read from memory; medians count.
Cases that the minutes don't suffice for are listed as left out. Writes results/gpu_embedding.json and .png.
Without a CUDA device it says so and measures nothing; --rehearse runs every line but those on tiny tables and a
CPU, with Triton's interpreter, and writes nothing. Not for what the ways compute: tests/lora holds that; nor for all
that is to be done on a card: tools/on_a_gpu.py does, and runs this as one of its parts.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which PEFT does

import torch
from torch import Tensor, nn

from lora_edu import plots
from lora_edu.counting.traffic import CARDS, gradient_bytes, look_up_bytes, look_up_operations
from lora_edu.lora import LoRAEmbedding, pair_optimizers, trainable_parameters
from lora_edu.lora.functional import plain_lora_embedding, triton_version
from lora_edu.paths import write_atomically, write_json

for absent in ("loralib", "peft", "axolotl.kernels.lora", "liger_kernel.ops.experimental.embedding"):
    with contextlib.suppress(ImportError):  # whoever is not installed takes no part
        __import__(absent)

RESULTS = Path(__file__).parent / "results"
COMMAND = "python benchmarks/gpu_embedding.py"
PLAIN, LORALIB, PEFT, COMPILED = "plain nn.Embedding", "loralib", "PEFT", "torch.compile"
OURS, SPARSE, FOUND = "lora_edu", "lora_edu, sparse", "lora_edu, tiles found"
AXOLOTL, LIGER = "axolotl", "Liger, plain"
PEERS = (LORALIB, PEFT)
LOOK_UPS = (PLAIN, LIGER)  # which add no update
MEASURES = ("forward", "forward and backward", "step")
DTYPE = torch.bfloat16
GRID = {
    "width": (4096, 2048),
    "vocabulary": (128_256, 256_000),
    "tokens": (65_536, 16_384, 4096),
    "rank": (16, 64, 8),
}
TINY = {"width": (40,), "vocabulary": (200,), "tokens": (70,), "rank": (3,)}


class Compiled(nn.Module):
    """The reference in PyTorch's own operations, compiled: what a user gets without writing a kernel."""

    compiled = staticmethod(torch.compile(plain_lora_embedding, dynamic=False))

    def __init__(self, layer: LoRAEmbedding):
        super().__init__()
        self.weight, self.lora_A, self.lora_B = layer.weight, layer.lora_A, layer.lora_B
        self.scaling = layer.scaling

    def forward(self, tokens: Tensor) -> Tensor:
        return self.compiled(tokens, self.weight, self.lora_A, self.lora_B, self.scaling)


class Axolotl(nn.Module):
    """axolotl's autograd function over PyTorch's operations; A as PEFT stores it."""

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float):
        super().__init__()
        self.function = sys.modules["axolotl.kernels.lora"].LoRA_Embedding
        self.weight, self.scaling = weight, scaling
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, tokens: Tensor) -> Tensor:
        options = (self.scaling, None, None, None, 2.0, False, False)
        return self.function.apply(tokens, self.weight, self.lora_A, self.lora_B, *options)


class Liger(nn.Module):
    """Liger's plain look-up, a Triton kernel."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.function = sys.modules["liger_kernel.ops.experimental.embedding"].LigerEmbeddingFunction
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function.apply(self.weight, tokens)


def make_ways(table: Tensor, rank: int, compiled: bool, found: bool = False) -> dict[str, nn.Module]:
    """The ways, all on one frozen table, with the same A and B, so that their results can be compared."""
    vocabulary, width = table.shape
    A, B = (torch.randn(side, rank, device=table.device).to(DTYPE) for side in table.shape)
    with torch.device("meta"):
        plain, base = (nn.Embedding(vocabulary, width, dtype=DTYPE) for _ in range(2))
        ours, sparse, tiled = (
            LoRAEmbedding(vocabulary, width, rank, 2 * rank, sparse=each, check_tokens=False, dtype=DTYPE)
            for each in (False, True, False)
        )
    for layer in (plain, base, ours, sparse, tiled):
        layer.weight = nn.Parameter(table, requires_grad=False)
    for layer in (ours, sparse):
        layer.lora_A, layer.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    tiled.lora_A, tiled.lora_B = ours.lora_A, ours.lora_B
    ways = {PLAIN: plain}
    if "loralib" in sys.modules:
        with torch.device("meta"):
            Embedding = sys.modules["loralib"].Embedding
            theirs = Embedding(vocabulary, width, r=rank, lora_alpha=2 * rank, dtype=DTYPE)
        theirs.weight = nn.Parameter(table, requires_grad=False)
        theirs.lora_A, theirs.lora_B = nn.Parameter(A.T.contiguous()), nn.Parameter(B.clone())
        ways[LORALIB] = theirs
    if "peft" in sys.modules:
        peft = sys.modules["peft"]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
        hf = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]
        hf.lora_embedding_A["default"] = nn.Parameter(A.T.contiguous())
        hf.lora_embedding_B["default"] = nn.Parameter(B.clone())
        ways[PEFT] = hf
    if "axolotl.kernels.lora" in sys.modules:
        ways[AXOLOTL] = Axolotl(table, A.T.contiguous(), B.clone(), ours.scaling)
    if "liger_kernel.ops.experimental.embedding" in sys.modules and table.is_cuda:
        ways[LIGER] = Liger(table)
    ways |= {OURS: ours, SPARSE: sparse} | ({FOUND: tiled} if found else {})
    return ways | ({COMPILED: Compiled(ours)} if compiled else {})


@contextlib.contextmanager
def tiles(found: dict) -> Iterator[None]:
    """Inside, the kernels take these measured tiles, and none other."""
    from lora_edu.lora import triton_kernels as kernels

    before = dict(kernels.MEASURED_ON), dict(kernels.MEASURED)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )

    def put(where: dict, measured: dict) -> None:
        for target, source in ((kernels.MEASURED_ON, where), (kernels.MEASURED, measured)):
            target.clear()
            target.update(source)
        kernels.nearest.cache_clear()

    put({"capability": kernels.card(device).capability}, found)
    try:
        yield
    finally:
        put(*before)


class Clock:
    """Seconds, peak memory and copying speed of a GPU; on a CPU only a rehearsal of them."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats, self.cuda = device, repeats, device == "cuda"

    def seconds(self, calls: list[Callable[[int], object]], turns: int) -> list[float]:
        """Median of each call, all taking turns; a call gets the number of its turn, to choose inputs by."""
        times = [[] for _ in calls]
        for turn in range(turns + 2):
            for place in range(len(calls)):
                which = (place + turn) % len(calls)
                taken = self.once(calls[which], turn)
                if turn >= 2:  # the first two compile, plan and allocate
                    times[which].append(taken)
        return [statistics.median(each) for each in times]

    def once(self, call: Callable[[int], object], turn: int) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call(turn)
            return time.perf_counter() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(8_000_000)  # some 4 ms, in which the CPU launches all that follows
        began.record()
        kept = call(turn)
        ended.record()
        ended.synchronize()
        del kept
        return began.elapsed_time(ended) / 1e3

    def wall(self, call: Callable[[int], object]) -> float:
        """Median seconds on the wall, launches and waits included."""
        times = []
        for turn in range(self.repeats + 2):
            self.wait()
            began = time.perf_counter()
            call(turn)
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, call: Callable[[int], object]) -> int:
        """Bytes that the call adds to what was allocated before it, at their highest."""
        if not self.cuda:
            call(0)
            return 0
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy within the card's memory: what any kernel may hope for."""
        numbers = 2**29 if self.cuda else 2**16
        source = torch.ones(numbers, dtype=DTYPE, device=self.device)
        target = torch.empty_like(source)
        return 4 * numbers / self.seconds([lambda turn: target.copy_(source)], self.repeats)[0]

    def cache(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 2**10


def measure(
    clock: Clock, table: Tensor, tokens: int, rank: int, compiled: bool, found: dict | None = None
) -> list[dict]:
    """A row a way and measure: seconds, least bytes, peak memory beside the output's own.

    found: measured tiles, which one of the ways takes; the others take those that ship.
    """
    vocabulary, width = table.shape
    ways = make_ways(table, rank, compiled, bool(found))
    optimizers = {
        way: pair_optimizers(layer, 1e-4)
        if way in (OURS, SPARSE)
        else torch.optim.Adam(trainable_parameters(layer), lr=1e-4)
        for way, layer in ways.items()
        if way not in (*LOOK_UPS, COMPILED, FOUND)
    }
    optimizers |= dict.fromkeys((COMPILED, FOUND), optimizers[OURS])  # they train OURS' factors
    output = 2 * tokens * width
    turns = max(2, min(8, -(-4 * clock.cache() // output)))  # inputs enough to fill the cache four times
    batches = [torch.randperm(vocabulary, device=table.device)[:tokens] for _ in range(turns)]
    gradients = [torch.randn(tokens, width, device=table.device).to(DTYPE) for _ in range(turns)]
    outputs: list = [None] * turns  # kept, so that results too go to memory that isn't in the cache

    def forward(layer: nn.Module, turn: int) -> None:
        with torch.no_grad():
            outputs[turn % turns] = layer(batches[turn % turns])

    def both(layer: nn.Module, turn: int) -> None:
        layer(batches[turn % turns]).backward(gradients[turn % turns])
        layer.zero_grad(set_to_none=True)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer, turn: int) -> None:
        layer(batches[turn % turns]).backward(gradients[turn % turns])
        optimizer.step()
        layer.zero_grad(set_to_none=True)

    def call(name: str, way: str, turn: int) -> None:
        with tiles(found) if way == FOUND else contextlib.nullcontext():
            if name == "forward":
                forward(ways[way], turn)
            elif name == "forward and backward":
                both(ways[way], turn)
            else:
                step(ways[way], optimizers[way], turn)

    with tiles(found or {}):
        compare({way: layer for way, layer in ways.items() if way != OURS}, batches[0])
    compare(ways, batches[0])
    rows = []
    for name in MEASURES:
        taking_part = [way for way in ways if name == "forward" or way not in LOOK_UPS]
        calls = [functools.partial(call, name, way) for way in taking_part]
        medians = clock.seconds(calls, clock.repeats)
        least = look_up_bytes(tokens, width, rank)["one pass"]
        least += 0 if name == "forward" else gradient_bytes(vocabulary, tokens, width, rank)
        for way, its_call, seconds in zip(taking_part, calls, medians, strict=True):
            outputs[:] = [None] * turns
            shape = {"vocabulary": vocabulary, "width": width, "tokens": tokens, "rank": rank}
            found = {"way": way, "measure": name, "median_s": seconds, "least_bytes": least}
            found |= {"peak_bytes": clock.peak(its_call), "output_bytes": output}
            rows.append(shape | found)
    return rows


def compare(ways: dict[str, nn.Module], tokens: Tensor) -> None:
    """Refuse to time a way that computes something else; the first thousand tokens stand for all."""
    with torch.no_grad():
        layer = next(ways[way] for way in (OURS, FOUND, SPARSE) if way in ways)
        some = tokens[:1000]
        W, A, B = layer.weight[some].float(), layer.lora_A[some].float(), layer.lora_B.float()
        exact = W + layer.scaling * A @ B.T
        for way, each in ways.items():
            apart = float(
                (each(some).float() - (W if way in LOOK_UPS else exact)).abs().max() / exact.abs().max()
            )
            if not apart < 0.03:
                raise AssertionError(f"{way} is {apart:.2g} of the largest value away from the formula")


def check_cost(clock: Clock, table: Tensor, tokens: int, rank: int) -> dict:
    """What check_tokens costs a forward pass, on the wall: it waits for the GPU."""
    layer = make_ways(table, rank, compiled=False)[OURS]
    batch = torch.randperm(table.shape[0], device=table.device)[:tokens]
    found = {"tokens": tokens, "width": table.shape[1], "rank": rank}
    for check, name in ((False, "unchecked_s"), (True, "checked_s")):
        layer.check_tokens = check
        with torch.no_grad():
            found[name] = clock.wall(lambda turn: layer(batch))
    return found


def cases(grid: dict) -> Iterator[tuple[dict, bool]]:
    """(case, is the compiled reference measured too?), what matters most first; compiling takes long."""
    for place, values in enumerate(itertools.product(*grid.values())):
        case = dict(zip(grid, values, strict=True))
        yield (
            case,
            grid is GRID
            and case["vocabulary"] == grid["vocabulary"][0]
            and (case["rank"] == 16 or place == 0),
        )


def run(clock: Clock, grid: dict, minutes: float) -> dict:
    """All cases of the grid that the minutes suffice for."""
    torch.manual_seed(0)
    until = time.monotonic() + 60 * minutes
    rows, left_out, checks, table = [], [], [], torch.empty(0, 0)
    bandwidth = clock.copy_bandwidth()
    if clock.cuda:
        print(f"copy within memory: {bandwidth / 1e9:.0f} GB/s")
    for case, compiled in cases(grid):
        if time.monotonic() > until:
            left_out.append(case)
            continue
        if table.shape != (case["vocabulary"], case["width"]):
            del table
            table = torch.randn(case["vocabulary"], case["width"], device=clock.device, dtype=DTYPE)
            checks.append(check_cost(clock, table, case["tokens"], case["rank"]))
        rows += measure(clock, table, case["tokens"], case["rank"], compiled)
        if clock.cuda:
            tell([row for row in rows if all(row[key] == value for key, value in case.items())], bandwidth)
        torch.compiler.reset()
    return {"copy_bytes_per_s": bandwidth, "rows": rows, "check_tokens": checks, "left_out": left_out}


def tell(rows: list[dict], bandwidth: float) -> None:
    shape = " ".join(f"{key} {rows[0][key]}" for key in GRID)
    for row in rows:
        share = row["least_bytes"] / row["median_s"] / bandwidth
        peers = [each for each in rows if each["measure"] == row["measure"] and each["way"] in PEERS]
        peer = min((each["median_s"] for each in peers), default=math.nan)
        extra = (row["peak_bytes"] - row["output_bytes"]) / 1e6
        print(
            f"{shape}  {row['measure']:20} {row['way']:18} {1e3 * row['median_s']:9.3f} ms"
            f" {share:6.1%} of a copy {peer / row['median_s']:6.2f}× peer, {extra:9.1f} MB beyond the output",
            flush=True,
        )


def draw(record: dict) -> bytes:
    """Forward passes below the roof that the measured copy sets, at the first width, vocabulary and tokens."""
    figure, axes = plots.subplots()
    first = record["rows"][0]
    alike = ("width", "vocabulary", "tokens", "measure")
    own = [row for row in record["rows"] if all(row[key] == first[key] for key in alike)]
    peak = next((card[1] for name, card in CARDS.items() if name.split()[0] in record["device"]), 1e15)
    plots.roofline(axes, record["copy_bytes_per_s"], peak, {})
    for way, colour in zip((LORALIB, PEFT, COMPILED, OURS), plots.PALETTE, strict=False):
        points = [row for row in own if row["way"] == way]
        work = [look_up_operations(row["tokens"], row["width"], row["rank"]) for row in points]
        x = [done / row["least_bytes"] for done, row in zip(work, points, strict=True)]
        y = [done / row["median_s"] / 1e12 for done, row in zip(work, points, strict=True)]
        axes.plot(x, y, "o", color=colour, label=way)
    axes.set_title(f"Forward pass on {record['device']}, {first['tokens']} tokens, d = {first['width']}")
    axes.legend(loc="lower right")
    return plots.to_png(figure)


def device_record() -> dict:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    names = {each.name.lower() for each in metadata.distributions() if each.name}
    there = names & {"torch", "triton", "loralib", "peft", "axolotl", "liger-kernel"}
    versions = {name: metadata.version(name) for name in sorted(there)}
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "unknown",
        "cuda": torch.version.cuda,
        "versions": versions | {"python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU; measures nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.rehearse:
        record = run(Clock("cpu", 1), TINY, options.minutes) | {"device": "no GPU"}
        draw(record)
        print(f"rehearsed {len(record['rows'])} rows; nothing measured")
        return
    if not torch.cuda.is_available() or triton_version() < (3, 5):
        print(
            "gpu_embedding needs a CUDA device and Triton 3.5 or later; there is none here, so nothing was measured"
        )
        return
    record = {"command": f"{COMMAND} --minutes {options.minutes:g} --repeats {options.repeats}"}
    record |= device_record() | {"dtype": "bfloat16", "optimiser": "Adam, SparseAdam where sparse"}
    record |= run(Clock("cuda", options.repeats), GRID, options.minutes)
    write_json(RESULTS / "gpu_embedding.json", record)
    write_atomically(RESULTS / "gpu_embedding.png", draw(record))


if __name__ == "__main__":
    main()
