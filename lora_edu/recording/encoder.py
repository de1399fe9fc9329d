"""Chapter 11's record: a real sentence encoder tuned to find functions, by LoRA and fully, and how low its ΔW is.

Which runs there are, what one is, and what is measured of the tuned ones: ranks on the held-out pairs, spectra, what is
left when every ΔW is cut. Validation chooses, test is reported. The tools are retrieval.py's; the reader of what is
written is `lora_edu.data.load_encoder_runs`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lora_edu import lowrank, retrieval
from lora_edu.data import hub
from lora_edu.data.runs import tuned_rate
from lora_edu.lora import add_lora, lora_layers
from lora_edu.paths import write_atomically
from lora_edu.recording.methods import KEYS, grid, name_of, record_stage, seeds_of
from lora_edu.recording.regimes import spectrum_of
from lora_edu.recording.run import workers
from lora_edu.training import fit
from lora_edu.tuning import trained_parameters

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
    """Grids of rates for three ranks, full tuning, and each choice of matrices, until every best lies between others;
    the other ranks at rates between; three seeds of LoRA at RANK and of full tuning; full tuning's gentlest and
    steepest rate with a second seed; LoRA at RANK once with four times the steps, at the same rate."""
    rows, about = list(rows), {"task": TASK, "steps": short}
    runs = grid(rows, FULL, range(-1, 2), method="full", size=None, **about)
    for rank, middle in GRIDS.items():
        runs += grid(rows, middle, range(-1, 2), method="lora", size=rank, **about)
    found = tuned_rate(rows, TASK, "lora", RANK, short)
    if found is not None:
        for method in list(TARGETS)[1:]:
            runs += grid(rows, found, range(-1, 2), method=method, size=RANK, **about)
    ends = all(tuned_rate(rows, TASK, "lora", rank, short) for rank in GRIDS)  # then a rate between is final
    for rank in RANKS:
        rate = tuned_rate(rows, TASK, "lora", rank, short) if ends and rank not in GRIDS else None
        runs += [] if rate is None else [about | {"method": "lora", "size": rank, "rate": rate, "seed": 0}]
    if found is not None:
        runs.append(about | {"method": "lora", "size": RANK, "rate": found, "seed": 0, "steps": long})
    runs += seeds_of(rows, method="full", size=None, **about)
    runs += seeds_of(rows, method="lora", size=RANK, **about)
    return runs + how_low(rows, short)


def how_low(rows: Iterable[Mapping], short: int = STEPS) -> list[dict]:
    """Full tuning at a quarter of its tuned rate and at twice it, two seeds each; none while no rate is tuned."""
    rate = tuned_rate(rows, TASK, "full", None, short)
    if rate is None:
        return []
    return [
        {"task": TASK, "method": "full", "size": None, "steps": short, "seed": seed}
        | {"rate": float(f"{rate * factor:.3g}")}
        for seed in (0, 1)
        for factor in (1 / 4, 2)
    ]


def tuned(rows: Iterable[Mapping], short: int = STEPS) -> list[Mapping]:
    """The rows that are measured on test: every method and size at its tuned rate, all seeds."""
    rows = list(rows)
    rates = {
        (method, size): tuned_rate(rows, TASK, method, size, short)
        for method, size in dict.fromkeys((row["method"], row["size"]) for row in rows)
    }
    return [row for row in rows if row["rate"] == rates[row["method"], row["size"]]]


# ---- one run -------------------------------------------------------------------------------------------------


@cache
def texts() -> dict[str, list]:
    """`retrieval.load_pairs`, read once."""
    return retrieval.load_pairs()


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


def train(model: nn.Module, batches: Callable, rate: float, steps: int, progress: bool | str = False):
    """AdamW on what is free, warm-up and straight decay, no weight decay; `training.fit`'s history."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    return fit(model, batches, optimizer, steps, loss=retrieval.pair_loss, progress=progress)


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
    """Do a run, or read its row if it has been done: folder/NAME.json; what was trained lies beside it."""
    path = folder / f"{name_of(run)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    opened = hub.load_encoder()
    before = {name: W.clone() for name, W in opened.model.state_dict().items()}
    model = apply(opened.model, run["method"], run["size"], run["seed"])
    row = {key: run[key] for key in KEYS} | {"trained": trained_parameters(model)}
    batches = retrieval.PairBatches(opened.tokenizer, texts()["train"], batch=BATCH, seed=run["seed"])
    try:
        history = train(model, batches, run["rate"], run["steps"])
    except FloatingPointError as error:  # a rate that is too large is a result, too
        row |= {"validation": None, "test": None, "failed": str(error)}
    else:
        on_validation = figures(*scores(model, "validation"))
        row |= {"validation": on_validation["loss"], "validation_mrr": on_validation["mrr"], "test": None}
        row |= {"seconds": round(history.seconds, 1)}
        write_atomically(path.with_suffix(".safetensors"), save_safetensors(_trained(model, before)))
    write_atomically(path, json.dumps(row).encode())
    return row


