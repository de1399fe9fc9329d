"""Chapter 11's record: a real sentence encoder tuned to find functions, by LoRA and fully, and how low its ΔW is.

Which runs there are, what one is, and what is measured of the tuned ones: ranks on the held-out pairs, spectra, what is
left when every ΔW is cut. Validation chooses, test is reported. The tools are retrieval.py's; the reader of what is
written is `lora_edu.data.load_encoder_runs`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_edu import retrieval
from lora_edu.data import hub
from lora_edu.data.runs import tuned_rate
from lora_edu.lora import add_lora
from lora_edu.recording import real_models
from lora_edu.recording.methods import KEYS, name_of, record_stage
from lora_edu.recording.real_models import Subject, texts
from lora_edu.recording.run import workers

TASK = "functions"
STEPS, LONG, BATCH = 24, 96, 64
ATTENTION = ("query", "key", "value", "attention.output.dense")
MLP = ("intermediate.dense", re.compile(r"encoder\.layer\.\d+\.output\.dense"))
WORDS = ("word_embeddings",)
TARGETS = {
    "lora": (*ATTENTION, *MLP, *WORDS),
    "lora attention": ATTENTION,
    "lora MLP": MLP,
    "lora words": WORDS,
}
RANKS = (1, 4, 8, 16, 64)  # of LoRA on all of these
GRIDS = {1: 8e-3, 8: 4e-3, 64: 2e-3}  # rank → the middle one of the rates that are tried there
RANK = 8  # of the run that the chapter trains itself, of the seeds and of the choice of matrices
FULL = 2e-4  # the middle one of full tuning's rates
SUBJECT = Subject(TASK, TARGETS, RANKS, GRIDS, RANK, FULL)
CUT_TO = (0, 1, 2, 4, 8, 16, 32, 64)
CUT_AGAIN = (1, 8, 64)  # with the second seed
KIND_RANKS = (8,)  # to which one kind at a time is cut
POOL = 500  # pairs of the small pools
QUARTER = slice(None, None, 4)  # of the test pairs: what cuts are measured on
KINDS = ("words", "query", "key", "value", "output", "up", "down")
_KINDS = {  # how a matrix's name ends → its kind
    "word_embeddings.weight": "words",
    "query.weight": "query",
    "key.weight": "key",
    "value.weight": "value",
    "attention.output.dense.weight": "output",
    "intermediate.dense.weight": "up",
    "output.dense.weight": "down",  # after attention's: the first that fits counts
}


# ---- which runs ----------------------------------------------------------------------------------------------


def wanted(rows: Iterable[Mapping], short: int = STEPS, long: int = LONG) -> list[dict]:
    """`real_models.wanted`, and LoRA at RANK once with four times the steps, at the same rate."""
    rows = list(rows)
    runs = real_models.wanted(SUBJECT, rows, short)
    rate = tuned_rate(rows, TASK, "lora", RANK, short)
    longer = {"task": TASK, "method": "lora", "size": RANK, "rate": rate, "seed": 0, "steps": long}
    return runs if rate is None else [*runs, longer]


# ---- one run -------------------------------------------------------------------------------------------------


@cache
def pairs(split: str) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """(token ids of the summaries, of the sources, groups) of a split."""
    found, tokenizer = texts()[split], hub.load_encoder().tokenizer
    summaries = retrieval.tokenise(tokenizer, [each.summary for each in found])
    return (
        summaries,
        retrieval.tokenise(tokenizer, [each.source for each in found]),
        retrieval.groups_of(found),
    )


def apply(model: nn.Module, method: str, size: int | None, seed: int = 0) -> nn.Module:
    """The encoder with LoRA of rank `size`, s = 1, on a method's matrices, or free as a whole ("full")."""
    retrieval.without_dropout(model)
    if method == "full":
        return model.requires_grad_(True)
    torch.manual_seed(seed)
    return add_lora(model, size, size, TARGETS[method])


