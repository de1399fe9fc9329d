"""`lora-edu delta` on what people have: adapters of any layout with any base, wrapped names, experts, grown tables."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_edu import cli
from lora_edu.delta import CheckpointError, compare
from lora_edu.delta.files import Stored, experts_of
from lora_edu.delta.pairing import layer_weight, pair_names, tied_table
from lora_edu.lora import AdapterError, read_adapter

R, OUT, IN = 3, 12, 10


def delta(*arguments) -> int:
    return cli.main(["delta", *map(str, arguments)])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B = normal(R, IN), normal(OUT, R, seed=1)
LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
BASE = {f"{layer}.weight": normal(OUT, IN, seed=9) for layer in LAYERS}
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
NORM = float((2 * B @ A).norm())  # s = 6 / 3


def peft_keys(prefix: str = "base_model.model.", name: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{layer}.lora_{side}{name}.weight": each.clone()
        for layer in LAYERS
        for side, each in (("A", A), ("B", B))
    }


def adapter(folder, tensors=None, config=CONFIG, file="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(peft_keys() if tensors is None else tensors, folder / file)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def base(tmp_path, tensors=None):
    path = tmp_path / "base.safetensors"
    save_file(BASE if tensors is None else tensors, path)
    return path


def check(found, norm=NORM, count=4):
    assert len(found.figures) == count
    for figures in found.figures.values():
        assert figures.rank_99 <= R and figures.delta_norm == pytest.approx(norm, rel=1e-5)
        S = torch.linalg.svdvals(B @ A)
        assert figures.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-5)


# --- with and without a base ----------------------------------------------------------------------------------


def test_an_adapter_alone_says_all_but_the_size_over_w(tmp_path, capsys):
    folder = adapter(tmp_path / "a")
    check(compare(folder))
    assert delta(folder) == 0
    assert "no base" in capsys.readouterr().out
    assert compare(folder).figures[f"{LAYERS[0]}.weight"].missing == "no base"


QUANTISED = {
    "nf4": (lambda name, W: {name: torch.zeros(W.numel() // 2, 1, dtype=torch.uint8)}, "quantised"),
    "fp8": (lambda name, W: {name: W.to(torch.float8_e4m3fn)}, "quantised"),
    "int8": (lambda name, W: {name: W.to(torch.int8)}, "quantised"),
    "gptq": (
        lambda name, W: {name.replace(".weight", ".qweight"): torch.zeros(2, 12, dtype=torch.int32)},
        "packed",
    ),
    "another width": (lambda name, W: {name: torch.ones(OUT + 1, IN)}, "other shape"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_base_that_cannot_be_read_costs_the_column_not_the_answer(tmp_path, kind):
    change, reason = QUANTISED[kind]
    tensors = {name: each for old, W in BASE.items() for name, each in change(old, W).items()}
    found = compare(base(tmp_path, tensors), adapter(tmp_path / "a"))
    check(found)
    assert {each.missing for each in found.figures.values()} == {reason}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('self_attn', '_fsdp_wrapped_module.self_attn')}",
        lambda name: name.removeprefix("model."),
        lambda name: f"language_{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: f"base_model.model.{name.replace('.weight', '.base_layer.weight')}",
    ],
)
def test_the_base_may_be_named_otherwise(tmp_path, rename):
    found = compare(base(tmp_path, {rename(name): W for name, W in BASE.items()}), adapter(tmp_path / "a"))
    check(found)
    assert not any(each.missing for each in found.figures.values())
    expected = NORM / float(BASE[f"{LAYERS[0]}.weight"].norm())
    assert all(each.relative_norm == pytest.approx(expected, rel=1e-5) for each in found.figures.values())


# --- layouts --------------------------------------------------------------------------------------------------


def kohya() -> dict[str, torch.Tensor]:
    found = {}
    for layer in LAYERS:
        name = "lora_te_" + layer.replace(".", "_")
        found |= {f"{name}.lora_down.weight": A.clone(), f"{name}.lora_up.weight": B.clone()}
        found[f"{name}.alpha"] = torch.tensor(6.0)
    return found


def mlx() -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_{side}": each.T.contiguous() for layer in LAYERS for side, each in (("a", A), ("b", B))
    }


MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": R, "scale": 2.0}}
LAYOUTS = {
    "PEFT": (peft_keys(), CONFIG, "adapter_model.safetensors", NORM, ""),
    "kohya": (kohya(), None, "some.safetensors", NORM, "kohya"),
    "MLX": (mlx(), MLX, "adapters.safetensors", NORM, "MLX"),
    "diffusers": (peft_keys("transformer."), None, "pytorch_lora_weights.safetensors", NORM / 2, "diffusers"),
    "an adapter's name": (peft_keys(name=".default"), CONFIG, "adapter_model.safetensors", NORM, ".default."),
    "compiled": (
        peft_keys("_orig_mod.base_model.model."),
        CONFIG,
        "adapter_model.safetensors",
        NORM,
        "torch.compile",
    ),
    "FSDP": (
        peft_keys("_fsdp_wrapped_module.base_model.model."),
        CONFIG,
        "adapter_model.safetensors",
        NORM,
        "FSDP",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_said_and_measured(tmp_path, capsys, name):
    tensors, config, file, norm, word = LAYOUTS[name]
    folder = adapter(tmp_path / "a", tensors, config, file)
    check(compare(base(tmp_path), folder), norm)
    check(compare(folder), norm)
    assert delta(base(tmp_path), folder) == 0
    assert word in capsys.readouterr().err
    if config is None:
        check(compare(base(tmp_path), folder / file), norm)


def test_factors_of_a_convolution_are_those_of_its_matrix(tmp_path, capsys):
    left, right = normal(8, R, 1, 1, seed=1), normal(R, 4, 3, 3)
    tensors = {
        "base_model.model.net.conv.lora_A.weight": right,
        "base_model.model.net.conv.lora_B.weight": left,
    }
    folder = adapter(tmp_path / "a", tensors)
    [figures] = compare(base(tmp_path, {"net.conv.weight": normal(8, 4, 3, 3)}), folder).figures.values()
    assert figures.delta_norm == pytest.approx(
        float((2 * left.flatten(1) @ right.flatten(1)).norm()), rel=1e-5
    )
    assert figures.relative_norm is not None and delta(folder) == 0
    assert "convolution" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"m.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"m.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({"base_model.model.m.ia3_l": torch.ones(2)}, "IA"),
    ],
)
def test_another_method_is_named(tmp_path, extra, word):
    with pytest.raises(AdapterError, match=word):
        read_adapter(adapter(tmp_path / "a", extra))


# --- beside LoRA ----------------------------------------------------------------------------------------------


def test_what_stands_beside_lora_is_listed_and_what_is_no_product_is_named(tmp_path):
    more = {
        "base_model.model.score.weight": torch.ones(2, IN),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 4),
        f"base_model.model.{LAYERS[0]}.lora_B.bias": torch.ones(OUT),
        f"base_model.model.{LAYERS[1]}.lora_magnitude_vector": torch.ones(OUT),
    }
    config = CONFIG | {"modules_to_save": ["score"], "trainable_token_indices": [3, 5]}
    weights = BASE | {"score.weight": torch.full((2, IN), 2.0)}
    found = compare(base(tmp_path, weights), adapter(tmp_path / "a", peft_keys() | more, config))
    check(found, count=3)  # not the layer with DoRA
    assert "DoRA" in found.not_measured[LAYERS[1]]
    assert "‖change‖/‖W‖ = 0.5" in found.not_measured["score.weight"]
    assert "2 token rows" in found.not_measured["model.embed_tokens.weight"]
    assert "own bias" in found.not_measured[f"{LAYERS[0]}.bias"]


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_nothing_measured_is_said_on_the_last_line_with_status_1(tmp_path, capsys, setting):
    folder = adapter(tmp_path / "a", config=CONFIG | setting)
    assert delta(base(tmp_path), folder) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("Nothing could be measured")
    assert "DoRA" in out or "pissa" in out


def test_a_head_that_shares_the_embeddings_table_is_measured_against_it(tmp_path):
    tensors = {
        "base_model.model.lm_head.lora_A.weight": A.clone(),
        "base_model.model.lm_head.lora_B.weight": B.clone(),
    }
    table = normal(OUT, IN, seed=4)
    found = compare(base(tmp_path, {"model.embed_tokens.weight": table}), adapter(tmp_path / "a", tensors))
    assert found.figures["lm_head.weight"].relative_norm == pytest.approx(
        NORM / float(table.norm()), rel=1e-5
    )


def test_experts_of_an_adapter_are_measured_one_by_one(tmp_path):
    """PEFT's target_parameters: A is (E · r, in), expert by expert; in B the expert changes fastest."""
    E = 4
    left, right = normal(E, 6, 2, seed=1), normal(E, 2, 8)
    tensors = {
        "base_model.model.mlp.experts.lora_A.weight": right.reshape(E * 2, 8),
        "base_model.model.mlp.experts.lora_B.weight": left.permute(1, 2, 0).reshape(6, 2 * E).contiguous(),
    }
    config = CONFIG | {"r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.up"]}
    folder = adapter(tmp_path / "a", tensors, config)
    found = compare(base(tmp_path, {"mlp.experts.up": normal(E, 6, 8, seed=3)}), folder).figures[
        "mlp.experts.up"
    ]
    products = left @ right
    assert found.experts == E and found.rank_99 <= 2
    assert found.delta_norm == pytest.approx(float(products.norm()), rel=1e-5)
    [factors] = read_adapter(folder).layers.values()
    assert torch.allclose(factors.delta_weight(), products, atol=1e-5)


