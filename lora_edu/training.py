"""One training loop for everything in the course: pre-training, full tuning and every other way to tune.

Progress bar, history, held-out evaluation, early stop, resume after an interrupt, several processes under torchrun.
It knows no method: it trains the parameters that the optimizer holds.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lora_edu.paths import write_atomically


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
    checkpoint: Path | None = None,
    save_seconds: float = 30.0,
    progress: bool | str = True,
) -> History:
    """Train the parameters that the optimizer holds for `steps` steps and return the history.

    batches: step → (inputs, targets). schedule: share of the run done, in [0, 1) → factor on each group's learning
    rate (default: `warm_then_linear()`). loss: (model, inputs, targets) → scalar (default: `next_token_loss`).
    held_out: model → loss, or several by name (the first decides), every
    `evaluate_every` steps and at the end; with `patience` the run stops after that many evaluations without a better
    one, and ends with the best weights. clip: largest gradient norm.
    checkpoint: a safetensors file, written every `save_seconds` and on an interrupt; where it is there already,
    the run goes on from it, to the same weights as an undisturbed run gives on the same machine. progress: False for
    none, or a label for the bar.

    Under torchrun every process calls this alike; each takes its share of every batch, gradients are averaged
    (DistributedDataParallel), the first process alone draws the bar and writes the checkpoint, and all return the
    same history. A batch has to be a multiple of the number of processes.

    Raises FloatingPointError when the loss is no finite number or explodes (the mean of 20 steps is over twice the
    first loss), torch.OutOfMemoryError when a GPU is full; both say at which step and what to try. The last
    checkpoint is kept.
    """
    schedule = schedule or warm_then_linear()
    history, best, start = History(), None, 0
    rates = [group["lr"] for group in optimizer.param_groups]
    if checkpoint is not None and checkpoint.is_file():
        start, history, best = _resume(checkpoint, model, optimizer)
    team = Team()
    step_loss = team.share(LossOf(model, loss or next_token_loss))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats(parameters[0].device)
    label = progress if isinstance(progress, str) else "training"
    hidden = progress is False or team.rank > 0
    bar = tqdm(total=steps, initial=start, desc=label, disable=hidden, leave=False, mininterval=0.5)
    saved = time.monotonic()
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
            value = step_loss(*team.part(inputs, targets))
            value.backward()
            value = team.mean(value.detach())
            norms = _group_norms(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf).item()
            _refuse_to_go_on(step, value, norm, history)
            optimizer.step()
            step += 1
            taken = time.monotonic() - began
            row = {"step": step, "loss": value, "learning_rate": optimizer.param_groups[0]["lr"]}
            row |= {"gradient_norm": norm, "seconds": taken, "tokens": targets.numel()} | norms
            history.steps.append(row)
            history.seconds += taken
            history.tokens += targets.numel()
            history.peak_memory = max(history.peak_memory, _peak_memory(parameters[0].device))
            bar.update()
            bar.set_postfix_str(f"loss {value:.3f}, {history.tokens_per_second:,.0f} tokens/s", refresh=False)
            if held_out is not None and (step % evaluate_every == 0 or step == steps):
                best = _evaluate(model, held_out, history, step, patience, best, team)
            due = step == steps or time.monotonic() - saved > save_seconds
            if checkpoint is not None and due and team.rank == 0:
                _save(checkpoint, model, optimizer, step, history, best)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None and team.rank == 0:
            _save(checkpoint, model, optimizer, step, history, best)
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


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats. inputs, targets: (batch, time) int64.

    For a model with `hidden` and `head` the logits of the whole batch (16 × 256 × 10 000 numbers: 164 MB) are never
    held at once: `HeadLoss` goes through them in slices. For any other model: logits, then cross-entropy.
    """
    if not (hasattr(model, "hidden") and hasattr(model, "head")):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    head, hidden, low, lora_B = model.head, model.hidden(inputs).flatten(0, 1), None, None
    if hasattr(head, "lora_B") and not head.merged:
        low, lora_B = head.scaling * F.linear(hidden, head.lora_A), head.lora_B
    return HeadLoss.apply(hidden, head.weight, targets.flatten(), low, lora_B)


