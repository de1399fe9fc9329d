"""JupyterLab with the course's settings and a page of it in Chromium, for browser tests and benchmarks.

It sees and turns what a reader sees and turns; it knows nothing of what the pictures show.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, ElementHandle, Page, sync_playwright

WIDTH, HEIGHT = 1000, 800  # the smallest window that nothing may be cut off in
SETTINGS = {
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}

# Words of the page's console that are no fault of the notebook or of the course, each with its reason.
HARMLESS: tuple[str, ...] = ()


def chromium_path() -> str | None:
    """The system's Chromium or Chrome; LORA_EDU_CHROMIUM names another."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"]
    places = [
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        *(
            str(Path(os.environ[root]) / tail)
            for root in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
            if root in os.environ
            for tail in ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
        ),
    ]
    candidates = [os.environ.get("LORA_EDU_CHROMIUM"), *map(shutil.which, names), *places]
    return next((path for path in candidates if path and Path(path).exists()), None)


@contextlib.contextmanager
def chromium(path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",  # a container's root has none
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",  # a container's /dev/shm may hold 64 MB only
            ],
        )
        yield browser
        browser.close()


@dataclass(frozen=True)
class Server:
    """A running JupyterLab."""

    url: str
    token: str
    folder: Path
    log: Path

    def request(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.url}{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def stop_kernels(self) -> None:
        for session in json.loads(self.request("GET", "api/sessions")):
            self.request("DELETE", f"api/sessions/{session['id']}")


@contextlib.contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[Server]:
    """JupyterLab on the notebooks in `folder`; its own files are under `home`, the user's are not read."""
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS), encoding="utf-8")
    own = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    log = home / "jupyterlab.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **{name: str(path) for name, path in own.items()}},
            stdout=output,
            stderr=output,
        )
        try:
            yield _wait_for_server(process, home / "runtime", folder, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_server(process: subprocess.Popen, runtime: Path, folder: Path, log: Path) -> Server:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for description in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                answer = json.loads(description.read_text(encoding="utf-8"))
                server = Server(answer["url"], answer["token"], folder, log)
                server.request("GET", "api/status")
                return server
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start; its log says:\n{log.read_text(encoding='utf-8')[-3000:]}")


@dataclass(frozen=True)
class View:
    """What a reader sees of an explorer: the sliders' values as text, picture, alt text and caption."""

    values: tuple[str, ...]
    source: str
    alt: str
    caption: str


@dataclass
class NotebookPage:
    """One notebook open in JupyterLab, one notebook a page."""

    page: Page
    faults: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Browser, server: Server, name: str) -> "NotebookPage":
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        self = cls(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.faults.append(f"page error: {error}"))
        page.on("console", self._listen)
        page.route(lambda url: not url.startswith((server.url, "data:", "blob:")), self._refuse)
        page.goto(f"{server.url}lab/workspaces/auto-t/tree/{name}?reset&token={server.token}")
        page.wait_for_function(READY)
        return self

    def _listen(self, message) -> None:
        if message.type == "error" and not any(words in message.text for words in HARMLESS):
            self.faults.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _refuse(self, route) -> None:
        self.faults.append(f"asked for {route.request.url}: the course needs no network")
        route.abort()

    def close(self) -> None:
        self.page.close()

    def run_all(self, seconds: float) -> None:
        """Runs every cell and waits until the kernel has nothing left to do."""
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function("() => window.courseRan !== undefined", timeout=seconds * 1000)
        self.page.wait_for_function(IDLE)
        if failed := self.page.evaluate("() => window.courseRan"):
            raise AssertionError(f"running all cells failed: {failed}")

    def save(self) -> None:
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        self.page.wait_for_function(f"() => !({PANEL}).context.model.dirty")

    def pictures(self) -> list[int]:
        """The cells that show a picture in their output, by index."""
        return self.page.evaluate(CELLS_WITH, "image/png")

    def explorers(self) -> list[int]:
        """The cells whose output is an explorer: a widget with a picture for those who see no widget."""
        widgets = self.page.evaluate(CELLS_WITH, "application/vnd.jupyter.widget-view+json")
        return [cell for cell in self.pictures() if cell in widgets]

    def cell(self, index: int) -> ElementHandle:
        """The cell, scrolled into view: JupyterLab draws no others."""
        self.page.evaluate(SCROLL_TO, index)
        node = self.page.evaluate_handle(
            f"index => ({PANEL}).content.widgets[index].node", index
        ).as_element()
        node.wait_for_selector(".jp-Cell-outputArea img", state="visible")
        node.query_selector(".jp-Cell-outputArea").scroll_into_view_if_needed()
        return node

    def sliders(self, cell: ElementHandle) -> list[ElementHandle]:
        cell.wait_for_selector(".noUi-handle", state="visible")
        return cell.query_selector_all(".noUi-handle")

    def view(self, cell: ElementHandle) -> View:
        return View(
            **{name: tuple(x) if isinstance(x, list) else x for name, x in cell.evaluate(SEEN).items()}
        )

    def press(self, cell: ElementHandle, slider: ElementHandle, key: str) -> View:
        """What is seen after a key, once two frames have been painted."""
        slider.press(key)
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        return self.view(cell)

    def cut_off(self, cell: ElementHandle) -> list[str]:
        """What of an explorer sticks out of the page or is cropped to '…'."""
        return cell.evaluate(CUT_OFF)


