"""The map of regimes: full tuning of TinyLM over rates and steps, on a far task and a near one; LoRA beside it.

Each run has its own schedule and its own ΔW, whose spectra and the losses of its cuts are written down: what each rank
keeps. One gentle ΔW ships. The reader of the rows is `lora_edu.data.load_regimes`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lora_edu import lowrank
from lora_edu.data import corpus, shipped
from lora_edu.data.runs import RANKS
from lora_edu.lora import add_lora, lora_layers, merge_lora, remove_lora
from lora_edu.paths import write_atomically
from lora_edu.recording.run import TARGETS
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit

BATCH = 4  # half of the sweeps', so that the whole map is an hour of one core
RATES, STEPS = (3e-4, 1e-3, 3e-3, 6e-3), (25, 50, 100, 200)
CORNERS = [(rate, steps) for rate in (RATES[0], RATES[-1]) for steps in (STEPS[0], STEPS[-1])]
NEAR_RATES, NEAR_STEPS = (3e-4, 1e-3, 3e-3), (100, 25)
GENTLE = {"task": "far", "rate": 1e-3, "steps": 100, "seed": 0}
LORA_RATES = {  # by rank: until the best lies between others
    1: (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
    4: (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
    8: (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2),
}
LORA_STEPS = 100
KINDS = ("embedding", "query", "key", "value", "output", "up", "down", "head")
KIND_RANKS = (1, 8, 32)  # ranks to which one kind at a time is cut


def wanted() -> list[dict]:
    """The runs of full tuning, those of most worth first: a whole rectangle is there early."""
    far = [(rate, steps) for steps in (100, 25, 200, 50) for rate in RATES]
    near = [(rate, steps) for steps in NEAR_STEPS for rate in NEAR_RATES]
    runs = [{"task": "far", "rate": rate, "steps": steps, "seed": 0} for rate, steps in far]
    return runs + [{"task": "near", "rate": rate, "steps": steps, "seed": 0} for rate, steps in near]


def wanted_seeds() -> list[dict]:
    """The corners of the far map again, with a second seed."""
    return [{"task": "far", "rate": rate, "steps": steps, "seed": 1} for rate, steps in CORNERS]


def wanted_lora() -> list[dict]:
    """LoRA on every matrix, the embedding at a third of the rate, with the gentle run's steps."""
    return [
        {"task": "far", "rank": rank, "rate": rate, "steps": LORA_STEPS, "seed": 0}
        for rank, rates in LORA_RATES.items()
        for rate in rates
    ]


def name_of(run: Mapping) -> str:
    rank = f" r={run['rank']}" if "rank" in run else ""
    return f"{run['task']}{rank} rate={run['rate']:g} steps={run['steps']} seed={run['seed']}"


# ---- two tasks -----------------------------------------------------------------------------------------------


@cache
def texts(task: str) -> dict[str, Tensor]:
    """far: code → docstrings. near: a model tuned to docstrings → docstrings of files that it has not seen.

    "held out" is what losses are measured on: 30 windows of 256 tokens, spread evenly over the test split (far), or
    over every fourth piece of 2048 tokens of validation and test together, whose other pieces are the near task's text.
    """
    if task == "far":
        text = corpus.load_corpus("reference")
        return {"train": text.train, "held out": _windows(text.test)}
    train, rest = near_pieces()
    return {"train": train, "held out": _windows(rest)}


