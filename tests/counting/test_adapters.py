"""How matrices are named, and the numbers LoRA has on them."""

import pytest

from lora_edu import counting


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("gpt-2-xl", "c_attn", 8, 48 * 8 * (1600 + 4800)),  # fused, as PEFT adapts it
        ("gpt-2-xl", ("query", "key", "value"), 8, 48 * 8 * 3 * (1600 + 1600)),  # apart, as loralib does
        ("GPT-2 XL", "c_proj", 1, 48 * (1600 + 1600 + 6400 + 1600)),  # a name that two modules end in
        ("gpt-2-xl", "attn.c_proj", 1, 48 * 3200),
        (
            "llama 3 8b",
            ("query", "value"),
            8,
            32 * 8 * (4096 + 4096 + 1024 + 4096),
        ),  # W_v is short
        ("llama-3-8b", "embedding", 8, 8 * (128_256 + 4096)),
        ("gpt-2", ("embedding", "head"), 8, 2 * 8 * (50_257 + 768)),  # tied: one weight, yet two adapters
        ("TinyLM", "all", 8, 248_000),
    ],
)
def test_counts(name, targets, rank, expected):
    assert counting.count(name, targets, rank).parameters == expected


def test_groups_are_what_they_say():
    for name in counting.ARCHITECTURES:
        parts = [counting.count(name, part, 1).parameters for part in ("attention", "mlp")]
        assert counting.count(name, "linear", 1).parameters == sum(parts)
        both = sum(counting.count(name, part, 1).parameters for part in ("linear", "embedding"))
        head = counting.count(name, "head", 1).parameters if name not in ENCODERS else 0
        assert counting.count(name, "all", 1).parameters == both + head


@pytest.mark.slow  # imports PEFT
def test_all_linear_is_what_peft_adapts():
    """Every linear layer but the head, a pooler too: on PEFT's own answer for a small model of each kind."""
    peft = pytest.importorskip("peft", reason="extra `course` is not installed")
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    more = {"num_key_value_heads": 2, "vocab_size": 50}
    small = [
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50)),
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)),
    ]
    for model in small:
        paper = counting.from_config(model.config.to_dict(), "small")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear"))
        trained = sum(tensor.numel() for name, tensor in adapted.named_parameters() if "lora_" in name)
        assert counting.count(paper, "all-linear", 3).parameters == trained, paper.name


ENCODERS = ("RoBERTa base", "RoBERTa large", "DeBERTa-XXL", "all-MiniLM-L6-v2")
