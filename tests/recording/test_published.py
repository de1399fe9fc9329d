"""Measuring a published fine-tune: the encoder is BERT's, a cut keeps what it should, intervals are Wilson's."""

import pytest
import torch

from lora_edu.recording import published

WIDTH, CLASSES = 32, 5


def random_model(seed: int, size: float = 0.3) -> dict[str, torch.Tensor]:
    """A BERT of our number of layers and heads, narrow, with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return size * torch.randn(shape, generator=generator)

    state = {
        "embeddings.word_embeddings.weight": draw(20, WIDTH),
        "embeddings.position_embeddings.weight": draw(64, WIDTH),
        "embeddings.token_type_embeddings.weight": draw(2, WIDTH),
        "pooler.dense.weight": draw(WIDTH, WIDTH),
        "pooler.dense.bias": draw(WIDTH),
        "classifier.weight": draw(CLASSES, WIDTH),
        "classifier.bias": draw(CLASSES),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(published.LAYERS):
        at = f"encoder.layer.{layer}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        for kind, name in published.KINDS.items():
            rows, columns = {"up": (64, WIDTH), "down": (WIDTH, 64)}.get(kind, (WIDTH, WIDTH))
            state |= {f"{at}.{name}.weight": draw(rows, columns), f"{at}.{name}.bias": draw(rows)}
    for name in norms:
        state |= {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}
    return state


IDS = [[2, 5, 6, 7, 3], [2, 8, 3], [2, 9, 10, 11, 12, 13, 3]]


def test_the_encoder_is_the_one_its_authors_used():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=published.LAYERS,
        num_attention_heads=published.HEADS,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=CLASSES,
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    state = random_model(0)
    named = {(k if k.startswith("classifier") else f"bert.{k}"): v for k, v in state.items()}
    theirs.load_state_dict(named)
    for ids in IDS:  # one at a time: ours must not let padding through
        with torch.no_grad():
            alone = theirs(torch.tensor([ids])).logits[0]
        ours = published.classify(state, IDS)[IDS.index(ids)]
        assert torch.allclose(ours, alone, atol=1e-4)


def test_a_cut_to_full_rank_is_the_tuned_model_and_to_none_the_base_with_what_is_no_matrix():
    base, tuned = random_model(0), random_model(1)
    pair = published.cut(base, tuned)
    whole, none, one = pair.state(WIDTH), pair.state(0), pair.state(0, "query")
    assert all(torch.allclose(whole[name], tuned[name], atol=1e-5) for name in tuned)
    name = "encoder.layer.3.attention.self.query.weight"
    assert none[name].equal(base[name]) and one[name].equal(base[name])
    assert none["pooler.dense.weight"] is tuned["pooler.dense.weight"]
    assert none["encoder.layer.3.output.dense.bias"] is tuned["encoder.layer.3.output.dense.bias"]
    assert one["encoder.layer.3.output.dense.weight"] is tuned["encoder.layer.3.output.dense.weight"]
    assert 0 < published.energy_kept(pair, 4) < published.energy_kept(pair, 8) < 1
    assert published.energy_kept(pair, WIDTH) == 1


def test_only_the_outputs_of_the_kind_named_are_cut():
    """`attention.output.dense` ends in `output.dense`, as the MLP's second matrix does."""
    base, tuned = random_model(0), random_model(1)
    state = published.cut(base, tuned).state(0, "down")
    assert state["encoder.layer.0.output.dense.weight"].equal(base["encoder.layer.0.output.dense.weight"])
    attention = "encoder.layer.0.attention.output.dense.weight"
    assert state[attention] is tuned[attention]


def test_behaviour_compares_with_the_tuned_model():
    base, tuned = random_model(0), random_model(1)
    found = published.behaviour(published.cut(base, tuned), IDS, lambda _: None)
    whole = 1 + len(published.RANKS)
    assert found["classes"].shape == found["divergence"].shape == (whole + 2 + 8, len(IDS))
    assert found["classes"][whole].tolist() == published.classify(tuned, IDS).argmax(-1).tolist()
    assert found["divergence"][whole].max() == 0 and found["divergence"][0].min() > 0


def test_weights_of_two_updates_with_known_subspaces():
    base, first, second = random_model(0), random_model(0), random_model(0)
    name = "encoder.layer.2.attention.self.value.weight"
    u, v, w = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1))).Q.T
    for state in (first, second):
        for key, value in random_model(9).items():
            state[key] = base[key] + 1e-4 * value
    first[name], second[name] = base[name] + 3 * torch.outer(u, v), base[name] + 2 * torch.outer(w, v)
    found = published.weights({"base": base, "tuned": first, "tuned_50": second}, sizes=(1,))
    assert found["tuned/value"][2, 0] == pytest.approx(3, rel=1e-3)
    assert found["overlap/value/right"][2, 0] == pytest.approx(1, abs=1e-3)
    assert found["overlap/value/left"][2, 0] == pytest.approx(0, abs=1e-3)
    assert found["cosine/value"][2, 0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("text, words", [("CCO!>>CC", "not all SMILES"), ("CC[Xx]>>C", r"'\[Xx\]', which")])
def test_what_the_model_cannot_read_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        published.tokens(text, {piece: i for i, piece in enumerate(["[CLS]", "[SEP]", "C", "O", ">>"])})


def test_a_reaction_is_cut_into_the_tokens_of_the_authors():
    pieces = ["[CLS]", "[SEP]", "C", "Br", ">>", "[N+]", "(", ")", "c", "1", "Cl", "%10"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    ids = published.tokens("CBr>>C[N+](Cl)c1%10", vocabulary)
    assert ids == [0, 2, 3, 4, 2, 5, 6, 10, 7, 8, 9, 11, 1]


def test_the_interval_is_wilsons():
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    for kept, n, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
    ):
        assert published.interval(kept, n) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="got 5 of 4"):
        published.interval(5, 4)
