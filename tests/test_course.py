"""tools/course.py: what a newcomer meets, on a machine where something is missing."""

import ast
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from lora_edu.paths import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "course.py"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The script as a module, on a repository of its own, with no environment switched on."""
    specification = importlib.util.spec_from_file_location("course", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    monkeypatch.setattr(module, "OWN", tmp_path / ".venv")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    return module


def without_environment(course, monkeypatch):
    monkeypatch.setattr(course.sys, "prefix", course.sys.base_prefix)


def fake_pip(monkeypatch, course, log: str, status: int) -> list[list[str]]:
    """Stand in for pip: write its log, return its status, and remember the command lines."""
    calls = []

    def run_logged(command, path):
        calls.append(command)
        path.write_text(log, encoding="utf-8")
        return status

    monkeypatch.setattr(course, "run_logged", run_logged)
    monkeypatch.setattr(course, "answer", lambda python, program: "True" if "argparse" in program else "")
    return calls


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=False)
    return folder


def test_an_old_python_can_read_it_far_enough_to_say_that_it_is_old():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 7))


def test_python_too_old(course, monkeypatch):
    without_environment(course, monkeypatch)
    monkeypatch.setattr(course.sys, "version_info", (3, 9, 6))
    monkeypatch.setattr(course, "newer_python", lambda: None)
    with pytest.raises(course.Refused, match=r"is Python 3\.9; the course needs 3\.11 or newer: install one"):
        course.set_up()


def test_an_old_python_hands_over_to_a_newer_one_on_the_path(course, monkeypatch):
    without_environment(course, monkeypatch)
    monkeypatch.setattr(course.sys, "version_info", (3, 9, 6))
    monkeypatch.setattr(course, "newer_python", lambda: "/opt/python3.13")
    handed = []
    monkeypatch.setattr(course, "hand_over", lambda command: handed.append(command[0]) or 0)
    with pytest.raises(SystemExit):
        course.set_up()
    assert handed == ["/opt/python3.13"]


def test_no_venv_module(course, monkeypatch):
    without_environment(course, monkeypatch)
    monkeypatch.setattr(course.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(course.Refused, match="on Debian or Ubuntu `sudo apt install python3-venv`"):
        course.set_up()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("NewConnectionError(... [Errno -3] Temporary failure in name resolution)", "connect to the network"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch>=2.6", "PyTorch has no wheel for this Python"),
        ("ERROR: something else", r"pip failed: ERROR: something else \(the whole log: "),
    ],
)
def test_why_pip_failed(course, monkeypatch, tmp_path, log, message):
    fake_pip(monkeypatch, course, log, 1)
    with pytest.raises(course.Refused, match=message):
        course.install(course.interpreter(environment(tmp_path / "v")), own=True)


def test_pip_without_a_network_is_recognised_by_what_it_really_says(course, tmp_path, monkeypatch):
    """Pip itself, pointed at a port of this machine where nobody listens."""
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    log = tmp_path / "log"
    pip = [sys.executable, "-m", "pip", "install", "--retries", "1", "--target", str(tmp_path / "t")]
    assert course.run_logged([*pip, "no-such-package-of-ours"], log) != 0
    assert "connect to the network" in course.why_pip_failed(log, own=True)


def test_our_environment_gets_the_constraints(course, monkeypatch, tmp_path):
    calls = fake_pip(monkeypatch, course, "", 0)
    course.install(course.interpreter(environment(tmp_path / "v")), own=True)
    (command,) = calls
    assert command[command.index("-c") + 1] == str(tmp_path / "constraints.txt")
    assert command[-1] == f"{tmp_path}[course,test,site]"


def test_an_active_environment_keeps_its_torch_and_gets_no_constraints(course, monkeypatch, tmp_path):
    calls = fake_pip(monkeypatch, course, "", 0)
    monkeypatch.setattr(
        course, "answer", lambda python, program: "True" if "argparse" in program else "2.7.1+cu128"
    )
    course.install(course.interpreter(environment(tmp_path / "v")), own=False)
    (command,) = calls
    kept = Path(command[command.index("-c") + 1])
    assert kept.read_text() == "torch==2.7.1+cu128\n"
    assert "constraints.txt" not in " ".join(command)


def test_an_environment_that_has_everything_needs_no_pip(course, monkeypatch):
    """The one these tests run in: nothing is fetched, so a prepared laptop works without a network."""
    monkeypatch.setattr(course, "REPOSITORY", REPOSITORY)
    command = [sys.executable, "-c", course.EVERYTHING_THERE, str(REPOSITORY)]
    done = subprocess.run(command, cwd=REPOSITORY / "tools", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_active_environment_is_found(course, monkeypatch, tmp_path):
    without_environment(course, monkeypatch)
    assert course.active_environment() is None
    monkeypatch.setenv("CONDA_PREFIX", str(environment(tmp_path / "conda")))
    assert course.active_environment() == tmp_path / "conda"
    monkeypatch.setenv("VIRTUAL_ENV", str(environment(tmp_path / "virtual")))
    assert course.active_environment() == tmp_path / "virtual"


def test_a_variable_that_names_no_environment_is_passed_over(course, monkeypatch, tmp_path, capsys):
    without_environment(course, monkeypatch)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "gone"))
    assert course.active_environment() is None
    assert "VIRTUAL_ENV names" in capsys.readouterr().out


def test_the_second_run_only_reads_a_stamp_until_the_requirements_change(course, monkeypatch, tmp_path):
    without_environment(course, monkeypatch)
    environment(tmp_path / ".venv")
    installs = []
    monkeypatch.setattr(course, "install", lambda python, own: installs.append(own))
    course.set_up()
    course.set_up()
    assert installs == [True]
    (tmp_path / "constraints.txt").write_text("torch==2.13.1\n")
    course.set_up()
    assert installs == [True, True]


def test_linux_without_a_gpu_learns_of_the_cpu_build(course, monkeypatch, tmp_path, capsys):
    fake_pip(monkeypatch, course, "", 0)
    monkeypatch.setattr(course, "has_gpu", lambda: False)
    monkeypatch.setattr(course.sys, "platform", "linux")
    course.install(course.interpreter(environment(tmp_path / "v")), own=True)
    assert f"PIP_EXTRA_INDEX_URL={course.CPU_BUILD} make lab" in capsys.readouterr().out


def test_a_python_without_the_library_source_is_told(course, monkeypatch, tmp_path, capsys):
    fake_pip(monkeypatch, course, "", 0)
    monkeypatch.setattr(course, "answer", lambda python, program: "")
    course.install(course.interpreter(environment(tmp_path / "v")), own=True)
    assert "without its library's source" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_those_there_are():
    done = subprocess.run([sys.executable, str(SCRIPT), "nothing"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "choose one of lab, test" in done.stdout and "Traceback" not in done.stderr
