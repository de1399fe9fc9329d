"""What every variant of LoRA must do: start as the base, come off bit for bit, fold, be saved, and refuse by name."""

import copy

import pytest
import torch
from small_tinylm import LAYERS, TOKENS, moved, small
from tiny_models import portrait
from torch import nn

from lora_edu.lora import AdapterError, add_lora, lora_layers, save_adapter, trainable_parameters
from lora_edu.training import fit
from lora_edu.tuning import applied, ia3, load_tuned, save_tuned, stored_parameters, trained_parameters
from lora_edu.tuning.variants import deltas, dora, fold_dora, remove_dora

# method, options, how it comes off, how it folds, whether it takes the embedding, trained numbers of LAYERS at r = 3
VARIANTS = {
    "dora": (
        dora,
        {"rank": 3, "alpha": 6},
        remove_dora,
        fold_dora,
        True,
        2 * (3 * 40 + 20 + 3 * 100 + 20) + 220,
    ),
}


def put(kind, model, targets=LAYERS):
    method, options, *_ = VARIANTS[kind]
    return method(model, targets=targets, **options)


def targets_of(kind):
    return [*LAYERS, "embedding"] if VARIANTS[kind][4] else LAYERS


@pytest.fixture(params=VARIANTS)
def kind(request):
    return request.param


def test_it_starts_as_the_base_and_trains_only_its_own(kind):
    base, model = small(), put(kind, small())
    assert (model(TOKENS) - base(TOKENS)).abs().max() < (1e-12 if kind != "lora_xs" else 1e-3)
    assert trained_parameters(model) == VARIANTS[kind][5]
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    rate = 1e-2
    run = fit(
        model,
        lambda step: (TOKENS, TOKENS.flip(1)),
        torch.optim.Adam(trainable_parameters(model), lr=rate),
        6,
        schedule=lambda _: 1.0,
        progress=False,
    )
    assert run.steps[-1]["loss"] < run.steps[0]["loss"]
    assert all(torch.equal(dict(model.named_parameters())[name], each) for name, each in frozen.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_comes_off_bit_for_bit(kind, dtype):
    base, model = small(dtype), small(dtype)
    model.blocks[0].requires_grad_(False)
    before = portrait(model)
    moved(put(kind, model, targets_of(kind)))
    model(TOKENS)
    VARIANTS[kind][2](model)
    assert portrait(model) == before and applied(model) is None
    assert not any(each._forward_hooks for each in model.modules())
    assert torch.equal(model(TOKENS), base(TOKENS))


def test_folded_it_is_the_same_model_without_a_method(kind):
    base, model = small(), moved(put(kind, small(), targets_of(kind)))
    tuned, changes = model(TOKENS), deltas(model)
    VARIANTS[kind][3](model)
    assert (model(TOKENS) - tuned).abs().max() < 1e-11 and (tuned - base(TOKENS)).abs().max() > 1e-2
    assert applied(model) is None and list(model.state_dict()) == list(base.state_dict())
    for name, delta in changes.items():
        difference = model.get_submodule(name).weight - base.get_submodule(name).weight
        assert torch.allclose(difference, delta, atol=1e-12) and delta.abs().max() > 1e-4


def test_what_was_saved_is_loaded_trainable(kind, tmp_path):
    model = moved(put(kind, small(), targets_of(kind)))
    save_tuned(model, tmp_path)
    again = load_tuned(small(), tmp_path)
    assert torch.allclose(again(TOKENS), model(TOKENS), atol=1e-12) and applied(again) == kind
    assert trained_parameters(again) == trained_parameters(model)
    assert stored_parameters(again) == stored_parameters(model) >= trained_parameters(model)
    assert [name for name, each in again.named_parameters() if each.requires_grad] == [
        name for name, each in model.named_parameters() if each.requires_grad
    ]
    other = small(width=24, heads=4)
    before = portrait(other)
    with pytest.raises(AdapterError, match=r"20|24"):
        load_tuned(other, tmp_path)
    assert portrait(other) == before


def test_a_deep_copy_comes_off_by_itself(kind):
    model = moved(put(kind, small()))
    twin, tuned = copy.deepcopy(model), model(TOKENS)
    moved(twin, 5)
    assert torch.equal(model(TOKENS), tuned) and not torch.equal(twin(TOKENS), tuned)
    VARIANTS[kind][2](twin)
    assert torch.equal(twin(TOKENS), small()(TOKENS)) and torch.equal(model(TOKENS), tuned)


def test_in_half_precision_the_trained_numbers_are_wide(kind):
    model = put(kind, small(torch.bfloat16))
    assert {each.dtype for each in trainable_parameters(model)} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16


def test_what_is_refused_leaves_the_model_alone(kind, tmp_path):
    method, options, remove, _, embedding, _ = VARIANTS[kind]
    model = small()
    before = portrait(model)
    with pytest.raises(ValueError, match="did you mean"):
        method(model, targets="querry", **options)
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        method(model, targets="query", **options | {"rank": 99})
    if not embedding:
        with pytest.raises(TypeError, match="embedding is an embedding, and"):
            method(model, targets="embedding", **options)
    with pytest.raises(ValueError, match="no .* to take off"):
        remove(model)
    assert portrait(model) == before
    tied = small()
    tied.head.weight = tied.embedding.weight
    with pytest.raises(ValueError, match="tied"):
        method(tied, targets="head", **options)
    put(kind, model)
    with pytest.raises(ValueError, match=rf"remove_{kind}\(model\) takes it off"):
        add_lora(model, 2, 2, "key")
    with pytest.raises(ValueError, match=rf"remove_{kind}\(model\) takes it off"):
        ia3(model)
    with pytest.raises(ValueError, match="no LoRA layer to save"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the model has LoRA already"):
        method(add_lora(small(), 2, 2, "key"), targets="query", **options)


def test_a_number_that_is_none_is_neither_folded_nor_saved(kind, tmp_path):
    model = put(kind, small())
    trainable_parameters(model)[0].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="isn't. Nothing was folded"):
        VARIANTS[kind][3](model)
    with pytest.raises(ValueError, match="not saved"):
        save_tuned(model, tmp_path)
    assert applied(model) == kind


def test_an_embedding_with_padding_is_refused_where_embeddings_are_taken(kind):
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 6))
    with pytest.raises(TypeError, match=r"padding_idx|linear layers"):
        put(kind, model, "0")


