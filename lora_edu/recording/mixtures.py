"""Chapter 10's map of two adapters on one base: for each pair of weights, losses on three texts and what is written.

No training here, and no weights are kept: the adapters ship, and any row can be computed again from them.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lora_edu.data import adapter_folder, load_checkpoint, load_corpus
from lora_edu.lora import read_adapter
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

ADAPTERS = {"reference": "reference_r8", "manual": "manual_r8"}  # text → adapter tuned to it
TEXTS = ("reference", "manual", "code")
WINDOWS, CONTEXT = 8, 256  # of each held-out text, evenly spread
PROMPT, WRITTEN, TEMPERATURE, SEED = "Return the", 70, 0.7, 1
GRID = (-0.5, 0.0, 0.5, 1.0, 1.5)
ALONE = (-1.0, 2.0, 2.5, 3.0)  # further out than the grid, for each of the two alone
BETWEEN = (
    0.125,
    0.25,
    0.375,
    0.625,
    0.75,
    0.875,
)  # from one adapter to the other, beside the grid's 0, 0.5 and 1

HEAD = {  # of mixtures.json: how its rows were made
    "command": "make data",
    "adapters": ADAPTERS,
    "tokens": WINDOWS * CONTEXT,
    "prompt": PROMPT,
    "temperature": TEMPERATURE,
    "seed": SEED,
}


def pairs() -> list[tuple[float, float]]:
    """All pairs of weights (reference, manual): a grid, each of the two alone, and from one to the other."""
    grid = [(one, other) for one in GRID for other in GRID]
    alone = [pair for weight in ALONE for pair in ((weight, 0.0), (0.0, weight))]
    return grid + alone + [(weight, 1 - weight) for weight in BETWEEN]


def updates() -> dict[str, dict[str, Tensor]]:
    """Text → name of a weight → ΔW of the adapter tuned to that text."""
    return {
        text: {
            f"{name}.weight": factors.delta_weight()
            for name, factors in read_adapter(adapter_folder(adapter)).layers.items()
        }
        for text, adapter in ADAPTERS.items()
    }


def held_out(text: str) -> Tensor:
    """The windows of a text's test split that the losses are measured on: (WINDOWS, CONTEXT + 1), evenly spread."""
    tokens = load_corpus(text).test
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, WINDOWS).long()
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss(model: TinyLM, windows: Tensor) -> float:
    """Mean loss in nats a token over windows of a text, a row each."""
    return sum(evaluate(model, window, CONTEXT) for window in windows) / len(windows)


def mixed(base: Mapping[str, Tensor], delta: Mapping[str, Mapping], weights: Mapping[str, float]) -> TinyLM:
    """The base with Σ w_i ΔW_i added to its weights."""
    state = dict(base)
    for text, weight in weights.items():
        for name, dW in delta[text].items():
            state[name] = state[name] + weight * dW
    return TinyLM.from_state_dict(state)


def record_all(
    pairs: list[tuple[float, float]], tell: Callable[[list], object] = iter, texts: tuple[str, ...] = TEXTS
) -> Iterator[dict]:
    """A row for each pair: the weights, the losses in nats a token, and what is written after the prompt."""
    base, delta = load_checkpoint("base"), updates()
    windows = {text: held_out(text) for text in texts}
    tokenizer = load_corpus("reference").tokenizer
    prompt = torch.tensor(tokenizer.encode(PROMPT).ids)
    for pair in tell(pairs):
        weights = dict(zip(ADAPTERS, pair, strict=True))
        model = mixed(base, delta, weights)
        written = model.generate(prompt, WRITTEN, temperature=TEMPERATURE, seed=SEED)
        yield {
            "weights": weights,
            "losses": {text: round(loss(model, tokens), 4) for text, tokens in windows.items()},
            "text": tokenizer.decode(written.tolist()),
        }
