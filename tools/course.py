"""Sets the course up and runs one of its commands, with nothing but Python's own library.

`make lab` and `make test` call it; so does `py tools\\course.py lab` on Windows, where there is no make.
No part of the package: it runs before the package can be imported, and in an old Python far enough to say so.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OWN = REPOSITORY / ".venv"
OLDEST = (3, 11)
CPU_BUILD = "https://download.pytorch.org/whl/cpu"
TWO_WORKERS = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
COMMANDS = {
    "lab": ["-m", "lora_edu.cli", "lab"],
    # conftest.py says what stays with one worker, and in which order it goes out.
    "test": ["-m", "pytest", *TWO_WORKERS, "--durations=25"],
    "quick": ["-m", "pytest", *TWO_WORKERS, "-m", "not slow and not browser"],
    "notebooks": ["-m", "lora_edu.notebooks", "build"],
    "data": ["-m", "lora_edu.cli", "data"],
    "site": ["-m", "lora_edu.site"],
    "bench": ["-m", "benchmarks"],
    "doctor": ["-m", "lora_edu.cli", "doctor"],
    "setup": None,
}
NO_NETWORK = re.compile(
    "ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|Failed to establish"
    "|Temporary failure in name resolution|Name or service not known|nodename nor servname|getaddrinfo failed"
)
EVERYTHING_THERE = """
import sys, tomllib, importlib.metadata as metadata
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
import lora_edu
root = Path(sys.argv[1])
assert Path(lora_edu.__file__).resolve().parent == root / "lora_edu" and metadata.version("lora-edu")
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for wanted in map(Requirement, project["dependencies"] + extras["course"] + extras["test"] + extras["site"]):
    if wanted.marker and not wanted.marker.evaluate():
        continue
    assert wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
"""


class Refused(Exception):
    """Why the set-up can't go on, and what to do, in one line."""


def main(arguments):
    command, *rest = arguments or ["lab"]
    if command not in COMMANDS:
        raise Refused(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}.")
    python = set_up()
    if COMMANDS[command] is None:
        say(f"Ready: {python}")
        return 0
    return hand_over([str(python), *COMMANDS[command], *rest])


def set_up():
    """The interpreter that has everything the course needs; on later runs only a stamp is read."""
    environment = active_environment()
    if environment is None:
        newer = sys.version_info[:2] < OLDEST and newer_python()
        if newer:
            sys.exit(hand_over([newer, str(Path(__file__).resolve()), *sys.argv[1:]]))
        check_version(sys.version_info[:2], f"this Python ({sys.executable})")
        python = own_environment()
    else:
        python = interpreter(environment)
        check_version(version_of(python), f"the active environment ({environment})")
    stamp, key = stamp_file(python), requirements_key(python)
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == key):
        install(python, own=environment is None or same(environment, OWN))
        stamp.write_text(key, encoding="utf-8")
    return python


def active_environment():
    """The virtual or conda environment that is switched on (or whose Python runs this), else None."""
    here = Path(sys.prefix)
    if sys.prefix != sys.base_prefix or (here / "conda-meta").is_dir():
        return here
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        environment = os.environ.get(variable)
        if environment and interpreter(environment).exists():
            return Path(environment)
        if environment:
            say(f"{variable} names {environment}, where no Python is: passed over.")
    return None


