"""The corpora: split by name, no leak between held-out text and training, the same on another machine."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu.data import corpus

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=120).map(" ".join)


@pytest.fixture(scope="module")
def clean():
    return corpus.clean_splits()


@pytest.mark.slow
def test_no_held_out_text_shares_a_run_of_13_words_with_any_training_text(clean):
    training = [text for splits, _ in clean.values() for text in splits["train"]]
    for name, (splits, _) in clean.items():
        for split in ("validation", "test"):
            assert corpus.shared_runs(splits[split], training) == 0, f"{name}, {split}"


@pytest.mark.slow
def test_before_the_cut_there_was_a_leak_and_the_cut_is_small(clean):
    training = [text for splits, _ in clean.values() for text in splits["train"]]
    assert corpus.shared_runs(corpus.split_texts("reference")["test"], training) > 100
    for name, (_, cut) in clean.items():
        for split, (gone, words) in cut.items():
            assert gone < 0.2 * words, f"{name}, {split}: {gone} of {words} words cut"


def test_the_corpora_have_the_sizes_that_the_course_counts_on(clean):
    texts = {name: splits for name, (splits, _) in clean.items()}
    characters = {name: sum(map(len, splits["train"])) for name, splits in texts.items()}
    assert characters["code"] > 5e6 and characters["reference"] > 2e6 and characters["manual"] > 2e5
    for name, splits in texts.items():
        held_out = sum(map(len, splits["test"]))
        assert 0.02 * characters[name] < held_out < 0.4 * characters[name], name


@given(WORDS, st.lists(WORDS, max_size=4))
def test_a_text_is_cut_into_pieces_of_itself_without_a_run_that_was_seen(text, training):
    seen = np.unique(np.concatenate([corpus._runs(corpus._words(t)) for t in [*training, ""]]))
    pieces, words, gone = corpus._cut(text, seen)
    assert words == len(text.split()) and 0 <= gone <= words
    assert all(piece in text for piece in pieces)
    assert corpus.shared_runs(pieces, training) == 0
    if gone == 0 and words >= corpus.RUN:
        assert pieces == [text]


@given(st.lists(st.text("abc ", min_size=0, max_size=90), max_size=5), WORDS)
@settings(max_examples=50)
def test_shared_runs_counts_what_a_plain_comparison_counts(training, held_out):
    def runs(text):
        words = text.split()
        return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]

    training = [*training, held_out[: len(held_out) // 2]]
    seen = {run for text in training for run in runs(text)}
    assert corpus.shared_runs([held_out], training) == sum(run in seen for run in runs(held_out))


def test_a_split_hangs_on_the_name_alone():
    where = {
        key: corpus.split_name(key, 0.03, 0.05) for key in ("os.py", "json/decoder.py", "enum.py", "ast.py")
    }
    assert where == {key: corpus.split_name(key, 0.03, 0.05) for key in where}
    many = [corpus.split_name(f"module_{i}.py", 0.03, 0.05) for i in range(5000)]
    assert abs(many.count("test") / 5000 - 0.05) < 0.01 and abs(many.count("validation") / 5000 - 0.03) < 0.01


def test_topics_that_share_a_run_stay_on_one_side():
    texts = corpus.split_texts("manual")
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert corpus.shared_runs(texts[other], texts[one]) == 0


@pytest.mark.slow
def test_tokens_give_the_text_back_and_bits_a_byte_follow_from_nats():
    reference = corpus.load_corpus("reference")
    assert reference.test.dtype == torch.int64 and int(reference.test.max()) < 10_000
    text = reference.tokenizer.decode(reference.test.tolist(), skip_special_tokens=False)
    pieces = text.split(corpus.END)
    assert len(pieces) == reference.documents["test"] + 1
    assert sum(len(piece.encode()) for piece in pieces) == reference.bytes["test"]
    uniform = reference.bits_per_byte(math.log(10_000))
    assert uniform == pytest.approx(len(reference.test) * math.log2(10_000) / reference.bytes["test"])


@pytest.mark.slow
def test_the_second_reading_comes_from_the_cache_and_a_damaged_cache_is_made_again(monkeypatch):
    first = corpus.load_corpus("manual")
    (cache,) = corpus.user_folder("cache").glob("corpus_*.safetensors")
    monkeypatch.setattr(corpus, "clean_splits", lambda: pytest.fail("read again"))
    assert torch.equal(corpus.load_corpus("manual").train, first.train)
    whole = cache.read_bytes()
    monkeypatch.undo()
    cache.write_bytes(whole[:1000])
    assert torch.equal(corpus.load_corpus("manual").train, first.train)
    assert json.loads(corpus._read_cache(cache)[1]["manual"])["bytes"] == first.bytes


def test_a_wrong_name_and_a_missing_library_get_a_line_that_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='"code", "reference" or "manual"; got \'poems\''):
        corpus.load_corpus("poems")
    (tmp_path / "stdlib").mkdir()
    monkeypatch.setenv("LORA_EDU_CORPUS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="without its library's source"):
        corpus.load_corpus("code")


def test_another_folder_of_sources_can_be_read_instead(tmp_path, monkeypatch):
    original = corpus._library()
    (tmp_path / "stdlib" / "pydoc_data").mkdir(parents=True)
    shutil.copy(original / "os.py", tmp_path / "stdlib")
    monkeypatch.setenv("LORA_EDU_CORPUS", str(tmp_path))
    assert [key for key, _ in corpus.read_documents("code")] == ["os.py"]
