"""A Llama of two layers with a tokenizer of whole words, untrained: what chapter 12 does with the real one, at once."""

from pathlib import Path

import tokenizers
import torch

from lora_edu.data.functions import Function
from lora_edu.docstrings import END, QUESTION, TURN

WORDS = "return read write open close the a file line name of def self none".split()  # noqa: SIM905
SPECIAL = ["<unk>", "<|im_start|>", END]


def build(transformers, seed: int = 0, width: int = 32):
    """(model, tokenizer): embedding and head tied, four heads, two for keys and values."""
    asked = (QUESTION + TURN).replace("<|im_start|>", " ").replace(END, " ")
    words = dict.fromkeys(
        [*SPECIAL, *WORDS, *tokenizers.pre_tokenizers.WhitespaceSplit().pre_tokenize_str(asked)]
    )
    words = dict.fromkeys(word if isinstance(word, str) else word[0] for word in words)
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token=END, additional_special_tokens=["<|im_start|>"]
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,  # else an untrained model says the same after every prompt
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


def save(transformers, folder: Path) -> None:
    """The model and its tokenizer as a folder that `hub.load_language_model` opens."""
    model, tokenizer = build(transformers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def functions(number: int, split: str = "test") -> list[Function]:
    """Functions of a few words each, of unlike length, whose answers can be learnt: the first words of the source."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        picked = torch.randint(len(WORDS), (5 + i % 7,), generator=draw).tolist()
        text = [WORDS[each] for each in picked]
        summary = " ".join(text[: 3 + i % 3])
        found.append(Function("m.py", f"f{i}", summary, "def " + " ".join(text), split, i))
    return found
