"""One training loop for everything in the course: pre-training, full tuning and every other way to tune.

Progress bar, history, held-out evaluation, early stop, resume after an interrupt. It knows no method: it trains the
parameters that require a gradient.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lora_edu.paths import write_atomically


@dataclass
class History:
    """What a run left behind. `steps`: one dictionary a step (step, loss, learning_rate, gradient_norm);
    `held_out`: (step, loss) pairs; `seconds` and `tokens` of all steps, resumed ones included."""

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
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
    held_out: Callable[[nn.Module], float] | None = None,
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
    held_out: model → loss, every `evaluate_every` steps and at the end; with `patience` the run stops after that many
    evaluations without a better one, and ends with the best weights. clip: largest gradient norm.
    checkpoint: a safetensors file, written every `save_seconds` and on an interrupt; where it is there already,
    the run goes on from it, to the same weights as an undisturbed run gives on the same machine. progress: False for
    none, or a label for the bar.

    Raises FloatingPointError when the loss is no finite number; the last checkpoint is kept.
    """
    schedule = schedule or warm_then_linear()
    loss = loss or next_token_loss
    history, best, start = History(), None, 0
    rates = [group["lr"] for group in optimizer.param_groups]
    if checkpoint is not None and checkpoint.is_file():
        start, history, best = _resume(checkpoint, model, optimizer)
    label = progress if isinstance(progress, str) else "training"
    bar = tqdm(
        total=steps, initial=start, desc=label, disable=progress is False, leave=False, mininterval=0.5
    )
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
            value = loss(model, inputs, targets)
            value.backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf)
            if not math.isfinite(value.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"step {step}: loss {value.item():.4g}, gradient norm {norm.item():.4g}. The weights are those "
                    "of the step before. Try a smaller learning rate, a longer warm-up or a smaller `clip`."
                )
            optimizer.step()
            step += 1
            row = {"step": step, "loss": value.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
            history.steps.append(row | {"gradient_norm": norm.item()})
            history.seconds += time.monotonic() - began
            history.tokens += targets.numel()
            bar.update()
            bar.set_postfix_str(
                f"loss {value.item():.3f}, {history.tokens_per_second:,.0f} tokens/s", refresh=False
            )
            if held_out is not None and (step % evaluate_every == 0 or step == steps):
                best = _evaluate(model, held_out, history, step, patience, best)
            if checkpoint is not None and (time.monotonic() - saved > save_seconds or step == steps):
                _save(checkpoint, model, optimizer, step, history, best)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            _save(checkpoint, model, optimizer, step, history, best)
        raise
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
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ValueError(
            f"{len(tokens)} tokens do not fill one window of {context} tokens and the one after it"
        )
    was_training = model.training
    model.eval()
    inputs = tokens[: windows * context].view(windows, context)
    targets = tokens[1 : windows * context + 1].view(windows, context)
    total = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        total += next_token_loss(model, x, y).item() * len(x)
    model.train(was_training)
    return total / windows


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats. inputs, targets: (batch, time) int64.

    For a model with `hidden` and `head` the logits of the whole batch (16 × 256 × 10 000 numbers: 164 MB) are never
    held at once: `HeadLoss` goes through them in slices. For any other model: logits, then cross-entropy.
    """
    if not (hasattr(model, "hidden") and hasattr(model, "head")):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    head = model.head
    weight = head.weight
    if hasattr(head, "delta_weight") and not head.merged:
        weight = weight + head.delta_weight()
    return HeadLoss.apply(model.hidden(inputs).flatten(0, 1), weight, targets.flatten())


class HeadLoss(torch.autograd.Function):
    """mean cross-entropy of softmax(hidden Wᵀ) against targets, in slices of 256 tokens; gradients made on the way.

    hidden (tokens, width), weight (vocabulary, width), targets (tokens,) → scalar. With p = softmax(h Wᵀ) and the
    one-hot target y, ∂/∂h = (p − y) W / tokens and ∂/∂W = (p − y)ᵀ h / tokens.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        tokens, total = len(targets), hidden.new_zeros(())
        for start in range(0, tokens, 256):
            h, y = hidden[start : start + 256], targets[start : start + 256, None]
            z = h @ weight.T
            z -= z.amax(dim=1, keepdim=True)
            right = z.gather(1, y)
            sums = z.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - right).sum()
            if needs_hidden or needs_weight:
                z /= sums * tokens
                z.scatter_add_(1, y, torch.full_like(right, -1 / tokens))
            if needs_hidden:
                torch.mm(z, weight, out=grad_hidden[start : start + 256])
            if needs_weight:
                grad_weight.addmm_(z.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / tokens

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad * grad_hidden,
            None if grad_weight is None else grad * grad_weight,
            None,
        )


def warm_then_linear(warm: float = 0.05) -> Callable[[float], float]:
    """Learning-rate factor: up from 0 over the first `warm` share of the run, then straight down to 0."""

    def factor(done: float) -> float:
        return min((done + 1e-3) / warm, 1.0) if done < warm else (1 - done) / (1 - warm)

    return factor


def _evaluate(
    model, held_out, history: History, step: int, patience: int | None, best: dict | None
) -> dict | None:
    """Append the held-out loss; keep a copy of the best weights when the run may stop early."""
    history.held_out.append((step, held_out(model)))
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
