"""The benchmark of the ways to tune, small: it puts on a model what it predicts, and what it measures is there."""

import json
import os

import pytest
import torch
from opened import open_benchmark

from lora_edu import counting

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def benchmark():
    return open_benchmark("methods")


@pytest.mark.parametrize("kind", ["TinyLM", "GPT-2"])
def test_what_is_put_on_a_model_is_what_is_predicted(benchmark, kind):
    ours = benchmark.architecture(kind, 1)
    for name, (method, size) in benchmark.TRAINED.items():
        model = benchmark.base(kind, 1)
        own = sum(each.numel() for each in model.parameters())
        benchmark.put_on(model, method, size)
        trained = [each for each in model.parameters() if each.requires_grad]
        counted = counting.trained(ours, **benchmark.on_paper(method, size))
        assert counted.parameters == sum(each.numel() for each in trained), name
        parts = benchmark.predicted(kind, name, 1, "all logits")["parts"]
        assert parts["gradients"] == sum(each.nbytes for each in trained)
        assert parts["added"] == 4 * (sum(each.numel() for each in model.parameters()) - own)


@pytest.mark.parametrize("name", ["base", "prefix 16", "prompt 64", "bottleneck 8"])
def test_a_token_after_a_cache_is_the_token_after_the_text(benchmark, name):
    """And the cache is afterwards what it was, virtual tokens in it."""
    model = benchmark.used("GPT-2", 1)[name]
    ids = benchmark.tokens("GPT-2", 1, 12)
    reading = benchmark.Reading(model, ids)
    size = benchmark.USED[name][1] if name.startswith("pr") else 0
    assert reading.cached() == 12 + (size or 0)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, reading.next], 1)).logits[:, -1]
    for _ in range(2):
        torch.testing.assert_close(reading.token(), whole, rtol=1e-4, atol=1e-4)
    assert reading.cached() == 12 + (size or 0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="memory is measured in forks")
@pytest.mark.filterwarnings("ignore")
def test_a_small_run_measures_every_way(benchmark, tmp_path):
    benchmark.main(
        [
            "--repeats",
            "1",
            "--rounds",
            "1",
            "--layers",
            "1",
            "--timed-layers",
            "1",
            "--results",
            str(tmp_path),
        ]
    )
    record = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    kinds = ("TinyLM", "GPT-2")
    for part, ways in (("steps", benchmark.TRAINED), ("disk", benchmark.TRAINED), ("tokens", benchmark.USED)):
        assert [(row["model"], row["way"]) for row in record[part]] == [
            (k, way) for k in kinds for way in ways
        ]
    memory = {(row["model"], row["loss"], row["way"]): row for row in record["memory"]}
    assert len(memory) == 3 * len(benchmark.TRAINED)
    for kind, losses in benchmark.LOSSES.items():
        full, prompt = (memory[kind, losses[0], way] for way in ("full", "prompt 16"))
        state = full["parts"]["gradients"] + full["parts"]["optimiser"]
        assert full["peak_bytes"] > state > 0.5 * (full["peak_bytes"] - prompt["peak_bytes"])
    for row in record["tokens"]:
        if "largest_difference_over_std_of_logits" in row:
            assert row["largest_difference_over_std_of_logits"] < 1e-3
    for row in record["disk"]:
        assert 4 * row["stored"] < row["bytes"] < 4 * row["stored"] + 40_000
    assert (tmp_path / "methods.png").stat().st_size > 1000
