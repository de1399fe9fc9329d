"""What there is to find out on a GPU, part by part: items that are run one at a time, each with its inputs noted.

Not for the order, the time and the files of a run: on_a_gpu.py has these. A part is a generator of items; it is given
the list of what its earlier items found, so that a later item can build on it, also after a restart.
"""

import functools
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import gpu_embedding
import kernel_cases
import torch
import torch.nn.functional as F
from gpu_compile import Compiler, Variant
from torch import Tensor, nn

from lora_edu.counting.traffic import linear_bytes, linear_operations
from lora_edu.lora import LoRAEmbedding, LoRALinear, pair_optimizers
from lora_edu.lora import triton_kernels as kernels
from lora_edu.lora.functional import plain_lora_embedding
from lora_edu.lora.triton_kernels import Blocks
from lora_edu.paths import REPOSITORY

HEADLINE = {"width": 4096, "tokens": 65_536, "rank": 16, "dtype": "bfloat16"}
SHAPES = (  # tiles are looked for at these, the first most thoroughly
    HEADLINE,
    HEADLINE | {"tokens": 4096},
    HEADLINE | {"rank": 64},
    HEADLINE | {"rank": 8},
    HEADLINE | {"width": 2048},
    HEADLINE | {"dtype": "float32", "tokens": 16_384},
)
TINY = {"width": 40, "tokens": 70, "rank": 3, "dtype": "bfloat16"}
GAIN = 1.02  # a tile that wins by less than this over the one that ships does not replace it


class Item(NamedTuple):
    inputs: dict  # what is tried, enough to try it again
    run: Callable[[], object]  # says what was found


class Session:
    """What the parts share: the device, the clock, the compilers, the last table; small and on a CPU to rehearse."""

    def __init__(self, rehearse: bool, records: dict[str, dict], capability: int, processes: int):
        self.rehearse, self.records = rehearse, records
        self.device = "cpu" if rehearse else "cuda"
        self.clock = gpu_embedding.Clock(self.device, 1 if rehearse else 15)
        self.compiler = Compiler(capability, processes)
        self.until = float("inf")  # when the present part's time is over
        self._table = torch.empty(0, 0)

    def table(self, vocabulary: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same random table for all that ask for its shape one after the other; only one is held."""
        if self._table.shape != (vocabulary, width) or self._table.dtype != dtype:
            self._table = torch.empty(0, 0)
            self._table = torch.randn(vocabulary, width, device=self.device, dtype=dtype)
        return self._table

    def vocabulary(self) -> int:
        return 200 if self.rehearse else 128_256

    def ask_ahead(self) -> None:
        """Have everything compiled that is known to be needed, in the order of need."""
        for number, case in enumerate(correct_cases(self)):
            self.compiler.ask_case(number, case)
        for variant in tile_variants(self):
            self.compiler.ask(variant)


# (a) the device


def device(session: Session, found: list) -> Iterator[Item]:
    yield Item({"what": "device"}, functools.partial(about_the_device, session))
    yield Item({"what": "copy"}, lambda: {"copy_bytes_per_s": session.clock.copy_bandwidth()})


def about_the_device(session: Session) -> dict:
    if session.rehearse:
        return {"device": "no GPU", "capability": [9, 0], "date": time.strftime("%Y-%m-%d")}
    properties = torch.cuda.get_device_properties(0)
    return gpu_embedding.device_record() | {
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cpu_cores": os.cpu_count(),
    }


# (b) right?


def correct_cases(session: Session) -> list[dict]:
    draw = random.Random(0)
    cases = [kernel_cases.configuration(draw) for _ in range(3 if session.rehearse else 60)]
    if not session.rehearse:
        for dtype, deterministic in itertools.product(kernel_cases.DTYPES, (False, True)):
            case = {"vocabulary": 70, "width": 150, "rank": 256, "shape": (90,), "dtype": dtype}
            cases.append(case | {"factor_dtype": dtype, "deterministic": deterministic} | kernel_cases.LARGE)
    return cases


def correctness(session: Session, found: list) -> Iterator[Item]:
    for number, case in enumerate(correct_cases(session)):
        words = {
            key: value if isinstance(value, int | bool | None) else str(value) for key, value in case.items()
        }
        yield Item(words, functools.partial(compare_with_float64, session, number, case))
    chosen = "bit_for_bit" if session.rehearse else "not one_hot"
    yield Item(
        {"pytest": "tests/lora/kernel_cases.py", "chosen": chosen},
        lambda: run_pytest(chosen, 300 if session.rehearse else 50),
    )


def compare_with_float64(session: Session, number: int, case: dict) -> dict:
    session.compiler.ask_case(number, case).result()
    errors = kernel_cases.errors(case)
    longer_sums = 4 if case["rank"] == 256 else 1
    for name, error in errors.items():
        allowed = longer_sums * kernel_cases.tolerance(case, name)
        if not error <= allowed:
            raise AssertionError(
                f"{name} is {error:.3g} of the largest sum away from float64, {allowed:.3g} allowed"
            )
    return errors


def run_pytest(chosen: str, patience: float = 50) -> dict:
    """The named cases, in a process of their own, as tests/lora/test_triton_kernels.py runs them."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-W", "ignore")
    file = REPOSITORY / "tests" / "lora" / "kernel_cases.py"
    paths = (str(REPOSITORY), str(file.parent), os.environ.get("PYTHONPATH", ""))
    command = [sys.executable, "-m", "pytest", *options, "-k", chosen, str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired as late:  # what it had found until then
        return {"unfinished_s": patience, "said": str(late.stdout)[-2000:]}
    if done.returncode:
        raise AssertionError(done.stdout[-6000:] + done.stderr[-2000:])
    return {"said": done.stdout.strip().splitlines()[-1]}


# (c) which tiles?


def forward_candidates(rank: int, itemsize: int, thorough: bool) -> list[Blocks]:
    """Tiles of 16 to 64 numbers a thread (bfloat16); fewer of them where one is not thorough."""
    block_r = kernels.at_most({2: 32, 4: 16}[itemsize], rank)
    sides = itertools.product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8))
    least, most = ((16, 64) if thorough else (32, 64)) if itemsize == 2 else (8, 32)
    return [
        Blocks(tokens, columns, block_r, warps, 3)
        for tokens, columns, warps in sides
        if least <= tokens * columns / (32 * warps) <= most and (thorough or 32 <= tokens <= 64)
    ]


