"""Where files go: the reader's folder, `~`, and a file that is whole or not there."""

from pathlib import Path

import pytest

from lora_edu import paths
from lora_edu.data import shipped


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(home, monkeypatch):
    assert paths.expanded("~/a/b") == paths.expanded(Path("~/a/b")) == home / "a" / "b"
    assert paths.expanded("a/~/b") == Path("a/~/b"), "only at the beginning"
    assert paths.expanded("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    monkeypatch.setenv("LORA_EDU_HOME", "~/mine")
    assert paths.user_folder("notebooks") == home / "mine" / "notebooks"
    assert paths.user_folder("notebooks").is_dir()
    monkeypatch.setenv("LORA_EDU_DATA", "~/data")
    assert shipped.data_folder() == home / "data"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    paths.write_atomically(path, b"one")
    with pytest.raises(TypeError):
        paths.write_atomically(path, "no bytes")
    assert path.read_bytes() == b"one" and [each.name for each in path.parent.iterdir()] == ["file"]
