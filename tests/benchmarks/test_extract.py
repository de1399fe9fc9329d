"""The benchmark of `lora-edu extract`, small: its spectrum is the one it claims, and what it measures is there."""

import json

import pytest
import torch
from opened import open_benchmark

benchmark = open_benchmark("extract")


def test_reflections_keep_the_singular_values():
    delta = torch.zeros(40, 24)
    delta[torch.arange(24), torch.arange(24)] = 1 / torch.arange(1.0, 25.0)
    made = benchmark.reflected(delta.clone(), torch.Generator().manual_seed(0))
    assert torch.allclose(torch.linalg.svdvals(made), 1 / torch.arange(1.0, 25.0), atol=1e-5)
    assert (made - delta).norm() > 0.5 * delta.norm()


@pytest.mark.slow
def test_a_small_run_measures_both_ways(tmp_path):
    sizes = ["--hidden", "64", "--layers", "1", "--vocabulary", "96", "--rank", "4"]
    benchmark.main([*sizes, "--results", str(tmp_path)])
    record = json.loads((tmp_path / "extract.json").read_text(encoding="utf-8"))
    ways = {row["way"]: row for row in record["rows"]}
    assert set(ways) == {benchmark.OURS, benchmark.LOOP}
    for row in ways.values():
        assert (
            "failed" not in row and row["matrices"] == 8 and row["entries"] == ways[benchmark.LOOP]["entries"]
        )
        assert 0.999 < row["worst_error_over_optimal"] < 1.05 and row["processor_seconds"] > 0
    assert (tmp_path / "extract.png").stat().st_size > 1000
