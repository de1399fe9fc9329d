"""`lora-edu`: fast help, any console, and errors of one line."""

import os
import subprocess
import sys

import pytest

from lora_edu import cli


def lora_edu(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lora_edu.cli", *arguments]
    return subprocess.run(command, capture_output=True, env={**os.environ, **variables}, timeout=120)


def test_help_lists_the_commands_and_imports_none_of_them():
    program = (
        "import sys; from lora_edu import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'jupyterlab'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "lab" in done.stdout and "doctor" in done.stdout


def test_only_commands_whose_module_is_there_are_offered():
    assert cli.is_there("lora_edu.lab") and cli.is_there("lora_edu.doctor")
    assert not cli.is_there("lora_edu.nothing")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_the_doctor_can_speak_on_any_console(encoding, tmp_path):
    """The reader's folder has a name that two of the three consoles can't show."""
    done = lora_edu("doctor", PYTHONIOENCODING=encoding, LORA_EDU_HOME=str(tmp_path / "低秩"))
    assert b"Traceback" not in done.stderr
    assert b"Python" in done.stdout and b"Chapters" in done.stdout


def test_an_error_is_one_line(tmp_path):
    """Installed without the repository, the package can't find the chapters and says how to get them."""
    program = (
        "import sys; from pathlib import Path; from lora_edu import cli, lab\n"
        f"lab.REPOSITORY = Path({str(tmp_path)!r})\nsys.exit(cli.main(['lab']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.startswith("lora-edu lab: the chapters are not beside the package")
    assert "make lab" in done.stderr and done.stderr.count("\n") == 1
