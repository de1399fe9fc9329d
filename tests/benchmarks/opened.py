"""A benchmark as a module: it is a script, with others beside it that it imports."""

import importlib.util
import sys
from types import ModuleType
from unittest import mock

from lora_edu.paths import REPOSITORY


def open_benchmark(name: str) -> ModuleType:
    folder = REPOSITORY / "benchmarks"
    specification = importlib.util.spec_from_file_location(f"bench_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        specification.loader.exec_module(module)
    return module
