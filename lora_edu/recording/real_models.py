"""What the records of the two real models share: which runs there are, what one leaves behind, ΔW cut to a rank.

Not for running anything: `encoder` and `llm` say what their model, task and figures are. The grids are methods.py's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lora_edu import lowrank, retrieval
from lora_edu.data.functions import Function
from lora_edu.data.runs import tuned_rate
from lora_edu.lora import lora_layers
from lora_edu.paths import write_atomically
from lora_edu.recording.methods import KEYS, grid, name_of, seeds_of
from lora_edu.recording.regimes import spectrum_of
from lora_edu.recording.run import workers
from lora_edu.training import fit
from lora_edu.tuning import trained_parameters


class Subject(NamedTuple):
    """A model's runs. task: its word in a row. targets: method → the layers that LoRA sits on; the first is what all
    ranks are tried with. ranks: those; grids: rank → the middle one of the rates tried there; rank: the one with seeds
    and with each choice of layers. full: the middle one of full tuning's rates. ratios: method → the middle of its
    rates as a share of the first's."""

    task: str
    targets: Mapping[str, Sequence]
    ranks: tuple[int, ...]
    grids: Mapping[int, float]
    rank: int
    full: float
    ratios: Mapping[str, float] = {}


# ---- which runs ------------------------------------------------------------------------------------------------


def wanted(subject: Subject, rows: Iterable[Mapping], steps: int) -> list[dict]:
    """Grids of rates for some ranks, full tuning, and each choice of layers, until every best lies between others; the
    other ranks at rates between; three seeds of LoRA at one rank and of full tuning; full tuning's gentlest and
    steepest rate with a second seed."""
    rows, about = list(rows), {"task": subject.task, "steps": steps}
    first, *others = subject.targets
    tuned_at = lambda rank: tuned_rate(rows, subject.task, first, rank, steps)
    runs = grid(rows, subject.full, range(-1, 2), method="full", size=None, **about)
    for rank, middle in subject.grids.items():
        runs += grid(rows, middle, range(-1, 2), method=first, size=rank, **about)
    found = tuned_at(subject.rank)
    if found is not None:
        for method in others:
            middle = found * subject.ratios.get(method, 1.0)
            runs += grid(rows, middle, range(-1, 2), method=method, size=subject.rank, **about)
    ends = all(tuned_at(rank) for rank in subject.grids)  # then a rate between is final
    for rank in subject.ranks:
        rate = tuned_at(rank) if ends and rank not in subject.grids else None
        runs += [] if rate is None else [about | {"method": first, "size": rank, "rate": rate, "seed": 0}]
    runs += seeds_of(rows, method="full", size=None, **about)
    runs += seeds_of(rows, method=first, size=subject.rank, **about)
    return runs + how_low(subject, rows, steps)


def how_low(subject: Subject, rows: Iterable[Mapping], steps: int) -> list[dict]:
    """Full tuning at a quarter of its tuned rate and at twice it, two seeds each; none while no rate is tuned."""
    rate = tuned_rate(rows, subject.task, "full", None, steps)
    if rate is None:
        return []
    return [
        {"task": subject.task, "method": "full", "size": None, "steps": steps, "seed": seed}
        | {"rate": float(f"{rate * factor:.3g}")}
        for seed in (0, 1)
        for factor in (1 / 4, 2)
    ]


def tuned(subject: Subject, rows: Iterable[Mapping], steps: int) -> list[Mapping]:
    """The rows that are measured on test: every method and size at its tuned rate, all seeds."""
    rows = list(rows)
    rates = {
        (method, size): tuned_rate(rows, subject.task, method, size, steps)
        for method, size in dict.fromkeys((row["method"], row["size"]) for row in rows)
    }
    return [row for row in rows if row["rate"] == rates[row["method"], row["size"]]]


# ---- one run ---------------------------------------------------------------------------------------------------


@cache
def texts() -> dict[str, list[Function]]:
    """`retrieval.load_pairs`, read once."""
    return retrieval.load_pairs()