def _trained(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of LoRA, or ΔW of everything in half precision."""
    if lora_layers(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    after = model.state_dict()
    return {
        name: (after[name] - W).half().contiguous() for name, W in before.items() if W.is_floating_point()
    }


def trained_again(run: Mapping, folder: Path) -> nn.Module:
    """The encoder as a recorded run has left it."""
    kept = load_safetensors((folder / f"{name_of(run)}.safetensors").read_bytes())
    model = hub.load_encoder().model
    if run["method"] != "full":
        model = apply(model, run["method"], run["size"], run["seed"])
        model.load_state_dict(kept, strict=False)
        return model.eval()
    return _moved(model, model.state_dict(), {name: each.float() for name, each in kept.items()})


def _moved(model: nn.Module, W: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> nn.Module:
    """The model with W + ΔW."""
    model.load_state_dict({name: each + delta[name] if name in delta else each for name, each in W.items()})
    return model.eval()


# ---- what is measured of the tuned ones ------------------------------------------------------------------------


def tested(run: Mapping, folder: Path) -> dict:
    """What a run finds among the test pairs: `measured` of its scores. Read if it is there: folder/NAME.test.json."""
    path = folder / f"{name_of(run)}.test.json"
    if not path.is_file():
        write_atomically(path, json.dumps(measured(*scores(trained_again(run, folder), "test"))).encode())
    return json.loads(path.read_text(encoding="utf-8"))


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
    """What a full tuning's ΔW is made of; biases, norms and positions keep all of theirs.

    "quarter": `figures` of the whole ΔW, "cut": r → those with every ΔW cut to it, both on a quarter of test;
    "one_kind_cut": kind → r → with that kind alone cut (seed 0); "spectra": kind → `spectrum_of`; "sizes": kind →
    ‖ΔW‖/‖W‖ by layer; "sigma": name of the matrix → σ.
    Read if it is there: folder/NAME.cut.json.
    """
    path = folder / f"{name_of(run)}.cut.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    kept = load_safetensors((folder / f"{name_of(run)}.safetensors").read_bytes())
    delta = {name: each.float() for name, each in kept.items()}
    model = hub.load_encoder().model
    W = {name: each.clone() for name, each in model.state_dict().items()}
    parts = {name: lowrank.svd(each) for name, each in delta.items() if kind_of(name)}

    def cut_to(r: int, kinds: Iterable[str]) -> dict[str, float]:
        low = {
            name: (part.U[:, :r] * part.S[:r]) @ part.Vh[:r]
            for name, part in parts.items()
            if kind_of(name) in kinds
        }
        return figures(*scores(_moved(model, W, delta | low), "test", QUARTER))

    of_kind = lambda kind: [(parts[name].S, W[name]) for name in parts if kind_of(name) == kind]
    row = {
        "quarter": figures(*scores(_moved(model, W, delta), "test", QUARTER)),
        "cut": {str(r): cut_to(r, KINDS) for r in (CUT_AGAIN if run["seed"] else CUT_TO)},
        "spectra": {kind: spectrum_of(of_kind(kind)) for kind in KINDS},
        "sizes": {kind: [float(f"{S.norm() / w.norm():.3g}") for S, w in of_kind(kind)] for kind in KINDS},
        "sigma": {name: part.S.tolist() for name, part in parts.items()},
    }
    if run["seed"] == 0:
        row["one_kind_cut"] = {kind: {str(r): cut_to(r, (kind,)) for r in KIND_RANKS} for kind in KINDS}
    write_atomically(path, json.dumps(row).encode())
    return row


def without_tuning() -> list[dict]:
    """The rows of the untuned encoder ("none") and of BM25 ("bm25"): `measured` on test; validation, nats a query."""
    model = hub.load_encoder().model
    on_validation = figures(*scores(model, "validation"))
    test = texts()["test"]
    counted = retrieval.bm25([each.summary for each in test], [each.source for each in test])
    about = dict.fromkeys(KEYS) | {"task": TASK, "trained": 0}
    none = about | {"method": "none"} | measured(*scores(model, "test"))
    none |= {"validation": on_validation["loss"], "validation_mrr": on_validation["mrr"]}
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
    low = [name_of(run) for run in how_low(rows, steps)]
    jobs = [(tested, row) for row in tuned(rows, steps)]
    jobs += [(cut, row) for name in low for row in rows if name_of(row) == name]
    found: dict[str, dict] = {}
    for name, part in _side_by_side(jobs, folder, processes):
        tell(name)
        found[name] = found.get(name, {}) | part
    for row in rows:
        row |= found.get(name_of(row), {})
        row["test"] = row["all"]["loss"] if "all" in row else None
    with workers(1) as pool:
        return [*pool.submit(without_tuning).result(), *rows]


def _side_by_side(
    jobs: Iterable[tuple[Callable, Mapping]], folder: Path, processes: int
) -> Iterator[tuple[str, dict]]:
    with workers(processes) as pool:
        running = {pool.submit(do, run, folder): name_of(run) for do, run in jobs}
        for done in as_completed(running):
            yield running[done], done.result()


def spectra(rows: Iterable[Mapping]) -> bytes:
    """The singular values of the rows that were cut, as safetensors in half precision: "RUN/MATRIX" → σ."""
    return save_safetensors(
        {
            f"{name_of(row)}/{name}": torch.tensor(sigma).half()
            for row in rows
            if "sigma" in row
            for name, sigma in row["sigma"].items()
        }
    )
