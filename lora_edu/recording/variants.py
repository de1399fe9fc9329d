"""LoRA's variants side by side, each with its own learning rate: TinyLM tuned by each on the tasks of methods.py.

Three stages: the far task at two sizes; the near one at one; the far one again for LoRA and PiSSA at other ranks and
scalings, to see what the best rate goes with. All on the blocks' matrices, with s = 1 but where the stage is about s.
The variants are tuning/variants', the windows, the steps and the rows are methods.py's, so that the rows of LoRA there
belong here, too. The reader of the rows is `lora_edu.data.load_variants`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_edu.data.runs import VARIANT_SIZES as SIZES
from lora_edu.data.runs import tuned_rate
from lora_edu.lora import add_lora, lora_layers
from lora_edu.loss import next_token_loss
from lora_edu.recording import regimes
from lora_edu.recording.methods import BATCH, CONTEXT, STEPS, grid, recorded, seeds_of, texts
from lora_edu.recording.run import TARGETS
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches
from lora_edu.tuning.variants import (
    Muon,
    RankBudget,
    adalora,
    dora,
    first_gradient,
    lora_ga,
    lora_plus,
    lora_xs,
    orthogonality,
    pissa,
    scaled_steps,
    vera,
)

ON = TARGETS["blocks"]
# Variant → the middle one of the five rates that are tried first, each 2^k thousandths so that variants share rates.
MIDDLE = {
    "lora": 1.6e-2,
    "lora+": 4e-3,  # of A; B's is RATIO times that
    "dora": 1.6e-2,
    "pissa": 8e-3,
    "lora-ga": 8e-3,
    "adalora": 3.2e-2,
    "scaled adamw": 1.6e-2,
    "muon": 3.2e-2,
    "vera": 6.4e-2,
    "lora-xs": 1.6e-2,
}
RATIO = 16.0
# How ΔW is scaled → s by the rank. Both are LoRA with s = 1 at rank 4.
SCALES: dict[str, Callable[[int], float]] = {
    "lora, alpha 4": lambda r: 4 / r,
    "rslora, alpha 2": lambda r: 2 / math.sqrt(r),
}
SCALED_RANKS = (1, 16)
# AdaLoRA: half as many triplets again at the start; none goes in the first tenth, and none in the last 30 %
EXTRA, WARM, SETTLED, ORTHOGONAL = 1.5, 0.1, 0.3, 0.1
GRADIENT_BATCHES = 8  # of LoRA-GA


# ---- which runs ------------------------------------------------------------------------------------------------


def wanted_far(rows: Iterable[Mapping], short: int = STEPS, long: int = 0) -> list[dict]:
    """Five rates or more at the first size, three or more around its best at the second; three seeds at each best."""
    rows, runs = list(rows), []
    for method, sizes in SIZES.items():
        about = {"task": "far", "method": method, "steps": short}
        runs += grid(rows, MIDDLE[method], range(-2, 3), size=sizes[0], **about)
        first = tuned_rate(rows, size=sizes[0], **about)
        if first is not None and sizes[1:] and method != "lora":  # LoRA's at 16 is methods.py's
            runs += grid(rows, _on_lattice(first) / 2, range(-1, 2), size=sizes[1], **about)
        for size in sizes:
            runs += seeds_of(rows, size=size, **about)
    return runs


def wanted_near(rows: Iterable[Mapping], short: int = STEPS, long: int = 0) -> list[dict]:
    """The first size on the near task: three rates or more around half of the far one's, then three seeds."""
    rows, runs = list(rows), []
    for method, (size, *_rest) in SIZES.items():
        far = tuned_rate(rows, "far", method, size, short)
        if far is None or method == "lora":  # methods.py's
            continue
        about = {"task": "near", "method": method, "size": size, "steps": short}
        runs += grid(rows, _on_lattice(far) / 2, range(-1, 2), **about)
        runs += seeds_of(rows, **about)
    return runs


