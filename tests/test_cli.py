"""`lora-edu`: fast help, any console, and errors of one line."""

import os
import subprocess
import sys

import pytest

from lora_edu import cli, paths


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


WITHOUT = [
    "cli.main(['lab'])",
    "cli.main(['data'])",
    "__import__('lora_edu.notebooks').notebooks.main(['build'])",
    "__import__('lora_edu.site.book').site.book.main([])",
]


@pytest.mark.parametrize("call", WITHOUT)
def test_what_needs_the_repository_says_so_in_one_line_where_it_is_not(call, tmp_path):
    """As in a wheel: the package lies in a folder of packages, and neither chapters nor data beside it."""
    program = (
        "import sys; from pathlib import Path; from lora_edu import cli, paths\n"
        f"paths.REPOSITORY = Path({str(tmp_path)!r})\nsys.exit({call})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "the chapters and their data are not beside the package" in done.stderr and "make lab" in done.stderr
    )


def test_outside_the_repository_the_doctor_still_knows_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "Python" in printed and "not beside the package" in printed.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell with pipes")
@pytest.mark.parametrize("reader", ["true", "head -c 10"])
@pytest.mark.parametrize("command", ["--help", "count", "count llama-3-8b", "count --published", "doctor"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(command, reader):
    """`true` reads nothing and closes the pipe, mostly before our first line."""
    line = f'"{sys.executable}" -m lora_edu.cli {command} | {reader}'
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    assert len(done.stdout) == (0 if reader == "true" else 10)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell with pipes")
def test_a_pipe_that_is_closed_before_the_first_line_ends_a_command_quietly():
    """The writing end of a pipe whose reader is gone: there is no race in it."""
    for command in ("count", "doctor", "--help"):
        ours, theirs = os.pipe()
        os.close(ours)
        run = [sys.executable, "-m", "lora_edu.cli", command]
        done = subprocess.run(run, stdout=theirs, stderr=subprocess.PIPE, timeout=120)
        os.close(theirs)
        assert done.stderr == b"" and done.returncode == 0, command


def test_the_reader_s_folder_may_be_named_with_a_tilde(tmp_path):
    """As in a hub's configuration file, where no shell puts the home folder in its place."""
    home = tmp_path / "home"
    work = tmp_path / "work"
    work.mkdir()
    variables = {"HOME": str(home), "USERPROFILE": str(home), "LORA_EDU_HOME": "~/mine"}
    command = [sys.executable, "-m", "lora_edu.cli", "lab", "--copy-only"]
    done = subprocess.run(
        command, cwd=work, env={**os.environ, **variables}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (home / "mine" / "notebooks" / "index.ipynb").is_file() and not list(work.iterdir())
    assert str(home / "mine").encode() in done.stdout


def test_a_folder_that_can_t_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = lora_edu("lab", "--copy-only", LORA_EDU_HOME=str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr.startswith(b"lora-edu lab: ") and done.stderr.count(b"\n") == 1
