"""Builds the notebooks: from notebooks/source/NN_name.py the chapter and its solutions, run top to bottom.

`python -m lora_edu.notebooks build [NAME ...]` writes, `check` compares without running. It knows nothing of
what the chapters say; readers never need it.
"""

import argparse
import ast
import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_edu.paths import REPOSITORY, repository, write_atomically

FOLDER = REPOSITORY / "notebooks"
TAGS = {"setup", "exercise", "solution", "folded", "nbval-ignore-output"}
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"  # means nothing without the kernel that made it
LONGEST_CELL = 25  # lines
PREDICTION = "explore.predict("  # what a cell begins with that holds a question and all its replies
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
# Shown outside the notebooks: file in images/ → the notebook and how the sentence under the picture begins.
IMAGES = {"five_cases.png": ("12_real_llm", "Share of a tuning's gain in five cases")}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Edition:
    """One notebook to build: its name, where it goes, and its cells without outputs."""

    name: str
    path: Path
    notebook: NotebookNode


def names(folder: Path = FOLDER) -> list[str]:
    """Every chapter that has a source, in reading order; the index last, since it says which of them can run."""
    found = [path.stem for path in (folder / "source").glob("*.py")]
    return sorted(found, key=lambda name: (name == "index", name))


def editions(name: str, folder: Path = FOLDER) -> list[Edition]:
    """The notebooks that a source stands for: the chapter, and its solutions where it has any.

    Raises FileNotFoundError for a name without a source, ValueError for a source that breaks the rules.
    """
    source = folder / "source" / f"{name}.py"
    if not source.is_file():
        raise FileNotFoundError(f"no chapter {name!r}: there are {', '.join(names(folder))}")
    cells = read_source(source)
    chapter = [cell for cell in cells if "solution" not in cell.metadata.tags]
    made = [Edition(name, folder / f"{name}.ipynb", assemble(name, chapter))]
    if len(chapter) < len(cells):
        title = next(cell.source.splitlines()[0][2:] for cell in cells if cell.source.startswith("# "))
        head = new_markdown_cell(
            f"# Solutions: {title}\n\nThe exercises of [{title}](../{name}.ipynb), each with an answer "
            "and why it is right. Try them in the chapter first.",
            metadata={"tags": []},
        )
        solved = assemble(f"{name}-solutions", [head, *solve(cells)])
        made.append(Edition(f"solutions/{name}", folder / "solutions" / f"{name}.ipynb", solved))
    return made


def read_source(path: Path) -> list[NotebookNode]:
    """The cells of a py:percent file, checked: known tags, no long cells, a solution after its exercise."""
    import jupytext

    cells = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent").cells
    in_exercise = False
    for number, cell in enumerate(cells, 1):
        where = f"{path.name}, cell {number} ({cell.source.strip()[:50]!r})"
        tags = cell.metadata.setdefault("tags", [])
        if unknown := set(tags) - TAGS:
            raise ValueError(f"{where}: unknown tag {sorted(unknown)}; there are {sorted(TAGS)}")
        if cell.cell_type == "code" and len(cell.source.splitlines()) > LONGEST_CELL:
            raise ValueError(f"{where}: over {LONGEST_CELL} lines; let it do one thing, or move plumbing out")
        if "nbval-ignore-output" in tags and not has_assert(cell.source):
            raise ValueError(f"{where}: its output may differ, so it must assert its claim, with a margin")
        if "solution" in tags and not in_exercise:
            raise ValueError(f"{where}: a solution stands right after its exercise")
        in_exercise = "exercise" in tags or "solution" in tags
    return cells


def has_assert(source: str) -> bool:
    """Whether a code cell holds an `assert` statement."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse("\n".join(lines))))


def solve(cells: Sequence[NotebookNode]) -> Iterator[NotebookNode]:
    """The cells of the solutions: set-up, exercises, solutions; a solution's code replaces the open cell."""
    for position, cell in enumerate(cells):
        tags = cell.metadata.tags
        if "exercise" in tags and cell.cell_type == "code":
            after = []
            for later in cells[position + 1 :]:
                if "solution" not in later.metadata.tags:
                    break
                after.append(later.cell_type)
            if "code" in after:
                continue
        if {"setup", "exercise", "solution"} & set(tags):
            yield cell


