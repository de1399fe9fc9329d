"""Writing docstrings: prompts, the loss on answers alone, batches, greedy writing, checked on a model of two layers."""

import sys
from types import SimpleNamespace

import pytest
import tiny_language_model as tiny
import torch
from torch.nn import functional as F

from lora_edu import docstrings
from lora_edu.data.functions import Function
from lora_edu.docstrings import BUCKET, END, AnswerBatches, Pair

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small():
    model, tokenizer = tiny.build(transformers)
    functions, pairs = docstrings.encode(tokenizer, tiny.functions(20))
    return SimpleNamespace(model=model, tokenizer=tokenizer, functions=functions, pairs=pairs)


def test_a_prompt_is_the_question_the_beginning_of_the_source_and_the_turn(small):
    ids = docstrings.prompt_ids(small.tokenizer, "def read file " + "line " * 200, longest=5)
    text = small.tokenizer.decode(ids)
    letters = lambda some: "".join(some.split())
    assert letters(text) == letters(docstrings.QUESTION + "def read file line line" + docstrings.TURN)
    assert ids.count(1) == 2 and ids.count(2) == 1  # <|im_start|> and END are one token each
    assert (
        len(docstrings.prompt_ids(small.tokenizer, "line " * 200)) == len(ids) + docstrings.LONGEST_SOURCE - 5
    )


def test_an_answer_ends_and_one_that_is_too_long_is_left_out(small):
    functions = [
        Function("m.py", name, text, "def a", "test", 0)
        for name, text in (("f", "read a file"), ("g", "a " * 9))
    ]
    kept, pairs = docstrings.encode(small.tokenizer, functions, longest=8)
    assert [each.name for each in kept] == ["f"]
    assert small.tokenizer.decode(pairs[0].answer).split() == ["read", "a", "file", END]
    kept, pairs = docstrings.encode(small.tokenizer, functions, longest=9)
    assert len(kept) == 2 and len(pairs[1].answer) == 10


@pytest.mark.parametrize(
    ("number", "picked"), [(3, [0, 3, 6]), (4, [0, 2, 5, 7]), (10, list(range(10))), (11, list(range(10)))]
)
def test_what_is_spread_is_evenly_spaced(number, picked):
    assert docstrings.spread(range(10), number) == picked


def losses_of(model, pair):
    """−log p of the answer's tokens from the logits at every place, one text alone."""
    text = torch.tensor([pair.prompt + pair.answer])
    log_p = model(input_ids=text).logits[0].log_softmax(-1)
    first = len(pair.prompt)
    return torch.stack([-log_p[place - 1, text[0, place]] for place in range(first, text.shape[1])])


def test_the_loss_is_that_of_the_answers_tokens_alone_and_padding_changes_nothing(small):
    some = small.pairs[:5]
    assert len({len(each.prompt) + len(each.answer) for each in some}) > 2
    expected = [losses_of(small.model, pair) for pair in some]
    inputs, targets = docstrings.batch_of(some)
    assert torch.allclose(
        docstrings.answer_losses(small.model, inputs, targets), torch.cat(expected), atol=1e-5
    )
    assert inputs[0].shape == inputs[1].shape and int(inputs[2].sum()) == len(targets)
    assert targets.tolist() == [token for pair in some for token in pair.answer]
    mean = docstrings.answer_loss(small.model, inputs, targets)
    assert mean.item() == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)
    tokens, mask, predicts = inputs
    padded = tokens.masked_fill(mask == 0, 7)
    assert not padded.equal(tokens)
    again = docstrings.answer_losses(small.model, (padded, mask, predicts), targets)
    assert torch.allclose(again, torch.cat(expected), atol=1e-5)


def test_a_held_out_loss_is_told_answer_by_answer_in_their_order(small):
    small.model.train()
    nats, tokens = docstrings.held_out(small.model, small.pairs, batch=3)
    assert small.model.training
    small.model.eval()
    expected = [losses_of(small.model, pair) for pair in small.pairs]
    assert tokens.tolist() == [len(each) for each in expected]
    assert torch.allclose(nats, torch.stack([each.sum() for each in expected]), atol=1e-4)


