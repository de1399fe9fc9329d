"""Recorded sweeps: many tuning runs of TinyLM, each with its seed and command, any of which can be run again.

A run is a dictionary of settings (`SETTINGS`); its row in data/sweeps.json is that and what came out. The training
loop is training.py's, the methods are lora/'s and tuning/'s; this file only says which runs, and keeps their rows.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu import lowrank
from lora_edu.data import corpus, shipped
from lora_edu.lora import add_lora, lora_layers, trainable_parameters
from lora_edu.paths import write_atomically
from lora_edu.text import nearest
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, History, disjoint_windows, evaluate, fit
from lora_edu.tuning import frozen_A, subspace

STEPS, BATCH = (
    200,
    8,
)  # 200 steps of 8 × 256 tokens: 410 000, three fifths of the reference text's training part
RANKS = (1, 2, 4, 8, 16, 32, 64)
ATTENTION, MLP = ("query", "key", "value", "output"), ("up", "down")
TARGETS = {
    "all": ("embedding", "head", *ATTENTION, *MLP),
    "blocks": (*ATTENTION, *MLP),
    "attention": ATTENTION,
    "mlp": MLP,
    "embedding": ("embedding",),
    "head": ("head",),
    "block 3": tuple(
        f"blocks.3.{name}" for name in (*(f"attention.{a}" for a in ATTENTION), *(f"mlp.{m}" for m in MLP))
    ),
}
# A run's settings and what they are where a run doesn't name them. rank: of all targets, or by target. scale: s, the
# factor before BA. embedding: the embedding's learning rate as a share of the others'.
SETTINGS = {
    "text": "reference",  # or manual; reference/10, a tenth of it; planted: code, towards chapter 03's planted model
    "method": "lora",  # or full, subspace, frozen A
    "rank": None,
    "scale": 1.0,
    "targets": "all",
    "dimension": None,
    "rate": None,
    "embedding": 1 / 3,
    "seed": 0,
    "steps": STEPS,
    "patience": None,
}


def run_of(**settings) -> dict:
    """The settings of a run, complete. Raises KeyError for a name that is none."""
    if unknown := set(settings) - set(SETTINGS):
        raise KeyError(f"unknown settings {sorted(unknown)}; there are {', '.join(SETTINGS)}")
    return SETTINGS | settings


def name_of(run: Mapping) -> str:
    """A run's name: the settings that differ from the usual ones. It is a file's name, too."""
    words = [str(run["method"])]
    for key, usual in SETTINGS.items():
        if key != "method" and run[key] != usual:
            value = run[key]
            if isinstance(value, Mapping):
                value = "+".join(f"{name}.{number}" for name, number in value.items())
            words.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(words).replace("/", "_")


# ---- one run ---------------------------------------------------------------------------------------------------


@cache
def texts(name: str) -> dict[str, Tensor]:
    """Train, validation and test tokens of a tuning text; `name/10` trains on a tenth: every tenth piece of it."""
    whole, _, part = name.replace("planted", "code").partition("/")
    text = corpus.load_corpus(whole)
    train = text.train
    if part:
        pieces = train[: len(train) // 2048 * 2048].view(-1, 2048)
        train = pieces[:: int(part)].flatten()
    return {"train": train, "validation": text.validation, "test": text.test}


def prepare(run: Mapping) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The base model with the run's method applied, and AdamW over what it trains (no weight decay)."""
    torch.manual_seed(run["seed"])
    model, rate = TinyLM.from_state_dict(shipped.load_checkpoint("base")), run["rate"]
    if run["method"] == "subspace":
        handle = subspace(model, run["dimension"], run["seed"], run["targets"])
        groups = [{"params": [handle.z], "lr": rate}]
    elif run["method"] == "full":
        table = model.embedding.weight
        rest = [p for p in model.parameters() if p is not table]
        groups = [
            {"name": "embedding", "params": [table], "lr": rate * run["embedding"]},
            {"name": "rest", "params": rest, "lr": rate},
        ]
    else:
        rank, targets = run["rank"], TARGETS[run["targets"]]
        ranks = {target: rank[target] for target in targets} if isinstance(rank, Mapping) else rank
        scaled = lambda r: r * run["scale"]
        alpha = {t: scaled(r) for t, r in ranks.items()} if isinstance(rank, Mapping) else scaled(rank)
        if run["method"] == "frozen A":
            frozen_A(model, ranks, alpha, targets, seed=run["seed"])
        else:
            add_lora(model, ranks, alpha, targets)
        parts = {"embedding": [], "A": [], "B": []}
        for name, layer in lora_layers(model).items():
            parts["embedding" if name == "embedding" else "A"].append(layer.lora_A)
            parts["embedding" if name == "embedding" else "B"].append(layer.lora_B)
        groups = [
            {"name": name, "params": trained, "lr": rate * (run["embedding"] if name == "embedding" else 1)}
            for name, factors in parts.items()
            if (trained := [p for p in factors if p.requires_grad])
        ]
    return model, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)


