"""Finding a function by a sentence: vectors of texts, a loss that pulls pairs together, ranks, BM25 to compare with.

Chapter 11's tools, for any encoder of transformers that gives hidden states. Not for large collections: all documents
are compared with every query, and faiss or a database does that faster above some 100 000.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.data.functions import Function, load_functions

# tokens of a text that are read: with 128 the untuned encoder finds no more, and takes twice the time
LONGEST = 64
SCALE = 20.0  # 1 / temperature, as in sentence-transformers' MultipleNegativesRankingLoss
_HELD_BACK = 8  # every eighth module of the training split is for validation


def load_pairs() -> dict[str, list[Function]]:
    """ "train", "validation", "test" → pairs (summary, source) of the reader's standard library, split by module.

    Test is `load_functions`'s. Its validation split is small, so that every eighth training module (by a sum of its
    name) joins it; a summary that stands there too is taken out of training.
    """
    found = load_functions()
    back = lambda each: zlib.crc32(each.module.encode()) % _HELD_BACK == 0
    held_back = [each for each in found if each.split == "train" and back(each)]
    validation = [each for each in found if each.split == "validation"] + held_back
    groups = {each.group for each in validation}
    train = [each for each in found if each.split == "train" and not back(each) and each.group not in groups]
    return {
        "train": train,
        "validation": validation,
        "test": [each for each in found if each.split == "test"],
    }


def groups_of(pairs: Sequence[Function]) -> Tensor:
    """(n,) int64: pairs with the same summary have the same number."""
    return torch.tensor([each.group for each in pairs])


def tokenise(tokenizer: Callable, texts: Sequence[str], longest: int = LONGEST) -> list[list[int]]:
    """The token ids of each text, its first and last special token included, cut after `longest`."""
    return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]


def embed(model: nn.Module, texts: Sequence[Sequence[int]], batch: int = 32) -> Tensor:
    """Unit vectors (n, width) of n texts of token ids: the mean of a text's hidden states, divided by its length.

    Reimers and Gurevych (2019), Sentence-BERT, §3. `batch` texts at a time, those of like length together, so that
    little is spent on padding; the order of the result is that of the texts. With gradients, unless they are off.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors, places = [], []
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        longest = max(len(texts[i]) for i in some)
        tokens, mask = (torch.zeros(len(some), longest, dtype=torch.long) for _ in range(2))
        for row, i in enumerate(some):
            tokens[row, : len(texts[i])] = torch.tensor(texts[i])
            mask[row, : len(texts[i])] = 1
        device = next(model.parameters()).device
        tokens, mask = tokens.to(device), mask.to(device)
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        vectors.append(F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1))
        places += some
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(places)] = torch.arange(len(order))
    return torch.cat(vectors)[back.to(vectors[0].device)]


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, changed: none of its dropouts drops anything, so that a short training draws nothing but batches."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


# ---- training ------------------------------------------------------------------------------------------------


def contrastive_loss(queries: Tensor, documents: Tensor, groups: Tensor, scale: float = SCALE) -> Tensor:
    """−log softmax of the right document among all of the batch, mean over n queries; nats.

    queries, documents: unit vectors (n, width), a pair a row. groups: (n,); documents of the query's own group are no
    wrong answers and are left out of its sum. InfoNCE (van den Oord et al. 2018, eq. 4) with the batch's other
    documents as negatives (Henderson et al. 2017, §4.4). Raises ValueError for shapes that are no pairs.
    """
    if queries.shape != documents.shape or queries.dim() != 2 or groups.shape != queries.shape[:1]:
        raise ValueError(
            f"queries and documents must be (n, width) and groups (n,); got {tuple(queries.shape)}, "
            f"{tuple(documents.shape)} and {tuple(groups.shape)}"
        )
    return _of_logits(scale * queries @ documents.T, groups)


def _of_logits(logits: Tensor, groups: Tensor) -> Tensor:
    """The loss of logits (n, n), a query a row, with the other documents of the query's group left out of its sum."""
    same = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    return F.cross_entropy(
        logits.masked_fill(same, -math.inf), torch.arange(len(logits), device=logits.device)
    )


