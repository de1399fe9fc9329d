"""The first minutes on a GPU, without one: every line rehearsed, a run cut off, a worker lost, results applied.

The results that are applied here are made up, say so, and live in a temporary copy: no figure of them is a measurement.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from lora_edu.lora.functional import triton_version
from lora_edu.paths import REPOSITORY, write_json

pytestmark = pytest.mark.slow
TOOL = REPOSITORY / "tools" / "on_a_gpu.py"
needs_triton = pytest.mark.skipif(
    triton_version() < (3, 7), reason="needs Triton 3.7, which has wheels for Linux only"
)


def load_tool():
    spec = importlib.util.spec_from_file_location("on_a_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


on_a_gpu = load_tool()


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1200,
    )


def records(folder) -> dict[str, dict]:
    return {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in on_a_gpu.ORDER}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A rehearsal that was killed in its second part and then started again."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, str(TOOL), "--out", str(out), "--rehearse", "--minutes", "180"]
    environment = {"TRITON_CACHE_DIR": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (out / "correctness.json").exists():
        time.sleep(0.05)
    first.kill()  # and with it its worker, and the worker's compilers
    first.wait()
    time.sleep(1)
    kept = {path.name: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}
    done = run("--out", out, "--rehearse", "--minutes", 180, **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return out, kept, done.stdout


@needs_triton
def test_a_rehearsal_runs_every_item_of_every_part(rehearsal):
    out, _, said = rehearsal
    for name, record in records(out).items():
        failed = [each for each in record["items"] if "error" in each]
        assert record["rehearsed"] and record["items"] and not failed and not record["left_out"], (
            name,
            failed,
        )
        assert f"{name:12} {len(record['items']):4} done, 0 failed, 0 left out" in said
    assert not (out / "state.json").exists()
    steps = {each["inputs"]["what"] for each in records(out)["step"]["items"]}
    assert steps == {"calls", "step", "profile"}


@needs_triton
def test_a_run_that_was_cut_off_keeps_what_it_found_and_goes_on_behind_it(rehearsal):
    out, kept, _ = rehearsal
    assert len(kept["device.json"]["items"]) == 2 and kept["correctness.json"]["items"]
    for name in ("device", "correctness"):
        before, after = kept[f"{name}.json"]["items"], records(out)[name]["items"]
        assert after[: len(before)] == before, name  # found once, not measured again


def test_a_rehearsal_is_never_applied(rehearsal, tmp_path):
    done = run("--apply", rehearsal[0], "--into", tmp_path)
    assert done.returncode == 1 and "holds a rehearsal, which measured nothing" in done.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_applied_from_an_empty_folder(tmp_path):
    done = run("--apply", tmp_path, "--into", tmp_path / "repository")
    assert done.returncode == 1 and "names no device" in done.stderr and not list(tmp_path.iterdir())


# Made up, in a copy


SHIPS, FASTER = [16, 64, 16, 4, 3, 0, False, False], [64, 256, 16, 8, 3, 0, True, False]


@pytest.fixture
def made_up(rehearsal, tmp_path):
    """Results as a card would leave them, from the rehearsal's, and the two folders of a repository they go into."""
    source, copy = tmp_path / "results", tmp_path / "repository"
    source.mkdir()
    for name, record in records(rehearsal[0]).items():
        record["rehearsed"] = False
        if name == "device":
            about = {"device": "Synthetic card", "capability": [9, 0], "date": "2000-01-01", "driver": "none"}
            record["items"][0]["found"] = about
        if name == "tiles":
            shape = {"kernel": "forward", "width": 4096, "tokens": 65_536, "rank": 16, "dtype": "bfloat16"}
            # without what the rehearsal timed itself: on a busy machine one of its own tiles may win
            record["items"] = [each for each in record["items"] if "tried" not in (each["found"] or {})]
            found = {"shipped_s": 2.0, "tried": [[SHIPS, 2.0], [FASTER, 1.0]]}
            record["items"].append({"inputs": shape | {"what": "in turns"}, "found": found})
            slower = {"shipped_s": 2.0, "tried": [[SHIPS, 2.0], [FASTER, 1.99]]}
            record["items"].append({"inputs": shape | {"what": "in turns", "tokens": 4096}, "found": slower})
        write_json(source / f"{name}.json", record)
    kernels = copy / "lora_edu" / "lora" / "triton_kernels.py"
    shutil.copytree(REPOSITORY / "lora_edu", copy / "lora_edu", ignore=shutil.ignore_patterns("__pycache__"))
    return source, copy, kernels


