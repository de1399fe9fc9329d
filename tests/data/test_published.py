"""Published models: got through pip, checked and kept as tensors; without them, what was recorded is there."""

import hashlib
import importlib.metadata
import io
import os
import pickle
import re
import zipfile

import pytest
import torch

from lora_edu.data import published, shipped
from lora_edu.data.published import Package, PublishedError
from lora_edu.recording import make

# Not by find_spec: looking for pip switches setuptools' distutils off, and then torch can compile no more.
HAS_PIP = any(each.metadata["Name"] == "pip" for each in importlib.metadata.distributions())
pip = pytest.mark.skipif(not HAS_PIP, reason="this Python has no pip")


def saved(value: object) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def wheel(folder, checkpoint: bytes):
    """A wheel of a package `tiny-reactions` with one checkpoint and a vocabulary."""
    path = folder / "tiny_reactions-0.1.0-py3-none-any.whl"
    about = "tiny_reactions-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_reactions/model.bin", checkpoint)
        archive.writestr("tiny_reactions/vocab.txt", "[PAD]\nC\nO\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-reactions\nVersion: 0.1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """make(checkpoint) puts a package `tiny` where pip looks, and nowhere else does pip look."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def make_package(checkpoint: bytes, **changes) -> Package:
        file = wheel(tmp_path / "wheels", checkpoint).read_bytes()
        entry = ("tiny_reactions/model.bin", hashlib.sha256(checkpoint).hexdigest())
        package = Package(
            "tiny-reactions==0.1.0",
            hashlib.sha256(file).hexdigest(),
            len(file),
            "a test",
            {"base": entry},
            {"vocab.txt": "tiny_reactions/vocab.txt"},
        )._replace(**changes)
        monkeypatch.setitem(published.PUBLISHED, "tiny", package)
        return package

    return make_package


@pip
def test_a_model_is_got_once_through_pip_and_read_as_tensors(index, monkeypatch):
    table = torch.randn(4, 3)
    index(saved({"table": table, "head": table, "bias": torch.zeros(2)}))  # tied, as in BERT
    said = []
    place = published.fetch("tiny", said.append)
    state = published.load_published("tiny", "base")
    assert state["table"].equal(table) and state["head"].equal(table) and len(state) == 3
    assert published.load_vocabulary("tiny") == {"[PAD]": 0, "C": 1, "O": 2}
    assert "tiny-reactions==0.1.0" in said[0]
    monkeypatch.setattr(published, "_download", lambda *_: pytest.fail("it is here already"))
    assert published.fetch("tiny", said.append) == place and "already" in said[-1]


@pip
def test_without_a_network_one_line_says_what_to_do(index, tmp_path, capsys):
    index(saved({}), requirement="tiny-reactions==0.2.0")
    with pytest.raises(PublishedError, match=r"pip did not get .*==0\.2\.0 .*No matching.*the chapter shows"):
        published.fetch("tiny")
    assert not published.is_fetched("tiny")


@pip
def test_a_wheel_or_a_checkpoint_that_is_another_is_not_opened(index):
    right = index(saved({"W": torch.ones(2)}))
    index(saved({"W": torch.ones(2)}), sha256="0" * 64)
    with pytest.raises(
        PublishedError, match=r"tiny_reactions-0.1.0.*expected 000000000000….*nothing was kept"
    ):
        published.fetch("tiny", print)
    path, _ = right.checkpoints["base"]
    index(saved({"W": torch.ones(2)}), checkpoints={"base": (path, "f" * 64)})
    with pytest.raises(PublishedError, match=r"model.bin has the sha256 .*expected ffffffffffff…"):
        published.fetch("tiny", print)
    assert not published.is_fetched("tiny")


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code from a file was run",))


@pip
def test_code_in_a_checkpoint_is_not_run(index):
    index(pickle.dumps({"W": Hostile()}))
    with pytest.raises(PublishedError, match="more than tensors, so it is not opened"):
        published.fetch("tiny", print)


@pip
def test_a_file_that_changed_since_is_refused(index):
    index(saved({"W": torch.ones(2)}))
    path = published.fetch("tiny", print) / "base.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PublishedError, match=r"delete .* and fetch it again"):
        published.load_published("tiny", "base")


def test_what_is_not_there_says_the_command_and_an_unknown_name_lists_the_known(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path))
    with pytest.raises(PublishedError, match=r"not on this machine.*`lora-edu data --published rxnfp`"):
        published.load_published("rxnfp", "base")
    with pytest.raises(PublishedError, match="it has base.safetensors, tuned.safetensors"):
        published.load_published("rxnfp", "bert")
    with pytest.raises(PublishedError, match="'gpt-5' is no published model of the course; there are: rxnfp"):
        published.is_fetched("gpt-5")


