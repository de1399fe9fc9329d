"""Baselines that any language model must beat: unigram, bigram and trigram with interpolated Kneser–Ney smoothing.

Counting on numpy arrays; for corpora of some million tokens, not more.
"""

import numpy as np
import torch


def baselines(train: torch.Tensor, test: torch.Tensor, vocabulary: int) -> dict[str, float]:
    """Mean nats a token on `test` of three models counted on `train`. train, test: 1-D int64 token ids.

    Interpolated Kneser–Ney (Chen & Goodman 1999, eq. 17–20) with one discount D = n₁ / (n₁ + 2 n₂) an order; the
    unigram has one count added to every token, and so has the lowest order of the other two.
    """
    seen, asked = train.numpy().astype(np.int64), test.numpy().astype(np.int64)
    counts = np.bincount(seen, minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(seen[:-1] * vocabulary + seen[1:], return_counts=True)
    followers = (
        np.bincount(pairs % vocabulary, minlength=vocabulary) + 1.0
    )  # in how many contexts a token stands
    lowest = (followers / followers.sum())[asked]
    context, word = asked[:-1], asked[1:]
    bigram = _smoothed(pairs, pair_counts, context, word, lowest[1:], vocabulary)
    triples, triple_counts = np.unique(
        (seen[:-2] * vocabulary + seen[1:-1]) * vocabulary + seen[2:], return_counts=True
    )
    middle, contexts = np.unique(triples % vocabulary**2, return_counts=True)  # continuation counts of pairs
    lower = _smoothed(middle, contexts, context, word, lowest[1:], vocabulary)
    trigram = _smoothed(
        triples, triple_counts, asked[:-2] * vocabulary + asked[1:-1], asked[2:], lower[1:], vocabulary
    )
    rows = {"unigram": unigram[asked], "bigram": bigram, "trigram": trigram}
    return {name: float(-np.log(probability).mean()) for name, probability in rows.items()}


def _smoothed(grams, counts, context, word, lower, vocabulary: int) -> np.ndarray:
    """max(c(h w) − D, 0) / c(h) + D n(h) / c(h) · lower(w), and `lower` where the context h was never seen."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    contexts, first = np.unique(grams // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(grams)))
    found, at = _look_up(contexts, context)
    total, kind = np.where(found, totals[at], 1), np.where(found, kinds[at], 0)
    hit, where = _look_up(grams, context * vocabulary + word)
    count = np.where(hit, counts[where], 0)
    return np.where(found, np.maximum(count - discount, 0) / total + discount * kind / total * lower, lower)


def _look_up(keys: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return keys[at] == asked, at
