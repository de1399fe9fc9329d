"""The kernel that checks notebooks: no network, no writing into the clone, two threads, strict comparison."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

from lora_edu.paths import REPOSITORY

pytestmark = pytest.mark.slow


def check(folder: Path, *cells: tuple[str, str]) -> str:
    """Run nbval, with our settings, on a notebook of (source, stored stdout) cells; what it printed."""
    made = []
    for count, (source, text) in enumerate(cells, 1):
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        made.append(new_code_cell(source, execution_count=count, outputs=outputs))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "try.ipynb"
    path.write_text(writes(new_notebook(cells=made, metadata=metadata)), encoding="utf-8")
    settings = ["-p", "no:cacheprovider", "-c", str(REPOSITORY / "pyproject.toml"), f"--rootdir={REPOSITORY}"]
    settings += ["-o", "pythonpath=. tests/notebooks"]  # so that `-p conftest` is the repository's own
    command = [sys.executable, "-m", "pytest", *settings, "-p", "conftest", "--noconftest", "-q", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    return done.stdout + done.stderr


def test_a_cell_that_asks_for_the_network_fails_and_the_machine_itself_answers(tmp_path):
    remote = [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import socket; socket.getaddrinfo('example.org', 443)",
        "import urllib.request; urllib.request.urlopen('http://example.org', timeout=1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import socket; socket.gethostbyname(\"example.org\")'], check=True, capture_output=True)",
    ]
    here = (
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(socket.create_connection(('localhost', server.getsockname()[1])).getpeername()[0])"
    )
    output = check(tmp_path, *((cell, "") for cell in remote), (here, "127.0.0.1\n"))
    assert "5 failed, 1 passed" in output, output
    assert output.count("this kernel has no network") >= 4


def test_a_cell_that_writes_into_the_clone_fails(tmp_path):
    target = REPOSITORY / "notebooks" / "written.txt"
    output = check(
        tmp_path,
        (f"open({str(target)!r}, 'w')", ""),
        (f"import os; os.mkdir({str(target)!r})", ""),
        ("from lora_edu.paths import user_folder\nprint((user_folder() / 'mine').write_text('kept'))", "4\n"),
    )
    assert "2 failed, 1 passed" in output, output
    assert not target.exists()


def test_two_threads_and_a_readers_folder_that_is_thrown_away(tmp_path):
    asks = "import os, torch\nprint(torch.get_num_threads(), os.environ['LORA_EDU_HOME'])"
    output = check(tmp_path, (asks, f"2 {os.environ['LORA_EDU_HOME']}\n"))
    assert "1 passed" in output, output
    assert Path(os.environ["LORA_EDU_HOME"]) != Path.home()


def test_strict_nbval_finds_what_differs(tmp_path):
    """Another number, a warning, output that was not stored, output that comes no more."""
    warning = "import warnings; warnings.warn('x')"
    output = check(tmp_path, ("print(2)", "1\n"), (warning, ""), ("print(1)", ""), ("", "1\n"))
    assert "4 failed" in output, output