def train(run: Mapping, checkpoint: Path | None = None) -> tuple[nn.Module, History]:
    """The tuned model and its history; with a `checkpoint` the run goes on where it was interrupted."""
    model, optimizer = prepare(run)
    text, code = texts(run["text"]), corpus.load_corpus("code").validation[:10_241]
    planted = run["text"] == "planted"
    measure = divergence_from(planted_model()) if planted else None

    def held_out(model: nn.Module) -> dict[str, float]:
        if planted:
            return {"loss": distance(model, text["validation"])}
        return {"loss": evaluate(model, text["validation"]), "code": evaluate(model, code)}

    history = fit(
        model,
        Batches(text["train"], batch=4 if planted else BATCH, seed=run["seed"]),
        optimizer,
        run["steps"],
        loss=measure,
        held_out=held_out,
        evaluate_every=25 if run["patience"] else 50,
        patience=run["patience"],
        checkpoint=checkpoint,
        progress=False,
    )
    return model, history


def row_of(run: Mapping, model: nn.Module, history: History) -> dict:
    """What a run leaves in data/sweeps.json: its settings, losses in nats a token, parameters, seconds."""
    last, test = history.steps[-20:], texts(run["text"])["test"]
    if run["text"] == "planted":
        base = TinyLM.from_state_dict(shipped.load_checkpoint("base"))
        losses = {"test": distance(model, test), "base": distance(base, test)}
    else:
        code = corpus.load_corpus("code").test[:30_721]
        losses = measure(model, test) | {"code": evaluate(model, code)}
    return dict(run) | {
        "name": name_of(run),
        "parameters": sum(p.numel() for p in trainable_parameters(model)),
        **{key: round(value, 4) for key, value in losses.items()},
        "training": round(sum(each["loss"] for each in last) / len(last), 4),
        "evaluations": [{k: round(v, 4) for k, v in each.items()} for each in history.evaluations],
        "best_step": history.best[0],
        "stopped": history.stopped,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "peak_memory": history.peak_memory,
    }


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor, context: int = 256) -> dict[str, float]:
    """{"test": nats a token, "accuracy": share of tokens that are the likeliest guess}, as `evaluate` reads a text."""
    loss, right, seen = 0.0, 0, 0
    for inputs, targets in disjoint_windows(tokens, context, batch=1):  # whose logits are held: 10 MB
        logits = model(inputs)
        loss += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        seen += targets.numel()
    return {"test": loss / seen, "accuracy": right / seen}


def planted_model() -> TinyLM:
    """The base with chapter 03's planted rank-2 ΔW in one matrix (`data.make` planted it)."""
    base, matrix = shipped.load_checkpoint("base"), shipped.manifest()["stages"]["planted"]["matrix"]
    return TinyLM.from_state_dict(
        base | {matrix: base[matrix] + shipped.load_checkpoint("planted")["planted"]}
    ).eval()


