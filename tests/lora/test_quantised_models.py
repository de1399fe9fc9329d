"""Whole models in four bits: quantised all or not at all, LoRA on top, saved, loaded, merged only when asked."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, portrait, tiny, train
from torch import nn

from lora_edu.lora import (
    AdapterPool,
    LoRAQuantisedLinear,
    QuantisedLinear,
    add_lora,
    dequantise,
    dequantise_model,
    load_adapter,
    lora_layers,
    merge_lora,
    quantise_from_gguf,
    quantise_model,
    remove_lora,
    save_adapter,
    trainable_parameters,
    unmerge_lora,
)

WIDTH = {"width": 32}


def quantised(format="nf4", seed=0, **options):
    model = tiny(seed, **WIDTH, **options)
    quantise_model(model, format=format)
    return model


def state(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("format", ["nf4", "q4_0", "q4_1"])
def test_every_linear_layer_but_the_head_is_quantised(format):
    model = tiny(**WIDTH)
    plain = copy.deepcopy(model)
    reports = quantise_model(model, format=format)
    assert len(reports) == 12 and not isinstance(model.head, QuantisedLinear)
    for name, report in reports.items():
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
        assert isinstance(layer, QuantisedLinear) and layer.bias is not None
        off = (dequantise(layer.quantised) - weight).norm() / weight.norm()
        assert report.error == pytest.approx(float(off), rel=1e-4) and 0.03 < report.error < 0.12
        assert report.bytes_before == 4 * weight.numel() > 6 * report.bytes_after
    for name in reports:
        plain.get_submodule(name).weight.data = dequantise(model.get_submodule(name).quantised)
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-5)
    back = dequantise_model(model)
    assert torch.allclose(back(TOKENS), plain(TOKENS), atol=1e-6) and type(back.blocks[0].mlp[0]) is nn.Linear


def test_a_model_without_data_gets_room_and_loads_what_was_saved(tmp_path):
    model = quantised()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = tiny(**WIDTH)
    reports = quantise_model(empty)
    assert all(report.error != report.error for report in reports.values())
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    start = empty(TOKENS)
    assert torch.equal(start, model(TOKENS))
    add_lora(empty, 2, 4, "query")
    train(empty, 1)
    assert not torch.equal(empty(TOKENS), start)


@pytest.mark.parametrize("format", ["nf4", "q4_1"])
def test_life_of_an_adapter_on_four_bits(format):
    model = quantised(format)
    before, start, looks = state(model), model(TOKENS), portrait(model)
    add_lora(model, 4, 8, ["query", "value", "mlp.0"])
    assert all(isinstance(each, LoRAQuantisedLinear) for each in lora_layers(model).values())
    assert torch.equal(model(TOKENS), start)
    assert len(trainable_parameters(model)) == 12
    train(model)
    tuned = model.eval()(TOKENS)
    assert not torch.allclose(tuned, start)
    remove_lora(model.train())
    assert same(state(model), before) and portrait(model)["modules"] == looks["modules"]
    assert portrait(model)["parameters"] == looks["parameters"]


def test_it_learns_as_lora_on_the_decoded_weight():
    """The same steps on W decoded to float give the same factors: the four bits change W, not the method."""
    model = quantised()
    twin = dequantise_model(copy.deepcopy(model))
    for each in (model, twin):
        torch.manual_seed(1)
        add_lora(each, 4, 8, "all-linear")
    twin.load_state_dict(  # the same start
        {name: each for name, each in model.state_dict().items() if "lora_" in name}, strict=False
    )
    train(model, 3)
    train(twin, 3)
    for name, layer in lora_layers(model).items():
        other = twin.get_submodule(name)
        assert torch.allclose(layer.lora_B, other.lora_B, atol=1e-4), name
        assert torch.allclose(layer.delta_weight(), other.delta_weight(), atol=1e-4), name


@pytest.mark.parametrize("format", ["nf4", "q4_0", "q4_1"])
def test_merging_is_refused_with_the_way_out_and_done_when_asked(format):
    model = add_lora(quantised(format), 4, 8, ["query", "head"])
    train(model)
    model.eval()
    before, tuned = state(model), model(TOKENS)
    with pytest.raises(
        ValueError, match=r"blocks.0.attention.query: W is quantised \(\w+\).*requantise=True"
    ):
        merge_lora(model)
    assert not model.head.merged and torch.equal(model(TOKENS), tuned)
    reports = merge_lora(model, requantise=True)
    layer = model.blocks[0].attention.query
    delta, W = layer.delta_weight(), dequantise(layer._unmerged())
    off = (dequantise(layer.quantised) - W - delta).norm() / delta.norm()
    assert reports["blocks.0.attention.query"].swallowed == pytest.approx(float(off), rel=1e-3)
    assert 0.01 < off and layer.quantised.format == format
    assert same(state(model), before)  # merged or not, the state is the unmerged one
    assert not torch.equal(model(TOKENS), tuned)
    with pytest.raises(RuntimeError, match="is merged, so its lora_A and lora_B would get no gradient"):
        model.train()(TOKENS)
    again = copy.deepcopy(model).eval()
    assert torch.equal(again(TOKENS), model.eval()(TOKENS))
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), tuned) and same(state(model), before)
    again.load_state_dict(before)
    assert not again.head.merged and torch.equal(again(TOKENS), tuned)


def test_removed_with_its_update_requantised_the_base_has_new_codes():
    model = add_lora(quantised(), 4, 80, "query")
    train(model)
    wanted = (
        dequantise(model.blocks[0].attention.query.quantised) + model.blocks[0].attention.query.delta_weight()
    )
    with pytest.raises(ValueError, match="requantise=True"):
        remove_lora(model, merge=True)
    assert lora_layers(model)
    remove_lora(model, merge=True, requantise=True)
    layer = model.blocks[0].attention.query
    assert type(layer) is QuantisedLinear
    assert 0 < (dequantise(layer.quantised) - wanted).norm() / wanted.norm() < 0.12


def test_the_way_out_merges_in_float(tmp_path):
    model = add_lora(quantised(), 4, 8, "query")
    train(model)
    tuned = model.eval()(TOKENS)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"blocks.0.attention.query has LoRA; save_adapter"):
        dequantise_model(model)
    dequantise_model(remove_lora(model))
    load_adapter(model, tmp_path)
    merge_lora(model)
    assert torch.allclose(model(TOKENS), tuned, atol=1e-4)


def test_an_adapter_goes_from_four_bits_to_a_file_and_back_and_onto_a_float_base(tmp_path):
    base, model = tiny(**WIDTH), quantised()
    add_lora(model, {"query": 2, "mlp.0": 4}, 8, ["query", "mlp.0"], rank_stabilised=True)
    train(model)
    tuned = model.eval()(TOKENS)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = load_adapter(quantised(), tmp_path).eval()
        load_adapter(base, tmp_path)
    assert torch.equal(other(TOKENS), tuned)
    for name, layer in lora_layers(model).items():
        assert torch.equal(base.get_submodule(name).lora_B, layer.lora_B)


def test_a_pool_serves_adapters_on_four_bits(tmp_path):
    model = add_lora(quantised(), 4, 8, "query")
    train(model)
    tuned = model.eval()(TOKENS)
    save_adapter(model, tmp_path)
    base = remove_lora(model)
    plain = base(TOKENS)
    pool = AdapterPool(base, {"one": tmp_path})
    with pool.use(["one", None]):
        mixed = base(TOKENS)
    assert torch.allclose(mixed[0], tuned[0], atol=1e-5) and torch.allclose(mixed[1], plain[1], atol=1e-5)


def test_dropout_dtypes_and_copies():
    model = add_lora(quantised().bfloat16(), 4, 8, "query", dropout=0.5, lora_dtype=torch.float32)
    layer = model.blocks[0].attention.query
    assert layer.lora_A.dtype == torch.float32 and layer.dtype == torch.bfloat16
    train(model)
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    assert not torch.equal(layer.train()(x), layer(x)) and layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.eval()(x), copy.deepcopy(layer)(x))
    assert "rank=4, alpha=8" in repr(layer) and "nf4" in repr(layer)


def test_a_rank_of_its_own_and_all_linear():
    model = quantised()
    add_lora(model, 4, 8, "all-linear")
    assert len(lora_layers(model)) == 12
    with pytest.raises(ValueError, match="rank must be between 1 and 32.*got 33"):
        add_lora(quantised(), 33, 8, "query")
    with pytest.raises(ValueError, match="no layer matches quary; did you mean query"):
        add_lora(quantised(), 4, 8, "quary")
    assert len(lora_layers(add_lora(quantised(), 4, 8, QuantisedLinear))) == 12


def hooked():
    model = tiny(**WIDTH)
    model.blocks[1].mlp[0].register_forward_hook(lambda *_: None)
    return model


def broken():
    model = tiny(**WIDTH)
    model.blocks[1].mlp[0].weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (lambda: tiny(**WIDTH), ("embedding",), TypeError, "embedding: only nn.Linear.*Embedding is none"),
        (lambda: tiny(**WIDTH), ("qury",), ValueError, "no layer matches qury"),
        (
            lambda: tiny(**WIDTH),
            ("query", "int8"),
            ValueError,
            "query: format must be one of nf4, q4_0, q4_1",
        ),
        (
            lambda: tiny(width=8),
            ("query", "q4_1"),
            ValueError,
            "query: GGUF's blocks are 32 numbers of one row",
        ),
        (
            lambda: tiny(**WIDTH, tied=True),
            ("head",),
            ValueError,
            r"head.weight is also embedding.weight \(tied\)",
        ),
        (hooked, ("all-linear",), TypeError, r"blocks.1.mlp.0: this Linear has hooks"),
        (broken, ("all-linear",), ValueError, r"blocks.1.mlp.0: every number must be finite"),
        (quantised, ("query",), ValueError, r"query is quantised already \(nf4\)"),
        (
            lambda: add_lora(tiny(**WIDTH), 2, 4, "query"),
            ("query",),
            ValueError,
            "query has LoRA; quantise first",
        ),
    ],
)
def test_what_can_t_be_quantised_leaves_the_model_as_it_was(make, options, kind, message):
    model = make()
    looks = portrait(model)
    with pytest.raises(kind, match=message):
        quantise_model(model, *options)
    assert str(portrait(model)) == str(looks)


# ---- beside other libraries --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_peft_opens_an_adapter_that_was_trained_on_four_bits(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=64)
    base = transformers.LlamaForCausalLM(config).eval()
    model = copy.deepcopy(base)
    quantise_model(model)
    add_lora(model, 4, 8, ["q_proj", "down_proj"])
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    decoded = dequantise_model(remove_lora(copy.deepcopy(model)))
    theirs = peft.PeftModel.from_pretrained(decoded, tmp_path)
    assert torch.allclose(theirs(TOKENS).logits, model(TOKENS).logits, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(TOKENS).logits
    ours = load_adapter(base, tmp_path)(TOKENS).logits
    assert torch.allclose(theirs, ours, atol=1e-4)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of two layers as a GGUF file in Q4_1, written with the package gguf; and the model of its weights."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed here")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=96)
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_block_count(2)
    from lora_edu.lora.quantised_models import LLAMA_LAYERS

    for index, block in enumerate(model.model.layers):
        for theirs, ours in LLAMA_LAYERS.items():
            layer = block.get_submodule(ours)
            weight = layer.weight.data
            if theirs in ("attn_q", "attn_k"):  # as llama.cpp's converter does it
                heads = 4 if theirs == "attn_q" else 2
                weight = weight.view(heads, 2, -1, 64).swapaxes(1, 2).reshape(weight.shape)
            blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(
                f"blk.{index}.{theirs}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1
            )
            decoded = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
            if theirs in ("attn_q", "attn_k"):
                decoded = decoded.view(heads, -1, 2, 64).swapaxes(1, 2).reshape(weight.shape)
            layer.weight.data = decoded.contiguous()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_the_blocks_of_a_gguf_file_become_the_base(gguf_file):
    path, model = gguf_file
    base = copy.deepcopy(model)
    reports = quantise_from_gguf(base, path)
    assert len(reports) == 14 and all(report.error == 0 for report in reports.values())
    assert {each.quantised.format for each in base.modules() if isinstance(each, QuantisedLinear)} == {"q4_1"}
    assert torch.allclose(base(TOKENS).logits, model(TOKENS).logits, atol=1e-5)
    add_lora(base, 4, 8, "all-linear")
    assert torch.allclose(base(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_a_model_that_is_not_the_file_s_is_refused(gguf_file, tmp_path):
    path, model = gguf_file
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight.data[0] += 0.1
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj of the model is not the file's.*quantise_model"
    ):
        quantise_from_gguf(other, path)
    assert not any(isinstance(each, QuantisedLinear) for each in other.modules())
    with pytest.raises(ValueError, match="has the layer model.layers.0.* which the model doesn't have"):
        quantise_from_gguf(tiny(), path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        quantise_from_gguf(model, tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no gguf at all, but long enough to look at")
    with pytest.raises(ValueError, match="can't be read as GGUF"):
        quantise_from_gguf(model, tmp_path / "bad.gguf")
