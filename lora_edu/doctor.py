"""`lora-edu doctor`: what this machine has, and which chapters can run on it. Changes nothing."""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_edu.paths import REPOSITORY, repository, user_folder

NEEDED = ("lora-edu", "torch", "numpy", "matplotlib", "jupyterlab", "ipywidgets", "tokenizers", "safetensors")
OPTIONAL = ("loralib", "peft", "triton")
READS_DATA = {"load_checkpoint", "load_corpus", "load_encoder_runs", "load_llm_runs"}
READS_LIBRARY = {"load_corpus", "load_pairs"}
WITHOUT_SOURCE = (
    "this Python comes without its library's source; python.org's, conda's or your system's full one has it"
)


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 if a chapter can't run here or a file of data/ is wrong, else 0."""
    argparse.ArgumentParser(prog="lora-edu doctor", description=__doc__.split(": ")[1]).parse_args(arguments)
    for line in machine():
        print(line)
    try:
        repository()
    except FileNotFoundError as error:
        print(f"\nWRONG  {error}")
        return 1
    print("\nData")
    data = list(data_files())
    for name, right, message in data:
        print(f"  {'ok   ' if right else 'WRONG'}  {name}: {message}")
    print("\nChapters")
    able = list(chapters([name for name, right, _ in data if not right]))
    for name, missing in able:
        print(f"  {'WRONG' if missing else 'ok   '}  {name}" + (f": {'; '.join(missing)}" if missing else ""))
    return int(any(missing for _, missing in able) or not all(right for _, right, _ in data))


def machine() -> Iterator[str]:
    """Versions, device and folders, a line each."""
    yield f"Python {platform.python_version()} at {sys.executable}"
    yield f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    for name in NEEDED + OPTIONAL:
        version = installed(name)
        if version or name in NEEDED:
            yield f"{name} {version or 'MISSING: run `make lab` again'}"
    yield f"Device: {device()}"
    yield f"Library source: {'there' if library_source() else 'MISSING: ' + WITHOUT_SOURCE}"
    yield f"Browser for the browser tests: {browser() or 'none found, those tests are skipped'}"
    yield f"Your folder: {user_folder()} (LORA_EDU_HOME names another)"


def installed(name: str) -> str | None:
    """The version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str:
    """What torch computes on here."""
    if installed("torch") is None:
        return "none, since torch is missing"
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB (CUDA {torch.version.cuda})"
    return f"CPU, {torch.get_num_threads()} threads; no CUDA device, and no chapter needs one"


def library_source() -> bool:
    """Whether the standard library lies here as text, which chapters read."""
    return (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").is_file()


def browser() -> str | None:
    """A Chromium or Chrome on the path, which the browser tests drive."""
    names = [
        os.environ.get("LORA_EDU_CHROMIUM", ""),
        "chromium",
        "chromium-browser",
        "google-chrome",
        "chrome",
    ]
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def data_files() -> Iterator[tuple[str, bool, str]]:
    """(name, whether it is right, message) for every shipped file, and for a manifest that is wrong."""
    try:
        from lora_edu.data.shipped import check_all

        yield from check_all()
    except (ImportError, OSError, ValueError, KeyError) as error:
        yield "MANIFEST.json", False, str(error)


def chapters(wrong_data: Iterable[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(name, what it lacks to run here) for every chapter beside the package, in reading order."""
    wrong_data = list(wrong_data)
    for path in sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb")):
        yield path.stem, lacking(path, wrong_data)


def lacking(notebook: Path, wrong_data: Sequence[str] = ()) -> list[str]:
    """What a notebook needs and this machine has not: packages it imports, library source, data."""
    modules, words = set(), set()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            found = read_code("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
            modules |= found[0]
            words |= found[1]
    lacks = [f"the package {name} is missing" for name in sorted(modules) if not importable(name)]
    if words & READS_LIBRARY and not library_source():
        lacks.append(WITHOUT_SOURCE)
    if words & READS_DATA and wrong_data:
        lacks.append(f"data/ is not whole ({', '.join(wrong_data)}): `git checkout -- data` brings it back")
    return lacks


def read_code(source: str) -> tuple[set[str], set[str]]:
    """(modules imported, names used) by a piece of Python, but for modules that it tries and can do without."""
    modules, words = set(), set()
    tree = ast.parse(source)
    tried = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and _catches_import_error(node)]
    spared = {id(inner) for node in tried for each in node.body for inner in ast.walk(each)}
    for node in ast.walk(tree):
        if id(node) in spared and isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
            words |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
    return modules, words


def _catches_import_error(node: ast.Try) -> bool:
    return any(
        isinstance(inner, ast.Name) and inner.id in ("ImportError", "ModuleNotFoundError")
        for handler in node.handlers
        if handler.type
        for inner in ast.walk(handler.type)
    )


def importable(module: str) -> bool:
    """Whether a module can be found, without running it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