@torch.no_grad()
def scores(model: nn.Module, split: str, some: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(cosines (n, n), groups (n,)): each summary of a split, or of some of it, with each source."""
    summaries, sources, groups = (each[some] for each in pairs(split))
    was_training = model.training
    model.eval()
    found = retrieval.embed(model, summaries) @ retrieval.embed(model, sources).T
    model.train(was_training)
    return found, groups


def figures(found: Tensor, groups: Tensor) -> dict[str, float]:
    """ "loss" (nats a query over the pool), "recall@1", "recall@10" and "mrr" of a pool's scores."""
    places = retrieval.ranks(found, groups, groups)
    numbers = {"loss": retrieval.pool_loss(found, groups)} | retrieval.measures(places)
    return {key: round(value, 4) for key, value in numbers.items()}


def record(run: Mapping, folder: Path) -> dict:
    """`real_models.record` of the encoder, on the training pairs."""

    def tune(model: nn.Module, run: Mapping):
        tokenizer = hub.load_encoder().tokenizer
        batches = retrieval.PairBatches(tokenizer, texts()["train"], batch=BATCH, seed=run["seed"])
        return real_models.train(model, batches, retrieval.pair_loss, run["rate"], run["steps"])

    return real_models.record(run, folder, _untuned, apply, tune, _validated)


def trained_again(run: Mapping, folder: Path) -> nn.Module:
    """The encoder as a recorded run has left it."""
    return real_models.trained_again(run, folder, _untuned(), apply)


def _untuned() -> nn.Module:
    return hub.load_encoder().model


def _validated(model: nn.Module) -> dict[str, float]:
    found = figures(*scores(model, "validation"))
    return {"validation": found["loss"], "validation_mrr": found["mrr"]}


# ---- what is measured of the tuned ones ------------------------------------------------------------------------


def tested(run: Mapping, folder: Path) -> dict:
    """What a run finds among the test pairs: `measured` of its scores. Read if it is there: folder/NAME.test.json."""
    do = lambda: measured(*scores(trained_again(run, folder), "test"))
    return real_models.read_or_make(folder / f"{name_of(run)}.test.json", do)


def measured(found: Tensor, groups: Tensor) -> dict:
    """ "all": `figures` of the whole pool; "quarter": those of every fourth pair's; "pool_500": the mean
    reciprocal rank in pools of POOL pairs; "ranks": the place of the right source for each pair."""
    return {
        "all": figures(found, groups),
        "quarter": figures(found[QUARTER, QUARTER], groups[QUARTER]),
        "pool_500": round(retrieval.in_pools(found, groups, POOL), 4),
        "ranks": retrieval.ranks(found, groups, groups).tolist(),
    }


def kind_of(name: str) -> str | None:
    """encoder.layer.3.attention.self.query.weight → query; None for what is not cut."""
    return next((kind for end, kind in _KINDS.items() if name.endswith(end) and "pooler" not in name), None)


def cut(run: Mapping, folder: Path) -> dict:
    """`real_models.cut` of a full tuning, with `figures` on a quarter of test; "quarter": those of the whole ΔW.

    Biases, norms and positions keep all of theirs. Read if it is there: folder/NAME.cut.json.
    """
    measure = lambda model: figures(*scores(model, "test", QUARTER))
    ranks, kind_ranks = (CUT_AGAIN, ()) if run["seed"] else (CUT_TO, KIND_RANKS)

    def do() -> dict:
        whole, delta = measure(trained_again(run, folder)), real_models.deltas(run, folder)
        parts = real_models.cut(_untuned(), delta, kind_of, KINDS, measure, ranks, kind_ranks)
        return {"quarter": whole} | parts

    return real_models.read_or_make(folder / f"{name_of(run)}.cut.json", do)


def without_tuning() -> list[dict]:
    """The rows of the untuned encoder ("none") and of BM25 ("bm25"): `measured` on test; validation, nats a query."""
    model = _untuned()
    test = texts()["test"]
    counted = retrieval.bm25([each.summary for each in test], [each.source for each in test])
    about = dict.fromkeys(KEYS) | {"task": TASK, "trained": 0}
    none = about | {"method": "none"} | measured(*scores(model, "test")) | _validated(model)
    words = measured(counted, retrieval.groups_of(test))
    for name in ("all", "quarter"):
        words[name]["loss"] = None  # its scores are no cosines
    return [none, about | {"method": "bm25"} | words | {"validation": None}]


# ---- all of them ---------------------------------------------------------------------------------------------


def record_all(
    folder: Path,
    steps: int = STEPS,
    long: int = LONG,
    processes: int = 2,
    tell: Callable[[str], None] = print,
) -> list[dict]:
    """Every row: the untuned encoder, BM25, every run; of the tuned ones what `tested` and `cut` found, too.

    `processes` at a time with one thread each. Stopped, it goes on from there.
    """
    stages = {"encoder": wanted}
    rows = list(record_stage("encoder", [], folder, processes, tell, steps, long, stages=stages, do=record))
    by_name = {name_of(row): row for row in rows}
    rows = [by_name[name] for name in dict.fromkeys(name_of(run) for run in wanted(rows, steps, long))]
    low = {name_of(run) for run in real_models.how_low(SUBJECT, rows, steps)}
    jobs = [(tested, row) for row in real_models.tuned(SUBJECT, rows, steps)]
    jobs += [(cut, row) for row in rows if name_of(row) in low]
    found: dict[str, dict] = {}
    for name, part in real_models.side_by_side(jobs, folder, processes):
        tell(name)
        found[name] = found.get(name, {}) | part
    for row in rows:
        row |= found.get(name_of(row), {})
        row["test"] = row["all"]["loss"] if "all" in row else None
    with workers(1) as pool:
        return [*pool.submit(without_tuning).result(), *rows]
