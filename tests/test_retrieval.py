"""Finding functions by sentences: vectors, loss, ranks and BM25 on small numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_edu import retrieval


@pytest.fixture(scope="module")
def pairs():
    return retrieval.load_pairs()


class Table(nn.Module):
    """An encoder whose hidden states are the tokens' embeddings: a text's vector can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 3)
        self.widths = []

    def forward(self, input_ids, attention_mask):
        self.widths.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def test_a_text_is_the_mean_of_its_tokens_whatever_stands_beside_it_in_the_batch():
    torch.manual_seed(0)
    model, texts = Table(), [[3, 4, 5, 6, 7, 8], [1], [2, 9], [5, 5, 11]]
    vectors = retrieval.embed(model, texts, batch=2)
    expected = [F.normalize(model.table.weight[text].mean(0), dim=0) for text in texts]
    assert torch.allclose(vectors, torch.stack(expected), atol=1e-6)
    assert model.widths == [(2, 2), (2, 6)]  # short ones together
    vectors.sum().backward()
    assert set(model.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == {*range(1, 10), 11}


def test_the_loss_is_minus_the_log_of_the_share_that_the_right_document_gets():
    Q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    D = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, -0.6]])
    e = lambda cosine: math.exp(2 * cosine)
    rows = [
        e(1) / (e(1) + e(0.6) + e(0.8)),
        e(0.8) / (e(0) + e(0.8) + e(-0.6)),
        e(0.8) / (e(1) + e(0.6) + e(0.8)),
    ]
    loss = retrieval.contrastive_loss(Q, D, torch.tensor([0, 1, 2]), scale=2.0)
    assert loss.item() == pytest.approx(-sum(map(math.log, rows)) / 3, abs=1e-6)
    rows[0], rows[2] = (
        e(1) / (e(1) + e(0.6)),
        e(0.8) / (e(0.6) + e(0.8)),
    )  # the first and the last are one group
    loss = retrieval.contrastive_loss(Q, D, torch.tensor([5, 1, 5]), scale=2.0)
    assert loss.item() == pytest.approx(-sum(map(math.log, rows)) / 3, abs=1e-6)
    assert retrieval.pool_loss(Q @ D.T, torch.tensor([5, 1, 5]), scale=2.0) == pytest.approx(loss.item())
    with pytest.raises(ValueError, match=r"must be \(n, width\) and groups \(n,\); got \(3, 2\), \(2, 2\)"):
        retrieval.contrastive_loss(Q, D[:2], torch.tensor([0, 1, 2]))


def test_ranks_count_wrong_documents_before_the_first_right_one_and_ties_against():
    scores = torch.tensor([[0.9, 0.5, 0.7], [0.9, 0.5, 0.7], [0.2, 0.2, 0.2]])
    apart, pair = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])
    assert retrieval.ranks(scores, apart, apart).tolist() == [1, 3, 3]
    assert retrieval.ranks(scores, pair, pair).tolist() == [
        1,
        3,
        2,
    ]  # the last finds the first: one wrong tie
    found = retrieval.measures(torch.tensor([1, 3, 2, 11]))
    assert found["recall@1"] == 0.25 and found["recall@10"] == 0.75
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 11) / 4)
    with pytest.raises(ValueError, match="a document of its group"):
        retrieval.ranks(scores, apart, pair)


def test_a_smaller_pool_is_an_easier_task():
    torch.manual_seed(0)
    scores, groups = torch.randn(60, 60) + 1.5 * torch.eye(60), torch.arange(60)
    whole = retrieval.measures(retrieval.ranks(scores, groups, groups))["mrr"]
    assert retrieval.in_pools(scores, groups, 60, draws=2) == pytest.approx(whole)
    assert whole + 0.1 < retrieval.in_pools(scores, groups, 15)


def test_words_are_taken_out_of_names():
    assert retrieval.words("def readAllLines(self, max_bytes=2): # UTF8") == [
        *("def", "read", "all", "lines", "self", "max", "bytes", "2", "utf8")
    ]


def test_bm25_is_what_the_formula_gives():
    scores = retrieval.bm25(
        ["open a file", "nothing"], ["open file open", "close file", "open door now please"]
    )
    length, mean = [3, 2, 4], 3.0
    part = lambda n, f, i: (
        math.log(1 + (3 - n + 0.5) / (n + 0.5)) * f / (f + 1.2 * (0.25 + 0.75 * length[i] / mean))
    )
    expected = [part(2, 2, 0) + part(2, 1, 0), part(2, 1, 1), part(2, 1, 2)]
    assert torch.allclose(scores, torch.tensor([expected, [0.0] * 3]), atol=1e-6)


def test_batches_depend_on_seed_and_step_and_take_each_pair_once_an_epoch(pairs):
    pairs = pairs["validation"][:50]
    letters = lambda texts, truncation, max_length: {
        "input_ids": [[ord(c) for c in text][:max_length] for text in texts]
    }
    batches = retrieval.PairBatches(letters, pairs, batch=16, seed=3, longest=10)
    (summaries, sources), groups = batches(1)
    assert batches.steps_per_epoch == 3 and len(summaries) == len(sources) == len(groups) == 16
    for summary, source, group in zip(summaries, sources, groups.tolist(), strict=True):
        fitting = [each for each in pairs if [ord(c) for c in each.source][:10] == source]
        assert group in {each.group for each in fitting}
        assert summary in [[ord(c) for c in each.summary][:10] for each in fitting]
    again = retrieval.PairBatches(letters, pairs, batch=16, seed=3, longest=10)(1)
    assert again[0] == (summaries, sources) and again[1].equal(groups)
    assert not retrieval.PairBatches(letters, pairs, batch=16, seed=4, longest=10)(1)[1].equal(groups)
    epoch = torch.cat([batches(step)[1] for step in range(3, 6)]).tolist()
    for group in set(epoch):
        assert epoch.count(group) <= [each.group for each in pairs].count(group)
    with pytest.raises(ValueError, match="50 pairs are fewer than a batch of 64"):
        retrieval.PairBatches(letters, pairs, batch=64)


def test_no_module_and_no_summary_is_in_two_splits(pairs):
    assert list(pairs) == ["train", "validation", "test"]
    assert len(pairs["test"]) >= 1_500 and len(pairs["validation"]) >= 300 and len(pairs["train"]) >= 2_000
    modules = {split: {each.module for each in found} for split, found in pairs.items()}
    assert not modules["train"] & modules["validation"] and not modules["test"] & modules["train"]
    assert not modules["test"] & modules["validation"]
    groups = {split: {each.group for each in found} for split, found in pairs.items()}
    assert not groups["train"] & groups["validation"] and not groups["train"] & groups["test"]
    assert {each.split for each in pairs["test"]} == {"test"}


def test_without_dropout_a_training_step_is_the_same_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    x = torch.ones(2, 4)
    assert not torch.equal(model(x), model(x))
    assert retrieval.without_dropout(model) is model and torch.equal(model(x), model(x))
