"""The whole site, built once, in Chromium with the network refused: from the disk and from a static host."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import replay
import site_driver
from filelock import FileLock
from playwright.sync_api import Browser

from lora_edu import notebooks
from lora_edu.paths import write_atomically
from lora_edu.site import book

CHAPTERS = [path.stem for path in sorted(notebooks.FOLDER.glob("[0-9][0-9]_*.ipynb"))]
SOLUTIONS = [f"solutions/{path.stem}" for path in sorted((notebooks.FOLDER / "solutions").glob("*.ipynb"))]
PAGES = ["index", *CHAPTERS, *SOLUTIONS]
PHONE = {"width": 390, "height": 800}

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.site]


def each_page(names: list[str]) -> pytest.MarkDecorator:
    """A test for each page; all that is done with one page is done by one worker."""
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="session")
def site(browser: Browser) -> Path:
    """The folder of the site, built once for all workers, two levels below a host's root.

    Chapters are shown as JupyterLab ran them in this test run; one that it did not run, the builder runs.
    """
    target = replay.folder() / "host" / "lora" / "edu"
    with FileLock(replay.folder() / "host.lock"):
        if not target.exists():
            book.build(target, jobs=1, runs=runs_of_jupyterlab())
    return target


def runs_of_jupyterlab() -> Path:
    """A folder in which the builder finds the chapters that JupyterLab ran."""
    runs = replay.folder() / "site-runs"
    for name in notebooks.names():
        for edition in notebooks.editions(name):
            if book.shows_explorers(edition.notebook):
                ran = replay.earlier(edition.path, edition.notebook)
                replay.tell("the site, by running it" if ran is None else "the site, from JupyterLab's run")
                if ran is not None:
                    write_atomically(book.kept_at(edition, runs), nbformat.writes(ran).encode())
    return runs


@pytest.fixture(scope="session")
def disk(site: Path) -> str:
    return f"{site.as_uri()}/"


@pytest.fixture(scope="session")
def host(site: Path) -> Iterator[str]:
    with site_driver.hosted(site.parents[1]) as root:
        yield f"{root}lora/edu/"


def sentences(name: str) -> list[str]:
    """What the pictures of the stored notebook show, in words, in their order."""
    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["text/plain"] for output in outputs if "image/png" in output.get("data", {})]


@each_page(PAGES)
def test_from_the_disk_every_slider_is_alive(browser, disk, name):
    page = site_driver.open_page(browser, disk, name)
    for cell in page.cells():
        cell.scroll_into_view_if_needed()
        assert not page.cut_off(cell)
        page.walk(cell)  # other value, other picture, caption = alt text; the same on the way back
    for question in page.predictions():
        page.choose_each(question)
    assert not page.raw_mathematics()
    alts = page.page.eval_on_selector_all("article img", "images => images.map(image => image.alt)")
    assert len(alts) == len(sentences(name)) and all(alts)
    page.close()
    assert not page.faults


@each_page(PAGES)
def test_from_a_static_host_below_its_root(browser, host, name):
    page = site_driver.open_page(browser, host, name)
    for cell in page.cells()[:1]:
        slider = page.sliders(cell)[0]
        place, last = (int(float(slider.get_attribute(f"aria-value{what}"))) for what in ("now", "max"))
        page.press(cell, slider, "ArrowRight" if place < last else "ArrowLeft")
    page.close()
    assert not page.faults


AXE = """async options => {
  const { violations } = await axe.run(options);
  return violations.filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.map(node => node.html.slice(0, 100)).join(" ; ")}`);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@each_page([*PAGES, "search"])
def test_axe_finds_nothing_serious(browser, disk, name, scheme):
    page = site_driver.open_page(browser, disk, name, color_scheme=scheme)
    page.page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    options = {"resultTypes": ["violations"]}
    if scheme == "dark":  # nothing else differs
        options["runOnly"] = ["color-contrast"]
    found = page.page.evaluate(AXE, options)
    page.close()
    assert not found


@each_page(["index", *CHAPTERS])
def test_without_scripts_the_start_is_there_and_with_them_nothing_jumps(browser, disk, name):
    still = browser.new_page(java_script_enabled=False, viewport={"width": 1000, "height": 800})
    still.goto(f"{disk}{name}.html")
    page = site_driver.open_page(browser, disk, name)
    cells = page.cells()
    assert len(cells) == still.locator(".explorer").count() >= 1, "each chapter has an explorer"
    for number, cell in enumerate(cells):
        start = still.locator(".explorer").nth(number)
        seen, image = page.view(cell), start.locator("img")
        assert (image.get_attribute("src"), image.get_attribute("alt")) == (seen.source, seen.alt)
        assert (
            image.bounding_box()["height"] > 100 and start.locator("figcaption").inner_text() == seen.caption
        )
        assert tuple(start.locator(".explorer-value").all_inner_texts()) == seen.values
        assert start.locator("noscript").is_visible()
        height = start.locator(".explorer-start").bounding_box()["height"]
        assert abs(cell.bounding_box()["height"] - height) < 1, f"explorer {number} jumps"
    page.close()
    still.close()
    assert not page.faults


@each_page(PAGES)
def test_on_a_phone_nothing_sticks_out(browser, disk, name):
    page = site_driver.open_page(browser, disk, name, viewport=PHONE)
    wide = page.page.evaluate("document.documentElement.scrollWidth")
    cut = [words for cell in page.cells() for words in page.cut_off(cell)]
    page.close()
    assert wide <= PHONE["width"] and not cut


def test_the_first_page_opens_with_a_slider_and_stays_light(browser, disk, site):
    page = site_driver.open_page(browser, disk, "index")
    [cell] = page.cells()
    assert cell.bounding_box()["y"] < 800, "it is seen without scrolling"
    page.close()
    assert (site / "index.html").stat().st_size < 700_000


def test_the_search_finds_a_word_on_the_disk(browser, disk):
    page = site_driver.open_page(browser, disk, "index").page
    page.get_by_placeholder("Search").first.fill("Marchenko")
    page.keyboard.press("Enter")
    result = page.locator("ul.search a", has_text="01 · Low rank").first
    result.wait_for()
    result.click()
    page.wait_for_url("**/01_low_rank.html*")
    page.close()


def test_what_needs_the_kernel_says_so(browser, disk):
    page = site_driver.open_page(browser, disk, "04_counting").page
    part = page.locator(".asks-kernel")
    assert "make lab" in part.inner_text() and "numbers in A and B" in part.inner_text()
    page.close()


class Addresses(HTMLParser):
    """What a page loads (`loads`), where it leads (`links`), and the names it can be entered at (`anchors`)."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        self.anchors.add(about.get("id"))
        if tag in ("script", "img") and about.get("src"):
            self.loads.append(about["src"])
        if (
            tag == "link"
            and about.get("href")
            and not set(about.get("rel", "").split()) & {"search", "index"}
        ):
            self.loads.append(about["href"])
        if tag == "a" and about.get("href"):
            self.links.append(about["href"])


def test_all_that_pages_load_comes_along_and_links_lead_somewhere(site):
    read = {path: Addresses(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in read.items():
        for address in [*page.loads, *page.links]:
            parts = urlsplit(address)
            if address in page.links and parts.scheme in ("https", "http", "mailto"):
                continue
            assert parts.scheme in ("", "data"), f"{path.name} loads {address[:80]}"
            if parts.scheme == "data":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {address}"
            if parts.fragment and target in read:
                assert unquote(parts.fragment) in read[target].anchors, f"{path.name}: {address}"
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style) for style in styles)


def test_every_chapter_is_in_the_contents_and_leads_to_its_solutions(site):
    contents = (site / "index.html").read_text(encoding="utf-8")
    for name in [*CHAPTERS, *SOLUTIONS]:
        assert f'href="{name}.html"' in contents
    for name in SOLUTIONS:
        chapter = (site / f"{Path(name).name}.html").read_text(encoding="utf-8")
        assert f'href="{name}.html"' in chapter.split('id="exercises"')[1]