def read_or_make(path: Path, make: Callable[[], dict]) -> dict:
    """The JSON in a file; made and written where it is not there yet."""
    if not path.is_file():
        write_atomically(path, json.dumps(make()).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def record(
    run: Mapping, folder: Path, untuned: Callable, apply: Callable, tune: Callable, validated: Callable
) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json; what was trained lies beside it.

    untuned: () → the model; apply: (model, method, size, seed) → the model with the method on it; tune: (model, run) →
    its history; validated: model → what a row says of the validation pairs, "validation" among it.
    """
    path = folder / f"{name_of(run)}.json"

    def do() -> dict:
        model = untuned()
        before = weights_of(model) if run["method"] == "full" else {}
        model = apply(model, run["method"], run["size"], run["seed"])
        row = {key: run[key] for key in KEYS} | {"trained": trained_parameters(model)}
        try:
            history = tune(model, run)
        except FloatingPointError as error:  # a rate that is too large is a result, too
            return row | {"validation": None, "test": None, "failed": str(error)}
        write_atomically(path.with_suffix(".safetensors"), changes(model, before))
        return row | validated(model) | {"test": None, "seconds": round(history.seconds, 1)}

    return read_or_make(path, do)


def trained_again(run: Mapping, folder: Path, model: nn.Module, apply: Callable) -> nn.Module:
    """The untuned model as `record` has left it after a run, in eval mode."""
    if run["method"] == "full":
        return moved(model, weights_of(model), deltas(run, folder))
    model = apply(model, run["method"], run["size"], run["seed"])
    kept = load_safetensors((folder / f"{name_of(run)}.safetensors").read_bytes())
    model.load_state_dict(kept, strict=False)
    return model.eval()


def train(model: nn.Module, batches: Callable, loss: Callable, rate: float, steps: int):
    """AdamW on what is free, warm-up and straight decay, no weight decay; `training.fit`'s history."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    return fit(model, batches, optimizer, steps, loss=loss, progress=False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what a state dict holds, a tensor that has two names (tied) under the first of them."""
    found, seen = {}, set()
    for name, each in model.state_dict().items():
        if each.data_ptr() not in seen:
            seen.add(each.data_ptr())
            found[name] = each.clone()
    return found


def changes(model: nn.Module, before: Mapping[str, Tensor]) -> bytes:
    """What a run has trained, as safetensors: the factors of LoRA, or ΔW of everything in half precision."""
    if lora_layers(model):
        return save_safetensors(
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        )
    after = model.state_dict()
    return save_safetensors(
        {name: (after[name] - W).half().contiguous() for name, W in before.items() if W.is_floating_point()}
    )


def deltas(run: Mapping, folder: Path) -> dict[str, Tensor]:
    """ΔW of a full tuning by name, float32, as `changes` has left it in folder/NAME.safetensors."""
    kept = load_safetensors((folder / f"{name_of(run)}.safetensors").read_bytes())
    return {name: each.float() for name, each in kept.items()}


def moved(model: nn.Module, W: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> nn.Module:
    """The model with W + ΔW, in eval mode."""
    state = {name: each + delta[name] if name in delta else each for name, each in W.items()}
    model.load_state_dict(state, strict=False)
    return model.eval()


# ---- cuts ------------------------------------------------------------------------------------------------------


def cut(
    model: nn.Module,
    delta: Mapping[str, Tensor],
    kind_of: Callable[[str], str | None],
    kinds: Sequence[str],
    figures: Callable[[nn.Module], dict],
    ranks: Iterable[int],
    kind_ranks: Iterable[int] = (),
) -> dict:
    """What a full tuning's ΔW is made of; what belongs to no kind (biases, norms) keeps all of its change.

    figures: what is measured of a model. "cut": r → that with every ΔW cut to it; "one_kind_cut": kind → r → with that
    kind alone cut, where there are `kind_ranks`; "spectra": kind → `spectrum_of`; "sizes": kind → ‖ΔW‖/‖W‖ by layer;
    "sigma": name of the matrix → σ.
    """
    W = weights_of(model)
    parts = {name: lowrank.svd(each) for name, each in delta.items() if kind_of(name)}

    def cut_to(r: int, some: Iterable[str]) -> dict:
        low = {
            name: (part.U[:, :r] * part.S[:r]) @ part.Vh[:r]
            for name, part in parts.items()
            if kind_of(name) in some
        }
        return figures(moved(model, W, {**delta, **low}))

    of_kind = lambda kind: [(parts[name].S, W[name]) for name in parts if kind_of(name) == kind]
    row = {
        "cut": {str(r): cut_to(r, kinds) for r in ranks},
        "spectra": {kind: spectrum_of(of_kind(kind)) for kind in kinds},
        "sizes": {kind: [float(f"{S.norm() / w.norm():.3g}") for S, w in of_kind(kind)] for kind in kinds},
        "sigma": {name: part.S.tolist() for name, part in parts.items()},
    }
    kind_ranks = list(kind_ranks)
    if kind_ranks:
        row["one_kind_cut"] = {kind: {str(r): cut_to(r, (kind,)) for r in kind_ranks} for kind in kinds}
    return row


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


def side_by_side(
    jobs: Iterable[tuple[Callable, Mapping]], folder: Path, processes: int
) -> Iterator[tuple[str, dict]]:
    """(name of the run, what was found) of each job (do, run), as they are done, `processes` at a time."""
    with workers(processes) as pool:
        running = {pool.submit(do, run, folder): name_of(run) for do, run in jobs}
        for done in as_completed(running):
            yield running[done], done.result()