def near_pieces() -> tuple[Tensor, Tensor]:
    """(three fourths, a fourth) of the reference text's validation and test tokens, in pieces of 2048."""
    text = corpus.load_corpus("reference")
    unseen = torch.cat([text.validation, text.test])
    pieces = unseen[: len(unseen) // 2048 * 2048].view(-1, 2048)
    fourth = torch.arange(len(pieces)) % 4 == 3
    return pieces[~fourth].flatten(), pieces[fourth].flatten()


def _windows(tokens: Tensor, number: int = 30) -> Tensor:
    return tokens.unfold(0, 256, len(tokens) // number)[:number].flatten()


def start(task: str) -> dict[str, Tensor]:
    """The weights before tuning: the base (far), or the base with the shipped ΔW of seed 0 merged (near)."""
    base = shipped.load_checkpoint("base")
    if task == "far":
        return base
    delta = shipped.load_checkpoint("reference_seed_0")
    return {name: W + delta[name] for name, W in base.items()}


# ---- one run -------------------------------------------------------------------------------------------------


def record(run: Mapping, folder: Path) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json; of full tuning ΔW lies beside it."""
    path = folder / f"{name_of(run)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    before = start(run["task"])
    model = TinyLM.from_state_dict(before)
    text = texts(run["task"])
    groups = None
    if "rank" in run:
        torch.manual_seed(run["seed"])
        add_lora(model, run["rank"], run["rank"], TARGETS["all"])
        groups = _lora_groups(model, run["rate"])
    about = dict(run) | {"method": "lora" if "rank" in run else "full"}
    try:
        history = _fit(
            model, text["train"], run["rate"], run["steps"], run["seed"], path.with_suffix(".run"), groups
        )
    except FloatingPointError as error:  # a rate that is too large is a result, too
        row = about | {"before": None, "after": None, "failed": str(error)}
        write_atomically(path, json.dumps(row).encode())
        return row
    if "rank" in run:
        merge_lora(model)
        model = remove_lora(model, merge=True)
    delta = {name: (W - before[name]).half() for name, W in model.state_dict().items()}
    if "rank" not in run:
        write_atomically(path.with_suffix(".safetensors"), save_safetensors(delta))
    row = about | {"seconds": round(history.seconds, 1)}
    delta = {name: change.float() for name, change in delta.items()}
    row |= losses_of(before, delta, text["held out"])
    if "rank" not in run:
        row |= cuts_of(before, delta, text["held out"])
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


def losses_of(before: Mapping[str, Tensor], delta: Mapping[str, Tensor], tokens: Tensor) -> dict[str, float]:
    """{"before", "after"}: nats a token of W and of W + ΔW."""
    none = {name: torch.zeros_like(W) for name, W in before.items()}
    return {"before": _loss(before, none, tokens), "after": _loss(before, delta, tokens)}


def cuts_of(before: Mapping[str, Tensor], delta: Mapping[str, Tensor], tokens: Tensor) -> dict[str, dict]:
    """ "cut": rank → nats a token with every ΔW cut to it; "one_kind_cut": kind → rank → with that kind alone cut;
    "spectra": kind → `spectrum_of`.

    Biases and norms keep all of theirs. What cutting one kind adds is measured on every third window and added to the
    loss of the whole ΔW: it is small, and the windows are the same with and without the cut.
    """
    parts = {name: lowrank.svd(change) for name, change in delta.items() if change.dim() == 2}
    cut = lambda r, kinds: {
        name: (parts[name].U[:, :r] * parts[name].S[:r]) @ parts[name].Vh[:r]
        for name in parts
        if kind_of(name) in kinds
    }
    loss = lambda change: _loss(before, change, tokens)
    some = tokens.view(-1, 256)[::3].flatten()
    on_some = lambda change: _loss(before, change, some)
    whole, whole_on_some = loss(delta), on_some(delta)
    added = lambda kind, r: on_some(delta | cut(r, (kind,))) - whole_on_some
    return {
        "cut": {str(r): loss(delta | cut(r, KINDS)) for r in RANKS},
        "one_kind_cut": {
            kind: {str(r): round(whole + added(kind, r), 4) for r in KIND_RANKS} for kind in KINDS
        },
        "spectra": {
            kind: spectrum_of(
                [(parts[n].S, W) for n, W in before.items() if n in parts and kind_of(n) == kind]
            )
            for kind in KINDS
        }
        | {"all": {"size": _size([(parts[name].S, before[name]) for name in parts])}},
    }


def _loss(before: Mapping[str, Tensor], delta: Mapping[str, Tensor], tokens: Tensor) -> float:
    return round(evaluate(TinyLM.from_state_dict({n: W + delta[n] for n, W in before.items()}), tokens), 4)


def spectrum_of(layers: Sequence[tuple[Tensor, Tensor]]) -> dict:
    """Of a kind's layers, each (singular values of ΔW, W): size, ‖ΔW‖/‖W‖ of all together; means over the layers of
    rank_90, stable and effective rank and the energy within 8; sigma, σ/‖ΔW‖ of the middle layer."""
    values = [S for S, _ in layers]
    middle = values[len(values) // 2]
    return {
        "size": _size(layers),
        "rank_90": _rounded(mean(lowrank.rank_for_energy(S, 0.9) for S in values)),
        "stable": _rounded(mean(lowrank.stable_rank(S) for S in values)),
        "effective": _rounded(mean(lowrank.effective_rank(S) for S in values)),
        "energy_8": _rounded(mean(float(lowrank.energy(S)[7]) for S in values)),
        "sigma": [_rounded(s) for s in middle / middle.norm()],
    }


def _size(layers: Sequence[tuple[Tensor, Tensor]]) -> float:
    change, weight = (sum(float(each.square().sum()) for each in some) for some in zip(*layers, strict=True))
    return _rounded((change / weight) ** 0.5)


def kind_of(name: str) -> str:
    """blocks.3.mlp.up.weight → up."""
    return name.split(".")[-2]


def _rounded(value: float) -> float:
    return float(f"{float(value):.3g}")


# ---- all of them ---------------------------------------------------------------------------------------------


def record_all(folder: Path, tell: Callable[[str], None] = print) -> Iterator[dict]:
    """Every row, one after the other: full tuning, LoRA at each rate, two more seeds of LoRA's best rates and
    one more of the corners of the map."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = []
    for run in (*wanted(), *wanted_lora()):
        tell(name_of(run))
        row = record(run, folder)
        trained += [row] if "rank" in row and row["after"] is not None else []
        yield row
    best = [
        min((row for row in trained if row["rank"] == rank), key=lambda row: row["after"])
        for rank in LORA_RATES
    ]
    keys = ("task", "rank", "rate", "steps")
    again = [{key: row[key] for key in keys} | {"seed": seed} for seed in (1, 2) for row in best]
    for run in (*again, *wanted_seeds()):
        tell(name_of(run))
        yield record(run, folder)
