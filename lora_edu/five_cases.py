"""How low is low, in five cases: shares of a tuning's gain, by rank, from TinyLM to a language model of 135 million.

What a full tuning keeps of its gain when every ΔW is cut to r, and what LoRA trained at r reaches, from recorded rows
alone. Chapter 12's figure and table and the README's figure use it (`explore.five_cases` draws it). Not for training
and not for spectra.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from lora_edu.data import load_encoder_runs, load_llm_runs, load_methods, load_regimes
from lora_edu.data.published import Recorded, load_recorded
from lora_edu.data.runs import SHORT, SIZES, method_runs, tuned_rate

GENTLE, STEEP, ONLY = "gentle", "steep", "one tuning"  # how a curve of cuts is called
TINYLM_RATES = {GENTLE: 1e-3, STEEP: 6e-3}  # of `load_regimes`, 100 steps
EVERYWHERE = 31_000  # numbers that LoRA of rank 1 trains on every matrix of TinyLM: Σ(n + m)


class Case(NamedTuple):
    """A model tuned to a task. width: of its hidden states; measure: what the shares are shares of, in words.

    cut: how it was tuned → r → the share of its gain that stays with every ΔW cut to r (0: biases and norms alone);
    trained: r → the gain of LoRA trained at r as a share of tuned full tuning's (means over seeds), and numbers: r →
    what it trains; both empty where LoRA was not trained. full: the numbers that full tuning trains, None where nothing
    is compared with it. on: the matrices that LoRA sits on, in words.
    """

    name: str
    width: int
    measure: str
    cut: Mapping[str, Mapping[int, float]]
    trained: Mapping[int, float]
    numbers: Mapping[int, int]
    full: int | None
    on: str


def cases() -> list[Case]:
    """The five cases, smallest width first: TinyLM far and near, the published fine-tune, the encoder, SmolLM2.

    One seed of each cut tuning. Raises what the readers of data/ raise.
    """
    regimes, methods = load_regimes(), load_methods()
    return [
        far(regimes),
        near(regimes, methods),
        published(load_recorded("rxnfp")),
        encoder(load_encoder_runs()),
        language_model(load_llm_runs()),
    ]


def shares(cut: Mapping[str | int, float], before: float, after: float) -> dict[int, float]:
    """r → (before − loss cut to r) / (before − after). Raises ValueError where nothing was gained."""
    gain = before - after
    if gain <= 0:
        raise ValueError(f"nothing was gained: {before:.4f} nats before, {after:.4f} after")
    return {int(r): (before - loss) / gain for r, loss in cut.items()}


def at_rank(cases: Iterable[Case], r: int) -> list[dict]:
    """A row a case for a table: name, width, percent (r in % of the width), cut (how tuned → share), trained and
    numbers (None where LoRA was not trained at r)."""
    return [
        {
            "name": case.name,
            "width": case.width,
            "percent": 100 * r / case.width,
            "cut": {name: found[r] for name, found in case.cut.items()},
            "trained": case.trained.get(r),
            "numbers": case.numbers.get(r),
        }
        for case in cases
    ]


def ranks(cases: Iterable[Case]) -> list[int]:
    """The ranks above 0 to which every tuning of every case was cut."""
    found = [set(curve) for case in cases for curve in case.cut.values()]
    return sorted(set.intersection(*found) - {0})


# ---- one by one --------------------------------------------------------------------------------------------------


def far(rows: Iterable[Mapping]) -> Case:
    """TinyLM from code to docstrings, of rows as `load_regimes` reads them: 100 steps, gentle and steep.

    LoRA sits on every matrix. Of each rank and of full tuning the best of the rates tried counts, on the text that the
    losses are of: nothing else was held out there.
    """
    rows = [row for row in rows if (row["task"], row["steps"]) == ("far", SHORT)]
    full = [row for row in rows if row["method"] == "full" and row["seed"] == 0]
    best = _inside(full, "full tuning")
    trained = {}
    for r in sorted({row["rank"] for row in rows if row["method"] == "lora"}):
        own = [row for row in rows if row["method"] == "lora" and row["rank"] == r]
        rate = _inside([row for row in own if row["seed"] == 0], f"LoRA of rank {r}")["rate"]
        after = mean(row["after"] for row in own if row["rate"] == rate)
        trained[r] = (best["before"] - after) / (best["before"] - best["after"])
    cut = {}
    for name, rate in TINYLM_RATES.items():
        (row,) = (row for row in full if row["rate"] == rate)
        cut[name] = shares(row["cut"], row["before"], row["after"])
    numbers = {r: EVERYWHERE * r for r in trained}
    return Case("TinyLM, far text", 100, "nats a token", cut, trained, numbers, SIZES["all"], "all matrices")


def near(rows: Iterable[Mapping], methods: Sequence[Mapping]) -> Case:
    """TinyLM from docstrings to docstrings of other files: `load_regimes`' row of 100 steps at the gentle rate, and
    what `load_methods` has of LoRA, which sits on the blocks' matrices, beside full tuning."""
    about = {"task": "near", "method": "full", "steps": SHORT, "seed": 0, "rate": TINYLM_RATES[GENTLE]}
    (row,) = (row for row in rows if about.items() <= row.items())
    (before,) = (row["test"] for row in methods if (row["task"], row["method"]) == ("near", "none"))
    trained, numbers = _trained(methods, "near", SHORT, before, lambda row: row["test"])
    cut = {GENTLE: shares(row["cut"], row["before"], row["after"])}
    return Case("TinyLM, near text", 100, "nats a token", cut, trained, numbers, SIZES["all"], "the blocks")


