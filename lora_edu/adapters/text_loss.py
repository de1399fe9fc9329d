"""The held-out loss of a model with its adapter cut to several ranks, on a reader's own text: energy is not behaviour.

One of the two modules of the package that open a model with transformers, and only when asked to. Nothing is fetched,
no code from a folder is run, and no pickle is opened.
"""

import argparse
import codecs
import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.data.hub import quiet
from lora_edu.delta.files import CheckpointError
from lora_edu.lora import load_adapter, lora_layers, remove_lora
from lora_edu.lora.adapter_files import Factors, read_adapter
from lora_edu.lora.resizing import cut, singular_values
from lora_edu.paths import expanded
from lora_edu.text import printable

CONTEXT = 512  # tokens read at once, where the model can
BYTES_A_TOKEN = 64  # of text that is read for each token asked for


class HeldOut(NamedTuple):
    """A causal language model in float32, and windows of token ids, (time,) int64: all but the first are predicted."""

    model: nn.Module
    windows: list[Tensor]
    text: Path

    @property
    def predicted(self) -> int:
        return sum(len(each) - 1 for each in self.windows)


class Row(NamedTuple):
    """One cut. loss: mean nats a token. energy: share of all ‖ΔW‖² kept; None where there is no LoRA at all."""

    title: str
    parameters: int
    energy: float | None
    loss: float


Cut = Callable[[str, Factors], int]  # (layer, its factors) → the rank to keep, 0 for none


def add_options(parser: argparse.ArgumentParser, model: str = "needed with --text") -> None:
    """--text, --model, --tokens. model: what to say where --model is not given."""
    parser.add_argument(
        "--text", metavar="FILE", help="plain text in UTF-8: print the held-out loss beside each rank"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help=f"the base, a folder of transformers with its tokenizer ({model})"
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=16384,
        help="how many of the text's tokens (default: 16384)",
    )


def asked_for(options: argparse.Namespace) -> HeldOut | None:
    """What --text and --model name, opened; None where --text is not given."""
    if options.text is None:
        if options.model is not None:
            raise CheckpointError("--model is for the loss on a text: give --text FILE, too")
        return None
    if options.model is None:
        raise CheckpointError(
            "--text needs the base to measure the loss of: --model FOLDER (transformers' own format)"
        )
    return open_text(options.model, options.text, options.tokens)


def open_text(model: str | Path, text: str | Path, tokens: int = 16384) -> HeldOut:
    """The model of a folder and the first `tokens` tokens of a text in UTF-8, cut into windows of CONTEXT at most.

    Raises CheckpointError, in one line, where transformers is not installed, where either can't be read, where the
    model is no causal language model, and where the text has fewer than two tokens.
    """
    model, text = expanded(model), expanded(text)
    if tokens < 2:
        raise CheckpointError(f"--tokens must be at least 2 (the first is not predicted); got {tokens}")
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(
            "--text opens the model with transformers, which is not installed: pip install transformers"
        )
    if not (model / "config.json").is_file():
        raise CheckpointError(
            f"{printable(model)} is no model's folder of transformers: it has no config.json"
        )
    written = _read(text, tokens)
    with quiet():
        ids = _tokens(model, written)
        opened = _opened(model)
    ids = torch.tensor(ids[:tokens], dtype=torch.long)
    table = opened.get_input_embeddings().weight.shape[0]
    if len(ids) < 2 or int(ids.max()) >= table:
        why = (
            f"has {len(ids)} tokens" if len(ids) < 2 else f"has token {int(ids.max())} of a table of {table}"
        )
        raise CheckpointError(f"{printable(text)} can't be measured: it {why}")
    longest = getattr(opened.config, "max_position_embeddings", None) or CONTEXT
    windows = [each for each in ids.split(min(CONTEXT, longest)) if len(each) > 1]
    held = HeldOut(opened, windows, text)
    _check_causal(held)
    return held


def _read(text: Path, tokens: int) -> str:
    try:
        with text.open("rb") as file:
            data = file.read(BYTES_A_TOKEN * tokens)
            whole = not file.read(1)
        return codecs.getincrementaldecoder("utf-8")().decode(data, whole)
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise CheckpointError(f"{printable(text)} must be plain text in UTF-8: {why}") from None
    except OSError as error:
        raise CheckpointError(f"{printable(text)} can't be read: {error.strerror or error}") from None


OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def _tokens(folder: Path, written: str) -> list[int]:
    from transformers import AutoTokenizer

    with _one_line(folder):
        return AutoTokenizer.from_pretrained(str(folder), **OFFLINE)(written)["input_ids"]


def _opened(folder: Path) -> nn.Module:
    """A causal language model in float32, all of whose weights are in the folder."""
    from transformers import AutoModelForCausalLM

    with _one_line(folder):
        model, told = AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **OFFLINE
        )
    if told["missing_keys"]:
        some = printable(min(map(str, told["missing_keys"])))
        raise CheckpointError(
            f"{printable(folder)} lacks weights of a causal language model, such as {some}: its loss would mean nothing"
        )
    return model.float().eval()


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Whatever a stranger's folder makes transformers raise, as a CheckpointError of one line."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{printable(folder)} can't be opened by transformers: {printable(first or type(error).__name__, 200)}"
        ) from None


