"""AdapterPool: a mixed batch is what each row would be alone, and the base is neither copied nor changed."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TOKENS, portrait, tiny, train
from torch import nn

from lora_edu.data import load_checkpoint
from lora_edu.data.shipped import adapter_folder
from lora_edu.lora import (
    AdapterError,
    AdapterPool,
    add_lora,
    functional,
    grouped_lora_embedding,
    grouped_lora_linear,
    load_adapter,
    lora_embedding,
    lora_linear,
    merge_lora,
    read_adapter,
    remove_lora,
    save_adapter,
    write_adapter,
)
from lora_edu.lora.adapter_files import Adapter, Factors
from lora_edu.tinylm import TinyLM

LAYERS = ["embedding", "blocks.0.attention.query", "blocks.0.mlp.0", "blocks.1.attention.value", "head"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def adapter(model, ranks: dict[str, int], seed: int = 0, alpha: float = 4.0, **options) -> Adapter:
    """Random factors of the ranks given, as `read_adapter` would give them."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: 0.5 * torch.randn(shape, generator=generator)
    layers = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        rows, columns = layer.weight.shape
        embedding = isinstance(layer, nn.Embedding)
        A = random(rows, rank) if embedding else random(rank, columns)
        B = random(columns if embedding else rows, rank)
        layers[name] = Factors(A, B, alpha, options.get("rank_stabilised", False), 0.0, embedding)
    config = {"target_modules": list(ranks)}
    return Adapter(Path("made"), "PEFT", layers, {}, {}, {}, [], [], config, {}, True)


def on_disk(model, folder, targets, rank=2, **options) -> Path:
    """A trained adapter's folder; the model is left as it was."""
    changed = add_lora(copy.deepcopy(model), rank, 4, targets, tied="separate", **options)
    train(changed)
    return save_adapter(changed, folder)


def alone(model, folder, tokens, merged=False):
    """What a copy of the model with this one adapter gives."""
    other = load_adapter(copy.deepcopy(model), folder).eval()
    if merged:
        merge_lora(other)
    with torch.no_grad():
        return other(tokens)


# The functions


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=24),
    st.integers(1, 5),
    st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.booleans(),
)
def test_grouped_is_row_by_row(rows, rank, between, with_bias):
    torch.manual_seed(0)
    x, W = torch.randn(len(rows), *between, 7), torch.randn(5, 7)
    A, B, bias = torch.randn(4, rank, 7), torch.randn(4, 5, rank), torch.randn(5) if with_bias else None
    out = grouped_lora_linear(x, W, A, B, torch.tensor(rows), bias)
    base = F.linear(x, W, bias)
    for i, k in enumerate(rows):
        if k < 0:
            assert torch.equal(out[i], base[i])
        else:
            torch.testing.assert_close(out[i], lora_linear(x[i], W, A[k], B[k], 1.0, bias), **CLOSE)
    tokens, table, embedding_A = (
        torch.randint(0, 9, (len(rows), *between)),
        torch.randn(9, 7),
        torch.randn(4, 9, rank),
    )
    embedding_B = torch.randn(4, 7, rank)
    out = grouped_lora_embedding(tokens, table, embedding_A, embedding_B, rows, padding_idx=2)
    for i, k in enumerate(rows):
        if k < 0:
            assert torch.equal(out[i], table[tokens[i]])
        else:
            one = lora_embedding(tokens[i], table, embedding_A[k], embedding_B[k], 1.0, padding_idx=2)
            torch.testing.assert_close(out[i], one, **CLOSE)


@pytest.mark.parametrize("gathered", [0, 10**9])
def test_both_ways_to_multiply_agree(gathered, monkeypatch):
    monkeypatch.setattr(functional, "GATHERED", gathered)
    rows = [0, 2, 2, -1, 0, 1, 1, 1]
    assert len(functional.adapter_parts(rows, 3, 24)) == (1 if gathered else 3)
    torch.manual_seed(0)
    x, W, A, B = torch.randn(8, 6, 7), torch.randn(5, 7), torch.randn(3, 2, 7), torch.randn(3, 5, 2)
    out = grouped_lora_linear(x, W, A, B, rows)
    for i, k in enumerate(rows):
        wanted = F.linear(x[i], W) if k < 0 else lora_linear(x[i], W, A[k], B[k], 1.0)
        torch.testing.assert_close(out[i], wanted, **CLOSE)


