"""What was trained, saved and loaded: the same model again, and every damaged or foreign file refused by name."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import portrait

from lora_edu.lora import AdapterError, add_lora, save_adapter, trainable_parameters
from lora_edu.tinylm import TinyLM
from lora_edu.tuning import (
    applied,
    bitfit,
    bottleneck,
    ia3,
    load_tuned,
    remove_bitfit,
    remove_bottleneck,
    remove_ia3,
    save_tuned,
    stored_parameters,
)

TOKENS = torch.arange(24).reshape(2, 12)
METHODS = {
    "bitfit": (lambda model: bitfit(model), remove_bitfit),
    "bitfit of some, and the head": (lambda model: bitfit(model, "query", head="head"), remove_bitfit),
    "houlsby": (lambda model: bottleneck(model, 3, start="houlsby", seed=4), remove_bottleneck),
    "pfeiffer with norms": (
        lambda model: bottleneck(model, 2, "pfeiffer", "silu", norms=True),
        remove_bottleneck,
    ),
    "ia3": (lambda model: ia3(model), remove_ia3),
    "ia3 of values": (lambda model: ia3(model, "0.attention.value", []), remove_ia3),
}
OURS = ("bitfit", "houlsby")


def small(**options):
    torch.manual_seed(0)
    return TinyLM(**{"vocabulary": 40, "width": 20, "layers": 2, "heads": 5, "context": 16} | options)


def tuned(kind, seed=1, **options):
    model = METHODS[kind][0](small(**options))
    generator = torch.Generator().manual_seed(seed)
    for each in trainable_parameters(model):
        each.data = torch.randn(each.shape, generator=generator)
    return model


def files(folder):
    return (
        ("tuning.json", "tuning.safetensors")
        if (folder / "tuning.json").exists()
        else (
            "adapter_config.json",
            "adapter_model.safetensors",
        )
    )


@given(st.sampled_from(sorted(METHODS)), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_saved_is_loaded_trainable_and_comes_off(tmp_path_factory, kind, layers, heads, seed):
    folder = tmp_path_factory.mktemp("tuned")
    sizes = {"layers": layers, "heads": heads, "width": 4 * heads}
    model, base = tuned(kind, seed, **sizes), small(**sizes)
    assert save_tuned(model, folder) == folder
    weights = load_file(folder / files(folder)[1])
    assert sum(each.numel() for each in weights.values()) == stored_parameters(model)
    again = small(**sizes)
    assert load_tuned(again, folder) is again and applied(again) == applied(model)
    assert torch.equal(again(TOKENS), model(TOKENS)) and not torch.equal(base(TOKENS), model(TOKENS))
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    save_tuned(again, folder)  # over the old ones
    assert all(
        torch.equal(each, weights[name]) for name, each in load_file(folder / files(folder)[1]).items()
    )
    METHODS[kind][1](again)
    assert torch.equal(again(TOKENS), base(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), base.parameters(), strict=True))
    assert sorted(each.name for each in folder.iterdir()) == sorted(files(folder)), (
        "nothing is left beside them"
    )


@pytest.mark.parametrize("kind", METHODS)
def test_the_file_is_small_and_says_what_it_is(kind, tmp_path):
    model = tuned(kind)
    save_tuned(model, tmp_path)
    config = json.loads((tmp_path / files(tmp_path)[0]).read_text(encoding="utf-8"))
    if applied(model) == "ia3":
        assert config["peft_type"] == "IA3" and set(config["feedforward_modules"]) <= set(
            config["target_modules"]
        )
    else:
        assert config["method"] == applied(model)
        assert set(config["names"]) == set(load_file(tmp_path / "tuning.safetensors"))
    assert (tmp_path / files(tmp_path)[1]).stat().st_size < 4 * stored_parameters(model) + 8_000


@pytest.mark.parametrize("kind", METHODS)
def test_a_file_for_another_model_is_refused_and_the_model_unchanged(kind, tmp_path):
    save_tuned(tuned(kind), tmp_path)
    for other, said in (
        (small(layers=1), "another model"),
        (small(width=30), "in the model|vector must be|another"),
    ):
        if kind == "ia3 of values" and "another model" == said:
            continue  # it has the first block only
        before = portrait(other)
        with pytest.raises(AdapterError, match=said):
            load_tuned(other, tmp_path)
        assert portrait(other) == before


def test_a_file_for_more_than_the_model_has_is_refused(tmp_path):
    save_tuned(bottleneck(small(), 3, mlp="1.mlp.down", placement="pfeiffer"), tmp_path)
    with pytest.raises(AdapterError, match="for another model: blocks.1.mlp.down is not in this one"):
        load_tuned(small(layers=1), tmp_path)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "lora"}, "method must be one of bitfit, bottleneck, ia3, .*; got lora"),
        ({"method": ["bitfit"]}, "method must be one of"),
        ({"method": "../bitfit"}, "method must be one of"),
        ({"options": None}, "options must be an object; got None"),
        ({"options": {}}, "option .* must be "),
        ({"names": []}, "doesn't hold the names that tuning.json lists"),
        ({"names": None}, "the files don't match"),
    ],
)
def test_a_configuration_of_ours_that_is_wrong(kind, change, message, tmp_path):
    refused(kind, tmp_path, message, lambda config: config | change)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("bitfit", {"biases": "bias"}, "option biases must be a list of names; got bias"),
        ("bitfit", {"biases": [1]}, "option biases must be a list of names"),
        ("bitfit", {"whole": ["secret.weight"]}, "another model: secret.weight is not in this one"),
        ("bitfit", {"whole": ["head.weight"]}, "the file lacks head.weight: it is incomplete"),
        ("bitfit", {"biases": ["norm.bias"]}, "the file holds .*, which this method doesn't have"),
        ("houlsby", {"width": 10**12}, r"down.weight is \(3, 20\), but the options say width 1000000000000"),
        ("houlsby", {"width": True}, "option width must be a whole number; got True"),
        ("houlsby", {"activation": "exec"}, "activation must be one of relu, .*; got 'exec'"),
        ("houlsby", {"placement": "pfeiffer"}, "the file holds blocks.0.attention.output.down"),
        ("houlsby", {"norms": 1}, "option norms must be true or false; got 1"),
        ("houlsby", {"norms": True}, "the file lacks .*norm.*: it is incomplete"),
        ("houlsby", {"mlp": ["norm"]}, "the file lacks norm.down.weight"),
        ("houlsby", {"mlp": []}, "targets must name at least one layer"),
    ],
)
def test_options_of_ours_that_are_wrong(kind, change, message, tmp_path):
    refused(kind, tmp_path, message, lambda config: config | {"options": config["options"] | change})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"peft_type": "LORA"},
            r"this adapter is LoRA; lora_edu.lora.load_adapter\(model, folder\) opens it",
        ),
        (
            {"peft_type": "BOFT"},
            "peft_type must be one of ADALORA, IA3, P_TUNING, PREFIX_TUNING, PROMPT_TUNING, VERA; got BOFT",
        ),
        ({"peft_type": ["IA3"]}, "peft_type must be one of"),
    ],
)
def test_a_configuration_of_pefts_that_is_wrong(change, message, tmp_path):
    refused("ia3", tmp_path, message, lambda config: config | change)


def test_an_adapter_of_lora_is_named(tmp_path):
    save_adapter(add_lora(small(), 2, 4, "query"), tmp_path)
    with pytest.raises(AdapterError, match="this adapter is LoRA"):
        load_tuned(small(), tmp_path)


def a_key(tensors):
    return next(iter(tensors))


@pytest.mark.parametrize("kind", [*OURS, "ia3"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {a_key(t): t[a_key(t)] * float("nan")}, "has entries that are infinite or NaN"),
        (lambda t: t | {a_key(t): t[a_key(t)].int()}, "must be in F64, F32, F16, BF16; got I32"),
        (lambda t: t | {a_key(t): t[a_key(t)][:-1]}, "is .* in the file|vector must be|but the options say"),
        (lambda t: t | {a_key(t): t[a_key(t)].sum()}, r"is \(\)|got \(\)"),
    ],
)
def test_tensors_that_are_wrong(kind, change, message, tmp_path):
    refused(kind, tmp_path, message, tensors=change)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t | {"score.weight": torch.ones(2)},
            "score.weight, which is no vector of .IA.³; it isn't supported",
        ),
        (
            lambda t: {"base_model.model.lost.ia3_l": torch.ones(2, 1)},
            "for another model: lost is not in this one",
        ),
        (
            lambda t: {"base_model.model.norm.ia3_l": torch.ones(2, 1)},
            "norm is a linear layer in the .* LayerNorm",
        ),
        (lambda t: {}, "the file holds no vector"),
        (lambda t: {"base_model.model.\x1b[2J.ia3_l": torch.ones(2, 1)}, r"\?\[2J is not in this one"),
    ],
)
def test_vectors_that_are_wrong(change, message, tmp_path):
    refused("ia3", tmp_path, message, tensors=change)


@pytest.mark.parametrize("kind", [*OURS, "ia3"])
@pytest.mark.parametrize("damage", ["config", "not an object", "deep", "cut", "no weights", "a folder"])
def test_damaged_files_are_refused(kind, damage, tmp_path):
    save_tuned(tuned(kind), tmp_path)
    config, weights = (tmp_path / name for name in files(tmp_path))
    if damage == "config":
        config.write_bytes(b"\xff{")
    elif damage == "not an object":
        config.write_text("[]", encoding="utf-8")
    elif damage == "deep":
        config.write_text("[" * 100_000, encoding="utf-8")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    else:
        weights.unlink()
        if damage == "a folder":
            weights.mkdir()
    said = {
        "config": "is no JSON text",
        "not an object": "must hold an object; it holds a list",
        "deep": "is no JSON text",
        "cut": f"{weights.name} is damaged or truncated",
        "no weights": f"there is no {weights.name}",
        "a folder": f"{weights.name} must be a file",
    }[damage]
    error = FileNotFoundError if damage == "no weights" else AdapterError
    with pytest.raises(error, match=said):
        load_tuned(small(), tmp_path)


def test_a_pickle_is_named_and_not_opened(tmp_path):
    save_tuned(tuned("ia3"), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle, which can run any code"):
        load_tuned(small(), tmp_path)


def test_an_empty_folder_a_model_without_a_method_and_one_with_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json in .*, nor tuning.json"):
        load_tuned(small(), tmp_path)
    for measure in (lambda model: save_tuned(model, tmp_path), stored_parameters):
        with pytest.raises(ValueError, match=r"no method to save; put one on first \(bitfit, .*vera\)"):
            measure(small())
    save_tuned(tuned("ia3"), tmp_path)
    with pytest.raises(ValueError, match=r"the model has bitfit already; remove_bitfit\(model\)"):
        load_tuned(tuned("bitfit"), tmp_path)


@pytest.mark.parametrize(
    "first, second, there", [("ia3", "bitfit", "adapter_config"), ("bitfit", "ia3", "tuning")]
)
def test_a_folder_is_not_made_to_hold_two(first, second, there, tmp_path):
    save_tuned(tuned(first), tmp_path)
    with pytest.raises(
        ValueError, match=f"holds another adapter, as {there}.json says: save to a folder of its own"
    ):
        save_tuned(tuned(second), tmp_path)
    (tmp_path / "tuning.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(AdapterError, match="the folder holds both tuning.json and adapter_config.json"):
        load_tuned(small(), tmp_path)


@pytest.mark.parametrize("kind", METHODS)
def test_what_diverged_is_not_saved(kind, tmp_path):
    model = tuned(kind)
    trainable_parameters(model)[0].data.flatten()[0] = float("inf")
    with pytest.raises(ValueError, match="has entries that are infinite, NaN or without data; not saved"):
        save_tuned(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_after_a_failure_in_writing_the_old_files_are_back(tmp_path, monkeypatch):
    model = tuned("bitfit")
    save_tuned(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        "lora_edu.lora.peft_format.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        save_tuned(tuned("bitfit", seed=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def refused(kind, folder, message, config=None, tensors=None):
    """Saved, changed and loaded: refused with this message, and the model as it was."""
    save_tuned(tuned(kind), folder)
    config_file, weights = (folder / name for name in files(folder))
    told = json.loads(config_file.read_text(encoding="utf-8"))
    if config is not None:
        told = config(told)
    if tensors is not None:
        held = {name: each.contiguous() for name, each in tensors(load_file(weights)).items()}
        save_file(held, weights)
        if "names" in told:
            told["names"] = sorted(held)
    config_file.write_text(json.dumps(told), encoding="utf-8")
    model = small()
    before = portrait(model)
    with pytest.raises(AdapterError, match=message):
        load_tuned(model, folder)
    assert portrait(model) == before
