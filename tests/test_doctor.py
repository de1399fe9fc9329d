"""`lora-edu doctor`: it finds what a chapter lacks, and says how to get it."""

import json
import shutil
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes

from lora_edu import doctor
from lora_edu.data.shipped import data_folder


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    source = "%matplotlib inline\nimport no_such_package.part\nfrom lora_edu.data import load_checkpoint, load_corpus"
    cells = [new_markdown_cell("import nothing_at_all"), new_code_cell(source)]
    path = tmp_path / "99_try.ipynb"
    path.write_text(writes(new_notebook(cells=cells)), encoding="utf-8")
    return path


def test_a_missing_package_is_named(chapter):
    assert doctor.lacking(chapter) == ["the package no_such_package.part is missing"]


def test_a_package_that_a_chapter_can_do_without_is_not_missing():
    without = "try:\n    from nowhere_a import f\nexcept ImportError:\n    f = None\n"
    needed = "try:\n    import nowhere_b\nexcept ValueError:\n    pass\n"
    assert doctor.read_code(without)[0] == set() and doctor.read_code(needed)[0] == {"nowhere_b"}


def test_damaged_data_counts_for_a_chapter_that_loads_it(chapter):
    lacks = doctor.lacking(chapter, ["base.safetensors"])
    assert "data/ is not whole (base.safetensors): `git checkout -- data` brings it back" in lacks


def test_a_python_without_its_source_counts_for_a_chapter_that_reads_it(chapter, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert any("without its library's source" in line for line in doctor.lacking(chapter))


def test_no_data_at_all_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path))
    ((name, right, message),) = doctor.data_files()
    assert name == "MANIFEST.json" and not right
    assert "make data" in message and "git checkout -- data" in message


def test_a_damaged_file_is_named_and_fails_the_report(monkeypatch, tmp_path, capsys):
    whole = shutil.copytree(data_folder(), tmp_path / "data")
    name = next(iter(json.loads((whole / "MANIFEST.json").read_text(encoding="utf-8"))["files"]))
    content = bytearray((whole / name).read_bytes())
    content[len(content) // 2] ^= 1
    (whole / name).write_bytes(content)
    monkeypatch.setenv("LORA_EDU_DATA", str(whole))
    wrong = {file: message for file, right, message in doctor.data_files() if not right}
    assert list(wrong) == [name] and "damaged" in wrong[name]
    assert doctor.main([]) == 1
    assert f"WRONG  {name}" in capsys.readouterr().out


def test_here_every_chapter_can_run():
    assert not [(name, lacks) for name, lacks in doctor.chapters() if lacks]
