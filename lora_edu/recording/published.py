"""What is recorded of a published fine-tune: spectra, subspaces, and the decisions that each rank of ΔW keeps.

The models come from lora_edu.data.published. Their encoder is written out here in plain torch, forward only; a test
compares it with the library that its authors used.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.nn import functional as F

from lora_edu import lowrank
from lora_edu.data import published

# How SMILES are cut into tokens, after the authors' package (Schwaller et al. 2021, rxnfp 0.1.0, MIT licence).
SMILES = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
KINDS = {  # as the chapter says → as BERT's parameters are called
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
TABLES = {"tokens": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings"}
LAYERS, HEADS = 12, 4
RANKS = (1, 2, 4, 8, 16, 32, 64)  # of the cuts
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of the subspaces that are compared
TUNED = ("tuned", "tuned_50")


def body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with names as in the encoder itself: one of the three checkpoints has no `bert.` before them."""
    return {name.removeprefix("bert."): value for name, value in state.items()}


def kinds(state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Kind → its matrices, a layer each; the two tables of embeddings and the pooler are kinds of one matrix."""
    found = {
        kind: [state[f"encoder.layer.{layer}.{name}.weight"] for layer in range(LAYERS)]
        for kind, name in KINDS.items()
    }
    found |= {kind: [state[f"{name}.weight"]] for kind, name in TABLES.items()}
    return found | {"pooler": [state["pooler.dense.weight"]]}


def kind_of(name: str) -> str | None:
    """The kind of a matrix of the encoder or of a table, by its whole name; None for any other."""
    own = re.sub(r"^encoder\.layer\.\d+\.", "", name.removesuffix(".weight"))
    return next((kind for kind, each in (KINDS | TABLES).items() if each == own), None)


def tokens(reaction: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Token ids of a reaction in SMILES, between the begin and the end token of BERT.

    Raises ValueError for text that is no SMILES, or has a token that the model has never seen.
    """
    pieces = SMILES.findall(reaction)
    if "".join(pieces) != reaction:
        raise ValueError(f"{reaction!r} is not all SMILES: read as {' '.join(pieces)}")
    if unknown := [piece for piece in pieces if piece not in vocabulary]:
        raise ValueError(f"{reaction!r} has {unknown[0]!r}, which the model's vocabulary lacks")
    return [vocabulary[piece] for piece in ("[CLS]", *pieces, "[SEP]")]


@torch.no_grad()
def classify(state: Mapping[str, Tensor], ids: Sequence[Sequence[int]]) -> Tensor:
    """Logits (n, classes) of n token sequences: BERT's encoder, its pooler on the first token, the classifier.

    Devlin et al. 2018, with layer norm after each sum; state: names as `body` gives them.
    """
    longest = max(map(len, ids))
    padded = torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids])
    there = (torch.arange(longest) < torch.tensor([[len(each)] for each in ids]))[:, None, None, :]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-12)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    x = state["embeddings.word_embeddings.weight"][padded]
    x = x + state["embeddings.position_embeddings.weight"][:longest]
    x = norm(x + state["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (heads(linear(x, f"{at}.{KINDS[kind]}")) for kind in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there).transpose(1, 2).flatten(2)
        x = norm(x + linear(mixed, f"{at}.{KINDS['output']}"), f"{at}.attention.output.LayerNorm")
        wide = F.gelu(linear(x, f"{at}.{KINDS['up']}"))
        x = norm(x + linear(wide, f"{at}.{KINDS['down']}"), f"{at}.output.LayerNorm")
    return linear(torch.tanh(linear(x[:, 0], "pooler.dense")), "classifier")


class Cut(NamedTuple):
    """ΔW as singular vectors, by the name of its matrix, and all that stays as tuned: cut to any rank at no price."""

    base: dict[str, Tensor]
    tuned: dict[str, Tensor]
    factors: dict[str, lowrank.Factors]

    def state(self, rank: int, kind: str | None = None) -> dict[str, Tensor]:
        """The tuned model with every ΔW cut to `rank` (0: none of it left), or only that of one kind of matrix.

        Biases, layer norms, pooler and classifier stay as tuned: the last two were trained from scratch.
        """
        state = dict(self.tuned)
        for name, (U, S, Vh) in self.factors.items():
            if kind is None or kind_of(name) == kind:
                state[name] = self.base[name] + (U[:, :rank] * S[:rank]) @ Vh[:rank]
        return state


def cut(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Cut:
    """The matrices of encoder and embeddings that two checkpoints of `body` have, with the SVD of their difference."""
    names = [f"encoder.layer.{layer}.{name}.weight" for layer in range(LAYERS) for name in KINDS.values()]
    names += [f"{name}.weight" for name in TABLES.values()] + ["embeddings.token_type_embeddings.weight"]
    return Cut(dict(base), dict(tuned), {name: lowrank.svd(tuned[name] - base[name]) for name in names})


def behaviour(pair: Cut, ids: Sequence[Sequence[int]], tell: Callable[[str], object]) -> dict[str, Tensor]:
    """Class of each reaction and KL(tuned ‖ cut) in nats, for the tuned model and each cut of it.

    Rows of `classes` and `divergence` (conditions, n): rank 0, those of RANKS, all of ΔW; then one kind cut to 8
    at a time, the others whole; last, the base with the tuned pooler and classifier and nothing else.
    """
    top = {key: value for key, value in pair.tuned.items() if key.startswith(("pooler.", "classifier."))}
    states = [(f"rank {rank}", lambda rank=rank: pair.state(rank)) for rank in (0, *RANKS)]
    states.append(("all of it", lambda: pair.tuned))
    states += [(f"{kind} cut to 8", lambda kind=kind: pair.state(8, kind)) for kind in (*KINDS, *TABLES)]
    states.append(("pooler and classifier alone", lambda: pair.base | top))
    right = classify(pair.tuned, ids).log_softmax(-1)
    rows = []
    for title, make in states:
        tell(title)
        rows.append(classify(make(), ids).log_softmax(-1))
    guesses = torch.stack(rows)
    divergence = (right.exp() * (right - guesses)).sum(-1)
    return {
        "classes": guesses.argmax(-1).to(torch.uint8),
        "divergence": divergence.clamp(min=0).half(),
        "confidence": right.exp().amax(-1).half(),
    }


def weights(states: Mapping[str, Mapping[str, Tensor]], sizes: Sequence[int] = SIZES) -> dict[str, Tensor]:
    """Spectra of W_o and of both ΔW, cosines, and how far the two ΔW's directions overlap, by kind and layer.

    `base/query`, `tuned/query`, … (layers, min(rows, columns)): singular values. `overlap/query/right` (layers,
    len(sizes)): φ(i, i) of the two ΔW; `overlap_base/…` the same of the second ΔW and W_o, which shares the base's
    own directions. `cosine/query` (layers, 4): ΔW with ΔW; W_o with each tuned W; ΔW_50 with W_o.
    """
    base = kinds(states["base"])
    both = [kinds(states[name]) for name in TUNED]
    found: dict[str, Tensor] = {}
    for kind, matrices in base.items():
        updates = [[W - W_o for W, W_o in zip(group[kind], matrices, strict=True)] for group in both]
        found[f"base/{kind}"] = torch.stack([lowrank.svd(W).S for W in matrices]).half()
        for name, group in zip(TUNED, updates, strict=True):
            found[f"{name}/{kind}"] = torch.stack([lowrank.svd(dW).S for dW in group]).half()
        for side in ("right", "left"):
            for title, others in (("overlap", updates[0]), ("overlap_base", matrices)):
                rows = [
                    lowrank.similarity_grid(dW, other, sizes[-1], sizes[-1], side).diagonal()
                    for dW, other in zip(updates[1], others, strict=True)
                ]
                found[f"{title}/{kind}/{side}"] = torch.stack(rows)[:, [i - 1 for i in sizes]].half()
        pairs = zip(matrices, *(group[kind] for group in both), *updates, strict=True)
        found[f"cosine/{kind}"] = torch.tensor(
            [
                [_cosine(d_1, d_2), _cosine(W_o, W_1), _cosine(W_o, W_2), _cosine(d_2, W_o)]
                for W_o, W_1, W_2, d_1, d_2 in pairs
            ]
        )
    return found


def measure(name: str = "rxnfp", tell: Callable[[str], object] = lambda _: None) -> published.Recorded:
    """Everything that is recorded of a fetched model, measured here and now. Raises PublishedError without it."""
    states = {each: body(published.load_published(name, each)) for each in ("base", *TUNED)}
    vocabulary = published.load_vocabulary(name)
    reactions = published.load_reactions()
    tell("spectra")
    tensors = weights(states)
    pair = cut(states["base"], states["tuned_50"])
    tensors |= behaviour(pair, [tokens(each, vocabulary) for each in reactions], tell)
    facts = {
        "model": published.PUBLISHED[name].requirement,
        "about": published.PUBLISHED[name].about,
        "command": f"lora-edu data --published {name}, then the stage `published` of make data",
        "versions": {each: version(each).partition("+")[0] for each in ("torch", "numpy")},
        "ranks": list(RANKS),
        "sizes": list(SIZES),
        "reactions": len(reactions),
        "vocabulary": list(vocabulary),
        "energy": [0.0, *(energy_kept(pair, rank) for rank in RANKS), 1.0],
    }
    return published.Recorded(tensors, facts)


def energy_kept(pair: Cut, rank: int) -> float:
    """The share of Σ‖ΔW‖², over all matrices that are cut, that stays at a rank."""
    kept, whole = (
        sum(float(S[:r].double().square().sum()) for _, S, _ in pair.factors.values()) for r in (rank, None)
    )
    return round(kept / whole, 4)


def interval(kept: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) for a share of which `kept` of `n` were seen: it stays within 0 and 1."""
    if not 0 <= kept <= n or n < 1:
        raise ValueError(f"kept must be between 0 and n, and n at least 1; got {kept} of {n}")
    share, more = kept / n, z * z / n
    middle = (share + more / 2) / (1 + more)
    half = z * math.sqrt(share * (1 - share) / n + more / (4 * n)) / (1 + more)
    return max(0.0, middle - half), min(1.0, middle + half)


def packed(recorded: published.Recorded) -> bytes:
    """The record as a safetensors file, its facts in the header."""
    return save_safetensors(
        {key: value.contiguous() for key, value in recorded.tensors.items()},
        {"facts": json.dumps(recorded.facts)},
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))