def test_gradients_reach_the_table_and_every_layer(small):
    model, _ = tiny.build(transformers)
    docstrings.answer_loss(model, *docstrings.batch_of(small.pairs[:3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- batches -----------------------------------------------------------------------------------------------------


def numbered(count):
    """Pairs that can be told apart, of unlike length."""
    return [Pair([5] * (3 + (7 * i) % 13), [i + 10, 2]) for i in range(count)]


def members(batches, steps):
    """The numbers of the pairs of each step."""
    return [[t - 10 for t in batches(step)[1].tolist() if t >= 10] for step in steps]


@pytest.mark.parametrize("count", [64, 83, 300])  # a whole bucket, a bucket and a part, buckets and a part
def test_an_epoch_has_each_pair_once_and_the_next_one_in_another_order(count):
    batches = AnswerBatches(numbered(count), batch=4, seed=1)
    n = batches.steps_per_epoch
    assert n == count // 4 and (count == 64 or n % BUCKET)
    epochs = [members(batches, range(e * n, (e + 1) * n)) for e in range(4)]
    for epoch in epochs:
        flat = [i for each in epoch for i in each]
        assert len(flat) == 4 * n == len(set(flat)) and set(flat) <= set(range(count))
    assert len({str(epoch) for epoch in epochs}) == 4


def test_a_batch_is_a_function_of_seed_and_step():
    one, same, other = (AnswerBatches(numbered(100), 4, seed) for seed in (3, 3, 4))
    steps = [17, 3, 40, 3]
    assert members(one, steps) == members(same, steps) != members(other, steps)
    assert members(one, [3]) == members(same, [3])
    (inputs, targets), (again, too) = one(30), same(30)
    assert all(a.equal(b) for a, b in zip(inputs, again, strict=True)) and targets.equal(too)
    with pytest.raises(ValueError, match="3 pairs are fewer than a batch of 4"):
        AnswerBatches(numbered(3), 4)


def test_texts_of_like_length_come_together():
    batches = AnswerBatches(numbered(320), batch=4)
    spreads = []
    for step in range(batches.steps_per_epoch):
        (_, mask, _), _ = batches(step)
        lengths = mask.sum(1)
        spreads.append(int(lengths.max() - lengths.min()))
    assert sum(spreads) / len(spreads) <= 3  # of 12; four texts taken at random differ by 7 on average


# ---- other texts -------------------------------------------------------------------------------------------------


def test_the_loss_of_running_text_is_that_of_every_next_token(small):
    windows = torch.randint(3, 20, (5, 12), generator=torch.Generator().manual_seed(0))
    logits = small.model(input_ids=windows).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert docstrings.text_loss(small.model, windows, batch=2) == pytest.approx(expected, abs=1e-5)


def test_windows_are_evenly_spaced_pieces_of_the_texts_one_after_the_other(small):
    words = [tiny.WORDS[i % 14] for i in range(40)]
    stream = small.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    texts = [" ".join(words[:15]), " ".join(words[15:])]
    windows = docstrings.windows_of(small.tokenizer, texts, 3, 10)
    assert windows.tolist() == [stream[start : start + 10] for start in (0, 15, 30)]
    assert docstrings.windows_of(small.tokenizer, texts, 4, 10).flatten().tolist() == stream
    with pytest.raises(ValueError, match="40 tokens are fewer than 5 pieces of 10"):
        docstrings.windows_of(small.tokenizer, texts, 5, 10)


# ---- what it writes ----------------------------------------------------------------------------------------------


@torch.no_grad()
def greedily(model, prompt, longest):
    """The likeliest next token, one at a time, each prompt alone and without a cache."""
    made = []
    while len(made) < longest and (not made or made[-1] != 2):
        logits = model(input_ids=torch.tensor([prompt + made]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
    return made


def test_writing_is_a_greedy_loop_whatever_stands_beside_it_in_the_batch(small):
    model, _ = tiny.build(transformers, seed=3)
    batches = AnswerBatches(small.pairs, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(20):  # so that some answers end
        optimizer.zero_grad()
        docstrings.answer_loss(model, *batches(step)).backward()
        optimizer.step()
    prompts = [each.prompt for each in small.pairs[:9]]
    model.train()
    written = docstrings.write(model, small.tokenizer, prompts, longest=4, batch=4)
    assert model.training
    model.eval()
    expected = [greedily(model, prompt, 4) for prompt in prompts]
    assert written == [small.tokenizer.decode(each) for each in expected]
    ended = [each.endswith(END) for each in written]
    assert ended == [each[-1] == 2 for each in expected] and True in ended and False in ended
    assert all(text.count(END) == int(end) for text, end in zip(written, ended, strict=True))
    assert len(set(written)) > 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Return the name of the file.{END}", True),
        (f" open: a file {END}", True),
        ("Return the name of the file.", False),  # was not ended
        (f"Returns the name.{END}", False),
        (f"The name of the file.{END}", False),
        (f"Return the name.\n\nArgs: none{END}", False),
        (END, False),
    ],
)
def test_an_imperative_line_is_ended_is_one_and_begins_with_a_verb(answer, expected):
    assert docstrings.is_imperative_line(answer) is expected


def test_chrf_is_sacrebleus_and_the_end_does_not_count():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = ["Return the name", "Open a file."], ["Return the names.", "Close a file."]
    found = docstrings.chrf([f"{answers[0]}{END}", answers[1]], references)
    assert found == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert 50 < found < 100 and docstrings.chrf(references, references) == pytest.approx(100)


def test_chrf_of_one_pair_is_the_f_score_of_its_runs_of_letters():
    pytest.importorskip("sacrebleu")
    # "abc" and "abd": of runs of 1, 2 and 3 letters 2 of 3, 1 of 2 and 0 of 1 are shared; precision is recall, so F is
    # their mean over the lengths that there are
    assert docstrings.chrf(["abc"], ["abd"]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3, abs=0.01)


def test_without_sacrebleu_chrf_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'lora-edu\[hub\]'"):
        docstrings.chrf(["a"], ["a"])
