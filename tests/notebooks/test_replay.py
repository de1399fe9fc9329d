"""Comparing what JupyterLab ran finds what running it again would find."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import replay

from lora_edu.notebooks import FOLDER
from lora_edu.paths import REPOSITORY

NAME = "solutions/02_intrinsic_dimension"  # every cell's output is compared


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test run of its own, in which JupyterLab has run nothing yet."""
    monkeypatch.setenv("LORA_EDU_TESTS", str(tmp_path))
    return tmp_path


def stored() -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{NAME}.ipynb", as_version=4)


def keep(ran: nbformat.NotebookNode, shared: Path) -> None:
    path = shared / "saved.ipynb"
    nbformat.write(ran, path)
    replay.keep(NAME, path)


def check() -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"notebooks/{NAME}.ipynb"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, encoding="utf-8"
    )
    return done.stdout + done.stderr


def test_a_run_that_shows_what_is_stored_passes_cell_by_cell(shared):
    ran = stored()
    keep(ran, shared)
    output = check()
    assert f"{len(replay.code(ran))} passed" in output and "from JupyterLab's run: 1" in output, output


def test_a_cell_that_showed_something_else_is_named_with_both_texts(shared):
    ran = stored()
    printing = [cell for cell in replay.code(ran) if any("text" in shown for shown in cell.outputs)]
    printing[0].outputs[0].text = "another number\n"
    printing[1].outputs = []
    keep(ran, shared)
    output = check()
    assert "2 failed" in output, output
    assert printing[0].source in output and "another number" in output
    assert stored().cells[ran.cells.index(printing[0])].outputs[0].text.splitlines()[0] in output


def test_a_run_of_other_cells_is_not_taken(shared):
    ran = stored()
    replay.code(ran)[0].source += "\npass"
    keep(ran, shared)
    assert replay.earlier(FOLDER / f"{NAME}.ipynb", stored()) is None
    assert replay.earlier(shared / "other.ipynb", stored()) is None


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/browser/test_explorers.py::test_chapter[05_lora_linear]", "05_lora_linear"),
        ("notebooks/05_lora_linear.ipynb::Cell 3", "05_lora_linear"),
        ("notebooks/solutions/05_lora_linear.ipynb::Cell 0", "05_lora_linear"),
        ("tests/browser/test_site.py::test_a_page[solutions/05_lora_linear-dark]", "page 05_lora_linear"),
        ("tests/browser/test_site.py::test_a_page[index]", "page index"),
        ("tests/browser/test_site.py::test_links", "tests/browser/test_site.py"),
        ("tests/test_tinylm.py::test_shape[05_lora_linear]", "tests/test_tinylm.py"),
    ],
)
def test_a_chapter_stays_with_one_worker(nodeid, group):
    assert replay.group(nodeid) == group