def test_factors_wider_than_the_base():
    x, W = torch.randn(3, 4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    A, B = torch.randn(2, 2, 8), torch.randn(2, 6, 2)
    for rows in ([0, 1, 0], [1, 1, 1], [0, -1, 1], [0, -1, 0]):
        out = grouped_lora_linear(x, W, A, B, rows)
        assert out.dtype == torch.bfloat16
        for i, k in enumerate(rows):
            wanted = F.linear(x[i], W) if k < 0 else lora_linear(x[i], W, A[k], B[k], 1.0)
            torch.testing.assert_close(out[i], wanted, atol=0.1, rtol=0.02)


def test_wide_factors_of_few_adapters_are_not_gathered():
    rows = [row % 8 for row in range(64)]
    assert [len(functional.adapter_parts(rows, 8, 8 * (side + side))) for side in (100, 576, 2048)] == [
        1,
        1,
        8,
    ]
    assert len(functional.adapter_parts(range(64), 64, 8 * (2048 + 2048))) == 1
    assert functional.adapter_parts([1] * 64, 8, 8) == [(slice(0, 64), 1)]


@pytest.mark.parametrize("rows", [[0, 2], [-2, 0]])
def test_a_number_of_no_adapter(rows):
    with pytest.raises(ValueError, match=rf"between 0 and 1, or −1 for the base; got {max(rows, key=abs)}"):
        grouped_lora_linear(
            torch.ones(2, 1, 3), torch.ones(3, 3), torch.ones(2, 1, 3), torch.ones(2, 3, 1), rows
        )


# Mixed batches


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 4), min_size=1), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=14),
    st.booleans(),
    st.booleans(),
)
def test_a_mixed_batch_is_row_by_row_and_merged_copies(adapters, choices, tied, rank_stabilised):
    model = tiny(tied=tied).eval()
    made = {
        f"a{k}": adapter(model, ranks, k, alpha=k + 1.0, rank_stabilised=rank_stabilised)
        for k, ranks in enumerate(adapters)
    }
    rows = [([*made, None] * 5)[choice] for choice in choices]
    tokens = torch.randint(0, 30, (len(rows), 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model(tokens)
    merged = {name: _merged(model, each) for name, each in made.items()}
    before = portrait(model)
    pool = AdapterPool(model, made)
    with pool.use(rows):
        mixed = model(tokens)
    for i, name in enumerate(rows):
        with pool.use(name):
            torch.testing.assert_close(mixed[i], model(tokens[i : i + 1])[0], **CLOSE)
        if name is None:
            assert torch.equal(mixed[i], base[i])
        else:
            torch.testing.assert_close(mixed[i], merged[name](tokens[i : i + 1])[0], atol=1e-4, rtol=1e-3)
    assert pool.remove() is model and portrait(model) == before
    with torch.no_grad():
        assert torch.equal(model(tokens), base)


def _merged(model: nn.Module, each: Adapter):
    """A copy of the base with W + ΔW in the layers' places, made without the package's layers."""
    other = copy.deepcopy(model)
    for name, factors in each.layers.items():
        layer = other.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.data + factors.delta_weight())  # its own: a tied one keeps W
    return torch.no_grad()(other)


@pytest.mark.parametrize("tied", [False, True])
def test_folders_give_what_load_adapter_gives(tied, tmp_path):
    model = tiny(tied=tied).eval()
    folders = {
        "one": on_disk(model, tmp_path / "one", ["embedding", "query"]),
        "two": on_disk(model, tmp_path / "two", ["query", "head", "mlp.0"], rank=3),
        "three": on_disk(
            model, tmp_path / "three", {"query": 1, "output": 5}, rank={"query": 1, "output": 5}
        ),
    }
    pool = AdapterPool(model, folders)
    assert pool.names == ["one", "two", "three"]
    tokens = TOKENS.repeat(3, 1)
    rows = ["two", "one", None, "three", "one", "two"]
    with pool.use(rows) as served:
        assert served is model
        mixed = model(tokens)
    original = pool.remove()
    for i, name in enumerate(rows):
        if name is None:
            assert torch.equal(mixed[i], original(tokens)[i])
        else:
            for merged in (False, True):
                one = alone(original, folders[name], tokens[i : i + 1], merged)[0]
                torch.testing.assert_close(mixed[i], one, atol=1e-4, rtol=1e-3)


def test_the_shipped_adapters_on_the_base():
    model = TinyLM.from_state_dict(load_checkpoint("base")).eval()
    names = ["reference_r1", "reference_r16", "reference_r8", "reference_r8_seed_1"]
    tokens = torch.arange(6 * 16).reshape(6, 16) * 101 % 10_000
    with torch.no_grad():
        base = model(tokens)
    pool = AdapterPool(model, {name: adapter_folder(name) for name in names})
    rows = [names[2], None, names[0], names[1], names[3], names[2]]
    with pool.use(rows):
        mixed = model(tokens)
    pool.remove()
    assert torch.equal(mixed[1], base[1])
    for name in names:
        load_adapter(model, adapter_folder(name))
        with torch.no_grad():
            one = model(tokens)
        remove_lora(model)
        for i in (i for i, each in enumerate(rows) if each == name):
            torch.testing.assert_close(mixed[i], one[i], atol=1e-4, rtol=1e-4)
            assert (mixed[i] - base[i]).abs().max() > 1
    with torch.no_grad():
        assert torch.equal(model(tokens), base)


def test_a_padding_row_is_the_base_s():
    model = nn.Sequential(nn.Embedding(12, 6, padding_idx=3), nn.Linear(6, 5))
    each = adapter(model, {"0": 2})
    with pytest.warns(UserWarning, match="0: the adapter's row of the padding token 3 isn't zero"):
        pool = AdapterPool(model, {"a": each})
    tokens = torch.tensor([[3, 1], [1, 3]])
    with pool.use("a"):
        out = model(tokens)
    with torch.no_grad():
        base = model(tokens)
    assert torch.equal(out == base, torch.tensor([[True, False], [False, True]])[..., None].expand(2, 2, 5))


# Hot swap


def test_switching_costs_no_write_to_the_base_and_no_copy(tmp_path):
    model = tiny().eval()
    folder = on_disk(model, tmp_path / "one", ["embedding", "query", "head"])
    before = portrait(model)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    versions = [each._version for each in model.parameters()]
    pool = AdapterPool(model, {"one": folder, "two": adapter(model, {"head": 3, "blocks.0.mlp.0": 2})})
    wanted = 4 * (2 * (30 + 8) + 2 * 2 * (8 + 8) + 2 * (30 + 8) + 3 * (30 + 8) + 2 * (8 + 32))
    assert pool.adapter_bytes() == wanted
    outputs = {}
    for name in ("one", "two", None, "one", None, "two"):
        with pool.use(name):
            out = model(TOKENS)
        assert torch.equal(out, outputs.setdefault(name, out)) and not out.requires_grad
    assert len({float(each.sum()) for each in outputs.values()}) == 3
    assert (
        torch.equal(model(TOKENS), outputs[None]) and model(TOKENS).requires_grad
    )  # outside: the base itself
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    after = portrait(model)
    assert after["parameters"] == before["parameters"] and after["attributes"] == before["attributes"]
    assert [each._version for each in model.parameters()] == versions
    pool.remove()
    assert portrait(model) == before


def test_use_inside_use_and_after_an_error():
    model = tiny().eval()
    pool = AdapterPool(model, {name: adapter(model, {"head": 2}, k) for k, name in enumerate("ab")})
    alone = {}
    for name in ("a", "b", None):
        with pool.use(name):
            alone[name] = model(TOKENS)
    with pool.use("a"):
        with pytest.raises(ZeroDivisionError), pool.use(["b", None]):
            assert torch.equal(model(TOKENS)[0], alone["b"][0])
            raise ZeroDivisionError
        assert torch.equal(model(TOKENS), alone["a"])
        for call in (pool.remove, lambda: pool.drop("a"), lambda: pool.add("c", adapter(model, {"head": 1}))):
            with pytest.raises(
                RuntimeError, match=r"can't be called while the pool is in use; leave the `with"
            ):
                call()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), alone[None])


