"""Chapter 11's record: which runs are asked for, what a run leaves behind, that every wanted row is recorded."""

import json
from itertools import pairwise

import pytest
import torch
from made_up_rows import all_rows
from safetensors.torch import load

from lora_edu import retrieval
from lora_edu.data import hub, load_encoder_runs, load_encoder_spectra
from lora_edu.data.functions import Function
from lora_edu.data.published import PublishedError
from lora_edu.data.runs import method_grid, tuned_method, tuned_rate
from lora_edu.lora import lora_layers, save_adapter
from lora_edu.recording import encoder, real_models
from lora_edu.recording.methods import name_of

transformers = pytest.importorskip("transformers")
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] read write a file line def return open close name the".split()  # noqa: SIM905
# A loss whose best rate is known: log2 of its distance from it.
BEST = {"full": 3e-4, "lora": 5e-3, "lora attention": 1.6e-2, "lora MLP": 5e-3, "lora words": 4e-2}


def tuned_of(rows):
    return real_models.tuned(encoder.SUBJECT, rows, encoder.STEPS)


def low_of(rows):
    return real_models.how_low(encoder.SUBJECT, rows, encoder.STEPS)


def test_every_grid_grows_until_its_best_lies_inside_then_come_seeds_and_the_two_ends_of_full_tuning():
    rows, steps = all_rows(encoder.wanted, [], BEST), encoder.STEPS
    grids = [
        ("full", None),
        *(("lora", r) for r in encoder.GRIDS),
        *((m, 8) for m in list(encoder.TARGETS)[1:]),
    ]
    for method, size in grids:
        best = tuned_method(rows, encoder.TASK, method, size, steps)
        assert best is not None and 0.7 < best["rate"] / BEST[method] < 1.5
        rates = [row["rate"] for row in method_grid(rows, encoder.TASK, method, size, steps)]
        assert len(rates) >= 3 and all(1.9 < b / a < 2.1 or method == "full" for a, b in pairwise(rates))
    for rank in encoder.RANKS:
        rate = tuned_rate(rows, encoder.TASK, "lora", rank, steps)
        seeds = {
            row["seed"] for row in rows if (row["method"], row["size"], row["rate"]) == ("lora", rank, rate)
        }
        assert seeds == ({0, 1, 2} if rank == encoder.RANK else {0})
    full = tuned_rate(rows, encoder.TASK, "full", None, steps)
    low = {(run["rate"], run["seed"]) for run in low_of(rows)}
    assert low == {(float(f"{full * factor:.3g}"), seed) for factor in (0.25, 2) for seed in (0, 1)}
    assert low <= {(row["rate"], row["seed"]) for row in rows if row["method"] == "full"}
    assert len(tuned_of(rows)) == len(encoder.RANKS) + 2 + 3 + 3 + 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A BERT of two layers in the real one's place, and a dozen pairs in the library's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16)
    folder = tmp_path / "model"
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    monkeypatch.setenv("LORA_EDU_ENCODER", str(folder))
    draw = torch.Generator().manual_seed(0)
    text = lambda: " ".join(
        WORDS[5 + i] for i in torch.randint(len(WORDS) - 5, (6,), generator=draw).tolist()
    )
    found = [Function("m.py", "f", text(), f"def {text()}", "test", group) for group in range(12)]
    monkeypatch.setattr(encoder, "texts", lambda: {"train": found, "validation": found[:6], "test": found})
    monkeypatch.setattr(encoder, "BATCH", 4)
    encoder.pairs.cache_clear()
    yield tmp_path / "runs"
    encoder.pairs.cache_clear()


def run_of(method, size, rate=1e-2):
    return {"task": encoder.TASK, "method": method, "size": size, "rate": rate, "steps": 12, "seed": 0}


def test_a_run_is_done_once_and_what_it_left_gives_the_same_ranks(small, monkeypatch):
    (small).mkdir()
    before = encoder.figures(*encoder.scores(hub.load_encoder().model, "validation"))
    for run in (run_of("lora", 2), run_of("full", None, 3e-3)):
        row = encoder.record(run, small)
        assert row["validation"] < before["loss"] and 0 < row["validation_mrr"] <= 1
        tested = encoder.tested(run, small)
        assert len(tested["ranks"]) == 12 and tested["all"]["mrr"] == pytest.approx(
            sum(1 / rank for rank in tested["ranks"]) / 12, abs=1e-4
        )
        now = encoder.figures(*encoder.scores(encoder.trained_again(run, small), "validation"))
        assert now["loss"] == pytest.approx(
            row["validation"], abs=0.01
        )  # full tuning's ΔW is kept in half precision
    with monkeypatch.context() as patched:
        patched.setattr(real_models, "train", None)
        assert encoder.record(run, small) == row

    def explode(*args, **kwargs):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(real_models, "train", explode)
    assert encoder.record(run_of("lora", 2, 99.0), small)["validation"] is None


