"""Where virtual tokens get into a model: before the text (a prompt) or before each layer's keys and values (a prefix).

What is trained is made elsewhere (prompt_tuning.py, p_tuning.py, prefix_tuning.py) and handed in as a module without
inputs. transformers is never imported: of its models this uses `inputs_embeds`, `attention_mask` and the cache of keys
and values, as PEFT does, so that both give the same logits.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.lora import AdapterError
from lora_edu.text import printable
from lora_edu.tinylm import Attention, TinyLM


class Place(NamedTuple):
    """What virtual tokens need to know of a model.

    backbone: the module that turns embedded tokens into hidden states (of TinyLM the model itself). embedding: its
    table of tokens. context: how many positions it has (None: it doesn't say).
    """

    backbone: nn.Module
    embedding: nn.Module
    context: int | None

    @property
    def width(self) -> int:
        return self.embedding.weight.shape[1]


def place(model: nn.Module) -> Place:
    """The place for virtual tokens in TinyLM or in a model of transformers; TypeError, with the reason, for others.

    In transformers it is the innermost module around the token embedding whose forward takes `inputs_embeds` and
    `attention_mask`: every head, whatever it predicts, then reads hidden states of the reader's own tokens.
    """
    if isinstance(model, TinyLM):
        return Place(model, model.embedding, model.context)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"virtual tokens go into TinyLM or a model of transformers; got {type(model).__name__}, which has no "
            "config and no get_input_embeddings()"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} has an encoder and a decoder, each with tokens of its own; virtual tokens are for "
            "models with one of the two"
        )
    embedding = model.get_input_embeddings()
    name = next((name for name, each in model.named_modules() if each is embedding), None)
    while name:
        name = name.rpartition(".")[0]
        backbone = model.get_submodule(name)
        if {"inputs_embeds", "attention_mask"} <= _parameters(backbone).keys():
            context = getattr(getattr(backbone, "config", config), "max_position_embeddings", None)
            return Place(backbone, embedding, context if isinstance(context, int) else None)
    raise TypeError(
        f"no module of {type(model).__name__} takes inputs_embeds and attention_mask, so virtual tokens can't be put "
        "before its text"
    )


def check_tokens(tokens: int, where: Place) -> None:
    """Raise ValueError unless this many virtual tokens leave room for text."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a whole number of at least 1 (virtual tokens); got {tokens!r}")
    if where.context is not None and tokens >= where.context:
        raise ValueError(
            f"tokens must be below {where.context} (the positions of this model, which text needs too); got {tokens}"
        )


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 − 1; got {seed!r}")


def to_place(source: nn.Module, where: Place) -> nn.Module:
    """The module on the model's device, in its dtype, but never below float32: the trained numbers are few."""
    weight = where.embedding.weight
    return source.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def token_ids(ids: object, tokens: int, where: Place) -> list[int]:
    """`tokens` token ids from those given, which are cut or repeated as in PEFT; ValueError for what is no token."""
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(0)
    if (
        ids.dim() != 1
        or not len(ids)
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        raise ValueError(
            f"token ids must be whole numbers in one row, at least one; got {tuple(ids.shape)} {ids.dtype}"
        )
    vocabulary = where.embedding.weight.shape[0]
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"token ids must be between 0 and {vocabulary - 1}; got {bad}")
    return ids.repeat(-(-tokens // len(ids)))[:tokens].tolist()


# Prompts: embeddings before the text's


def connect_prompt(model: nn.Module, source: nn.Module, tokens: int) -> None:
    """Put source() (tokens, width) before the embedded text, and cut its positions off what the backbone returns.

    The text's positions are shifted by `tokens`, as they are for real tokens there: with embeddings of real tokens the
    model gives what it gives for these tokens and the text. In TinyLM `hidden` is replaced and `context` lowered; in a
    model of transformers the backbone gets two hooks. `disconnect` takes all of that out.
    """
    where = place(model)
    source.tokens, source.context = tokens, where.context
    if isinstance(model, TinyLM):
        model.hidden = functools.partial(_hidden_after_prompt, source, model)
        model.context -= tokens
        return
    before = functools.partial(_prepend, source, where.embedding)
    source.hooks = [
        where.backbone.register_forward_pre_hook(before, with_kwargs=True),
        where.backbone.register_forward_hook(functools.partial(_cut, source)),
    ]


def disconnect(model: nn.Module, source: nn.Module) -> None:
    """Undo `connect_prompt` or `connect_prefix`."""
    if isinstance(model, TinyLM):
        del model.hidden
        model.context = source.context
    for hook in vars(source).pop("hooks", []):
        hook.remove()


def _hidden_after_prompt(source: nn.Module, model: TinyLM, tokens: Tensor) -> Tensor:
    """TinyLM.hidden with a prompt: (batch, time) → (batch, time, width)."""
    _refuse_too_long(source, tokens.shape[-1])
    text = model.embedding(tokens)
    x = torch.cat([_for_each(source().to(text.dtype), text), text], dim=1)
    for block in model.blocks:
        x = block(x)
    return model.norm(x[:, source.tokens :])


def _prepend(source: nn.Module, embedding: nn.Module, backbone: nn.Module, args: tuple, kwargs: dict):
    """Before a backbone's forward: ids → embeddings after the prompt. What is in a cache already has the prompt."""
    kwargs = _by_name(backbone, args, kwargs)
    past = _length(_cache(kwargs))
    text = kwargs.get("inputs_embeds")
    if text is None and not past:
        text = embedding(kwargs["input_ids"])
    new = (kwargs["input_ids"] if text is None else text).shape[1]
    _refuse_too_long(source, past - source.tokens + new if past else new)
    source.before = 0 if past else source.tokens  # for _cut
    if not past:
        prompt = _for_each(source().to(text.dtype), text)
        kwargs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, text], dim=1)}
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (source.tokens, 0))
    return (), _shifted(kwargs, source.tokens, source.before)


