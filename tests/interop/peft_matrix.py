"""Adapters that PEFT writes, family by family and setting by setting: measured, loaded or refused, and equal to PEFT's.

    python tests/interop/peft_matrix.py            # every family with every setting (minutes)
    python tests/interop/peft_matrix.py bert t5    # these families

Models are tiny and random; whatever is trained gets random values. 'measured': the singular values of each layer's
ΔW, from its file, against PEFT's own get_delta_weight. 'loaded': the outputs of the base with load_adapter against
those of PEFT's model.
"""

import collections
import functools
import itertools
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu.adapters.usage import use_of
from lora_edu.delta import compare
from lora_edu.lora import load_adapter, read_adapter

transformers.logging.set_verbosity_error()
TOKENS = torch.arange(5, 25).reshape(2, 10)
MEASURED, LOADED = 1e-4, 1e-3  # differences above that share are faults


class Family(NamedTuple):
    """make: a tiny model. linear: ends of names to adapt; embedding, head, conv: one more each, where there is one."""

    make: Callable[[], nn.Module]
    linear: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None
    conv: str | None = None
    experts: tuple[str, ...] = ()
    layers: str = "layers"
    inputs: Callable[[], dict] = lambda: {"input_ids": TOKENS}


def _made(model: str, config: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        for each in built.parameters():
            if each.dim() > 1:
                each.data *= 5  # so that every layer matters to the outputs
        return built

    return make


WIDE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MIDDLE = WIDE | {"intermediate_size": 24}
GROUPED = MIDDLE | {"num_key_value_heads": 1}
MOE = GROUPED | {"num_experts_per_tok": 2}
BEGINNINGS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BOTH = lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
ATTENTION = ("q_proj", "v_proj", "down_proj")
FAMILIES = {
    "albert": Family(
        _made("AlbertForMaskedLM", "AlbertConfig", **MIDDLE, embedding_size=8, max_position_embeddings=32),
        ("query", "value", "ffn"),
        "word_embeddings",
    ),
    "bart": Family(
        _made(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=32,
            **BEGINNINGS,
        ),
        ("q_proj", "v_proj", "fc1"),
        "shared",
        "lm_head",
        inputs=BOTH,
    ),
    "bert": Family(
        _made("BertForSequenceClassification", "BertConfig", **MIDDLE, max_position_embeddings=32),
        ("query", "value", "intermediate.dense"),
        "word_embeddings",
        "classifier",
        layers="layer",
    ),
    "bloom": Family(
        _made(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=40,
            hidden_size=16,
            n_layer=2,
            n_head=2,
            **BEGINNINGS,
        ),
        ("query_key_value", "dense_4h_to_h"),
        "word_embeddings",
        "lm_head",
        layers="h",
    ),
    "clip": Family(
        _made(
            "CLIPModel",
            "CLIPConfig",
            text_config={**MIDDLE, "max_position_embeddings": 16, "projection_dim": 8, **BEGINNINGS},
            vision_config={
                **{k: v for k, v in MIDDLE.items() if k != "vocab_size"},
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": 8,
            },
            projection_dim=8,
        ),
        ("q_proj", "fc1"),
        "token_embedding",
        "text_projection",
        "patch_embedding",
        inputs=lambda: {"input_ids": TOKENS, "pixel_values": torch.randn(2, 3, 8, 8, generator=_drawn())},
    ),
    "deberta_v2": Family(
        _made(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **MIDDLE,
            max_position_embeddings=32,
            relative_attention=True,
        ),
        ("query_proj", "intermediate.dense"),
        "word_embeddings",
        layers="layer",
    ),
    "distilbert": Family(
        _made(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=40,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
        ),
        ("q_lin", "lin1"),
        "word_embeddings",
        "vocab_transform",
        layers="layer",
    ),
    "electra": Family(
        _made(
            "ElectraForPreTraining", "ElectraConfig", **MIDDLE, embedding_size=8, max_position_embeddings=32
        ),
        ("query", "output.dense"),
        "word_embeddings",
        "dense_prediction",
        layers="layer",
    ),
    "falcon": Family(
        _made("FalconForCausalLM", "FalconConfig", **WIDE, **BEGINNINGS),
        ("query_key_value", "dense_h_to_4h"),
        "word_embeddings",
        "lm_head",
        layers="h",
    ),
    "gemma": Family(
        _made("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=8), ATTENTION, "embed_tokens", "lm_head"
    ),
    "gemma2": Family(
        _made("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8),
        ATTENTION,
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": Family(
        _made(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            **BEGINNINGS,
        ),
        ("c_attn", "mlp.c_proj"),
        "wte",
        "lm_head",
        layers="h",
    ),
    "gpt_neo": Family(
        _made(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=40,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=32,
            **BEGINNINGS,
        ),
        ("q_proj", "c_fc"),
        "wte",
        "lm_head",
        layers="h",
    ),
    "gpt_neox": Family(
        _made("GPTNeoXForCausalLM", "GPTNeoXConfig", **MIDDLE, max_position_embeddings=32, **BEGINNINGS),
        ("query_key_value", "dense_4h_to_h"),
        "embed_in",
        "embed_out",
    ),
    "gptj": Family(
        _made(
            "GPTJForCausalLM",
            "GPTJConfig",
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            rotary_dim=4,
            **BEGINNINGS,
        ),
        ("q_proj", "fc_in"),
        "wte",
        "lm_head",
        layers="h",
    ),
    "granite": Family(
        _made("GraniteForCausalLM", "GraniteConfig", **GROUPED), ATTENTION, "embed_tokens", "lm_head"
    ),
    "llama": Family(
        _made("LlamaForCausalLM", "LlamaConfig", **GROUPED), ATTENTION, "embed_tokens", "lm_head"
    ),
    "mamba": Family(
        _made(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
        ),
        ("in_proj", "x_proj"),
        "embeddings",
        "lm_head",
        "conv1d",
    ),
    "mistral": Family(
        _made("MistralForCausalLM", "MistralConfig", **GROUPED), ATTENTION, "embed_tokens", "lm_head"
    ),
    "mixtral": Family(
        _made("MixtralForCausalLM", "MixtralConfig", **MOE, num_local_experts=3),
        ("q_proj", "v_proj"),
        "embed_tokens",
        "lm_head",
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "opt": Family(
        _made(
            "OPTForCausalLM",
            "OPTConfig",
            **WIDE,
            ffn_dim=24,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        ),
        ("q_proj", "fc1"),
        "embed_tokens",
        "lm_head",
    ),
    "phi": Family(
        _made("PhiForCausalLM", "PhiConfig", **MIDDLE, **BEGINNINGS),
        ("q_proj", "fc2"),
        "embed_tokens",
        "lm_head",
    ),
    "phi3": Family(
        _made("Phi3ForCausalLM", "Phi3Config", **GROUPED, **BEGINNINGS),
        ("qkv_proj", "gate_up_proj"),
        "embed_tokens",
        "lm_head",
    ),
    "qwen2": Family(
        _made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED), ATTENTION, "embed_tokens", "lm_head"
    ),
    "qwen3": Family(
        _made("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), ATTENTION, "embed_tokens", "lm_head"
    ),
    "qwen3_moe": Family(
        _made(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **MOE,
            head_dim=8,
            num_experts=3,
            moe_intermediate_size=12,
        ),
        ("q_proj", "v_proj"),
        "embed_tokens",
        "lm_head",
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "roberta": Family(
        _made("RobertaForMaskedLM", "RobertaConfig", **MIDDLE, max_position_embeddings=40, pad_token_id=1),
        ("query", "value"),
        "word_embeddings",
        layers="layer",
    ),
    "starcoder2": Family(
        _made("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED),
        ("q_proj", "c_fc"),
        "embed_tokens",
        "lm_head",
    ),
    "t5": Family(
        _made(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=40,
            d_model=16,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            d_kv=8,
            decoder_start_token_id=0,
        ),
        ("q", "wo"),
        "shared",
        "lm_head",
        layers="block",
        inputs=BOTH,
    ),
    "vit": Family(
        _made(
            "ViTForImageClassification",
            "ViTConfig",
            **{k: v for k, v in MIDDLE.items() if k != "vocab_size"},
            image_size=8,
            patch_size=4,
        ),
        ("q_proj", "fc1"),
        None,
        "classifier",
        "projection",
        inputs=lambda: {"pixel_values": torch.randn(2, 3, 8, 8, generator=_drawn())},
    ),
    "wav2vec2": Family(
        _made(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            **{k: v for k, v in MIDDLE.items() if k != "vocab_size"},
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        ("q_proj", "intermediate_dense"),
        None,
        "classifier",
        "1.conv",
        inputs=lambda: {"input_values": torch.randn(2, 400, generator=_drawn())},
    ),
    "whisper": Family(
        _made(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            **BEGINNINGS,
        ),
        ("q_proj", "fc1"),
        "embed_tokens",
        "proj_out",
        "conv1",
        inputs=lambda: {
            "input_features": torch.randn(2, 8, 20, generator=_drawn()),
            "decoder_input_ids": TOKENS,
        },
    ),
}


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- settings -------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """options: of LoraConfig, from a family; None where the family has no such thing. before: done to the base.

    save: how the adapter is written, if not by save_pretrained. refused: part of why it is not loaded, as it should be;
    unmeasured: whether its ΔW is no s · BA, so that it must not be measured either.
    """

    options: Callable[[Family], dict | None]
    before: Callable[[nn.Module], nn.Module] = lambda model: model
    save: Callable[[nn.Module, Path], None] | None = None
    refused: str = ""
    unmeasured: bool = False


def _with(**options) -> Callable[[Family], dict]:
    return lambda family: options


def _where(part: str, make: Callable) -> Callable[[Family], dict | None]:
    """For families that have an embedding, a head …"""
    return lambda family: make(family) if getattr(family, part) else None


def _first(family: Family) -> str:
    return family.linear[0]


def _save_state(prefix: str, theirs: nn.Module, folder: Path) -> None:
    """As a training loop of one's own writes it: the state_dict, with .default. in its keys."""
    theirs.peft_config["default"].save_pretrained(folder)
    state = {
        f"{prefix}{key}": each.contiguous() for key, each in theirs.state_dict().items() if "lora_" in key
    }
    save_file(state, folder / "adapter_model.safetensors")


def _save_half(dtype: torch.dtype, theirs: nn.Module, folder: Path) -> None:
    for name, each in theirs.named_parameters():
        each.data = each.to(dtype).to(each.dtype) if "lora_" in name else each.data
    theirs.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({key: each.to(dtype) for key, each in load_file(path).items()}, path)


def _save_older(theirs: nn.Module, folder: Path) -> None:
    """As PEFT 0.3 wrote it: a configuration of a dozen keys."""
    theirs.save_pretrained(folder)
    path = folder / "adapter_config.json"
    old = (
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "lora_dropout",
        "bias",
        "modules_to_save",
        "task_type",
    )
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: config[name] for name in old}), encoding="utf-8")


def _bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


BASE_CHANGED = "changes the base weights"
SETTINGS = {
    "plain": Setting(_with()),
    "r=1": Setting(_with(r=1)),
    "r above the sides": Setting(_with(r=40)),
    "alpha 2.5": Setting(_with(lora_alpha=2.5)),
    "rslora": Setting(_with(use_rslora=True)),
    "dropout": Setting(_with(lora_dropout=0.3)),
    "rank_pattern": Setting(lambda f: {"rank_pattern": {_first(f): 2}}),
    "alpha_pattern": Setting(lambda f: {"alpha_pattern": {_first(f): 7}}),
    "patterns of regex": Setting(
        lambda f: {
            "rank_pattern": {rf".*\.[01]\..*{_first(f)}": 3},
            "alpha_pattern": {rf"^.*\.0\..*{_first(f)}": 1.5},
        }
    ),
    "rslora, patterns": Setting(
        lambda f: {"use_rslora": True, "rank_pattern": {_first(f): 2}, "alpha_pattern": {_first(f): 7}}
    ),
    "all-linear": Setting(_with(target_modules="all-linear")),
    "regex target": Setting(lambda f: {"target_modules": rf".*\.{_first(f)}"}),
    "full names": Setting(lambda f: {"target_modules": _full_names(f)}),
    "exclude_modules": Setting(lambda f: {"exclude_modules": rf".*\.0\..*{_first(f)}"}),
    "layers_to_transform": Setting(_with(layers_to_transform=[0])),
    "layers_pattern": Setting(lambda f: {"layers_to_transform": [0], "layers_pattern": f.layers}),
    "embedding": Setting(_where("embedding", lambda f: {"target_modules": [f.embedding]})),
    "embedding and linear": Setting(
        _where("embedding", lambda f: {"target_modules": [f.embedding, *f.linear]})
    ),
    "embedding, rslora": Setting(
        _where("embedding", lambda f: {"target_modules": [f.embedding], "use_rslora": True})
    ),
    "head": Setting(_where("head", lambda f: {"target_modules": [f.head, *f.linear]})),
    "tied, ensured": Setting(
        _where(
            "embedding", lambda f: {"target_modules": [f.embedding, *f.linear], "ensure_weight_tying": True}
        )
    ),
    "convolution": Setting(
        _where("conv", lambda f: {"target_modules": [f.conv]}), refused="is a convolution"
    ),
    "bias all": Setting(_with(bias="all")),
    "bias lora_only": Setting(_with(bias="lora_only")),
    "lora_bias": Setting(_with(lora_bias=True), refused="lora_bias"),
    "modules_to_save": Setting(_where("head", lambda f: {"modules_to_save": [f.head]})),
    "whole embedding": Setting(_where("embedding", lambda f: {"modules_to_save": [f.embedding]})),
    "token rows": Setting(_where("embedding", lambda f: {"trainable_token_indices": {f.embedding: [3, 7]}})),
    "token rows, list": Setting(_where("embedding", lambda f: {"trainable_token_indices": [3, 7]})),
    "token rows and linear table": Setting(
        _where(
            "embedding",
            lambda f: {
                "trainable_token_indices": {f.embedding: [0, 39]},
                "modules_to_save": [f.head] if f.head else None,
            },
        )
    ),
    "target_parameters": Setting(
        lambda f: {"target_modules": [], "target_parameters": [f"{_first(f)}.weight"]},
        refused="target_parameters",
    ),
    "experts": Setting(
        _where("experts", lambda f: {"target_modules": list(f.linear), "target_parameters": list(f.experts)}),
        refused="target_parameters",
    ),
    "experts, rslora": Setting(
        _where(
            "experts",
            lambda f: {"target_modules": [], "target_parameters": [f.experts[0]], "use_rslora": True},
        ),
        refused="target_parameters",
    ),
    "gaussian": Setting(_with(init_lora_weights="gaussian")),
    "init False": Setting(_with(init_lora_weights=False)),
    "orthogonal": Setting(_with(init_lora_weights="orthogonal")),
    "mica": Setting(_with(init_lora_weights="mica", r=2)),
    "PiSSA": Setting(_with(init_lora_weights="pissa"), refused=BASE_CHANGED, unmeasured=True),
    "PiSSA, niter": Setting(_with(init_lora_weights="pissa_niter_2"), refused=BASE_CHANGED, unmeasured=True),
    "OLoRA": Setting(_with(init_lora_weights="olora"), refused=BASE_CHANGED, unmeasured=True),
    "DoRA": Setting(_with(use_dora=True), refused="DoRA", unmeasured=True),
    "DoRA, rslora": Setting(_with(use_dora=True, use_rslora=True), refused="DoRA", unmeasured=True),
    "QALoRA": Setting(_with(use_qalora=True, qalora_group_size=4), refused="QALoRA", unmeasured=True),
    "activated LoRA": Setting(
        _with(alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM"),
        refused="activated LoRA",
        unmeasured=True,
    ),
    "KaSA": Setting(lambda f: {"kasa_config": peft.KasaConfig()}, refused="KaSA", unmeasured=True),
    "MonteCLoRA": Setting(lambda f: {"monteclora_config": peft.MontecloraConfig()}),
    "VeLoRA": Setting(lambda f: {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}),
    "BD-LoRA": Setting(
        lambda f: {
            "use_bdlora": peft.tuners.lora.BdLoraConfig(
                target_modules_bd_a=[_first(f)], nblocks=2, match_strict=False
            )
        },
        refused="block-diagonal",
        unmeasured=True,
    ),
    "layer_replication": Setting(_with(layer_replication=[[0, 2], [1, 2]]), refused="layer_replication"),
    "bfloat16 base": Setting(_with(), before=_bfloat16),
    "bfloat16 file": Setting(_with(), save=functools.partial(_save_half, torch.bfloat16)),
    "float16 file": Setting(_with(), save=functools.partial(_save_half, torch.float16)),
    ".default. keys": Setting(_with(), save=functools.partial(_save_state, "")),
    "_orig_mod. keys": Setting(_with(), save=functools.partial(_save_state, "_orig_mod.")),
    "old configuration": Setting(_with(), save=_save_older),
    "merged, then saved": Setting(
        _with(),
        save=lambda theirs, folder: (
            theirs.merge_adapter(),
            theirs.save_pretrained(folder),
            theirs.unmerge_adapter(),
        ),
    ),
    "save_embedding_layers": Setting(
        _with(), save=lambda theirs, folder: theirs.save_pretrained(folder, save_embedding_layers=True)
    ),
    "task_type": Setting(lambda f: {"task_type": "FEATURE_EXTRACTION"}),
}


def _full_names(family: Family) -> list[str]:
    names = [
        name
        for name, each in family.make().named_modules()
        if isinstance(each, nn.Linear) or "Conv1D" in type(each).__name__
    ]
    return [name for name in names if name.endswith(tuple(f".{each}" for each in family.linear))][:3]


# --- one case -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """measured: layers of those that PEFT has; off_measured: largest relative difference of a singular value.

    loaded: "" where it is, else why not; off_loaded: largest difference of the outputs over their largest.
    fault: what is wrong, empty where nothing is.
    """

    measured: int
    layers: int
    off_measured: float
    loaded: str
    off_loaded: float
    fault: str


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return getattr(result, name).float()
    raise TypeError(f"{type(result).__name__} has no output that is known here")


def run(family: Family, setting: Setting, folder: Path) -> Outcome | str:
    """What becomes of PEFT's adapter; a text where PEFT itself has none for this family."""
    options = setting.options(family)
    if options is None:
        return "has no such layer"
    plain = {"r": 4, "lora_alpha": 6, "target_modules": list(family.linear)}
    try:
        torch.manual_seed(0)
        theirs = peft.get_peft_model(setting.before(family.make()), peft.LoraConfig(**plain | options)).eval()
        _randomise(theirs)
        outputs(theirs, _as(theirs, family.inputs()))
        (setting.save or (lambda model, place: model.save_pretrained(place)))(theirs, folder)
        expected = outputs(theirs, _as(theirs, family.inputs()))
    except Exception as error:  # of PEFT's, whatever it is
        return f"PEFT: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    deltas = {} if setting.unmeasured else _deltas(theirs)
    measured, off = _measured(folder, deltas)
    model, loaded, off_loaded = setting.before(family.make()), "", 0.0
    try:
        load_adapter(model, folder)
    except Exception as error:
        loaded = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    else:
        got = outputs(model, _as(model, family.inputs()))
        off_loaded = float((got - expected).abs().max() / expected.abs().max())
    return Outcome(
        measured,
        len(deltas),
        off,
        loaded,
        off_loaded,
        _fault(setting, measured, len(deltas), off, loaded, off_loaded, _rough(folder, model)),
    )


def _rough(folder: Path, model: nn.Module) -> bool:
    """Whether half precision is in it, so that the two may round differently."""
    return any(each.dtype in (torch.bfloat16, torch.float16) for each in model.parameters())


def _as(model: nn.Module, inputs: dict) -> dict:
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def _randomise(theirs: nn.Module) -> None:
    """As after training: factors all non-zero, what is trained beside them moved; rows of padding stay 0."""
    torch.manual_seed(1)
    for name, each in theirs.named_parameters():
        if "lora_diag" in name or not each.requires_grad:
            continue
        each.data = (
            0.3 * torch.randn_like(each) if "lora_" in name else each.data + 0.1 * torch.randn_like(each)
        )
    for module in theirs.modules():
        padding = getattr(getattr(module, "base_layer", None), "padding_idx", None)
        if padding is not None and "default" in getattr(module, "lora_embedding_A", {}):
            module.lora_embedding_A["default"].data[:, padding] = 0


def _deltas(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's own ΔW of every layer that has one, as the merged weight would have it."""
    found = {}
    for name, module in theirs.named_modules():
        layers = [getattr(module, each, {}) for each in ("lora_A", "lora_embedding_A")]
        if isinstance(module, peft.tuners.lora.LoraLayer) and any("default" in each for each in layers):
            found[name.removeprefix("base_model.model.")] = (
                module.get_delta_weight("default").detach().double()
            )
    return found


def _measured(folder: Path, deltas: dict[str, torch.Tensor]) -> tuple[int, float]:
    """How many layers `delta` measures, and how far at most a singular value is from PEFT's, over the largest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare(folder).figures
        adapter = read_adapter(folder)
    off = 0.0
    for name, factors in adapter.layers.items():
        if not deltas:
            break
        delta = deltas[name]
        # PEFT's is transposed for Conv1D; a kernel's axes stand behind; experts first
        stacked = delta.dim() == 3 and factors.experts > 1
        S = torch.linalg.svdvals(delta if stacked else delta.flatten(1))
        S = S.square().sum(0).sqrt() if stacked else S
        mine = torch.tensor(use_of(factors).values, dtype=torch.float64)
        mine = nn.functional.pad(mine, (0, max(0, len(S) - len(mine))))[: len(S)]
        off = max(off, float((mine - S).abs().max() / S[0]))
        norm = found[f"{name}.weight"].delta_norm
        off = max(off, abs(norm - float(delta.norm())) / float(delta.norm()))
    return len(found), off


def _fault(
    setting: Setting, measured: int, layers: int, off: float, loaded: str, off_loaded: float, rough: bool
) -> str:
    if measured != layers:
        return f"measured {measured} of {layers} layers"
    if off > (2e-2 if rough else MEASURED):
        return f"measured {off:.1e} away"
    if setting.refused:
        return (
            ""
            if setting.refused in loaded
            else f"should be refused for {setting.refused}; got {loaded or 'loaded'}"
        )
    if loaded.startswith("target_parameters=") and "all-linear" in str(setting.options(FAMILIES["llama"])):
        return ""  # of a mixture of experts, all-linear means their stacks, too
    if "ScaledWordEmbedding changes what nn.Embedding computes" in loaded:
        return ""  # Bart's and Gemma's tables multiply: refused by name
    if loaded:
        return f"not loaded: {loaded}"
    return f"outputs {off_loaded:.1e} away" if off_loaded > (5e-2 if rough else LOADED) else ""


def cases(families: list[str], settings: list[str]) -> Iterator[tuple[str, str, Outcome | str]]:
    for family, setting in itertools.product(families, settings):
        folder = Path(tempfile.mkdtemp())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield family, setting, run(FAMILIES[family], SETTINGS[setting], folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """The table: for each setting in how many families measured, loaded, refused, and the largest differences."""
    families = [each for each in arguments if each in FAMILIES] or list(FAMILIES)
    settings = [each for each in arguments if each in SETTINGS] or list(SETTINGS)
    by_setting: dict[str, list[tuple[str, Outcome]]] = {each: [] for each in settings}
    by_family: dict[str, list[Outcome]] = {each: [] for each in families}
    absent, faults = collections.Counter(), []
    for family, setting, found in cases(families, settings):
        if isinstance(found, str):
            absent[setting] += 1
            continue
        by_setting[setting].append((family, found))
        by_family[family].append(found)
        if found.fault:
            faults.append(f"{family}, {setting}: {found.fault}")
            print(f"FAULT {faults[-1]}", file=sys.stderr, flush=True)
    worst = lambda values: f"{max(values):.0e}" if values else "-"
    heading = f"{'adapters':>9}{'measured':>9}{'off by':>9}{'loaded':>8}{'off by':>9}{'refused':>8}"
    for title, rows in (
        ("setting", {name: [found for _, found in of] for name, of in by_setting.items()}),
        ("family", by_family),
    ):
        print(f"{title:28}{heading}")
        for name, of in rows.items():
            measured = [each for each in of if each.measured]
            loaded = [each for each in of if not each.loaded]
            off = [
                worst([each.off_measured for each in measured]),
                worst([each.off_loaded for each in loaded]),
            ]
            counts = f"{len(of):>9}{len(measured):>9}{off[0]:>9}{len(loaded):>8}{off[1]:>9}"
            print(f"{name:28}{counts}{len(of) - len(loaded):>8}")
        print()
    reasons = collections.Counter(
        f"{name}: {found.loaded[:100]}" for name, of in by_setting.items() for _, found in of if found.loaded
    )
    print(f"Refused: {sum(reasons.values())}")
    for why, count in sorted(reasons.items()):
        print(f"  {count:>3} × {why}")
    everything = [found for of in by_family.values() for found in of]
    print(
        f"{len(everything)} adapters of {len(families)} families and {len(settings)} settings "
        f"({sum(absent.values())} combinations PEFT doesn't make): "
        f"{sum(bool(each.measured) for each in everything)} measured, "
        f"{sum(not each.loaded for each in everything)} loaded, {len(faults)} faults"
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