def divergence_from(teacher: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss KL(teacher ‖ model) in nats a token, for `fit`."""

    def divergence(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            aim = teacher(inputs).log_softmax(-1)
        return F.kl_div(model(inputs).log_softmax(-1), aim, log_target=True, reduction="none").sum(-1).mean()

    return divergence


@torch.no_grad()
def distance(model: nn.Module, tokens: Tensor) -> float:
    """KL(planted model ‖ model) over the first eight windows of a text, as chapter 03 measures it."""
    was_training = model.training
    text = tokens[: 8 * 256].view(8, 256)
    value = divergence_from(planted_model())(model.eval(), text, text).item()
    model.train(was_training)
    return value


def truncated_losses(delta: Mapping[str, Tensor], text: str) -> dict[str, float]:
    """Rank → test loss of the base plus ΔW with every matrix cut to that rank (biases and norms keep theirs).

    Rank 0 has the biases and norms alone; `matrices r` has the cut matrices without them, as LoRA has it.
    """
    base = shipped.load_checkpoint("base")
    factors = {name: lowrank.svd(dW) for name, dW in delta.items() if dW.dim() == 2}
    vectors = {name: dW for name, dW in delta.items() if dW.dim() != 2}
    test, losses = texts(text)["test"], {}
    for rank in (0, *RANKS):
        cut = {n: (U[:, :rank] * S[:rank]) @ Vh[:rank] for n, (U, S, Vh) in factors.items()}
        for label, change in ((str(rank), cut | vectors), (f"matrices {rank}", cut)):
            if label != "matrices 0":
                state = {n: W + change[n] if n in change else W for n, W in base.items()}
                losses[label] = round(evaluate(TinyLM.from_state_dict(state), test), 4)
    return losses


def record(run: Mapping, folder: Path, truncate: bool = False) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json; folder/NAME.safetensors has what it changed.

    That is ΔW of full tuning, and the factors of LoRA, in half precision. With `truncate` the row of full tuning gets
    the losses of its truncated ΔW, too.
    """
    path = folder / f"{name_of(run)}.json"
    weights, checkpoint = path.with_suffix(".safetensors"), path.with_suffix(".run")
    if path.is_file():
        row = json.loads(path.read_text(encoding="utf-8"))
    else:
        try:
            model, history = train(run, checkpoint)
            row = row_of(run, model, history)
            if run["method"] in ("lora", "full"):
                write_atomically(weights, save_safetensors(changes(run, model), {"run": row["name"]}))
        except FloatingPointError as error:  # a rate that is too large is a result, too
            row = dict(run) | {"name": name_of(run), "test": None, "failed": str(error)}
        write_atomically(path, json.dumps(row).encode())
        checkpoint.unlink(missing_ok=True)
    if truncate and run["method"] == "full" and "truncated" not in row:
        delta = {name: dW.float() for name, dW in load_safetensors(weights.read_bytes()).items()}
        row["truncated"] = truncated_losses(delta, run["text"])
        write_atomically(path, json.dumps(row).encode())
    return row


def changes(run: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """What a run changed, in half precision: ΔW of every parameter for full tuning, else what was trained."""
    base = shipped.load_checkpoint("base") if run["method"] == "full" else {}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p - base.get(name, 0)).half().contiguous() for name, p in trained.items()}


# ---- which runs ------------------------------------------------------------------------------------------------

