"""One recorded run of TinyLM: prepared, trained, measured, kept; many of them side by side; one found again.

Which runs there are is sweeps.py's. The training loop is training.py's, the methods are lora/'s and tuning/'s.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu import lowrank
from lora_edu.data import corpus, shipped
from lora_edu.data.runs import BATCH, RANKS, SETTINGS, name_of
from lora_edu.lora import add_lora, lora_layers, trainable_parameters
from lora_edu.paths import write_atomically
from lora_edu.recording.analysis import updates
from lora_edu.seeds import pooled
from lora_edu.text import nearest
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, History, disjoint_windows, evaluate, fit
from lora_edu.tuning import frozen_A, subspace

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
    """The base with chapter 03's planted rank-2 ΔW in one matrix (`recording.make` planted it)."""
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

    Rank 0 has the biases and norms alone; `matrices r` has the cut matrices without them, as LoRA has it: it is left
    out where ΔW has no biases and norms.
    """
    base = shipped.load_checkpoint("base")
    factors = {name: lowrank.svd(dW) for name, dW in delta.items() if dW.dim() == 2}
    vectors = {name: dW for name, dW in delta.items() if dW.dim() != 2}
    test, losses = texts(text)["test"], {}
    for rank in (0, *RANKS):
        cut = {n: (U[:, :rank] * S[:rank]) @ Vh[:rank] for n, (U, S, Vh) in factors.items()}
        for label, change in ((str(rank), cut | vectors), (f"matrices {rank}", cut)):
            if label != "matrices 0" and (vectors or label == str(rank)):
                state = {n: W + change[n] if n in change else W for n, W in base.items()}
                losses[label] = round(evaluate(TinyLM.from_state_dict(state), test), 4)
    return losses


def record(run: Mapping, folder: Path, truncate: Container[str] = ()) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json; folder/NAME.safetensors has what it changed.

    That is ΔW of full tuning, and the factors of LoRA, in half precision. The row of a method that is in `truncate`
    gets the losses of its truncated ΔW, too.
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
    if run["method"] in truncate and "truncated" not in row and row["test"] is not None:
        changed = load_safetensors(weights.read_bytes())
        if run["method"] == "full":
            delta = {name: dW.float() for name, dW in changed.items()}
        else:
            delta = {f"{name}.weight": run["scale"] * BA for name, BA in updates(changed).items()}
        row["truncated"] = truncated_losses(delta, run["text"])
        write_atomically(path, json.dumps(row).encode())
    return row


def changes(run: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """What a run changed, in half precision: ΔW of every parameter for full tuning, else what was trained."""
    base = shipped.load_checkpoint("base") if run["method"] == "full" else {}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p - base.get(name, 0)).half().contiguous() for name, p in trained.items()}


def base_losses() -> dict[str, dict[str, float]]:
    """Text → what a row of the untuned base would say: test, accuracy, code, and those of an evaluation."""
    base = TinyLM.from_state_dict(shipped.load_checkpoint("base")).eval()
    code = corpus.load_corpus("code")
    shared = {
        "code": evaluate(base, code.test[:30_721]),
        "code validation": evaluate(base, code.validation[:10_241]),
    }
    losses = {"planted": {"test": distance(base, code.test)}}
    for name in ("reference", "reference/10", "manual"):
        text = texts(name)
        losses[name] = (
            measure(base, text["test"]) | {"validation": evaluate(base, text["validation"])} | shared
        )
    return {name: {key: round(value, 4) for key, value in each.items()} for name, each in losses.items()}


def packed(head: Mapping, rows: Iterable[Mapping]) -> bytes:
    """A JSON file of rows: what stands before them, and "rows", a row a line, so that a change shows as a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{json.dumps(head, ensure_ascii=False)[:-1]},\n"rows": [\n{lines}\n]}}\n'.encode()


# ---- many runs -------------------------------------------------------------------------------------------------


def record_all(
    runs: Iterable[Mapping],
    folder: Path,
    processes: int = 2,
    truncate: Container[str] = (),
    tell: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Rows of all runs, in their order; `processes` at a time with one thread each. Stopped, it goes on from there."""
    runs = {name_of(run): run for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with workers(processes) as pool:
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


def workers(processes: int) -> ProcessPoolExecutor:
    """Fresh processes with one thread each."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- is a row found again? -------------------------------------------------------------------------------------


def spread(rows: Iterable[Mapping]) -> float:
    """Standard deviation of the test loss over seeds, pooled over runs that differ in their seed alone."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["test"] is not None:
            groups.setdefault(name_of(dict(row) | {"seed": 0}), []).append(row["test"])
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        raise ValueError("no two rows differ in their seed alone, so there is no spread to compare with")
    return pooled(several).deviation


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