def backward_candidates(rank: int, itemsize: int, thorough: bool) -> list[Blocks]:
    """Tiles whose sums fit into registers and whose stages of G fit into shared memory (of an H100: 227 kB)."""
    block_r = kernels.at_most(256, rank)
    sides = itertools.product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8), (2, 3, 4) if thorough else (3,))
    return [
        Blocks(tokens, columns, block_r, warps, stages, programs=4)
        for tokens, columns, warps, stages in sides
        if 8 <= columns * block_r / (32 * warps) <= 64
        and tokens * columns / (32 * warps) <= 64
        and 32_768 <= stages * tokens * columns * itemsize <= 200_000
        and (thorough or 32 <= tokens <= 64)
    ]


CANDIDATES = {"forward": forward_candidates, "backward": backward_candidates}


def refinements(kernel: str, best: Blocks) -> list[Blocks]:
    """The best tile with hints to the cache, another order, other numbers of programs."""
    if kernel == "backward":
        some = [best._replace(programs=programs) for programs in (1, 2, 3, 6, 8)]
        return [*some, best._replace(hints=True), best._replace(hints=True, programs=2)]
    persistent = itertools.product((2, 3, 4, 6, 8), (1, 2, 3))
    return [
        best._replace(hints=True),
        best._replace(columns_first=True),
        best._replace(columns_first=True, hints=True),
        *(best._replace(programs=programs, stages=stages) for programs, stages in persistent),
    ]


def shapes(session: Session) -> tuple[dict, ...]:
    return (TINY,) if session.rehearse else SHAPES


def shipped(kernel: str, shape: dict) -> Blocks:
    rule = kernels.forward_blocks if kernel == "forward" else kernels.backward_blocks
    return rule(shape["width"], shape["rank"], getattr(torch, shape["dtype"]))


def first_tiles(session: Session, kernel: str, shape: dict) -> list[Blocks]:
    itemsize = getattr(torch, shape["dtype"]).itemsize
    thorough = shape | {"tokens": 0} == HEADLINE | {"tokens": 0}
    those = CANDIDATES[kernel](shape["rank"], itemsize, thorough)
    those = those[:2] if session.rehearse else those
    return [shipped(kernel, shape), *(each for each in those if each != shipped(kernel, shape))]