# --- pairs of checkpoints -------------------------------------------------------------------------------------


def pair(tmp_path, before, after):
    for name, each in (("b", before), ("a", after)):
        save_file({key: value.contiguous() for key, value in each.items()}, tmp_path / f"{name}.safetensors")
    return compare(tmp_path / "b.safetensors", tmp_path / "a.safetensors")


def test_stacked_experts_are_medians_over_experts_and_the_widest_is_named(tmp_path):
    W = normal(6, 40, 36)
    update = 0.01 * normal(6, 40, 2, seed=1) @ normal(6, 2, 36, seed=2)
    update[4] = 0.01 * normal(40, 36, seed=3)
    figures = pair(tmp_path, {"mlp.experts.w": W}, {"mlp.experts.w": W + update}).figures["mlp.experts.w"]
    assert figures.rank_99 == 2 and figures.experts == 6 and "expert 4" in figures.note
    assert figures.delta_norm == pytest.approx(float(update.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "stacked"),
    [
        ("mlp.experts.gate_up_proj", (8, 16, 12), True),
        ("moe.w1", (4, 8, 8), True),
        ("encoder.conv1.weight", (384, 80, 3), False),
        ("patch.projection.weight", (64, 3, 16), False),
        ("mlp.gate_up", (8, 64, 64), True),
    ],
)
def test_which_tensors_of_three_axes_are_stacks(name, shape, stacked):
    assert experts_of(name, shape) is stacked


