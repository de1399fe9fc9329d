"""For all tests and notebooks: a reader's folder that is thrown away, and the kernel that checks notebooks.

That kernel has two threads (notebooks are built with one), no network, no writing into the clone, and
nobody's IPython settings. Nothing here knows a single test; the browser's come first, being the longest.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

KERNEL = "lora-edu-tests"
HERE = Path(__file__).parent
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def pytest_configure(config: pytest.Config) -> None:
    """The first process makes the folder and names it to its workers, which share it."""
    if "LORA_EDU_TESTS" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="lora-edu-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        make_kernel(folder)
        path = [str(folder), os.environ.get("JUPYTER_PATH", "")]
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, path))
        os.environ["LORA_EDU_TESTS"] = str(folder)
        os.environ["LORA_EDU_HOME"] = str(folder / "reader")
        import matplotlib.font_manager  # noqa: F401 - on a new machine this lists the fonts and says so: once, here
    config.option.nbval = True
    config.option.nbval_kernel_name = KERNEL


def make_kernel(folder: Path) -> None:
    """A kernelspec: this very Python, with what the tests ask of a kernel in its environment."""
    path = [str(HERE / "tests" / "notebooks"), os.environ.get("PYTHONPATH", "")]
    specification = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "LoRA, measured: tests",
        "language": "python",
        "env": {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "IPYTHONDIR": str(folder / "ipython"),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            **dict.fromkeys(THREADS, "2"),
            "OMP_WAIT_POLICY": "PASSIVE",  # two notebooks share the cores: a thread that waits must not spin
        },
    }
    place = folder / "kernels" / KERNEL
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser's files first: each takes minutes, and one that starts last leaves the other worker idle."""
    items.sort(key=lambda item: "browser" not in item.path.parts)