def test_drop_and_add_again():
    model = tiny().eval()
    before = portrait(model)
    made = {
        "a": adapter(model, {"head": 2, "embedding": 1}, 0),
        "b": adapter(model, {"head": 2}, 1),
        "c": adapter(model, {"head": 3}, 2),
    }
    pool = AdapterPool(model, made)
    rows = ["b", "c"]
    with pool.use(rows):
        wanted = model(TOKENS)
    pool.drop("a")
    assert pool.names == ["b", "c"] and not model.embedding._forward_hooks and not model.embedding._modules
    with pool.use(rows):
        assert torch.equal(model(TOKENS), wanted)
    assert pool.adapter_bytes() == 4 * 5 * 38
    with pytest.raises(ValueError, match="the pool has no adapter called 'a'"):
        pool.drop("a")
    pool.add("a", made["a"])
    with pool.use(["a", "b"]):
        torch.testing.assert_close(model(TOKENS.flip(0))[1], wanted[0], **CLOSE)
    for name in list(pool.names):
        pool.drop(name)
    assert portrait(model) == before and pool.adapter_bytes() == 0
    with pool.use(None):
        model(TOKENS)


def test_a_copy_and_another_dtype_take_the_factors_along():
    model = tiny().eval()
    pool = AdapterPool(model, {"a": adapter(model, {"head": 2, "embedding": 2})})
    other = copy.deepcopy(model)
    with pool.use("a"):
        wanted = model(TOKENS)
        assert not torch.allclose(other(TOKENS), wanted)  # the copy has hooks of its own, at rest
    model.double()
    with pool.use("a"):
        assert model(TOKENS).dtype == torch.float64
        torch.testing.assert_close(model(TOKENS).float(), wanted, **CLOSE)
    pool.drop("a")
    assert torch.equal(other(TOKENS), tiny().eval()(TOKENS))


