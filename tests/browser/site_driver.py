"""A page of the built site in Chromium, from the disk or from a static host, with every other address refused.

For browser tests and benchmarks; it turns sliders as `jupyterlab_driver` does, and knows nothing of their pictures.
"""

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import jupyterlab_driver as driver
from playwright.sync_api import Browser, ElementHandle


class SitePage(driver.NotebookPage):
    """One page, opened at an address below `root` (file:///…/ or http://127.0.0.1:…/…/)."""

    def open(self, root: str, name: str) -> None:
        """Opens the page; returns when all on it is alive and typeset (at once where scripts are off)."""
        self.page.route(lambda url: not url.startswith((root, "data:")), self._refuse)
        self.page.goto(f"{root}{name}.html")
        self.page.wait_for_function(ALIVE)

    def cells(self) -> list[ElementHandle]:
        """The explorers, in the order of the page."""
        return self.page.query_selector_all(".explorer")

    def predictions(self) -> list[ElementHandle]:
        """The questions, in the order of the page."""
        return self.page.query_selector_all(".prediction")


ALIVE = """() => document.querySelectorAll("[data-model]:not(.alive)").length === 0
  && [...document.querySelectorAll(".math")].every(formula => formula.querySelector("mjx-container"))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """The address of a static host that serves a folder, on a free port of this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def open_page(browser: Browser, root: str, name: str, **options) -> SitePage:
    page = SitePage(browser, **options)
    page.open(root, name)
    return page
