"""The recorded sweeps: names, rates found and interpolated, a killed run goes on, a row is found again."""

import json
import math
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from lora_edu.data import load_checkpoint, load_sweeps, runs, shipped
from lora_edu.lora import lora_layers
from lora_edu.recording import run as runner
from lora_edu.recording import sweeps

TINY = runs.run_of(rank=1, rate=1e-2, targets="mlp", steps=2, text="manual")


def test_bisection_asks_for_runs_until_each_d_90_lies_within_its_factor():
    right = lambda d: (
        0.2 + 0.025 * math.log10(d)
    )  # accuracy of a made-up model, in the blocks two points less
    accuracy = lambda run: right(run["dimension"] or runs.SIZES["all"]) - 0.02 * (run["targets"] == "blocks")
    row = lambda run: (
        run | {"test": 1.0, "accuracy": accuracy(run), "evaluations": [{"loss": 1 - accuracy(run)}]}
    )
    full = runs.run_of(method="full", rate=3e-3)
    rows = [row(run) for run in (full, *sweeps.subspaces()) if run["method"] != "frozen A"]
    rounds = 0
    while asked := [run for run in sweeps.bisection(rows, 0.2) if row(run) not in rows]:
        assert all(1e4 < run["dimension"] < runs.SIZES[run["targets"]] for run in asked)
        rows += map(row, asked)
        rounds += 1
    assert 3 <= rounds <= 5
    for scope, lost in (("all", 0), ("blocks", 0.02)):
        found = runs.by_dimension(rows, scope)
        most = accuracy(found[max(found)])
        for what, level in runs.levels(0.2, most).items():
            below, above = runs.around(found, level)
            assert right(below) - lost < level <= right(above) - lost, (scope, what)
            assert above / below <= sweeps.NARROW
    assert runs.levels(0.2, 0.4) == pytest.approx({"performance": 0.36, "gain": 0.38})
    frozen = [run for run in sweeps.subspaces() if run["method"] == "frozen A"]
    rows += [row(run | {"dimension": 10**6 if run["rate"] == 0.024 else 1000}) for run in frozen]
    again = sweeps.draws(rows, 0.2)
    ends = {(run["targets"], run["dimension"]) for run in again if run["method"] == "subspace"}
    assert {run["seed"] for run in again} == {1, 2} and len(again) == 2 * (len(ends) + 3)
    assert ("blocks", runs.SIZES["blocks"]) in ends and len(ends) <= 12 + 1
    for scope in sweeps.DIMENSIONS:
        found = runs.by_dimension(rows, scope)
        for level in runs.levels(0.2, accuracy(found[max(found)])).values():
            below, above = runs.around(found, level)
            assert {(scope, below), (scope, above)} < {(s, d) for s, d in ends if s == scope and d >= below}
    assert {run["rate"] for run in again if run["method"] == "frozen A"} == {0.024}


@pytest.mark.slow
def test_every_run_of_a_stage_has_a_name_of_its_own_that_is_a_file_name():
    rows = load_sweeps()
    for stage, wanted in sweeps.STAGES.items():
        names = [runs.name_of(run) for run in wanted(rows)]
        distinct = {json.dumps(run, sort_keys=True) for run in wanted(rows)}
        assert len(set(names)) == len(distinct), stage
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzA0123456789 =.+-_") for name in names)
    with pytest.raises(KeyError, match="'ranks'"):
        runs.run_of(ranks=3)


def test_the_rate_is_the_one_of_lowest_validation_loss_and_lies_on_a_line_between_ranks():
    def row(rank, rate, loss):
        return runs.run_of(rank=rank, rate=rate) | {
            "test": 1.0,
            "evaluations": [{"loss": loss}, {"loss": 9}],
        }

    rows = [row(1, 0.04, 2.0), row(1, 0.01, 3.0), row(8, 0.01, 1.0), row(64, 0.0025, 1.0)]
    rows.append(row(8, 0.5, 0.1) | {"test": None})  # one that blew up
    assert runs.rate_for(rows, 1) == 0.04 and runs.rate_for(rows, 8) == 0.01
    assert runs.rate_for(rows, 2) == pytest.approx(0.04 * 0.25 ** (1 / 3), rel=0.01)
    with pytest.raises(ValueError, match="no run has been recorded with.*999"):
        runs.best(rows, rank=999)