def _cut(source: nn.Module, backbone: nn.Module, args: tuple, output):
    """After a backbone's forward: the virtual positions off hidden states and the rows of attention maps."""
    if not source.before:
        return output
    length = _hidden_of(output).shape[1]

    def cut(value):
        if isinstance(value, Tensor):
            virtual = value.dim() > 2 and value.shape[-2] == length
            return value[..., source.before :, :] if virtual else value
        return tuple(cut(each) for each in value) if type(value) is tuple else value

    if isinstance(output, Mapping):
        for name in list(output):
            output[name] = cut(output[name])
        return output
    return cut(output)


def _hidden_of(output) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, Mapping) else output[0]


# Prefixes: keys and values before those of the text, in every layer


def shape_of_prefix(model: nn.Module) -> tuple[int, int, int]:
    """(layers, heads, numbers a head) of the keys that this model attends to, asked of the model itself.

    TypeError where it keeps none, or layers differ: one tensor of a file then can't hold a prefix for all of them.
    """
    if isinstance(model, TinyLM):
        attention = model.blocks[0].attention
        return len(model.blocks), attention.heads, attention.key.out_features // attention.heads
    backbone = place(model).backbone
    if _cache_name(backbone) is None or _cache_class(backbone) is None:
        raise TypeError(
            f"{type(backbone).__name__} takes no cache of keys and values, so it can't have a prefix; prompt_tuning "
            "works without"
        )
    kept = _kept(model, [0])
    shapes = {tuple(each.shape[1::2]) for pair in kept for each in pair}
    layers = backbone.config.num_hidden_layers
    if len(shapes) != 1 or len(kept) != layers:
        raise TypeError(
            f"a prefix needs keys and values of one shape in every layer; {type(backbone).__name__} keeps them in "
            f"{len(kept)} of {layers} layers, in {len(shapes)} shapes. prompt_tuning works without"
        )
    return layers, *shapes.pop()


def connect_prefix(model: nn.Module, source: nn.Module, tokens: int, layers: int, heads: int) -> None:
    """Let every layer attend to `tokens` keys and values before its own: source() (tokens, 2 · layers · width).

    The text's positions are shifted by `tokens`. The keys are used as they are, after the rotary turn where a model has
    one: what a cache would hold. `disconnect` takes it out.
    """
    where = place(model)
    source.tokens, source.context, source.layers, source.heads = tokens, where.context, layers, heads
    if isinstance(model, TinyLM):
        model.hidden = functools.partial(_hidden_after_prefix, source, model)
        model.context -= tokens
        return
    fill = functools.partial(_fill, source)
    source.hooks = [
        where.backbone.register_forward_pre_hook(fill, with_kwargs=True),
        where.backbone.register_forward_hook(functools.partial(_keep_to_itself, source)),
    ]


