"""Prompt tuning: trained embeddings of virtual tokens before the text, everything else frozen (Lester et al. 2021).

Not for prompts made of words, and not for keys and values in every layer (prefix_tuning.py).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu.lora.inject import unwrap

from .applied import check_applied, mark, refuse_second, take_off
from .virtual_tokens import (
    Place,
    check_seed,
    check_tokens,
    connect_prompt,
    disconnect,
    peft_config,
    place,
    plain_embeddings,
    to_place,
    token_ids,
)

NAME = "prompt_tuning"


class Prompt(nn.Module):
    """Embeddings of virtual tokens, trained as they are: () → (tokens, width)."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)

    def forward(self) -> Tensor:
        return self.embeddings


def prompt_tuning(
    model: nn.Module,
    tokens: int = 20,
    init: str | Iterable[int] = "vocabulary",
    *,
    common: int = 5_000,
    seed: int = 0,
) -> nn.Module:
    """Train P (tokens, width) in [P; X], X being the embedded text (batch, time, width); returns the model, changed.

    Everything else is frozen: tokens · width numbers are trained and stored. The model is called as before and returns
    logits (batch, time, vocabulary) of the reader's own tokens, whose positions are shifted by `tokens`: so a P of real
    tokens' embeddings gives exactly what the model gives for those tokens and the text. The first token of the text is
    not a target, as without a prompt (PEFT's `labels` also train the last virtual token to foretell it). Text and
    prompt share the context. In a model that looks both ways, virtual tokens see the text; BERT's pooler reads the
    first virtual token, as in PEFT.

    init (§2.1, §3.2): "vocabulary", embeddings of different tokens drawn among the first `common` of the table (the
    paper's 5 000; these are the most frequent ones where a tokenizer orders by frequency, as SentencePiece and BPE do;
    a table that begins with unused tokens, as BERT's, wants more); "random", uniform in [−0.5, 0.5]; or token
    ids, cut or repeated to `tokens` as in PEFT. Lester et al. (2021), arXiv 2104.08691.

    Works on TinyLM and on models of transformers with an encoder or a decoder; `generate` too. A cache that is not
    empty is taken to begin with the prompt. Raises ValueError or TypeError that names what doesn't fit; the model is
    then unchanged.
    """
    refuse_second(model)
    inner = unwrap(model)
    where = place(inner)
    check_tokens(tokens, where)
    check_seed(seed)
    init = init if isinstance(init, str) else token_ids(init, tokens, where)
    prompt = Prompt(_start(where, tokens, init, common, seed))
    put_in(model, prompt, {"tokens": tokens, "init": init, "common": common, "seed": seed})
    return model


def remove_prompt_tuning(model: nn.Module) -> nn.Module:
    """Take the prompt out again; the model is as it was, bit for bit."""
    return take_off(model, NAME)


def put_in(model: nn.Module, prompt: Prompt, options: dict) -> None:
    """Mark the model and put a prompt into it."""
    mark(model, NAME, options, undo)
    inner = unwrap(model)
    inner.prompt_tuning = to_place(prompt, place(inner))
    connect_prompt(inner, inner.prompt_tuning, options["tokens"])


def undo(model: nn.Module) -> None:
    disconnect(model, model.prompt_tuning)
    del model.prompt_tuning


def _start(where: Place, tokens: int, init: str | list[int], common: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(init, str):
        if init == "random":
            return torch.rand(tokens, where.width, generator=generator) - 0.5
        if init != "vocabulary":
            raise ValueError(f'init must be "vocabulary", "random" or token ids; got {init!r}')
        if isinstance(common, bool) or not isinstance(common, int) or common < 1:
            raise ValueError(
                f"common must be at least 1 (tokens of the vocabulary to draw from); got {common!r}"
            )
        pool = min(common, where.embedding.weight.shape[0])
        ids = torch.randperm(pool, generator=generator)[:tokens].tolist()
        init = token_ids(ids, tokens, where)  # more virtual tokens than words to draw: they come round again
    with torch.no_grad():
        return where.embedding(torch.tensor(init, device=where.embedding.weight.device)).clone()


# Files


def state(model: nn.Module) -> dict[str, Tensor]:
    """What is stored: the embeddings (tokens, width)."""
    check_applied(model, NAME)
    return {"prompt_embeddings": unwrap(model).prompt_tuning().detach().clone()}


def load(model: nn.Module, options: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The prompt of `state` into a model without one; AdapterError where it doesn't fit, and nothing is changed."""
    return from_peft(model, {}, tensors)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]] | None:
    """PEFT's configuration and tensors, or None for TinyLM, which PEFT can't take."""
    tensors, inner = state(model), unwrap(model)
    if not hasattr(inner, "config"):
        return None
    config = config_of(inner, "PROMPT_TUNING", tensors)
    config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    return config | {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}, tensors


def config_of(model: nn.Module, kind: str, tensors: Mapping[str, Tensor]) -> dict:
    """What PEFT's configuration of a prompt says, however it was trained."""
    heads = place(model).backbone.config.num_attention_heads
    return peft_config(model, kind, *tensors["prompt_embeddings"].shape, heads)


def from_peft(model: nn.Module, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """PEFT's prompt into a model without one; AdapterError where it doesn't fit, and nothing is changed."""
    refuse_second(model)
    where = place(unwrap(model))
    values = plain_embeddings(tensors, where.width, "a prompt", config)
    check_tokens(len(values), where)
    put_in(model, Prompt(values.clone()), {"tokens": len(values)})
    return model
