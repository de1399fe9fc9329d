"""LoRA added to whole models, merged and taken out again; every refusal leaves the model as it was."""

import copy
import os
import re
import socket
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TOKENS, Tiny, portrait, tiny, train
from torch import nn

from lora_edu.lora import (
    LoRAEmbedding,
    LoRALinear,
    add_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    trainable_parameters,
    unmerge_lora,
)


def names(model) -> list[str]:
    return list(lora_layers(model))


# Which layers


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("embedding", ["embedding"]),
        (["query", "value"], [f"blocks.{i}.attention.{x}" for i in (0, 1) for x in ("query", "value")]),
        ("1.attention.key", ["blocks.1.attention.key"]),
        ("blocks.*.mlp.0", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        (re.compile(r"blocks\.0\..*(query|key)"), ["blocks.0.attention.query", "blocks.0.attention.key"]),
        (nn.Embedding, ["embedding"]),
    ],
)
def test_targets(targets, expected):
    model = add_lora(tiny(), 2, 4, targets)
    assert names(model) == expected
    assert sorted(name for name, each in model.named_parameters() if each.requires_grad) == sorted(
        f"{name}.{factor}" for name in expected for factor in ("lora_A", "lora_B")
    )
    assert len(trainable_parameters(model)) == 2 * len(expected)


def test_every_linear_layer_by_type():
    assert len(names(add_lora(tiny(), 2, 4, nn.Linear))) == 13


def test_the_end_of_a_name_is_a_whole_word():
    with pytest.raises(ValueError, match="no layer matches uery"):
        add_lora(tiny(), 2, 4, "uery")


def test_ranks_and_alphas_by_target():
    model = add_lora(
        tiny(),
        {"query": 2, nn.Embedding: 5},
        {"query": 4, nn.Embedding: 20},
        ["query", nn.Embedding],
        dropout=0.1,
    )
    assert {(type(each), each.rank, each.alpha, each.scaling) for each in lora_layers(model).values()} == {
        (LoRALinear, 2, 4, 2.0),
        (LoRAEmbedding, 5, 20, 4.0),
    }
    assert model.blocks[0].attention.query.dropout == 0.1


def test_first_target_wins():
    model = add_lora(tiny(), {"0.attention.query": 1, "query": 3}, 4, ["0.attention.query", "query"])
    assert [each.rank for each in lora_layers(model).values()] == [1, 3]


def test_options_reach_the_layers():
    model = add_lora(
        tiny(), 2, 4, ["embedding", "head"], sparse=True, check_tokens=False, rank_stabilised=True
    )
    assert model.embedding.sparse and not model.embedding.check_tokens
    assert model.head.scaling == 4 / 2**0.5
    with pytest.raises(IndexError, match="out of range"):
        model(torch.tensor([[99]]))
    half = add_lora(tiny().bfloat16(), 2, 4, "query", lora_dtype=torch.float32)
    assert half.blocks[0].attention.query.lora_A.dtype == torch.float32
    assert half(TOKENS).dtype == torch.bfloat16


# Start, training, merging, removal


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.sampled_from(["embedding", "query", "value", "output", "mlp.0", "mlp.2", "head"]), min_size=1),
    st.integers(1, 8),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 100),
)
def test_life_of_an_adapter(targets, rank, alpha, seed):
    """Added it changes nothing, trained it does, merged it is the same function, removed all is as before."""
    model = tiny(seed)
    model.blocks[0].norm.requires_grad_(False)  # frozen before: frozen afterwards
    before, start = portrait(model), model(TOKENS)
    assert add_lora(model, rank, alpha, sorted(targets)) is model
    assert torch.equal(model(TOKENS), start)
    train(model)
    tuned = model.eval()(TOKENS)
    assert not torch.equal(tuned, start)
    reports = merge_lora(model)
    assert list(reports) == names(model) and all(0 < each.swallowed < 1e-3 for each in reports.values())
    assert torch.allclose(model(TOKENS), tuned, atol=1e-4)
    assert merge_lora(model) == reports
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), tuned)
    merge_lora(model)
    remove_lora(model.train())
    assert portrait(model) == before
    assert torch.equal(model(TOKENS), start)