def published(recorded: Recorded) -> Case:
    """The published fine-tune of chapter 03, which has no loss of its own: the share of the way back to it.

    1 − KL(r) / KL(0), where KL(r) is the mean divergence of the model with every ΔW cut to r from the tuned one; with
    r = 0 biases, norms, pooler and classifier are still the tuned ones. LoRA was not trained here.
    """
    cuts = (0, *recorded.facts["ranks"])
    divergence = recorded.tensors["divergence"][: len(cuts)].double().mean(dim=1).tolist()
    found = shares(dict(zip(cuts, divergence, strict=True)), divergence[0], 0.0)
    return Case(
        "rxnfp, reactions", 256, "KL divergence from the tuned model", {ONLY: found}, {}, {}, None, ""
    )


def encoder(rows: Sequence[Mapping]) -> Case:
    """all-MiniLM-L6-v2 tuned to find functions (`load_encoder_runs`): nats a query on a quarter of the test pairs."""
    of = lambda found: found["loss"]
    cut, trained, numbers, full = _real(
        rows, lambda row: of(row["quarter"]), lambda row: of(row["quarter"]), of
    )
    return Case(
        "MiniLM, search",
        384,
        "nats a query",
        cut,
        trained,
        numbers,
        full,
        "all matrices, word embeddings too",
    )


def language_model(rows: Sequence[Mapping]) -> Case:
    """SmolLM2-135M-Instruct tuned to write docstrings (`load_llm_runs`): nats a token of every second answer."""
    cut, trained, numbers, full = _real(
        rows, lambda row: row["cut_on"], lambda row: row["whole"], lambda loss: loss
    )
    return Case("SmolLM2, docstrings", 576, "nats a token", cut, trained, numbers, full, "all linear layers")


def _real(rows: Sequence[Mapping], loss: Callable, whole: Callable, of: Callable) -> tuple:
    """(cut, trained, numbers, what full tuning trains) of a real model's rows.

    loss: a tuned row → its loss; whole: a cut one → that of the whole ΔW; of: what stands in "cut" → the loss.
    """
    (untuned,) = (row for row in rows if row["method"] == "none")
    low = sorted((row for row in rows if "cut" in row and row["seed"] == 0), key=lambda row: row["rate"])
    cut = {
        name: shares({r: of(found) for r, found in row["cut"].items()}, loss(untuned), whole(row))
        for name, row in zip((GENTLE, STEEP), low, strict=True)
    }
    about = low[0]
    return (
        cut,
        *_trained(rows, about["task"], about["steps"], loss(untuned), loss),
        about["trained"],
    )


def _trained(
    rows: Sequence[Mapping], task: str, steps: int, before: float, loss: Callable
) -> tuple[dict[int, float], dict[int, int]]:
    """(r → LoRA's gain as a share of full tuning's, r → numbers trained), both tuned, means over seeds.

    Raises ValueError where full tuning's rate is not found.
    """
    runs = method_runs(rows, task, steps)
    if ("full", None) not in runs:
        raise ValueError(
            f"full tuning of {task!r} has no tuned rate: {tuned_rate(rows, task, 'full', None, steps)}"
        )
    whole = before - mean(map(loss, runs["full", None]))
    lora = dict(sorted((size, found) for (method, size), found in runs.items() if method == "lora"))
    trained = {r: (before - mean(map(loss, found))) / whole for r, found in lora.items()}
    return trained, {r: lora[r][0]["trained"] for r in trained}


def _inside(rows: Sequence[Mapping], what: str) -> Mapping:
    """Of runs that differ in their rate alone the one with the lowest loss. Raises ValueError at the grid's edge."""
    rows = sorted(rows, key=lambda row: row["rate"])
    best = min((row for row in rows if row["after"] is not None), key=lambda row: row["after"])
    if best in (rows[0], rows[-1]):
        raise ValueError(f"{what}: the best rate, {best['rate']:g}, lies at the edge of those tried")
    return best
