"""What chapter 03 needs of short tunings that it has no time for: ΔW of another text, and a planted ΔW under noise.

Full tuning only, from the base as shipped; figures are kept, weights are not.
"""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_edu import lowrank
from lora_edu.data import load_checkpoint, load_corpus
from lora_edu.loss import next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, fit

RATE, STEPS, BATCH = 6e-3, 100, 8  # of 256 tokens
SIZES = (1, 2, 4, 8, 16, 32)
CUTS = (1, 2, 4, 16, 64)
PAIRS = {"same text": ("reference", 1), "another text": ("manual", 0)}  # beside ("reference", 0)


def tune(text: str, seed: int, steps: int = STEPS) -> dict[str, Tensor]:
    """ΔW of every matrix after full tuning with AdamW on a corpus, from the base as shipped."""
    base = load_checkpoint("base")
    model = TinyLM.from_state_dict(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    fit(model, Batches(load_corpus(text).train, batch=BATCH, seed=seed), optimizer, steps, progress=False)
    after = model.state_dict()
    return {name: after[name] - W for name, W in base.items() if W.dim() == 2}


def overlaps(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, list[dict]]:
    """Kind → for each layer φ(i, i) of two updates for i in SIZES, on both sides, and their cosine."""
    found: dict[str, list[dict]] = {}
    for name, dW in one.items():
        row = {
            side: [
                round(float(value), 4)
                for value in lowrank.similarity_grid(dW, other[name], SIZES[-1], SIZES[-1], side).diagonal()[
                    [i - 1 for i in SIZES]
                ]
            ]
            for side in ("right", "left")
        }
        row["cosine"] = round(float(F.cosine_similarity(dW.flatten(), other[name].flatten(), dim=0)), 4)
        found.setdefault(name.split(".")[-2], []).append(row)
    return found


def other_text(tell: Callable[[str], object] = lambda _: None, steps: int = STEPS) -> dict:
    """Three tunings of one length: the second of the same text in another order, the third of another text."""
    tell("reference, seed 0")
    first = tune("reference", 0, steps)
    found = {}
    for title, (text, seed) in PAIRS.items():
        tell(f"{text}, seed {seed}")
        found[title] = overlaps(first, tune(text, seed, steps))
    return {"rate": RATE, "steps": steps, "batch": f"{BATCH} × 256", "sizes": list(SIZES), "overlaps": found}


def planted_with_labels(about: Mapping, tell: Callable[[str], object] = lambda _: None) -> dict:
    """The planted rank again, learnt from tokens that are *drawn* from the teacher: its probabilities plus noise.

    about: what `make data` says of the run that ships, which had the teacher's probabilities themselves; matrix,
    steps, rate and batches are the same, the loss is the next-token loss on one token drawn for each place.
    """
    base, goal = load_checkpoint("base"), load_checkpoint("planted")["planted"]
    name = about["matrix"]
    teacher = TinyLM.from_state_dict(base | {name: base[name] + goal}).eval()
    student = TinyLM.from_state_dict(base)
    block = name.rsplit(".", 3)[0] + "."
    for each, parameter in student.named_parameters():
        parameter.requires_grad_(each.startswith(block) and parameter.dim() == 2)
    generator = torch.Generator().manual_seed(0)

    def drawn(model: TinyLM, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            p = teacher(inputs).softmax(-1).flatten(0, 1)
            labels = torch.multinomial(p, 1, generator=generator).view_as(targets)
        return next_token_loss(model, inputs, labels)

    tell("tokens drawn from the teacher")
    free = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=about["rate"], weight_decay=0.0)
    text = load_corpus("code")
    fit(student, Batches(text.train, batch=4, seed=1), optimizer, about["steps"], loss=drawn, progress=False)
    after = student.state_dict()
    found = {each: after[each] - W for each, W in base.items() if each.startswith(block) and W.dim() == 2}
    return planted_figures(base, goal, found, name, text.test[: 8 * 256].view(8, 256))


def planted_figures(
    base: Mapping[str, Tensor], goal: Tensor, found: Mapping[str, Tensor], name: str, text: Tensor
) -> dict:
    """Spectrum of what was found in the planted matrix, its overlap with the goal, and the KL that each rank leaves."""

    @torch.no_grad()
    def predictions(update: Mapping[str, Tensor]) -> Tensor:
        state = {each: W + update.get(each, 0) for each, W in base.items()}
        return TinyLM.from_state_dict(state)(text).log_softmax(-1)

    aim = predictions({name: goal})

    def distance(update: Mapping[str, Tensor]) -> float:
        guess = predictions(update)
        return round(F.kl_div(guess, aim, log_target=True, reduction="none").sum(-1).mean().item(), 5)

    return {
        "singular_values": [round(float(value), 4) for value in torch.linalg.svdvals(found[name])],
        "relative_norm": round(float(found[name].norm() / goal.norm()), 4),
        "overlap": [
            round(lowrank.subspace_similarity(found[name], goal, 2, 2, side), 4) for side in ("right", "left")
        ],
        "divergence": {
            "base": distance({}),
            "tuned": distance(found),
            **{str(r): distance({each: lowrank.truncate(dW, r) for each, dW in found.items()}) for r in CUTS},
        },
    }


def packed(found: Mapping) -> bytes:
    """The record as JSON, a line for each kind of matrix and for each fact."""
    lines = []
    for title, facts in found.items():
        inner = [
            f'"{key}": {{\n' + ",\n".join(f'"{t}": {{\n{_rows(v)}\n}}' for t, v in value.items()) + "\n}"
            if key == "overlaps"
            else f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in facts.items()
        ]
        lines.append(f"{json.dumps(title)}: {{\n" + ",\n".join(inner) + "\n}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _rows(kinds: Mapping) -> str:
    return ",\n".join(f"{json.dumps(kind)}: {json.dumps(rows)}" for kind, rows in kinds.items())