def test_a_cut_to_the_full_rank_changes_nothing_and_to_none_leaves_biases_and_norms(small):
    small.mkdir()
    run = run_of("full", None, 3e-3)
    encoder.record(run, small)
    row, tested = encoder.cut(run, small), encoder.tested(run, small)
    assert row["cut"]["16"] == row["cut"]["64"] == pytest.approx(tested["quarter"], abs=1e-3)
    assert row["quarter"] == pytest.approx(tested["quarter"], abs=1e-3)
    untuned = encoder.measured(*encoder.scores(hub.load_encoder().model, "test"))["quarter"]["loss"]
    assert tested["quarter"]["loss"] < row["cut"]["0"]["loss"] != untuned
    assert list(row["one_kind_cut"]) == list(encoder.KINDS) == list(row["spectra"])
    assert {kind: len(sizes) for kind, sizes in row["sizes"].items()} == dict.fromkeys(encoder.KINDS, 2) | {
        "words": 1
    }
    assert len(row["sigma"]) == 13 and all(
        sigma == sorted(sigma, reverse=True) for sigma in row["sigma"].values()
    )
    assert set(load(real_models.spectra([run | row]))) == {f"{name_of(run)}/{name}" for name in row["sigma"]}


def test_lora_sits_on_the_matrices_that_its_name_says(small):
    names = {
        method: set(lora_layers(encoder.apply(hub.load_encoder().model, method, 2)))
        for method in encoder.TARGETS
    }
    assert len(names["lora attention"]) == 8 and len(names["lora MLP"]) == 4
    assert names["lora words"] == {"embeddings.word_embeddings"}
    assert names["lora"] == names["lora attention"] | names["lora MLP"] | names["lora words"]
    kinds = {encoder.kind_of(f"{name}.weight") for name in names["lora"]}
    assert kinds == set(encoder.KINDS) and encoder.kind_of("pooler.dense.weight") is None
    assert encoder.kind_of("encoder.layer.1.output.dense.weight") == "down"
    assert encoder.kind_of("encoder.layer.1.attention.output.dense.weight") == "output"


def in_peft(model, folder):
    """The vectors of two texts from a model with LoRA, and from PEFT with its saved adapter on the same base."""
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            factor = layer.lora_A if not layer.lora_A.any() else layer.lora_B
            factor.normal_(std=0.1)
        texts = [[2, 5, 6, 3], [2, 7, 8, 9, 3]]
        ours, plain = retrieval.embed(model, texts), retrieval.embed(hub.load_encoder().model, texts)
        save_adapter(model, folder)
        opened = peft.PeftModel.from_pretrained(hub.load_encoder().model, folder).eval()
        theirs = retrieval.embed(opened, texts)
    assert (ours - plain).abs().max() > 0.02
    return (ours - theirs).abs().max()


def test_peft_opens_the_adapter_of_a_small_encoder(small, tmp_path):
    assert in_peft(encoder.apply(hub.load_encoder().model, "lora", 2), tmp_path / "adapter") < 1e-5


@pytest.mark.slow
def test_peft_opens_the_adapter_of_the_real_one(tmp_path):
    try:
        opened = hub.load_encoder()
    except PublishedError as error:
        pytest.skip(str(error))
    model = encoder.apply(opened.model, "lora", encoder.RANK).eval()
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == load_encoder_runs(size=8)[0]["trained"]
    )
    assert in_peft(model, tmp_path / "adapter") < 1e-5


def test_every_wanted_row_is_recorded_and_every_tuned_one_measured():
    rows = load_encoder_runs()
    assert [row["method"] for row in rows[:2]] == ["none", "bm25"]
    own = rows[2:]
    assert {name_of(row) for row in own} == {name_of(run) for run in encoder.wanted(own)}
    assert {name_of(row) for row in tuned_of(own)} == {name_of(row) for row in own if "all" in row}
    untuned, words = rows[:2]
    for row in tuned_of(own):
        assert len(row["ranks"]) == len(untuned["ranks"]) == len(words["ranks"]) >= 1_500
        assert row["all"]["mrr"] == pytest.approx(
            sum(1 / r for r in row["ranks"]) / len(row["ranks"]), abs=1e-4
        )
    for method, size in dict.fromkeys((row["method"], row["size"]) for row in own):
        rate = tuned_rate(own, encoder.TASK, method, size, encoder.STEPS)
        assert rate is not None, (method, size)  # inside its grid, or between two that are
    low = [row for row in own if "cut" in row]
    assert {name_of(row) for row in low} == {name_of(run) for run in low_of(own)}
    spectra = load_encoder_spectra()
    assert set(spectra) == {name_of(row) for row in low}
    for row in low:
        assert list(row["cut"]) == [str(r) for r in (encoder.CUT_AGAIN if row["seed"] else encoder.CUT_TO)]
        for name, sigma in spectra[name_of(row)].items():
            assert sigma[0] == sigma.max() and encoder.kind_of(name) in encoder.KINDS
        assert len(spectra[name_of(row)]) == 37


@pytest.mark.slow
def test_the_untuned_encoder_is_found_again():
    try:
        model = hub.load_encoder().model
    except PublishedError as error:
        pytest.skip(str(error))
    now = encoder.figures(*encoder.scores(model, "validation"))
    assert now["mrr"] == pytest.approx(load_encoder_runs(method="none")[0]["validation_mrr"], abs=0.05)
