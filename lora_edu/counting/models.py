"""A model by its name, or from its own config.json. Nothing is fetched, and no weight is read."""

import json
import os
import re
from collections.abc import Callable, Mapping

from lora_edu.counting.architectures import (
    ARCHITECTURES,
    GEMMA,
    GEMMA_2,
    GEMMA_3,
    MISTRAL,
    QWEN_2,
    QWEN_3,
    ROBERTA,
    Architecture,
    bert,
    gpt2,
    llama,
)
from lora_edu.counting.formulas import known
from lora_edu.paths import expanded
from lora_edu.text import did_you_mean

CONFIG = "config.json"
LARGEST = 10_000_000  # bytes of a config.json that is still read; real ones have a few thousand
# Words that a model's name has where its shapes are those of the model without them.
TUNED = {"instruct", "it", "chat", "base", "hf", "pt"}
ALSO = {
    "gpt2medium": "GPT-2 M",
    "gpt2large": "GPT-2 L",
    "debertav2xxlarge": "DeBERTa-XXL",
    "mistral7b": "Mistral-7B-v0.1",
}

Config = Mapping[str, object]


def architecture(model: str | os.PathLike | Architecture) -> Architecture:
    """By name, in any case, with spaces or hyphens as you like ("gpt-2-xl", "Qwen/Qwen3-8B"); or a config.json.

    A model's folder on your disk, or the file in it, is read by `read_config`; an Architecture is passed on.
    Raises ValueError for a name that is not known and a config that can't be counted.
    """
    if isinstance(model, Architecture):
        return model
    text = os.fspath(model)
    if found := _by_name(text):
        return found
    path = expanded(text)
    if path.exists():
        return read_config(path)
    if text.endswith(".json") or text.startswith(("~", ".", os.sep)):
        raise ValueError(f"there is no {text}. Nothing is fetched: give a model's folder or its {CONFIG}")
    return ARCHITECTURES[known(ARCHITECTURES, text, "architecture", text.rpartition("/")[2])]


def _by_name(text: str) -> Architecture | None:
    names = {_plain(name): name for name in ARCHITECTURES} | ALSO
    without_owner = text.rpartition("/")[2]
    words = [word for word in re.split(r"[-_ ]", without_owner) if word.lower() not in TUNED]
    for spelling in (text, without_owner, "".join(words), "".join(words).removeprefix("Meta")):
        if _plain(spelling) in names:
            return ARCHITECTURES[names[_plain(spelling)]]
    return None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


# --- config.json --------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike) -> Architecture:
    """The architecture that a config.json describes; path: the file, or a folder that holds it.

    Raises ValueError, in one line, where there is none, it is no JSON, or `from_config` can't count it.
    """
    path = expanded(path)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no {CONFIG}: give the folder of a model as transformers saves it")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST} bytes: that is no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is no JSON text: a {CONFIG} as transformers saves it is needed") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object; it holds a {type(config).__name__}")
    folder = file.resolve().parent.name
    return from_config(config, folder if file.name == CONFIG and folder else file.stem)


def from_config(config: Config, name: str) -> Architecture:
    """The architecture of a transformers config, as the model's own class builds it; `name` is what it is called.

    What a config leaves out has the class's default (transformers 5). A model with images is counted without
    its vision tower. Raises ValueError for a kind that is not worked out, and for sizes that can't be.
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        return from_config({"model_type": "gemma3_text", **_object(config, "text_config")}, name)
    if not isinstance(kind, str) or kind not in KINDS:
        there = f"{', '.join(KINDS)}, gemma3"
        if not isinstance(kind, str):
            raise ValueError(
                f"{name}: the config must have a model_type; got {kind!r}. Worked out are: {there}"
            )
        raise ValueError(
            f"{name}: models of type {kind!r} are not worked out{did_you_mean(str(kind), KINDS)} Those are: {there}"
        )
    return KINDS[kind](config, name)


def _object(config: Config, key: str) -> dict:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object; got {value!r}")
    return value


def _size(config: Config, key: str, default: int) -> int:
    """A whole number from 1 on; a key that is not there, or null, has the class's default."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**40:
        raise ValueError(f"{key} must be a whole number, 1 or more; the config has {value!r}")
    return value


