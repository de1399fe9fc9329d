"""The training loop: right gradients, the same run after an interrupt, early stop, and errors that help."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from lora_edu.lora import add_lora, lora_layers, merge_lora, pair_optimizers, trainable_parameters
from lora_edu.lora.optimizers import PairedOptimizer
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


# LoRA through fit


def adapted(targets, seed=0, **options):
    return add_lora(small(seed), rank=2, alpha=4, targets=targets, **options)


def test_dropout_in_the_head_is_trained_with(tokens):
    """The same run written out, through the layer's own forward: equal; without dropout: another."""
    batches = Batches(tokens, batch=4, context=16)
    steady = {"schedule": lambda done: 1.0, "clip": None, "progress": False}
    trained = {}
    for dropout in (0.0, 0.5):
        model = adapted("head", dropout=dropout)
        torch.manual_seed(3)
        fit(model, batches, torch.optim.SGD(trainable_parameters(model), lr=1.0), 6, **steady)
        trained[dropout] = model.head.lora_B.detach()
    model = adapted("head", dropout=0.5).train()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    torch.manual_seed(3)
    for step in range(6):
        inputs, targets = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    assert torch.allclose(trained[0.5], model.head.lora_B, atol=1e-5)
    assert (trained[0.5] - trained[0.0]).norm() > 0.05 * trained[0.0].norm()


def test_a_merged_head_is_not_trained_in_silence(tokens):
    model = adapted("head")
    merge_lora(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    with pytest.raises(RuntimeError, match="merged.*unmerge"):
        fit(model, Batches(tokens, batch=4, context=16), optimizer, 3, progress=False)


@pytest.mark.parametrize("clip", [0.01, 1.0, None])
def test_sparse_gradients_train_as_dense_ones(tokens, clip):
    """SGD makes the two the same method: same norms, same clipping, same weights."""
    batches = Batches(tokens, batch=4, context=16)
    sgd = {"dense": torch.optim.SGD, "sparse": torch.optim.SGD}
    runs = []
    for sparse in (False, True):
        model = adapted(["embedding", "head", "query"], sparse=sparse)
        torch.manual_seed(0)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_A, std=0.1)
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        optimizer = pair_optimizers(model, 0.5, **sgd)
        assert isinstance(optimizer, PairedOptimizer) is sparse
        history = fit(model, batches, optimizer, 8, clip=clip, progress=False)
        runs.append((model, [row["gradient_norm"] for row in history.steps]))
    (dense, norms), (sparse, sparse_norms) = runs
    assert sparse_norms == pytest.approx(norms, rel=1e-4)
    start = adapted(["embedding", "head", "query"]).embedding.lora_A
    assert not torch.equal(dense.embedding.lora_A, start)
    for one, other in zip(trainable_parameters(dense), trainable_parameters(sparse), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_norm_of_a_sparse_gradient_counts_a_repeated_token_once(tokens):
    """Rows of the same token are added up first: their sum's norm, not that of the parts."""
    model = adapted("embedding", sparse=True)
    optimizer = torch.optim.SGD([{"params": trainable_parameters(model), "name": "table"}], lr=0.0)
    history = fit(model, Batches(tokens, batch=8, context=16), optimizer, 1, clip=None, progress=False)
    twin = adapted("embedding")
    twin.load_state_dict(model.state_dict())
    next_token_loss(twin.train(), *Batches(tokens, batch=8, context=16)(0)).backward()
    norm = math.hypot(*(float(p.grad.norm()) for p in trainable_parameters(twin)))
    assert history.steps[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert history.steps[0]["gradient_norm/table"] == pytest.approx(norm, rel=1e-5)


def test_a_run_with_sparse_gradients_goes_on_to_the_same_weights(tokens, tmp_path):
    batches = Batches(tokens, batch=4, context=16)
    whole = adapted(["embedding", "head"], sparse=True)
    fit(whole, batches, pair_optimizers(whole, 1e-2), 12, progress=False)

    def until_seven(step):
        if step == 7:
            raise KeyboardInterrupt
        return batches(step)

    path = tmp_path / "run.safetensors"
    model = adapted(["embedding", "head"], sparse=True)
    with pytest.raises(KeyboardInterrupt):
        fit(model, until_seven, pair_optimizers(model, 1e-2), 12, checkpoint=path, progress=False)
    resumed = adapted(["embedding", "head"], seed=9, sparse=True)
    history = fit(resumed, batches, pair_optimizers(resumed, 1e-2), 12, checkpoint=path, progress=False)
    assert len(history.steps) == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# Ordinary slips


def test_an_optimizer_made_before_add_lora_is_refused(tokens):
    model = small()
    optimizer = adam(model)
    add_lora(model, 2, 4, "query")
    with pytest.raises(
        ValueError, match=r"gets a gradient.*made before add_lora\? Make it afterwards, from lora_edu"
    ):
        fit(model, Batches(tokens, batch=4, context=16), optimizer, 3, progress=False)


def test_an_optimizer_of_another_model_is_refused_before_anything_moves(tokens):
    model, other = small(), small()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="none of the optimizer's"):
        fit(model, Batches(tokens, batch=4, context=16), adam(other), 3, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


NUMBERS = {
    "tensor": lambda value: torch.tensor(value),
    "of one element": lambda value: torch.tensor([[value]], requires_grad=True),
    "float32": np.float32,
    "array": np.array,
    "whole": int,
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("named", [False, True])
def test_a_held_out_loss_may_be_any_number(tokens, tmp_path, kind, named):
    losses = iter([3.0, 2.0, 4.0])

    def held_out(model):
        value = NUMBERS[kind](next(losses))
        return {"here": value, "there": value} if named else value

    model, path = small(), tmp_path / "run.safetensors"
    options = {"held_out": held_out, "evaluate_every": 2, "checkpoint": path, "progress": False}
    history = fit(model, Batches(tokens, batch=4, context=16), adam(model), 6, **options)
    assert history.held_out == [(2, 3.0), (4, 2.0), (6, 4.0)] and history.best == (4, 2.0)
    again = fit(
        small(), Batches(tokens, batch=4, context=16), adam(small()), 6, **(options | {"held_out": None})
    )
    assert again == history, "as it was saved"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "held_out"),
        (torch.zeros(3), "held_out"),
        ("low", "held_out"),
        ({"code": [1.0]}, r"held_out\['code'\]"),
    ],
)
def test_a_held_out_loss_that_is_no_number_is_named(tokens, value, named):
    model = small()
    with pytest.raises(TypeError, match=f"{named} must give one number .*; got "):
        options = {"held_out": lambda m: value, "evaluate_every": 1, "progress": False}
        fit(model, Batches(tokens, batch=4, context=16), adam(model), 2, **options)