def wanted_scaling(rows: Iterable[Mapping], short: int = STEPS, long: int = 0) -> list[dict]:
    """Five rates or more for other scalings of LoRA at the ranks beside 4, and for PiSSA at rank 1; one seed."""
    rows, runs = list(rows), []
    about = {"task": "far", "steps": short}
    for method in SCALES:
        for rank in SCALED_RANKS:
            runs += grid(rows, 1.6e-2, range(-2, 3), method=method, size=rank, **about)
    return runs + grid(rows, MIDDLE["pissa"], range(-2, 3), method="pissa", size=1, **about)


def _on_lattice(rate: float) -> float:
    """The nearest of the rates 2^k thousandths."""
    return 1e-3 * 2 ** round(math.log2(rate / 1e-3))


# Stage → the runs that it asks for, given the rows so far; the second budget of steps is methods.py's alone.
STAGES: dict[str, Callable[[Iterable[Mapping], int, int], list[dict]]] = {
    "variants_far": wanted_far,
    "variants_near": wanted_near,
    "variants_scaling": wanted_scaling,
}


# ---- one run -------------------------------------------------------------------------------------------------


def prepare(run: Mapping) -> tuple[nn.Module, torch.optim.Optimizer, dict]:
    """The tuned task's model with the variant on it, its optimizer, and what `fit` is told beside them.

    AdamW (0.9, 0.95) without weight decay for all but Muon. Gradients are clipped as `fit` does it.
    """
    model = TinyLM.from_state_dict(regimes.start(run["task"]))
    method, size, rate, steps = run["method"], run["size"], run["rate"], run["steps"]
    torch.manual_seed(run["seed"])
    if method in SCALES:
        add_lora(model, size, size * SCALES[method](size), ON)
    elif method == "dora":
        dora(model, size, size, ON)
    elif method == "pissa":
        pissa(model, size, size, ON)
    elif method == "lora-ga":
        lora_ga(model, _gradients(model, run), size, math.sqrt(size))
    elif method == "adalora":
        more = round(EXTRA * size)
        adalora(model, more, more, ON)
    elif method == "vera":
        vera(model, size, ON, seed=run["seed"])
    elif method == "lora-xs":
        lora_xs(model, size, size, ON)
    elif method in SIZES:
        add_lora(model, size, size, ON)
    else:
        raise ValueError(f"method must be one of {', '.join((*SIZES, *SCALES))}; got {method!r}")
    if method == "muon":
        return model, Muon(model, rate), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = lora_plus(model, rate, RATIO) if method == "lora+" else [{"params": trained, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    if method == "scaled adamw":
        scaled_steps(optimizer, model)
    if method != "adalora":
        return model, optimizer, {}
    budget = RankBudget(model, size, steps, start=round(WARM * steps), end=max(1, round(SETTLED * steps)))
    optimizer.budget = budget.follow(optimizer)
    # no checkpoint: a run that goes on from one would weigh its triplets anew
    return model, optimizer, {"loss": orthogonal_loss, "checkpoint": None}


def _gradients(model: nn.Module, run: Mapping) -> dict[str, Tensor]:
    batches = Batches(texts(run["task"])["train"], batch=BATCH, context=CONTEXT, seed=run["seed"])
    return first_gradient(model, [batches(step) for step in range(GRADIENT_BATCHES)], ON)


def orthogonal_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """AdaLoRA's: the next token's, and a tenth of how far its factors are from orthonormal."""
    return next_token_loss(model, inputs, targets) + ORTHOGONAL * orthogonality(model)


def _further(model: nn.Module, optimizer: torch.optim.Optimizer, method: str) -> dict:
    """Of AdaLoRA the ranks that it chose, by layer; of LoRA that started in W what its file holds: rank 2r."""
    if method == "adalora":
        return {"ranks": optimizer.budget.ranks()}
    if method in ("pissa", "lora-ga"):
        return {"stored": 2 * sum(e.lora_A.numel() + e.lora_B.numel() for e in lora_layers(model).values())}
    return {}


def record(run: Mapping, folder: Path) -> dict:
    """Do a run, or read its row if it has been done: folder/NAME.json."""
    return recorded(run, folder, prepare, partial(_further, method=run["method"]))
