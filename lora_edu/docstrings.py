"""A language model that writes the first line of a function's docstring: prompts, loss on the answer, what it writes.

Chapter 12's tools, for a model of transformers that continues text and its tokenizer. Not for training itself
(`training.fit` takes `AnswerBatches` and `answer_loss`) nor for conversations of several turns.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.data.functions import Function

# ChatML, as SmolLM2-Instruct was taught; without the system prompt that its template puts before every conversation.
QUESTION = "<|im_start|>user\nWrite the first line of this function's docstring.\n\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
LONGEST_SOURCE, LONGEST_ANSWER = 96, 24  # tokens: of a source that is read; of an answer that is asked for
BUCKET = 8  # batches whose texts are sorted by length together
# What begins five or more of the standard library's docstrings and is the plain form of a verb.
IMPERATIVES = frozenset(
    """accept acquire add append apply arrange assert assign build call cancel change check clean clear close compare
    compute configure construct convert copy count create decode decorate delegate delete determine disable display do
    emit enable encode ensure escape evaluate execute expand extract fetch fill find finish flush force format generate
    get give handle increment indicate initialise initialize insert install instantiate invoke iterate join list load
    lock log look make map mark merge modify move normalize open override parse perform pop prepare print process
    produce provide push put query raise read receive record recursively register release reload remove rename render
    replace report represent request reset resolve restore retrieve return rotate round run save schedule search send
    set show shut shutdown shuffle signal skip sort split start stop store strip subtract swap switch take terminate
    test translate try turn undo unlock unpack update use
    validate verify visit wait wake walk wrap write yield""".split()  # noqa: SIM905
)


class Pair(NamedTuple):
    """A prompt and the answer asked for, as token ids; the answer with the token that ends it."""

    prompt: list[int]
    answer: list[int]


def prompt_ids(tokenizer: Callable, source: str, longest: int = LONGEST_SOURCE) -> list[int]:
    """The question with the first `longest` tokens of a function's source, as token ids."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids(QUESTION) + ids(source)[:longest] + ids(TURN)


def encode(
    tokenizer: Callable, functions: Iterable[Function], longest: int = LONGEST_ANSWER
) -> tuple[list[Function], list[Pair]]:
    """The functions whose summary has at most `longest` tokens, and their pairs; the others are left out."""
    kept, pairs = [], []
    for each in functions:
        answer = tokenizer(each.summary, add_special_tokens=False)["input_ids"]
        if len(answer) <= longest:
            end = tokenizer(END, add_special_tokens=False)["input_ids"]
            kept.append(each)
            pairs.append(Pair(prompt_ids(tokenizer, each.source), [*answer, *end]))
    return kept, pairs


