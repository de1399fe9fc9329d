"""From key press to the last change of the picture, for each explorer of each chapter, in JupyterLab and Chromium.

    python benchmarks/slider_latency.py [chapter ...] [--presses 60] [--site]

Writes results/slider_latency.json and .png: 50th and 95th percentile, with the seconds and bytes of the pictures.
With --site it turns the sliders of the site that `make site` has built, opened from the disk, and writes
results/site_slider_latency.json and .png.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from lora_edu import plots
from lora_edu.paths import REPOSITORY, write_atomically, write_json
from lora_edu.site import book

sys.path.insert(0, str(REPOSITORY / "tests" / "browser"))
import jupyterlab_driver as driver
import site_driver

RESULTS = Path(__file__).parent / "results"
FRAME = 1000 / 60  # milliseconds; a picture that is there within one has no delay that can be seen

# Listens in the page itself: from the key's own time stamp to the last change of anything in the cell's output,
# and on to the frame that shows it.
LISTEN = """cell => {
  const area = cell.querySelector(".jp-Cell-outputArea") ?? cell;
  window.coursePresses = [];
  let press = null;
  document.addEventListener("keydown", event => {
    press = { began: event.timeStamp, changed: null, shown: null };
    window.coursePresses.push(press);
  }, true);
  new MutationObserver(() => {
    if (!press) return;
    const mine = press;
    mine.changed = performance.now();
    requestAnimationFrame(() => { mine.shown = performance.now(); });
  }).observe(area, { subtree: true, childList: true, attributes: true, characterData: true });
}"""
LATEST = (
    """() => { const press = window.coursePresses.at(-1); return press && press.shown ? press : null; }"""
)


def measure(notebook: driver.NotebookPage, chapter: str, presses: int) -> list[dict]:
    """A row for each explorer of an open notebook."""
    notebook.run_all(1800)
    drawn = notebook.drawn()
    rows = []
    for index in notebook.explorers():
        cell = notebook.cell(index, ".noUi-handle")
        [drawing] = drawn[index]
        drawn_in = {
            "pictures": drawing["pictures"],
            "seconds_to_draw": round(drawing["seconds"], 2),
            "bytes": drawing["bytes"],
        }
        rows.append({"chapter": chapter, "cell": index} | turn_all(notebook, cell, presses) | drawn_in)
        print(line(rows[-1]), flush=True)
    return rows


def measure_page(page: site_driver.SitePage, chapter: str, presses: int) -> list[dict]:
    """A row for each explorer of a page of the site."""
    rows = []
    for number, cell in enumerate(page.cells()):
        cell.scroll_into_view_if_needed()
        rows.append({"chapter": chapter, "explorer": number} | turn_all(page, cell, presses))
        print(line(rows[-1]), flush=True)
    return rows


def turn_all(notebook: driver.NotebookPage, cell, presses: int) -> dict:
    """Turns each slider of an explorer; how long its presses took."""
    cell.evaluate(LISTEN)
    changes, frames = [], []
    for slider in notebook.sliders(cell):
        for press in turn(notebook, slider, presses):
            changes.append(press["changed"] - press["began"])
            frames.append(press["shown"] - press["began"])
    return {
        "sliders": [label.strip() for label in cell.evaluate(LABELS)],
        "presses": len(changes),
        "change_ms": summary(changes),
        "frame_ms": summary(frames),
    }


LABELS = """cell => [...cell.querySelectorAll(".widget-hslider > .widget-label")].map(label => label.textContent)"""


def turn(notebook: driver.NotebookPage, slider, presses: int):
    """From the start to the end and back until there were enough key presses; yields each press's times."""
    slider.press("Home")
    last = int(float(slider.get_attribute("aria-valuemax")))
    way = ["ArrowRight"] * last + ["ArrowLeft"] * last
    for number in range(presses):
        notebook.page.wait_for_timeout(50)  # the page is at rest again
        slider.press(way[number % len(way)])
        notebook.page.wait_for_timeout(50)
        yield notebook.page.wait_for_function(LATEST).json_value()