def _check_causal(held: HeldOut) -> None:
    """A model that looks ahead has no loss of the next token: its earlier logits change with the last token."""
    ids = held.windows[0][:8]
    other = ids.clone()
    other[-1] = (int(ids[-1]) + 1) % held.model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        one, two = (held.model(input_ids=each[None]).logits[0, :-1] for each in (ids, other))
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max())):
        raise CheckpointError(
            f"{type(held.model).__name__} looks at the tokens that follow, so it has no loss of the next token: --text "
            "is for causal language models"
        )


def held_out_loss(held: HeldOut) -> float:
    """Mean cross-entropy of the next token over all windows, in nats."""
    total = 0.0
    with torch.no_grad():
        for ids in held.windows:
            logits = held.model(input_ids=ids[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
    return total / held.predicted


def loss_of(held: HeldOut, model: str | Path) -> float:
    """The loss of another model of the same tokens, such as a fine-tune, on the same windows."""
    with quiet():
        return held_out_loss(held._replace(model=_opened(expanded(model))))


def losses(held: HeldOut, adapter: str | Path, cuts: Mapping[str, Cut]) -> list[Row]:
    """The loss of the base, then with the adapter cut to each of the given ranks, best cut by best cut.

    The adapter is put in once; for each cut its factors, turned into the singular directions of BA, lose the last
    ones. What it trained beside LoRA (modules_to_save, token rows) stays in at every rank. The model is left as it was.
    Raises AdapterError where the adapter doesn't fit the model.
    """
    read = read_adapter(adapter)
    rows = [Row("base", 0, None, held_out_loss(held))]
    spectra = {name: singular_values(each)[0] for name, each in read.layers.items() if each.experts == 1}
    total = sum(float(each.square().sum()) for each in spectra.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(held.model, adapter)
    try:
        layers = lora_layers(held.model)
        full = {name: _turn(layers[name], factors) for name, factors in read.layers.items()}
        for title, rank_of in cuts.items():
            ranks = {name: rank_of(name, factors) for name, factors in read.layers.items()}
            with torch.no_grad():
                for name, lora_B in full.items():
                    layers[name].lora_B.copy_(lora_B)
                    layers[name].lora_B[:, ranks[name] :] = 0
            kept = sum(float(each[: ranks[name]].square().sum()) for name, each in spectra.items())
            parameters = sum(ranks[name] * sum(each.sides) for name, each in read.layers.items())
            rows.append(Row(title, parameters, kept / total if total else 1.0, held_out_loss(held)))
    finally:
        remove_lora(held.model)
    return rows


def _turn(layer: nn.Module, factors: Factors) -> Tensor:
    """Puts A in singular directions into the layer, and returns B in them, (out, r)."""
    most = min(factors.rank, *factors.sides)
    turned = cut(factors, most)
    lora_B = torch.zeros_like(layer.lora_B)
    lora_B[:, :most] = turned.lora_B
    with torch.no_grad():
        layer.lora_A.zero_()
        (layer.lora_A[:, :most] if factors.embedding else layer.lora_A[:most]).copy_(turned.lora_A)
    return lora_B


def quarters(name: str, factors: Factors) -> int:
    return math.ceil(factors.rank / 4)


def halves(name: str, factors: Factors) -> int:
    return math.ceil(factors.rank / 2)


def whole(name: str, factors: Factors) -> int:
    return factors.rank


USUAL: Mapping[str, Cut] = {"0": lambda name, factors: 0, "r/4": quarters, "r/2": halves, "r": whole}


def lines(held: HeldOut, rows: list[Row]) -> list[str]:
    """The table, and which of the cuts keeps 99 % of what the adapter gains."""
    base, last = rows[0].loss, rows[-1].loss
    gain = base - last
    found = [f"Held-out loss, nats a token, on {held.predicted} tokens of {printable(held.text.name)}", ""]
    found.append(f"{'rank':8}{'parameters':>12}{'energy %':>10}{'loss':>9}{'of the gain %':>15}")
    for row in rows:
        energy = "-" if row.energy is None else f"{100 * row.energy:.1f}"
        share = f"{100 * (base - row.loss) / gain:.1f}" if gain else "-"
        found.append(f"{row.title:8}{row.parameters:>12}{energy:>10}{row.loss:>9.4f}{share:>15}")
    if gain <= 0:
        found += ["", f"On this text the adapter gains nothing: the loss is {-gain:.4f} nats higher with it."]
        return found
    enough = min(
        (row for row in rows[1:] if base - row.loss >= 0.99 * gain),
        key=lambda row: row.parameters,
        default=rows[-1],
    )
    found += [
        "",
        f"By this text: {enough.title} keeps at least 99 % of what the adapter gains ({gain:.4f} nats).",
    ]
    return found


def record(held: HeldOut, rows: list[Row]) -> dict:
    """For the JSON of a command."""
    return {"text": str(held.text), "tokens": held.predicted, "losses": [row._asdict() for row in rows]}