def spread(items: Sequence, number: int) -> list:
    """`number` of the items, evenly spaced; all of them where there are fewer."""
    if number >= len(items):
        return list(items)
    return [items[i * len(items) // number] for i in range(number)]


# ---- the loss --------------------------------------------------------------------------------------------------


def batch_of(pairs: Sequence[Pair]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((tokens (n, longest), mask (n, longest), predicts (n, longest)), targets (answer tokens,)).

    `predicts` is True where the next token is one of the answer; targets are those, text after text.
    """
    longest = max(len(each.prompt) + len(each.answer) for each in pairs)
    tokens, mask = (torch.zeros(len(pairs), longest, dtype=torch.long) for _ in range(2))
    predicts = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, each in enumerate(pairs):
        text = each.prompt + each.answer
        tokens[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        predicts[row, len(each.prompt) - 1 : len(text) - 1] = True
    return (tokens, mask, predicts), torch.tensor([token for each in pairs for token in each.answer])


def answer_losses(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    """−log p of every token of the answers, given the prompt and the answer so far: (answer tokens,), nats.

    Logits are made at those places alone: a vocabulary of 49 152 at every place of 8 × 128 would be 201 MB.
    """
    tokens, mask, predicts = (each.to(model.device) for each in inputs)
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask).last_hidden_state
    logits = model.get_output_embeddings()(hidden[predicts])
    return F.cross_entropy(logits.float(), targets.to(model.device), reduction="none")


def answer_loss(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    """The mean of `answer_losses`, as `training.fit` asks for it."""
    return answer_losses(model, inputs, targets).mean()


class AnswerBatches:
    """step → `batch_of` of `batch` pairs, another order in each epoch; texts of like length together.

    A pure function of seed and step, as `training.Batches`. Of each BUCKET batches the pairs are sorted by length, so
    that little is spent on padding. What is left of an epoch after its last whole batch is left out.
    """

    def __init__(self, pairs: Sequence[Pair], batch: int = 8, seed: int = 0):
        if len(pairs) < batch:
            raise ValueError(f"{len(pairs)} pairs are fewer than a batch of {batch}")
        self.pairs, self.batch, self.seed = list(pairs), batch, seed
        self.steps_per_epoch = len(pairs) // batch

    def __call__(self, step: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        epoch, within = divmod(step, self.steps_per_epoch)
        bucket, place = divmod(within, BUCKET)
        generator = torch.Generator().manual_seed(1_000 * self.seed + epoch)
        order = torch.randperm(len(self.pairs), generator=generator)[: self.steps_per_epoch * self.batch]
        some = order.split(BUCKET * self.batch)[bucket].tolist()
        some.sort(key=lambda i: len(self.pairs[i].prompt) + len(self.pairs[i].answer))
        batches = [some[i : i + self.batch] for i in range(0, len(some), self.batch)]
        bucket += epoch * -(-self.steps_per_epoch // BUCKET)  # counted through all epochs
        mixed = torch.randperm(len(batches), generator=generator.manual_seed(1_000 * self.seed + bucket))
        return batch_of([self.pairs[i] for i in batches[mixed[place]]])


@torch.no_grad()
def held_out(model: nn.Module, pairs: Sequence[Pair], batch: int = 16) -> tuple[Tensor, Tensor]:
    """(nats (n,), tokens (n,)) of the answers to n pairs: the loss is nats.sum() / tokens.sum()."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].answer))
    nats, counts = torch.zeros(len(pairs)), torch.tensor([float(len(each.answer)) for each in pairs])
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        losses = answer_losses(model, *batch_of([pairs[i] for i in some])).cpu()
        for i, part in zip(some, losses.split([len(pairs[i].answer) for i in some]), strict=True):
            nats[i] = part.sum()
    model.train(was_training)
    return nats, counts


@torch.no_grad()
def text_loss(model: nn.Module, windows: Tensor, batch: int = 4) -> float:
    """Nats a token of running text, windows (number, tokens), each read with nothing before it."""
    total = 0.0
    for some in windows.split(batch):
        hidden = model.get_decoder()(input_ids=some.to(model.device)).last_hidden_state[:, :-1]
        for row, text in zip(hidden, some[:, 1:], strict=True):  # a text's logits at a time
            total += F.cross_entropy(model.get_output_embeddings()(row).float(), text.to(model.device)).item()
    return total / len(windows)


def windows_of(tokenizer: Callable, texts: Iterable[str], number: int, length: int = 256) -> Tensor:
    """(number, length): evenly spaced pieces of the texts, put one after the other.

    Raises ValueError where the texts are too short for them.
    """
    stream = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(stream) < number * length:
        raise ValueError(f"{len(stream)} tokens are fewer than {number} pieces of {length}")
    starts = torch.linspace(0, len(stream) - length, number).long()
    return torch.tensor(stream)[starts[:, None] + torch.arange(length)]


# ---- what it writes --------------------------------------------------------------------------------------------


@torch.no_grad()
def write(
    model: nn.Module,
    tokenizer: Callable,
    prompts: Sequence[Sequence[int]],
    longest: int = 32,
    batch: int = 16,
) -> list[str]:
    """The likeliest next token, again and again (greedy), after each prompt, `longest` at most: one text a prompt.

    An answer that was ended ends with END, which is left in, so that one that was cut off can be told from it.
    """
    was_training = model.training
    model.eval()
    end = tokenizer(END, add_special_tokens=False)["input_ids"][0]
    order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = max(len(prompts[i]) for i in some)
        tokens, mask = (torch.zeros(len(some), width, dtype=torch.long) for _ in range(2))
        for row, i in enumerate(some):  # prompts stand at the right, where the answer begins
            tokens[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        options = {"max_new_tokens": longest, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        made = model.generate(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), **options
        )
        for i, row in zip(some, made[:, width:].tolist(), strict=True):
            text = row[: row.index(end) + 1] if end in row else row
            answers[i] = tokenizer.decode(text, skip_special_tokens=False)
    model.train(was_training)
    return answers


def is_imperative_line(answer: str) -> bool:
    """Whether an answer of `write` is one line that was ended and begins with a verb in the imperative (PEP 257)."""
    line = answer.removesuffix(END).strip()
    first = line.partition(" ")[0].strip(".,:").lower()
    return answer.endswith(END) and "\n" not in line and first in IMPERATIVES


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF of answers, one reference each, 0 to 100: how many runs of one to six characters the two have in common.

    Popović (2015), chrF: character n-gram F-score, with β = 2, over all answers, by sacrebleu. END doesn't count.
    Raises ImportError without sacrebleu.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise ImportError("chrF is sacrebleu's: pip install 'lora-edu[hub]'") from None
    lines = [each.removesuffix(END).strip() for each in answers]
    return CHRF().corpus_score(lines, [list(references)]).score
