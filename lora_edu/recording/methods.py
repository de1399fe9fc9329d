"""Every other way to tune, side by side: TinyLM tuned by each method at several sizes, its rate chosen for it.

Three stages: the far task (code → docstrings) at 100 steps; the near one (docstrings → docstrings of other files); the
far one again with four times the steps, for methods that are slow. The methods are lora/'s and tuning/'s, the tasks
regimes.py's. The reader of the rows is `lora_edu.data.load_methods`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_edu.data import corpus
from lora_edu.data.runs import SHORT, tuned_rate, validation_loss
from lora_edu.lora import add_lora, lora_layers
from lora_edu.loss import next_token_loss
from lora_edu.paths import write_atomically
from lora_edu.recording import regimes
from lora_edu.recording.run import TARGETS, workers
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, fit
from lora_edu.tuning import (
    applied,
    bitfit,
    bottleneck,
    ia3,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    stored_parameters,
    trained_parameters,
)

# 192 tokens of text leave room for 64 virtual ones in the model's 256 positions; all methods read the same windows.
CONTEXT, BATCH = 192, 4
STEPS, LONG = SHORT, 400
FACTOR = 2.0  # between a rate and the next
SEEDS = (0, 1, 2)
# Method → sizes. r of LoRA, m of a bottleneck, k virtual tokens; None where a method has no size to choose.
SIZES: dict[str, tuple] = {
    "full": (None,),
    "lora": (1, 4, 16),  # on the blocks' matrices
    "lora everywhere": (4,),  # on embedding and head, too
    "bottleneck": (2, 8, 32),
    "bitfit": (None,),
    "ia3": (None,),
    "prefix": (4, 16, 64),
    "prefix through an MLP": (16,),
    "prompt": (4, 16, 64),
    "p-tuning": (16, 64),
}
ON = {"lora": "blocks", "lora everywhere": "all"}  # LoRA → the matrices it sits on
# Method → the middle one of the five rates that are tried first.
MIDDLE = {
    "full": 3e-3,
    "lora": 3.2e-2,
    "lora everywhere": 3.2e-2,
    "bottleneck": 1.6e-2,
    "bitfit": 1.6e-2,
    "ia3": 6.4e-2,
    "prefix": 3.2e-2,
    "prefix through an MLP": 4e-3,
    "prompt": 6.4e-2,
    "p-tuning": 4e-3,
}
ONE_SIZE = {
    "full": None,
    "lora": 4,
    "bottleneck": 8,
    "bitfit": None,
    "ia3": None,
    "prefix": 16,
    "prompt": 16,
    "p-tuning": 16,
}
PATIENT = ("lora", "prompt", "p-tuning", "prefix", "ia3")  # those that get LONG, too
KEYS = ("task", "method", "size", "rate", "steps", "seed")


def name_of(run: Mapping) -> str:
    size = "" if run["size"] is None else f" {run['size']}"
    return f"{run['task']} {run['method']}{size} rate={run['rate']:g} steps={run['steps']} seed={run['seed']}"


# ---- which runs ----------------------------------------------------------------------------------------------


def wanted_far(rows: Iterable[Mapping], short: int = STEPS, long: int = LONG) -> list[dict]:
    """At the smallest and the largest size of every method five rates or more, until the best lies between others;
    then every size at its rate (between the two on a line in the logarithms), three seeds."""
    rows, runs = list(rows), []
    for method, sizes in SIZES.items():
        ends = dict.fromkeys((sizes[0], sizes[-1]))
        for size in ends:
            runs += grid(
                rows, MIDDLE[method], range(-2, 3), task="far", method=method, size=size, steps=short
            )
    for method, sizes in SIZES.items():
        for size in sizes:
            runs += seeds_of(rows, task="far", method=method, size=size, steps=short)
    return runs


def wanted_near(rows: Iterable[Mapping], short: int = STEPS, long: int = LONG) -> list[dict]:
    """One size of each method on the near task: three rates or more around half of the far one's, then three seeds."""
    rows, runs = list(rows), []
    for method, size in ONE_SIZE.items():
        far = tuned_rate(rows, "far", method, size, short)
        if far is None:
            continue
        runs += grid(rows, far / 2, range(-1, 2), task="near", method=method, size=size, steps=short)
        runs += seeds_of(rows, task="near", method=method, size=size, steps=short)
    return runs


