"""The recorded map of two mixed adapters: which pairs there are, and a row that is found again."""

import json

import pytest
import torch

from lora_edu.data import adapter_folder, load_checkpoint, load_mixtures
from lora_edu.lora import load_adapter, mix, read_adapter
from lora_edu.recording import make, mixtures
from lora_edu.recording.run import packed
from lora_edu.tinylm import TinyLM


def test_every_pair_is_recorded_once_and_the_base_is_one_of_them():
    pairs = [tuple(row["weights"].values()) for row in load_mixtures()["rows"]]
    assert pairs == mixtures.pairs() and len(set(pairs)) == len(pairs)
    assert {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)} <= set(pairs)
    assert all(set(row["losses"]) == set(mixtures.TEXTS) for row in load_mixtures()["rows"])


def test_the_windows_of_a_text_do_not_overlap():
    windows = mixtures.held_out("manual")
    assert windows.shape == (mixtures.WINDOWS, mixtures.CONTEXT + 1)
    tokens = make.corpus.load_corpus("manual").test
    assert len(tokens) >= mixtures.WINDOWS * (mixtures.CONTEXT + 1)
    assert torch.equal(windows[0], tokens[: mixtures.CONTEXT + 1])
    assert torch.equal(windows[-1], tokens[-mixtures.CONTEXT - 1 :])


def test_mixed_weights_are_those_of_the_mixed_adapters():
    """Σ w ΔW added to the weights is what `mix` makes of the factors, and with one weight of 1 the adapter itself."""
    base, delta = load_checkpoint("base"), mixtures.updates()
    adapters = [read_adapter(adapter_folder(name)) for name in mixtures.ADAPTERS.values()]
    state = mixtures.mixed(base, delta, {"reference": 0.5, "manual": -0.5}).state_dict()
    for name, factors in mix(list(zip(adapters, (0.5, -0.5), strict=True))).items():
        change = state[f"{name}.weight"] - base[f"{name}.weight"]
        assert torch.allclose(change, factors.delta_weight(), atol=1e-5)
    tokens = mixtures.held_out("manual")[:1, :64]
    with torch.no_grad():
        alone = load_adapter(TinyLM.from_state_dict(base), adapter_folder("manual_r8")).eval()(tokens)
        mixed = mixtures.mixed(base, delta, {"reference": 0.0, "manual": 1.0}).eval()(tokens)
    assert torch.allclose(alone, mixed, atol=1e-3)


@pytest.mark.slow
def test_a_recorded_row_is_found_again():
    recorded = {tuple(row["weights"].values()): row for row in load_mixtures()["rows"]}
    [row] = mixtures.record_all([(0.0, 1.0)], texts=("reference", "manual"))
    was = recorded[0.0, 1.0]
    assert row["weights"] == was["weights"]
    # another numpy, matplotlib or Python is other text
    assert all(abs(row["losses"][text] - was["losses"][text]) < 0.1 for text in row["losses"])
    assert row["text"].startswith(mixtures.PROMPT) and len(row["text"]) > 100


def test_the_file_has_a_row_a_line():
    row = {"weights": {"reference": 0.5, "manual": 0.5}, "losses": {"code": 4.1}, "text": "Return the\nvalue"}
    content = packed(mixtures.HEAD, [row, row])
    assert json.loads(content)["rows"] == [row, row]
    assert len(content.decode().splitlines()) == 5


def test_an_adapter_on_a_second_text_is_the_best_recorded_one(tmp_path, monkeypatch):
    """The stage asks the rows for the rate, and ships that run's factors."""
    asked, shipped = [], []
    rows = [
        {"test": 4.0, "evaluations": [{"loss": loss}], "rate": rate, "name": f"rate {rate}"}
        | make.SECOND_TEXT["manual_r8"]
        for rate, loss in ((0.1, 4.2), (0.2, 4.1), (0.3, 4.3))
    ]
    rows = [dict.fromkeys(make.SETTINGS) | row for row in rows]
    maker = make.Maker(tmp_path / "data", tmp_path / "work")
    monkeypatch.setattr(make.Maker, "rows", lambda self: rows)
    monkeypatch.setattr(make, "record", lambda run, folder: asked.append((run["rate"], folder)))
    monkeypatch.setattr(make.Maker, "_ship_adapter", lambda self, name, run: shipped.append(name) or 248_000)
    facts = maker.second_text()
    assert asked == [(0.2, maker.runs_folder)] and shipped == ["manual_r8"]
    assert facts == {"parameters": {"manual_r8": 248_000}, "runs": {"manual_r8": "rate 0.2"}}
