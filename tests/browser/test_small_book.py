"""A book of one small chapter, run by the site's builder itself: a formula, a slider, a question that answers.

The pages of the real chapters are in test_site.py, from JupyterLab's runs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import site_driver
from playwright.sync_api import Browser, Page

from lora_edu import notebooks
from lora_edu.site import book

INDEX = "# %% [markdown]\n# # A book\n#\n# Of [one chapter](99_try.ipynb).\n"
CHAPTER = r"""
# %% [markdown]
# # 99 · A try
#
# An update $\Delta W = s \, B A$ of rank $r = 8$, as code `$HOME`. Its norm:
#
# $$ \lVert \Delta W \rVert_F^2 = \sum_{i=1}^{r} \sigma_i^2 $$
#
# | what | how much |
# | --- | --- |
# | scaling | $s = \alpha / r$ |

# %% tags=["setup"]
from lora_edu import explore
from lora_edu.explore import Explorer

def line(figure, slope):
    axes = figure.subplots()
    axes.plot([0, 1], [0, slope])
    return f"A line {slope} high."

# %%
explore.predict(
    "How high will it be & why?",
    {"not at all": "Look at the slope.", "as high as <that>": "Because x ends at 1.", "twice": "Half right."},
)

# %%
Explorer(line, {"slope": [0, 1, 2]}, start={"slope": 1})

# %% [markdown] tags=["exercise"]
# ## Exercises

# %% tags=["exercise"]
answer = None

# %% tags=["solution"]
answer = 1
"""
OPTIONS = ["not at all", "as high as <that>", "twice"]

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the book on the disk."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "source").mkdir()
    for name, text in (("index", INDEX), ("99_try", CHAPTER)):
        (folder / "source" / f"{name}.py").write_text(text, encoding="utf-8")
        for edition in notebooks.editions(name, folder):
            notebooks.write(edition)
    book.build(folder / "site", runs=folder / "runs", folder=folder)
    return f"{(folder / 'site').as_uri()}/"


@pytest.fixture
def opened(browser: Browser, root: str) -> Iterator[site_driver.SitePage]:
    page = site_driver.open_page(browser, root, "99_try")
    yield page
    page.close()
    assert not page.faults


def colour(page: Page, selector: str) -> str:
    return page.eval_on_selector(selector, "part => getComputedStyle(part).color")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_formulas_are_typeset_without_a_network(browser: Browser, root: str, scheme: str, tmp_path: Path):
    page = site_driver.open_page(browser, root, "99_try", color_scheme=scheme)
    formulas = page.page.query_selector_all("article mjx-container")
    assert len(formulas) == 4 and not page.raw_mathematics()
    for formula in formulas:
        box = formula.bounding_box()
        assert box["width"] > 10 and box["height"] > 8 and formula.query_selector("mjx-c, mjx-utext")
    assert formulas[2].get_attribute("display") == "true", "the one on a line of its own"
    assert page.page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px MJXTEX-I'))")
    text = colour(page.page, "article p")
    assert colour(page.page, "article mjx-math") == colour(page.page, ".prediction b") == text
    page.close()
    assert not page.faults


def test_a_formula_that_is_left_raw_is_found(opened):
    opened.page.evaluate(
        "document.querySelector('article p').append('costs $x$', Object.assign(document.createElement('code'), "
        "{textContent: '$HOME'}))"
    )
    [found] = opened.raw_mathematics()
    assert "costs $x$" in found


def test_a_question_answers_each_choice_and_none_before(opened):
    [place] = opened.predictions()
    assert place.inner_text().splitlines()[0] == "How high will it be & why?"
    replies = opened.choose_each(place)
    assert list(replies) == OPTIONS
    assert [text.split(" · ")[1][:4] for text in replies.values()] == ["Look", "Beca", "Half"]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_question_answers_the_keyboard(opened, key):
    [place] = opened.predictions()
    opened.page.keyboard.press("Tab")
    focused = "() => document.activeElement.textContent.trim()"
    for _ in range(200):
        if opened.page.evaluate(focused) == OPTIONS[0]:
            break
        opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate(focused) == OPTIONS[1]
    outline = opened.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" and not opened.replies(place)
    opened.page.keyboard.press(key)
    opened.wait_for_reply(place, OPTIONS[1])
    assert opened.replies(place) == ["as high as <that> · Because x ends at 1."]


def test_without_scripts_the_question_is_there_and_with_them_nothing_jumps(browser, root, opened):
    still = browser.new_page(java_script_enabled=False, viewport={"width": 1000, "height": 800})
    still.goto(f"{root}99_try.html")
    place = still.locator(".prediction")
    assert place.locator("li").all_inner_texts() == OPTIONS
    assert place.locator("noscript").is_visible() and "Because" not in still.locator("article").inner_text()
    height = place.locator(".prediction-start").bounding_box()["height"]
    still.close()
    live = opened.predictions()[0].query_selector(".live")
    assert abs(live.bounding_box()["height"] - height) < 1


def test_what_the_builder_ran_itself_is_alive(opened):
    [cell] = opened.cells()
    assert len(opened.walk(cell)) == 3