# Rates tried for full tuning and for LoRA at three ranks, a factor of two apart, until the best lies between others.
FULL_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
LORA_RATES = {
    1: (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
    8: (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    64: (1.5e-3, 3e-3, 6e-3, 1.2e-2),
}
SEEDS = (0, 1, 2)
SHORT = 100  # steps of the runs that compare settings with one another
# Subspaces: numbers trained, and the rate as c √(D / d): P's entries are √(d / D), so c is how far Adam moves a weight.
# Three c at the dimensions below; the middle one was the best or as good everywhere, so bisection's dimensions get it.
SIZES = {"all": 2_728_000, "blocks": 727_800}
DIMENSIONS = {
    "all": (1_000, 10_000, 100_000, 1_000_000),
    "blocks": (10_000, 100_000, SIZES["blocks"]),
}
WEIGHT_RATES = (3e-3, 6e-3, 1.2e-2)
NARROW = 1.4  # seeds of full tuning move d₉₀ by about as much
FROZEN_RATES = {8: (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2), 64: (6e-3, 1.2e-2, 2.4e-2)}  # by rank
TARGET_RATES = (6e-3, 1.2e-2, 2.4e-2)
BUDGET = {  # some 80 000 parameters each
    "embedding": 8,
    "head": 8,
    "attention": 17,
    "mlp": 13,
    "blocks": 7,
    "all": {"embedding": 2, "head": 2, **dict.fromkeys((*ATTENTION, *MLP), 4)},
}
SCARCE = ("reference/10", "manual")


def rates() -> list[dict]:
    """The learning rate of full tuning, and of LoRA at three ranks; then the embedding at the others' rate."""
    full = [run_of(method="full", rate=rate) for rate in FULL_RATES]
    full += [run_of(method="full", rate=rate, embedding=1.0) for rate in FULL_RATES[1:3]]
    lora = [run_of(rank=rank, rate=rate) for rank, grid in LORA_RATES.items() for rate in grid]
    lora += [run_of(rank=8, rate=rate, embedding=1.0) for rate in LORA_RATES[8][2:4]]
    return full + lora


def best(rows: Iterable[Mapping], **settings) -> dict:
    """The row with these settings whose validation loss is lowest."""
    fitting = [
        row
        for row in rows
        if row["test"] is not None and all(row[key] == value for key, value in settings.items())
    ]
    if not fitting:
        raise ValueError(f"no run has been recorded with {settings}")
    return min(fitting, key=lambda row: min(each["loss"] for each in row["evaluations"]))


def rate_for(rows: Iterable[Mapping], rank: int) -> float:
    """LoRA's tuned learning rate at a rank: found at 1, 8 and 64 (the embedding at a third of it), between them on a
    straight line in the logarithms."""
    usual = {"method": "lora", "text": "reference", "targets": "all", "scale": 1.0, "steps": STEPS, "seed": 0}
    usual |= {"embedding": SETTINGS["embedding"]}
    tuned = [(math.log2(r), math.log(best(rows, rank=r, **usual)["rate"])) for r in LORA_RATES]
    at = math.log2(rank)
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(tuned) if at <= pair[1][0])
    return float(f"{math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0)):.2g}")


def embedding_for(rows: Iterable[Mapping]) -> float:
    """The embedding's rate as a share of the others': the better of the two tried at rank 8, the same for all ranks."""
    return best(rows, rank=8, method="lora", text="reference", targets="all", scale=1.0, steps=STEPS, seed=0)[
        "embedding"
    ]


def tuned(rows: Iterable[Mapping], rank: int, **settings) -> dict:
    """LoRA on every matrix at the tuned rates."""
    return run_of(rank=rank, rate=rate_for(rows, rank), embedding=embedding_for(rows), **settings)


def tuned_full(rows: Iterable[Mapping]) -> dict:
    """Full tuning at the tuned rates."""
    return best(rows, method="full", text="reference", steps=STEPS, seed=0)


def ranks(rows: Iterable[Mapping]) -> list[dict]:
    """LoRA at every rank and full tuning at their tuned rates, three seeds each."""
    full = tuned_full(rows)
    found = [tuned(rows, r, seed=seed) for seed in SEEDS for r in RANKS]
    return found + [
        run_of(method="full", rate=full["rate"], embedding=full["embedding"], seed=s) for s in SEEDS
    ]


def subspaces() -> list[dict]:
    """Random subspaces of all parameters and of the blocks alone, and LoRA with its random factor frozen.

    In the blocks' largest, d = D, P only reorders and flips signs: that is full tuning of the blocks.
    """
    random = [
        run
        for scope, dimensions in DIMENSIONS.items()
        for d in dimensions
        for run in _subspace(scope, d, WEIGHT_RATES)
    ]
    frozen = [
        run_of(method="frozen A", rank=r, targets=targets, rate=rate)
        for r, targets in ((8, "all"), (64, "all"), (8, "blocks"))
        for rate in FROZEN_RATES[r]
    ]
    return random + frozen


def _subspace(scope: str, d: int, weight_rates: Iterable[float]) -> list[dict]:
    rates = [float(f"{c * math.sqrt(SIZES[scope] / d):.3g}") for c in weight_rates]
    return [run_of(method="subspace", targets=scope, dimension=d, rate=rate) for rate in rates]


def by_dimension(rows: Iterable[Mapping], scope: str) -> dict[int, dict]:
    """Dimension d → the run in a subspace of it whose rate was best on validation text; d = D: full tuning."""
    rows = list(rows)
    runs = {"method": "subspace", "targets": scope, "text": "reference", "steps": STEPS, "seed": 0}
    sizes = {row["dimension"] for row in rows if runs.items() <= row.items() and row["test"] is not None}
    found = {d: best(rows, dimension=d, **runs) for d in sorted(sizes)}
    return found | ({SIZES["all"]: tuned_full(rows)} if scope == "all" else {})


def levels(before: float, full: float) -> dict[str, float]:
    """The accuracy at d₉₀ of the performance, which counts from zero, and of the gain, which counts from the base."""
    return {"performance": 0.9 * full, "gain": before + 0.9 * (full - before)}


def around(runs: Mapping[int, Mapping], level: float) -> tuple[int, int]:
    """(the largest d below the smallest that reaches an accuracy, that smallest d), of the runs by dimension."""
    above = min(d for d, row in runs.items() if row["accuracy"] >= level)
    return max(d for d in runs if d < above), above


def bisection(rows: Iterable[Mapping], before: float | None = None) -> list[dict]:
    """d₉₀ bisected in log d, for all parameters and the blocks, of the performance and of the gain.

    The interval between two dimensions of the stage `subspaces` is halved until its ends are within a factor of
    `NARROW`. Which d comes next depends on what came out, so these are the runs that the rows so far ask for: ask again
    when they are done, until no new one comes. `before` is the base's accuracy, computed if it isn't given.
    """
    rows = list(rows)
    before = _base_accuracy() if before is None else before
    asked: dict[str, dict] = {}
    for scope, grid in DIMENSIONS.items():
        known = by_dimension(rows, scope)
        for level in levels(before, known[SIZES[scope]]["accuracy"]).values():
            low, high = around({d: row for d, row in known.items() if d in (*grid, SIZES[scope])}, level)
            while high / low > NARROW:
                middle = int(float(f"{math.sqrt(low * high):.2g}"))
                asked |= {name_of(run): run for run in _subspace(scope, middle, WEIGHT_RATES[1:2])}
                if middle not in known:
                    break
                low, high = (low, middle) if known[middle]["accuracy"] >= level else (middle, high)
    return list(asked.values())


@cache
def _base_accuracy() -> float:
    base = TinyLM.from_state_dict(shipped.load_checkpoint("base"))
    return measure(base, texts("reference")["test"])["accuracy"]


def scaling(rows: Iterable[Mapping]) -> list[dict]:
    """Short runs: alpha / r against alpha / √r at one rate, alpha beside the rate, and the embedding's own rate."""
    rate, short = rate_for(rows, 8), {"steps": SHORT, "embedding": embedding_for(rows)}
    by_rank = [
        run_of(rank=r, rate=rate, scale=float(f"{scale:.4g}"), **short)
        for r in RANKS[::3]
        for scale in (8 / r, math.sqrt(8 / r))
    ]
    by_size = [
        run_of(rank=8, rate=rate * faster, scale=larger, **short)
        for factor in (0.5, 1.0, 2.0, 4.0)
        for faster, larger in ((factor, 1.0), (1.0, factor))
    ]
    exchanged = [run_of(rank=8, rate=rate * c**-0.5, scale=c, **short) for c in (0.25, 4.0)]
    own = [run_of(rank=8, rate=rate, **short | {"embedding": share}) for share in (1.0, 1 / 3, 0.1)]
    return by_rank + by_size + exchanged + own


def targets() -> list[dict]:
    """Short runs: some 80 000 parameters spent on different matrices, three rates each."""
    return [
        run_of(
            rank=rank, targets=name, rate=rate, embedding=1.0 if name == "embedding" else 1 / 3, steps=SHORT
        )
        for name, rank in BUDGET.items()
        for rate in TARGET_RATES
    ]


def scarce(rows: Iterable[Mapping]) -> list[dict]:
    """Little text: full tuning and LoRA, stopped early, at the rate tuned on plenty of it, a third and a ninth."""
    full = tuned_full(rows)
    methods = [
        ({"method": "full", "embedding": full["embedding"]}, full["rate"]),
        *(({"rank": r}, rate_for(rows, r)) for r in (1, 8)),
    ]
    return [
        run_of(text=text, rate=float(f"{rate * factor:.3g}"), steps=150, patience=2, **settings)
        for text in SCARCE
        for factor in (1 / 9, 1 / 3, 1.0)
        for settings, rate in methods
    ]


def planted() -> list[dict]:
    """LoRA of rank 1, 2 and 4 on the block of chapter 03's planted update, towards the planted model."""
    return [
        run_of(text="planted", rank=r, targets="block 3", rate=rate, steps=400)
        for rate in (3e-3, 1e-2, 3e-2)
        for r in (1, 2, 4)
    ]


def short() -> list[dict]:
    """A run of a few seconds, recorded so that a test can repeat it."""
    return [run_of(rank=1, rate=1.2e-2, targets="blocks", steps=8)]


def base_losses() -> dict[str, dict[str, float]]:
    """Text → what a row of the untuned base would say: test, accuracy, code, and those of an evaluation."""
    base = TinyLM.from_state_dict(shipped.load_checkpoint("base")).eval()
    code = corpus.load_corpus("code")
    shared = {
        "code": evaluate(base, code.test[:30_721]),
        "code validation": evaluate(base, code.validation[:10_241]),
    }
    losses = {"planted": {"test": distance(base, code.test)}}
    for name in ("reference", *SCARCE):
        text = texts(name)
        losses[name] = (
            measure(base, text["test"]) | {"validation": evaluate(base, text["validation"])} | shared
        )
    return {name: {key: round(value, 4) for key, value in each.items()} for name, each in losses.items()}


# Stage → its runs, given the rows of the stages before it; asked again with its own, it may want more.
STAGES: dict[str, Callable[[list[dict]], list[dict]]] = {
    "rates": lambda rows: rates(),
    "ranks": ranks,
    "subspaces": lambda rows: subspaces(),
    "bisection": bisection,
    "scaling": scaling,
    "targets": lambda rows: targets(),
    "scarce": scarce,
    "planted_lora": lambda rows: planted(),
    "short": lambda rows: short(),
}
TRUNCATED = ("ranks", "scarce")  # stages in which full tuning's ΔW is cut to every rank


# ---- many runs -------------------------------------------------------------------------------------------------


def record_all(
    runs: Iterable[Mapping],
    folder: Path,
    processes: int = 2,
    truncate: bool = False,
    tell: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Rows of all runs, in their order; `processes` at a time with one thread each. Stopped, it goes on from there."""
    runs = {name_of(run): run for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        try:
            waiting = {pool.submit(record, run, folder, truncate): name for name, run in runs.items()}
            for done in as_completed(waiting):
                rows[waiting[done]] = done.result()
                if tell:
                    tell(rows[waiting[done]])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [rows[name] for name in runs]


def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- is a row found again? -------------------------------------------------------------------------------------


def spread(rows: Iterable[Mapping]) -> float:
    """Pooled standard deviation of the test loss over seeds: √ of the mean variance of runs that differ in it alone."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["test"] is not None:
            groups.setdefault(name_of(dict(row) | {"seed": 0}), []).append(row["test"])
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        raise ValueError("no two rows differ in their seed alone, so there is no spread to compare with")
    return math.sqrt(sum(statistics.variance(group) for group in several) / len(several))


def tolerance(rows: Iterable[Mapping]) -> float:
    """How far a row's loss may lie from what was recorded to count as found again: three pooled deviations."""
    return 3 * spread(rows)


def check(rows: list[dict], names: Iterable[str], folder: Path) -> Iterator[tuple[str, float, float, bool]]:
    """Run rows again from their own seeds: (name, recorded loss, loss now, whether within three pooled deviations)."""
    recorded = {row["name"]: row for row in rows}
    for name in names:
        if name not in recorded:
            close = nearest(name, recorded, cutoff=0)
            raise ValueError(f"no row is named {name!r}; close to it: {', '.join(map(repr, close))}")
    allowed = tolerance(rows)
    for name in names:
        old = recorded[name]
        new = record({key: old[key] for key in SETTINGS}, folder)
        yield name, old["test"], new["test"], abs(new["test"] - old["test"]) <= allowed
