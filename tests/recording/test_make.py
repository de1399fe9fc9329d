"""`make data`: stages are done once, what ships is half precision and described, and a stage can be looked up."""

import hashlib
import json

import pytest
import torch

from lora_edu.data import corpus, shipped
from lora_edu.data.runs import name_of, run_of
from lora_edu.recording import make, methods, sweeps, variants
from lora_edu.recording import run as runner
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate


@pytest.fixture
def maker(tmp_path):
    return make.Maker(tmp_path / "data", tmp_path / "work", scale=0.001)


def test_a_finished_stage_is_not_run_again(maker, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(make.Maker, "tokenizer", lambda self: runs.append(1) or {"vocabulary": 3})
    maker.run(until="tokenizer")
    make.Maker(maker.out, maker.work).run(until="tokenizer")
    assert runs == [1] and '"vocabulary": 3' in capsys.readouterr().out
    assert maker.facts()["tokenizer"]["seconds"] >= 0


def test_a_stage_whose_constants_changed_is_run_again(maker, monkeypatch):
    runs = []
    monkeypatch.setattr(make.Maker, "base", lambda self: runs.append(1) or {})
    maker.run(only="base")
    maker.run(only="base")
    assert runs == [1]
    monkeypatch.setitem(make.CONSTANTS, "base", (7, make.BASE_STEPS, make.BASE_RATE))
    maker.run(only="base")
    assert runs == [1, 1] and maker.done("base") and make.constants_of("tune") != make.constants_of("base")


def test_a_stage_of_the_sweeps_is_done_until_it_asks_for_a_run_that_is_missing(maker, monkeypatch):
    first, second = (
        run_of(rank=2, rate=rate, targets="mlp", text="manual", steps=3) for rate in (0.01, 0.02)
    )
    asked = []

    def record_all(runs, folder, **options):
        asked.append([run["rate"] for run in runs])
        return [run | {"name": name_of(run), "test": 1.0} for run in runs]

    monkeypatch.setattr(make, "record_all", record_all)
    monkeypatch.setitem(sweeps.STAGES, "short", lambda rows: [first])
    maker.run(only="short")
    maker.run(only="short")
    assert asked == [[0.01]] and maker.done("short")
    monkeypatch.setitem(sweeps.STAGES, "short", lambda rows: [first, second])
    assert not maker.done("short")
    maker.run(only="short")
    assert asked == [[0.01], [0.02]] and maker.facts()["short"]["runs"] == 2


def test_rows_side_by_side_are_kept_where_one_more_is_asked_for_and_go_where_the_constants_changed(
    maker, monkeypatch
):
    asked, wanted, did = [], [0.01], []
    about = {"task": "far", "method": "dora", "size": 4, "steps": 3, "seed": 0}

    def record_stage(stage, rows, folder, tell, short, long, stages, do):
        folder.mkdir(parents=True, exist_ok=True)
        known = {methods.name_of(row) for row in rows}
        for run in stages[stage](rows, short, long):
            path = folder / f"{methods.name_of(run)}.json"
            if methods.name_of(run) not in known:
                asked.append(run["rate"])
                did.append(path)
                path.write_text(json.dumps(run | {"validation": 1.0}), encoding="utf-8")
                yield run

    stages = {
        "variants_far": lambda rows, short, long: [about | {"rate": rate} for rate in wanted],
        "variants_near": lambda rows, short, long: [],
    }
    monkeypatch.setattr(variants, "STAGES", stages)
    monkeypatch.setattr(methods, "record_stage", record_stage)
    recorded = lambda: [row["rate"] for row in json.loads((maker.out / "variants.json").read_text())["rows"]]
    maker.run(only="variants_far")
    assert maker.done("variants_far") and recorded() == [0.01]
    for path in did:  # another machine: the file is there, the work folder is not
        path.unlink()
    wanted.append(0.02)
    assert not maker.done("variants_far")
    maker.run(only="variants_far")
    assert asked == [0.01, 0.02] and recorded() == [0.01, 0.02] and maker.facts()["variants_far"]["runs"] == 2
    monkeypatch.setitem(make.CONSTANTS, "variants_far", ("others",))
    assert not maker.done("variants_far")
    maker.run(only="variants_far")
    assert asked == [0.01, 0.02, 0.01, 0.02] and recorded() == [0.01, 0.02]


def test_every_recorded_stage_is_done_with_the_constants_of_today(monkeypatch, tmp_path):
    maker = make.Maker(shipped.data_folder(), tmp_path)
    monkeypatch.setattr(sweeps, "_base_accuracy", lambda: shipped.load_base_losses()["reference"]["accuracy"])
    assert all(maker.done(stage) for stage in make.STAGES)


def test_what_ships_is_half_precision_and_described(maker):
    W = torch.randn(5, 4)
    maker.ship("some", {"W": W}, "made by a test")
    data = (maker.out / "some.safetensors").read_bytes()
    manifest = json.loads((maker.out / "MANIFEST.json").read_text(encoding="utf-8"))
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "made": "made by a test"}
    assert manifest["files"] == {"some.safetensors": entry}
    assert {"python", "torch", "numpy", "matplotlib", "tokenizers"} <= set(manifest["versions"])
    with pytest.raises(FloatingPointError, match="huge: W does not fit into half precision"):
        maker.ship("huge", {"W": W * 1e6}, "")
    assert not (maker.out / "huge.safetensors").exists()


