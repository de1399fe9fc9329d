"""Strict nbval on what JupyterLab has run: a chapter's kernel works once, for JupyterLab, nbval and the site.

The browser tests keep a notebook that they ran (`keep`); nbval then compares its outputs instead of running it
again. Where no such run is there (no Chromium, a chapter that failed, one file alone), nbval runs the notebook.
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbval.plugin import IPyNbFile

from lora_edu.notebooks import FOLDER
from lora_edu.paths import write_atomically

MESSAGE = "replayed"  # the id of every message of a replay: its cells come one after the other


def folder() -> Path:
    """What the processes of one test run share."""
    return Path(os.environ["LORA_EDU_TESTS"])


def tell(who: str) -> None:
    """Notes that a notebook was run, for the summary: `runs` counts."""
    with (folder() / "runs.txt").open("a", encoding="utf-8") as file:
        file.write(f"{who}\n")


def runs() -> Counter[str]:
    """Who ran notebooks → how many."""
    path = folder() / "runs.txt"
    return Counter(path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else [])


def group(nodeid: str) -> str:
    """What a test stays with one worker for: a chapter, a page of the site, or else its file.

    A chapter is its test in JupyterLab and all cells of its notebook and of its solutions. Said from the test's name,
    which is all that the process knows that shares tests out.
    """
    file, _, test = nodeid.partition("::")
    path = Path(file)
    if path.suffix == ".ipynb":
        return path.stem
    parameter = test.partition("[")[2].removesuffix("]")
    if path.parent.name != "browser" or not parameter:
        return file
    stem = next((each.stem for each in (FOLDER / "source").glob("*.py") if each.stem in parameter), parameter)
    return f"page {stem}" if path.stem == "test_site" else stem


def place(name: str) -> Path:
    return folder() / "ran" / f"{name}.ipynb"


def keep(name: str, saved: Path) -> None:
    """Keeps a notebook of ours as JupyterLab ran and saved it. name: as in notebooks/, e.g. solutions/01_low_rank."""
    write_atomically(place(name), saved.read_bytes())


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def earlier(path: Path, notebook: NotebookNode) -> NotebookNode | None:
    """The run of a stored notebook that was kept; None where there is none of exactly these cells."""
    if not path.is_relative_to(FOLDER):
        return None
    kept = place(path.relative_to(FOLDER).with_suffix("").as_posix())
    if not kept.is_file():
        return None
    ran = nbformat.read(kept, as_version=4)
    there, here = ([(cell.id, cell.source) for cell in code(one)] for one in (ran, notebook))
    return ran if there == here else None


class Replay:
    """In the place of nbval's kernel: answers a cell with what it showed when it ran."""

    def __init__(self, ran: NotebookNode):
        self.cells: dict[str, deque[NotebookNode]] = defaultdict(deque)
        for cell in code(ran):
            self.cells[cell.source].append(cell)
        self.messages: Iterator[dict] = iter(())

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        pass

    def execute_cell_input(self, source: str, allow_stdin: bool | None = None) -> str:
        self.messages = messages(self.cells[source].popleft())
        return MESSAGE

    def await_reply(self, message: str, timeout: float | None = None) -> None:
        pass

    await_idle = await_reply

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        return next(self.messages)


def messages(cell: NotebookNode) -> Iterator[dict]:
    """What a kernel would send for these outputs."""
    for output in cell.outputs:
        yield {"msg_type": output.output_type, "parent_header": {"msg_id": MESSAGE}, "content": output}
    idle = {"execution_state": "idle"}
    yield {"msg_type": "status", "parent_header": {"msg_id": MESSAGE}, "content": idle}


class Notebook(IPyNbFile):
    """A notebook whose cells nbval compares, with JupyterLab's run of it where there is one."""

    def setup(self) -> None:
        ran = earlier(self.path, self.nb)
        if self.path.is_relative_to(FOLDER):
            tell("nbval, by running it" if ran is None else "nbval, from JupyterLab's run")
        if ran is None:
            super().setup()
            return
        self.kernel = Replay(ran)
        self.setup_sanitize_files()
