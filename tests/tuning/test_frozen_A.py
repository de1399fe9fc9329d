"""LoRA with its random factor frozen: a linear subspace of updates of low rank."""

import pytest
import torch
from tiny_models import TOKENS, tiny, train
from torch import nn

from lora_edu.lora import lora_layers, trainable_parameters
from lora_edu.tuning import frozen_A


@pytest.mark.parametrize(
    "options, numbers",
    [
        ({"rank": 2}, 2 * (30 + 30 + 2 * (4 * 8 + 32 + 8))),
        ({"rank": 3, "targets": "embedding"}, 3 * 30),
        ({"rank": 3, "targets": ["key", "output"]}, 3 * 2 * (8 + 8)),
    ],
)
def test_it_trains_one_factor_from_the_base_on(options, numbers):
    base, model = tiny(), tiny()
    assert frozen_A(model, **options) is model
    assert torch.equal(model(TOKENS), base(TOKENS))
    assert sum(p.numel() for p in trainable_parameters(model)) == numbers
    train(model)
    assert not torch.equal(model(TOKENS), base(TOKENS))


def test_with_the_random_factor_frozen_the_update_is_linear_in_what_is_trained():
    model = frozen_A(tiny(), rank=2, alpha=5)
    trained = trainable_parameters(model)
    first, second = ([torch.randn_like(p) for p in trained] for _ in range(2))

    def update(values):
        for parameter, value in zip(trained, values, strict=True):
            parameter.data.copy_(value)
        return {name: layer.delta_weight() for name, layer in lora_layers(model).items()}

    one, other = update(first), update(second)
    both = update([3 * a - 2 * b for a, b in zip(first, second, strict=True)])
    for name, delta in both.items():
        assert torch.allclose(delta, 3 * one[name] - 2 * other[name], atol=1e-4), name
        assert torch.linalg.matrix_rank(delta) == 2


def test_the_frozen_factor_is_the_random_one_and_follows_the_seed():
    torch.manual_seed(1)
    model = frozen_A(tiny(), rank=2, seed=7)
    after = torch.get_rng_state()
    torch.manual_seed(2)
    twin = frozen_A(tiny(), rank=2, seed=7)
    other = frozen_A(tiny(), rank=2, seed=8)
    for name, layer in lora_layers(model).items():
        frozen, trained = layer.lora_A, layer.lora_B
        if isinstance(layer, nn.Embedding):
            frozen, trained = trained, frozen
        kind = "lora_B" if isinstance(layer, nn.Embedding) else "lora_A"
        assert not frozen.requires_grad and trained.requires_grad and not trained.any() and frozen.all()
        assert torch.equal(frozen, getattr(lora_layers(twin)[name], kind))
        assert not torch.equal(frozen, getattr(lora_layers(other)[name], kind))
    torch.manual_seed(1)
    tiny()  # what the base itself draws
    assert torch.equal(torch.get_rng_state(), after), "the caller's random numbers go on undisturbed"
