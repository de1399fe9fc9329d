"""For all tests and notebooks: a reader's folder that is thrown away, and the kernel that checks notebooks.

That kernel has two threads (notebooks are built with one, a worker of xdist has one), no network, no writing into the
clone, and nobody's IPython settings. Nothing here knows a single test; what belongs to one chapter stays with one
worker.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import replay
from xdist.scheduler import LoadScopeScheduling

from lora_edu import guard
from lora_edu.notebooks import THREADS

KERNEL = "lora-edu-tests"
HERE = Path(__file__).parent

# The same examples every time, so that a red test is the change's own. HYPOTHESIS_PROFILE=nightly looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("nightly", derandomize=False, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """The first process makes the folder and names it to its workers, which share it."""
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "fixed")
    if "LORA_EDU_TESTS" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="lora-edu-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        make_kernel(folder, KERNEL)
        make_kernel(folder / "jupyterlab", "python3")  # the name that chapters ask for
        path = [str(folder), os.environ.get("JUPYTER_PATH", "")]
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, path))
        os.environ["LORA_EDU_TESTS"] = str(folder)
        os.environ["LORA_EDU_HOME"] = str(folder / "reader")
        if config.getoption(
            "numprocesses", None
        ):  # workers with a thread for each core would wait for each other
            os.environ.update({name: "1" for name in THREADS if name not in os.environ})
        import matplotlib.font_manager  # noqa: F401 - on a new machine this lists the fonts and says so: once, here
    config.option.nbval_kernel_name = KERNEL


def make_kernel(folder: Path, name: str) -> None:
    """A kernelspec: this very Python, with what the tests ask of a kernel in its environment."""
    specification = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "LoRA, measured: tests",
        "language": "python",
        "env": {
            **guard.variables(),
            "IPYTHONDIR": str(folder / "ipython"),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            **dict.fromkeys(THREADS, "2"),
        },
    }
    place = folder / "kernels" / name
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Every notebook, for nbval."""
    return replay.Notebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


class ByChapter(LoadScopeScheduling):
    """Shares tests out by `replay.group`.

    Not by marks: xdist 3.8 writes their groups into an attribute that pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        return replay.group(nodeid)


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to share out
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByChapter:
    return ByChapter(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What depends on something else of the same run comes after it: `ByChapter` keeps it with the same worker.

    A chapter in JupyterLab, then its notebooks for nbval; all else file by file. The site's pages need every chapter's
    run, so they come last.
    """
    for item in items:
        if isinstance(item.parent, replay.Notebook):
            item.add_marker(pytest.mark.slow)
    items.sort(key=stage)


def stage(item: pytest.Item) -> int:
    if item.get_closest_marker("site"):
        return 3
    return 0 if item.get_closest_marker("browser") else 1 if isinstance(item.parent, replay.Notebook) else 2


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if runs := replay.runs():
        told = "; ".join(f"{who}: {count}" for who, count in sorted(runs.items()))
        terminalreporter.write_line(f"notebooks run or compared, by whom: {told}")