def tile_variants(session: Session) -> list[Variant]:
    """All that the search compiles before it knows which tile is best, and what the best of the rules' would add."""
    variants = []
    for shape, kernel in itertools.product(shapes(session), CANDIDATES):
        tiles = first_tiles(session, kernel, shape)
        variants += [
            Variant(kernel, shape["dtype"], shape["rank"], shape["width"], as_compiled(each))
            for each in tiles
        ]
    return list(dict.fromkeys(variants))


def as_compiled(blocks: Blocks) -> Blocks:
    """One stands for all that differ in their number of programs alone, which nothing is compiled for."""
    return blocks._replace(programs=min(1, blocks.programs))


def tiles(session: Session, found: list) -> Iterator[Item]:
    for shape in shapes(session):
        for kernel in CANDIDATES:
            asked = {"kernel": kernel} | shape
            for blocks in first_tiles(session, kernel, shape):
                yield tile_item(session, asked, blocks)
            best = ranking(found, asked)[:1] or [shipped(kernel, shape)]
            more = refinements(kernel, best[0])
            more = more[:: len(more) - 1] if session.rehearse else more
            for blocks in more if time.time() < session.until else ():
                session.compiler.ask(variant_of(asked, blocks))
            for blocks in more:
                yield tile_item(session, asked, blocks)
            yield Item(asked | {"what": "in turns"}, functools.partial(in_turns, session, asked, found))
        session.trial = None
    session.compiler.forget()


def variant_of(asked: dict, blocks: Blocks) -> Variant:
    return Variant(asked["kernel"], asked["dtype"], asked["rank"], asked["width"], as_compiled(blocks))


def tile_item(session: Session, asked: dict, blocks: Blocks) -> Item:
    return Item(asked | {"blocks": list(blocks)}, functools.partial(time_tile, session, asked, blocks))


def ranking(found: list, asked: dict) -> list[Blocks]:
    """The tiles tried for this kernel and shape, the fastest first."""
    tried = [
        (each["found"]["median_s"], each["inputs"]["blocks"])
        for each in found
        if "found" in each and each["inputs"].items() >= asked.items() and "blocks" in each["inputs"]
    ]
    return [Blocks(*blocks) for _, blocks in sorted(tried)]


