"""What a reader does with sliders, in JupyterLab as `lora-edu lab` starts it, in a window of 1000 pixels."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import replay
from jupyterlab_driver import FAILED, NotebookPage, Server
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Browser

from lora_edu.notebooks import FOLDER
from lora_edu.paths import REPOSITORY

CHAPTERS = sorted(FOLDER.glob("*.ipynb"))  # the index, too
SOLUTIONS = [  # most have no explorer, and then there is nothing to see here
    path
    for path in sorted((FOLDER / "solutions").glob("[0-9][0-9]_*.ipynb"))
    if re.search(r"\b(explore\.|Explorer\()", path.read_text(encoding="utf-8"))
]
RUN_SECONDS = 1800
SLIDER = ".noUi-handle"
BUTTON = ".lora-edu-prediction button"
MOST_BYTES = 800_000  # of one explorer: what a photograph may take, lines take less

pytestmark = [pytest.mark.browser, pytest.mark.slow]

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
QUESTION = """from lora_edu import explore
explore.predict("How?", {"not at all": "Look again.", "so <so>": "Because x ends at 1."})"""
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
    """All that a reader does with a notebook; returns its cells with pictures at first and those with explorers.

    A notebook of ours is kept as it ran: nbval and the site take it from there.
    """
    notebook = opened(name)
    before = notebook.pictures()
    for index in before:
        notebook.cell(index)  # waits until its picture is seen
    run_and_save(notebook, server, name)
    if (FOLDER / name).is_file():
        replay.tell("JupyterLab, by running it")
        replay.keep(name.removesuffix(".ipynb"), server.folder / name)
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
    questions = notebook.predictions()
    for index in questions:
        answered = notebook.choose_each(notebook.cell(index, BUTTON))
        assert len(answered) > 1, f"cell {index}: {answered}"
    notebook.save()
    notebook.close()
    server.stop_kernels()

    again = opened(name)
    assert again.explorers() == explorers
    for index in explorers:
        cell = again.cell(index, SLIDER)
        assert again.walk(cell, walked[index]) == walked[index], (
            f"cell {index}, reopened, shows other pictures"
        )
        assert not again.broken_links(cell), f"cell {index}, reopened, is marked as broken"
    assert again.predictions() == questions
    return before, explorers


def run_and_save(notebook: NotebookPage, server: Server, name: str) -> None:
    """Runs all and saves it; what the file then holds is of this run, not what was stored before."""
    notebook.run_all(RUN_SECONDS)
    notebook.save()
    cells = replay.code(nbformat.read(server.folder / name, as_version=4))
    assert notebook.ran() == [cell.source.rstrip("\n") for cell in cells], "not what the kernel has run"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def of_chapters(paths: list[Path]) -> list:
    """A test for each notebook; nbval's tests of a chapter follow it in the same worker."""
    return [pytest.param(path, id=path.stem) for path in paths]


@pytest.mark.parametrize("chapter", of_chapters(CHAPTERS))
def test_chapter(chapter, opened, server):
    before, explorers = read_turn_and_reopen(opened, server, chapter.name)
    assert explorers, "each chapter has an explorer"
    assert set(explorers) <= set(before), "before the first run, the picture for the starting value is there"


@pytest.mark.parametrize("solutions", of_chapters(SOLUTIONS))
def test_solutions(solutions, opened, server):
    read_turn_and_reopen(opened, server, f"solutions/{solutions.name}")


def test_awkward_words_and_two_sliders(opened, server):
    write_scratch(server, "scratch.ipynb", ONE, TWO)
    _, explorers = read_turn_and_reopen(opened, server, "scratch.ipynb")
    assert explorers == [2, 3]


def test_a_question_answers_mouse_and_keyboard_with_and_without_a_kernel(opened, server):
    write_scratch(server, "question.ipynb", QUESTION)
    path = server.folder / "question.ipynb"
    written = nbformat.read(path, as_version=4)
    written.cells[2].metadata.jupyter = {"source_hidden": True}  # as the builder has it
    nbformat.write(written, path)
    notebook = opened("question.ipynb")
    assert notebook.predictions() == [2]
    run_and_save(notebook, server, "question.ipynb")
    place = notebook.cell(2, BUTTON)
    assert not notebook.replies(place) and "Because" not in place.inner_text(), "nor is its code to be seen"
    place.query_selector("button").focus()
    notebook.page.keyboard.press("Tab")
    notebook.page.keyboard.press("Enter")
    notebook.wait_for_reply(place, "so <so>")
    assert notebook.replies(place) == ["so <so> · Because x ends at 1."]
    notebook.save()
    notebook.close()
    server.stop_kernels()

    again = opened("question.ipynb")
    place = again.cell(2, BUTTON)
    again.wait_for_reply(place, "so <so>")  # the reader's own choice was kept
    for option, button in zip(["not at all", "so <so>"], place.query_selector_all("button"), strict=True):
        button.click()
        again.wait_for_reply(place, option)
    assert not again.broken_links(place)


def test_formulas_are_typeset(opened, server):
    text = "# A formula\n\nOf rank $r = 8$, with code `$HOME`:\n\n$$ \\Delta W = s \\, B A $$\n\n"
    text += "| what | how |\n| --- | --- |\n| norm | $\\lVert \\Delta W \\rVert_F$ |\n"
    notebook = new_notebook(cells=[new_markdown_cell(text)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, server.folder / "formula.ipynb")
    page = opened("formula.ipynb")
    page.page.wait_for_function("() => document.querySelectorAll('.jp-Notebook mjx-container').length === 3")
    for formula in page.page.query_selector_all(".jp-Notebook mjx-container"):
        assert formula.bounding_box()["width"] > 10 and formula.query_selector("mjx-c, mjx-utext, svg")
    assert not page.raw_mathematics()


def test_what_runs_takes_the_place_of_what_was_stored(opened, server):
    """Else nbval, which compares the saved notebook with the stored one, would find nothing."""
    write_scratch(server, "stale.ipynb", "print('now')", "pass", "'a value'")
    path = server.folder / "stale.ipynb"
    stale = nbformat.read(path, as_version=4)
    for count, cell in enumerate(replay.code(stale), 1):
        cell.execution_count = count
        cell.outputs = [new_output("stream", name="stdout", text="then\n")]
    nbformat.write(stale, path)
    run_and_save(opened("stale.ipynb"), server, "stale.ipynb")
    outputs = [cell.outputs for cell in replay.code(nbformat.read(path, as_version=4))]
    assert [len(shown) for shown in outputs] == [0, 1, 0, 1]
    assert outputs[1][0].text == "now\n" and outputs[3][0].data == {"text/plain": "'a value'"}


def test_its_kernel_is_the_one_that_checks_notebooks(opened, server):
    asks = "import os, socket, torch\nprint(torch.get_num_threads())\n"
    asks += "try:\n    socket.getaddrinfo('example.org', 443)\nexcept OSError as error:\n    print(error)"
    write_scratch(server, "guarded.ipynb", asks)
    run_and_save(opened("guarded.ipynb"), server, "guarded.ipynb")
    [_, cell] = replay.code(nbformat.read(server.folder / "guarded.ipynb", as_version=4))
    assert cell.outputs[0].text == "2\nthis kernel has no network; asked for example.org\n"


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
