"""Builds the site: runs the chapters that have sliders, lays all of them out, puts the finished book in its place.

Not for publishing: what it leaves in build/site is plain files that any static host takes, or a double click opens.
"""

import argparse
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from lora_edu import guard, notebooks
from lora_edu.notebooks import Edition
from lora_edu.paths import REPOSITORY, repository, write_atomically
from lora_edu.site import pages

TARGET = REPOSITORY / "build" / "site"
RUNS = REPOSITORY / "build" / "site-runs"  # notebooks as they were run, by what they were made from
HERE = Path(__file__).parent
LIBRARIES = ("torch", "numpy", "matplotlib", "pillow", "ipywidgets", "tokenizers")
MOST_BYTES = 4_000_000  # of a page, apart from what pages share; chapter 03 has 3.0 MB
ABOUT = """These pages show the notebooks as they ran. Sliders work here, without Python and without a network. To
run the code, change it, and have your answers to the exercises checked, get the repository and type `make lab`."""
SCRIPTS = ("notebook-stand-in.js", "widgets.js", "explorers.js")


def shows_explorers(notebook: NotebookNode) -> bool:
    """Whether a notebook has something to turn: only then do its stored results not suffice."""
    return any(
        cell.cell_type == "code" and re.search(r"\b(explore\.|Explorer\()", cell.source)
        for cell in notebook.cells
    )


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def key(notebook: NotebookNode) -> str:
    """A hash of all that decides what a notebook's code shows when it runs."""
    whole = hashlib.sha256(f"{sys.version_info[:2]} {[version(name) for name in LIBRARIES]}".encode())
    package = REPOSITORY / "lora_edu"
    for path in sorted(package.rglob("*.py")):
        if path.parent.name != "site":
            whole.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    whole.update((REPOSITORY / "data" / "MANIFEST.json").read_bytes())
    for cell in code_cells(notebook):
        whole.update(f"{cell.source}\n".encode())
    return whole.hexdigest()[:16]


def run(edition: Edition, path: Path) -> float:
    """Runs a notebook without a network, in a reader's folder of its own, and keeps it at `path`; returns seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        variables = {"LORA_EDU_HOME": home, **guard.variables()}
        try:
            ran = notebooks.run(edition.notebook, keep_widgets=True, variables=variables)
        except ValueError as error:
            raise ValueError(f"{edition.name}: {error}") from None
    write_atomically(path, nbformat.writes(ran, version=4).encode())
    return time.perf_counter() - began


def stored(edition: Edition) -> NotebookNode:
    """The notebook with the results in the repository; refused where its source says something else by now."""
    if any(notebooks.differences(edition)):
        raise ValueError(
            f"{edition.name}.ipynb is out of step with notebooks/source: run `make notebooks` first"
        )
    return nbformat.read(edition.path, as_version=4)


def with_results(notebook: NotebookNode, ran: NotebookNode) -> NotebookNode:
    """The notebook with what its code showed in an earlier run; the text may have changed since."""
    for cell, done in zip(code_cells(notebook), code_cells(ran), strict=True):
        cell.outputs = done.outputs
    notebook.metadata = ran.metadata
    return notebook


def kept_at(edition: Edition, runs: Path) -> Path:
    """Where the run of a notebook is kept, as long as nothing that it depends on changes."""
    return runs / f"{edition.name.replace('/', '-')}-{key(edition.notebook)}.ipynb"


def gather(
    editions: Sequence[Edition], alive: set[str] | None, jobs: int, runs: Path
) -> dict[str, NotebookNode]:
    """Every notebook with its results: those with sliders run now, unless they ran before and nothing has changed.

    alive: the names of those that may run (default: all); what is shown of the others is what is stored.
    """
    results, kept = {}, {}
    by_name = {edition.name: edition for edition in editions}
    for edition in editions:
        if shows_explorers(edition.notebook) and (alive is None or edition.name in alive):
            kept[edition.name] = kept_at(edition, runs)
        else:
            results[edition.name] = stored(edition)
    missing = [edition for edition in editions if edition.name in kept and not kept[edition.name].is_file()]
    if missing:
        print(f"running {len(missing)} notebooks, {jobs} at a time", flush=True)
        with ThreadPoolExecutor(jobs) as pool:  # the work is done in the kernels' processes
            seconds = pool.map(run, missing, [kept[edition.name] for edition in missing])
            for edition, took in zip(missing, seconds, strict=True):
                print(f"  {edition.name}: {took:.0f} s", flush=True)
    for name, path in kept.items():
        results[name] = with_results(by_name[name].notebook, nbformat.read(path, as_version=4))
        for older in set(runs.glob(f"{name.replace('/', '-')}-*.ipynb")) - {path}:
            if re.fullmatch(r"-[0-9a-f]{16}", older.stem.removeprefix(name.replace("/", "-"))):
                older.unlink()
    return {edition.name: results[edition.name] for edition in editions}


def toctree(caption: str, names: Sequence[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def make_pages(results: Mapping[str, NotebookNode]) -> dict[str, pages.Page]:
    """Name → page. The first has the table of contents, and not what only a running notebook can tell."""
    chapters = [name for name in results if name != "index" and "/" not in name]
    solutions = [name for name in results if "/" in name]
    made = {}
    for name, notebook in results.items():
        answers = f"solutions/{name}"
        made[name] = pages.make_page(notebook, name, f"{answers}.ipynb" if answers in solutions else None)
    contents = [ABOUT, toctree("Chapters", chapters), toctree("Solutions", solutions)]
    opening = made["index"].source
    opening.cells = [*until_heading(opening.cells), new_markdown_cell("\n\n".join(contents), id="contents")]
    return made


def until_heading(cells: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The cells, or the part of one, above the first heading of the second level."""
    above = []
    for cell in cells:
        if cell.cell_type == "markdown" and (start := f"\n{cell.source}".find("\n## ")) >= 0:
            cell.source = cell.source[: max(start - 1, 0)]
            return [*above, cell] if cell.source else above
        above.append(cell)
    return above