def wanted_long(rows: Iterable[Mapping], short: int = STEPS, long: int = LONG) -> list[dict]:
    """One size of a method with four times the steps, at three rates or more around the short run's best."""
    rows, runs = list(rows), []
    for method in PATIENT:
        size = ONE_SIZE[method]
        rate = tuned_rate(rows, "far", method, size, short)
        if rate is not None:
            runs += grid(rows, rate, range(-1, 2), task="far", method=method, size=size, steps=long)
    return runs


def grid(rows: list[Mapping], middle: float, places: Iterable[int], **about) -> list[dict]:
    """The rates middle · 2^place, and beyond either end as long as the best of them is that end; seed 0."""
    run = lambda place: about | {"rate": float(f"{middle * FACTOR**place:.3g}"), "seed": 0}
    done = {name_of(row): row for row in rows}
    places = list(places)
    while all(name_of(run(place)) in done for place in places):
        loss = lambda place: validation_loss(done[name_of(run(place))])
        best = min(places, key=loss)
        if places[0] < best < places[-1]:
            break
        places = [places[0] - 1, *places] if best == places[0] else [*places, places[-1] + 1]
    return [run(place) for place in places]


def seeds_of(rows: list[Mapping], **about) -> list[dict]:
    """Three seeds at the tuned rate; none as long as there is no such rate."""
    rate = tuned_rate(rows, **about)
    return [] if rate is None else [about | {"rate": rate, "seed": seed} for seed in SEEDS]


# ---- one run -------------------------------------------------------------------------------------------------


@cache
def texts(task: str) -> dict[str, Tensor]:
    """ "train": a stream; "validation", "test", "code": windows of CONTEXT + 1 tokens, (30 or 60, CONTEXT + 1).

    Rates are chosen on validation, losses reported on test. Of the near task, whose text is a quarter of the two
    splits, every third window is for validation.
    """
    code = _windows(corpus.load_corpus("code").test, 30)
    if task == "far":
        text = corpus.load_corpus("reference")
        held_out = {"validation": _windows(text.validation, 30), "test": _windows(text.test, 60)}
        return {"train": text.train, "code": code} | held_out
    train, rest = regimes.near_pieces()
    windows = _windows(rest, 90)
    return {
        "train": train,
        "validation": windows[1::3],
        "test": windows[torch.arange(90) % 3 != 1],
        "code": code,
    }


def _windows(tokens: Tensor, number: int) -> Tensor:
    """`number` windows of CONTEXT + 1 tokens, evenly spread over a stream."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, number).long()
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]


def apply(model: TinyLM, method: str, size: int | None, seed: int = 0) -> nn.Module:
    """The model with a method on it that trains what it trains, all else frozen; the model itself, changed.

    Virtual tokens start as tokens of the vocabulary's first 5 000 (a prefix as their keys and values); LoRA has s = 1.
    """
    if method in ON:
        torch.manual_seed(seed)
        return add_lora(model, size, size, TARGETS[ON[method]])
    if method == "bottleneck":
        return bottleneck(model, size, seed=seed)
    if method == "bitfit":
        return bitfit(model)
    if method == "ia3":
        return ia3(model)
    if method == "prefix":
        ids = torch.randperm(5_000, generator=torch.Generator().manual_seed(seed))[:size].tolist()
        return prefix_tuning(model, size, init=ids, seed=seed)
    if method == "prefix through an MLP":
        return prefix_tuning(model, size, reparametrise=True, seed=seed)
    if method == "prompt":
        return prompt_tuning(model, size, seed=seed)
    if method == "p-tuning":
        return p_tuning(model, size, seed=seed)
    if method == "full":
        return model
    raise ValueError(f"method must be one of {', '.join(SIZES)}; got {method!r}")


def groups_of(model: nn.Module, rate: float) -> list[dict]:
    """What is trained, for an optimizer: an embedding that has LoRA learns at a third of the rate (chapter 07)."""
    embedding = lora_layers(model).get("embedding")
    slower = [] if embedding is None else [embedding.lora_A, embedding.lora_B]
    usual = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in slower)]
    return [{"params": usual, "lr": rate}, *([{"params": slower, "lr": rate / 3}] if slower else [])]


def prepare(run: Mapping) -> tuple[nn.Module, torch.optim.Optimizer, dict]:
    """The tuned task's model with the run's method on it, its optimizer, and what `fit` is told beside them."""
    model = apply(TinyLM.from_state_dict(regimes.start(run["task"])), run["method"], run["size"], run["seed"])
    return model, torch.optim.AdamW(groups_of(model, run["rate"]), betas=(0.9, 0.95), weight_decay=0.0), {}


def record(run: Mapping, folder: Path) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json."""
    return recorded(run, folder, prepare)


