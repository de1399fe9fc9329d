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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
from playwright.sync_api import Browser, ElementHandle, TimeoutError, sync_playwright

PATIENCE = 300  # seconds; a kernel takes three to start, or a hundred on a machine that is busy otherwise
WIDTH, HEIGHT = 1000, 800  # the smallest window that nothing may be cut off in

# Words of the page's console that are no fault of the notebook or of the course, each with its reason.
HARMLESS: tuple[str, ...] = ()

FAILED = pytest.StashKey[bool]()  # whether a test has failed, for the fixture that takes its last picture


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
def lab(home: Path, kernels: Path | None = None) -> Iterator[Server]:
    """`lora-edu lab` as a reader starts it; all it keeps is under `home`, nothing of the user's is read.

    kernels: a folder whose kernels/ counts for more than what is installed.
    """
    own = {
        "LORA_EDU_HOME": home / "course",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    if kernels is not None:
        own["JUPYTER_PATH"] = kernels
    command = [sys.executable, "-m", "lora_edu.cli", "lab", "--no-browser", "--port", "0"]
    command += ["--LabApp.expose_app_in_browser=True"]  # so that a test can ask JupyterLab what it is doing
    home.mkdir(parents=True, exist_ok=True)
    log = home / "jupyterlab.log"
    with log.open("w", encoding="utf-8") as output:
        environment = os.environ | {name: str(path) for name, path in own.items()}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield _wait_for_server(process, home / "runtime", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_server(process: subprocess.Popen, runtime: Path, log: Path) -> Server:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        for description in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                answer = json.loads(description.read_text(encoding="utf-8"))
                server = Server(answer["url"], answer["token"], Path(answer["root_dir"]), log)
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


class NotebookPage:
    """One notebook open in JupyterLab, one notebook a page. faults: what went wrong on the page, in words."""

    def __init__(self, browser: Browser, **options):
        """options: of the browser's page, e.g. color_scheme="dark"."""
        self.faults: list[str] = []
        self.page = browser.new_page(**{"viewport": {"width": WIDTH, "height": HEIGHT}} | options)
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("pageerror", lambda error: self.faults.append(f"page error: {error}"))
        self.page.on("console", self._listen)

    def visit(self, server: Server, name: str) -> None:
        """Opens the notebook; returns when its kernel is there and idle."""
        self.page.route(lambda url: not url.startswith((server.url, "data:", "blob:")), self._refuse)
        self.page.goto(f"{server.url}lab/workspaces/auto-t/tree/{name}?reset&token={server.token}")
        self.page.wait_for_function(READY)

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
        """Saves as Ctrl-S does; returns when the file is written, without waiting for its checkpoint."""
        self.page.evaluate(SAVE)
        self.page.wait_for_function("() => window.courseSaved !== undefined")
        said = self.page.evaluate("() => window.courseSaved")
        assert said.startswith("completed"), f"saving: {said}"
        self.page.wait_for_function(f"() => !({PANEL}).context.model.dirty")

    def ran(self) -> list[str]:
        """The sources of the cells that the kernel has run, in that order."""
        return json.loads(self.ask_kernel(TELL_HISTORY))

    def ask_kernel(self, code: str) -> str:
        """What code prints in the notebook's kernel. `evaluate` waits without end; a lost answer shall be an error."""
        return self.page.evaluate(ASK_KERNEL, [code, PATIENCE * 1000])

    def pictures(self) -> list[int]:
        """The cells that show a picture in their output, by index."""
        return self.page.evaluate(CELLS_WITH, "image/png")

    def explorers(self) -> list[int]:
        """The cells whose output is an explorer: a widget with a picture for those who see no widget."""
        widgets = self.page.evaluate(CELLS_WITH, "application/vnd.jupyter.widget-view+json")
        return [cell for cell in self.pictures() if cell in widgets]

    def drawn(self) -> dict[int, list[dict]]:
        """What the kernel knows of each explorer, by cell: how many pictures, seconds, bytes, complaints."""
        told = json.loads(self.ask_kernel(TELL))
        index = {identity: place for place, identity in enumerate(self.page.evaluate(IDENTITIES))}
        return {index[cell]: drawings for cell, drawings in told.items() if drawings}

    def cell(self, index: int, content: str = "img") -> ElementHandle:
        """The cell, scrolled until its output shows `content` (a CSS selector) and stays where it is.

        JupyterLab takes cells out of the page that are far from what is seen, and cells that are drawn late
        push others away.
        """
        self.page.wait_for_function(SETTLED, arg=[index, content], polling=100)
        return self.page.evaluate_handle(
            f"index => ({PANEL}).content.widgets[index].node", index
        ).as_element()

    def sliders(self, cell: ElementHandle) -> list[ElementHandle]:
        return cell.query_selector_all(".noUi-handle")

    def view(self, cell: ElementHandle) -> View:
        return View(
            **{name: tuple(x) if isinstance(x, list) else x for name, x in cell.evaluate(SEEN).items()}
        )

    def predictions(self) -> list[int]:
        """The cells whose output is a question with buttons, by index."""
        return self.page.evaluate(PREDICTIONS)

    def replies(self, place: ElementHandle) -> list[str]:
        """What a question says to the choice that was made; nothing before."""
        return place.evaluate(REPLIES)

    def wait_for_reply(self, place: ElementHandle, option: str) -> None:
        self.page.wait_for_function(REPLIED, arg=[place, option])

    def choose_each(self, place: ElementHandle) -> dict[str, str]:
        """Clicks each option of a question that was not answered yet; option → the reply seen."""
        assert not self.replies(place), "a reply is there before a choice"
        found = {}
        for button in place.query_selector_all("button"):
            option = button.inner_text().strip()
            button.click()
            self.wait_for_reply(place, option)
            [found[option]] = self.replies(place)
        return found

    def raw_mathematics(self) -> list[str]:
        """Text around formulas that nobody typeset, and what MathJax says is wrong."""
        return self.page.evaluate(RAW_MATHEMATICS)

    def walk(
        self, cell: ElementHandle, known: Mapping[tuple[str, ...], str] | None = None
    ) -> dict[tuple[str, ...], str]:
        """Moves each slider by keyboard from end to end and back; returns values as read → picture as seen.

        known: what an earlier walk has seen; then no time is spent on waiting for a change that never comes.
        Raises AssertionError where a value's text stays, where a caption is not the alt text, and where the
        way back shows other pictures than the way there. Leaves every slider where it was.
        """
        known = dict(known or {})
        seen: dict[tuple[str, ...], str] = {}
        for slider in self.sliders(cell):
            place, last = (int(float(slider.get_attribute(f"aria-value{what}"))) for what in ("now", "max"))
            self.press(cell, slider, "Home", known, moves=place > 0)
            way = [self.view(cell)]
            for key in ["ArrowRight"] * last + ["ArrowLeft"] * last:
                known.setdefault(way[-1].values, way[-1].source)
                way.append(self.press(cell, slider, key, known))
            for view in way:
                assert view.alt and view.alt == view.caption, f"caption is not the alt text: {view}"
                assert seen.setdefault(view.values, view.source) == view.source, (
                    f"two pictures: {view.values}"
                )
            assert len({view.values for view in way}) == last + 1, f"{last + 1} values, not all told apart"
            assert len({view.source for view in way}) > 1, "the slider changes no picture"
            for _ in range(place):
                self.press(cell, slider, "ArrowRight", known)
        return seen

    def press(
        self,
        cell: ElementHandle,
        slider: ElementHandle,
        key: str,
        known: Mapping[tuple[str, ...], str] = MappingProxyType({}),
        moves: bool = True,
    ) -> View:
        """What is seen after a key: waits for another value and, two seconds at most, for another picture.

        known: values as read → the picture that belongs to them; it is waited for ten seconds at most.
        """
        before = cell.evaluate(SEEN)
        slider.press(key)
        if moves:
            self.page.wait_for_function(OTHER, arg=[cell, before, "values"])
            picture = known.get(self.view(cell).values)
            with contextlib.suppress(TimeoutError):  # neighbours may share a picture
                if picture is None:
                    self.page.wait_for_function(OTHER, arg=[cell, before, "source"], timeout=2000)
                else:
                    self.page.wait_for_function(SHOWS, arg=[cell, picture], timeout=10_000)
        return self.view(cell)

    def broken_links(self, cell: ElementHandle) -> int:
        """How many widgets carry JupyterLab's sign for 'no kernel behind it'."""
        return cell.evaluate(BROKEN_LINKS)

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

SAVE = f"""() => {{
  delete window.courseSaved;
  const context = {PANEL}.context;
  const told = (_, state) => {{
    if (state === "started") return;
    context.saveState.disconnect(told);
    window.courseSaved = state;
  }};
  context.saveState.connect(told);
  window.jupyterapp.commands.execute("docmanager:save");
}}"""

CELLS_WITH = f"""mime => {PANEL}.content.widgets
  .map((cell, index) => [index, cell.model.outputs ? cell.model.outputs.toJSON() : []])
  .filter(([index, outputs]) => outputs.some(output => output.data && mime in output.data))
  .map(([index]) => index)"""

SETTLED = f"""([index, content]) => {{
  const notebook = {PANEL}.content;
  const node = notebook.widgets[index].node;
  const part = node.isConnected && node.querySelector(`.jp-Cell-outputArea ${{content}}`);
  const box = part && part.getBoundingClientRect();
  const seen = box && box.height > 0 && box.bottom > 100 && box.top < window.innerHeight - 100
    && (part.tagName !== "IMG" || (part.complete && part.naturalWidth > 0));
  const before = window.courseSettled;
  const calm = seen && before && before.index === index && before.top === box.top ? before.calm + 1 : 0;
  window.courseSettled = {{ index, top: box ? box.top : null, calm }};
  if (!seen) {{
    notebook.activeCellIndex = index;
    if (part) part.scrollIntoView({{ block: "center" }});
    else notebook.scrollToItem(index, "start");
  }}
  return calm >= 3;
}}"""

TELL = """
import json as _json
from lora_edu.explore import explorer as _explorer
print(_json.dumps({cell: [{
    "pictures": len(shown.pictures), "seconds": shown.seconds, "bytes": shown.bytes,
    "complaints": sorted({words for picture in shown.pictures.values() for words in picture.complaints}),
} for shown in made if isinstance(shown, _explorer.Explorer)] for cell, (_, made) in _explorer.alive.items()}))
"""

TELL_HISTORY = """
import json as _json
print(_json.dumps(get_ipython().history_manager.input_hist_raw[1:]))
"""

ASK_KERNEL = f"""async ([code, patience]) => {{
  const kernel = {PANEL}.sessionContext.session.kernel;
  const future = kernel.requestExecute({{ code, store_history: false }});
  let text = "";
  future.onIOPub = message => {{ text += message.content.text || ""; }};
  const late = new Promise((_, fail) => setTimeout(() => fail(new Error("the kernel does not answer")), patience));
  await Promise.race([future.done, late]);
  return text;
}}"""

IDENTITIES = f"() => {PANEL}.content.widgets.map(cell => cell.model.sharedModel.id)"

SEEN = """cell => {
  const image = cell.querySelector("figure img");
  const caption = cell.querySelector("figcaption");
  return {
    values: [...cell.querySelectorAll(".widget-readout")].map(readout => readout.textContent),
    source: image ? image.src : "", alt: image ? image.alt : "", caption: caption ? caption.textContent : "",
  };
}"""

OTHER = f"""([cell, before, what]) => {{
  const now = ({SEEN})(cell);
  return now.source && String(now[what]) !== String(before[what]);
}}"""

SHOWS = f"([cell, picture]) => ({SEEN})(cell).source === picture"

PREDICTIONS = f"""() => {PANEL}.content.widgets
  .map((cell, index) => [index, cell.model.sharedModel.source])
  .filter(([index, source]) => source.split("\\n").some(line => line.startsWith("explore.predict(")))
  .map(([index]) => index)"""

REPLIES = """place => [...place.querySelectorAll(".lora-edu-prediction-reply")]
  .filter(reply => reply.getClientRects().length).map(reply => reply.innerText.trim())"""

REPLIED = f"([place, option]) => ({REPLIES})(place).some(reply => reply.startsWith(option + ' · '))"

# Code may have a dollar, and MathJax keeps the formula for screen readers beside what it has typeset.
RAW_MATHEMATICS = r"""() => {
  const root = document.querySelector("article, .jp-Notebook") ?? document.body;
  const raw = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const typeset = text.parentElement.closest("code, pre, script, style, mjx-container, .cm-editor, .jp-OutputArea");
    if (!typeset && /\\[(\[]|\$|\\[a-zA-Z]{2,}/.test(text.data)) raw.push(text.data.trim().slice(0, 120));
  }
  const wrong = root.querySelectorAll("mjx-merror, [data-mjx-error]");
  return [...raw, ...[...wrong].map(part => part.outerHTML.slice(0, 200))];
}"""

BROKEN_LINKS = """cell => [...cell.querySelectorAll(".jupyter-widgets-disconnected")]
  .filter(part => getComputedStyle(part, "::before").display !== "none").length"""

CUT_OFF = """cell => {
  const area = cell.querySelector(".jp-Cell-outputArea") ?? cell;
  const box = area.getBoundingClientRect();
  const right = Math.min(box.right, document.documentElement.clientWidth);
  const parts = [...area.querySelectorAll("img, figcaption, .widget-label, .widget-readout, .noUi-target")];
  return parts.filter(part => {
    const seen = part.getBoundingClientRect();
    const outside = seen.left < box.left - 1 || seen.right > right + 1;
    const cropped = !part.matches("img, .noUi-target") && part.scrollWidth > part.clientWidth + 1;
    return seen.width && (outside || cropped);
  }).map(part => `${part.className || part.tagName}: ${part.textContent.slice(0, 60)}`);
}"""
