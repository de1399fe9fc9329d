"""A model by its name as people write it, and from its own config.json: the shapes that transformers builds."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu import counting
from lora_edu.counting.models import KINDS

CLASSES = {  # model_type → (config, model)
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "bert": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaModel"),
}
LLAMA_3_1 = {  # as Meta ships it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def theirs(kind: str, config: dict) -> dict[str, tuple[int, ...]]:
    transformers = pytest.importorskip("transformers", reason="extra `course` is not installed")
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[kind])
    with torch.device("meta"):
        model = model_class(config_class(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("gpt-2-xl", "GPT-2 XL"),
        ("openai-community/gpt2-medium", "GPT-2 M"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("mistral-7b", "Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("Qwen/Qwen3-8B-Base", "Qwen3-8B"),
        ("qwen3 0.6b", "Qwen3-0.6B"),
        ("google/gemma-3-4b-it", "Gemma-3-4B"),
        ("google/gemma-2b", "Gemma-2B"),
        ("FacebookAI/roberta-large", "RoBERTa large"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
    ],
)
def test_a_name_as_people_write_it(written, name):
    assert counting.architecture(written).name == name


@pytest.mark.parametrize("written", ["google/gemma-2-2b", "Qwen3-30B-A3B", "Llama-3.1-405B", "Meta-8B"])
def test_a_name_that_is_not_known_is_no_other_model(written):
    with pytest.raises(ValueError, match="unknown architecture"):
        counting.architecture(written)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_has_its_class_s_default(kind):
    assert counting.from_config({"model_type": kind}, "bare").shapes() == theirs(kind, {})


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(CLASSES)), data=st.data())
def test_a_config_s_shapes_are_those_that_transformers_builds(kind, data):
    draw = data.draw
    groups, times, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head_width = groups * times, 2 * draw(st.integers(1, 4))
    width, mlp, vocabulary = heads * head_width, draw(st.integers(1, 40)), draw(st.integers(3, 90))
    if kind == "gpt2":
        config = {"n_embd": width, "n_head": heads, "n_layer": layers, "vocab_size": vocabulary}
        config |= draw(st.sampled_from([{}, {"n_inner": mlp}, {"n_inner": None}, {"n_positions": 17}]))
        config |= draw(st.sampled_from([{}, {"tie_word_embeddings": False}]))
    else:
        config = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        config |= {"intermediate_size": mlp, "vocab_size": vocabulary, "max_position_embeddings": 12}
    if kind in ("bert", "roberta"):
        config |= draw(st.sampled_from([{}, {"type_vocab_size": 3}]))
    elif kind != "gpt2":
        config |= {"num_key_value_heads": groups, "tie_word_embeddings": draw(st.booleans())}
        other = {"head_dim": 2 * draw(st.integers(1, 5))}
        config |= draw(st.sampled_from([{}, other])) if kind in ("llama", "mistral") else {}
        config |= other if kind.startswith("gemma") or kind == "qwen3" else {}
        config |= {"attention_bias": draw(st.booleans())} if kind not in ("qwen2", "mistral") else {}
        config |= {"mlp_bias": draw(st.booleans())} if kind == "llama" else {}
    assert counting.from_config({"model_type": kind} | config, "drawn").shapes() == theirs(kind, config)


def test_a_folder_and_the_file_in_it_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_1))
    for path in (folder, folder / "config.json", str(folder)):
        model = counting.architecture(path)
        assert model.name == "my-llama"
        assert model.shapes() == counting.ARCHITECTURES["Llama-3.1-8B"].shapes()
        assert model.context == 131_072
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert counting.architecture("~/my-llama").name == "my-llama"


def test_a_model_with_images_is_counted_without_its_vision_tower():
    """As Google ships Gemma 3 4B: the text part names four sizes, the class has the others."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
    }
    model = counting.from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "gemma")
    assert model.shapes() == counting.ARCHITECTURES["Gemma-3-4B"].shapes()


BAD = {
    "nothing there": (None, "holds no config.json"),
    "no JSON": ("{", "is no JSON text"),
    "a list": ("[]", "must hold a JSON object; it holds a list"),
    "deep": ("[" * 100_000, "is no JSON text"),
    "no type": ("{}", "must have a model_type; got None. Worked out are: llama, mistral"),
    "experts": ('{"model_type": "mixtral"}', "models of type 'mixtral' are not worked out"),
    "near": ('{"model_type": "qwen3_moe"}', "'qwen3_moe' are not worked out; did you mean qwen3"),
    "zero": (
        '{"model_type": "llama", "vocab_size": 0}',
        "vocab_size must be a whole number, 1 or more; the config has 0",
    ),
    "text": ('{"model_type": "bert", "hidden_size": "768"}', "the config has '768'"),
    "true": ('{"model_type": "bert", "hidden_size": true}', "the config has True"),
    "heads": ('{"model_type": "gpt2", "n_embd": 100}', "the config has 100 and 12"),
    "groups": (
        '{"model_type": "qwen3", "num_key_value_heads": 5}',
        "num_attention_heads must be a multiple of num_key_value_heads; the config has 32 and 5",
    ),
    "flag": (
        '{"model_type": "llama", "mlp_bias": "no"}',
        "mlp_bias must be true or false; the config has 'no'",
    ),
    "part": ('{"model_type": "gemma3", "text_config": 3}', "text_config must be an object; got 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_can_t_be_counted_is_told_why_in_one_line(case, tmp_path):
    text, message = BAD[case]
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        counting.architecture(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["./nothing/config.json", "~/nothing-at-all", "nothing.json"])
def test_a_path_to_nothing_is_no_unknown_name(path):
    with pytest.raises(ValueError, match="there is no .*Nothing is fetched"):
        counting.architecture(path)