def test_a_model_in_training_keeps_its_parameters_trainable():
    model = tiny()
    model.head.requires_grad_(False)
    pool = AdapterPool(model, {"a": adapter(model, {"head": 2})})
    assert model.training and model.embedding.weight.requires_grad and not model.head.weight.requires_grad
    F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    assert model.embedding.weight.grad is not None
    assert len(list(pool.model.parameters())) == len(list(tiny().parameters()))


# Refusals


def test_unknown_names_and_wrong_rows():
    model = tiny().eval()
    pool = AdapterPool(model, {"support": adapter(model, {"head": 2}), "sales": adapter(model, {"head": 1})})
    for rows, error, said in (
        (
            "suport",
            ValueError,
            r"no adapter called 'suport'; did you mean support\? There are: support, sales",
        ),
        (["sales", "zzz"], ValueError, r"no adapter called 'zzz'\. There are: support, sales"),
        (["sales", 1], TypeError, "rows must be names of adapters, or None for the base; got 1"),
        ([], ValueError, "name an adapter, or None for the base, for at least one row"),
    ):
        with pytest.raises(error, match=said), pool.use(rows):
            pass
    with (
        pool.use(["sales"] * 3),
        pytest.raises(ValueError, match=r"use\(\) named 3 rows, and the input of head has 2"),
    ):
        model(TOKENS)
    with pool.use("sales"), pytest.raises(ValueError, match="the input of head must have a batch"):
        model.head(torch.ones(8))
    with (
        pytest.raises(ValueError, match=r"The pool is empty; add\(name, folder\) first"),
        AdapterPool(tiny()).use("a"),
    ):
        pass
    with pytest.raises(ValueError, match="called 'sales' already; drop it first"):
        pool.add("sales", adapter(model, {"head": 1}))
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name must be a text"):
            pool.add(name, adapter(model, {"head": 1}))


def _other_shape(model):
    return adapter(tiny(width=16), {"blocks.0.attention.query": 2, "embedding": 2})


def _other_vocabulary(model):
    return adapter(tiny(vocabulary=33), {"embedding": 2})


def _stranger(model):
    each = adapter(model, {"head": 2})
    return each._replace(layers={"lm_head": each.layers["head"]})


def _dora(model):
    return adapter(model, {"head": 2})._replace(
        refused={"head": "DoRA, which rescales the merged weight's rows"}
    )


def _objection(model):
    return adapter(model, {"head": 2})._replace(objections=["layer_replication is layers used several times"])


def _with_bias(model):
    each = adapter(model, {"head": 2})
    return each._replace(layers={"head": each.layers["head"]._replace(bias=torch.ones(30))})


def _whole(model):
    return adapter(model, {"head": 2})._replace(whole={"blocks.0.norm.weight": torch.full((8,), 2.0)})


def _token_rows(model):
    return adapter(model, {"head": 2})._replace(rows={"embedding.weight": ([1], torch.ones(1, 8))})


