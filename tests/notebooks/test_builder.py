"""The builder: which cells go where, what it stores, and what it refuses."""

import json
from pathlib import Path

import nbformat
import pytest

from lora_edu import notebooks

CHAPTER = """\
# %% [markdown]
# # 99 · A try
#
# With two editions.

# %% tags=["setup"]
import os
import ipywidgets
print(os.environ["OMP_NUM_THREADS"])

# %%
class Both(ipywidgets.IntSlider):
    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": "A sentence."}
Both()

# %% tags=["nbval-ignore-output"]
assert 1 < 2

# %%
assert 1 < 2

# %%
assert 1 < 2

# %% [markdown] tags=["exercise"]
# ### Exercise 1
# How much?

# %% tags=["exercise"]
answer = None
print("not attempted yet")

# %% [markdown] tags=["solution"]
# Because.

# %% tags=["solution"]
answer = 3
print("Exercise 1: right.")

# %% [markdown]
# ## Where to read on
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_source(tmp_path, CHAPTER)
    return tmp_path


def write_source(folder: Path, text: str) -> None:
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source" / "99_try.py").write_text(text, encoding="utf-8")


def out_of_step(folder: Path) -> list[str]:
    return [
        line for edition in notebooks.editions("99_try", folder) for line in notebooks.differences(edition)
    ]


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source.splitlines()[0] for cell in notebook.cells]


def test_a_chapter_has_no_solutions_and_the_solutions_no_open_cell(folder):
    chapter, solutions = notebooks.editions("99_try", folder)
    assert sources(chapter.notebook)[-3:] == ["### Exercise 1", "answer = None", "## Where to read on"]
    expected = ["# Solutions: 99 · A try", "import os", "### Exercise 1", "Because.", "answer = 3"]
    assert sources(solutions.notebook) == expected
    assert solutions.path == folder / "solutions" / "99_try.ipynb"


def test_ids_are_unique_and_outlive_a_change_elsewhere(folder):
    before = notebooks.editions("99_try", folder)[0].notebook
    ids = [cell.id for cell in before.cells]
    assert len(set(ids)) == len(ids)
    write_source(folder, CHAPTER.replace("With two editions.", "With two of them."))
    after = [cell.id for cell in notebooks.editions("99_try", folder)[0].notebook.cells]
    assert after[0] != ids[0] and after[1:] == ids[1:]


def test_built_twice_it_is_the_same_file_run_with_one_thread_and_without_live_views(folder):
    notebooks.build("99_try", folder)
    first = (folder / "99_try.ipynb").read_bytes()
    assert not out_of_step(folder)
    notebook = nbformat.reads(first, as_version=4)
    assert notebook.cells[1].outputs[0].text == "1\n"
    assert notebook.cells[2].outputs[0].data == {"text/plain": "A sentence."}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "version" not in json.dumps(notebook.metadata)
    assert first.endswith(b"}\n")
    notebooks.build("99_try", folder)
    assert (folder / "99_try.ipynb").read_bytes() == first


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("# How much?", "# How many?", "source"),
        ('# %% tags=["nbval-ignore-output"]', "# %%", "tags"),
        ("# %% [markdown]\n# ## Where to read on\n", "", "cells"),
    ],
)
def test_a_changed_source_is_found_out_of_step(folder, old, new, what):
    for edition in notebooks.editions("99_try", folder):
        notebooks.write(edition)
    write_source(folder, CHAPTER.replace(old, new))
    found = out_of_step(folder)
    assert found and what in found[0]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; print('careful', file=sys.stderr)", "wrote to stderr"),
        ("import warnings; warnings.warn('deprecated')", "wrote to stderr"),
    ],
)
def test_a_cell_that_fails_or_warns_is_named_and_nothing_is_stored(folder, cell, message):
    write_source(folder, f"# %%\n{cell}\n")
    with pytest.raises(ValueError, match=message) as error:
        notebooks.build("99_try", folder)
    assert cell in str(error.value) and "99_try was not stored" in str(error.value)
    assert not (folder / "99_try.ipynb").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('# %% tags=["nbval-skip"]\n1\n', "unknown tag"),
        ('# %% tags=["nbval-ignore-output"]\nprint(1)\n', "must assert"),
        ('# %% tags=["solution"]\n1\n', "right after its exercise"),
        ("# %%\n" + "x = 1\n" * 26, "25 lines"),
    ],
)
def test_a_source_that_breaks_a_rule_is_refused(folder, source, message):
    write_source(folder, source)
    with pytest.raises(ValueError, match=message):
        notebooks.editions("99_try", folder)


def test_an_unknown_chapter_is_answered_with_those_there_are(folder):
    with pytest.raises(FileNotFoundError, match="no chapter '98_nothing': there are 99_try"):
        notebooks.editions("98_nothing", folder)


def test_the_replies_of_a_prediction_are_not_read_in_its_code(folder):
    question = '# %%\nexplore.predict("Why?", {"so": "Because.", "not": "Look."})\n\n'
    question += "# %% [markdown]\n# explore.predict(\n"
    write_source(folder, CHAPTER.replace("# %%\nassert 1 < 2\n", question, 1))
    chapter, _ = notebooks.editions("99_try", folder)
    hidden = [cell.source for cell in chapter.notebook.cells if "jupyter" in cell.metadata]
    assert len(hidden) == 1 and hidden[0].startswith('explore.predict("Why?"')


def test_a_cell_that_is_tagged_folded_is(folder):
    write_source(folder, CHAPTER.replace('# %% tags=["setup"]', '# %% tags=["setup", "folded"]'))
    for edition in notebooks.editions("99_try", folder):
        [cell] = [cell for cell in edition.notebook.cells if "jupyter" in cell.metadata]
        assert cell.metadata.jupyter == {"source_hidden": True} and cell.source.startswith("import os")
