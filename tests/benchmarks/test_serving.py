"""The benchmark of serving, small: every way computes the same rows, and what it measures is there."""

import json

import pytest
import torch
from opened import open_benchmark

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture
def benchmark():
    return open_benchmark("serving")


@pytest.mark.parametrize("adapters", [1, 3, 64])
def test_the_rows_of_every_adapter_come_back_in_their_places(benchmark, adapters):
    ids = torch.arange(benchmark.ROWS)[:, None]
    seen = {}

    def run(index, some):
        seen[index] = some.flatten().tolist()
        return 1000.0 * index + some

    out = benchmark.in_groups(run, ids, adapters)
    assert torch.equal(out.flatten(), torch.tensor([1000.0 * (row % adapters) + row for row in range(64)]))
    assert sorted(row for rows in seen.values() for row in rows) == list(range(64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_run_measures_every_way(benchmark, tmp_path):
    arguments = [
        "--models",
        "TinyLM",
        "Llama",
        "--adapters",
        "1",
        "3",
        "--tokens",
        "1",
        "2",
        "--repeats",
        "1",
    ]
    benchmark.main([*arguments, "--layers", "1", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    ways = [benchmark.BASE, benchmark.MIXED, benchmark.SWITCHING, benchmark.COPIES, benchmark.PEFT]
    assert len(record["times"]) == 2 * 2 * 2 * len(ways) and len(record["products"]) == 4
    for row in record["times"]:
        assert row["way"] in ways and row["tokens_a_second"] > 0
        if row["way"] != benchmark.BASE:
            assert row["largest_difference_over_largest_logit"] < 1e-3
    for row in record["memory"]:
        of = {each["way"]: each for each in record["memory"] if each["model"] == row["model"]}
        assert of[benchmark.COPIES]["peak_extra_bytes"] > 2.5 * row["model_bytes"]
        assert 0 < of[benchmark.MIXED]["adapter_bytes"] <= of[benchmark.MIXED]["computed_extra_bytes"]
        assert of[benchmark.MIXED]["peak_extra_bytes"] < of[benchmark.COPIES]["peak_extra_bytes"]
    assert (tmp_path / "serving.png").stat().st_size > 1000
