"""Chapter 12's record: a small language model tuned to write docstrings, by LoRA and fully, and how low its ΔW is.

Which runs there are, what one is, and what is measured of the tuned ones: held-out answers, other texts, what it
writes, spectra, what is left when every ΔW is cut or intruders are scaled down, memory by the base's format.
Validation chooses, test is reported. The tools are docstrings.py's; the reader of what is written is
`lora_edu.data.load_llm_runs`.
"""

import copy
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu import docstrings, lowrank
from lora_edu.data import corpus, hub
from lora_edu.data.functions import SHARES
from lora_edu.data.runs import tuned_method, tuned_rate
from lora_edu.lora import add_lora, lora_layers, quantise_model
from lora_edu.recording import real_models
from lora_edu.recording.analysis import STRONGEST
from lora_edu.recording.methods import KEYS, name_of, record_stage
from lora_edu.recording.real_models import Subject, texts
from lora_edu.recording.run import workers

TASK = "docstrings"
STEPS, BATCH = 24, 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TABLE = ("embed_tokens",)  # tied to the head, which keeps its own
SUBJECT = Subject(
    TASK,
    {
        "lora": (*ATTENTION, *MLP),
        "lora attention": ATTENTION,
        "lora MLP": MLP,
        "lora table": TABLE,
    },
    ranks=(1, 4, 8, 16, 64),
    grids={1: 4e-3, 8: 2e-3, 64: 1e-3},
    rank=8,
    full=1e-4,
    ratios={"lora attention": 2.0, "lora table": 1.0},
)
QUANTISED = "lora NF4"  # LoRA as "lora", on a base in NF4 with double quantisation
VALIDATED, TESTED, CUT_ON = 64, 192, 96  # pairs: rates are chosen on, reported on, cuts measured on
WRITTEN = 64  # of the tested functions, which docstrings are written for
WINDOWS = 16  # pieces of 256 tokens, of prose and of code each
CUT_TO = (0, 1, 2, 4, 8, 16, 32, 64)
CUT_AGAIN = (1, 8, 64)  # with the second seed
KIND_RANKS = (8,)  # to which one kind at a time is cut
INTRUDER = 0.5  # largest |cosine| with a direction of W below which one of the strongest is an intruder
SCALES = (0.0, 1.0)  # of what is scaled: the intruders, or as many directions that are none
KINDS = ("table", "query", "key", "value", "output", "gate", "up", "down")
_KINDS = {
    "embed_tokens.weight": "table",
    "q_proj.weight": "query",
    "k_proj.weight": "key",
    "v_proj.weight": "value",
    "o_proj.weight": "output",
    "gate_proj.weight": "gate",
    "up_proj.weight": "up",
    "down_proj.weight": "down",
}
BASES = ("float32", "bfloat16", "NF4")


# ---- which runs ------------------------------------------------------------------------------------------------


def wanted(rows: Iterable[Mapping], short: int = STEPS, long: int = STEPS) -> list[dict]:
    """`real_models.wanted`, and LoRA on the quantised base at the rate that is LoRA's on the float one."""
    rows = list(rows)
    runs = real_models.wanted(SUBJECT, rows, short)
    rate = tuned_rate(rows, TASK, "lora", SUBJECT.rank, short)
    if rate is not None:
        about = {"task": TASK, "method": QUANTISED, "size": SUBJECT.rank, "rate": rate, "steps": short}
        runs += [about | {"seed": seed} for seed in (0, 1)]
    return runs


def tuned(rows: Iterable[Mapping], short: int = STEPS) -> list[Mapping]:
    """The rows that are measured on test; LoRA on the quantised base is there at one rate alone."""
    rows = list(rows)
    quantised = [row for row in rows if row["method"] == QUANTISED]
    others = [row for row in rows if row["method"] != QUANTISED]
    return [*real_models.tuned(SUBJECT, others, short), *quantised]


# ---- one run ---------------------------------------------------------------------------------------------------


@cache
def opened() -> hub.Opened:
    """`hub.load_language_model`, opened once: a GGUF file takes a quarter of a minute."""
    return hub.load_language_model()


def untuned() -> nn.Module:
    """A copy of the model as it was opened."""
    return copy.deepcopy(opened().model)


