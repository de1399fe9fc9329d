"""Prefix tuning: trained keys and values before the text's in every layer (Li & Liang 2021).

Not for embeddings before the text, which reach the layers through the layers before (prompt_tuning.py).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_edu.lora import AdapterError
from lora_edu.lora.inject import unwrap
from lora_edu.text import printable

from .applied import applied_options, check_applied, mark, refuse_second, remark, take_off
from .virtual_tokens import (
    check_seed,
    check_tokens,
    connect_prefix,
    disconnect,
    keys_and_values,
    peft_config,
    place,
    plain_embeddings,
    shape_of_prefix,
    to_place,
    token_ids,
)

NAME = "prefix_tuning"


class Prefix(nn.Module):
    """Keys and values trained as they are: () → (tokens, 2 · layers · width)."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        return self.values


class ReparametrisedPrefix(nn.Module):
    """Keys and values out of an MLP: () → (tokens, 2 · layers · width)."""

    def __init__(self, tokens: int, layers: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * layers * width))

    def forward(self) -> Tensor:
        return self.mlp(self.embedding.weight)


def prefix_tuning(
    model: nn.Module,
    tokens: int = 20,
    reparametrise: bool | int = False,
    *,
    init: str | Iterable[int] = "random",
    seed: int = 0,
) -> nn.Module:
    """Train keys P_K and values P_V (tokens, d) in each of L layers; returns the model, changed in place.

    Every token of the text attends to [P_K; K] and [P_V; V]. Everything else is frozen: 2 · L · tokens · d numbers are
    trained and stored, d being the width of a layer's keys (of all heads; with grouped-query attention less than the
    model's). The prefix is used as a cache would hold it: in a model with rotary positions the keys are not turned, and
    the text's positions are shifted by `tokens` in every model, as for real tokens there. So in a causal model a prefix
    of real tokens' keys and values gives exactly what the model gives for those tokens and the text. It takes its
    share of the context. The model is called as before and returns logits (batch, time, vocabulary).

    reparametrise: a hidden width h (True: d) trains P' (tokens, d) and an MLP d → h → 2·L·d with tanh between, and
    [P_K, P_V] is what comes out (§4.3); `fold_prefix_tuning` puts that in the MLP's place afterwards. The paper found
    training without it unstable. P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602) is the same method, the MLP a choice.
    init: "random", normal with deviation 1 as in PEFT; or token ids, cut or repeated to `tokens`, for the keys and
    values of these words (§7.4, without reparametrise).

    Li & Liang (2021), arXiv 2101.00190. Works on TinyLM and models of transformers that take a cache; `generate` too. A
    cache that is not empty is taken to begin with the prefix. Raises ValueError or TypeError that names what doesn't
    fit; the model is then unchanged. With gradient checkpointing a forward raises RuntimeError.
    """
    refuse_second(model)
    inner = unwrap(model)
    where = place(inner)
    check_tokens(tokens, where)
    check_seed(seed)
    layers, heads, each = shape_of_prefix(inner)
    width = heads * each
    hidden = _hidden(reparametrise, width)
    if isinstance(init, str) and init != "random":
        raise ValueError(f'init must be "random" or token ids; got {init!r}')
    if not isinstance(init, str):
        if hidden:
            raise ValueError(
                "init by tokens is for a prefix without reparametrise: the MLP decides what comes out"
            )
        init = token_ids(init, tokens, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hidden:
            prefix = ReparametrisedPrefix(tokens, layers, width, hidden)
        elif init == "random":
            prefix = Prefix(torch.randn(tokens, 2 * layers * width))
        else:
            prefix = Prefix(keys_and_values(inner, init))
    options = {"tokens": tokens, "reparametrise": hidden or False, "init": init, "seed": seed}
    _put_in(model, prefix, options, layers, heads)
    return model


def remove_prefix_tuning(model: nn.Module) -> nn.Module:
    """Take the prefix out again; the model is as it was, bit for bit."""
    return take_off(model, NAME)


def fold_prefix_tuning(model: nn.Module) -> nn.Module:
    """Put the keys and values themselves in the MLP's place: the same outputs; returns the model.

    2 · L · tokens · d numbers are trainable then. Raises ValueError where there is no MLP to fold.
    """
    values = state(model)["prompt_embeddings"]
    inner = unwrap(model)
    if isinstance(inner.prefix_tuning, Prefix):
        raise ValueError("this prefix has no MLP to fold: it was not reparametrised, or is folded already")
    layers, heads = inner.prefix_tuning.layers, inner.prefix_tuning.heads
    undo(inner)
    remark(model, options={"tokens": len(values), "reparametrise": False})
    inner.prefix_tuning = Prefix(values)
    connect_prefix(inner, inner.prefix_tuning, len(values), layers, heads)
    return model


def undo(model: nn.Module) -> None:
    disconnect(model, model.prefix_tuning)
    del model.prefix_tuning


def _put_in(model: nn.Module, prefix: nn.Module, options: dict, layers: int, heads: int) -> None:
    mark(model, NAME, options, undo)
    inner = unwrap(model)
    inner.prefix_tuning = to_place(prefix, place(inner))
    connect_prefix(inner, inner.prefix_tuning, options["tokens"], layers, heads)


def _hidden(reparametrise: bool | int, width: int) -> int:
    """The MLP's hidden width, 0 for none."""
    if isinstance(reparametrise, bool):
        return width if reparametrise else 0
    if not isinstance(reparametrise, int) or reparametrise < 1:
        raise ValueError(
            f"reparametrise must be False, True or the MLP's hidden width of at least 1; got {reparametrise!r}"
        )
    return reparametrise


# Files


@torch.no_grad()
def state(model: nn.Module) -> dict[str, Tensor]:
    """What is stored: keys and values (tokens, 2 · layers · d) in PEFT's order, without the MLP."""
    check_applied(model, NAME)
    return {"prompt_embeddings": unwrap(model).prefix_tuning().detach().clone()}


def load(model: nn.Module, options: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The prefix of `state` into a model without one; AdapterError where it doesn't fit, and nothing is changed."""
    return from_peft(model, {}, tensors)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]] | None:
    """PEFT's configuration and tensors, or None for TinyLM, which PEFT can't take."""
    tensors, options = state(model), applied_options(model)
    inner = unwrap(model)
    if not hasattr(inner, "config"):
        return None
    tokens, numbers = tensors["prompt_embeddings"].shape
    width = numbers // (2 * inner.prefix_tuning.layers)
    config = peft_config(inner, "PREFIX_TUNING", tokens, width, inner.prefix_tuning.heads)
    hidden = options["reparametrise"]
    config |= {"prefix_projection": bool(hidden), "encoder_hidden_size": hidden or width}
    return config | {"init_weights": None}, tensors


def from_peft(model: nn.Module, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """PEFT's prefix into a model without one; AdapterError where it doesn't fit, and nothing is changed."""
    refuse_second(model)
    inner = unwrap(model)
    where = place(inner)
    layers, heads, each = shape_of_prefix(inner)
    values = plain_embeddings(tensors, 2 * layers * heads * each, "a prefix", config)
    for name, mine in (("num_layers", layers), ("num_attention_heads", heads), ("token_dim", heads * each)):
        if config.get(name) not in (None, mine):
            raise AdapterError(
                f"{name} is {printable(repr(config[name]))} in the file and {mine} in the model"
            )
    check_tokens(len(values), where)
    _put_in(model, Prefix(values.clone()), {"tokens": len(values), "reparametrise": False}, layers, heads)
    return model