def test_the_command_gets_a_model_and_makes_nothing(monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr(published, "fetch", got.append)
    monkeypatch.setattr(make.Maker, "run", lambda *_: pytest.fail("nothing is made"))
    assert make.main(["--published", "rxnfp", "--out", str(tmp_path / "out")]) == 0
    assert got == ["rxnfp"] and not (tmp_path / "out").exists()


# ---- what ships --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return published.load_recorded("rxnfp")


def test_the_record_is_small_and_holds_spectra_of_both_updates_and_of_the_base(recorded):
    assert shipped.data_file("published_rxnfp.safetensors").stat().st_size <= 150_000
    for which in ("base", "tuned", "tuned_50"):
        for kind in ("query", "key", "value", "output", "up", "down"):
            S = recorded.tensors[f"{which}/{kind}"]
            assert S.shape == (12, 256) and (S.diff(dim=1) <= 0).all() and (S >= 0).all()
    for key, value in recorded.tensors.items():
        if key.startswith("overlap"):
            assert ((value >= 0) & (value <= 1.001)).all(), key


def test_the_record_shows_two_fine_tunes_of_one_base(recorded):
    """W_o and both tuned W point the same way, the two ΔW hardly; the pooler alone was trained from scratch."""
    for kind in ("query", "key", "value", "output", "up", "down"):
        between, first, second, _ = recorded.tensors[f"cosine/{kind}"].mean(0).tolist()
        assert first > 0.95 and second > 0.99 and between < 0.2
    assert recorded.tensors["cosine/pooler"][0, 1] < 0.6


def test_the_reactions_are_well_formed_and_the_model_knows_every_token(recorded):
    from lora_edu.recording.published import tokens

    vocabulary = {token: number for number, token in enumerate(recorded.facts["vocabulary"])}
    reactions = published.load_reactions()
    assert len(reactions) == recorded.facts["reactions"] >= 100
    for reaction in reactions:
        assert len(tokens(reaction, vocabulary)) < 512
        assert reaction.count(">>") == 1 and all(reaction.split(">>"))
        for molecule in re.split(r">>|\.", reaction):
            plain = re.sub(r"\[[^\]]*\]", "", molecule)
            assert plain.count("(") == plain.count(")"), molecule
            assert all(plain.count(digit) % 2 == 0 for digit in "123456789"), f"a ring stays open: {molecule}"


def test_the_recorded_decisions_rise_with_the_rank_and_the_cut_ends_at_the_tuned_model(recorded):
    ranks = [0, *recorded.facts["ranks"]]
    classes, divergence = recorded.tensors["classes"], recorded.tensors["divergence"].mean(1)
    kept = (classes == classes[len(ranks)]).float().mean(1)
    assert (kept[: len(ranks)].diff() > 0).all() and kept[0] < 0.15 and kept[len(ranks) - 1] > 0.95
    assert (divergence[: len(ranks)].diff() < 0).all() and divergence[len(ranks)] == 0
    assert recorded.facts["energy"] == sorted(recorded.facts["energy"])
