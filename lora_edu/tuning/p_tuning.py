"""P-Tuning: the virtual tokens' embeddings come out of a small network, the prompt encoder (Liu et al. 2021).

Not P-Tuning v2, which trains keys and values in every layer (prefix_tuning.py).
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from lora_edu.lora.inject import unwrap

from .applied import applied_options, check_applied, mark, refuse_second, remark, take_off
from .prompt_tuning import NAME as FOLDED
from .prompt_tuning import Prompt, config_of
from .prompt_tuning import from_peft as prompt_from_peft
from .prompt_tuning import undo as undo_prompt
from .virtual_tokens import (
    check_seed,
    check_tokens,
    connect_prompt,
    disconnect,
    place,
    to_place,
)

NAME = "p_tuning"


class PromptEncoder(nn.Module):
    """Virtual tokens through an MLP, or through a bidirectional LSTM and an MLP: () → (tokens, width)."""

    def __init__(self, tokens: int, width: int, encoder: str, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = None
        if encoder == "lstm":
            between = dropout if layers > 1 else 0.0  # torch's LSTM has dropout between its layers only
            self.lstm = nn.LSTM(width, hidden, layers, dropout=between, bidirectional=True)
            sides = [2 * hidden, 2 * hidden, width]
        else:
            sides = [width, hidden, hidden, width]
        linear = [nn.Linear(*pair) for pair in pairwise(sides)]
        self.mlp = nn.Sequential(linear[0], *(each for one in linear[1:] for each in (nn.ReLU(), one)))

    def forward(self) -> Tensor:
        x = self.embedding.weight
        return self.mlp(x if self.lstm is None else self.lstm(x)[0])


def p_tuning(
    model: nn.Module,
    tokens: int = 20,
    encoder: str = "mlp",
    hidden: int | None = None,
    *,
    layers: int = 2,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Train virtual tokens' embeddings P = f(E) before the text, with E (tokens, d) and f; returns the model, changed.

    encoder "lstm" is the paper's (§3.2 of its first version): a bidirectional LSTM of `layers` layers, then an MLP of
    two layers with ReLU between. "mlp", the one that PEFT recommends, is an MLP of three layers and treats every token
    alone. hidden h is the width d unless given; `dropout` acts between the layers of the LSTM.

    Trained are, with k tokens, k·d + 2dh + h² + 2h + d numbers ("mlp"), or k·d + the LSTM's + 4h² + 2h + 2hd + d
    ("lstm"). Stored are the k·d of P: f is not needed once P is found. `fold_p_tuning` puts P in the place of f; from
    then on it is prompt tuning (`remove_prompt_tuning`), with the same outputs. The paper also sets virtual tokens
    between words of a template; here, as in PEFT, all of them come first. How the model is called, positions and the
    context are as in `prompt_tuning`. Liu et al. (2021), 'GPT Understands, Too', arXiv 2103.10385; PEFT's
    PromptEncoder has the same sizes.

    Raises ValueError or TypeError that names what doesn't fit; the model is then unchanged.
    """
    refuse_second(model)
    where = place(unwrap(model))
    check_tokens(tokens, where)
    check_seed(seed)
    if encoder not in ("mlp", "lstm"):
        raise ValueError(f'encoder must be "mlp" or "lstm"; got {encoder!r}')
    hidden = where.width if hidden is None else hidden
    for name, number in (("hidden", hidden), ("layers", layers)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {number!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout!r}")
    if encoder == "mlp" and (layers, dropout) != (2, 0.0):
        raise ValueError(f'layers and dropout are for encoder="lstm"; got {layers} and {dropout} with "mlp"')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = PromptEncoder(tokens, where.width, encoder, hidden, layers, dropout)
    options = {"tokens": tokens, "encoder": encoder, "hidden": hidden}
    mark(model, NAME, options | {"layers": layers, "dropout": dropout, "seed": seed}, undo)
    inner = unwrap(model)
    inner.p_tuning = to_place(source, where)
    connect_prompt(inner, inner.p_tuning, tokens)
    return model


def remove_p_tuning(model: nn.Module) -> nn.Module:
    """Take the prompt and its encoder out again; the model is as it was, bit for bit."""
    return take_off(model, NAME)


def fold_p_tuning(model: nn.Module) -> nn.Module:
    """Put P itself in the encoder's place: tokens · width trainable numbers, the same outputs; returns the model.

    It is prompt tuning from then on, and `remove_prompt_tuning` takes it out. Raises ValueError where there is no
    P-Tuning to fold.
    """
    embeddings = state(model)["prompt_embeddings"]
    inner = unwrap(model)
    undo(inner)
    remark(model, name=FOLDED, options={"tokens": len(embeddings)}, undo=undo_prompt)
    inner.prompt_tuning = Prompt(embeddings)
    connect_prompt(inner, inner.prompt_tuning, len(embeddings))
    return model


def undo(model: nn.Module) -> None:
    disconnect(model, model.p_tuning)
    del model.p_tuning


# Files


@torch.no_grad()
def state(model: nn.Module) -> dict[str, Tensor]:
    """What is stored: the embeddings P (tokens, width), without the encoder, and without its dropout."""
    check_applied(model, NAME)
    source = unwrap(model).p_tuning
    was_training = source.training
    embeddings = source.eval()()
    source.train(was_training)
    return {"prompt_embeddings": embeddings}


def load(model: nn.Module, options: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The P of `state` into a model without one, as prompt tuning: the encoder that made it isn't stored."""
    return prompt_from_peft(model, {}, tensors)


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]] | None:
    """PEFT's configuration and tensors (P, without the encoder), or None for TinyLM, which PEFT can't take."""
    tensors, options = state(model), applied_options(model)
    inner = unwrap(model)
    if not hasattr(inner, "config"):
        return None
    config = config_of(inner, "P_TUNING", tensors)
    config |= {
        "encoder_reparameterization_type": options["encoder"].upper(),
        "encoder_hidden_size": options["hidden"],
        "encoder_num_layers": options["layers"],
        "encoder_dropout": options["dropout"],
    }
    return config, tensors


def from_peft(model: nn.Module, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """PEFT's P into a model without one, as prompt tuning; AdapterError where it doesn't fit, nothing is changed."""
    return prompt_from_peft(model, config, tensors)
