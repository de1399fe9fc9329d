"""Recorded sweeps: many tuning runs of TinyLM, each with its seed and command, any of which can be run again.

A run is a dictionary of settings (`SETTINGS`); its row in data/sweeps.json is that and what came out. The training
loop is training.py's, the methods are lora/'s and tuning/'s; this file only says which runs, and keeps their rows.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lora_edu import lowrank
from lora_edu.data import corpus, shipped
from lora_edu.lora import add_lora, lora_layers, trainable_parameters
from lora_edu.paths import write_atomically
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, History, evaluate, fit

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
}
# A run's settings and what they are where a run doesn't name them. rank: of all targets, or by target. scale: s, the
# factor before BA. embedding: the embedding's learning rate as a share of the others'.
SETTINGS = {
    "text": "reference",  # or manual, or reference/10: a tenth of it
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
    whole, _, part = name.partition("/")
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
        from lora_edu.tuning.subspace import Subspace

        handle = Subspace(model, run["dimension"], seed=run["seed"], parameters=run["targets"])
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
        add_lora(model, ranks, alpha, targets)
        if run["method"] == "frozen A":
            freeze_random_factors(model)
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
    history = fit(
        model,
        Batches(text["train"], batch=BATCH, seed=run["seed"]),
        optimizer,
        run["steps"],
        held_out=lambda m: {"loss": evaluate(m, text["validation"]), "code": evaluate(m, code)},
        evaluate_every=25 if run["patience"] else 50,
        patience=run["patience"],
        checkpoint=checkpoint,
        progress=False,
    )
    return model, history


def row_of(run: Mapping, model: nn.Module, history: History) -> dict:
    """What a run leaves in data/sweeps.json: its settings, losses in nats a token, parameters, seconds."""
    last = history.steps[-20:]
    row = dict(run) | {
        "name": name_of(run),
        "parameters": sum(p.numel() for p in trainable_parameters(model)),
        "test": round(evaluate(model, texts(run["text"])["test"]), 4),
        "code": round(evaluate(model, corpus.load_corpus("code").test[:30_721]), 4),
        "training": round(sum(each["loss"] for each in last) / len(last), 4),
        "evaluations": [{k: round(v, 4) for k, v in each.items()} for each in history.evaluations],
        "best_step": history.best[0],
        "stopped": history.stopped,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "peak_memory": history.peak_memory,
    }
    if run["method"] == "full":
        row["truncated"] = truncated_losses(model, run)
    return row


def truncated_losses(model: nn.Module, run: Mapping) -> dict[str, float]:
    """Rank → test loss of the base plus ΔW with every matrix cut to that rank (biases and norms keep theirs).

    Rank 0 has the biases and norms alone; `matrices r` has the cut matrices without them, as LoRA has it.
    """
    base, tuned = shipped.load_checkpoint("base"), model.state_dict()
    delta = {name: tuned[name] - W for name, W in base.items()}
    factors = {name: lowrank.svd(dW) for name, dW in delta.items() if dW.dim() == 2}
    vectors = {name: dW for name, dW in delta.items() if dW.dim() != 2}
    test, losses = texts(run["text"])["test"], {}
    for rank in (0, *RANKS):
        cut = {n: (U[:, :rank] * S[:rank]) @ Vh[:rank] for n, (U, S, Vh) in factors.items()}
        for label, change in ((str(rank), cut | vectors), (f"matrices {rank}", cut)):
            if label != "matrices 0":
                state = {n: W + change[n] if n in change else W for n, W in base.items()}
                losses[label] = round(evaluate(TinyLM.from_state_dict(state), test), 4)
    return losses


def freeze_random_factors(model: nn.Module) -> None:
    """LoRA with its random factor frozen: A of a linear layer, B of an embedding. What is left is linear in ΔW."""
    for name, layer in lora_layers(model).items():
        (layer.lora_B if name == "embedding" else layer.lora_A).requires_grad_(False)


def record(run: Mapping, folder: Path) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json, and its weights in folder/NAME.safetensors."""
    path = folder / f"{name_of(run)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    checkpoint = path.with_suffix(".run")
    try:
        model, history = train(run, checkpoint)
        row = row_of(run, model, history)
    except FloatingPointError as error:  # a rate that is too large is a result, too
        model, row = None, dict(run) | {"name": name_of(run), "test": None, "failed": str(error)}
    if model is not None and run["method"] in ("lora", "full"):
        kept = {n: p.detach().half().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        write_atomically(path.with_suffix(".safetensors"), save_safetensors(kept, {"run": row["name"]}))
    write_atomically(path, json.dumps(row).encode())
    checkpoint.unlink(missing_ok=True)
    return row


# ---- many runs -------------------------------------------------------------------------------------------------


def record_all(
    runs: Iterable[Mapping], folder: Path, processes: int = 2, tell: Callable[[dict], None] | None = None
) -> list[dict]:
    """Rows of all runs, in their order; `processes` at a time with one thread each. Stopped, it goes on from there."""
    runs = {name_of(run): run for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        try:
            waiting = {pool.submit(record, run, folder): name for name, run in runs.items()}
            for done in as_completed(waiting):
                rows[waiting[done]] = done.result()
                if tell:
                    tell(rows[waiting[done]])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [rows[name] for name in runs]


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
