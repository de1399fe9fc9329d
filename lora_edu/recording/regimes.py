"""The map of regimes: full tuning of TinyLM over rates and steps, on a far task and a near one.

Each run has its own schedule and its own ΔW, whose spectra and the losses of its cuts are written down: what each rank
keeps. One gentle ΔW ships. The reader of the rows is `lora_edu.data.runs.load_regimes`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data import corpus, shipped
from lora_edu.data.runs import BATCH, RANKS
from lora_edu.lora import add_lora, lora_layers, merge_lora, remove_lora
from lora_edu.paths import write_atomically
from lora_edu.recording.run import TARGETS
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit

RATES, STEPS = (3e-4, 1e-3, 3e-3, 6e-3), (25, 50, 100, 200)
CORNERS = [(rate, steps) for rate in (RATES[0], RATES[-1]) for steps in (STEPS[0], STEPS[-1])]
NEAR_RATES, NEAR_STEPS = (3e-4, 1e-3, 3e-3), (25, 100)
GENTLE = {"task": "far", "rate": 1e-3, "steps": 100, "seed": 0}
LORA_RATES = (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)
LORA_RANKS, LORA_STEPS = (1, 4, 8), 100
KINDS = ("embedding", "query", "key", "value", "output", "up", "down", "head")
KIND_RANKS = (1, 8, 32)  # ranks to which one kind at a time is cut


def wanted() -> list[dict]:
    """The runs of full tuning, those of most worth first: a whole rectangle is there early."""
    order = [(rate, steps) for steps in (100, 50, 25, 200) for rate in RATES]
    runs = [{"task": "far", "rate": rate, "steps": steps, "seed": 0} for rate, steps in order]
    runs += [{"task": "near", "rate": r, "steps": n, "seed": 0} for n in NEAR_STEPS for r in NEAR_RATES]
    return runs + [
        {"task": "far", "rate": rate, "steps": steps, "seed": seed}
        for seed in (1, 2)
        for rate, steps in CORNERS
    ]


def wanted_lora() -> list[dict]:
    """LoRA on every matrix, the embedding at a third of the rate, with the gentle run's steps."""
    return [
        {"task": "far", "rank": rank, "rate": rate, "steps": LORA_STEPS, "seed": 0}
        for rank in LORA_RANKS
        for rate in LORA_RATES
    ]


def name_of(run: Mapping) -> str:
    rank = f" r={run['rank']}" if "rank" in run else ""
    return f"{run['task']}{rank} rate={run['rate']:g} steps={run['steps']} seed={run['seed']}"


# ---- two tasks -----------------------------------------------------------------------------------------------


