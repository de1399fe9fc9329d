"""A wheel, installed where no repository is: `delta` and `count` work, what needs the repository says so."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_edu.paths import REPOSITORY

# found, not imported: whatever looks for pip in this process before makes setuptools refuse to be
HAS_SETUPTOOLS = find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_SETUPTOOLS, reason="builds a wheel without a network: needs setuptools 77"),
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder of packages with the built package in it, and nothing else of ours."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    keep = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "lora_edu", source / "lora_edu", ignore=keep)
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(work), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = work.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(work / "packages"), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return work / "packages"


def run(elsewhere: Path, *arguments: object) -> subprocess.CompletedProcess:
    """A command of the installed package, in a folder that is not ours."""
    variables = {**os.environ, "PYTHONPATH": str(elsewhere), "PYTHONIOENCODING": "utf-8"}
    variables.pop("LORA_EDU_DATA", None)
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=elsewhere.parent, env=variables, capture_output=True, text=True, encoding="utf-8"
    )


def test_delta_and_count_work(elsewhere):
    done = run(elsewhere, "lora_edu.cli", "count", "Qwen3-8B")
    assert done.returncode == 0 and "8 190 735 360" in done.stdout
    torch.manual_seed(0)
    W = torch.randn(60, 40)
    save_file({"a.weight": W}, elsewhere.parent / "before.safetensors")
    update = torch.randn(60, 2) @ torch.randn(2, 40)
    save_file({"a.weight": W + update}, elsewhere.parent / "after.safetensors")
    pair = ("before.safetensors", "after.safetensors")
    done = run(elsewhere, "lora_edu.cli", "delta", *pair, "--plot", "p.png", "--html", "p.html")
    assert done.returncode == 0 and "60×40" in done.stdout, done.stderr
    assert (elsewhere.parent / "p.png").read_bytes().startswith(b"\x89PNG")
    assert b"<script>" in (elsewhere.parent / "p.html").read_bytes()


def test_what_needs_the_repository_says_so_in_one_line_and_writes_nothing(elsewhere):
    done = run(elsewhere, "lora_edu.cli", "data")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"not beside the package (looked in {elsewhere})" in done.stderr
    ours = {path.name for path in elsewhere.iterdir() if path.suffix != ".dist-info"}
    assert ours <= {"lora_edu", "bin", "Scripts"}
