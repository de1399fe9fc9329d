"""The benchmark of four-bit layers, small: every way computes the same layer, and what it measures is there."""

import json

import pytest
import torch
from opened import open_benchmark


@pytest.fixture
def benchmark():
    return open_benchmark("quantised")


def test_the_ways_are_one_layer(benchmark):
    outputs = {}
    for way in benchmark.ways():
        x = torch.linspace(-1, 1, 3 * 128).view(3, 128).requires_grad_(True)
        outputs[way] = (benchmark.once(benchmark.layer(way, 64, 128), x), x.grad)
    wanted, gradient = outputs[benchmark.NF4]
    scale = float(wanted.abs().max())
    for way, (out, into) in outputs.items():
        near = 1e-2 if way == benchmark.BNB else 1e-5 if way == benchmark.WHOLE else 0.5
        assert float((out - wanted).abs().max()) < near * scale, way
        assert float((into - gradient).abs().max()) < near * float(gradient.abs().max()), way


@pytest.mark.slow
def test_a_small_run_measures_every_way(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", [(64, 128)])
    monkeypatch.setattr(benchmark, "ROWS", [1, 4])
    benchmark.main(["--repeats", "1", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "quantised.json").read_text(encoding="utf-8"))
    ways = benchmark.ways()
    assert [row["way"] for row in record["memory"]] == ways and len(record["times"]) == 2 * len(ways)
    stored = {row["way"]: row["stored_bytes"] for row in record["memory"]}
    assert (
        stored[benchmark.FLOAT] > 7.5 * stored[benchmark.NF4]
        and stored[benchmark.Q4_1] > stored[benchmark.NF4]
    )
    assert (tmp_path / "quantised.png").stat().st_size > 5_000