def summary(milliseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(milliseconds, n=20, method="inclusive")
    values = {"p50": statistics.median(milliseconds), "p95": cuts[-1], "worst": max(milliseconds)}
    return {name: round(value, 1) for name, value in values.items()}


def line(row: dict) -> str:
    change, frame = row["change_ms"], row["frame_ms"]
    place = f"cell {row['cell']:3}" if "cell" in row else f"explorer {row['explorer']}"
    drawn = (
        f"{row['pictures']:2} pictures {row['seconds_to_draw']:5.2f} s {row['bytes'] / 1e3:4.0f} kB | "
        if "pictures" in row
        else ""
    )
    return (
        f"{row['chapter']} {place} {' × '.join(row['sliders'])[:34]:34} {drawn}"
        f"last change {change['p50']:4.1f} {change['p95']:5.1f} {change['worst']:5.1f} ms | "
        f"frame {frame['p50']:4.1f} {frame['p95']:5.1f} ms"
    )


@plots.style()
def picture(rows: list[dict]) -> bytes:
    """Half of the presses and 95 in 100 of them, explorer by explorer, against one frame of the screen."""
    figure, axes = plots.subplots(size=(7.2, 0.9 + 0.32 * len(rows)))
    names = [f"{row['chapter'][:2]}: {', '.join(row['sliders'])}" for row in rows]
    places = range(len(rows))
    axes.plot([row["change_ms"]["p50"] for row in rows], places, "o", label="50 % of key presses")
    axes.plot([row["change_ms"]["p95"] for row in rows], places, "s", label="95 %")
    axes.axvline(FRAME, color=plots.GREY, linestyle="--", label="one frame at 60 Hz")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, None),
        xlabel="milliseconds from key press to the last change",
        title="Sliders answer in a frame",
    )
    axes.legend(loc="lower right")
    return plots.to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="default: all in notebooks/")
    parser.add_argument("--presses", type=int, default=60, help="of each slider")
    parser.add_argument("--site", action="store_true", help="the pages of build/site instead of JupyterLab")
    chosen = parser.parse_args()
    there = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    chapters = chosen.chapters or there
    if not set(chapters) <= set(there):
        sys.exit(
            f"no such chapter: {', '.join(sorted(set(chapters) - set(there)))}; there are {', '.join(there)}"
        )
    path = driver.chromium_path()
    if path is None:
        sys.exit("no Chromium or Chrome on this machine: install one or name it in LORA_EDU_CHROMIUM")
    command = f"python benchmarks/slider_latency.py {' '.join(chapters)} --presses {chosen.presses}"
    if chosen.site:
        measure_site(path, chapters, chosen.presses, f"{command} --site")
        return
    rows = []
    with (
        tempfile.TemporaryDirectory() as home,
        driver.lab(Path(home)) as server,
        driver.chromium(path) as browser,
    ):
        for chapter in chapters:
            notebook = driver.NotebookPage(browser)
            notebook.visit(server, f"{chapter}.ipynb")
            rows += measure(notebook, chapter, chosen.presses)
            notebook.close()
            server.stop_kernels()
            save(rows, command, browser.version)  # chapter by chapter: the next one may take long


def measure_site(path: str, chapters: list[str], presses: int, command: str) -> None:
    rows = []
    if not (book.TARGET / "index.html").is_file():
        sys.exit("the site is not there: run `make site` first")
    with driver.chromium(path) as browser:
        for chapter in chapters:
            page = site_driver.open_page(browser, f"{book.TARGET.as_uri()}/", chapter)
            rows += measure_page(page, chapter, presses)
            page.close()
            save(rows, command, browser.version, "site_slider_latency")


def save(rows: list[dict], command: str, chromium: str, name: str = "slider_latency") -> None:
    record = {
        "command": command,
        "where": f"Chromium {chromium}, headless, {driver.WIDTH} × {driver.HEIGHT}; {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jupyterlab", "ipywidgets", "matplotlib")},
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "rows": rows,
    }
    write_json(RESULTS / f"{name}.json", record)
    write_atomically(RESULTS / f"{name}.png", picture(rows))


if __name__ == "__main__":
    main()
