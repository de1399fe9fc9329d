"""The variants' benchmark, small: what it counts as held is what each variant keeps, and every part is written."""

import json

import pytest
from opened import open_benchmark

from lora_edu.recording.variants import SIZES

BLOCKS = 6 * (4 * 100 * 100 + 2 * 100 * 400)  # numbers in the matrices that the variants stand beside
LORA = 43_200  # numbers of LoRA at r = 4


@pytest.fixture(scope="module")
def benchmark():
    return open_benchmark("variants")


@pytest.fixture(scope="module")
def held(benchmark):
    found = {}
    for method in ("lora", "pissa", "muon", "adalora"):
        model, optimizer, told = benchmark.prepared(method)
        benchmark.step_of(model, optimizer, told)()
        found[method] = benchmark.held(model, optimizer)
    return found


@pytest.mark.slow
def test_what_is_held_is_what_a_variant_keeps(held):
    lora = held["lora"]
    assert lora["gradients"] == 4 * LORA and 0 <= lora["optimiser"] - 2 * 4 * LORA < 1_000  # and counters
    # PiSSA keeps W beside W_res, and where A and B started
    assert held["pissa"]["weights"] - lora["weights"] == 4 * (BLOCKS + LORA)
    assert held["muon"]["optimiser"] == 4 * LORA  # momentum alone
    triplets = 36 * 6
    trained = 1.5 * LORA + triplets
    assert held["adalora"]["gradients"] == 4 * trained
    assert (
        0 <= held["adalora"]["optimiser"] - 4 * 4 * trained < 1_000
    )  # Adam's two, sensitivity and uncertainty


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_run_measures_every_variant(benchmark, tmp_path):
    benchmark.main(["--repeats", "1", "--only", "steps", "disk", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "variants.json").read_text(encoding="utf-8"))
    for part in ("steps", "disk"):
        assert [row["way"] for row in record[part]] == list(SIZES)
    files = {row["way"]: row for row in record["disk"]}
    assert files["pissa"]["bytes"] > 1.8 * files["lora"]["bytes"]  # plain LoRA of rank 2r
    for method in ("lora", "dora", "adalora", "lora-xs"):
        assert 4 * files[method]["trained"] < files[method]["bytes"] < 4 * files[method]["trained"] + 40_000
    assert not (tmp_path / "variants.png").exists()  # memory is not there yet


def test_the_stored_results_have_every_variant(benchmark):
    record = json.loads((benchmark.RESULTS / "variants.json").read_text(encoding="utf-8"))
    for part in benchmark.PARTS:
        assert [row["way"] for row in record[part]] == list(SIZES)
    assert record["settings"]["sizes"] == {method: sizes[0] for method, sizes in SIZES.items()}