def test_the_planted_update_has_the_rank_and_size_that_the_manifest_says():
    about = shipped.manifest()["stages"]["planted"]
    planted = shipped.load_checkpoint("planted")
    W = shipped.load_checkpoint("base")[about["matrix"]]
    S = torch.linalg.svdvals(planted["planted"])
    assert S[about["rank"] - 1] > 100 * S[about["rank"]]
    assert float(planted["planted"].norm() / W.norm()) == pytest.approx(about["relative_norm"], rel=1e-3)


def test_the_shipped_updates_start_from_the_base_as_shipped():
    """W_o + ΔW must be the tuned model: far better than the base on docstrings that neither has seen."""
    base, text = shipped.load_checkpoint("base"), corpus.load_corpus("reference").test
    part = text.unfold(0, 256, 8192).flatten()  # a window of every thirty-second, over all documents
    loss = lambda state: evaluate(TinyLM.from_state_dict(state), part)
    before = loss(base)
    for seed in (0, 1):
        delta = shipped.load_checkpoint(f"reference_seed_{seed}")
        assert loss(make.add(base, delta)) < before - 1.5
        shuffled = {name: dW.flip(0) for name, dW in delta.items()}  # the same numbers, no longer an update
        assert loss(make.add(base, shuffled)) > before - 0.5


@pytest.mark.slow
def test_a_stage_of_the_sweeps_adds_its_rows_and_an_adapter_is_made_of_one(tmp_path, monkeypatch):
    from lora_edu.lora import load_adapter, lora_layers

    run = run_of(rank=2, rate=1e-2, targets="mlp", text="manual", steps=3)
    monkeypatch.setitem(sweeps.STAGES, "short", lambda rows: [run])
    maker = make.Maker(tmp_path / "data", tmp_path / "work")
    assert maker.sweep("short") == {"runs": 1, "failed": 0}
    maker.write_sweeps({"base": {"manual": {"test": 6.0}}})
    [row] = maker.rows()
    assert row["steps"] == 3 and row["test"] < 7
    entry = json.loads((maker.out / "MANIFEST.json").read_text(encoding="utf-8"))["files"]["sweeps.json"]
    assert entry["sha256"] == hashlib.sha256((maker.out / "sweeps.json").read_bytes()).hexdigest()

    monkeypatch.setattr(make, "ADAPTERS", {"some": (2, 0)})
    monkeypatch.setattr(sweeps, "tuned", lambda rows, rank, seed: run)
    maker.adapters()
    base = shipped.load_checkpoint("base")
    model = load_adapter(TinyLM.from_state_dict(base), maker.out / "adapters" / "some")
    trained, _ = runner.train(run)
    for name, layer in lora_layers(trained).items():
        mine = lora_layers(model)[name]
        assert (
            torch.allclose(mine.delta_weight(), layer.delta_weight(), atol=1e-4) and layer.lora_B.norm() > 0
        )
