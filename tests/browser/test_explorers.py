"""What a reader does with sliders, in JupyterLab as `lora-edu lab` starts it, in a window of 1000 pixels."""

import json
import re
from collections.abc import Callable, Iterator

import nbformat
import pytest
from jupyterlab_driver import FAILED, NotebookPage, Server
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import Browser

from lora_edu.paths import REPOSITORY

CHAPTERS = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = [  # most have no explorer, and then there is nothing to see here
    path
    for path in sorted((REPOSITORY / "notebooks" / "solutions").glob("[0-9][0-9]_*.ipynb"))
    if re.search(r"\b(explore\.|Explorer\()", path.read_text(encoding="utf-8"))
]
RUN_SECONDS = 1800
SLIDER = ".noUi-handle"
MOST_BYTES = 800_000  # of one explorer: what a photograph may take, lines take less

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

# Text that HTML would misread, long names and values, neighbours that share a picture; two sliders.
SCRATCH = '''
from lora_edu.explore import Explorer

def line(figure, slope):
    axes = figure.subplots()
    axes.plot([0, 1], [0, max(slope, 0)])
    axes.set(xlabel="x", ylabel="y", title="A line", ylim=(0, 3))
    return f"""A line called "{max(slope, 0)} & <b>", it's 'straight'."""

def cloud(figure, seed, count):
    import numpy as np
    axes = figure.subplots()
    axes.plot(*np.random.default_rng(seed).normal(size=(2, count)), "o")
    axes.set(title=f"{count} points")
    return f"{count} points, drawn with the seed {seed}."
'''
ONE = """Explorer(line, {"slope": [-1, 0, 1, 2]}, start={"slope": 1},
         labels={"slope": "a name that takes room"}, formats={"slope": "{} metres a metre to the right"})"""
TWO = 'Explorer(cloud, {"seed": [0, 1, 2], "count": [5, 50]}, start={"seed": 1, "count": 50})'


@pytest.fixture
def opened(
    browser: Browser, server: Server, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], NotebookPage]]:
    """Opens notebooks; afterwards closes them and stops their kernels. Nothing may be wrong on any page."""
    pages: list[NotebookPage] = []

    def open_one(name: str) -> NotebookPage:
        pages.append(NotebookPage(browser))
        pages[-1].visit(server, name)
        return pages[-1]

    yield open_one
    faults = [fault for notebook in pages for fault in notebook.faults]
    if request.node.stash.get(FAILED, False) or faults:
        picture = REPOSITORY / "build" / "browser" / f"{request.node.name}.png"
        pages[-1].page.screenshot(path=picture)
        print(f"The page as it was at the end: {picture}")
    for notebook in pages:
        notebook.close()
    server.stop_kernels()
    assert not faults, f"{faults}; the server says:\n{server.log.read_text(encoding='utf-8')[-2000:]}"


def write_scratch(server: Server, name: str, *cells: str) -> None:
    text = new_markdown_cell("# Scratch\n" + "A line of text, so that there is something to scroll.\n\n" * 40)
    notebook = new_notebook(cells=[text, *map(new_code_cell, [SCRATCH, *cells])])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, server.folder / name)


def state_bytes(server: Server, name: str) -> int:
    """How much of a saved notebook is its widgets."""
    saved = json.loads((server.folder / name).read_text(encoding="utf-8"))
    return len(json.dumps(saved["metadata"]["widgets"]))


def read_turn_and_reopen(opened: Callable[[str], NotebookPage], server: Server, name: str) -> tuple:
    """All that a reader does with a notebook; returns its cells with pictures at first and those with explorers."""
    notebook = opened(name)
    before = notebook.pictures()
    for index in before:
        notebook.cell(index)  # waits until its picture is seen
    notebook.run_all(RUN_SECONDS)
    explorers = notebook.explorers()
    drawn = notebook.drawn()
    walked = {}
    for index in explorers:
        cell = notebook.cell(index, SLIDER)
        for drawing in drawn[index]:
            assert not drawing["complaints"], f"cell {index}, in its pictures: {drawing['complaints']}"
            assert drawing["bytes"] <= MOST_BYTES, f"cell {index}, all pictures: {drawing['bytes']} bytes"
        assert not notebook.cut_off(cell), f"cell {index}, cut off in a window 1000 pixels wide"
        walked[index] = notebook.walk(cell)
    notebook.save()
    notebook.close()
    server.stop_kernels()

    again = opened(name)
    assert again.explorers() == explorers
    for index in explorers:
        cell = again.cell(index, SLIDER)
        assert again.walk(cell) == walked[index], f"cell {index}, reopened, shows other pictures"
        assert not again.broken_links(cell), f"cell {index}, reopened, is marked as broken"
    return before, explorers


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(chapter, opened, server):
    before, explorers = read_turn_and_reopen(opened, server, chapter.name)
    assert explorers, "each chapter has an explorer"
    assert set(explorers) <= set(before), "before the first run, the picture for the starting value is there"


@pytest.mark.parametrize("solutions", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions(solutions, opened, server):
    read_turn_and_reopen(opened, server, f"solutions/{solutions.name}")


def test_awkward_words_and_two_sliders(opened, server):
    write_scratch(server, "scratch.ipynb", ONE, TWO)
    _, explorers = read_turn_and_reopen(opened, server, "scratch.ipynb")
    assert explorers == [2, 3]


def test_running_again_does_not_make_the_file_grow(opened, server):
    write_scratch(server, "again.ipynb", ONE, TWO)
    notebook = opened("again.ipynb")
    sizes = []
    for _ in range(3):
        notebook.run_all(RUN_SECONDS)
        notebook.save()
        sizes.append(state_bytes(server, "again.ipynb"))
    assert max(sizes) <= 1.01 * min(sizes), sizes


def test_two_explorers_of_one_cell_both_live(opened, server):
    write_scratch(server, "both.ipynb", f"display({ONE})\ndisplay({TWO})")
    notebook = opened("both.ipynb")
    notebook.run_all(RUN_SECONDS)
    notebook.run_all(RUN_SECONDS)
    assert len(notebook.sliders(notebook.cell(2, SLIDER))) == 3