def test_remove_with_the_update_merged():
    model = tiny()
    modules = [id(each) for each in model.modules()]
    add_lora(model, 2, 4, ["query", "embedding"])
    train(model)
    tuned = model.eval()(TOKENS)
    remove_lora(model, merge=True)
    assert [id(each) for each in model.modules()] == modules
    assert torch.allclose(model(TOKENS), tuned, atol=1e-5)
    assert all(each.requires_grad for each in model.parameters())


def test_removal_after_moving_and_copying():
    model = add_lora(tiny(), 2, 4, ["query", "embedding"])
    twin = copy.deepcopy(model).double()
    remove_lora(twin)
    assert type(twin.embedding) is nn.Embedding and twin.embedding.weight.dtype == torch.float64
    assert torch.equal(twin.embedding.weight, model.embedding.weight.double())
    assert twin.embedding.weight is not model.embedding.weight and twin.embedding.weight.requires_grad
    assert names(model)  # the copy's removal is its own


def test_removal_of_layers_made_by_hand():
    model = nn.Sequential(LoRAEmbedding(9, 4, 2, 4, padding_idx=3), LoRALinear(4, 5, 2, 4))
    out = model(torch.arange(9))
    remove_lora(model)
    assert [type(each) for each in model] == [nn.Embedding, nn.Linear] and model[0].padding_idx == 3
    assert torch.equal(model(torch.arange(9)), out)


def test_adding_to_other_layers_later():
    model = tiny()
    before = portrait(model)
    add_lora(model, 2, 4, "query")
    add_lora(model, 3, 4, "value")
    assert len(trainable_parameters(model)) == 8
    remove_lora(model)
    assert portrait(model) == before


def test_a_module_used_in_two_places_gets_one_adapter():
    model = tiny()
    model.blocks[1].attention = model.blocks[0].attention
    before = portrait(model)
    add_lora(model, 2, 4, "query")
    assert model.blocks[0].attention.query is model.blocks[1].attention.query and len(names(model)) == 1
    twice = nn.Module()
    twice.one = twice.two = nn.Linear(3, 3)
    add_lora(twice, 1, 1, "one")
    assert isinstance(twice.two, LoRALinear) and twice.one is twice.two
    assert portrait(remove_lora(model)) == before


def test_merging_is_all_or_nothing():
    model = add_lora(tiny(), 2, 4, ["query", "value"])
    layers = lora_layers(model)
    layers["blocks.0.attention.query"].merge()
    layers["blocks.1.attention.query"].lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.attention.query: the merged weight must be finite"):
        merge_lora(model)
    assert [name for name, each in layers.items() if each.merged] == ["blocks.0.attention.query"]
    with pytest.raises(ValueError, match="must be finite"):
        remove_lora(model, merge=True)
    assert len(names(model)) == 4


def test_compiled_model():
    model = add_lora(torch.compile(tiny(), backend="eager"), 2, 4, "query")
    assert names(model) == ["blocks.0.attention.query", "blocks.1.attention.query"]
    model(TOKENS)
    remove_lora(model)
    assert not lora_layers(model)


# Tied embedding and head


@pytest.mark.parametrize("targets", ["embedding", "head", ["embedding", "head"]])
def test_tied_embedding_and_head_are_refused(targets):
    model = tiny(tied=True)
    before = portrait(model)
    with pytest.raises(ValueError, match=r'weight is also (head|embedding).weight \(tied\).*tied="separate"'):
        add_lora(model, 2, 4, targets)
    assert portrait(model) == before
    add_lora(model, 2, 4, "query")  # others are free
    assert portrait(remove_lora(model)) == before


def test_tied_adapted_separately():
    model = tiny(tied=True)
    before = portrait(model)
    add_lora(model, 2, 4, "embedding", tied="separate")
    assert model.embedding.weight.data_ptr() == model.head.weight.data_ptr()  # no second table
    train(model)
    tuned, W = model.eval()(TOKENS), model.head.weight.clone()
    merge_lora(model)
    assert torch.equal(model.head.weight, W)  # merging leaves the head alone
    assert torch.allclose(model(TOKENS), tuned, atol=1e-5)
    with pytest.raises(ValueError, match=r"head.weight is also"):
        unmerge_lora(model)
        add_lora(model, 2, 4, "head")
    twin = copy.deepcopy(model)
    assert portrait(remove_lora(model.train())) == before
    assert model.head.weight is model.embedding.weight
    remove_lora(twin, merge=True)
    assert torch.allclose(twin(TOKENS), tuned, atol=1e-5)
    assert twin.head.weight is not twin.embedding.weight and twin.head.weight.requires_grad