def test_deltas_of_plain_lora_are_those_of_its_layers():
    model = moved(add_lora(small(), 2, 4, [*LAYERS, "embedding"]))
    layers = lora_layers(model)
    assert deltas(model).keys() == layers.keys()
    assert all(torch.allclose(each, layers[name].delta_weight()) for name, each in deltas(model).items())
    with pytest.raises(ValueError, match="nothing on it, which has no ΔW"):
        deltas(small())


# DoRA


def test_dora_has_the_magnitudes_as_row_norms_and_starts_bit_for_bit():
    model, base = dora(small(), 3, 6, [*LAYERS, "embedding"]), small()
    assert torch.equal(model(TOKENS), base(TOKENS))
    query, table = model.blocks[0].attention.query, model.embedding
    assert torch.allclose(query.dora.magnitude, query.weight.norm(dim=1), atol=1e-14)
    assert torch.allclose(table.dora.magnitude, table.weight.norm(dim=0), atol=1e-14)


def test_doras_folded_rows_are_as_long_as_the_magnitudes_say():
    model = moved(dora(small(), 3, 6, "query"))
    layer = model.blocks[1].attention.query
    wanted, part = layer.dora.magnitude.detach().clone(), layer.dora
    turned = layer.weight + part.scaling * part.lora_B @ part.lora_A
    wanted_weight = (wanted[:, None] * turned / turned.norm(dim=1, keepdim=True)).detach()
    fold_dora(model)
    assert torch.allclose(layer.weight, wanted_weight, atol=1e-13)
    assert torch.allclose(layer.weight.norm(dim=1), wanted.abs(), atol=1e-13)


def test_doras_norm_gets_no_gradient():
    """§4.3: the gradient of B is that of m/c (W + s BA)x with c a constant; with c differentiated it is another."""
    model = moved(dora(small(), 3, 6, "query"))
    layer = model.blocks[0].attention.query
    part, x = layer.dora, torch.randn(7, 20, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = part.lora_B.grad.clone()

    def gradient(constant):
        turned = layer.weight + part.scaling * part.lora_B @ part.lora_A
        norm = turned.norm(dim=1).detach() if constant else turned.norm(dim=1)
        out = x @ (turned * (part.magnitude / norm)[:, None]).T + layer.bias
        return torch.autograd.grad(out.square().sum(), part.lora_B)[0]

    assert torch.allclose(got, gradient(True), rtol=1e-10)
    assert (got - gradient(False)).abs().max() > 1e-3 * got.abs().max()


def test_dora_refuses_a_row_without_a_direction():
    model = small()
    model.blocks[1].attention.query.weight.data[4] = 0
    with pytest.raises(ValueError, match=r"blocks.1.attention.query: row 4 of W is zero"):
        dora(model, 2, 2, "query")
    assert applied(model) is None
