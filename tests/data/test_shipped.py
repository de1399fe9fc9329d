"""What ships: found by name, checked, and a missing or damaged file says which and how to get it back."""

import json
import shutil

import pytest
import torch

from lora_edu.data import load_checkpoint, shipped
from lora_edu.tinylm import TinyLM


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(shipped.data_folder(), tmp_path / "data")
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_every_file_is_as_the_manifest_says_and_together_they_are_small():
    found = list(shipped.check_all())
    assert found and all(right for _, right, _ in found), found
    assert sum(entry["bytes"] for entry in shipped.manifest()["files"].values()) <= 30_000_000
    names = {path.name for path in shipped.data_folder().glob("*.safetensors")}
    assert names <= set(shipped.manifest()["files"])


def test_the_checkpoints_are_the_models_that_the_course_speaks_of():
    base = load_checkpoint("base")
    model = TinyLM.from_state_dict(base)
    assert model.embedding.weight.shape == model.head.weight.shape == (10_000, 100)
    for seed in (0, 1):
        delta = load_checkpoint(f"reference_seed_{seed}")
        assert [(n, W.shape) for n, W in delta.items()] == [(n, W.shape) for n, W in base.items()]
    assert load_checkpoint("base", dtype=None)["head.weight"].dtype == torch.float16
    assert all(value.dtype == torch.float32 for value in base.values())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match="no shipped file; there are: .*base.safetensors"):
        load_checkpoint("gpt-5")


def test_a_missing_file_says_which_and_how_to_get_it_back(copy):
    (copy / "base.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/base.safetensors is missing.*git checkout -- data"):
        load_checkpoint("base")
    assert [name for name, right, _ in shipped.check_all() if not right] == ["base.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_file_is_refused(copy, damage):
    path = copy / "base.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-1000:]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data/base.safetensors is damaged.*make data"):
        load_checkpoint("base")


def test_a_missing_or_broken_manifest_is_said(copy):
    (copy / "MANIFEST.json").write_text("{")
    with pytest.raises(ValueError, match="MANIFEST.json is damaged"):
        load_checkpoint("base")
    (copy / "MANIFEST.json").unlink()
    with pytest.raises(FileNotFoundError, match="MANIFEST.json is missing"):
        load_checkpoint("base")


def test_base_and_tuned_models_beat_every_n_gram_clearly_as_recorded():
    stages = json.loads((shipped.data_folder() / "MANIFEST.json").read_text(encoding="utf-8"))["stages"]
    for name, models in {"code": ["base"], "reference": ["reference_seed_0", "reference_seed_1"]}.items():
        table = {row: nats for row, (nats, _) in stages["losses"]["nats a token, bits a byte"][name].items()}
        grams = [nats for row, nats in table.items() if "counted on" in row]
        assert len(grams) >= 3
        for model in models:
            assert table[model] < min(grams) - 0.5


def test_recorded_runs_are_found_by_their_settings_and_adapters_by_name():
    from lora_edu.data import adapter_folder, load_base_losses, load_sweeps
    from lora_edu.lora import load_adapter, lora_layers
    from lora_edu.tinylm import TinyLM

    rows = load_sweeps(method="lora", rank=8, steps=200)
    assert rows and all(row["rank"] == 8 and row["parameters"] == 31_000 * 8 for row in rows)
    with pytest.raises(KeyError, match="'ranks'.*a row has text, method"):
        load_sweeps(ranks=8)
    assert load_base_losses()["reference"]["test"] > max(row["test"] for row in rows if row["rate"] < 0.03)
    model = load_adapter(
        TinyLM.from_state_dict(shipped.load_checkpoint("base")), adapter_folder("reference_r4")
    )
    assert {layer.rank for layer in lora_layers(model).values()} == {4}
    with pytest.raises(KeyError, match="reference_r3"):
        adapter_folder("reference_r3")
