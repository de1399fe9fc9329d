"""Facts of every stored notebook, besides what strict nbval finds by running it."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from lora_edu import notebooks
from lora_edu.paths import REPOSITORY

BROKEN: dict[str, str] = {}
EDITIONS: list[notebooks.Edition] = []
for name in notebooks.names():
    try:
        EDITIONS += notebooks.editions(name)
    except ValueError as error:
        BROKEN[name] = str(error)
NBVAL_WORDS = re.compile(r"#\s*(NBVAL_|PYTEST_VALIDATE_)", re.IGNORECASE)

each = pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)


def stored(edition: notebooks.Edition) -> nbformat.NotebookNode:
    assert edition.path.is_file(), f"{edition.name} was not built: `make notebooks`"
    return nbformat.read(edition.path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(output: nbformat.NotebookNode) -> list[str]:
    return [output.get("text", ""), *(str(value) for value in output.get("data", {}).values())]


def test_every_source_keeps_the_rules():
    assert not BROKEN


@each
def test_in_step_with_its_source(edition):
    assert not list(notebooks.differences(edition)), "`make notebooks` builds it anew"


@each
def test_is_a_valid_notebook_with_ids_of_its_own(edition):
    notebook = stored(edition)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each
def test_ran_from_top_to_bottom_without_errors(edition):
    cells = code(stored(edition))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert not [cell.source for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


@each
def test_outputs_are_stored(edition):
    """A chapter without any output would pass nbval: every cell that prints or ends in a value has some."""
    cells = code(stored(edition))
    assert not cells or any(cell.outputs for cell in cells)
    assert not [cell.source for cell in cells if "print(" in cell.source and not cell.outputs]


@each
def test_nothing_is_hidden_from_nbval(edition):
    for cell in code(stored(edition)):
        tags = set(cell.metadata.get("tags", []))
        assert tags <= notebooks.TAGS, cell.source
        assert not NBVAL_WORDS.search(cell.source), cell.source
        if "nbval-ignore-output" in tags:
            assert notebooks.has_assert(cell.source), (
                f"its output may differ and it asserts nothing: {cell.source}"
            )


@each
def test_no_live_view_and_no_folder_of_the_builder_is_stored(edition):
    text = edition.path.read_text(encoding="utf-8")
    assert notebooks.LIVE_VIEW not in text
    assert "widget-state" not in text
    for output in (output for cell in code(stored(edition)) for output in cell.outputs):
        for place in (str(REPOSITORY), str(Path.home()), "ipykernel_"):
            assert not [found for found in texts(output) if place != "/" and place in found]


@each
def test_a_picture_has_a_sentence(edition):
    """What stands in for a picture (text/plain) says what is to be seen, or names the object it is."""
    for cell in code(stored(edition)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                sentence = output.data.get("text/plain", "")
                assert sentence.strip() and "object at 0x" not in sentence, cell.source
                assert not re.match(r"<Figure size", sentence), f"a figure without alt text: {cell.source}"


def chapters() -> list[notebooks.Edition]:
    return [edition for edition in EDITIONS if re.match(r"\d\d_", edition.name)]


@pytest.mark.parametrize("edition", chapters(), ids=lambda edition: edition.name)
def test_open_exercises_say_that_they_are_open(edition):
    cells = [cell for cell in code(stored(edition)) if "exercise" in cell.metadata.get("tags", [])]
    assert cells, "every chapter ends with exercises"
    for cell in cells:
        printed = "".join(text for output in cell.outputs for text in texts(output))
        assert "not attempted yet" in printed, cell.source


@pytest.mark.parametrize("edition", chapters(), ids=lambda edition: edition.name)
def test_solutions_are_right(edition):
    notebook = stored(edition)
    solved = nbformat.read(notebooks.FOLDER / "solutions" / f"{edition.name}.ipynb", as_version=4)
    printed = "\n".join(text for cell in code(solved) for output in cell.outputs for text in texts(output))
    exercises = [cell for cell in code(notebook) if "exercise" in cell.metadata.get("tags", [])]
    assert printed.count(": right") >= len(exercises)
    assert "not attempted yet" not in printed


def test_no_notebook_without_a_source():
    built = {path for path in notebooks.FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert {path.stem for path in built} <= set(notebooks.names())


@pytest.mark.parametrize("file", sorted(notebooks.IMAGES))
def test_a_picture_shown_elsewhere_is_the_notebooks_own(file):
    assert (notebooks.FOLDER / "images" / file).read_bytes() == notebooks.image(file)
    assert f"notebooks/images/{file}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def outside_code(text: str) -> str:
    return re.sub(r"```.*?```|(`+).+?\1", "code", text, flags=re.DOTALL)


def formulas(text: str) -> list[str]:
    """The formulas of a markdown text, as `$…$` or `$$…$$`, which JupyterLab, GitHub and the site all find."""
    return re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", outside_code(text), flags=re.DOTALL)


def mistakes(text: str) -> Iterator[str]:
    """What in a markdown text one of the three would not read as a formula, or read as something else."""
    rest = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "", outside_code(text), flags=re.DOTALL)
    if "$" in rest:
        yield f"a dollar that belongs to no formula: {rest[max(rest.index('$') - 30, 0) :][:60]!r}"
    if bare := re.search(r".{0,30}\\[a-zA-Z]{2,}.{0,30}", rest):
        yield f"LaTeX outside of a formula: {bare[0]!r}"
    for line in outside_code(text).splitlines():
        if line.startswith("#") and "$" in line:
            yield f"a formula in a heading: {line!r}"
        if line.startswith(">") and "$$" in line:
            yield f"a display formula in a quotation, which GitHub breaks: {line!r}"
        if line.startswith("|") and any("|" in formula for formula in formulas(line)):
            yield f"a formula that ends a column of a table: {line!r}"
        for before, inside, after in re.findall(r"(.?)(?<!\$)\$(?!\$)([^$]+)\$(?!\$)(.?)", line):
            if inside != inside.strip():
                yield f"a space just inside the dollars: ${inside}$"
            if re.match(r"\w", before) or re.match(r"\w", after):
                yield f"a word touches the dollars: {before}${inside}${after}"
    for formula in formulas(text):
        if re.search(r"\\[{}|]", formula):
            yield f"markdown takes this backslash for its own: {formula!r}"
        if "\\\\" in formula and r"\begin" not in formula:
            yield f"a line break outside of an array: {formula!r}"


@each
def test_mathematics_is_written_so_that_all_three_read_it(edition):
    cells = [cell for cell in edition.notebook.cells if cell.cell_type == "markdown"]
    assert not [mistake for cell in cells for mistake in mistakes(cell.source)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("costs 5 $ and", "belongs to no formula"),
        (r"the norm \lVert x \rVert", "outside of a formula"),
        ("## Rank $r$", "in a heading"),
        ("> $$ x $$", "GitHub breaks"),
        ("| $|x|$ | 3 |", "ends a column"),
        ("of $ r$ rows", "space just inside"),
        ("of $r$s", "a word touches"),
        (r"the set $\{1\}$", "for its own"),
        (r"$a \\ b$", "outside of an array"),
    ],
)
def test_mathematics_that_one_of_them_misreads_is_found(text, words):
    assert any(words in mistake for mistake in mistakes(text)), list(mistakes(text))


def test_mathematics_as_it_should_be_is_left_alone():
    text = "Of rank $r$, with `$HOME` (see $W_o$): $s = \\alpha / r$.\n\n"
    text += "$$ \\Delta W = s \\, B A $$\n\n| $\\lvert x \\rvert$ | 3 |"
    assert not list(mistakes(text)) and len(formulas(text)) == 5
