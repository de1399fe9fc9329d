"""The GPU benchmark without a GPU: every line but the clock runs on the interpreter, and nothing is made up."""

import os
import subprocess
import sys

import pytest
import torch

from lora_edu.lora.functional import triton_version
from lora_edu.paths import REPOSITORY

BENCHMARK = REPOSITORY / "benchmarks" / "gpu_embedding.py"


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, BENCHMARK, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(triton_version() < (3, 7), reason="needs Triton 3.7, which has wheels for Linux only")
def test_a_rehearsal_runs_all_ways_and_compares_them():
    assert run("--rehearse").strip() == "rehearsed 13 rows; nothing measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the benchmark would run")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing():
    results = BENCHMARK.parent / "results" / "gpu_embedding.json"
    before = results.stat().st_mtime if results.exists() else None
    said = run()
    assert len(said.splitlines()) == 1 and "nothing was measured" in said
    assert (results.stat().st_mtime if results.exists() else None) == before
