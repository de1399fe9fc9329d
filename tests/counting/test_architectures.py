"""Every shape against the model's own, which transformers builds (extra `course`); its configs are written out here."""

import pytest
import torch

from lora_edu import counting
from lora_edu.tinylm import TinyLM


def gpt2(layers, width, heads):
    return "GPT2LMHeadModel", "GPT2Config", {"n_layer": layers, "n_embd": width, "n_head": heads}


def roberta(layers, width, heads, mlp):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    rest = {
        "intermediate_size": mlp,
        "vocab_size": 50_265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }
    return "RobertaModel", "RobertaConfig", sizes | rest


def llama(layers, width, heads, groups, mlp, vocabulary, kind="Llama", **more):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    rest = {"num_key_value_heads": groups, "intermediate_size": mlp, "vocab_size": vocabulary}
    return f"{kind}ForCausalLM", f"{kind}Config", sizes | rest | more


DEBERTA = {
    "num_hidden_layers": 48,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "vocab_size": 128_100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "max_relative_positions": -1,
}
MINILM = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30_522,
}
GEMMA = {"head_dim": 256, "kind": "Gemma"}


def qwen3(layers, width, heads, mlp, tied=False):
    more = {"head_dim": 128, "tie_word_embeddings": tied}
    return llama(layers, width, heads, 8, mlp, 151_936, "Qwen3", **more)


def gemma3(layers, width, heads, groups, mlp, vocabulary=262_208, head_dim=256):
    config = llama(layers, width, heads, groups, mlp, vocabulary, head_dim=head_dim)[2]
    return "Gemma3ForCausalLM", "Gemma3TextConfig", config


# name → (class, config class, config), as published with each model's weights
MODELS = {
    "GPT-2": gpt2(12, 768, 12),
    "GPT-2 M": gpt2(24, 1024, 16),
    "GPT-2 L": gpt2(36, 1280, 20),
    "GPT-2 XL": gpt2(48, 1600, 25),
    "RoBERTa base": roberta(12, 768, 12, 3072),
    "RoBERTa large": roberta(24, 1024, 16, 4096),
    "DeBERTa-XXL": ("DebertaV2Model", "DebertaV2Config", DEBERTA),
    "all-MiniLM-L6-v2": ("BertModel", "BertConfig", MINILM),
    "Llama-2-7B": llama(32, 4096, 32, 32, 11_008, 32_000),
    "Llama-3-8B": llama(32, 4096, 32, 8, 14_336, 128_256),
    "Llama-3-70B": llama(80, 8192, 64, 8, 28_672, 128_256),
    "Llama-3.1-8B": llama(32, 4096, 32, 8, 14_336, 128_256),
    "Llama-3.1-70B": llama(80, 8192, 64, 8, 28_672, 128_256),
    "Llama-3.2-1B": llama(16, 2048, 32, 8, 8192, 128_256, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": llama(28, 3072, 24, 8, 8192, 128_256, head_dim=128, tie_word_embeddings=True),
    "Mistral-7B-v0.1": llama(32, 4096, 32, 8, 14_336, 32_000, "Mistral"),
    "Mistral-7B-v0.3": llama(32, 4096, 32, 8, 14_336, 32_768, "Mistral"),
    "SmolLM2-135M": llama(30, 576, 9, 3, 1536, 49_152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": llama(24, 896, 14, 2, 4864, 151_936, "Qwen2", tie_word_embeddings=True),
    "Qwen2.5-7B": llama(28, 3584, 28, 4, 18_944, 152_064, "Qwen2", tie_word_embeddings=False),
    "Qwen3-0.6B": qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-8B": qwen3(36, 4096, 32, 12_288),
    "Qwen3-14B": qwen3(40, 5120, 40, 17_408),
    "Qwen3-32B": qwen3(64, 5120, 64, 25_600),
    "Gemma-2B": llama(18, 2048, 8, 1, 16_384, 256_000, **GEMMA),
    "Gemma-7B": llama(28, 3072, 16, 16, 24_576, 256_000, **GEMMA),
    "Gemma-3-270M": gemma3(18, 640, 4, 1, 2048, 262_144),
    "Gemma-3-1B": gemma3(26, 1152, 4, 1, 6912, 262_144),
    "Gemma-3-4B": gemma3(34, 2560, 8, 4, 10_240),
    "Gemma-3-12B": gemma3(48, 3840, 16, 8, 15_360),
    "Gemma-3-27B": gemma3(62, 5376, 32, 16, 21_504, head_dim=128),
}


def build(name, device="meta", **changes):
    transformers = pytest.importorskip("transformers", reason="extra `course` is not installed")
    model, config, options = MODELS[name]
    with torch.device(device):
        return getattr(transformers, model)(getattr(transformers, config)(**options | changes))


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_is_the_model_s_own(name):
    """A tied head is one parameter with the embedding: named_parameters lists it once, and so do we."""
    model = build(name)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = counting.ARCHITECTURES[name]
    assert ours.shapes() == theirs
    assert ours.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ours.built_by == f"transformers.{type(model).__name__}"


@pytest.mark.parametrize("size", [{}, {"vocabulary": 640, "width": 48, "layers": 3, "heads": 4}])
def test_every_shape_of_tinylm(size):
    with torch.device("meta"):
        model = TinyLM(**size)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert counting.tinylm(**size).shapes() == shapes


def test_all_architectures_are_compared_with_a_model_but_gpt_3():
    assert set(counting.ARCHITECTURES) - set(MODELS) == {"TinyLM", "GPT-3 175B"}


def test_gpt_3_differs_from_gpt_2_only_in_keeping_q_k_v_apart():
    one, other = (
        counting.gpt2("x", 96, 12_288, 96, context=2048).parameters,
        counting.ARCHITECTURES["GPT-3 175B"],
    )
    assert one == other.parameters


# Counted by others: Keras Hub's presets (qwen3_presets.py, gemma3_presets.py: there a vocabulary of 262 144, in
# the larger Gemmas 64 rows less than in the weights on Hugging Face), and the models' cards.
COUNTED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_099_328 + 64 * 2560,
    "Gemma-3-12B": 11_765_788_416 + 64 * 3840,
    "Gemma-3-27B": 27_009_002_240 + 64 * 5376,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_that_others_count(name):
    assert counting.ARCHITECTURES[name].parameters == COUNTED[name]


def test_tied_head_is_counted_once_in_the_model():
    tied, apart = counting.ARCHITECTURES["GPT-2"], build("GPT-2", tie_word_embeddings=False)
    assert sum(p.numel() for p in apart.parameters()) == tied.parameters + 50_257 * 768
