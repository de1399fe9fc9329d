"""The base model: causal, readable by name, and refusing what it cannot do."""

import pytest
import torch

from lora_edu.tinylm import TinyLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyLM(vocabulary=50, width=20, layers=2, heads=5, context=16).eval()


def test_a_token_does_not_see_the_ones_after_it(model):
    tokens = torch.randint(50, (3, 16))
    changed = tokens.clone()
    changed[:, 9:] = torch.randint(50, (3, 7))
    assert torch.allclose(model(tokens)[:, :9], model(changed)[:, :9], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 10], model(changed)[:, 10], atol=1e-3)


def test_attention_depends_on_how_far_apart_not_on_where(model):
    """Rotary positions: the scores of two tokens are the same when both move (Su et al. 2021, eq. 16)."""
    attention = model.blocks[0].attention
    y = torch.randn(1, 1, 1, 4).expand(1, 1, 16, 4)
    turned = attention.turn(y)[0, 0]
    scores = turned @ turned.T
    for distance in range(5):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_every_matrix_has_the_name_that_the_chapters_use(model):
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    kinds = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"]
    assert matrices == {"embedding", "head"} | {f"blocks.{n}.{kind}" for n in (0, 1) for kind in kinds}
    assert model.head.bias is None and model.blocks[0].mlp.up.bias is not None


def test_a_state_dict_is_enough_to_rebuild_the_model(model):
    tokens = torch.randint(50, (2, 8))
    again = TinyLM.from_state_dict(model.state_dict(), heads=5, context=16).eval()
    assert torch.equal(again(tokens), model(tokens))


def test_generation_is_the_models_own_and_repeats_with_the_seed(model):
    prompt = torch.tensor([1, 2, 3])
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(greedy[:3], prompt) and len(greedy) == 23
    for end in (3, 10, 20):  # past 16 tokens the window slides
        assert int(greedy[end]) == int(model(greedy[None, max(0, end - 16) : end])[0, -1].argmax())
    assert torch.equal(model.generate(prompt, 9, seed=4), model.generate(prompt, 9, seed=4))


def test_what_it_cannot_do_is_said(model):
    with pytest.raises(ValueError, match="at most 16 tokens fit into the context; got 17"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="even whole number .* got 20 / 4"):
        TinyLM(width=20, heads=4)


def test_the_course_size_is_what_the_chapters_count():
    model = TinyLM(layers=6)
    assert model.embedding.weight.shape == (10_000, 100) == model.head.weight.shape
    assert sum(p.numel() for p in model.parameters()) == 2 * 10_000 * 100 + 6 * (12 * 100**2 + 13 * 100) + 200
