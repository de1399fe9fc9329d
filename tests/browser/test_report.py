"""The page that `delta --html` and `inspect --html` write, opened from disk: slider, keyboard, light and dark."""

from importlib.resources import files

import pytest
import small_adapters as made
from playwright.sync_api import Browser

from lora_edu import cli

pytestmark = pytest.mark.browser

VIOLATIONS = """async () => (await axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"] }))
  .violations.map((each) => `${each.id}: ${each.nodes[0].html.slice(0, 120)}`)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    work = tmp_path_factory.mktemp("report")
    tensors = made.peft_tensors()
    A, B = made.pair(seed=50)
    tensors |= {f"{made.PREFIX}<b>odd</b>.lora_{side}.weight": each for side, each in (("A", A), ("B", B))}
    folder = made.peft_folder(work / "a", tensors)
    assert cli.main(["inspect", str(folder), "--html", str(work / "page.html")]) == 0
    return (work / "page.html").as_uri()


def opened(browser: Browser, report: str, **options):
    page = browser.new_context(offline=True, **options).new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(report)
    return page


def test_the_slider_tells_what_each_rank_keeps(browser, report):
    """By the keyboard alone; the shares are those of the spectrum 8, 4, 2, 1, ½, ¼."""
    page = opened(browser, report)
    assert page.inner_text("h1") == "Adapter a"
    page.focus("#rank")
    page.keyboard.press("Home")
    assert "Rank 1 in these 3 matrices keeps 75 % of all ‖ΔW‖² together, in 66 parameters" in page.inner_text(
        "#summary"
    )
    page.keyboard.press("ArrowRight")
    assert "Rank 2 in these 3 matrices keeps 93.8 %" in page.inner_text("#summary")
    assert page.get_attribute("#rank", "aria-valuetext") == "rank 2"
    assert (
        page.locator("#plot circle.kept").count() == 2 and page.locator("#plot circle.dropped").count() == 4
    )
    page.keyboard.press("End")
    assert "Rank 6" in page.inner_text("#summary") and "keeps 100 %" in page.inner_text("#summary")
    assert [each.inner_text() for each in page.query_selector_all(".share")] == ["100 %"] * 3
    assert page.said == []


def test_a_name_shows_its_spectrum_and_stays_text(browser, report):
    page = opened(browser, report)
    buttons = page.query_selector_all("th button")
    assert buttons[0].get_attribute("aria-pressed") == "true"
    assert page.inner_text("#chosen") == "<b>odd</b>" and page.query_selector("main b") is None
    buttons[2].press("Enter")
    assert page.inner_text("#chosen") == buttons[2].inner_text() == made.LAYERS[1]
    assert buttons[0].get_attribute("aria-pressed") == "false"
    assert page.get_attribute("#plot", "aria-label") == page.inner_text("#sentence")
    assert page.locator("#plot line.floor").count() == 1
    assert "largest of noise of the same" in page.inner_html("#plot")
    page.select_option("#kind", index=1)
    assert "in this matrix keeps" in page.inner_text("#summary")
    assert page.locator("tbody tr:visible").count() == 1
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_axe_finds_nothing_and_nothing_is_cut_off(browser, report, scheme, width):
    page = opened(
        browser, report, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    )
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    assert page.evaluate(VIOLATIONS) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_the_table_is_there(browser, report):
    page = opened(browser, report, java_script_enabled=False)
    assert "Scripts are off" in page.inner_text("noscript")
    assert page.locator("tbody tr").count() == 3 and "12 × 10" in page.inner_text("tbody")
