"""Where files go: the repository's own folders, and the reader's folder, the only place that notebooks write to."""

import json
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def repository() -> Path:
    """The clone that this package lies in, with the chapters and their data beside it.

    Raises FileNotFoundError, in one line, where the package was installed without it.
    """
    if not (REPOSITORY / "notebooks").is_dir():
        raise FileNotFoundError(
            f"the chapters and their data are not beside the package (looked in {REPOSITORY}): clone the "
            "repository and run `make lab` there, or `pip install -e .`, which keeps the two together"
        )
    return REPOSITORY


def expanded(path: str | os.PathLike) -> Path:
    """A path as people write it: `~` is their home folder, also where no shell saw it (in quotes, in a file)."""
    return Path(os.path.expanduser(path))


def user_folder(*below: str) -> Path:
    """The reader's folder (LORA_EDU_HOME, or the system's usual place for user data), made if need be."""
    home = os.environ.get("LORA_EDU_HOME")
    if home:
        folder = expanded(home)
    else:
        import platformdirs  # here: whoever only asks where the repository is needs no library

        folder = platformdirs.user_data_path("lora-edu")
    folder = folder.joinpath(*below)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file, then put it in its place: a reader sees the old file or the new one, never a part."""
    import tempfile  # here, since it costs more than all the rest of this module

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, record: dict) -> None:
    """A record as JSON that people can read and `git diff` can compare, written atomically."""
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
