"""The training loop: right gradients, the same run after an interrupt, early stop, and errors that help."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from lora_edu.loss import next_token_loss
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit, warm_then_linear


def small(seed=0):
    torch.manual_seed(seed)
    return TinyLM(vocabulary=40, width=20, layers=1, heads=5, context=16)


def adam(model, rate=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=rate)


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(2000) * 7 % 40  # each token follows from the one before


def test_the_history_has_norms_by_group_and_peak_memory(tokens):
    model = small()
    table, rest = (
        [model.embedding.weight],
        [p for n, p in model.named_parameters() if n != "embedding.weight"],
    )
    optimizer = torch.optim.SGD(
        [{"params": table, "name": "table"}, {"params": rest, "name": "rest"}], lr=0.1
    )
    history = fit(model, Batches(tokens, batch=4, context=16), optimizer, 3, clip=None, progress=False)
    for row in history.steps:
        parts = row["gradient_norm/table"], row["gradient_norm/rest"]
        assert math.hypot(*parts) == pytest.approx(row["gradient_norm"], rel=1e-5) and min(parts) > 0
        assert row["seconds"] > 0 and row["tokens"] == 64
    assert history.peak_memory > 50e6  # torch alone needs more


def test_a_loss_that_explodes_stops_and_says_what_to_try(tokens):
    model = small()
    growing = iter(range(1, 1000))

    def loss(model, inputs, targets):
        return next_token_loss(model, inputs, targets) * next(growing)

    with pytest.raises(FloatingPointError, match=r"step \d+: the loss explodes.*smaller learning rate"):
        fit(model, Batches(tokens, batch=4, context=16), adam(model), 200, loss=loss, progress=False)


def test_several_held_out_losses_are_kept_and_the_first_decides(tokens):
    model = small()
    losses = iter([{"here": 3.0, "there": 1.0}, {"here": 2.0, "there": 2.0}, {"here": 2.5, "there": 0.0}])
    options = {"held_out": lambda m: next(losses), "evaluate_every": 2, "patience": 1, "progress": False}
    history = fit(model, Batches(tokens, batch=4, context=16), adam(model), 10, **options)
    assert history.best == (4, 2.0) and history.stopped
    assert history.evaluations[1] == {"step": 4, "here": 2.0, "there": 2.0}


def test_a_full_gpu_is_said_with_the_step_and_a_way_out(tokens):
    model = small()

    def full(model, inputs, targets):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    with pytest.raises(torch.OutOfMemoryError, match=r"step 0: .*20 GiB.*smaller batch"):
        fit(model, Batches(tokens, batch=4, context=16), adam(model), 5, loss=full, progress=False)


def test_batches_are_windows_of_the_text_and_an_epoch_sees_each_once(tokens):
    batches = Batches(torch.arange(2000), batch=5, context=16, seed=3)
    starts = []
    for step in range(batches.steps_per_epoch):
        inputs, targets = batches(step)
        assert torch.equal(targets, inputs + 1) and inputs.shape == (5, 16)
        starts += inputs[:, 0].tolist()
    assert len(set(starts)) == len(starts) == batches.steps_per_epoch * 5
    assert torch.equal(batches(2)[0], Batches(torch.arange(2000), batch=5, context=16, seed=3)(2)[0])
    assert not torch.equal(batches(2)[0], batches(2 + batches.steps_per_epoch)[0])
    with pytest.raises(ValueError, match="100 tokens give 5 windows of 16, fewer than one batch of 8"):
        Batches(torch.arange(100), batch=8, context=16)


def test_training_learns_what_can_be_learnt(tokens):
    model = small()
    history = fit(model, Batches(tokens, batch=8, context=16), adam(model), 150, progress=False)
    assert history.steps[0]["loss"] > 3 and evaluate(model, tokens, context=16) < 0.5
    assert history.tokens == 150 * 8 * 16 and history.tokens_per_second > 0
    assert [row["step"] for row in history.steps] == list(range(1, 151))


@pytest.mark.parametrize("how", ["interrupt", "crash"])
def test_an_interrupted_run_goes_on_to_the_same_weights(tokens, tmp_path, how):
    batches = Batches(tokens, batch=4, context=16)
    whole = small()
    fit(whole, batches, adam(whole), 30, progress=False)

    def until(step, error):
        def some(n):
            if n == step:
                raise error
            return batches(n)

        return some

    error = KeyboardInterrupt if how == "interrupt" else RuntimeError
    path = tmp_path / "run.safetensors"
    for stop in (11, 23):  # twice; a crash loses what came after the last save, here none
        model = small(seed=9)  # a fresh process would have other weights
        if not path.exists():
            model.load_state_dict(small().state_dict())
        with pytest.raises(error):
            fit(model, until(stop, error), adam(model), 30, checkpoint=path, save_seconds=0, progress=False)
    resumed = small(seed=9)
    history = fit(resumed, batches, adam(resumed), 30, checkpoint=path, progress=False)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row["step"] for row in history.steps] == list(range(1, 31))


def test_early_stop_ends_with_the_best_weights(tokens):
    model = small()
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    kept = []

    def held_out(model):
        kept.append(model.head.weight.detach().clone())
        return next(losses)

    batches = Batches(tokens, batch=4, context=16)
    history = fit(
        model, batches, adam(model), 60, held_out=held_out, evaluate_every=10, patience=2, progress=False
    )
    assert history.best == (20, 2.0) and "after step 20" in history.stopped and len(history.steps) == 40
    assert torch.equal(model.head.weight, kept[1])


def test_frozen_parameters_stay_and_rates_come_back(tokens):
    model = small()
    model.embedding.requires_grad_(False)
    before = model.embedding.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    fit(model, Batches(tokens, batch=4, context=16), optimizer, 5, progress=False)
    assert torch.equal(model.embedding.weight, before)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_loss_that_is_no_number_stops_and_says_what_to_try(tokens):
    model = small()
    before = [p.detach().clone() for p in model.parameters()]

    def broken(model, inputs, targets):
        return next_token_loss(model, inputs, targets) * math.nan

    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*smaller learning rate"):
        fit(model, Batches(tokens, batch=4, context=16), adam(model), 5, loss=broken, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_schedule_warms_up_and_ends_at_zero():
    factor = warm_then_linear(0.1)
    assert 0 < factor(0) < 0.05 and factor(0.1) == 1 and factor(0.55) == pytest.approx(0.5) and factor(1) == 0


def test_evaluate_needs_a_window():
    with pytest.raises(ValueError, match="10 tokens do not fill one window of 16"):
        evaluate(small(), torch.zeros(10, dtype=torch.long), context=16)


KILLED = """
import sys, torch
from pathlib import Path
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, fit
torch.manual_seed(0)
model = TinyLM(vocabulary=40, width=20, layers=1, heads=5, context=16)
batches = Batches(torch.arange(2000) * 7 % 40, batch=4, context=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
fit(model, batches, optimizer, 100_000, checkpoint=Path(sys.argv[1]), save_seconds=0, progress=False,
    schedule=lambda done: 1.0)
"""


def test_a_killed_process_leaves_a_checkpoint_that_goes_on_to_the_same_weights(tokens, tmp_path):
    """kill −9 at an arbitrary moment, also while a checkpoint is being written."""
    path = tmp_path / "run.safetensors"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.wait()
    batches = Batches(tokens, batch=4, context=16)
    steady = {"schedule": lambda done: 1.0, "progress": False}
    resumed = small(seed=9)
    with safe_open(path, "pt") as file:
        steps = json.loads(file.metadata()["about"])["step"] + 5
    history = fit(resumed, batches, adam(resumed), steps, checkpoint=path, **steady)
    whole = small()
    fit(whole, batches, adam(whole), steps, **steady)
    assert len(history.steps) == steps > 5
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