@needs_triton
def test_results_are_applied_to_the_table_of_tiles_the_record_and_its_plot(made_up):
    source, copy, kernels = made_up
    done = run("--apply", source, "--into", copy)
    assert done.returncode == 0, done.stderr[-3000:]
    text = kernels.read_text("utf-8")
    assert '("forward", 2, 16, 4096, 65536): Blocks(64, 256, 16, 8, 3, 0, True, False)' in text
    assert "4096, 4096)" not in text, "a gain of half a per cent replaces nothing"
    assert text.count("Synthetic card") == 1 and '"capability": (9, 0)' in text
    for check in (("format", "--check"), ("check",)):
        ruff = [
            sys.executable,
            "-m",
            "ruff",
            *check,
            "--config",
            str(REPOSITORY / "pyproject.toml"),
            str(kernels),
        ]
        assert subprocess.run(ruff, capture_output=True).returncode == 0
    lines = """
        import torch
        from lora_edu.lora.triton_kernels import Card, blocks_for, forward_blocks
        rule = forward_blocks(4096, 16, torch.bfloat16)
        tile = lambda width, rank, T, kind: blocks_for("forward", width, rank, torch.bfloat16, T, Card(kind, 132))
        assert tile(4096, 16, 65_536, (9, 0)).columns_first and tile(2048, 13, 100, (9, 0)).columns_first
        assert tile(4096, 16, 65_536, (8, 0)) == tile(4096, 64, 1, (9, 0))._replace(rank=16) == rule
    """
    used = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], cwd=copy, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    folder = copy / "benchmarks" / "results"
    result = json.loads((folder / "gpu_embedding.json").read_text("utf-8"))
    assert result["device"] == "Synthetic card" and result["rows"] and result["date"] == "2000-01-01"
    assert result["tiles"] == [["forward", 2, 16, 4096, 65_536, FASTER]] and result["correct"]["failed"] == []
    assert (folder / "gpu_embedding.png").read_bytes().startswith(b"\x89PNG")


@needs_triton
def test_tiles_are_left_as_they_are_when_a_case_was_wrong(made_up):
    source, copy, kernels = made_up
    record = json.loads((source / "correctness.json").read_text("utf-8"))
    record["items"].append({"inputs": {"rank": 5}, "error": "AssertionError: dA is off"})
    write_json(source / "correctness.json", record)
    before = kernels.read_bytes()
    done = run("--apply", source, "--into", copy)
    assert (
        done.returncode == 0
        and "tiles are left as they are" in done.stdout
        and kernels.read_bytes() == before
    )
    result = json.loads((copy / "benchmarks" / "results" / "gpu_embedding.json").read_text("utf-8"))
    assert result["correct"]["failed"][0]["inputs"] == {"rank": 5} and result["tiles"] == []


# The run itself


def item(inputs: dict, run):
    return SimpleNamespace(inputs=inputs, run=run)


def test_a_failing_item_is_recorded_with_its_inputs_and_the_rest_goes_on(tmp_path):
    session = SimpleNamespace(rehearse=True, records={"device": {}}, device="cpu")
    items = [item({"n": 0}, lambda: 1), item({"n": 1}, lambda: 1 / 0), item({"n": 2}, lambda: 3)]
    assert on_a_gpu.run_part("device", lambda *_: iter(items), session, tmp_path, time.time() + 60)
    found = json.loads((tmp_path / "device.json").read_text("utf-8"))["items"]
    assert [each.get("found") for each in found] == [1, None, 3]
    assert found[1]["inputs"] == {"n": 1} and found[1]["error"] == "ZeroDivisionError: division by zero"


def test_when_the_time_is_over_the_rest_is_listed_as_left_out(tmp_path):
    session = SimpleNamespace(rehearse=True, records={"device": {}}, device="cpu")
    items = [item({"n": n}, lambda: time.sleep(0.2)) for n in range(4)]
    on_a_gpu.run_part("device", lambda *_: iter(items), session, tmp_path, time.time() + 0.3)
    record = json.loads((tmp_path / "device.json").read_text("utf-8"))
    assert [each["inputs"]["n"] for each in record["items"]] == [0, 1]
    assert record["left_out"] == [{"n": 2}, {"n": 3}]


WORKER = """
    import json, os, sys, time
    from pathlib import Path
    from lora_edu.paths import write_json
    out, after = Path(sys.argv[1]), json.loads(sys.argv[2])
    path = out / "tiles.json"
    record = json.loads(path.read_text()) if path.exists() else {"part": "tiles", "items": []}
    for n in range(len(record["items"]), 4):
        write_json(out / "state.json", {"part": "tiles", "inputs": {"n": n}, "until": time.time(), "open": True})
        if after.get(str(n)) == "dies":
            os.kill(os.getpid(), 9)
        while after.get(str(n)) == "hangs":
            time.sleep(1)
        record["items"].append({"inputs": {"n": n}, "found": n})
        write_json(path, record)
"""


@pytest.mark.skipif(os.name == "nt", reason="no signal 9 on Windows, and no Triton")
def test_an_item_that_takes_its_process_down_or_hangs_is_blamed_and_the_rest_goes_on(tmp_path):
    fates = json.dumps({"1": "dies", "2": "hangs"})
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path), fates]
    assert on_a_gpu.supervise(command, tmp_path, time.time() + 120, patience=4) == 0
    items = json.loads((tmp_path / "tiles.json").read_text("utf-8"))["items"]
    assert [each["inputs"]["n"] for each in items] == [0, 1, 2, 3]
    assert items[1]["error"] == "the process ended with -9" and items[2]["error"].startswith("no answer 4 s")
    assert items[0]["found"] == 0 and items[3]["found"] == 3


def test_without_a_card_nothing_is_measured(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: it would run")
    done = run("--out", tmp_path)
    assert done.returncode == 1 and "no CUDA device here, so nothing was measured" in done.stdout
    assert not list(tmp_path.glob("*.json"))