@cache
def texts(task: str) -> dict[str, Tensor]:
    """far: code → numpy's and matplotlib's docstrings. near: a model of numpy's docstrings → matplotlib's.

    "held out" is what losses are measured on: of the far task every fourth window of 256 tokens of the test split,
    as in chapter 03; of the near one, whose test split is small, all of validation and test.
    """
    if task == "far":
        text = corpus.load_corpus("reference")
        return {"train": text.train, "held out": text.test.unfold(0, 256, 1024).flatten()}
    text = corpus.load_package("matplotlib")
    held_out = torch.cat([text["validation"], text["test"]])
    return {
        "train": text["train"],
        "held out": held_out.unfold(0, 256, max(256, len(held_out) // 60)).flatten(),
    }


def start(task: str, folder: Path) -> dict[str, Tensor]:
    """The weights before tuning; those of the near task are made once: the base tuned to numpy's docstrings."""
    base = shipped.load_checkpoint("base")
    if task == "far":
        return base
    path = folder / "near start.safetensors"
    if not path.is_file():
        model = TinyLM.from_state_dict(base)
        _fit(model, corpus.load_package("numpy")["train"], 3e-3, 200, 0, folder / "near start.run")
        half = {name: each.detach().half() for name, each in model.state_dict().items()}
        write_atomically(path, save_safetensors(half))
    return {name: each.float() for name, each in sorted(load_safetensors(path.read_bytes()).items())}


# ---- one run -------------------------------------------------------------------------------------------------


def record(run: Mapping, folder: Path) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json; of full tuning ΔW lies beside it."""
    path = folder / f"{name_of(run)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    before = start(run["task"], folder)
    model = TinyLM.from_state_dict(before)
    text = texts(run["task"])
    groups = None
    if "rank" in run:
        torch.manual_seed(run["seed"])
        add_lora(model, run["rank"], run["rank"], TARGETS["all"])
        groups = _lora_groups(model, run["rate"])
    history = _fit(
        model, text["train"], run["rate"], run["steps"], run["seed"], path.with_suffix(".run"), groups
    )
    if "rank" in run:
        merge_lora(model)
        model = remove_lora(model, merge=True)
    delta = {name: (W - before[name]).half() for name, W in model.state_dict().items()}
    if "rank" not in run:
        write_atomically(path.with_suffix(".safetensors"), save_safetensors(delta))
    row = dict(run) | {"method": "lora" if "rank" in run else "full", "seconds": round(history.seconds, 1)}
    row |= losses_of(before, delta, text["held out"], cuts="rank" not in run)
    if "rank" not in run:
        row["spectra"] = spectra_of(delta, before)
    write_atomically(path, json.dumps(row).encode())
    return row


def _fit(model, tokens: Tensor, rate: float, steps: int, seed: int, checkpoint: Path, groups=None):
    """AdamW without weight decay (which would add a multiple of W itself to ΔW), warm-up and straight decay."""
    optimizer = torch.optim.AdamW(
        groups or [{"params": list(model.parameters())}], lr=rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    history = fit(
        model,
        Batches(tokens, batch=BATCH, seed=seed),
        optimizer,
        steps,
        checkpoint=checkpoint,
        progress=False,
    )
    checkpoint.unlink(missing_ok=True)
    return history


def _lora_groups(model, rate: float) -> list[dict]:
    layers = lora_layers(model)
    table = [layer for name, layer in layers.items() if name == "embedding"]
    rest = [layer for name, layer in layers.items() if name != "embedding"]
    return [
        {"params": [each for layer in some for each in (layer.lora_A, layer.lora_B)], "lr": rate * share}
        for some, share in ((table, 1 / 3), (rest, 1.0))
    ]


def losses_of(before: Mapping[str, Tensor], delta: Mapping[str, Tensor], tokens: Tensor, cuts: bool) -> dict:
    """Nats a token before, after, and with ΔW cut: everything to each rank, then one kind at a time.

    Biases and norms keep all of theirs throughout.
    """
    delta = {name: change.float() for name, change in delta.items()}
    loss = lambda change: round(
        evaluate(TinyLM.from_state_dict({n: W + change[n] for n, W in before.items()}), tokens), 4
    )
    none = {name: torch.zeros_like(W) for name, W in before.items()}
    found = {"before": loss(none), "after": loss(delta)}
    if not cuts:
        return found
    parts = {name: lowrank.svd(change) for name, change in delta.items() if change.dim() == 2}
    cut = lambda r, kinds: {
        name: (parts[name].U[:, :r] * parts[name].S[:r]) @ parts[name].Vh[:r]
        for name in parts
        if kind_of(name) in kinds
    }
    found["cut"] = {str(r): loss(delta | cut(r, KINDS)) for r in RANKS}
    found["one_kind_cut"] = {
        kind: {str(r): loss(delta | cut(r, (kind,))) for r in KIND_RANKS} for kind in KINDS
    }
    return found


def spectra_of(delta: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, dict]:
    """Kind → ‖ΔW‖/‖W_o‖ of all its layers together, means over layers of ranks and energy, σ/‖ΔW‖ of one layer.

    "all" has the first alone, of every matrix of the model together.
    """
    found, sums = {}, [0.0, 0.0]
    for kind in KINDS:
        names = [name for name, W in before.items() if W.dim() == 2 and kind_of(name) == kind]
        values = [torch.linalg.svdvals(delta[name].float()) for name in names]
        change = sum(float(S.square().sum()) for S in values)
        weight = sum(float(before[name].square().sum()) for name in names)
        sums = [sums[0] + change, sums[1] + weight]
        middle = values[len(values) // 2]
        found[kind] = {
            "size": _rounded((change / weight) ** 0.5),
            "rank_90": _rounded(mean(lowrank.rank_for_energy(S, 0.9) for S in values)),
            "stable": _rounded(mean(lowrank.stable_rank(S) for S in values)),
            "effective": _rounded(mean(lowrank.effective_rank(S) for S in values)),
            "energy_8": _rounded(mean(float(lowrank.energy(S)[7]) for S in values)),
            "sigma": [_rounded(s) for s in middle / middle.norm()],
        }
    return found | {"all": {"size": _rounded((sums[0] / sums[1]) ** 0.5)}}


def kind_of(name: str) -> str:
    """blocks.3.mlp.up.weight → up."""
    return name.split(".")[-2]


def _rounded(value: float) -> float:
    return float(f"{float(value):.3g}")


# ---- all of them ---------------------------------------------------------------------------------------------


def record_all(folder: Path, tell: Callable[[str], None] = print) -> Iterator[dict]:
    """Every row, one after the other: full tuning, then LoRA at each rate, then two more seeds at its best ones."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = []
    for run in (*wanted(), *wanted_lora()):
        tell(name_of(run))
        row = record(run, folder)
        trained += [row] if "rank" in row else []
        yield row
    for rank in LORA_RANKS:
        best = min((row for row in trained if row["rank"] == rank), key=lambda row: row["after"])
        for seed in (1, 2):
            run = {key: best[key] for key in ("task", "rank", "rate", "steps")} | {"seed": seed}
            tell(name_of(run))
            yield record(run, folder)