def _nothing(model):
    return adapter(model, {"head": 2})._replace(layers={}, config={"target_modules": []})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            _other_shape,
            "query is 16 × 16 in the adapter and 8 × 8 in the model: the adapter is for another model",
        ),
        (
            _other_vocabulary,
            "embedding is 33 × 8 in the adapter and 30 × 8 in the model.*resize_token_embeddings.33",
        ),
        (
            _stranger,
            "the adapter is for another model: 1 of its 1 layers are not in this one, such as lm_head",
        ),
        (_dora, "head isn't supported: DoRA"),
        (_objection, "layer_replication is layers used several times"),
        (_with_bias, "head has a bias in lora_B"),
        (_whole, "holds its own blocks.0.norm.weight beside the factors.*load_adapter takes it"),
        (_token_rows, "holds its own embedding.weight beside the factors"),
        (_nothing, "has no factors of any layer"),
    ],
)
def test_a_refused_adapter_leaves_the_pool_as_it_was(make, said):
    model = tiny().eval()
    pool = AdapterPool(model, {"a": adapter(model, {"head": 2, "blocks.0.mlp.0": 1})})
    with pool.use("a"):
        wanted = model(TOKENS)
    before, size = portrait(model), pool.adapter_bytes()
    with pytest.raises(AdapterError, match=said):
        pool.add("b", make(model))
    assert portrait(model) == before and pool.names == ["a"] and pool.adapter_bytes() == size
    with pool.use("a"):
        assert torch.equal(model(TOKENS), wanted)
    fresh = tiny().eval()
    before = portrait(fresh)
    with pytest.raises(AdapterError, match=said):
        AdapterPool(fresh, {"a": adapter(fresh, {"head": 2}), "b": make(fresh)})
    assert portrait(fresh) == before


def test_the_base_s_own_tensors_in_the_file_are_no_obstacle():
    model = tiny()
    each = adapter(model, {"embedding": 2})._replace(
        whole={"embedding.weight": model.embedding.weight.detach().clone()}
    )
    assert AdapterPool(model, {"a": each}).names == ["a"]


def test_a_missing_or_damaged_folder(tmp_path):
    model = tiny()
    pool = AdapterPool(model)
    with pytest.raises(FileNotFoundError):
        pool.add("a", tmp_path / "nowhere")
    folder = write_adapter(tmp_path / "a", adapter(model, {"head": 2}).layers)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(AdapterError, match="damaged or truncated"):
        pool.add("a", folder)
    assert pool.names == []


def test_a_base_that_is_wrapped_already(tmp_path):
    model = tiny()
    add_lora(model, 2, 4, "head")
    with pytest.raises(ValueError, match=r"has LoRA already, on head; remove_lora it first"):
        AdapterPool(model)
    remove_lora(model)
    pool = AdapterPool(model, {"a": adapter(model, {"head": 2})})
    with pytest.raises(
        ValueError, match=r"another AdapterPool already, on head; add the adapters to that one"
    ):
        AdapterPool(model)
    before = portrait(model)
    with pytest.raises(
        TypeError, match=r"head: Linear is served by an AdapterPool; add the adapter to that pool"
    ):
        add_lora(model, 2, 4, "head")
    assert portrait(model) == before
    pool.remove()
    add_lora(model, 2, 4, "head")
    with pytest.raises(ValueError, match="has LoRA already"):
        pool.add("b", adapter(tiny(), {"head": 2}))


def test_layers_that_the_pool_can_t_serve():
    model = tiny()
    model.embedding.max_norm = 1.0
    with pytest.raises(AdapterError, match=r"embedding has max_norm=1\.0: torch rescales its table"):
        AdapterPool(model, {"a": adapter(model, {"embedding": 2})})
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match="head: Linear has hooks"):
        AdapterPool(model, {"a": adapter(model, {"head": 2})})


def test_one_module_under_two_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    before = portrait(model)
    with pytest.raises(AdapterError, match="two layers of the adapter are one module of the model"):
        AdapterPool(model, {"a": adapter(model, {"0": 1, "2": 1})})
    assert portrait(model) == before
    pool = AdapterPool(model, {"a": adapter(model, {"0": 1})})
    with pytest.raises(AdapterError, match="2: Linear is served by an AdapterPool"):
        pool.add("b", adapter(model, {"2": 1}))


def test_a_base_resized_since():
    model = tiny().eval()
    pool = AdapterPool(model, {"a": adapter(model, {"embedding": 2})})
    model.embedding.weight = nn.Parameter(torch.zeros(40, 8))
    with pytest.raises(RuntimeError, match=re.escape("embedding is 40 × 8 and was 30 × 8")), pool.use("a"):
        pass


def test_read_adapter_or_folder(tmp_path):
    model = tiny().eval()
    folder = on_disk(model, tmp_path / "a", ["query"])
    pool = AdapterPool(model, {"folder": folder, "text": str(folder), "read": read_adapter(folder)})
    with pool.use(["folder", "text"]):
        first = model(TOKENS)
    with pool.use(["read", "read"]):
        torch.testing.assert_close(model(TOKENS), first, **CLOSE)
