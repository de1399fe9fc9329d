"""The site's builder without a browser: what becomes of an output, what is refused, and that the old site stays."""

import html
import json
import re
from pathlib import Path

import nbformat
import pytest
from ipywidgets import Widget
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_edu import notebooks
from lora_edu.explore import predict
from lora_edu.notebooks import LIVE_VIEW
from lora_edu.site import book, pages

INDEX = "# %% [markdown]\n# # A book\n#\n# Of [one chapter](99_try.ipynb).\n#\n# ## Not for the site\n"
CHAPTER = """\
# %% [markdown]
# # 99 · A try
#
# The value is $x^2$, see [the contents](index.ipynb).

# %% tags=["setup"]
from lora_edu.explore import Explorer

def line(figure, slope):
    axes = figure.subplots()
    axes.plot([0, 1], [0, slope])
    return f"A line </script> & {slope} high."

# %%
Explorer(line, {"slope": [0, 1, 2]}, start={"slope": 1}, labels={"slope": "how <steep>"})

# %%
import os, socket
print("a folder of its own:", "LORA_EDU_HOME" in os.environ)
try:
    socket.getaddrinfo("nowhere.invalid", 80)
except OSError as error:
    print(error)

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# How much?

# %% tags=["exercise"]
answer = None

# %% tags=["solution"]
answer = 1
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of notebooks with one chapter, stored as `make notebooks` does, only that nothing was run."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "source").mkdir()
    (folder / "source" / "index.py").write_text(INDEX, encoding="utf-8")
    (folder / "source" / "99_try.py").write_text(CHAPTER, encoding="utf-8")
    for name in notebooks.names(folder):
        for edition in notebooks.editions(name, folder):
            notebooks.write(edition)
    return folder


@pytest.fixture(scope="module")
def site(course: Path) -> Path:
    build(course)
    return course / "site"


def build(course: Path) -> dict[str, int]:
    return book.build(course / "site", jobs=1, runs=course / "runs", folder=course)


def body(page: Path) -> str:
    """The page's own part, apart from the navigation around it."""
    return page.read_text(encoding="utf-8").split('<article role="main"')[1].split("</article>")[0]


def test_the_explorers_start_stands_on_the_page_with_its_name_its_value_and_its_sentence(site):
    page = body(site / "99_try.html")
    start = page.split('class="explorer-start"')[1].split("</noscript>")[0]
    assert "how &lt;steep&gt;" in start and '<span class="explorer-value">1</span>' in start
    assert 'alt="A line &lt;/script&gt; &amp; 1 high."' in start and "<figcaption" in start
    assert re.search(r'src="data:image/png;base64,\w', start) and pages.NO_SCRIPTS in start


def test_the_page_holds_its_explorers_widgets_and_no_others(site):
    text = (site / "99_try.html").read_text(encoding="utf-8")
    (stored,) = re.findall(f'<script type="{re.escape(pages.STATE)}">(.*?)</script>', text, re.DOTALL)
    models = json.loads(stored)
    names = [model["model_name"] for model in models.values()]
    assert names.count("SelectionSliderModel") == names.count("StackModel") == names.count("LinkModel") == 1
    (root,) = re.findall(r'data-model="(\w+)"', text)
    assert models[root]["model_name"] == "VBoxModel"
    for model in models.values():
        for value in model["state"].values():
            assert set(pages.references(value)) <= set(models)


def test_it_ran_without_a_network_in_a_readers_folder_of_its_own(site):
    text = html.unescape(re.sub(r"<[^>]*>", "", body(site / "99_try.html")))
    assert "a folder of its own: True\nthis kernel has no network" in text


def test_links_between_notebooks_and_to_the_solutions_lead_to_pages(site):
    chapter, solutions = body(site / "99_try.html"), body(site / "solutions" / "99_try.html")
    assert (
        'href="index.html"' in chapter
        and 'href="solutions/99_try.html"' in chapter.split('id="exercises"')[1]
    )
    assert 'href="../99_try.html"' in solutions
    assert 'href="99_try.html"' in body(site / "index.html")


def test_the_first_page_leaves_out_what_needs_a_running_notebook(site):
    text = re.sub(r"<[^>]*>", "", body(site / "index.html"))
    assert "Not for the site" not in text and "make lab" in text


def test_scripts_are_on_pages_that_need_them_and_mathjax_where_there_is_a_formula(site):
    chapter, index = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("99_try", "index"))
    for script in book.SCRIPTS:
        assert f"_static/{script}" in chapter and f"_static/{script}" not in index
        assert (site / "_static" / script).is_file()
    assert "mathjax/tex-chtml.js" in chapter and (site / "_static" / "mathjax" / "tex-chtml.js").is_file()