class PairBatches:
    """step → (token ids of summaries and of sources, groups): `batch` pairs, another order in each epoch.

    A pure function of seed and step, as `training.Batches`. What is left of an epoch after its last whole batch is left
    out.
    """

    def __init__(
        self,
        tokenizer: Callable,
        pairs: Sequence[Function],
        batch: int = 32,
        seed: int = 0,
        longest: int = LONGEST,
    ):
        if len(pairs) < batch:
            raise ValueError(f"{len(pairs)} pairs are fewer than a batch of {batch}")
        self.summaries = tokenise(tokenizer, [each.summary for each in pairs], longest)
        self.sources = tokenise(tokenizer, [each.source for each in pairs], longest)
        self.groups, self.batch, self.seed = groups_of(pairs), batch, seed
        self.steps_per_epoch = len(pairs) // batch

    def __call__(self, step: int) -> tuple[tuple[list[list[int]], list[list[int]]], Tensor]:
        epoch, within = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(1_000 * self.seed + epoch)
        order = torch.randperm(len(self.groups), generator=generator)
        chosen = order[within * self.batch : (within + 1) * self.batch].tolist()
        return ([self.summaries[i] for i in chosen], [self.sources[i] for i in chosen]), self.groups[chosen]


def pair_loss(model: nn.Module, texts: tuple[list, list], groups: Tensor) -> Tensor:
    """`contrastive_loss` of a batch of `PairBatches`, as `training.fit` asks for it."""
    summaries, sources = texts
    return contrastive_loss(embed(model, summaries, 16), embed(model, sources, 16), groups)


# ---- measuring -----------------------------------------------------------------------------------------------


def ranks(scores: Tensor, query_groups: Tensor, document_groups: Tensor) -> Tensor:
    """(n,) int64: the place, from 1, of the first right document for each query.

    scores: (n, m), larger is better; right are the documents of the query's group. A wrong document with the same
    score stands before a right one, so that a system which gives all the same score finds nothing.
    Raises ValueError where a query has no right document.
    """
    right = query_groups[:, None] == document_groups
    if not right.any(1).all():
        raise ValueError("every query needs a document of its group")
    best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right).sum(1)


def measures(places: Tensor) -> dict[str, float]:
    """ "recall@1", "recall@10" and "mrr", the mean reciprocal rank, of the places that `ranks` gives."""
    return {
        "recall@1": float((places <= 1).double().mean()),
        "recall@10": float((places <= 10).double().mean()),
        "mrr": float((1 / places.double()).mean()),
    }


def in_pools(scores: Tensor, groups: Tensor, size: int, draws: int = 20, seed: int = 0) -> float:
    """The mean reciprocal rank where `size` of the n pairs are drawn and each query ranks their documents alone.

    scores: (n, n), a pair a row and a column. The mean over `draws`: a smaller pool is an easier task, so that numbers
    of pools of different sizes must not be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        some = torch.randperm(len(groups), generator=generator)[:size]
        found.append(measures(ranks(scores[some][:, some], groups[some], groups[some]))["mrr"])
    return sum(found) / draws


def pool_loss(scores: Tensor, groups: Tensor, scale: float = SCALE) -> float:
    """Nats a query: `contrastive_loss` over a whole pool, of cosines (n, n). Smoother than ranks are."""
    return float(_of_logits(scale * scores, groups))


# ---- without a model -----------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words in lower case; names are taken apart: `readAllLines` and `read_all_lines` are both read, all, lines."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", text)
    return re.findall(r"[a-z0-9]+", apart.lower())


def bm25(queries: Sequence[str], documents: Sequence[str], k_1: float = 1.2, b: float = 0.75) -> Tensor:
    """Scores (queries, documents) of BM25: shared words count, rare ones more, in short documents more.

    Σ over the query's words of log(1 + (N − n + ½)/(n + ½)) · f / (f + k₁ (1 − b + b · length / mean length)), where f
    is how often the word stands in the document, n in how many of the N documents. Robertson and Zaragoza (2009), The
    Probabilistic Relevance Framework, §3.4; the 1 in the logarithm, which keeps it above zero, is Lucene's.
    """
    counts = [Counter(words(each)) for each in documents]
    lengths = torch.tensor([float(each.total()) for each in counts])
    room = k_1 * (1 - b + b * lengths / lengths.mean().clamp(min=1))
    where: dict[str, tuple[list[int], list[int]]] = {}
    for place, each in enumerate(counts):
        for word, count in each.items():
            places, times = where.setdefault(word, ([], []))
            places.append(place)
            times.append(count)
    scores = torch.zeros(len(queries), len(documents))
    for row, query in enumerate(queries):
        for word in words(query):
            if word in where:
                places, times = (torch.tensor(each) for each in where[word])
                rarity = math.log(1 + (len(documents) - len(places) + 0.5) / (len(places) + 0.5))
                scores[row, places] += rarity * times / (times + room[places])
    return scores
