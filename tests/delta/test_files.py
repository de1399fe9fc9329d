"""Checkpoints on disk: what is read is what safetensors reads, and a damaged or hostile file gets one clear line."""

import json
import os
import pickle
import struct
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from lora_edu import cli
from lora_edu.delta import CheckpointError, files, open_checkpoint

STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.arange(8.0).reshape(2, 2, 2).half(),
    "ids": torch.arange(4),
}
BYTES = save(STATE)


def packed(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(stored: files.Stored) -> torch.Tensor:
    return torch.cat([block for _, (block,) in files.blocks(stored)]).reshape(stored.shape)


# --- what is there ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from(list(files.FORMATS.values())),
    block=st.sampled_from([1, 7, 2**18]),
)
def test_every_tensor_is_what_the_safetensors_library_reads(tmp_path, shapes, dtype, block):
    state = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        found = open_checkpoint(path).tensors
        for name, expected in state.items():
            assert found[name].shape == tuple(expected.shape)
            if expected.numel():
                assert torch.equal(read(found[name]), expected)
    assert found.keys() == state.keys()


def shards(folder, state=STATE, weight_map=None) -> None:
    folder.mkdir(exist_ok=True)
    places = {name: f"model-{number:05}-of-00004.safetensors" for number, name in enumerate(state, 1)}
    for name, file in places.items():
        save_file({name: state[name]}, folder / file)
    index = {"metadata": {}, "weight_map": places if weight_map is None else weight_map | {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_file_a_folder_and_shards_hold_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    save_file(STATE, tmp_path / "one" / "model.safetensors")
    save_file(STATE, tmp_path / "renamed.bin")
    shards(tmp_path / "many")
    ways = ("one", "one/model.safetensors", "renamed.bin", "many", "many/model.safetensors.index.json")
    for way in ways:
        found = open_checkpoint(tmp_path / way)
        assert found.tensors.keys() == STATE.keys() and not found.notes
        assert all(
            torch.equal(read(found.tensors[name]), STATE[name]) for name in ("a.weight", "b.bias", "c.weight")
        )


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_the_cache_of_hugging_face_is_a_folder_of_links(tmp_path):
    """snapshots/REVISION/model-….safetensors → ../../blobs/HASH; the same link elsewhere leaves its folder."""
    shards(tmp_path / "blobs")
    (tmp_path / "snapshots" / "1a2b").mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshots" / "1a2b" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(tmp_path / "snapshots" / "1a2b").tensors.keys() == STATE.keys()
    (tmp_path / "snapshots").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(tmp_path / "elsewhere" / "1a2b")


def test_what_the_index_does_not_name_is_said(tmp_path):
    state = {name: STATE[name] for name in ("a.weight", "b.bias")}
    shards(tmp_path, state)
    save_file(STATE, tmp_path / "model-00001-of-00004.safetensors")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00004.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).notes == ["2 tensors are in its shards but not in its index"]


# --- what is damaged or hostile -----------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, (f"\"{sys.executable}\" -c \"open('executed', 'w')\"",)


def torch_saved(path) -> bytes:
    torch.save({"w": Bomb()}, path)
    return path.read_bytes()


HEADER_LENGTH = struct.unpack("<Q", BYTES[:8])[0]
FILES = {
    "empty": (b"", "m.safetensors is empty"),
    "three bytes": (b"abc", "is no safetensors file"),
    "text": (b"once upon a time there was a model", "is no safetensors file"),
    "zeros": (bytes(100), "is no safetensors file"),
    "cut in the header": (BYTES[:60], "truncated or damaged: its header should have"),
    "cut in the data": (BYTES[:-3], "truncated: 3 bytes are missing"),
    "bytes after the end": (BYTES + b"xx", "2 bytes too long"),
    "a header of 2⁶³ bytes": (
        struct.pack("<Q", 2**63) + b"{" + bytes(50),
        "truncated or damaged: its header",
    ),
    "no JSON": (packed(b"{not json at all}"), "no JSON text"),
    "no UTF-8": (packed(b'{"\xff\xfe": 1}'), "no JSON text"),
    "endless brackets": (packed(b'{"a":' + b"[" * 100_000), "no JSON text"),
    "a number of 10⁵ digits": (packed(b'{"a":' + b"9" * 100_000 + b"}"), "no JSON text"),
    "not an object in the header": (packed({"a": 3}), "needs dtype, shape and data_offsets"),
    "no offsets": (
        packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        "needs dtype, shape and data_offsets",
    ),
    "negative shape": (packed({"a": tensor(0, 4, [-1, -1])}, bytes(4)), "needs dtype, shape"),
    "true as a side": (packed({"a": tensor(0, 4, [True])}, bytes(4)), "needs dtype, shape"),
    "a fraction as a side": (packed({"a": tensor(0, 4, [1.0])}, bytes(4)), "needs dtype, shape"),
    "more sides than bytes": (packed({"a": tensor(0, 4, [2**40, 2**40])}, bytes(4)), "that agree"),
    "a million axes": (packed({"a": tensor(0, 4, [2**40] * 10**6)}, bytes(4)), "that agree"),
    "offsets turned round": (packed({"a": tensor(4, 0, [1])}, bytes(4)), "needs dtype, shape"),
    "overlap": (
        packed({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
        "b overlaps what is before it",
    ),
    "a gap": (packed({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)), "b leaves a gap"),
    "past the end": (packed({"a": tensor(0, 400, [100])}, bytes(12)), "truncated: 388 bytes are missing"),
    "one name twice": (packed(b'{"a": {}, "a": {}}'), "a name stands in it twice"),
    "a pickle": (pickle.dumps(Bomb()), "is a pickle.*can run any code.*save_file"),
    "a zip archive": (torch_saved, "pickle in a zip.*can run any code.*save_file"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_or_foreign_file_is_one_line_and_status_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = FILES[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
    good = tmp_path / "good.safetensors"
    good.write_bytes(BYTES)
    for pair in ((path, good), (good, path)):
        assert cli.main(["delta", *map(str, pair)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("lora-edu delta: ") and err.count("\n") == 1 and len(err) < 500
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_refused_by_name_with_the_way_out(suffix, tmp_path):
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(pickle.dumps(Bomb(), protocol=0))
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"pytorch_model{suffix} is a pickle.*weights_only=True"):
            open_checkpoint(place)


def index_of(folder, weight_map: object) -> None:
    shards(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


GOOD = "model-00001-of-00004.safetensors"
INDICES = {
    "up and out": ({"a.weight": "../good.safetensors"}, "names ../good.safetensors, which leaves the folder"),
    "absolute": ({"a.weight": "/etc/passwd"}, "leaves the folder: it is refused"),
    "a drive": ({"a.weight": "C:\\good.safetensors"}, "leaves the folder"),
    "a backslash": ({"a.weight": "..\\good.safetensors"}, "leaves the folder"),
    "a zero byte": ({"a.weight": "a\0b"}, "leaves the folder"),
    "no name": ({"a.weight": ""}, "leaves the folder"),
    "the folder itself": ({"a.weight": "."}, "is missing"),
    "missing": ({"a.weight": "model-9.safetensors"}, "the shard model-9.safetensors.*is missing"),
    "a number": ({"a.weight": 3}, "must name files"),
    "empty": ({}, "must have a weight_map"),
    "a list": ([1, 2], "must have a weight_map"),
    "not in its shard": ({"a.weight": GOOD, "z": GOOD}, "z is in model-00001.*but it isn't"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_lies(case, tmp_path, capsys):
    (tmp_path / "good.safetensors").write_bytes(BYTES)
    weight_map, message = INDICES[case]
    index_of(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")
    assert cli.main(["delta", str(tmp_path / "good.safetensors"), str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", '{"weight_map": {"a": "b", "a": "c"}}'])
def test_an_index_that_is_no_json_object(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is damaged"):
        open_checkpoint(tmp_path)


def test_one_tensor_in_two_shards(tmp_path):
    shards(tmp_path, {"a.weight": STATE["a.weight"], "b.bias": STATE["b.bias"]})
    save_file(STATE, tmp_path / "model-00002-of-00004.safetensors")
    with pytest.raises(CheckpointError, match="a.weight is in two shards"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_shard_that_is_a_link_out_of_the_folder(tmp_path):
    save_file(STATE, tmp_path / "good.safetensors")
    index_of(tmp_path / "model", dict.fromkeys(STATE, "shard.safetensors"))
    (tmp_path / "model" / "shard.safetensors").symlink_to(tmp_path / "good.safetensors")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(tmp_path / "model")


def test_folders_without_a_checkpoint_or_with_several(tmp_path):
    with pytest.raises(CheckpointError, match="there is no .*nowhere.*Nothing is fetched"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no weights: a model's folder has model.safetensors"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several.*a.safetensors, b.safetensors.*name one"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="model.safetensors must be a file"):
        open_checkpoint(tmp_path)


def test_a_name_from_a_file_cannot_write_on_the_terminal(tmp_path):
    name = "\x1b[2J\x1b]0;title\x07" + "x" * 500
    (tmp_path / "m.safetensors").write_bytes(packed({name: tensor(0, 4, [7])}, bytes(4)))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path / "m.safetensors")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_a_file_cut_while_it_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(BYTES)
    stored = open_checkpoint(path).tensors["a.weight"]
    path.write_bytes(BYTES[:40])
    with pytest.raises(CheckpointError, match="ended early: it was changed"):
        read(stored)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_changed_bytes_is_refused_or_read_as_the_library_reads_it(tmp_path, data):
    """Whatever the library refuses is refused here too; but a format that it doesn't know is only listed."""
    content = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, HEADER_LENGTH + 12))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2]))]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, framework="pt") as file:
            theirs = set(file.keys())
    except SafetensorError:
        theirs = None
    try:
        found = open_checkpoint(path).tensors
    except CheckpointError:
        return
    if any(stored.format not in files.BITS for stored in found.values()):
        return
    assert theirs == found.keys()
    state = load(bytes(content))
    for name, stored in found.items():
        if stored.format in files.FORMATS:
            assert torch.equal(read(stored).nan_to_num(), state[name].nan_to_num())
