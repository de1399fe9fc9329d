"""The published table: read as it stands, and which of its runs stand for our methods is found, not typed in."""

import math

import pytest

from lora_edu.data import counterparts, load_peft_comparison, shipped
from lora_edu.data.comparison import COUNTERPARTS, FILE, SOURCE
from lora_edu.paths import REPOSITORY


@pytest.fixture(scope="module")
def rows():
    return load_peft_comparison()


def test_the_copy_is_whole_and_says_where_it_is_from(rows):
    assert len(rows) == 63 and len({(row["method"], row["run"]) for row in rows}) == 63
    card = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    assert shipped.manifest()["files"][FILE]["made"] == SOURCE
    for word in ("5d602fd", "Apache-2.0", "MetaMathQA", "L40S", "seed 0"):
        assert word in card


def test_every_row_is_possible(rows):
    """A base of 3 212 749 824 numbers; what is trained beside it is at most what is there beside it."""
    assert [row["accuracy"] for row in rows] == sorted((row["accuracy"] for row in rows), reverse=True)
    (full,) = (row for row in rows if row["method"] == "full-finetuning")
    assert full["trained"] == full["total"] == 3_212_749_824
    for row in rows:
        assert 0 <= row["accuracy"] < 1 and row["total"] >= full["total"] and row["trained"] <= row["total"]
        assert row["memory"] > 2 * row["total"], "the weights alone are 2 bytes each"
        assert (row["rank"] is None) or row["rank"] > 0


def test_lora_and_the_others_train_what_the_formulas_say(rows):
    """Llama-3.2-3B: 28 layers, width 3072, values of 1024 numbers. q and v: r (3072 + 3072 + 3072 + 1024) a layer."""
    found = counterparts(rows)
    assert found["lora"]["trained"] == 28 * 32 * (2 * 3072 + 3072 + 1024)
    assert found["lora, rsLoRA"]["trained"] == 28 * 64 * (2 * 3072 + 3072 + 1024)
    assert found["lora, MLPs alone"]["trained"] == 28 * 10 * 3 * (3072 + 8192)
    assert found["prompt"]["trained"] == 200 * 3072 and found["p-tuning"]["file_bytes"] // 4 // 3072 == 20
    assert found["prefix"]["trained"] == 50 * 2 * 28 * 1024


def test_counterparts_are_the_best_of_each_and_variants_are_told_apart(rows):
    found = counterparts(rows)
    assert list(found) == list(COUNTERPARTS)
    lora, rslora = found["lora"], found["lora, rsLoRA"]
    assert (lora["rank"], lora["scaling"]) == (32, 2) and (rslora["rank"], rslora["scaling"]) == (64, 8)
    for word in ("dora", "mlp", "mica", "lorafa"):
        assert word not in lora["run"]
    for name in ("ia3", "prefix", "prompt", "p-tuning"):
        own = [row["accuracy"] for row in rows if row["method"] == found[name]["method"]]
        assert found[name]["accuracy"] == max(own)
    assert all(row["scaling"] is None for row in rows if row["method"] != "lora")
    with pytest.raises(ValueError, match="no row is a published run of lora; give counterparts all"):
        counterparts([row for row in rows if row["method"] != "lora"])


def test_p_tuning_trains_far_more_than_it_stores(rows):
    row = counterparts(rows)["p-tuning"]
    assert math.isclose(row["trained"] / (row["file_bytes"] / 4), 462, rel_tol=0.01)