class Trial:
    """Inputs of one shape, enough to fill the cache four times, and what the shipped tiles make of the first."""

    def __init__(self, session: Session, shape: dict):
        self.shape = {key: shape[key] for key in TINY}
        dtype, width, rank, tokens = (
            getattr(torch, shape["dtype"]),
            *(shape[k] for k in ("width", "rank", "tokens")),
        )
        table = session.table(session.vocabulary(), width, dtype)
        turns = max(2, min(8, -(-4 * session.clock.cache() // (tokens * width * dtype.itemsize))))
        on = {"device": session.device, "dtype": dtype}
        self.W, self.A, self.B = table, torch.randn(len(table), rank, **on), torch.randn(width, rank, **on)
        self.tokens = [torch.randperm(len(table), device=session.device)[:tokens] for _ in range(turns)]
        self.G = [torch.randn(tokens, width, **on) for _ in range(turns)]
        self.kept: list = [None] * turns
        self.right = {kernel: self.call(kernel, shipped(kernel, shape), 0) for kernel in CANDIDATES}

    def call(self, kernel: str, blocks: Blocks, turn: int) -> tuple[Tensor, ...]:
        turn %= len(self.G)
        if kernel == "forward":
            self.kept[turn] = kernels.look_up(self.tokens[turn], self.W, self.A, self.B, 2.0, blocks=blocks)
            return (self.kept[turn],)
        return kernels.gradients(self.G[turn], self.tokens[turn], self.A, self.B, 2.0, blocks=blocks)


def trial(session: Session, shape: dict) -> Trial:
    """The inputs of this shape, made anew when another was asked for before."""
    held = getattr(session, "trial", None)
    if held is None or held.shape != {key: shape[key] for key in TINY}:
        session.trial = held = None
        session.trial = held = Trial(session, shape)
    return held


def time_tile(session: Session, asked: dict, blocks: Blocks) -> dict:
    session.compiler.ask(variant_of(asked, blocks)).result()
    inputs = trial(session, asked)
    made = inputs.call(asked["kernel"], blocks, 0)
    for ours, right in zip(made, inputs.right[asked["kernel"]], strict=True):
        apart = float((ours.float() - right.float()).abs().max() / right.float().abs().max())
        if not apart < 0.03:
            raise AssertionError(f"{apart:.3g} of the largest number away from what the shipped tile gives")
    call = functools.partial(inputs.call, asked["kernel"], blocks)
    return {"median_s": session.clock.seconds([call], 1 if session.rehearse else 9)[0]}


def in_turns(session: Session, asked: dict, found: list) -> dict:
    """The shipped tile and the three best, taking turns: what is believed of them."""
    ships = shipped(asked["kernel"], asked)
    those = list(dict.fromkeys([ships, *ranking(found, asked)[:3]]))
    inputs = trial(session, asked)
    calls = [functools.partial(inputs.call, asked["kernel"], blocks) for blocks in those]
    medians = session.clock.seconds(calls, 1 if session.rehearse else 25)
    return {"shipped_s": medians[0], "tried": [[list(b), s] for b, s in zip(those, medians, strict=True)]}


def best_tiles(record: dict) -> dict[tuple, Blocks]:
    """The table for triton_kernels.MEASURED: what won, in turns, by more than GAIN."""
    best = {}
    for each in record.get("items", []):
        if "found" not in each or each["inputs"].get("what") != "in turns":
            continue
        asked, found = each["inputs"], each["found"]
        blocks, seconds = min(found["tried"], key=lambda pair: pair[1])
        if seconds * GAIN < found["shipped_s"]:
            itemsize = getattr(torch, asked["dtype"]).itemsize
            key = (
                asked["kernel"],
                itemsize,
                kernels.at_most(256, asked["rank"]),
                asked["width"],
                asked["tokens"],
            )
            best[key] = Blocks(*blocks)
    return best


# (d) how fast, beside whom?


def benchmark(session: Session, found: list) -> Iterator[Item]:
    best = best_tiles(session.records.get("tiles", {}))
    checked = set()
    for case, compiled in gpu_embedding.cases(gpu_embedding.TINY if session.rehearse else gpu_embedding.GRID):
        yield Item(case | {"compiled": compiled}, functools.partial(bench, session, case, compiled, best))
        table = (case["vocabulary"], case["width"])
        if table not in checked:
            checked.add(table)
            yield Item(case | {"what": "check_tokens"}, functools.partial(bench_check, session, case))


def bench(session: Session, case: dict, compiled: bool, best: dict) -> list[dict]:
    table = session.table(case["vocabulary"], case["width"], gpu_embedding.DTYPE)
    best = best or ({("forward", 2, 3, 40, 70): Blocks(16, 32, 16, 4, 3)} if session.rehearse else {})
    rows = gpu_embedding.measure(session.clock, table, case["tokens"], case["rank"], compiled, best)
    if compiled:
        torch.compiler.reset()
    if not session.rehearse:
        gpu_embedding.tell(rows, copy_bandwidth(session.records))
    return rows


def copy_bandwidth(records: dict) -> float:
    items = records.get("device", {}).get("items", [])
    return next(
        (each["found"]["copy_bytes_per_s"] for each in items if each["inputs"]["what"] == "copy"),
        float("nan"),
    )


def bench_check(session: Session, case: dict) -> dict:
    table = session.table(case["vocabulary"], case["width"], gpu_embedding.DTYPE)
    return gpu_embedding.check_cost(session.clock, table, case["tokens"], case["rank"])


# (e) calls and a whole step


def step(session: Session, found: list) -> Iterator[Item]:
    yield Item(
        {"what": "calls", "tokens": 70 if session.rehearse else 4096}, functools.partial(calls, session)
    )
    for check, deterministic in ((False, False), (True, False), (False, True)):
        options = {"check_tokens": check, "deterministic": deterministic}
        yield Item(
            {"what": "step"} | options, functools.partial(whole_step, session, check, deterministic, False)
        )
    yield Item({"what": "profile"}, functools.partial(whole_step, session, False, False, True))


def calls(session: Session) -> dict:
    """Seconds on the wall of a forward pass, launches included, by the way it is called."""
    width, rank, tokens = (40, 3, 70) if session.rehearse else (4096, 16, 4096)
    W = session.table(session.vocabulary(), width, torch.bfloat16)
    on = {"device": session.device, "dtype": torch.bfloat16}
    A, B = (nn.Parameter(torch.randn(side, rank, **on)) for side in W.shape)
    ids = torch.randint(len(W), (tokens,), device=session.device)
    options = (2.0, -1, False, False)
    ways = {
        "function": lambda turn: kernels.Embedding.apply(ids, W, A, B, *options, False),
        "operator": lambda turn: kernels.embedding_op(ids, W, A, B, *options),
        "kernel alone": lambda turn: kernels.look_up(ids, W, A, B, 2.0),
        "PyTorch's operations": lambda turn: plain_lora_embedding(ids, W, A, B, 2.0),
    }
    found = {f"{way}_s": many(session, call) for way, call in ways.items()}
    if session.rehearse:
        return found
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        kernels.look_up(ids, W, A, B, 2.0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            kernels.look_up(ids, W, A, B, 2.0)
    return found | {"graph_s": many(session, lambda turn: graph.replay())}


def many(session: Session, call: Callable[[int], object], times: int = 50) -> float:
    """Seconds a call when many follow one another, as in a program that is bound by its launches."""
    times = 2 if session.rehearse else times
    rounds = []
    for _ in range(7):
        session.clock.wait()
        began = time.perf_counter()
        for turn in range(times):
            call(turn)
        session.clock.wait()
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds)


class Model(nn.Module):
    """The two ends of a Llama-like model: an embedding and an output layer of the same size, each with LoRA."""

    def __init__(self, table: Tensor, rank: int):
        super().__init__()
        vocabulary, width = table.shape
        with torch.device("meta"):
            embedding = nn.Embedding(vocabulary, width, dtype=table.dtype)
            head = nn.Linear(width, vocabulary, bias=False, dtype=table.dtype)
        embedding.weight = head.weight = nn.Parameter(table, requires_grad=False)
        self.embedding = LoRAEmbedding.from_layer(embedding, rank, 2 * rank)
        self.head = LoRALinear.from_layer(head, rank, 2 * rank)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens) / self.embedding.weight.shape[1] ** 0.5)


def whole_step(session: Session, check: bool, deterministic: bool, profiled: bool) -> dict:
    """Median seconds of a training step, or what takes how much of the GPU's time in one."""
    width, rank, tokens = (40, 3, 70) if session.rehearse else (4096, 16, 4096)
    model = Model(session.table(session.vocabulary(), width, torch.bfloat16), rank)
    model.embedding.check_tokens = check
    optimizer = pair_optimizers(model, 1e-4)
    text = torch.randint(len(model.embedding.weight), (tokens + 1,), device=session.device)

    def one(turn: int) -> None:
        F.cross_entropy(model(text[:-1]).float(), text[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    held = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        if not profiled:
            return {"step_s": session.clock.wall(one), "tokens": tokens, "width": width, "rank": rank}
        one(0)
        return who_takes_what(session, one)
    finally:
        torch.use_deterministic_algorithms(held)


def who_takes_what(session: Session, one: Callable[[int], None]) -> dict:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([] if session.rehearse else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiler:
        one(0)
        session.clock.wait()
    on = "self_cpu_time_total" if session.rehearse else "self_device_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, on))
    return {"microseconds": [[row.key[:120], getattr(row, on), row.count] for row in rows[:16]]}


# (f) a linear layer


def linear(session: Session, found: list) -> Iterator[Item]:
    sizes = (
        ((40, 24, 70),) if session.rehearse else itertools.product((4096, 14_336), (4096,), (16_384, 4096))
    )
    for outputs, inputs, tokens in sizes:
        shape = {
            "outputs": outputs,
            "inputs": inputs,
            "tokens": tokens,
            "rank": 3 if session.rehearse else 16,
        }
        yield Item(shape, functools.partial(bench_linear, session, **shape))


def bench_linear(session: Session, outputs: int, inputs: int, tokens: int, rank: int) -> list[dict]:
    """A row a way and measure: seconds, bytes and operations on paper, at r = 16 in bfloat16."""
    on = {"device": session.device, "dtype": torch.bfloat16}
    x = (torch.randn(tokens, inputs, **on) / inputs**0.5).requires_grad_()
    G = torch.randn(tokens, outputs, **on)
    ways = linear_ways(outputs, inputs, rank, on, not session.rehearse)
    with torch.no_grad():
        right = ways["lora_edu"](x)
        for way, layer in ways.items():
            apart = float((layer(x) - right).abs().max() / right.abs().max())
            if way != "plain" and not apart < 0.05:
                raise AssertionError(f"{way} is {apart:.2g} of the largest value away from lora_edu")

    def forward(way: str, turn: int) -> Tensor:
        with torch.no_grad():
            return ways[way](x)

    def both(way: str, turn: int) -> None:
        ways[way](x).backward(G)
        x.grad = None

    rows = []
    for measure, call in (("forward", forward), ("forward and backward", both)):
        calls = [functools.partial(call, way) for way in ways]
        medians = session.clock.seconds(calls, session.clock.repeats)
        shape = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "rank": rank, "measure": measure}
        rows += [shape | {"way": way, "median_s": s} for way, s in zip(ways, medians, strict=True)]
    if not session.rehearse:
        torch.compiler.reset()
    paper = {"bytes": linear_bytes(tokens, inputs, outputs, rank)}
    return [*rows, paper | {"operations": linear_operations(tokens, inputs, outputs, rank)}]


class Summed(nn.Module):
    """LoRALinear's formula with the product by B begun from W x: what a fused addition without a kernel would be."""

    def __init__(self, layer: LoRALinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        low = layer.scaling * F.linear(x, layer.lora_A)
        return torch.addmm(F.linear(x, layer.weight), low, layer.lora_B.T)


def linear_ways(outputs: int, inputs: int, rank: int, on: dict, compiled: bool) -> dict[str, nn.Module]:
    plain = nn.Linear(inputs, outputs, bias=False, **on).requires_grad_(False)
    ours = LoRALinear.from_layer(plain, rank, 2 * rank)
    nn.init.normal_(ours.lora_B, std=0.1)
    ways = {"plain": plain, "lora_edu": ours, "summed in the product": Summed(ours)}
    if compiled:
        ways["torch.compile"] = torch.compile(ours, dynamic=False)
    if "loralib" in sys.modules:
        theirs = sys.modules["loralib"].Linear(inputs, outputs, r=rank, lora_alpha=2 * rank, bias=False, **on)
        theirs.weight, theirs.lora_A, theirs.lora_B = plain.weight, *twins(ours)
        ways["loralib"] = theirs
    if "peft" in sys.modules:
        peft = sys.modules["peft"]
        base = nn.Linear(inputs, outputs, bias=False, **on)
        base.weight = plain.weight
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
        hf = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]
        hf.lora_A["default"].weight, hf.lora_B["default"].weight = twins(ours)
        ways["PEFT"] = hf
    return ways


def twins(layer: LoRALinear) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(layer.lora_A.detach().clone()), nn.Parameter(layer.lora_B.detach().clone())


# In the order of worth: name → (generator, seconds at the most and in reserve, of a run of nine minutes)

PARTS: dict[str, tuple[Callable[[Session, list], Iterable[Item]], float, float]] = {
    "device": (device, 30, 0),
    "correctness": (correctness, 60, 0),
    "tiles": (tiles, 180, 0),
    "benchmark": (benchmark, 240, 90),
    "step": (step, 60, 15),
    "linear": (linear, 60, 0),
}


def compile_all(capability: int, processes: int) -> dict:
    """Compiles what a run on a card compiles for its random cases and its search; says how many, how long."""
    session = Session(False, {}, capability, processes)
    began = time.perf_counter()
    session.ask_ahead()
    for shape, kernel in itertools.product(SHAPES, CANDIDATES):  # as if the shipped tile were the best
        for blocks in refinements(kernel, shipped(kernel, shape)):
            session.compiler.ask(variant_of({"kernel": kernel} | shape, blocks))
    spent_each, failed = [], []
    for variant, future in session.compiler.futures.items():
        try:
            spent_each.append(future.result())
        except Exception as error:
            failed.append([str(variant), f"{type(error).__name__}: {error}"[:300]])
    wall = time.perf_counter() - began
    session.compiler.close()
    cpu = [each.cpu_seconds for each in spent_each]
    return {
        "random cases, two kernels each": sum(isinstance(each, int) for each in session.compiler.futures),
        "tiles": sum(isinstance(each, Variant) for each in session.compiler.futures),
        "processes": processes,
        "wall_s": round(wall, 1),
        "cpu_s": round(sum(cpu), 1),
        "median_cpu_s": round(statistics.median(cpu), 3),
        "largest_cpu_s": round(max(cpu), 2),
        "failed": failed,
    }
