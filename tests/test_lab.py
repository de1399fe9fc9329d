"""`lora-edu lab`: the reader's copies, and a server that answers."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

from lora_edu import lab


def notebook(*sources: str, output: str = "") -> bytes:
    outputs = [new_output("stream", text=output)] if output else []
    cells = [new_code_cell(source, id=f"cell-{n}", outputs=outputs) for n, source in enumerate(sources)]
    return writes(new_notebook(cells=cells)).encode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    for name in ("solutions", "source", ".ipynb_checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "01_low_rank.ipynb").write_bytes(notebook("a = 1"))
    (folder / "solutions" / "01_low_rank.ipynb").write_bytes(notebook("a = 2"))
    (folder / "source" / "01_low_rank.py").write_text("# %%\na = 1\n")
    (folder / ".ipynb_checkpoints" / "01_low_rank-checkpoint.ipynb").write_bytes(notebook("a"))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "reader"


def update(source: Path, target: Path) -> list[str]:
    return list(lab.update_copies(source, target))


def cells(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def test_what_a_reader_gets_and_what_not(source, target):
    assert update(source, target) == []
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == {"01_low_rank.ipynb", "solutions/01_low_rank.ipynb", lab.RECORD}


def test_a_readers_edit_is_kept_and_a_newer_version_offered_once_beside_it(source, target):
    update(source, target)
    (target / "01_low_rank.ipynb").write_bytes(notebook("a = 1", "mine = 2"))
    assert update(source, target) == []
    (source / "01_low_rank.ipynb").write_bytes(notebook("a = 10"))
    (said,) = update(source, target)
    assert "your edited copy stays" in said and "01_low_rank.new.ipynb" in said
    assert cells(target / "01_low_rank.ipynb") == ["a = 1", "mine = 2"]
    assert cells(target / "01_low_rank.new.ipynb") == ["a = 10"]
    (target / "01_low_rank.new.ipynb").unlink()
    assert update(source, target) == []
    (source / "01_low_rank.ipynb").write_bytes(notebook("a = 11"))
    assert len(update(source, target)) == 1
    assert cells(target / "01_low_rank.new.ipynb") == ["a = 11"]
    (target / "01_low_rank.new.ipynb").write_bytes(notebook("also mine"))
    (source / "01_low_rank.ipynb").write_bytes(notebook("a = 12"))
    assert update(source, target) == []
    assert cells(target / "01_low_rank.new.ipynb") == ["also mine"]


def test_running_is_no_edit_and_such_a_copy_is_renewed(source, target):
    update(source, target)
    (target / "01_low_rank.ipynb").write_bytes(notebook("a = 1", output="from a run"))
    assert update(source, target) == []
    assert b"from a run" in (target / "01_low_rank.ipynb").read_bytes()
    (source / "01_low_rank.ipynb").write_bytes(notebook("a = 10"))
    (said,) = update(source, target)
    assert "was renewed" in said
    assert cells(target / "01_low_rank.ipynb") == ["a = 10"]


def test_a_deleted_copy_comes_back_and_a_lost_record_costs_nothing(source, target):
    update(source, target)
    (target / "01_low_rank.ipynb").unlink()
    (target / lab.RECORD).write_text("not json")
    (target / "solutions" / "01_low_rank.ipynb").write_bytes(notebook("mine"))
    assert len(update(source, target)) == 1
    assert cells(target / "01_low_rank.ipynb") == ["a = 1"]
    assert cells(target / "solutions" / "01_low_rank.ipynb") == ["mine"]


def test_a_copy_that_is_no_notebook_any_more_is_the_readers(source, target):
    update(source, target)
    (target / "01_low_rank.ipynb").write_text("{")
    (source / "01_low_rank.ipynb").write_bytes(notebook("a = 10"))
    assert "your edited copy stays" in update(source, target)[0]
    assert (target / "01_low_rank.ipynb").read_text() == "{"


@pytest.mark.parametrize(
    "variables",
    [{"CI": "true", "DISPLAY": ":0"}, {"SSH_CONNECTION": "1 2 3 4", "DISPLAY": ":0"}],
    ids=["CI", "ssh"],
)
def test_no_browser_is_opened_where_nobody_sits(variables):
    assert not lab.has_browser(variables)


def test_no_browser_is_opened_without_a_display():
    if sys.platform == "linux":
        assert not lab.has_browser({})


def test_it_serves_the_index_on_the_next_port_with_widget_state_saved_and_no_news(tmp_path):
    """The real command, as whoever runs the tests (root in a container), on a port that is taken."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    variables = {**os.environ, "LORA_EDU_HOME": str(tmp_path), "CI": "true", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lora_edu.cli", "lab", "--port", str(port), "--ServerApp.ip=127.0.0.1"]
    log = (tmp_path / "log").open("w+b")
    server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, token = wait_for_link(tmp_path / "log", server)
        assert not url.startswith(f"http://127.0.0.1:{port}/")
        base = url.split("/lab")[0]
        settings = ask(f"{base}/lab/api/settings/@jupyter-widgets/jupyterlab-manager:plugin?token={token}")
        assert settings["schema"]["properties"]["saveState"]["default"] is True
        names = {entry["name"] for entry in ask(f"{base}/api/contents?token={token}")["content"]}
        assert "index.ipynb" in names and "source" not in names
        with urllib.request.urlopen(f"{base}/lab/tree/index.ipynb?token={token}", timeout=180) as page:
            text = page.read().decode()
        assert page.status == 200 and '"@jupyterlab/apputils-extension:announcements"' in text
        server.terminate()  # not SIGINT: whoever starts the tests in the background has it ignored
        assert server.wait(timeout=180) is not None
    finally:
        server.kill()
        log.close()
        taken.close()


def wait_for_link(log: Path, server: subprocess.Popen) -> tuple[str, str]:
    """The address and token that the server prints for a reader to open."""
    for _ in range(600):
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"(http://127\.0\.0\.1:\d+/\S*)\?token=(\w+)", text):
            return found[1], found[2]
        assert server.poll() is None, text
        time.sleep(0.1)
    raise AssertionError(f"no link within a minute: {text}")


def ask(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=180) as answer:
        return json.loads(answer.read())