def _flag(config: Config, key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; the config has {value!r}")
    return value


def _heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(
            f"the width must be a multiple of the number of heads; the config has {width} and {heads}"
        )


def _from_gpt2(config: Config, name: str) -> Architecture:
    width, heads = _size(config, "n_embd", 768), _size(config, "n_head", 12)
    _heads(width, heads)
    return gpt2(
        name,
        _size(config, "n_layer", 12),
        width,
        heads,
        _size(config, "vocab_size", 50_257),
        _size(config, "n_positions", 1024),
        mlp=_size(config, "n_inner", 4 * width),
        tied=_flag(config, "tie_word_embeddings", True),
    )


def _from_bert(vocabulary: int, **more) -> Callable[[Config, str], Architecture]:
    def build(config: Config, name: str) -> Architecture:
        width, heads = _size(config, "hidden_size", 768), _size(config, "num_attention_heads", 12)
        _heads(width, heads)
        return bert(
            name,
            _size(config, "num_hidden_layers", 12),
            width,
            heads,
            _size(config, "intermediate_size", 3072),
            _size(config, "vocab_size", vocabulary),
            _size(config, "max_position_embeddings", 512),
            _size(config, "type_vocab_size", 2),
            **more,
        )

    return build


def _from_llama(
    layers: int,
    width: int,
    heads: int,
    groups: int | None,
    mlp: int,
    vocabulary: int,
    context: int,
    head_width: int | None = None,
    tied: bool = False,
    **more,
) -> Callable[[Config, str], Architecture]:
    """The sizes are those of the class; groups or head_width None: as many as heads, the width over the heads."""

    def build(config: Config, name: str) -> Architecture:
        own_width, own_heads = (
            _size(config, "hidden_size", width),
            _size(config, "num_attention_heads", heads),
        )
        own_groups = _size(config, "num_key_value_heads", own_heads if groups is None else groups)
        if own_heads % own_groups:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads; "
                f"the config has {own_heads} and {own_groups}"
            )
        own_head = _size(config, "head_dim", head_width or own_width // own_heads)
        if config.get("head_dim") is None and head_width is None:
            _heads(own_width, own_heads)
        options = dict(more)
        if "biased" not in options:
            attention = ("query", "key", "value", "output") if _flag(config, "attention_bias") else ()
            options["biased"] = attention + (("gate", "up", "down") if _flag(config, "mlp_bias") else ())
        return llama(
            name,
            _size(config, "num_hidden_layers", layers),
            own_width,
            own_heads,
            own_groups,
            _size(config, "intermediate_size", mlp),
            _size(config, "vocab_size", vocabulary),
            _size(config, "max_position_embeddings", context),
            head_width=own_head,
            tied=_flag(config, "tie_word_embeddings", tied),
            **options,
        )

    return build


# model_type → what makes an architecture of its config, with the defaults of its class in transformers 5
KINDS: dict[str, Callable[[Config, str], Architecture]] = {
    "llama": _from_llama(32, 4096, 32, None, 11_008, 32_000, 2048),
    "mistral": _from_llama(32, 4096, 32, 8, 14_336, 32_000, 131_072, biased=(), **MISTRAL),
    "qwen2": _from_llama(32, 4096, 32, 32, 22_016, 151_936, 32_768, **QWEN_2),
    "qwen3": _from_llama(32, 4096, 32, 32, 22_016, 151_936, 32_768, 128, **QWEN_3),
    "gemma": _from_llama(28, 3072, 16, 16, 24_576, 256_000, 8192, 256, True, **GEMMA),
    "gemma2": _from_llama(26, 2304, 8, 4, 9216, 256_000, 8192, 256, True, **GEMMA_2),
    "gemma3_text": _from_llama(26, 2304, 8, 4, 9216, 262_208, 131_072, 256, True, **GEMMA_3),
    "gpt2": _from_gpt2,
    "bert": _from_bert(30_522),
    "roberta": _from_bert(50_265, **ROBERTA),
}
