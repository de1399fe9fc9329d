"""`lora-edu lab`: JupyterLab on the reader's own copies of the chapters, set up so that sliders stay alive.

Copies are made once and belong to the reader: nothing here writes over a cell that a reader has changed.
"""

import argparse
import hashlib
import json
import os
import sys
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lora_edu.paths import repository, user_folder, write_atomically

SETTINGS = {
    # An explorer that was run, saved and opened again shows its pictures without a kernel.
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
PAGE = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
RECORD = ".copies.json"  # the version that each copy was made from


def main(arguments: Sequence[str]) -> int:
    """Bring the reader's copies up to date, then run JupyterLab in this process until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="lora-edu lab", description="Open the chapters in JupyterLab.", allow_abbrev=False
    )
    parser.add_argument("--port", type=int, default=8888, help="where to listen (the next free one if taken)")
    parser.add_argument("--no-browser", action="store_true", help="print the link and open nothing")
    parser.add_argument("--copy-only", action="store_true", help="make the copies, say where, and stop")
    own, for_jupyter = parser.parse_known_args(arguments)
    folder = user_folder("notebooks")
    for line in update_copies(repository() / "notebooks", folder):
        print(line)
    print(f"Your copies are in {folder}", flush=True)
    if own.copy_only:
        return 0
    os.environ |= environment(user_folder("lab"))
    from jupyterlab.labapp import LabApp

    LabApp.launch_instance([*server_arguments(folder, own.port, own.no_browser), *for_jupyter])
    return 0


def update_copies(source: Path, target: Path) -> Iterator[str]:
    """Copy what the reader lacks, renew what they have not edited, put a newer version beside what they have.

    Running a notebook is no edit; changing, adding or removing a cell is. A deleted copy comes back; a newer
    version is offered once. Yields what a reader should know, a line each.
    """
    try:
        made_from = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        made_from = {}
    for original in sorted(path for path in source.rglob("*") if path.is_file()):
        name = original.relative_to(source)
        if name.parts[0] == "source" or any(part.startswith((".", "__")) for part in name.parts):
            continue
        now, key = fingerprint(original), name.as_posix()
        copy = target / name
        if copy.exists() and made_from.get(key) == now:
            continue
        if copy.exists() and fingerprint(copy) not in (made_from.get(key), now):
            copy = copy.with_name(f"{copy.stem}.new{copy.suffix}")
            key = copy.relative_to(target).as_posix()
            offered = made_from.get(key)
            if offered == now or (copy.exists() and fingerprint(copy) != offered):
                continue
            yield f"{name} has a newer version: your edited copy stays, the new one is {copy.name} beside it"
        elif copy.exists() and fingerprint(copy) != now:
            yield f"{name} has a newer version: your copy had no edits of yours and was renewed"
        write_atomically(copy, original.read_bytes())
        made_from[key] = now
    write_atomically(target / RECORD, json.dumps(made_from, indent=1, sort_keys=True).encode())


def fingerprint(path: Path) -> str:
    """A hash of a notebook's cells as written (not of outputs or counts), of any other file's bytes."""
    content = path.read_bytes()
    if path.suffix == ".ipynb":
        try:
            cells = [[cell["cell_type"], "".join(cell["source"])] for cell in json.loads(content)["cells"]]
            content = json.dumps(cells).encode()
        except (ValueError, KeyError, TypeError):
            pass  # no notebook any more: its bytes will do
    return hashlib.sha256(content).hexdigest()


def environment(folder: Path) -> dict[str, str]:
    """Write our JupyterLab settings into `folder`; returns the variables that make JupyterLab find them.

    They are defaults: what a reader sets in JupyterLab itself counts for more.
    """
    for name, content in (("default_setting_overrides", SETTINGS), ("page_config", PAGE)):
        write_atomically(folder / "labconfig" / f"{name}.json", json.dumps(content, indent=1).encode())
    before = os.environ.get("JUPYTER_CONFIG_PATH")
    return {"JUPYTER_CONFIG_PATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def server_arguments(folder: Path, port: int, no_browser: bool) -> list[str]:
    """JupyterLab's command line: the index first, one Ctrl-C to stop, root allowed where we are root."""
    arguments = [
        f"--ServerApp.root_dir={folder}",
        "--LabApp.default_url=/lab/tree/index.ipynb",
        f"--ServerApp.port={port}",
        "--ServerApp.log_level=WARN",
        "--ServerApp.answer_yes=True",
        "--LabApp.news_url=None",
    ]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        arguments.append("--ServerApp.allow_root=True")
    if no_browser or not has_browser(os.environ):
        arguments.append("--ServerApp.open_browser=False")
    return arguments


def has_browser(variables: Mapping[str, str]) -> bool:
    """Whether a browser can be opened for the person at this machine: a display, no remote shell, no CI."""
    if any(variables.get(name) for name in ("SSH_CONNECTION", "CI")):
        return False
    if sys.platform == "linux" and not any(
        variables.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME", "BROWSER")
    ):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True