def test_what_has_not_changed_does_not_run_again(site, course, monkeypatch):
    monkeypatch.setattr(book, "ThreadPoolExecutor", None)
    sizes = build(course)
    assert sizes["99_try"] == (site / "99_try.html").stat().st_size


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("import os, socket", "1 / 0; import os, socket", "99_try: .*ZeroDivisionError"),
        ("index.ipynb", "missing.ipynb", "Sphinx is not content:.*missing.ipynb"),
        ("answer = 1", "answer = 2", "solutions/99_try.*run `make notebooks` first"),
    ],
    ids=["a cell that fails", "a link to nowhere", "out of step"],
)
def test_what_is_wrong_is_said_and_the_old_site_stays(site, course, old, new, words):
    source = course / "source" / "99_try.py"
    before = (site / "99_try.html").read_bytes()
    source.write_text(CHAPTER.replace(old, new), encoding="utf-8")
    try:
        with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
            build(course)
    finally:
        source.write_text(CHAPTER, encoding="utf-8")
    assert (site / "99_try.html").read_bytes() == before
    assert not list(course.glob(".site-*"))


def test_a_page_that_is_too_heavy_is_refused(site, course, monkeypatch):
    monkeypatch.setattr(book, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"html has \d+\.\d MB; a page may have"):
        build(course)


def one_output(data: dict, metadata: dict | None = None) -> NotebookNode:
    cell = new_code_cell("shown()", outputs=[new_output("display_data", data, metadata=metadata or {})])
    return new_notebook(cells=[new_markdown_cell("# A chapter"), cell])


def test_a_picture_without_a_sentence_is_refused():
    with pytest.raises(ValueError, match="'shown\\(\\)' shows a picture without a sentence"):
        pages.make_page(one_output({"image/png": "iVBORw0KGgo="}), "99_try")


def test_a_pictures_alt_text_is_escaped():
    about = {"image/png": {"alt": 'x < "y"', "width": 72, "height": 28}}
    page = pages.make_page(one_output({"image/png": "iVBORw0KGgo=\n"}, about), "99_try")
    shown = page.source.cells[1].outputs[0].data["text/html"]
    assert 'alt="x &lt; &quot;y&quot;" width="72" height="28"' in shown and not page.models


@pytest.mark.parametrize(
    ("model", "line"), [("IntTextModel", True), ("FloatProgressModel", False)], ids=["asks", "progress bar"]
)
def test_widgets_without_a_picture(model, line):
    """A calculator says that it needs the kernel; a progress bar that has ended says what it said."""
    notebook = one_output({LIVE_VIEW: {"model_id": "b"}, "text/plain": "r < 8"})
    states = {
        "b": {"model_name": "HBoxModel", "state": {"children": ["IPY_MODEL_n"]}},
        "n": {"model_name": model, "state": {}},
    }
    notebook.metadata = nbformat.from_dict({"widgets": {pages.STATE: {"state": states}}})
    page = pages.make_page(notebook, "99_try")
    data = page.source.cells[1].outputs[0].data
    assert not page.models and LIVE_VIEW not in data
    if line:
        assert "make lab" in data["text/html"] and "r &lt; 8" in data["text/html"]
    else:
        assert data == {"text/plain": "r < 8"}


def test_a_prediction_shows_its_options_and_keeps_its_replies_for_the_script():
    shown = predict("Why <so>?", {"a & b": "Because.", "c": "Look again."})
    state = Widget.get_manager_state()["state"]
    notebook = one_output(
        {LIVE_VIEW: {"model_id": shown.model_id}, "text/plain": "Predict.", "text/html": "<p>"}
    )
    notebook.metadata = nbformat.from_dict({"widgets": {pages.STATE: {"state": state}}})
    page = pages.make_page(notebook, "99_try")
    text = page.source.cells[1].outputs[0].data["text/html"]
    assert "<b>Why &lt;so&gt;?</b>" in text and "<li>a &amp; b</li><li>c</li>" in text
    assert "Because" not in text and "Look again" not in text and f'data-model="{shown.model_id}"' in text
    assert page.models[shown.buttons.model_id]["state"]["index"] is None, (
        "none is chosen; its default is another"
    )
    assert "Because" in json.dumps(page.models)
    shown.close()


def test_the_first_page_has_what_stands_above_its_first_heading():
    cells = [new_markdown_cell("# A\n\nOne."), new_code_cell("2"), new_markdown_cell("Three.\n\n## Four")]
    assert [cell.source for cell in book.until_heading([*cells, new_code_cell("5")])] == [
        "# A\n\nOne.",
        "2",
        "Three.\n",
    ]
    assert [
        cell.source for cell in book.until_heading([new_code_cell("1"), new_markdown_cell("## Two")])
    ] == ["1"]


def test_the_script_of_the_widgets_cannot_end_early():
    text = pages.script({"a": {"model_name": "HTMLModel", "state": {"value": "</script><!--"}}})
    assert text.count("<") == 2 and json.loads(text.split(">", 1)[1].rsplit("<", 1)[0])