def test_a_run_trains_what_it_says_and_the_embedding_has_a_rate_of_its_own():
    of_each = sweeps.BUDGET["all"] | {"embedding": 2, "head": 3}
    model, optimizer = runner.prepare(runs.run_of(rank=of_each, rate=0.03, targets="all"))
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    assert ranks["embedding"] == 2 and ranks["head"] == 3
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"embedding": pytest.approx(0.01), "A": 0.03, "B": 0.03}
    _, optimizer = runner.prepare(runs.run_of(method="full", rate=0.03))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 2_728_000
    for method, wanted in (("subspace", 50), ("frozen A", 10_000 + 10_000 + 6 * (4 * 100 + 400 + 100))):
        run = runs.run_of(method=method, rank=1, dimension=50, rate=0.03)
        _, optimizer = runner.prepare(run)
        assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == wanted


def test_a_tenth_of_a_text_is_every_tenth_piece_of_it():
    whole, tenth = runner.texts("reference")["train"], runner.texts("reference/10")["train"]
    assert torch.equal(tenth[:2048], whole[:2048]) and torch.equal(tenth[2048:4096], whole[20480:22528])
    assert len(tenth) == pytest.approx(len(whole) / 10, rel=0.02)
    assert torch.equal(runner.texts("reference/10")["test"], runner.texts("reference")["test"])


KILLED = """
import sys
from pathlib import Path
from lora_edu.data.runs import run_of
from lora_edu.recording import run as runner
run = run_of(rank=1, rate=1e-2, targets="mlp", steps=int(sys.argv[2]), text="manual")
fit = runner.fit
runner.fit = lambda *a, **k: fit(*a, save_seconds=0, **k)
runner.record(run, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_its_checkpoint_and_done_rows_are_kept(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), "6"])
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("*.run")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    run = TINY | {"steps": 6}
    row = runner.record(run, tmp_path)
    assert row["tokens"] == 6 * 8 * 256 and not list(tmp_path.glob("*.run"))
    model, _ = runner.train(run)
    for name, value in load_file(tmp_path / f"{row['name']}.safetensors").items():
        assert torch.equal(model.state_dict()[name].half(), value)
    began = time.monotonic()
    assert runner.record(run, tmp_path) == row and time.monotonic() - began < 1


@pytest.mark.slow
def test_full_tuning_leaves_its_update_and_truncation_at_full_rank_is_the_tuned_model(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RANKS", (2, 100))
    run = runs.run_of(method="full", rate=3e-3, steps=2, text="manual")
    row = runner.record(run, tmp_path, truncate=("full",))
    assert row["truncated"]["100"] == pytest.approx(row["test"], abs=2e-3)  # half precision in between
    assert set(row["truncated"]) == {"0", "2", "100", "matrices 2", "matrices 100"}
    delta = load_file(tmp_path / f"{row['name']}.safetensors")
    assert set(delta) == set(load_checkpoint("base"))


def test_a_run_that_blows_up_is_a_row_that_says_so(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(runner, "fit", broken)
    row = runner.record(TINY, tmp_path)
    assert row["test"] is None and row["failed"] == "step 3: loss nan"


def test_the_spread_is_the_pooled_deviation_over_seeds():
    row = lambda rank, seed, test: runs.run_of(rank=rank, rate=0.1, seed=seed) | {"test": test}
    rows = [row(1, 0, 1.0), row(1, 1, 3.0), row(2, 0, 5.0), row(2, 1, 5.0), row(4, 0, 9.0), row(8, 0, None)]
    assert runner.spread(rows) == pytest.approx(math.sqrt((2 + 0) / 2))


@pytest.mark.slow
def test_a_short_recorded_row_is_found_again(tmp_path):
    made = shipped.manifest()["versions"]
    for name in ("numpy", "matplotlib"):  # whose docstrings are the text
        if version(name) != made[name]:
            pytest.skip(f"{name} is {version(name)}, the rows were made with the text of {made[name]}")
    rows = load_sweeps()
    [run] = sweeps.STAGES["short"](rows)
    [(name, recorded, now, found)] = runner.check(rows, [runs.name_of(run)], tmp_path)
    assert found, f"{name}: {recorded} recorded, {now} now"
    with pytest.raises(ValueError, match=r"no row is named 'lora rank=9'; close to it: 'lora"):
        next(runner.check(rows, ["lora rank=9"], tmp_path))