def test_a_checkpoint_may_be_named_by_a_string_with_the_home_folder(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = small()
    batches = Batches(tokens, batch=4, context=16)
    fit(model, batches, adam(model), 3, checkpoint="~/runs/one.safetensors", progress=False)
    again = small()
    history = fit(
        again, batches, adam(again), 5, checkpoint=str(tmp_path / "runs/one.safetensors"), progress=False
    )
    assert len(history.steps) == 5


def other_run(path, model=None, optimizer=None):
    model = model or small()
    batches = Batches(torch.arange(2000) * 7 % 30, batch=4, context=16)
    fit(model, batches, (optimizer or adam)(model), 2, checkpoint=path, progress=False)


FOREIGN = {
    "of another program": (
        lambda path: save_file({"a": torch.zeros(1)}, path, {"format": "pt"}),
        "is no checkpoint of fit, so it is neither read nor overwritten: name another file",
    ),
    "with an about of its own": (
        lambda path: save_file({"a": torch.zeros(1)}, path, {"about": '{"step": 3}'}),
        "is no checkpoint of fit",
    ),
    "text": (lambda path: path.write_text("loss,3.1\n" * 9, encoding="utf-8"), "is no checkpoint of fit"),
    "empty": (lambda path: path.touch(), "is no checkpoint of fit"),
    "a folder": (lambda path: path.mkdir(), "a checkpoint is a file; .* is a folder"),
    "a larger model's": (
        lambda path: other_run(path, TinyLM(vocabulary=40, width=30, layers=1, heads=5, context=16)),
        r"the checkpoint of another run: embedding.weight is \(40, 30\) in it and \(40, 20\) in the model",
    ),
    "an adapted model's": (
        lambda path: other_run(path, adapted("head"), lambda m: torch.optim.Adam(trainable_parameters(m))),
        r"another run: head.lora_A is \(2, 20\) in it and missing in the model",
    ),
    "another optimizer's": (
        lambda path: other_run(path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
        r"another run: its optimizer was SGD over \d+ parameters, here it is AdamW",
    ),
    "the same optimizer's over fewer": (
        lambda path: other_run(path, optimizer=lambda m: torch.optim.AdamW(m.head.parameters())),
        r"its optimizer was AdamW over 1 parameters, here it is AdamW over \d+ parameters",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_that_is_not_this_runs_is_named_and_left_as_it_is(tokens, tmp_path, case):
    make, said = FOREIGN[case]
    path = tmp_path / "run.safetensors"
    make(path)
    was = path.read_bytes() if path.is_file() else None
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=said) as raised:
        fit(model, Batches(tokens, batch=4, context=16), adam(model), 3, checkpoint=path, progress=False)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert was is None or path.read_bytes() == was
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_optimizer_whose_state_no_checkpoint_holds_says_so_at_the_first_step(tokens, tmp_path):
    class Remembering(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["losses"] = [1.0]
            super().step(closure)

    model = small()
    optimizer, steps = Remembering(model.parameters(), lr=0.1), []
    with pytest.raises(TypeError, match="Remembering keeps 'losses' as a list; train without `checkpoint`"):
        batches = lambda step: steps.append(step) or Batches(tokens, batch=4, context=16)(step)
        fit(model, batches, optimizer, 50, checkpoint=tmp_path / "run.safetensors", progress=False)
    assert steps == [0]
