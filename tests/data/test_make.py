"""`make data`: stages are done once, what ships is half precision and described, and a stage can be looked up."""

import hashlib
import json

import pytest
import torch

from lora_edu.data import make, shipped


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
    """W_o + ΔW must be the tuned model: its recorded loss is far below the base's, on text that it has not seen."""
    table = shipped.manifest()["stages"]["losses"]["nats a token, bits a byte"]["reference"]
    for seed in (0, 1):
        assert table[f"reference_seed_{seed}"][0] < table["base"][0] - 1


@pytest.mark.slow
def test_a_stage_of_the_sweeps_adds_its_rows_and_an_adapter_is_made_of_one(tmp_path, monkeypatch):
    from lora_edu.data import sweeps
    from lora_edu.lora import load_adapter, lora_layers
    from lora_edu.tinylm import TinyLM

    run = sweeps.run_of(rank=2, rate=1e-2, targets="mlp", text="manual", steps=3)
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
    trained, _ = sweeps.train(run)
    for name, layer in lora_layers(trained).items():
        mine = lora_layers(model)[name]
        assert (
            torch.allclose(mine.delta_weight(), layer.delta_weight(), atol=1e-4) and layer.lora_B.norm() > 0
        )