def own_environment():
    """The Python of our .venv, made anew where it is missing or no longer runs."""
    python = interpreter(OWN)
    if python.exists() and version_of(python) >= OLDEST:
        return python
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise Refused(
            "this Python has no `venv` module: on Debian or Ubuntu `sudo apt install python3-venv`, "
            "then run the same command again."
        )
    say("Making .venv with Python {}.{} (everything we install stays in it) …".format(*sys.version_info))
    command = [sys.executable, "-m", "venv", "--clear", str(OWN)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        shutil.rmtree(str(OWN), ignore_errors=True)
        reason = made.stdout.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise Refused(f"could not make {OWN}: {reason[-1]}")
    return interpreter(OWN)


def install(python, own):
    """Install what is missing: our .venv as constraints.txt pins it, any other with what it has already."""
    if answer(python, "import argparse; print(argparse.__file__.endswith('.py'))") != "True":
        say("This Python comes without its library's source, which chapters read: those can't run here.")
        say("Python from python.org, from conda or your system's full package (libpython3-stdlib) has it.")
    everything_there = [str(python), "-c", EVERYTHING_THERE, str(REPOSITORY)]
    if not own and subprocess.run(everything_there, **silent()).returncode == 0:
        return
    log = stamp_file(python).with_name("lora-edu-set-up.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    torch = answer(python, "import importlib.metadata as m; print(m.version('torch'))")
    constraints = REPOSITORY / "constraints.txt"
    if not own:  # an environment keeps the PyTorch it has: it may have been built for its GPU
        constraints = log.with_name("lora-edu-keep.txt")
        constraints.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
    told = CPU_BUILD in os.environ.get("PIP_EXTRA_INDEX_URL", "")
    if sys.platform == "linux" and not (torch or told or has_gpu()):
        say("No NVIDIA GPU seen: for PyTorch's CPU build (200 MB, not gigabytes of CUDA) stop this and run")
        say(f"    PIP_EXTRA_INDEX_URL={CPU_BUILD} make lab")
    say("Installing what the course needs (once, a few minutes) …")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2"]
    if run_logged([*pip, "-c", str(constraints), "-e", f"{REPOSITORY}[course,test,site]"], log):
        raise Refused(why_pip_failed(log, own))
    # matplotlib lists the machine's fonts once: done here, it interrupts no chapter
    subprocess.run([str(python), "-c", "import matplotlib.font_manager"], **silent())


def run_logged(command, log):
    """Run pip into a log and return its exit status; of its lines only those that take long are shown."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(REPOSITORY)
        )
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace")
            file.write(line)
            if re.search(r"Downloading .*\((\d{2,}(\.\d+)? MB|.* GB)\)", line):
                say("  " + line.strip())
            if line.startswith("Installing collected packages"):
                say(f"  Installing {line.count(',') + 1} packages")
        return process.wait()


def why_pip_failed(log, own):
    """What pip's log says went wrong, as one line with a way out."""
    text = log.read_text(encoding="utf-8")
    if NO_NETWORK.search(text):
        return (
            "pip could not reach its package index: connect to the network (or set pip's proxy) and run the "
            "same command again; what was fetched so far is kept."
        )
    if "No space left" in text:
        return "the disk is full: make room (2 GB, with CUDA 8 GB) and run the same command again."
    if "externally-managed-environment" in text:
        return "the active environment is managed by the system: leave it and run the same command again."
    if "torch" in text and not own and "conflict" in text:
        return (
            "the active environment's PyTorch is older than 2.6 and yours to upgrade; outside of the "
            "environment the course makes one of its own."
        )
    if re.search(r"No matching distribution found for torch\b", text):
        return (
            "PyTorch has no wheel for this Python and machine: try another Python (3.11 to 3.14), or "
            "`conda install pytorch` from conda-forge and run the same command in that environment."
        )
    errors = (
        [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines() or ["silently"]
    )
    return f"pip failed: {errors[-1].strip()} (the whole log: {log})"


def newer_python():
    """A Python on the PATH that is new enough, else None: macOS has an old `python3` of its own first."""
    for minor in range(14, OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and version_of(found) >= OLDEST:
            return found
    return None


def check_version(version, name):
    if version < OLDEST:
        raise Refused(
            f"{name} is Python {version[0]}.{version[1]}; the course needs {OLDEST[0]}.{OLDEST[1]} or newer: "
            "install one from python.org, your system or conda, then `make lab PYTHON=python3.12`."
        )


def requirements_key(python):
    """A hash of everything that decides what must be installed where."""
    whole = hashlib.sha256(f"{REPOSITORY} {python}".encode())
    for part in ("pyproject.toml", "constraints.txt"):
        whole.update((REPOSITORY / part).read_bytes())
    return whole.hexdigest()


def stamp_file(python):
    """In the interpreter's own environment, or in our build folder where that can't be written."""
    home = Path(python).parent
    home = home.parent if home.name in ("bin", "Scripts") else home
    if os.access(str(home), os.W_OK):
        return home / "lora-edu-set-up.txt"
    folder = REPOSITORY / "build" / hashlib.sha256(str(python).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "lora-edu-set-up.txt"


def interpreter(environment):
    """The Python of a virtual or conda environment, whichever system it is on."""
    environment = Path(environment)
    choices = [environment / "bin" / "python", environment / "bin" / "python3"]
    if os.name == "nt":
        choices = [environment / "Scripts" / "python.exe", environment / "python.exe"]
    return next((choice for choice in choices if choice.exists()), choices[0])


def version_of(python):
    """(major, minor) of an interpreter; (0, 0) where it doesn't run."""
    if same(python, sys.executable):
        return sys.version_info[:2]
    return tuple(map(int, answer(python, "import sys; print(*sys.version_info[:2])").split())) or (0, 0)


def answer(python, program):
    """What a one-line program prints in another interpreter; empty where it fails."""
    try:
        done = subprocess.run([str(python), "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def silent():
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": str(REPOSITORY / "tools")}


def has_gpu():
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def same(one, other):
    try:
        return os.path.samefile(str(one), str(other))
    except OSError:
        return False


def hand_over(command):
    """Run a command in our place: Ctrl-C is its own affair, and its exit status is ours."""
    os.chdir(str(REPOSITORY))
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(command[0], command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def say(line):
    """Print a line on any console: what it can't show is replaced."""
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refused as reason:
        say(f"lora-edu: {reason}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
