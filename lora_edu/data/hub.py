"""The two real models of the course, opened with transformers: a sentence encoder and a small language model.

Not for getting them (`published.fetch`). One of the two modules of the package that import transformers, where a model
is opened and nowhere else. No network is used unless `download=True` asks for it, no code from a folder is run, no
pickle is opened, and nothing is written to stderr.
"""

import contextlib
import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora_edu.data import published
from lora_edu.data.published import ENCODER, LANGUAGE_MODEL, PublishedError
from lora_edu.paths import expanded
from lora_edu.text import printable

VARIABLES = {ENCODER: "LORA_EDU_ENCODER", LANGUAGE_MODEL: "LORA_EDU_LANGUAGE_MODEL"}
HUB_CACHE = "hub cache"


class Source(NamedTuple):
    """Where a model is. place: a folder, or a name on the hub; gguf: the file in it that holds the weights, if any.

    kind: "named" (an argument or a variable), "fetched" (`lora-edu data --published`) or "hub cache".
    """

    kind: str
    place: str
    gguf: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file, for `quantise_from_gguf`."""
        return Path(self.place) / self.gguf if self.gguf else None


class Opened(NamedTuple):
    """A model in float32, in eval mode, its tokenizer, and where they are from."""

    model: nn.Module
    tokenizer: Callable
    source: Source


def load_encoder(folder: str | Path | None = None, download: bool = False) -> Opened:
    """sentence-transformers/all-MiniLM-L6-v2: a BERT of 6 layers and width 384, 22.7 million parameters.

    The model gives the hidden states, (batch, tokens, 384); a sentence's vector is their mean over its tokens.
    Looked for in this order: `folder`; the folder that the variable LORA_EDU_ENCODER names; what `lora-edu data
    --published sentence-transformers/all-MiniLM-L6-v2` has got, its sha256 checked; the model hub's cache on this
    machine. download: ask the hub over the network last.
    Raises PublishedError, in one line with the way out, where it is in none of them, can't be opened, or transformers
    is not installed.
    """
    source = find_model(ENCODER, folder, download)
    import transformers

    return _open(ENCODER, source, transformers.AutoModel, download)


def load_language_model(folder: str | Path | None = None, download: bool = False) -> Opened:
    """HuggingFaceTB/SmolLM2-135M-Instruct: a Llama of 30 layers and width 576, embedding and head tied.

    Looked for as `load_encoder` does, with the variable LORA_EDU_LANGUAGE_MODEL. What `lora-edu data --published`
    gets is a GGUF file: its weights, 4 bits a number in blocks of 32 (Q4_1), the table in 8 bits, are decoded to
    float32, in about fifteen seconds; `quantise_from_gguf(model, source.gguf_path)` puts the blocks themselves into
    the model. The hub's own weights are bfloat16, so that the two models differ by that rounding: `source` says which
    one this is.
    Raises what `load_encoder` raises, also where a GGUF file is to be opened and the package gguf is not installed.
    """
    source = find_model(LANGUAGE_MODEL, folder, download)
    import transformers

    return _open(LANGUAGE_MODEL, source, transformers.AutoModelForCausalLM, download)


def without_weights(folder: str | Path) -> nn.Module:
    """The language model that a folder's config.json describes, on the meta device: its layers, no numbers."""
    import transformers

    with quiet(), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))


def find_model(name: str, folder: str | Path | None = None, download: bool = False) -> Source:
    """Where the model is, without opening it; nothing is fetched.

    Raises PublishedError where it is nowhere, what a folder lacks, or that transformers or gguf is not installed.
    """
    if name not in VARIABLES:
        raise PublishedError(f"{name!r} can't be opened by name; there are: {', '.join(VARIABLES)}")
    named = folder if folder is not None else os.environ.get(VARIABLES[name])
    package = published.PUBLISHED[name]
    if named:
        source = _in_folder("named", expanded(named))
    elif published.is_fetched(name):
        for file in package.files:
            published.fetched_file(name, file)
        source = _in_folder("fetched", published.folder(name))
    else:
        source = Source(HUB_CACHE, name)
    needed = ("transformers", "gguf") if source.gguf else ("transformers",)
    for library in needed:
        if importlib.util.find_spec(library) is None:
            raise PublishedError(
                f"{name} is opened with {library}, which is not installed: pip install 'lora-edu[hub]'"
            )
    if source.kind == HUB_CACHE and not download and not _is_cached(name):
        raise PublishedError(
            f"{name} is not on this machine: `lora-edu data --published {name}` gets it ({package.size / 1e6:.0f} MB), "
            f"or {VARIABLES[name]} names a folder that has it. Without it the chapter shows what was recorded"
        )
    return source


def _in_folder(kind: str, path: Path) -> Source:
    """A folder of transformers, a folder with one GGUF file, or that file."""
    if path.is_file() and path.suffix == ".gguf":
        return Source(kind, str(path.parent), path.name)
    if (path / "config.json").is_file():
        return Source(kind, str(path))
    files = sorted(each.name for each in path.glob("*.gguf")) if path.is_dir() else []
    if len(files) != 1:
        what = (
            f"it has {len(files)} GGUF files, so name one"
            if files
            else "it has no config.json and no GGUF file"
        )
        raise PublishedError(
            f"{printable(path)} is no model's folder: {what if path.exists() else 'it is not there'}"
        )
    return Source(kind, str(path), files[0])


def _is_cached(name: str) -> bool:
    """Whether the model hub's cache on this machine has the model, as safetensors."""
    from huggingface_hub import try_to_load_from_cache

    return all(
        isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "model.safetensors")
    )


def _open(name: str, source: Source, kind: type, download: bool) -> Opened:
    from transformers import AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": not (download and source.kind == HUB_CACHE)}
    if source.gguf:
        options["gguf_file"] = source.gguf
    weights = {"use_safetensors": True} if not source.gguf else {}
    with quiet(offline=options["local_files_only"]), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.place, **options)
            model = kind.from_pretrained(source.place, dtype=torch.float32, **options, **weights)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise PublishedError(
                f"{name} ({printable(source.place)}) can't be opened by transformers: "
                f"{printable(first or type(error).__name__, 200)}"
            ) from None
    return Opened(model.eval(), tokenizer, source)


@contextlib.contextmanager
def quiet(offline: bool = True) -> Iterator[None]:
    """No bars, no advice and, unless told otherwise, no network, while transformers works."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    if offline:
        os.environ.update(dict.fromkeys(before, "1"))
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), getattr(gguf_reader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:  # its bar for GGUF files asks nobody; in a notebook it would be a widget
        gguf_reader.tqdm = functools.partial(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        if bar is not None:
            gguf_reader.tqdm = bar
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
