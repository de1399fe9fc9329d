"""Chapter 11's explorers draw the rows that they are given and say what is true of them; the box asks and answers."""

import functools

import pytest
import torch

from lora_edu.data.runs import method_runs
from lora_edu.explore import how_low, rank_and_matrices, search_box
from lora_edu.explore.real_encoder import LOOKS, NAMES, gain_kept, gain_trained, middle_layer
from lora_edu.recording.encoder import KINDS, TARGETS, kind_of

NONE = {"method": "none", "validation": 2.0, "all": {"mrr": 0.55}, "quarter": {"loss": 2.0, "mrr": 0.6}}
BM25 = {"method": "bm25", "all": {"mrr": 0.4}}


def row(method, size, rate, loss, seed=0, trained=70_000):
    about = {"task": "functions", "method": method, "size": size, "rate": rate, "steps": 32, "seed": seed}
    found = {"recall@1": 0.5, "recall@10": 0.8, "mrr": 1 - loss / 4}
    return about | {
        "trained": trained * (size or 300),
        "validation": loss,
        "test": loss,
        "all": found,
        "quarter": {"loss": loss, "mrr": 1 - loss / 5},
    }


ROWS = [
    *(row("full", None, rate, loss) for rate, loss in ((1e-4, 1.5), (2e-4, 1.4), (4e-4, 1.6))),
    *(row("lora", r, rate, loss) for r in (1, 8) for rate, loss in ((2e-3, 1.6), (4e-3, 1.5), (8e-3, 1.7))),
    row("lora", 4, 4e-3, 1.55),
    *(row("lora", 8, 4e-3, 1.5 + seed / 20, seed) for seed in (1, 2)),
    *(
        row("lora MLP", 8, rate, loss, trained=22_000)
        for rate, loss in ((2e-3, 1.7), (4e-3, 1.6), (8e-3, 1.8))
    ),
]


def cut_row(losses):
    cuts = {str(r): {"loss": loss, "mrr": 0.8 - loss / 10} for r, loss in losses.items()}
    return {"quarter": {"loss": 1.0, "mrr": 0.7}, "cut": cuts}


CUTS = {
    "gentle": cut_row({0: 1.9, 1: 1.5, 8: 1.2, 64: 0.99}),
    "steep": cut_row({0: 2.1, 1: 1.8, 8: 1.5, 64: 1.1}),
}
SPECTRA = {
    name: {kind: torch.logspace(0, -power, 80) for kind in KINDS}
    for name, power in (("gentle", 3), ("steep", 1))
}


@functools.cache
def drawn(name):
    if name == "runs":
        return rank_and_matrices(ROWS, NONE, BM25)
    small = {"TinyLM": {1: 0.3, 8: 0.8, 64: 0.99}}
    return how_low(CUTS, gain_trained(ROWS, NONE, [ROWS[1]]), NONE, SPECTRA, small)


@pytest.mark.parametrize("name", ["runs", "how low"])
def test_pictures_are_whole_and_within_the_budget(name):
    explorer = drawn(name)
    assert len(explorer.pictures) <= 30 and explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_a_choice_is_said_with_its_numbers_its_rate_and_its_seeds():
    said = drawn("runs").start.sentence
    assert said.startswith(
        "LoRA, all matrices, r = 8: 560,000 numbers trained, rate 0.004. The right function comes"
    )
    assert (
        "first for 50.0% of the sentences; mean reciprocal rank 0.613, 0.600 to 0.625 over 3 seeds (untuned"
        in said
    )
    pictures = drawn("runs").pictures
    assert [choice for (choice,) in pictures] == [
        ("lora", 1),
        ("lora", 4),
        ("lora", 8),
        ("lora MLP", 8),
        ("full", None),
    ]
    assert "0.613, one seed (untuned 0.550, BM25 0.400)" in pictures[("lora", 4),].sentence


def test_shares_of_the_gain_count_from_the_untuned_encoder():
    assert gain_kept(CUTS["steep"], NONE) == pytest.approx({0: -0.1, 1: 0.2, 8: 0.5, 64: 0.9})
    assert gain_kept(CUTS["gentle"], NONE, "mrr")[1] == pytest.approx(0.5)
    full = method_runs(ROWS, "functions", 32)["full", None][0]
    assert gain_trained(ROWS, NONE, [full]) == pytest.approx({1: 0.5 / 0.6, 4: 0.45 / 0.6, 8: 0.45 / 0.6})
    two = [full, full | {"quarter": {"loss": 1.6}}]  # means of seeds on both sides
    assert gain_trained(ROWS, NONE, two)[1] == pytest.approx(1.0)


def test_a_cut_is_said_in_nats_in_ranks_and_beside_what_was_trained():
    pictures = drawn("how low").pictures
    said = pictures["steep", 8].sentence
    assert said.startswith(
        "steep: with every ΔW cut to r = 8 (2.1 % of the width), 50% of the gain in nats and"
    )
    assert "LoRA trained at 8 gains 75% of tuned full tuning's" in said
    assert "LoRA trained" not in pictures["steep", 64].sentence
    assert "words 0%" in pictures["gentle", 0].sentence and "words 16%" in pictures["gentle", 1].sentence


def test_the_middle_layer_is_the_middle_one_of_each_kind():
    sigma = {f"encoder.layer.{i}.attention.self.query.weight": torch.tensor([float(i)]) for i in range(6)}
    sigma["embeddings.word_embeddings.weight"] = torch.tensor([9.0])
    assert middle_layer(sigma, kind_of) == {"query": torch.tensor([3.0]), "words": torch.tensor([9.0])}


def test_the_box_answers_each_sentence_from_every_system():
    table = {"open a file": [0.1, 0.9, 0.5], "close": [0.8, 0.2, 0.3]}
    scores = lambda query: torch.tensor(table.get(query, [0.0, 0.0, 0.0]))
    box = search_box(
        "close", {"untuned": scores, "tuned": lambda query: -scores(query)}, ["shut", "open", "x.y"], best=2
    )
    assert box.text == "untuned\n   0.80  shut\n   0.30  x.y\n\ntuned\n  -0.20  open\n  -0.30  x.y"
    box.fields["query"].value = "open a file"
    assert "0.90  open" in box.output.value
    box.fields["query"].value = " "
    assert "Say in a sentence" in box.output.value


def test_every_recorded_method_has_a_name_and_a_look():
    assert set(LOOKS) == {*TARGETS, "full"} == set(NAMES) - {"none", "bm25"}
    assert len(set(LOOKS.values())) == len(LOOKS)
