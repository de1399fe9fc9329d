"""Models of several families, small enough for a test, and what autograd keeps and computes for one of their steps."""

import pytest
import torch
from torch.nn import functional as F

from lora_edu import counting
from lora_edu.tinylm import TinyLM


def loss_of(model, tokens):
    output = model(tokens)
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state.square().mean()
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def saved_bytes(model, tokens):
    """Bytes that autograd keeps for the backward pass, each storage once, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), tokens]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, tokens)
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def small(kind):
    """(model, its architecture, tokens): the family's real code, small enough for a test."""
    if kind == "tinylm":
        return TinyLM(900, 60, 3, 5), counting.tinylm(900, 60, 3, 5)
    transformers = pytest.importorskip("transformers", reason="extra `course` is not installed")
    if kind == "gpt2":
        off = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0, "use_cache": False}
        config = transformers.GPT2Config(vocab_size=900, n_layer=3, n_embd=60, n_head=5, **off)
        return transformers.GPT2LMHeadModel(config), counting.gpt2("small", 3, 60, 5, 900)
    if kind in ("qwen3", "gemma3"):
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 900}
        more = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "use_cache": False}
        name = {"qwen3": ("Qwen3Config", "Qwen3"), "gemma3": ("Gemma3TextConfig", "Gemma3")}[kind]
        config = getattr(transformers, name[0])(max_position_embeddings=512, **sizes, **more)
        model = getattr(transformers, f"{name[1]}ForCausalLM")(config)
        return model, counting.from_config(config.to_dict(), "small")
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
        more = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
        config = transformers.LlamaConfig(vocab_size=900, max_position_embeddings=512, **sizes, **more)
        return transformers.LlamaForCausalLM(config), counting.llama("small", 3, 64, 8, 4, 176, 900, 512)
    sizes = {"hidden_size": 60, "intermediate_size": 240, "num_hidden_layers": 3, "num_attention_heads": 5}
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = transformers.BertConfig(vocab_size=900, **sizes, **off)
    return transformers.BertModel(config), counting.bert("small", 3, 60, 5, 240, 900, 512, 2)


def matrix_products(counter):
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation))