def assemble(prefix: str, cells: Sequence[NotebookNode]) -> NotebookNode:
    """A notebook of these cells without outputs; a cell's id comes from its text and outlives its place."""
    made, seen = [], {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        new = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        identity = f"{prefix}-{digest}" + (f"-{seen[digest]}" if seen[digest] > 1 else "")
        metadata = {"tags": list(cell.metadata.tags)} if cell.metadata.tags else {}
        if cell.cell_type == "code" and (
            cell.source.startswith(PREDICTION) or "folded" in cell.metadata.tags
        ):
            metadata["jupyter"] = {
                "source_hidden": True
            }  # a prediction's code tells the replies before a choice
        made.append(new(cell.source, id=identity, metadata=metadata))
    return new_notebook(cells=made, metadata=METADATA)


def run(
    notebook: NotebookNode,
    threads: int = 1,
    *,
    keep_widgets: bool = False,
    variables: Mapping[str, str] | None = None,
) -> NotebookNode:
    """Run a notebook in a fresh kernel, in an empty folder, with nobody's IPython settings.

    Live views of widgets are left out: a reader without a kernel needs the picture and text beside them.
    With `keep_widgets` they stay, and what they are made of goes into the notebook's metadata.
    variables: of the kernel's environment, on top of this process's.
    Raises ValueError where a cell fails or writes to stderr: the message holds the cell.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {
            **dict.fromkeys(THREADS, str(threads)),
            "IPYTHONDIR": f"{folder}/.ipython",
            **(variables or {}),
        }
        client = NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            store_widget_state=keep_widgets,
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            client.execute(env=os.environ | own, stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            raise ValueError(str(error)) from None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            continue
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise ValueError(f"the cell\n\n{cell.source}\n\nwrote to stderr:\n\n{output.text}")
            if not keep_widgets:
                output.get("data", {}).pop(LIVE_VIEW, None)
                output.get("metadata", {}).pop(LIVE_VIEW, None)
    widgets = {"widgets": notebook.metadata.widgets} if "widgets" in notebook.metadata else {}
    notebook.metadata = nbformat.from_dict(METADATA | widgets)
    return notebook


def write(edition: Edition) -> None:
    """Store a notebook, whole or not at all."""
    nbformat.validate(edition.notebook)
    text = nbformat.writes(edition.notebook, version=4).rstrip("\n") + "\n"
    write_atomically(edition.path, text.encode())


def differences(edition: Edition) -> Iterator[str]:
    """Where a stored notebook is out of step with its source: cell by cell, type, text, id and tags."""
    if not edition.path.is_file():
        yield f"{edition.name} was not built"
        return
    stored = nbformat.read(edition.path, as_version=4)
    if len(stored.cells) != len(edition.notebook.cells):
        yield f"{edition.name} has {len(stored.cells)} cells, its source {len(edition.notebook.cells)}"
    for number, (there, here) in enumerate(zip(stored.cells, edition.notebook.cells, strict=False), 1):
        for what in ("cell_type", "source", "id"):
            if there[what] != here[what]:
                yield f"{edition.name}, cell {number}, {what}: {there[what]!r}, in the source {here[what]!r}"
        if there.metadata != here.metadata:
            yield f"{edition.name}, cell {number}, tags: {there.metadata}, in the source {here.metadata}"


def build(name: str, folder: Path = FOLDER) -> None:
    """Build, run and store a chapter and its solutions."""
    for edition in editions(name, folder):
        start = time.perf_counter()
        try:
            run(edition.notebook)
        except ValueError as error:
            raise ValueError(f"{edition.name} was not stored: {error}") from None
        write(edition)
        size = edition.path.stat().st_size / 1e6
        print(f"{edition.name}: {time.perf_counter() - start:.0f} s, {size:.2f} MB", flush=True)
    for file, (drawn_in, _) in IMAGES.items():
        if drawn_in == name:
            write_atomically(folder / "images" / file, image(file, folder))


def image(file: str, folder: Path = FOLDER) -> bytes:
    """The PNG of IMAGES, out of the notebook that drew it."""
    name, beginning = IMAGES[file]
    for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.get("text/plain", "").startswith(beginning) and "image/png" in data:
                return base64.b64decode(data["image/png"])
    raise ValueError(f"{name}.ipynb has no picture whose sentence begins with {beginning!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """`build` (default: everything) or `check`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lora_edu.notebooks", description="Build the chapters.")
    parser.add_argument("action", choices=["build", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="e.g. 01_low_rank (default: every chapter)")
    chosen = parser.parse_args(arguments)
    wrong = []
    try:
        repository()
        for name in chosen.names or names():
            if chosen.action == "build":
                build(name)
            else:
                wrong += [line for edition in editions(name) for line in differences(edition)]
    except (FileNotFoundError, ValueError) as error:
        wrong.append(str(error))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    from lora_edu.cli import make_printable

    make_printable()
    sys.exit(main())
