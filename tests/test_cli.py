"""`lora-edu`: fast help, any console, and errors of one line."""

import os
import subprocess
import sys

import pytest

from lora_edu import cli, notebooks, paths
from lora_edu.site import book


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


WITHOUT = {
    "lab": lambda: cli.main(["lab"]),
    "data": lambda: cli.main(["data"]),
    "notebooks": lambda: notebooks.main(["build"]),
    "site": lambda: book.main([]),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_needs_the_repository_says_so_in_one_line_where_it_is_not(name, tmp_path, monkeypatch, capsys):
    """As in a wheel: the package lies in a folder of packages, and neither chapters nor data beside it."""
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    assert WITHOUT[name]() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the chapters and their data are not beside the package" in error and "make lab" in error


def test_outside_the_repository_the_doctor_still_knows_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "Python" in printed and "not beside the package" in printed.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell with pipes")
@pytest.mark.parametrize("command", ["--help", "count", "count --published", "doctor"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(command):
    line = f'"{sys.executable}" -m lora_edu.cli {command} | head -c 10'
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert done.stderr == b"" and len(done.stdout) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe without a reader")
@pytest.mark.parametrize("command", ["--help", "count", "doctor"])
def test_a_pipe_that_is_closed_before_the_first_line_ends_a_command_quietly(command):
    ours, theirs = os.pipe()
    os.close(ours)
    run = [sys.executable, "-m", "lora_edu.cli", command]
    done = subprocess.run(run, stdout=theirs, stderr=subprocess.PIPE, timeout=120)
    os.close(theirs)
    assert done.stderr == b"" and done.returncode == 0


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
