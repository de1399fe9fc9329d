"""The Triton kernels: right on Triton's interpreter, compiled for a GPU that isn't here, right on one that is.

The cases themselves are in kernel_cases.py, one file for all machines. Each run is a process of its own, as
Triton reads TRITON_INTERPRET when it is imported, and importing it must stay nobody's burden.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_edu.lora.functional import triton_version

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    triton_version() < (3, 7), reason="needs Triton 3.7, which has wheels for Linux only"
)


def run(*arguments: str, patience: float = 1200, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=patience,
    )


def run_cases(chosen: str, **variables: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-W", "ignore")
    done = run("-m", "pytest", *options, "-k", chosen, str(HERE / "kernel_cases.py"), **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("chosen", ["one_hot", "operator", "not one_hot and not operator"])
def test_right_on_the_interpreter(chosen):
    run_cases(chosen, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chosen", ["one_hot", "operator", "not one_hot and not operator"])
def test_right_on_the_gpu(chosen):
    run_cases(chosen)


@pytest.mark.slow
@needs_triton
def test_compiled_for_an_h100_nothing_is_spilt_and_half_precision_uses_tensor_cores(tmp_path):
    """The source that the interpreter ran becomes machine code for sm_90; no GPU is needed for that."""
    done = run(str(HERE / "compiled_kernels.py"), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= 16
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["registers"] < 255, kernel
        assert kernel["shared"] <= 99 * 1024, kernel  # what the smallest cards of today have, too
        assert kernel["tensor cores"] or not kernel["dtype"].endswith("float16"), kernel
        # 16 bytes a thread from the tables, also at r = 8, and 8 for an id: nothing is fetched number by number
        assert "/" in kernel["dtype"] or set(kernel["load bytes"]) == {"8", "16"}, kernel


def test_a_cpu_never_imports_triton():
    lines = [
        "import sys, torch",
        "from lora_edu.lora import LoRAEmbedding",
        "layer = LoRAEmbedding(20, 8, 2, 4)",
        "layer(torch.arange(5)).sum().backward()",
        "print('triton' in sys.modules)",
    ]
    done = run("-c", "\n".join(lines))
    assert done.stdout.strip() == "False", done.stdout + done.stderr