class HeadLoss(torch.autograd.Function):
    """mean cross-entropy of softmax(z) against targets, in slices of 256 tokens; gradients made on the way.

    hidden h (tokens, width), weight W (vocabulary, width), targets (tokens,) → scalar. z = h Wᵀ, and with LoRA
    z = h Wᵀ + low Bᵀ for low = s · h Aᵀ (tokens, r) and lora_B (vocabulary, r): ΔW is never formed. With p =
    softmax(z), the one-hot target y and g = (p − y) / tokens: ∂/∂h = g W, ∂/∂W = gᵀ h, ∂/∂low = g B, ∂/∂B = gᵀ low.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, low: Tensor | None, lora_B: Tensor | None
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_low, needs_B = ctx.needs_input_grad
        x, table = (
            (hidden, weight) if low is None else (torch.cat([hidden, low], 1), torch.cat([weight, lora_B], 1))
        )
        width, tokens, total = hidden.shape[1], len(targets), hidden.new_zeros(())
        grad_x = torch.empty_like(x) if needs_hidden or needs_low else None
        trained = slice(0 if needs_weight else width, None if needs_B else width)  # columns of the table
        grad_table = torch.zeros_like(table[:, trained]) if needs_weight or needs_B else None
        for start in range(0, tokens, 256):
            rows, y = x[start : start + 256], targets[start : start + 256, None]
            z = rows @ table.T
            z -= z.amax(dim=1, keepdim=True)
            right = z.gather(1, y)
            sums = z.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - right).sum()
            if grad_x is not None or grad_table is not None:
                z /= sums * tokens
                z.scatter_add_(1, y, torch.full_like(right, -1 / tokens))
            if grad_x is not None:
                torch.mm(z, table, out=grad_x[start : start + 256])
            if grad_table is not None:
                grad_table.addmm_(z.T, rows[:, trained])
        ctx.width = width
        ctx.save_for_backward(grad_x, grad_table)
        return total / tokens

    @staticmethod
    def backward(ctx, grad: Tensor):
        (grad_x, grad_table), width = ctx.saved_tensors, ctx.width
        needs_hidden, needs_weight, _, needs_low, needs_B = ctx.needs_input_grad
        first = width if needs_weight else 0  # where B's columns begin in grad_table
        return (
            grad * grad_x[:, :width] if needs_hidden else None,
            grad * grad_table[:, :width] if needs_weight else None,
            None,
            grad * grad_x[:, width:] if needs_low else None,
            grad * grad_table[:, first:] if needs_B else None,
        )


class LossOf(nn.Module):
    """A model with its loss as one module, whose forward pass DistributedDataParallel can watch."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model, inputs, targets)


class Team:
    """The processes of a run: this one alone, or those that torchrun started (`rank` of `size`)."""

    def __init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.size = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        )

    def share(self, module: nn.Module) -> nn.Module:
        """The module itself, or one whose backward pass averages gradients over the processes."""
        return module if self.size == 1 else nn.parallel.DistributedDataParallel(module)

    def part(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This process's rows of a batch."""
        if len(tensors[0]) % self.size:
            raise ValueError(
                f"a batch must be a multiple of the {self.size} processes; got {len(tensors[0])} rows"
            )
        return tuple(each[self.rank :: self.size] for each in tensors)

    def mean(self, value: Tensor) -> float:
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value.item() / self.size

    def first(self, value):
        """The first process's value, everywhere: what decides about stopping must not differ by a rounding."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]


def warm_then_linear(warm: float = 0.05) -> Callable[[float], float]:
    """Learning-rate factor: up from 0 over the first `warm` share of the run, then straight down to 0."""

    def factor(done: float) -> float:
        return min((done + 1e-3) / warm, 1.0) if done < warm else (1 - done) / (1 - warm)

    return factor


def _group_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """‖gradient‖ of each of the optimizer's groups that has a name."""
    norms = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if "name" in group and gradients:
            norms[f"gradient_norm/{group['name']}"] = nn.utils.get_total_norm(gradients).item()
    return norms


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
    model, held_out, history: History, step: int, patience: int | None, best: dict | None, team: Team
) -> dict | None:
    """Append the held-out loss; keep a copy of the best weights when the run may stop early."""
    losses = team.first(held_out(model))
    if isinstance(losses, dict):
        history.evaluations.append({"step": step} | losses)
        losses = next(iter(losses.values()))
    history.held_out.append((step, losses))
    model.train()
    if patience is None:
        return None
    at = history.best[0]
    if at == step:
        best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    elif sum(s > at for s, _ in history.held_out) >= patience:
        history.stopped = f"no better held-out loss in {patience} evaluations after step {at}"
    return best


def _save(path: Path, model, optimizer, step: int, history: History, best: dict | None) -> None:
    """Everything a run needs to go on, as one safetensors file."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    for index, values in state["state"].items():
        tensors |= {
            f"optimizer.{index}.{key}": torch.as_tensor(value)
            for key, value in values.items()
            if value is not None
        }
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    about = {"step": step, "history": vars(history)}
    data = save_safetensors(
        {k: v.detach().contiguous().clone() for k, v in tensors.items()}, {"about": json.dumps(about)}
    )
    write_atomically(path, data)


def _resume(path: Path, model, optimizer) -> tuple[int, History, dict | None]:
    data = path.read_bytes()
    about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["about"])
    model_state, optimizer_state, best = {}, {}, {}
    for name, value in load_safetensors(data).items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model_state[rest] = value
        elif kind == "best":
            best[rest] = value
        else:
            index, _, key = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[key] = value
    model.load_state_dict(model_state)
    optimizer.load_state_dict(
        {"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    history = History(**about["history"])
    history.held_out = [tuple(pair) for pair in history.held_out]
    return about["step"], history, best or None
