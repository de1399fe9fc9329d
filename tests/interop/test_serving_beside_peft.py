"""Mixed batches beside PEFT's `adapter_names=`: the same folders, the same rows, the same logits."""

import copy

import pytest
import torch

from lora_edu.lora import AdapterError, AdapterPool

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT's own warnings: fan_in_fan_out, saved embeddings, tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(7 * 9).reshape(7, 9) * 11 % 40
ROWS = ["one", "two", None, "three", "one", None, "two"]


def gpt2():
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    return transformers.GPT2LMHeadModel(config)


def llama(tied=False):
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config)


# the model's maker and, for each adapter, rank and targets
KINDS = {
    "GPT-2": (gpt2, {"one": (2, ["c_attn"]), "two": (4, ["wte", "c_fc"]), "three": (1, ["mlp.c_proj", "c_attn"])}),
    "Llama": (
        llama,
        {"one": (2, ["q_proj", "v_proj"]), "two": (5, ["embed_tokens", "lm_head"]), "three": (1, ["down_proj"])},
    ),
    "Llama, tied": (
        lambda: llama(tied=True),
        {"one": (2, ["q_proj"]), "two": (3, ["embed_tokens", "up_proj"]), "three": (2, ["o_proj", "q_proj"])},
    ),
}  # fmt: skip


def in_peft(model, adapters: dict, folder):
    """PEFT's model with random factors in every adapter, and each adapter's folder."""
    wrapped = None
    for name, (rank, targets) in adapters.items():
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank + 1,
            target_modules=targets,
            fan_in_fan_out=hasattr(model, "transformer"),
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    for name, each in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(each, std=0.3)
    wrapped.save_pretrained(folder)
    return wrapped.eval(), {name: folder / name for name in adapters}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_peft_s(kind, tmp_path):
    make, adapters = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        base = model(TOKENS).logits
    theirs, folders = in_peft(copy.deepcopy(model), adapters, tmp_path)
    with torch.no_grad():
        wanted = theirs(TOKENS, adapter_names=[name or "__base__" for name in ROWS]).logits
    pool = AdapterPool(model, folders)
    with pool.use(ROWS):
        mixed = model(TOKENS).logits
    torch.testing.assert_close(mixed, wanted, atol=2e-5, rtol=1e-4)
    for i, name in enumerate(ROWS):
        assert torch.equal(mixed[i], base[i]) == (name is None)
    for name in adapters:
        theirs.set_adapter(name)
        with pool.use(name), torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, atol=2e-5, rtol=1e-4)
    pool.remove()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, base)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_row_by_row(kind, tmp_path):
    """With a cache of keys and values, every step has one token a row."""
    make, adapters = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    _, folders = in_peft(copy.deepcopy(model), adapters, tmp_path)
    pool = AdapterPool(model, folders)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pool.use(ROWS):
        mixed = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    assert mixed.shape == (7, 14)
    for i, name in enumerate(ROWS):
        row = TOKENS[i : i + 1]
        with pool.use(name):
            assert torch.equal(
                model.generate(row, attention_mask=torch.ones_like(row), **options)[0], mixed[i]
            )


def test_a_table_of_positions_is_shared_by_the_batch(tmp_path):
    torch.manual_seed(0)
    model = gpt2().eval()
    _, folders = in_peft(copy.deepcopy(model), {"one": (2, ["wpe"]), "two": (2, ["wpe", "c_fc"])}, tmp_path)
    pool = AdapterPool(model, folders)
    rows = ["one", "two", None]
    with (
        pool.use(rows),
        pytest.raises(ValueError, match=r"use\(\) named 3 rows, and the input of transformer.wpe has 1"),
    ):
        model(TOKENS[:3])
    positions = torch.arange(9).repeat(3, 1)
    with pool.use(rows):
        mixed = model(TOKENS[:3], position_ids=positions).logits
    for i, name in enumerate(rows):
        with pool.use(name):  # one adapter for all takes shared positions, too
            torch.testing.assert_close(mixed[i], model(TOKENS[:3]).logits[i], atol=2e-5, rtol=1e-4)


def test_what_peft_has_and_a_pool_refuses(tmp_path):
    torch.manual_seed(0)
    model = llama()
    for name, options, said in (
        ("dora", {"use_dora": True}, "DoRA"),
        ("saved", {"modules_to_save": ["lm_head"]}, "holds its own lm_head.weight beside the factors"),
    ):
        wrapped = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        )
        for each in wrapped.parameters():
            if each.requires_grad:
                torch.nn.init.normal_(each)
        wrapped.save_pretrained(tmp_path / name)
        with pytest.raises(AdapterError, match=said):
            AdapterPool(model, {name: tmp_path / name})
    with pytest.raises(
        ValueError, match=r"the model is wrapped by PEFT \(\w+\); take the base out of it first"
    ):
        AdapterPool(wrapped)