def recorded(
    run: Mapping,
    folder: Path,
    prepared: Callable[[Mapping], tuple[nn.Module, torch.optim.Optimizer, dict]],
    further: Callable[[nn.Module, torch.optim.Optimizer], dict] = lambda model, optimizer: {},
) -> dict:
    """`record` for any way to prepare a run; `further` says what else goes into the row of one that didn't blow up."""
    path = folder / f"{name_of(run)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    checkpoint = path.with_suffix(".run")
    text = texts(run["task"])
    model, optimizer, told = prepared(run)
    row = {key: run[key] for key in KEYS}
    row |= {"trained": trained_parameters(model), "stored": stored(model)}
    batches = Batches(text["train"], batch=BATCH, context=CONTEXT, seed=run["seed"])
    try:
        told = {"checkpoint": checkpoint, "progress": False} | told
        history = fit(model, batches, optimizer, run["steps"], **told)
    except FloatingPointError as error:  # a rate that is too large is a result, too
        row |= {"validation": None, "test": None, "code": None, "failed": str(error)}
    else:
        row |= {name: round(loss_on(model, text[name]), 4) for name in ("validation", "test", "code")}
        last = history.steps[-20:]
        row |= {"training": round(sum(each["loss"] for each in last) / len(last), 4)}
        row |= {"seconds": round(history.seconds, 1)} | further(model, optimizer)
    write_atomically(path, json.dumps(row).encode())
    checkpoint.unlink(missing_ok=True)
    return row


def stored(model: nn.Module) -> int:
    """The numbers that a method's file holds; of LoRA and full tuning all that are trained."""
    return trained_parameters(model) if applied(model) is None else stored_parameters(model)


@torch.no_grad()
def loss_on(model: nn.Module, windows: Tensor, batch: int = 5) -> float:
    """Nats a token on windows (number, CONTEXT + 1), each read with nothing before it."""
    was_training = model.training
    model.eval()
    total = sum(
        next_token_loss(model, some[:, :-1], some[:, 1:]).item() * len(some) for some in windows.split(batch)
    )
    model.train(was_training)
    return total / len(windows)


def untuned(task: str) -> dict:
    """The row of the model before tuning."""
    model = TinyLM.from_state_dict(regimes.start(task)).eval()
    losses = {name: round(loss_on(model, texts(task)[name]), 4) for name in ("validation", "test", "code")}
    return dict.fromkeys(KEYS) | {"task": task, "method": "none", "trained": 0, "stored": 0} | losses


# ---- all of them ---------------------------------------------------------------------------------------------

# Stage → the runs that it asks for, given the rows so far; asked again with its own, it may want more.
STAGES: dict[str, Callable[[Iterable[Mapping], int, int], list[dict]]] = {
    "methods_far": wanted_far,
    "methods_near": wanted_near,
    "methods_long": wanted_long,
}


def record_stage(
    stage: str,
    rows: Iterable[Mapping],
    folder: Path,
    processes: int = 2,
    tell: Callable[[str], None] = print,
    short: int = STEPS,
    long: int = LONG,
    stages: Mapping[str, Callable] = STAGES,
    do: Callable[[Mapping, Path], dict] = record,
) -> Iterator[dict]:
    """The rows of a stage that are not among `rows`, as they are done; `processes` at a time with one thread each.

    Stopped, it goes on from there. short, long: the two budgets of steps. stages, do: another set of runs, and what
    does one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {name_of(row): row for row in rows if row["method"] != "none"}
    with workers(processes) as pool:
        waiting = {}
        try:
            while True:
                for run in stages[stage](list(known.values()), short, long):
                    if name_of(run) not in known and name_of(run) not in waiting.values():
                        waiting[pool.submit(do, run, folder)] = name_of(run)
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    row = done.result()
                    known[waiting.pop(done)] = row
                    tell(f"{name_of(row)}: {row['test']}")
                    yield row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