# "all-linear", types, and heads that are tied

INNER = [
    f"blocks.{block}.{name}"
    for block in range(2)
    for name in ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.0", "mlp.2")
]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_linear_layer_but_the_head(tied):
    model = tiny(tied=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say: the name means this
        add_lora(model, 2, 4, "all-linear")
    assert list(lora_layers(model)) == INNER


def test_a_tied_head_is_left_out_of_a_type_with_a_warning():
    model = tiny(tied=True)
    said = r'^head left out: the weight is also embedding.weight \(tied\).*tied="separate"'
    with pytest.warns(UserWarning, match=said) as caught:
        add_lora(model, 2, 4, [nn.Linear])
    assert list(lora_layers(model)) == INNER and caught[0].filename == __file__
    assert model.head.weight is model.embedding.weight
    assert list(lora_layers(add_lora(tiny(), 2, 4, [nn.Linear]))) == [*INNER, "head"], "untied it is adapted"
    separate = add_lora(tiny(tied=True), 2, 4, [nn.Linear], tied="separate")
    assert list(lora_layers(separate)) == [*INNER, "head"]


def test_both_ends_of_a_tie_are_left_out_of_types():
    with pytest.warns(UserWarning, match="^embedding, head left out"):
        model = add_lora(tiny(tied=True), 2, 4, [nn.Linear, nn.Embedding, "query"])
    assert list(lora_layers(model)) == INNER


@pytest.mark.parametrize("targets", [[nn.Linear, "head"], ["head", "query"], [nn.Embedding]])
def test_a_tied_layer_that_is_meant_is_refused(targets):
    model = tiny(tied=True)
    before = portrait(model)
    with pytest.raises(ValueError, match=r'(head|embedding).weight is also .*\(tied\).*tied="separate"'):
        add_lora(model, 2, 4, targets)
    assert portrait(model) == before


def test_ranks_by_target_know_all_linear():
    model = add_lora(tiny(), {"query": 1, "all-linear": 3}, 4, ["query", "all-linear"])
    assert {name: layer.rank for name, layer in lora_layers(model).items()} == {
        name: 1 if name.endswith("query") else 3 for name in INNER
    }


# A table that is resized


@pytest.mark.parametrize("rows", [25, 40])
@pytest.mark.parametrize("name", ["embedding", "head"])
def test_a_weight_resized_under_its_factors_is_named(name, rows):
    """What resize_token_embeddings does to a table: another weight, of other rows, in the same Parameter."""
    model = add_lora(tiny(), 2, 4, [name, "query"])
    layer = model.get_submodule(name)
    W = layer.weight.data
    layer.weight.data = torch.cat([W, W])[:rows]
    with pytest.raises(
        RuntimeError, match=rf"has {rows} rows, its factors are for 30: it was resized after LoRA"
    ):
        model(TOKENS)
    remove_lora(model)
    if name == "embedding":
        assert model.embedding.num_embeddings == rows
    assert model(TOKENS % 25).shape == (2, 12, rows if name == "head" else 30)


# Refusals: the reason is named and the model is as it was


def quantised(model):
    model.blocks[1].attention.query.weight = nn.Parameter(
        torch.zeros(8, 8, dtype=torch.int8), requires_grad=False
    )
    return model


def dynamically_quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:.*deprecated:")
@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        (tiny, (2, 4, "qeury"), ValueError, "no layer matches qeury; did you mean query"),
        (tiny, (2, 4, "blocks.0.attention.querry"), ValueError, "did you mean blocks.0.attention.query"),
        (
            tiny,
            (2, 4, ["query", "Embedding"]),
            ValueError,
            "no layer matches Embedding; did you mean embedding",
        ),
        (tiny, (2, 4, "c_attn"), ValueError, "layers named embedding, query, key, value, output, 0, 2, head"),
        (tiny, (2, 4, "blocks.*.qurey"), ValueError, r"no layer matches blocks.\*.qurey; did you mean"),
        (tiny, (2, 4, re.compile("quer")), ValueError, "no layer matches quer; did you mean query"),
        (tiny, (2, 4, nn.Conv2d), ValueError, "no layer matches Conv2d; this model has Embedding, Linear"),
        (tiny, (2, 4, []), ValueError, "at least one layer"),
        (tiny, (2, 4, [3]), TypeError, "a name, a pattern or a type of layer; got 3"),
        (
            tiny,
            (0, 4, "query"),
            ValueError,
            r"blocks.0.attention.query: rank must be between 1 and 8 .*got 0",
        ),
        (tiny, (9, 4, "query"), ValueError, "rank must be between 1 and 8 .*got 9"),
        (
            tiny,
            ({"query": 8, "head": 9}, 4, ["query", "head"]),
            ValueError,
            "head: rank must be between 1 and 8",
        ),
        (
            tiny,
            ({"query": 8}, 4, ["query", "head"]),
            ValueError,
            "one value for each target .query, head.; got values",
        ),
        (tiny, (2, float("inf"), "query"), ValueError, "alpha must be a finite number"),
        (
            tiny,
            (2, 4, "attention"),
            TypeError,
            "Attention is none of them; it contains key, output, query, value",
        ),
        (tiny, (2, 4, "norm"), TypeError, "blocks.0.norm: LoRA can be added to.*LayerNorm is none"),
        (
            lambda: add_lora(tiny(), 2, 4, "query"),
            (2, 4, "query"),
            TypeError,
            "query: LoRALinear has LoRA already",
        ),
        (lambda: add_lora(tiny(), 2, 4, "query"), (2, 4, nn.Linear), TypeError, "has LoRA already"),
        (
            lambda: quantised(tiny()),
            (2, 4, "query"),
            TypeError,
            r"blocks.1.attention.query: .*quantised .torch.int8",
        ),
        (lambda: dynamically_quantised(tiny()), (2, 4, "query"), TypeError, "already quantised"),
        (lambda: nn.Linear(3, 3), (1, 1, "weight"), ValueError, "is itself a Linear; use LoRALinear"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2),
            (2, 4, "out_proj"),
            TypeError,
            "out_proj: .*would never be used",
        ),
        (
            lambda: nn.TransformerEncoderLayer(8, 2),
            (2, 4, "linear1"),
            TypeError,
            "linear1: in inference.*skipped",
        ),
    ],
)
def test_refusals_leave_the_model_alone(make, call, error, message):
    model = make()
    before = portrait(model)
    with pytest.raises(error, match=message):
        add_lora(model, *call)
    assert portrait(model) == before


@pytest.mark.parametrize("call", [merge_lora, unmerge_lora, remove_lora])
def test_nothing_to_merge(call):
    with pytest.raises(ValueError, match="no LoRA layer; add_lora it first"):
        call(tiny())


def test_transformer_encoder_layer_without_its_fast_path():
    """The reason for refusing linear1: with the fast path, LoRA on it is skipped in inference."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        add_lora(layer, 2, 4, "linear1")
        nn.init.normal_(layer.linear1.lora_B)
        with torch.no_grad():
            right = layer(x)
            torch.backends.mha.set_fastpath_enabled(True)
            skipped = layer(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not torch.allclose(right, skipped, atol=1e-2)


# Two processes


def adapted() -> Tiny:
    model = add_lora(tiny(vocabulary=24), 2, 4, ["embedding", "query", "head"])
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "USE_LIBUV": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = adapted()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(parallel(TOKENS[rank : rank + 1]).flatten(0, 1), TOKENS[rank]).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = adapted()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    for name, single in model.state_dict().items():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], single, atol=1e-5), name


def test_wrapping_before_adding_is_refused(monkeypatch):
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Wrapped(tiny())
    with pytest.raises(TypeError, match="add LoRA first, then wrap it"):
        add_lora(model, 2, 4, "query")
