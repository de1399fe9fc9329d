"""A kernel that may not do what a chapter must never need: reach the network, or write into the repository.

For the tests and the site's builder; nothing here runs in a reader's kernel.
"""

import os
from pathlib import Path


def variables() -> dict[str, str]:
    """The environment variables that guard a kernel: Python loads our `sitecustomize` before anything else.

    Two notebooks may share the cores, so a thread of it that waits does not spin.
    """
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_WAIT_POLICY": "PASSIVE"}
