"""The map of regimes: what is measured of a cut, that a done run is read, and that every wanted row is recorded."""

import json

import pytest
import torch

from lora_edu.data import load_checkpoint, load_regimes, shipped
from lora_edu.recording import regimes
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

TEXT = torch.arange(4 * 256).remainder(50)


@pytest.fixture(scope="module")
def before():
    torch.manual_seed(0)
    return {name: W.clone() for name, W in TinyLM(vocabulary=200, layers=1).state_dict().items()}


@pytest.fixture(scope="module")
def update(before):
    """Rank 2 in every matrix but the head, whose rank is full; a bias and a norm change too."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    low = lambda W: draw(len(W), 2) @ draw(2, W.shape[1]) * 0.01 if W.dim() == 2 else 0.1 * draw(*W.shape)
    return {name: 0.05 * draw(*W.shape) if name == "head.weight" else low(W) for name, W in before.items()}


@pytest.fixture(scope="module")
def found(before, update):
    return regimes.cuts_of(before, update, TEXT)


def test_a_cut_costs_what_lies_beyond_its_rank_and_nothing_else(before, update, found):
    loss = lambda delta: evaluate(TinyLM.from_state_dict({n: W + delta[n] for n, W in before.items()}), TEXT)
    both = regimes.losses_of(before, update, TEXT)
    assert both == {
        "before": pytest.approx(loss({n: 0 * W for n, W in before.items()}), abs=1e-4),
        "after": pytest.approx(loss(update), abs=1e-4),
    }
    head = torch.linalg.svd(update["head.weight"], full_matrices=False)
    for r in (8, 32):  # everything else has rank 2, so only the head loses
        cut = update | {"head.weight": (head.U[:, :r] * head.S[:r]) @ head.Vh[:r]}
        assert found["cut"][str(r)] == pytest.approx(loss(cut), abs=2e-4)
        assert all(
            found["one_kind_cut"][kind][str(r)] == pytest.approx(both["after"], abs=2e-4)
            for kind in regimes.KINDS
            if kind != "head"
        )
    assert abs(found["one_kind_cut"]["head"]["1"] - both["after"]) > 1e-3
    assert abs(found["cut"]["1"] - both["after"]) > 1e-3


def test_a_spectrum_says_how_large_how_spread_and_where(before, update, found):
    spectra = found["spectra"]
    assert set(spectra) == {*regimes.KINDS, "all"}
    for kind in ("query", "up", "embedding"):
        assert spectra[kind]["rank_90"] <= 2 and spectra[kind]["energy_8"] == pytest.approx(1)
        assert sum(s * s for s in spectra[kind]["sigma"]) == pytest.approx(1, abs=0.01)
    assert spectra["head"]["rank_90"] > 50
    size = update["head.weight"].norm() / before["head.weight"].norm()
    assert spectra["head"]["size"] == pytest.approx(float(size), rel=0.01)
    matrices = [name for name, W in before.items() if W.dim() == 2]
    whole = [torch.cat([some[name].flatten() for name in matrices]).norm() for some in (update, before)]
    assert spectra["all"]["size"] == pytest.approx(float(whole[0] / whole[1]), rel=0.01)


def test_both_tasks_are_measured_on_thirty_windows_apart_from_what_they_train_on():
    mark = lambda windows: (windows * torch.arange(1, 33) ** 9).sum(-1)  # as good as the 32 tokens themselves
    for task, most in (
        ("far", 0.02),
        ("near", 0.10),
    ):  # docstrings repeat one another: near has no passages cut
        train, held_out = (regimes.texts(task)[part] for part in ("train", "held out"))
        assert len(held_out) == 30 * 256
        seen = torch.isin(mark(held_out.view(-1, 32)), mark(train.unfold(0, 32, 1)))
        assert seen.double().mean() <= most, (task, seen.double().mean())
    base = load_checkpoint("base")
    assert all(torch.equal(W, base[name]) for name, W in regimes.start("far").items())
    tuned = TinyLM.from_state_dict(regimes.start("near"))
    held_out = regimes.texts("far")["held out"]
    assert evaluate(tuned, held_out) < evaluate(TinyLM.from_state_dict(base), held_out) - 1.5


@pytest.mark.slow
def test_a_done_run_is_read_and_its_update_lies_beside_it(tmp_path, monkeypatch):
    run = {"task": "far", "rate": 1e-3, "steps": 1, "seed": 0}
    row = regimes.record(run, tmp_path)
    assert row["after"] < row["before"] and not list(tmp_path.glob("*.run"))
    assert (tmp_path / f"{regimes.name_of(run)}.safetensors").is_file()
    monkeypatch.setattr(regimes, "fit", None)
    assert regimes.record(run, tmp_path) == row


def test_the_recorded_rows_are_the_wanted_ones_and_cuts_lose_less_at_higher_ranks():
    names = {regimes.name_of(row) for row in load_regimes()}
    wanted = [*regimes.wanted(), *regimes.wanted_lora(), *regimes.wanted_seeds()]
    assert {regimes.name_of(run) for run in wanted} <= names
    others = [row for row in load_regimes() if regimes.name_of(row) not in {*map(regimes.name_of, wanted)}]
    assert all(row["method"] == "lora" and row["seed"] > 0 for row in others)
    for row in load_regimes(method="full"):
        gain = row["before"] - row["after"]
        kept = {int(r): (row["before"] - loss) / gain for r, loss in row["cut"].items()}
        assert gain > 0 and kept[64] == pytest.approx(1, abs=0.05), regimes.name_of(row)
        if gain > 0.06:  # of a tiny gain a cut can even leave more than the whole
            assert kept[1] < kept[8] < kept[32] < kept[64] + 0.01, regimes.name_of(row)


def test_the_shipped_gentle_update_is_the_one_of_its_row():
    made = json.loads((shipped.data_folder() / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    assert "rate 0.001, 100 steps" in made["gentle.safetensors"]["made"]
    [row] = load_regimes(method="full", **regimes.GENTLE)
    base, delta = load_checkpoint("base"), load_checkpoint("gentle")
    found = regimes.losses_of(base, delta, regimes.texts("far")["held out"])
    assert found["before"] == pytest.approx(row["before"], abs=0.05)  # another version of numpy, another text
    assert found["before"] - found["after"] == pytest.approx(row["before"] - row["after"], abs=0.05)


def test_each_rank_of_lora_has_its_best_rate_between_others_and_two_more_seeds_there():
    for rank in regimes.LORA_RATES:
        rows = load_regimes(method="lora", rank=rank, seed=0)
        best = min((row for row in rows if row["after"] is not None), key=lambda row: row["after"])
        rates = sorted(row["rate"] for row in rows)
        assert rates[0] < best["rate"] < rates[-1], rank
        seeds = [row["seed"] for row in load_regimes(method="lora", rank=rank, rate=best["rate"])]
        assert seeds == [0, 1, 2], rank