PANEL = "window.jupyterapp.shell.currentWidget"

READY = f"""() => {{
  const panel = window.jupyterapp && {PANEL};
  return !!(panel && panel.content && panel.content.model && panel.context && panel.context.isReady
    && panel.content.widgets.length && panel.sessionContext.isReady
    && panel.sessionContext.session && panel.sessionContext.session.kernel
    && panel.sessionContext.session.kernel.status === "idle");
}}"""

IDLE = f"""() => {PANEL}.sessionContext.session.kernel.status === "idle" """

RUN_ALL = f"""() => {{
  delete window.courseRan;
  const errors = () => {PANEL}.content.widgets
    .flatMap((cell, index) => (cell.model.outputs ? cell.model.outputs.toJSON() : [])
      .filter(output => output.output_type === "error")
      .map(output => `cell ${{index}}: ${{output.ename}}: ${{output.evalue}}`));
  window.jupyterapp.commands.execute("notebook:run-all-cells")
    .then(() => {{ window.courseRan = errors().join("; "); }})
    .catch(error => {{ window.courseRan = String(error); }});
}}"""

CELLS_WITH = f"""mime => {PANEL}.content.widgets
  .map((cell, index) => [index, cell.model.outputs ? cell.model.outputs.toJSON() : []])
  .filter(([index, outputs]) => outputs.some(output => output.data && mime in output.data))
  .map(([index]) => index)"""

SCROLL_TO = f"""async index => {{
  const notebook = {PANEL}.content;
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, "start");
}}"""

SEEN = """cell => {
  const image = cell.querySelector(".jp-Cell-outputArea img");
  const caption = cell.querySelector(".jp-Cell-outputArea figcaption");
  return {
    values: [...cell.querySelectorAll(".widget-readout")].map(readout => readout.textContent),
    source: image ? image.src : "", alt: image ? image.alt : "", caption: caption ? caption.textContent : "",
  };
}"""

CUT_OFF = """cell => {
  const area = cell.querySelector(".jp-Cell-outputArea");
  const box = area.getBoundingClientRect();
  const right = Math.min(box.right, document.documentElement.clientWidth);
  const parts = [...area.querySelectorAll("img, figcaption, .widget-label, .widget-readout, .noUi-target")];
  return parts.filter(part => {
    const seen = part.getBoundingClientRect();
    const outside = seen.left < box.left - 1 || seen.right > right + 1;
    return seen.width && (outside || part.scrollWidth > part.clientWidth + 1);
  }).map(part => `${part.className || part.tagName}: ${part.textContent.slice(0, 60)}`);
}"""