def test_of_a_table_that_grew_the_common_rows_are_measured_and_the_new_ones_named(tmp_path, capsys):
    old = {
        name: normal(96, 16, seed=seed)
        for seed, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"))
    }
    new = {name: torch.cat([W + 0.1, torch.full((8, 16), 2.0)]) for name, W in old.items()}
    found = pair(tmp_path, old, new)
    assert not found.shapes_differ and set(found.new_rows) == set(old)
    assert "8 rows (96 to 103) in AFTER alone, norm of each 8" in found.new_rows["lm_head.weight"]
    for name, W in old.items():
        assert found.figures[name].delta_norm == pytest.approx(0.1 * W.numel() ** 0.5, rel=1e-4)
    smaller = pair(
        tmp_path, {"classifier.weight": torch.ones(2, 16)}, {"classifier.weight": torch.ones(3, 16)}
    )
    assert smaller.shapes_differ


def test_unmerged_factors_in_a_checkpoint_are_never_called_equal(tmp_path, capsys):
    after = {
        f"base_model.model.{name.replace('.weight', '.base_layer.weight')}": W for name, W in BASE.items()
    }
    after |= peft_keys(name=".default") | {"base_model.model.model.norm.weight": torch.ones(4)}
    found = pair(tmp_path, BASE | {"model.norm.weight": torch.ones(4)}, after)
    assert {each.status for each in found.figures.values()} == {"unmerged", "unchanged"}
    assert found.figures[f"{LAYERS[0]}.weight"].rank_99 <= R
    assert delta(tmp_path / "b.safetensors", tmp_path / "a.safetensors") == 0
    out = capsys.readouterr().out
    assert "equal" not in out.replace("unequal", "") and "AFTER holds unmerged LoRA on 4 layers" in out


def test_names_are_paired_by_their_longest_common_end_and_never_across_layers():
    shape = lambda *names: {name: Stored(None, "F32", (4, 4), 0) for name in names}
    left = shape("model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight")
    right = shape(
        "language_model.model.layers.0.q.weight", "vision.layers.0.q.weight", "language_model.lm_head.weight"
    )
    found = pair_names(left, right)
    assert found.pairs == {
        "model.layers.0.q.weight": "language_model.model.layers.0.q.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    assert layer_weight("model.layers.5.q", (4, 4), shape("layers.0.q.weight")) == (None, "missing")
    tables = shape("shared.weight", "encoder.embed_tokens.weight")
    assert tied_table("decoder.embed_tokens.weight", (4, 4), tables) == "shared.weight"


# --- what a folder is -----------------------------------------------------------------------------------------


def test_folders_are_recognised_and_the_message_says_what_to_give(tmp_path):
    there = base(tmp_path)
    trainer, several, cache, shards = (
        tmp_path / name for name in ("trainer", "several", "models--a--b", "fsdp")
    )
    for folder in (trainer, several, cache, shards):
        folder.mkdir()
    adapter(trainer / "checkpoint-500")
    adapter(several / "french")
    (shards / "__0_0.distcp").write_bytes(b"x")
    for folder, words in ((trainer, "checkpoint-500"), (several, "french"), (shards, "FSDP")):
        with pytest.raises(CheckpointError, match=words):
            compare(there, folder)
    for number in ("abc", "def"):
        (cache / "snapshots" / number).mkdir(parents=True)
        save_file(BASE, cache / "snapshots" / number / "model.safetensors")
    with pytest.raises(CheckpointError, match="snapshots/abc"):
        compare(cache, adapter(tmp_path / "a"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def", encoding="utf-8")
    found = compare(cache, tmp_path / "a")
    check(found)
    assert "snapshots/def" in found.given[0]


def test_a_model_alone_takes_two(tmp_path):
    with pytest.raises(CheckpointError, match="is no adapter, so it takes two"):
        compare(base(tmp_path))