def by_layer(values: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, 2 · layers · width) → (key, value) of each layer, each (heads, tokens, width / heads): PEFT's order."""
    tokens = len(values)
    stacked = values.view(tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return list(zip(stacked[0::2], stacked[1::2], strict=True))


def keys_and_values(model: nn.Module, ids: list[int]) -> Tensor:
    """What the layers keep of these tokens: (len(ids), 2 · layers · width), the prefix that stands for them."""
    stacked = torch.stack([each[0] for pair in _kept(model, ids) for each in pair])
    return stacked.permute(2, 0, 1, 3).reshape(len(ids), -1)  # from (2 · layers, heads, tokens, numbers)


@torch.no_grad()
def _kept(model: nn.Module, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(key, value) of each layer for these tokens, each (1, heads, tokens, numbers a head)."""
    tokens = torch.tensor([ids], device=place(model).embedding.weight.device)
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        return _kept_by_tinylm(model, tokens) if isinstance(model, TinyLM) else _kept_in_cache(model, tokens)
    finally:
        for each in training:
            each.training = True


def _kept_by_tinylm(model: TinyLM, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    kept, x = [], model.embedding(tokens)
    for block in model.blocks:
        attention, y = block.attention, block.attention_norm(x)
        key, value = attention.by_head(attention.key(y)), attention.by_head(attention.value(y))
        kept.append((attention.turn(key), value))
        x = block(x)
    return kept


def _kept_in_cache(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    backbone = place(model).backbone
    cache, kept = _cache_class(backbone)(), []
    update = cache.update

    def listen(key: Tensor, value: Tensor, *args, **kwargs):
        kept.append((key, value))
        return update(key, value, *args, **kwargs)

    cache.update = listen
    backbone(input_ids=tokens, **{_cache_name(backbone): cache})
    return kept


def _hidden_after_prefix(source: nn.Module, model: TinyLM, tokens: Tensor) -> Tensor:
    """TinyLM.hidden with a prefix: (batch, time) → (batch, time, width)."""
    _refuse_too_long(source, tokens.shape[-1])
    x = model.embedding(tokens)
    prefix = by_layer(source().to(x.dtype), source.layers, source.heads)
    for block, (key, value) in zip(model.blocks, prefix, strict=True):
        x = x + _attend(block.attention, block.attention_norm(x), key, value)
        x = x + block.mlp(block.mlp_norm(x))
    return model.norm(x)


def _attend(attention: Attention, x: Tensor, key_before: Tensor, value_before: Tensor) -> Tensor:
    """TinyLM's attention, each token also to all of the prefix: x (batch, time, width), *_before (heads, tokens, …)."""
    virtual, time = key_before.shape[1], x.shape[1]
    query = attention.turn(attention.by_head(attention.query(x)), virtual)
    key = attention.turn(attention.by_head(attention.key(x)), virtual)
    key = torch.cat([_for_each(key_before, x), key], dim=2)
    value = torch.cat([_for_each(value_before, x), attention.by_head(attention.value(x))], dim=2)
    seen = torch.ones(time, virtual + time, dtype=torch.bool, device=x.device).tril(virtual)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return attention.output(mixed.transpose(1, 2).reshape(x.shape))


def _fill(source: nn.Module, backbone: nn.Module, args: tuple, kwargs: dict):
    """Before a backbone's forward: the prefix into an empty cache. What is in a cache already has it."""
    if backbone.training and any(
        getattr(each, "gradient_checkpointing", False) for each in backbone.modules()
    ):
        raise RuntimeError(
            "with gradient checkpointing transformers drops the cache, and the prefix with it; call "
            "model.gradient_checkpointing_disable() first"
        )
    kwargs = _by_name(backbone, args, kwargs)
    cache = _cache(kwargs)
    past = _length(cache)
    text = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    _refuse_too_long(source, past - source.tokens + text.shape[1] if past else text.shape[1])
    wanted = kwargs.get("use_cache")
    wanted = getattr(backbone.config, "use_cache", False) if wanted is None else wanted
    source.unasked = cache is None and not wanted  # for _keep_to_itself
    if not past:
        cache = _cache_class(backbone)() if cache is None else cache
        values = source().to(next(backbone.parameters()).dtype)
        for layer, pair in enumerate(by_layer(values, source.layers, source.heads)):
            cache.update(*(_for_each(each, text) for each in pair), layer)
        kwargs.pop("past_key_values", None)
        kwargs[_cache_name(backbone)] = cache
    return (), _shifted(kwargs, source.tokens, 0)


def _keep_to_itself(source: nn.Module, backbone: nn.Module, args: tuple, output):
    """After a backbone's forward: no cache in what it returns where none was asked for and only the prefix needed one.

    Some return whatever cache they were given; `generate` would then take it for one that it has to go on with.
    """
    if not source.unasked:
        return output
    kept = lambda value: not isinstance(value, _cache_class(backbone))
    if isinstance(output, Mapping):
        return type(output)(**{name: value for name, value in output.items() if kept(value)})
    return tuple(filter(kept, output)) if isinstance(output, tuple) else output


# What both need


def _refuse_too_long(source: nn.Module, text: int) -> None:
    """Raise ValueError where text that fits alone doesn't fit after the virtual tokens (or, in TinyLM, at all)."""
    room = None if source.context is None else source.context - source.tokens
    if room is not None and text > room:
        raise ValueError(
            f"{text} tokens of text and {source.tokens} virtual ones are more than this model's {source.context} "
            f"positions; give at most {room} tokens, or take fewer virtual ones"
        )


def _for_each(one: Tensor, batch: Tensor) -> Tensor:
    """One for each row of a batch, on the same memory."""
    return one.expand(len(batch), *one.shape)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _by_name(backbone: nn.Module, args: tuple, kwargs: dict) -> dict:
    return dict(zip(_parameters(backbone), args, strict=False)) | kwargs


def _shifted(kwargs: dict, tokens: int, before: int) -> dict:
    """Mask and positions of a text that comes after virtual tokens, `before` of which are in this call's input."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"with virtual tokens attention_mask must be (batch, time); got {shape}")
        kwargs["attention_mask"] = F.pad(mask, (tokens, 0), value=1)
    if positions is not None:
        virtual = torch.arange(before, device=positions.device).expand(*positions.shape[:-1], -1)
        kwargs["position_ids"] = torch.cat([virtual, positions + tokens], dim=-1)
    kwargs.pop("cache_position", None)  # older transformers: the backbone counts again, from the cache
    return kwargs


def _cache(kwargs: dict):
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found


def _length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _cache_name(backbone: nn.Module) -> str | None:
    """What this version of transformers calls the cache."""
    return next((name for name in ("cache", "past_key_values") if name in _parameters(backbone)), None)


def _cache_class(backbone: nn.Module) -> type | None:
    """The cache that grows, from the module of the model's own class: it is there wherever the model came from."""
    modules = (sys.modules.get(kind.__module__) for kind in type(backbone).__mro__)
    return next((each.DynamicCache for each in modules if hasattr(each, "DynamicCache")), None)


# What comes from files


def plain_embeddings(
    tensors: Mapping[str, Tensor], width: int, what: str, config: Mapping[str, object] | None = None
) -> Tensor:
    """`prompt_embeddings` (tokens, width) from a file; AdapterError, with the reason, for anything else."""
    others = sorted(set(tensors) - {"prompt_embeddings"})
    if others or "prompt_embeddings" not in tensors:
        found = printable(", ".join(others[:4])) or "nothing"
        raise AdapterError(
            f"{what} is one tensor, prompt_embeddings, and a head trained beside it is not supported; the file holds "
            f"{found}{' too' if 'prompt_embeddings' in tensors else ''}"
        )
    values = tensors["prompt_embeddings"]
    if values.dim() != 2 or not len(values) or values.shape[1] != width:
        shape = " × ".join(map(str, values.shape)) or "a single number"
        raise AdapterError(f"{what} of this model is tokens × {width}; the file holds {shape}")
    if not values.is_floating_point():
        raise AdapterError(f"{what} must be floating-point numbers; the file holds {values.dtype}")
    said = (config or {}).get("num_virtual_tokens")
    if said not in (None, len(values)):
        raise AdapterError(
            f"the configuration says num_virtual_tokens {printable(repr(said))}, the file holds {len(values)}"
        )
    if (config or {}).get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            "the file is for an encoder and a decoder "
            f"(num_transformer_submodules {printable(repr(config['num_transformer_submodules']))}), not for this model"
        )
    return values


def peft_config(model: nn.Module, kind: str, tokens: int, width: int, heads: int) -> dict:
    """What PEFT's configuration of a prompt or a prefix says, whichever it is; the base's name is the writer's."""
    backbone = place(model).backbone
    return {
        "peft_type": kind,
        "task_type": _task(model),
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": backbone.config.num_hidden_layers,
    }


def _task(model: nn.Module) -> str:
    """PEFT's name of what the model is for: it decides by it how virtual tokens are put in.

    Not SEQ_CLS and its like, for which PEFT trains the head too and expects it in the file: to PEFT's model for
    features any head will do.
    """
    return (
        "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else "FEATURE_EXTRACTION"
    )
