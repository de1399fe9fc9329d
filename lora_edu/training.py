"""One training loop for everything in the course: pre-training, full tuning and every other way to tune.

Progress bar, history, held-out evaluation, early stop, resume after an interrupt. It knows no method: it trains the
parameters that the optimizer holds. Not for the loss (loss.py).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_edu.loss import next_token_loss
from lora_edu.paths import expanded, write_atomically
from lora_edu.text import printable


@dataclass
class History:
    """What a run left behind. `steps`: a dictionary a step (step, loss, learning_rate, gradient_norm, seconds, tokens,
    and gradient_norm/NAME for each of the optimizer's groups that has a "name"); `held_out`: (step, loss) pairs;
    `seconds` and `tokens` of all steps, resumed ones included; `peak_memory`: bytes, on CUDA the most that tensors
    held during the run, on a CPU the most that the process ever held."""

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory: int = 0
    stopped: str = ""

    @property
    def best(self) -> tuple[int, float]:
        """(step, loss) of the lowest held-out loss."""
        return min(self.held_out, key=lambda pair: pair[1])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Batches:
    """step → (inputs, targets), each (batch, context) int64: windows of a token stream, one permutation an epoch.

    A pure function of seed and step, so a resumed run sees the batches that it would have seen. Each epoch cuts
    the stream at another offset.
    """

    def __init__(self, tokens: Tensor, batch: int = 16, context: int = 256, seed: int = 0):
        self.windows = (len(tokens) - 1) // context - 1
        if self.windows < batch:
            raise ValueError(
                f"{len(tokens)} tokens give {max(self.windows, 0)} windows of {context}, fewer than one batch of "
                f"{batch}: use a smaller batch or context, or more text"
            )
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self.steps_per_epoch = self.windows // batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, within = divmod(step, self.steps_per_epoch)
        generator = np.random.default_rng([self.seed, epoch])
        offset = generator.integers(self.context)
        chosen = generator.permutation(self.windows)[within * self.batch : (within + 1) * self.batch]
        starts = torch.from_numpy(chosen * self.context + offset)[:, None]
        window = self.tokens[starts + torch.arange(self.context + 1)]
        return window[:, :-1], window[:, 1:]


def fit(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    schedule: Callable[[float], float] | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    held_out: Callable[[nn.Module], float | dict[str, float]] | None = None,
    evaluate_every: int = 50,
    patience: int | None = None,
    clip: float | None = 1.0,
    checkpoint: str | Path | None = None,
    save_seconds: float = 30.0,
    progress: bool | str = True,
) -> History:
    """Train the parameters that the optimizer holds for `steps` steps and return the history.

    batches: step → (inputs, targets). schedule: share of the run done, in [0, 1) → factor on each group's learning
    rate (default: `warm_then_linear()`). loss: (model, inputs, targets) → scalar (default: `next_token_loss`, which
    takes models of transformers too).
    held_out: model → loss (a number, or a tensor that holds one), or several by name (the first decides), every
    `evaluate_every` steps and at the end; with `patience` the run stops after that many evaluations without a better
    one, and ends with the best weights. clip: largest gradient norm. Gradients may be sparse (`pair_optimizers`).
    checkpoint: a safetensors file, written after the first step, every `save_seconds` and on an interrupt; where it is
    there already, the run goes on from it, to the same weights as an undisturbed run gives on the same machine.
    progress: False for none, or a label for the bar.

    Raises ValueError where no parameter of the optimizer gets a gradient (it was made before `add_lora`), and where the
    checkpoint is another program's or another run's: it is then left as it is. Raises FloatingPointError when the loss
    or a gradient is no number or the loss explodes (the mean of 20 steps above twice the first loss),
    torch.OutOfMemoryError when a GPU is full; both say at which step and what to try. The last checkpoint is kept.
    """
    schedule = schedule or warm_then_linear()
    step_loss = loss or next_token_loss
    history, best, start = History(), None, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    if not any(p.requires_grad for p in parameters):
        raise ValueError(_nothing_to_train(parameters))
    path = None if checkpoint is None else expanded(checkpoint)
    if path is not None and path.exists():
        start, history, best = _resume(path, model, optimizer)
    device = parameters[0].device
    if device.type == "cuda":
        torch.cuda.resetpeak_memory_stats(device)
    label = progress if isinstance(progress, str) else "training"
    bar = tqdm(
        total=steps, initial=start, desc=label, disable=progress is False, leave=False, mininterval=0.5
    )
    saved = -math.inf
    step = start
    model.train()
    try:
        while step < steps and not history.stopped:
            began = time.monotonic()
            inputs, targets = batches(step)
            factor = schedule(step / steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
            value = step_loss(model, inputs, targets)
            value.backward()
            value = value.item()
            if step == start and all(p.grad is None for p in parameters):
                model.zero_grad(set_to_none=True)
                raise ValueError(_nothing_to_train(parameters))
            norms = _group_norms(optimizer)
            norm = _clip(parameters, clip)
            _refuse_to_go_on(step, value, norm, history)
            optimizer.step()
            step += 1
            taken = time.monotonic() - began
            row = {"step": step, "loss": value, "learning_rate": float(optimizer.param_groups[0]["lr"])}
            row |= {"gradient_norm": norm, "seconds": taken, "tokens": targets.numel()} | norms
            history.steps.append(row)
            history.seconds += taken
            history.tokens += targets.numel()
            history.peak_memory = max(history.peak_memory, _peak_memory(device))
            bar.update()
            bar.set_postfix_str(f"loss {value:.3f}, {history.tokens_per_second:,.0f} tokens/s", refresh=False)
            if held_out is not None and (step % evaluate_every == 0 or step == steps):
                best = _evaluate(model, held_out, history, step, patience, best)
            if path is not None and (step == steps or time.monotonic() - saved > save_seconds):
                _save(path, model, optimizer, step, history, best)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if path is not None:
            _save(path, model, optimizer, step, history, best)
        raise
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"step {step}: the GPU's memory is full ({error}). Try a smaller batch or context, or a method that trains "
            "fewer parameters; a run with a `checkpoint` goes on from its last one"
        ) from None
    finally:
        bar.close()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    if best is not None and patience is not None:
        model.load_state_dict(best, strict=False)
    model.eval()
    return history


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, context: int = 256, batch: int = 16) -> float:
    """Mean loss in nats a token over the disjoint windows of `context` tokens that fit into a 1-D stream.

    Each window is read with nothing before it, so its first tokens are guessed with little context.
    """
    pairs = disjoint_windows(tokens, context, batch)
    was_training = model.training
    model.eval()
    total, windows = 0.0, 0
    for inputs, targets in pairs:
        total += next_token_loss(model, inputs, targets).item() * len(inputs)
        windows += len(inputs)
    model.train(was_training)
    return total / windows


def disjoint_windows(tokens: Tensor, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), each (batch or fewer, context), of a 1-D stream, whose last few tokens may be left over.

    Raises ValueError for a stream without a single window.
    """
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ValueError(
            f"{len(tokens)} tokens do not fill one window of {context} tokens and the one after it"
        )
    inputs = tokens[: windows * context].view(windows, context)
    targets = tokens[1 : windows * context + 1].view(windows, context)
    return zip(inputs.split(batch), targets.split(batch), strict=True)


def warm_then_linear(warm: float = 0.05) -> Callable[[float], float]:
    """Learning-rate factor: up from 0 over the first `warm` share of the run, then straight down to 0."""

    def factor(done: float) -> float:
        return min((done + 1e-3) / warm, 1.0) if done < warm else (1 - done) / (1 - warm)

    return factor


def _nothing_to_train(parameters: list[Tensor]) -> str:
    numbers = sum(p.numel() for p in parameters)
    return (
        f"none of the optimizer's {len(parameters)} parameters ({numbers} numbers) gets a gradient, so nothing would "
        "be trained: are they frozen, or was the optimizer made before add_lora? Make it afterwards, from "
        "lora_edu.lora.trainable_parameters(model)"
    )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients' numbers, to be read and scaled in place; of a sparse gradient those of the rows it holds."""
    found = []
    for each in parameters:
        if each.grad is not None and each.grad.is_sparse:
            # One row a token: repeated ones are added up first, since the norm is their sum's.
            each.grad = each.grad.coalesce()
            found.append(each.grad.values())
        elif each.grad is not None:
            found.append(each.grad)
    return found


def _group_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """‖gradient‖ of each of the optimizer's groups that has a name."""
    norms = {}
    for group in optimizer.param_groups:
        gradients = _gradients(group["params"]) if "name" in group else []
        if gradients:
            norms[f"gradient_norm/{group['name']}"] = nn.utils.get_total_norm(gradients).item()
    return norms


def _clip(parameters: list[Tensor], clip: float | None) -> float:
    """Scale all gradients down to a common norm of `clip`, in place; returns the norm they had."""
    gradients = _gradients(parameters)
    norm = nn.utils.get_total_norm(gradients)
    if clip is not None:
        # As torch's clip_grad_norm_, which can't take sparse gradients.
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        for each in gradients:
            each.mul_(factor.to(each.device))
    return norm.item()


def _refuse_to_go_on(step: int, value: float, norm: float, history: History) -> None:
    way_out = "Try a smaller learning rate, a longer warm-up or a smaller `clip`."
    if not math.isfinite(value) or not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: loss {value:.4g}, gradient norm {norm:.4g}. The weights are those of the step before. "
            + way_out
        )
    last = [row["loss"] for row in history.steps[-20:]]
    if len(last) == 20 and sum(last) / 20 > 2 * abs(history.steps[0]["loss"]):
        raise FloatingPointError(
            f"step {step}: the loss explodes, {sum(last) / 20:.4g} over the last 20 steps after "
            f"{history.steps[0]['loss']:.4g} at the first. {way_out}"
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU since the run began, or that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which has no `resource`
        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _evaluate(
    model, held_out, history: History, step: int, patience: int | None, best: dict | None
) -> dict | None:
    """Append the held-out loss; keep a copy of the best weights when the run may stop early."""
    losses = held_out(model)
    if isinstance(losses, dict):
        losses = {str(name): _number(value, f"held_out[{name!r}]") for name, value in losses.items()}
        history.evaluations.append({"step": step} | losses)
        losses = next(iter(losses.values()))
    history.held_out.append((step, _number(losses, "held_out")))
    model.train()
    if patience is None:
        return None
    at = history.best[0]
    if at == step:
        best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    elif sum(s > at for s, _ in history.held_out) >= patience:
        history.stopped = f"no better held-out loss in {patience} evaluations after step {at}"
    return best


def _number(value: object, name: str) -> float:
    """A loss as Python's float, whatever holds it: a tensor or an array of one number, too."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must give one number (or several by name, in a dictionary); got {printable(repr(value))}"
        ) from None


# Checkpoints: everything a run needs to go on, as one safetensors file


def _save(path: Path, model, optimizer, step: int, history: History, best: dict | None) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    numbers = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            elif isinstance(value, bool | int | float | str | None):
                numbers.setdefault(str(index), {})[key] = value
            else:
                raise TypeError(
                    f"a checkpoint holds tensors and numbers, but {type(optimizer).__name__} keeps {key!r} as a "
                    f"{type(value).__name__}; train without `checkpoint`, or with another optimizer"
                )
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    about = {"step": step, "history": vars(history), "optimizer": _portrait(optimizer), "numbers": numbers}
    data = save_safetensors(
        {k: v.detach().contiguous().clone() for k, v in tensors.items()}, {"about": json.dumps(about)}
    )
    write_atomically(path, data)


def _portrait(optimizer: torch.optim.Optimizer) -> dict:
    """What an optimizer must have in common with the one whose state it takes over."""
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    return {"kind": type(optimizer).__name__, "shapes": shapes}


def _resume(path: Path, model, optimizer) -> tuple[int, History, dict | None]:
    """Take a checkpoint's weights and state over; ValueError, and nothing changed, if they aren't this run's."""
    tensors, about = _read(path)
    parts = {"model": {}, "best": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    mine = model.state_dict()
    for name in [*mine, *sorted(parts["model"].keys() - mine.keys())]:
        here, there = (
            tuple(state[name].shape) if name in state else "missing" for state in (mine, parts["model"])
        )
        if here != there:
            raise ValueError(
                _not_this_run(path, f"{printable(name)} is {there} in it and {here} in the model")
            )
    wanted, found = _portrait(optimizer), about.get("optimizer", _portrait(optimizer))
    if found != wanted:
        it, this = (f"{each['kind']} over {len(each['shapes'])} parameters" for each in (found, wanted))
        other = f"{it}, here it is {this}" if it != this else f"{it} of other shapes"
        raise ValueError(_not_this_run(path, f"its optimizer was {other}"))
    state = {int(index): dict(values) for index, values in about.get("numbers", {}).items()}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    history = History(**about["history"])
    history.held_out = [tuple(pair) for pair in history.held_out]
    return about["step"], history, parts["best"] or None


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a checkpoint and what it says about itself; ValueError for any other file."""
    if path.is_dir():
        raise ValueError(f"a checkpoint is a file; {printable(path)} is a folder. Name a file in it")
    data = path.read_bytes()
    try:
        tensors = load_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["about"])
        History(**about["history"]), about["step"] + 1
        if not all(name.partition(".")[0] in ("model", "best", "optimizer") for name in tensors):
            raise KeyError
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{printable(path)} is no checkpoint of fit, so it is neither read nor overwritten: name another file, or "
            "move that one away"
        ) from None
    return tensors, about


def _not_this_run(path: Path, why: str) -> str:
    return (
        f"{printable(path)} is the checkpoint of another run: {why}. It is left as it is: name another file, or delete "
        "it to begin anew"
    )