@cache
def pairs(split: str) -> tuple[list, list]:
    """(functions, pairs) of a split; of validation and test as many as are measured, evenly spaced."""
    kept, found = docstrings.encode(opened().tokenizer, texts()[split])
    number = {"validation": VALIDATED, "test": TESTED}.get(split, len(found))
    return docstrings.spread(kept, number), docstrings.spread(found, number)


@cache
def windows() -> dict[str, Tensor]:
    """ "prose": the language's manual, "code": held-out modules; (WINDOWS, 256) tokens each."""
    tokenizer = opened().tokenizer
    code = [
        text for name, text in corpus.read_documents("code") if corpus.split_name(name, *SHARES) == "test"
    ]
    prose = [text for _, text in corpus.read_documents("manual")]
    texts = {"prose": prose, "code": code[:: max(len(code) // 60, 1)]}
    return {name: docstrings.windows_of(tokenizer, some, WINDOWS) for name, some in texts.items()}


def apply(model: nn.Module, method: str, size: int | None, seed: int = 0) -> nn.Module:
    """The model with LoRA of rank `size`, s = 1, on a method's matrices, or free as a whole ("full")."""
    if method == "full":
        return model.requires_grad_(True)
    torch.manual_seed(seed)
    if method == QUANTISED:
        quantise_model(model)
        method = "lora"
    return add_lora(model, size, size, SUBJECT.targets[method], tied="separate")


def train(model: nn.Module, run: Mapping):
    """`real_models.train` on the training pairs."""
    batches = docstrings.AnswerBatches(pairs("train")[1], BATCH, run["seed"])
    return real_models.train(model, batches, docstrings.answer_loss, run["rate"], run["steps"])


def loss_on(model: nn.Module, split: str, number: int | None = None) -> float:
    """Nats a token of the held-out answers, of `number` of them evenly spaced."""
    found = pairs(split)[1]
    nats, tokens = docstrings.held_out(model, docstrings.spread(found, number or len(found)))
    return round(float(nats.sum() / tokens.sum()), 4)


def record(run: Mapping, folder: Path) -> dict:
    """`real_models.record` of the language model."""
    validated = lambda model: {"validation": loss_on(model, "validation")}
    return real_models.record(run, folder, untuned, apply, train, validated)


def trained_again(run: Mapping, folder: Path) -> nn.Module:
    """The model as a recorded run has left it."""
    return real_models.trained_again(run, folder, untuned(), apply)


# ---- what is measured of the tuned ones --------------------------------------------------------------------------


def measured(model: nn.Module) -> dict:
    """ "test": nats a token of the held-out answers; "nats": those of each answer; "cut_on": the loss of the answers
    that cuts are measured on; "prose", "code": nats a token of other text; "chrf", "imperative": of what is
    written for WRITTEN of the functions; "answers": those texts."""
    functions, found = pairs("test")
    nats, tokens = docstrings.held_out(model, found)
    some = docstrings.spread(range(len(found)), CUT_ON)
    prompts = docstrings.spread([each.prompt for each in found], WRITTEN)
    answers = docstrings.write(model, opened().tokenizer, prompts)
    summaries = docstrings.spread([each.summary for each in functions], WRITTEN)
    return {
        "test": round(float(nats.sum() / tokens.sum()), 4),
        "cut_on": round(float(nats[some].sum() / tokens[some].sum()), 4),
        **{name: round(docstrings.text_loss(model, some), 4) for name, some in windows().items()},
        "chrf": round(docstrings.chrf(answers, summaries), 2),
        "imperative": round(sum(map(docstrings.is_imperative_line, answers)) / len(answers), 4),
        "nats": [round(each, 3) for each in nats.tolist()],
        "answers": answers,
    }


def tested(run: Mapping, folder: Path) -> dict:
    """`measured` of a run. Read if it is there: folder/NAME.test.json."""
    do = lambda: measured(trained_again(run, folder))
    return real_models.read_or_make(folder / f"{name_of(run)}.test.json", do)


def kind_of(name: str) -> str | None:
    """model.layers.3.self_attn.q_proj.weight → query; None for what is not cut."""
    return next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)


def cut(run: Mapping, folder: Path) -> dict:
    """`real_models.cut` of a full tuning, the loss on CUT_ON answers as its figure; "whole": that of the whole ΔW.

    Read if it is there: folder/NAME.cut.json.
    """
    figures = lambda model: loss_on(model, "test", CUT_ON)
    ranks, kind_ranks = (CUT_AGAIN, ()) if run["seed"] else (CUT_TO, KIND_RANKS)

    def do() -> dict:
        whole, delta = figures(trained_again(run, folder)), real_models.deltas(run, folder)
        parts = real_models.cut(untuned(), delta, kind_of, KINDS, figures, ranks, kind_ranks)
        return {"whole": whole} | parts

    return real_models.read_or_make(folder / f"{name_of(run)}.cut.json", do)


def intruding(run: Mapping, folder: Path) -> dict:
    """Is it the intruders that forget? They are scaled, and as many of the strongest directions that are none.

    Shuttleworth et al. (2024), LoRA vs Full Fine-tuning, §3 and §5: among the STRONGEST left singular directions of a
    tuned matrix an intruder is one whose largest |cosine| with a direction of W is below INTRUDER. One is scaled by
    W + ΔW + (λ − 1) σ u vᵀ. The control takes, in the same matrix, as many that are no intruders, the strongest first.
    "number": intruders in a matrix, the mean; "share": matrices with one; "scaled", "control": λ → "task" (CUT_ON
    answers), "prose", "code" in nats a token. Read if it is there: folder/NAME.intruders.json.
    """
    do = lambda: _intruding(run, folder)
    return real_models.read_or_make(folder / f"{name_of(run)}.intruders.json", do)


def _intruding(run: Mapping, folder: Path) -> dict:
    base = real_models.weights_of(untuned())
    model = trained_again(run, folder)
    layers = dict(lora_layers(model))
    after = {
        f"{name}.weight": base[f"{name}.weight"] + layer.delta_weight() for name, layer in layers.items()
    }
    if not layers:
        after = {name: W for name, W in real_models.weights_of(model).items() if kind_of(name)}
    after = {name: W.detach() for name, W in after.items() if kind_of(name) != "table"}
    chosen: dict[str, dict[str, Tensor]] = {"scaled": {}, "control": {}}
    numbers = []
    for name, W in after.items():
        U, S, Vh = lowrank.svd(W)
        unlike = (U.T @ lowrank.svd(base[name]).U).abs().amax(1) < INTRUDER
        those = unlike[:STRONGEST].nonzero().flatten()
        numbers.append(len(those))
        others = (~unlike).nonzero().flatten()[: numbers[-1]]
        for what, some in (("scaled", those), ("control", others)):
            chosen[what][name] = (U[:, some] * S[some]) @ Vh[some]
    model = untuned()
    left = {} if layers else {n: d for n, d in real_models.deltas(run, folder).items() if n not in after}
    row = {"number": round(sum(numbers) / len(numbers), 3)}
    row |= {"share": round(sum(map(bool, numbers)) / len(numbers), 3)}
    for what, taken in chosen.items():
        row[what] = {}
        for scale in SCALES:
            if scale == 1.0 and what == "control":
                row[what]["1"] = row["scaled"]["1"]
                continue
            delta = {name: after[name] - base[name] + (scale - 1) * taken[name] for name in after}
            real_models.moved(model, base, delta | left)
            losses = {"task": loss_on(model, "test", CUT_ON)}
            losses |= {name: round(docstrings.text_loss(model, some), 4) for name, some in windows().items()}
            row[what][f"{scale:g}"] = losses
    return row


def to_look_for_intruders(rows: Iterable[Mapping], short: int = STEPS) -> list[Mapping]:
    """LoRA of the middle rank at its tuned rate and at its largest that ended; full tuning at its largest."""
    rows, found = list(rows), []
    for method, size in (("lora", SUBJECT.rank), ("full", None)):
        own = [row for row in rows if (row["method"], row["size"], row["seed"]) == (method, size, 0)]
        best = tuned_method(rows, TASK, method, size, short)
        if best is not None:
            steepest = max((row for row in own if row["validation"] is not None), key=lambda row: row["rate"])
            found += [steepest] if method == "full" else [best, steepest]
    return list({name_of(row): row for row in found}.values())


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(base: str, method: str, folder: Path) -> dict:
    """Peak memory of two training steps with a base in a format, over what the process held before it read the base.

    To be called in a process of its own. folder: `write_bases` has put the bases and a batch there. In bytes: "file",
    the base's; resident memory "loaded" with the base and "peak" at the end.
    """
    batch = [docstrings.Pair(*each) for each in json.loads((folder / "batch.json").read_text())]
    batches = docstrings.AnswerBatches(batch, BATCH)
    model = hub.without_weights(folder)
    before = psutil.Process().memory_info().rss
    if base == "NF4":
        quantise_model(model)
    state = {name: each.clone() for name, each in load_file(folder / f"{base}.safetensors").items()}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(
        model.config
    )  # its buffers are no part of a state dict
    loaded = psutil.Process().memory_info().rss
    model = apply(model, method, None if method == "full" else SUBJECT.rank)
    with _Peak() as seen:
        real_models.train(model, batches, docstrings.answer_loss, 1e-5, 2)
    size = (folder / f"{base}.safetensors").stat().st_size
    return {
        "base": base,
        "method": method,
        "file": size,
        "loaded": loaded - before,
        "peak": seen.most - before,
    }


class _Peak(threading.Thread):
    """The most resident memory of this process, looked at a hundred times a second: `most`, in bytes."""

    def __enter__(self) -> "_Peak":
        self.most, self.going = 0, True
        self.start()
        return self

    def run(self) -> None:
        while self.going:
            self.most = max(self.most, psutil.Process().memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *error) -> None:
        self.going = False
        self.join()


def write_bases(folder: Path) -> None:
    """The model in float32, in bfloat16 and with its linear layers in NF4, each a safetensors file; its config and a
    batch of BATCH pairs."""
    (folder / "batch.json").write_text(json.dumps(pairs("train")[1][:BATCH]), encoding="utf-8")
    for base in BASES:
        model = untuned()
        if base == "bfloat16":
            model = model.bfloat16()
        if base == "NF4":
            quantise_model(model)
        model.config.save_pretrained(folder)
        save_file(real_models.weights_of(model), folder / f"{base}.safetensors")


def memories() -> list[dict]:
    """`memory` of LoRA on each base and of full tuning, each in a fresh process, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_bases(Path(folder))
        for base, method in (*((base, "lora") for base in BASES), ("float32", "full")):
            with workers(1) as pool:
                rows.append(pool.submit(memory, base, method, Path(folder)).result())
    return rows


# ---- all of them -------------------------------------------------------------------------------------------------


def without_tuning(run: Mapping, folder: Path) -> dict:
    """The row of the untuned model ("none"), or of it with its linear layers in NF4 ("none NF4").

    Read if it is there: folder/METHOD.json.
    """

    def do() -> dict:
        model = untuned()
        if run["method"] != "none":
            quantise_model(model)
        row = dict.fromkeys(KEYS) | {"task": TASK, "method": run["method"], "trained": 0}
        return row | {"validation": loss_on(model, "validation")} | measured(model)

    return real_models.read_or_make(folder / f"{run['method']}.json", do)


def record_all(
    folder: Path, steps: int = STEPS, processes: int = 2, tell: Callable[[str], None] = print
) -> list[dict]:
    """Every row: the untuned model, every run; of the tuned ones what `tested`, `cut` and `intruding` found, too.

    `processes` at a time with one thread each. Stopped, it goes on from there.
    """
    about = {"stages": {"llm": wanted}, "do": record}
    rows = list(record_stage("llm", [], folder, processes, tell, steps, steps, **about))
    by_name = {name_of(row): row for row in rows}
    rows = [by_name[name] for name in dict.fromkeys(name_of(run) for run in wanted(rows, steps))]
    low = {name_of(run) for run in real_models.how_low(SUBJECT, rows, steps)}
    bare = [{**dict.fromkeys(KEYS, 0), "method": method} for method in ("none", "none NF4")]
    jobs = [(without_tuning, run) for run in bare]
    jobs += [(tested, row) for row in tuned(rows, steps)]
    jobs += [(cut, row) for row in rows if name_of(row) in low]
    jobs += [(intruding, row) for row in to_look_for_intruders(rows, steps)]
    by_name |= {name_of(run): run for run in bare}
    for name, part in real_models.side_by_side(jobs, folder, processes):
        tell(name)
        by_name[name] |= {"intruders": part} if "number" in part else part
    return [*bare, *rows]


def functions() -> list[dict]:
    """The tested functions: module, name, summary, tokens of the answer; of those that are written for, the source."""
    kept, found = pairs("test")
    written = {id(each) for each in docstrings.spread(kept, WRITTEN)}
    return [
        {"module": each.module, "name": each.name, "summary": each.summary, "tokens": len(pair.answer)}
        | ({"source": each.source} if id(each) in written else {})
        for each, pair in zip(kept, found, strict=True)
    ]