def lay_out(made: Mapping[str, pages.Page], work: Path) -> Path:
    """Has Sphinx make the book in `work`; a warning of Sphinx is an error. Returns the folder of the HTML."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    source, output = work / "source", work / "html"
    for name, page in made.items():
        write_atomically(source / f"{name}.ipynb", nbformat.writes(page.source, version=4).encode())
    static = work / "static"
    shutil.copytree(HERE / "static", static)
    shutil.copyfile(widgets_script(), static / "widgets.js")
    warnings = io.StringIO()

    def finish_page(app, name, template, context, doctree) -> None:
        # the theme says that its captions are headings, and not of which level
        tree = context.get("furo_navigation_tree", "")
        context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')
        if name in made and made[name].models:
            context["body"] += pages.script(made[name].models)
            for file in SCRIPTS:
                app.add_js_file(file, loading_method="defer")

    with patch_docutils(str(HERE)), docutils_namespace():  # else a second book in this process would warn
        book = Sphinx(
            str(source),
            str(HERE),
            str(output),
            str(work / "doctrees"),
            "html",
            confoverrides={"html_static_path": [str(static)]},
            status=None,
            warning=warnings,
        )
        book.connect("html-page-context", finish_page, priority=900)  # after the theme
        book.build()
    if said := re.sub(r"\x1b\[[0-9;]*m", "", warnings.getvalue()).strip():
        raise ValueError("Sphinx is not content:\n" + said.replace(f"{source}{os.sep}", ""))
    if any('class="math' in page.read_text(encoding="utf-8") for page in output.rglob("*.html")):
        copy_mathjax(output / "_static" / "mathjax")
    return output


def widgets_script() -> Path:
    """ipywidgets' own widgets as one script: it comes with each ipywidgets 8."""
    from jupyter_core.paths import jupyter_path

    for folder in jupyter_path("nbextensions"):
        path = Path(folder) / "jupyter-js-widgets" / "extension.js"
        if path.is_file():
            return path
    raise FileNotFoundError("ipywidgets' script is not there: install `widgetsnbextension`")


def copy_mathjax(target: Path) -> None:
    """MathJax with its fonts, for pages that have formulas."""
    import importlib.util

    origin = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
        place = target / part
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (origin / part).is_dir() else shutil.copyfile)(origin / part, place)


def weigh(output: Path, names: Sequence[str]) -> dict[str, int]:
    """Name → bytes of its page; raises ValueError for one over the limit."""
    sizes = {name: (output / f"{name}.html").stat().st_size for name in names}
    for name, size in sizes.items():
        if size > MOST_BYTES:
            raise ValueError(
                f"{name}.html has {size / 1e6:.1f} MB; a page may have {MOST_BYTES / 1e6:.0f} MB"
            )
    return sizes


def put_in_place(output: Path, target: Path) -> None:
    """The new site where the old one was, which is there until this moment."""
    old = output.with_name("old")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, old)
    os.replace(output, target)


def build(
    target: Path = TARGET,
    alive: set[str] | None = None,
    jobs: int | None = None,
    runs: Path = RUNS,
    folder: Path = notebooks.FOLDER,
) -> dict[str, int]:
    """Builds the whole site; returns the pages' bytes. What was at `target` stays until the new site is whole.

    Raises ValueError with what is wrong: a cell that fails, a chapter out of step, a warning of Sphinx.
    """
    editions = [edition for name in notebooks.names(folder) for edition in notebooks.editions(name, folder)]
    editions.sort(key=lambda edition: (edition.name != "index", edition.name))
    if unknown := (alive or set()) - {edition.name for edition in editions}:
        raise ValueError(
            f"no notebook {sorted(unknown)[0]!r}: there are {', '.join(e.name for e in editions)}"
        )
    results = gather(editions, alive, jobs or max(1, min(4, os.cpu_count() or 1)), runs)
    made = make_pages(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".site-", ignore_cleanup_errors=True) as work:
        output = lay_out(made, Path(work))
        sizes = weigh(output, list(made))
        put_in_place(output, target)
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the site and says where it is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lora_edu.site", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="sliders live in these only, e.g. 01_low_rank: quicker, to look at one",
    )
    parser.add_argument(
        "--jobs", type=int, help="notebooks run at a time (default: one for each core, four at most)"
    )
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        repository()
        sizes = build(alive=set(chosen.names) or None, jobs=chosen.jobs)
    except (FileNotFoundError, ValueError) as error:
        print(f"the site was not built: {error}", file=sys.stderr)
        return 1
    for name, size in sizes.items():
        print(f"{name:36} {size / 1e6:5.2f} MB")
    whole = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{len(sizes)} pages, {whole / 1e6:.0f} MB, {time.perf_counter() - began:.0f} s")
    print(f"Open {TARGET / 'index.html'}, or put the folder on any static host.")
    return 0
