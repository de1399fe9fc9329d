"""Chapter 03's last section: a reader puts their own paths into it, and their files must come out as they were."""

import re
from pathlib import Path

import jupytext
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from lora_edu import lowrank, notebooks
from lora_edu.paths import user_folder, write_atomically

WRITING = re.compile(r"write_atomically|write_bytes|save_file|open\(.*w|torch\.save|unlink|rename|replace\(")


def section() -> list[str]:
    """The code cells of 'Your own two checkpoints', in order."""
    source = notebooks.FOLDER / "source" / "03_finetuning_deltas.py"
    cells = jupytext.read(source).cells
    first = next(i for i, cell in enumerate(cells) if "Your own two checkpoints" in cell.source)
    last = next(i for i, cell in enumerate(cells) if "## What to remember" in cell.source)
    return [cell.source for cell in cells[first:last] if cell.cell_type == "code"]


def to_edit(cells: list[str]) -> int:
    """The number of the one cell that names the two paths."""
    (number,) = [i for i, cell in enumerate(cells) if re.search(r"^BEFORE = ", cell, re.MULTILINE)]
    return number


def edited(cell: str, before: Path, after: Path) -> str:
    """What a reader makes of it: their own paths on the right-hand sides."""
    cell, first = re.subn(r"^BEFORE = .*", f"BEFORE = Path({str(before)!r})", cell, flags=re.MULTILINE)
    cell, second = re.subn(r"^AFTER = .*", f"AFTER = Path({str(after)!r})", cell, flags=re.MULTILINE)
    assert first == second == 1
    return cell


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the cells before have defined, small."""
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path / "home"))
    base = {f"layer.{k}.weight": torch.randn(12, 8) for k in range(6)}
    tuned = {name: W + 0.1 * torch.randn(12, 8) for name, W in base.items()}
    from safetensors.torch import save

    return {
        "base": base,
        "tuned": tuned,
        "torch": torch,
        "lowrank": lowrank,
        "load": load,
        "save": save,
        "Path": Path,
        "user_folder": user_folder,
        "write_atomically": write_atomically,
    }


def test_the_readers_checkpoints_are_read_and_never_written(tmp_path, names, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    paths = mine / "before.safetensors", mine / "after.safetensors"
    for path in paths:
        save_file({f"mine.{k}": torch.randn(9, 7) for k in range(6)}, path)
    contents = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    cells = section()
    cells[to_edit(cells)] = edited(cells[to_edit(cells)], *paths)
    for _ in range(2):  # 'Run All', and once more
        for cell in cells:
            exec(cell, names)
    assert [path.read_bytes() for path in paths] == contents
    assert [path.stat().st_mtime_ns for path in paths] == times
    assert sorted(path.name for path in mine.iterdir()) == ["after.safetensors", "before.safetensors"]
    assert "mine.0" in capsys.readouterr().out


def test_the_cell_to_edit_writes_nothing_and_what_is_written_lies_in_the_readers_folder(tmp_path, names):
    cells = section()
    assert not WRITING.search(cells[to_edit(cells)])
    writing = [cell for cell in cells if WRITING.search(cell)]
    assert writing and not any("BEFORE" in cell or "AFTER" in cell for cell in writing)
    for cell in cells:
        exec(cell, names)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and all(path.is_relative_to(tmp_path / "home" / "chapter_03") for path in written)
    assert load_file(written[0])["layer.0.weight"].dtype == torch.bfloat16


def test_an_edit_like_the_one_before_would_be_caught(tmp_path, names):
    """The cell as it once was: paths that the reader edits, written to in the same cell."""
    path = tmp_path / "before.safetensors"
    save_file({"mine.0": torch.ones(2)}, path)
    content = path.read_bytes()
    once = "BEFORE = x\nAFTER = x\nwrite_atomically(BEFORE, save({'a': torch.zeros(1)}))"
    exec(edited(once, path, path), names)
    assert path.read_bytes() != content and WRITING.search(once)
