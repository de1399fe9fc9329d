"""Adapters on disk: written whole or not at all, and no file, however broken, harms the model that it is opened on.

What PEFT makes of them is in tests/interop.
"""

import copy
import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tiny_models import TOKENS, portrait, tiny, train
from torch import nn

from lora_edu.lora import (
    AdapterError,
    LoRAEmbedding,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    read_adapter,
    remove_lora,
    save_adapter,
    write_adapter,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["embedding", "query", "mlp.2"]
QUERY = "base_model.model.blocks.0.attention.query"


def tuned(rank=2, alpha=4, targets=TARGETS, seed=0, **options) -> nn.Module:
    model = add_lora(tiny(), rank, alpha, targets, **options)
    torch.manual_seed(seed + 1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_adapter(tuned(), tmp_path / "adapter")


# Round trips


@settings(max_examples=40, deadline=None)
@given(
    st.sets(
        st.sampled_from(["embedding", "query", "value", "mlp.0", "mlp.2", "head", "0.attention.key"]),
        min_size=1,
    ),
    st.integers(1, 7),
    st.sampled_from([1, 16, 0.5, -2]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_round_trip_is_exact(tmp_path_factory, targets, rank, alpha, rank_stabilised, dtype):
    folder = tmp_path_factory.mktemp("round")
    targets = sorted(targets)
    ranks = {target: rank + number % 2 for number, target in enumerate(targets)}
    alphas = {target: alpha * (1 + number % 3) for number, target in enumerate(targets)}
    model = add_lora(
        tiny().to(dtype), ranks, alphas, targets, rank_stabilised=rank_stabilised, dropout=0.25
    ).eval()
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=0.1)
    assert save_adapter(model, folder, base_model_name="a base") == folder
    again = load_adapter(tiny().to(dtype).eval(), folder)
    assert torch.equal(again(TOKENS), model(TOKENS))
    for name, layer in lora_layers(model).items():
        other = lora_layers(again)[name]
        assert type(other) is type(layer) and (other.rank, other.scaling) == (layer.rank, layer.scaling)
        assert other.lora_A.dtype == dtype and torch.equal(other.lora_A, layer.lora_A)
        assert getattr(other, "dropout", 0.25) == 0.25
        expected = layer.delta_weight()
        read = read_adapter(folder).layers[name].delta_weight()
        assert torch.allclose(read.to(dtype), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6)
    assert json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"] == "a base"
    assert sorted(each.name for each in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """In a notebook no shell puts it in."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert save_adapter(tuned(), "~/mine") == tmp_path / "mine"
    load_adapter(tiny(), "~/mine")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nothing"))):
        load_adapter(tiny(), "~/nothing")


def test_loaded_model_trains_and_lets_go(folder):
    model = tiny()
    before = portrait(model)
    load_adapter(model, folder)
    start = copy.deepcopy(model.state_dict())
    train(model)
    moved = {name for name, each in model.state_dict().items() if not torch.equal(each, start[name])}
    assert moved and all(".lora_" in name for name in moved)
    remove_lora(model)
    assert portrait(model) == before


def test_saving_a_merged_or_compiled_model_is_the_same(tmp_path):
    model = tuned()
    plain = save_adapter(model, tmp_path / "plain")
    merge_lora(model)
    merged = save_adapter(torch.compile(model, backend="eager"), tmp_path / "merged")
    for name in (CONFIG, WEIGHTS):
        assert (plain / name).read_bytes() == (merged / name).read_bytes()


def test_a_wider_file_keeps_its_dtype(folder):
    model = load_adapter(tiny().bfloat16(), folder)
    assert {each.lora_A.dtype for each in lora_layers(model).values()} == {torch.float32}
    save_adapter(tuned().bfloat16(), folder)
    model = load_adapter(tiny(), folder)
    assert {each.lora_A.dtype for each in lora_layers(model).values()} == {torch.float32}


def test_tied_model_is_adapted_on_one_side(tmp_path):
    model = add_lora(tiny(tied=True), 2, 4, "embedding", tied="separate")
    nn.init.normal_(model.embedding.lora_A)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny(tied=True), tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    merge_lora(again)
    assert torch.equal(again.head.weight, model.head.weight)


# Written whole or not at all


def test_other_files_stay_and_old_ones_go(folder):
    (folder / "README.md").write_text("mine", encoding="utf-8")
    model = tuned(3, 6, ["key"])
    save_adapter(model, folder)
    assert sorted(each.name for each in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert torch.equal(load_adapter(tiny().eval(), folder)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("how", ["fails", "dies"])
def test_interrupted_saving_leaves_old_or_new_or_nothing(folder, monkeypatch, step, how):
    """Renaming fails at the given step; or the process dies there, so that nothing else happens on the disk."""
    old, new = tuned(), tuned(2, 32, TARGETS, seed=5)  # same names and shapes: a mix would load
    calls, dead = [], False
    replace, unlink = os.replace, Path.unlink

    def failing(source, target):
        nonlocal dead
        calls.append(target)
        if dead or len(calls) == step + 1:
            dead = how == "dies"
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(Path, "unlink", lambda path, **options: None if dead else unlink(path, **options))
    with pytest.raises(PermissionError):
        save_adapter(new, folder)
    monkeypatch.undo()
    try:
        loaded = load_adapter(tiny().eval(), folder)(TOKENS)
    except FileNotFoundError:
        assert how == "dies"
    else:
        assert torch.equal(loaded, old(TOKENS))
    if how == "fails":
        assert sorted(each.name for each in folder.iterdir()) == [CONFIG, WEIGHTS]
    save_adapter(new, folder)  # and afterwards it works
    assert torch.equal(load_adapter(tiny().eval(), folder)(TOKENS), new(TOKENS))


def test_full_disk(tmp_path, monkeypatch):
    folder = save_adapter(tuned(), tmp_path)
    monkeypatch.setattr(
        "lora_edu.lora.peft_format.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        save_adapter(tuned(seed=3), folder)
    assert sorted(each.name for each in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(load_adapter(tiny().eval(), folder)(TOKENS), tuned()(TOKENS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny, "no LoRA layer to save; add_lora it first"),
        (lambda: broken(tuned()), r"embedding: lora_embedding_A has entries that are infinite, NaN"),
        (lambda: tuned().to("meta"), "without data; not saved"),
        (lambda: add_lora(tuned(), 2, 4, "key", rank_stabilised=True), "one use_rslora for all layers"),
    ],
)
def test_what_cannot_be_saved(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        save_adapter(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def broken(model):
    model.embedding.lora_A.data[0, 0] = float("inf")
    return model


def test_other_trained_parameters_are_named(tmp_path):
    model = tuned()
    model.head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved, as they are not LoRA: head.weight"):
        save_adapter(model, tmp_path)


# Bad files: a clear error, and the model is as it was


def refused(folder: Path, message: str, model: nn.Module | None = None, error=AdapterError) -> None:
    model = tiny() if model is None else model
    before = portrait(model)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert portrait(model) == before


def configured(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text("utf-8")) | changes
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def with_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: each.clone() for name, each in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA; this adapter is IA3"),
        ({"peft_type": None}, "peft_type must be LORA"),
        ({"r": "2"}, "r must be a whole number above 0; got 2"),
        ({"r": 0}, "r must be a whole number above 0; got 0"),
        ({"r": True}, "r must be a whole number above 0; got True"),
        ({"r": 3}, r"has rank 2, but adapter_config.json says 3: the files don't match"),
        ({"rank_pattern": []}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"que(": 2}}, "is no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "too involved to be matched safely"),
        ({"alpha_pattern": {".*a.*a.*a.*a": 2}}, "too involved to be matched safely"),
        ({"alpha_pattern": {"query": "8"}}, "alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "alpha must be a finite number"),
        ({"lora_alpha": 10**400}, "adapter_config.json: int too large"),
        ({"lora_alpha": None}, "alpha must be a finite number"),
        ({"lora_dropout": 1.5}, "dropout must be at least 0 and below 1; got 1.5"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false; got yes"),
        ({"use_dora": True}, "use_dora=True isn't supported .DoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16 isn't supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq isn't supported"),
        ({"future_thing": {"on": 1}}, r"future_thing=.*isn't supported \(not known here\)"),
        ({"target_modules": None}, "target_modules must be a list of names or a pattern"),
        ({"target_modules": ["query", "mlp.2"]}, "adapts embedding, which target_modules doesn't name"),
    ],
)
def test_bad_configuration(folder, changes, message):
    configured(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON text"),
        (b"{", "is no JSON text"),
        (b"[1, 2]", "must hold an object; it holds a list"),
        (b"\xff\xfe{}", "is no JSON text"),
        (b"[" * 100_000, "is no JSON text"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "is no JSON text"),
        (b" " * (4 * 2**20 + 1), "must be at most 4194304 bytes"),
    ],
)
def test_configuration_that_is_no_json(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    refused(folder, message)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replaced(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"),
            "query has lora_A alone: the file is incomplete",
        ),
        (lambda tensors: tensors.clear(), "holds no LoRA tensor"),
        (replaced(f"{QUERY}.lora_A.weight", torch.ones(3, 8)), r"must be \(r, in\) and lora_B \(out, r\)"),
        (replaced(f"{QUERY}.lora_A.weight", torch.ones(8)), r"must be \(r, in\)"),
        (replaced(f"{QUERY}.lora_A.weight", torch.tensor(1.0)), r"must be \(r, in\)"),
        (
            replaced(f"{QUERY}.lora_A.weight", torch.ones(2, 9)),
            "query is 8 × 9 in the adapter and 8 × 8 in the model",
        ),
        (
            replaced(f"{QUERY}.lora_A.weight", torch.ones(2, 8).int()),
            "must be in F64, F32, F16, BF16; got I32",
        ),
        (
            replaced(f"{QUERY}.lora_A.weight", torch.full((2, 8), torch.nan)),
            "query.lora_A.weight has entries.*NaN",
        ),
        (replaced(f"{QUERY}.lora_embedding_A", torch.ones(2, 8)), "query has lora_. twice"),
        (replaced(f"{QUERY}.lora_magnitude_vector", torch.ones(8)), "query isn't supported: DoRA"),
        (replaced(f"{QUERY}.lora_B.bias", torch.ones(8)), "query has a bias in lora_B"),
        (replaced("base_model.model.head.bias", torch.ones(30)), "head.bias, which the model doesn't have"),
        (rename(f"{QUERY}.lora_A.weight", "query.lora_A.weight"), "name must start with base_model.model."),
        (rename(f"{QUERY}.lora_A.weight", f"{QUERY}.lora_A"), "query has lora_B alone"),
        (
            lambda tensors: [
                rename(f"{QUERY}.lora_{x}.weight", f"{QUERY}y.lora_{x}.weight")(tensors) for x in "AB"
            ],
            "for another model: 1 of its 5 layers are not in this one, such as blocks.0.attention.queryy",
        ),
        (
            lambda tensors: [
                rename(f"{QUERY}.lora_{x}.weight", f"base_model.model.../../etc.lora_{x}.weight")(tensors)
                for x in "AB"
            ],
            r"such as \.\./\.\./etc",
        ),
        (
            lambda tensors: [
                rename(f"{QUERY}.lora_{x}.weight", f"base_model.model.__class__.lora_{x}.weight")(tensors)
                for x in "AB"
            ],
            "such as __class__",
        ),
        (
            lambda tensors: [
                tensors.update({f"base_model.model.blocks.0.norm.lora_{x}.weight": torch.ones(s)})
                for x, s in (("A", (2, 8)), ("B", (8, 2)))
            ],
            "adapts blocks.0.norm, which target_modules doesn't name",
        ),
        (
            lambda tensors: [
                rename(
                    f"base_model.model.embedding.lora_embedding_{x}",
                    f"base_model.model.embedding.lora_{x}.weight",
                )(tensors)
                for x in "AB"
            ],
            "embedding is a linear layer in the adapter and a Embedding in the model",
        ),
        (
            rename("base_model.model.embedding.lora_embedding_A", "base_model.model.embedding.lora_A.weight"),
            "one factor of an embedding and one of a linear layer",
        ),
        (
            replaced("base_model.model." + "x" * 400, torch.ones(1)),
            "must start with base_model.model. and be short",
        ),
    ],
)
def test_bad_tensors(folder, change, message):
    with_tensors(folder, change)
    refused(folder, message)


def test_a_file_that_lacks_a_target_loads_with_a_warning_as_in_peft(folder):
    with_tensors(folder, lambda tensors: [tensors.pop(f"{QUERY}.lora_{x}.weight") for x in "AB"])
    model = tiny()
    with pytest.warns(UserWarning, match="names 1 layers that the file has no tensors for, such as blocks.0"):
        load_adapter(model, folder)
    assert "blocks.0.attention.query" not in lora_layers(model) and len(lora_layers(model)) == 4


@pytest.mark.parametrize(
    "pattern", [r".*\.0\..*(query|key)$", r"(.*\.)?query", r"blocks\.(0|1)\.attention\.query"]
)
def test_ranks_are_those_of_the_tensors_whatever_the_pattern(tmp_path, pattern):
    """The pattern need not even match as PEFT would match it: what was trained is in the tensors."""
    model = tuned({"query": 3, "mlp.2": 2}, targets=["query", "mlp.2"])
    folder = save_adapter(model, tmp_path / "adapter")
    configured(folder, r=2, rank_pattern={pattern: 3}, lora_alpha=4, alpha_pattern={})
    loaded = lora_layers(load_adapter(tiny(), folder))
    assert {name.rpartition(".")[2]: each.rank for name, each in loaded.items()} == {"query": 3, "2": 2}


def test_a_table_in_the_file_is_compared_in_the_coarser_dtype_and_else_taken(folder):
    table = tiny().head.weight.detach()
    with_tensors(folder, replaced("base_model.model.head.weight", table.bfloat16()))
    model = load_adapter(tiny(), folder)
    assert torch.equal(model.head.weight, table)  # the same base, rounded: the finer table stays
    with_tensors(folder, replaced("base_model.model.head.weight", table + 1))
    model = tiny()
    with pytest.warns(UserWarning, match="its own head.weight, other than the model's"):
        load_adapter(model, folder)
    assert torch.equal(model.head.weight, table + 1)
    remove_lora(model)
    assert torch.equal(model.head.weight, table)


def test_what_was_trained_beside_lora_is_loaded_saved_again_and_taken_out(folder, tmp_path):
    """modules_to_save, single token rows and LoRA, there and back."""
    rows = torch.full((2, 8), 5.0)
    with_tensors(folder, replaced("base_model.model.head.weight", torch.full((30, 8), 3.0)))
    with_tensors(folder, replaced("base_model.model.embedding.token_adapter.trainable_tokens_delta", rows))
    configured(folder, modules_to_save=["head"], trainable_token_indices={"embedding": [4, 7]})
    model = tiny()
    before = portrait(model)
    load_adapter(model, folder)
    assert model.head.weight.eq(3).all() and model.head.weight.requires_grad
    assert torch.equal(model.embedding.weight[[4, 7]], rows) and not model.embedding.weight.requires_grad
    with torch.no_grad():
        model.head.weight += 1
    save_adapter(model, tmp_path / "again")
    again = load_adapter(tiny(), tmp_path / "again")
    assert again.head.weight.eq(4).all() and torch.equal(again(TOKENS), model(TOKENS))
    remove_lora(model)
    assert portrait(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replaced("base_model.model.head.weight", torch.ones(34, 8)),
            r"call model.resize_token_embeddings\(34\)",
        ),
        (
            replaced("base_model.model.head.weight", torch.ones(30, 9)),
            "differs in size between the file and the",
        ),
        (
            replaced("base_model.model.embedding.token_adapter.trainable_tokens_delta", torch.ones(1, 8)),
            "token rows of embedding.weight don't fit trainable_token_indices",
        ),
    ],
)
def test_whole_tensors_that_do_not_fit(folder, change, message):
    with_tensors(folder, change)
    refused(folder, message)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        pickle.dumps({"a": 1}),
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**9) + b"{}",
        header(b"not json"),
        header(b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 999]}}'),
        header(
            b'{"a": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 4]}}', b"\0" * 4
        ),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"\0" * 4),
        header(b'{"a": {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
        header(b'{"a": ' * 10_000),
    ],
)
def test_weights_that_are_no_safetensors(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "adapter_model.safetensors is damaged or truncated")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated_weights(folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    refused(folder, "is damaged or truncated")


def test_missing_files(folder, tmp_path):
    refused(tmp_path / "nowhere", r"there is no adapter_config.json in .*nowhere", error=FileNotFoundError)
    (folder / WEIGHTS).rename(folder / "away")
    refused(folder, "there is no adapter_model.safetensors", error=FileNotFoundError)
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "../../secret"}}', encoding="utf-8")
    refused(folder, "adapter in several files .an index.json. isn't supported")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_opened(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "adapter_model.bin is a pickle, which can run any code")
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))  # under the right name too
    refused(folder, "is damaged or truncated")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.skipif(os.name == "nt", reason="links and devices of Unix")
def test_links_and_devices(folder, tmp_path):
    stored = (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(stored)  # as in a download cache
    load_adapter(tiny(), folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")
    refused(folder, "must be a file; it is something else")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, "must be a file; it is something else")


def test_model_that_has_lora_already(folder):
    refused(
        folder,
        "has LoRA already, on embedding; remove_lora it first",
        load_adapter(tiny(), folder),
        ValueError,
    )


@pytest.mark.parametrize("vocabulary", [29, 31])
def test_other_vocabulary(folder, vocabulary):
    refused(
        folder,
        rf"embedding is 30 × 8 in the adapter and {vocabulary} × 8 in the model",
        tiny(vocabulary=vocabulary),
    )


def test_a_layer_that_cannot_have_lora(folder):
    model = tiny()
    model.blocks[1].attention.query.register_forward_hook(lambda *_: None)
    refused(folder, "blocks.1.attention.query: Linear has hooks", model)


# Fuzzing


def outcome(folder: Path) -> str:
    """Either the adapter opens, and comes out again; or an AdapterError that can be read; never anything else."""
    model = tiny()
    before = portrait(model)
    try:
        load_adapter(model, folder)
    except (AdapterError, FileNotFoundError) as error:
        text = str(error)
        assert 10 < len(text.encode("utf-8")) < 1000 and text.isprintable(), text
    else:
        assert all(isinstance(each, LoRALinear | LoRAEmbedding) for each in lora_layers(model).values())
        model(TOKENS)
        remove_lora(model)
        assert portrait(model) == before
        return "opened"
    assert portrait(model) == before
    return "refused"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = save_adapter(tuned({"query": 2, "embedding": 3, "mlp.2": 2}), tmp_path_factory.mktemp("fuzz"))
    return folder, (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.data())
def test_fuzzed_bytes(shipped, data):
    """Bytes changed, cut out, doubled or cut off; most of them in the header, where they matter."""
    folder, config, weights = shipped
    files = {CONFIG: bytearray(config), WEIGHTS: bytearray(weights)}
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
        content = files[name]
        end = max(1, len(content) if data.draw(st.booleans()) else min(len(content), 900))
        at, size = data.draw(st.integers(0, end - 1)), data.draw(st.integers(1, 12))
        kind = data.draw(st.sampled_from(["change", "cut", "double", "end"]))
        if kind == "change":
            content[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del content[at : at + size]
        elif kind == "double":
            content[at:at] = content[at : at + size]
        else:
            del content[at:]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    outcome(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@fuzz
@given(st.data())
def test_fuzzed_configuration(shipped, data):
    folder, text, weights = shipped
    config = json.loads(text)
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(config)) | st.text(max_size=12))
        if data.draw(st.booleans()):
            config.pop(key, None)
        else:
            config[key] = data.draw(json_values)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(weights)
    outcome(folder)


@fuzz
@given(st.data())
def test_fuzzed_tensors(shipped, data):
    """Well-formed files with the wrong tensors in them."""
    folder, config, weights = shipped
    (folder / WEIGHTS).write_bytes(weights)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    for _ in range(data.draw(st.integers(1, 5))):
        old = data.draw(st.sampled_from(names))
        tensor = tensors.pop(old, torch.ones(2, 2))
        layer = old.rpartition(".lora_")[0]
        endings = ["lora_A.weight", "lora_B", "lora_embedding_A", "base_layer.weight", "weight"]
        new = data.draw(
            st.sampled_from(names)
            | st.text(max_size=30)
            | st.text(max_size=30).map("base_model.model.{}".format)
            | st.sampled_from([f"{layer}.{end}" for end in endings])
        )
        kind = data.draw(st.sampled_from(["rename", "shape", "dtype", "drop", "values"]))
        if kind == "shape":
            tensor = torch.ones(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        elif kind == "dtype":
            dtypes = [torch.int8, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn]
            tensor = tensor.to(data.draw(st.sampled_from(dtypes)))
        elif kind == "values" and tensor.is_floating_point() and tensor.numel() and tensor.itemsize > 1:
            tensor = tensor.clone()
            tensor.view(-1)[0] = data.draw(st.floats(width=16))
        if kind != "drop":
            tensors[new if kind == "rename" else old] = tensor.contiguous()
    try:
        content = save(tensors)
    except UnicodeEncodeError:  # half of a surrogate pair can't be written
        return
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_bytes(config)
    outcome(folder)


def test_fuzzing_reaches_both_outcomes(shipped):
    folder, config, weights = shipped
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    assert outcome(folder) == "opened"
    (folder / WEIGHTS).write_bytes(weights[:-1])
    assert outcome(folder) == "refused"


def test_messages_are_plain_text(folder):
    configured(folder, **{"\x1b[31m\u202edanger": 1})
    with pytest.raises(AdapterError) as caught:
        load_adapter(tiny(), folder)
    assert "\x1b" not in str(caught.value) and re.search(
        r"\?\[31m\?danger=1 isn't supported", str(caught.value)
    )


# Written without a model


def test_factors_without_a_model_are_written_as_the_models_own(tmp_path):
    """Ranks and alphas by layer, an embedding among them: what is loaded is what save_adapter would have written."""
    model = tuned(targets=["embedding", "query"])
    saved = read_adapter(save_adapter(model, tmp_path / "saved"))
    torch.manual_seed(3)
    name = "blocks.0.attention.query"
    layers = saved.layers | {
        name: saved.layers[name]._replace(lora_A=torch.randn(3, 8), lora_B=torch.randn(8, 3), alpha=5.5)
    }
    head = {"head.weight": torch.randn(30, 8)}
    folder = write_adapter(tmp_path / "written", layers, base_model_name="some/base", modules_to_save=head)
    loaded = load_adapter(tiny(), folder)
    for name, factors in layers.items():
        assert torch.equal(lora_layers(loaded)[name].delta_weight(), factors.delta_weight().to(torch.float32))
    assert torch.equal(loaded.head.weight, head["head.weight"])
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "some/base" and config["modules_to_save"] == ["head"]
    assert config["target_modules"] == sorted(layers) and config["r"] == 2
    assert config["rank_pattern"] == {"^blocks\\.0\\.attention\\.query": 3}
    assert config["alpha_pattern"] == {"^blocks\\.0\\.attention\\.query": 5.5}


def test_nothing_or_something_infinite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no layer to write"):
        write_adapter(tmp_path / "new", {})
    factors = read_adapter(save_adapter(tuned(targets=["query"]), tmp_path / "a")).layers
    name, first = next(iter(factors.items()))
    with pytest.raises(ValueError, match=r"blocks\.0.*infinite, NaN"):
        write_adapter(tmp_path / "new", {name: first._replace(lora_A=first.lora_A * float("nan"))})
    assert not (tmp_path / "new").exists()
