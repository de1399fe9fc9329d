"""`lora-edu resize`: the truncation of every ΔW, in the format it came in, with all that stood beside LoRA."""

import json

import pytest
import small_adapters as made
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_edu import cli, lowrank
from lora_edu.lora import read_adapter


def resize(*arguments) -> int:
    return cli.main(["resize", *map(str, arguments)])


def check(old, new, ranks: dict[str, int] | int) -> None:
    """Every ΔW is the truncation of the old one, its scaling the old one."""
    old, new = read_adapter(old), read_adapter(new)
    ranks = dict.fromkeys(old.layers, ranks) if isinstance(ranks, int) else ranks
    assert {name: each.rank for name, each in new.layers.items()} == ranks
    assert new.layout == old.layout and new.scaled == old.scaled
    for name, factors in new.layers.items():
        before = old.layers[name]
        assert factors.scaling == pytest.approx(before.scaling, rel=1e-12)
        assert factors.kernel == before.kernel and factors.lora_A.dtype == before.lora_A.dtype
        expected = lowrank.truncate(before.delta_weight(), factors.rank)
        assert torch.allclose(factors.delta_weight(), expected, atol=1e-5)


RULES = {
    "rank": (["--rank", 3], 3),
    "energy": (["--energy", 0.99], 4),
    "error": (["--error", 0.06], 5),  # √(0.25²) / √85.3 = 0.027, √(0.5² + 0.25²) / √85.3 = 0.0605
    "parameters": (["--parameters", 100], 2),
}


@pytest.mark.parametrize("rule", RULES)
def test_peft(rule, tmp_path, capsys):
    old = made.peft_folder(tmp_path / "old")
    options, rank = RULES[rule]
    assert resize(old, tmp_path / "new", *options) == 0
    check(old, tmp_path / "new", rank)
    assert f"new: 2 layers of rank {rank} (before: 2 of 6)" in capsys.readouterr().out
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["r"] == rank and config["lora_alpha"] == 2 * rank and config["alpha_pattern"] == {}
    assert config["target_modules"] == made.CONFIG["target_modules"]


def test_ranks_that_differ_go_into_the_patterns(tmp_path):
    tensors = made.peft_tensors()
    A, B = made.pair(spectrum=(9.0, 8.0, 7.0, 6.0, 5.0, 0.01))
    tensors |= {
        f"{made.PREFIX}{made.LAYERS[1]}.lora_{side}.weight": each for side, each in (("A", A), ("B", B))
    }
    old = made.peft_folder(tmp_path / "old", tensors, use_rslora=True)
    assert resize(old, tmp_path / "new", "--energy", 0.98) == 0
    check(old, tmp_path / "new", {made.LAYERS[0]: 3, made.LAYERS[1]: 5})
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) | set(config["alpha_pattern"]) <= {
        f"^{name}".replace(".", r"\.") for name in made.LAYERS
    }
    assert config["use_rslora"] is True


def test_what_stands_beside_lora_is_kept_bit_for_bit(tmp_path, capsys):
    beside = {
        f"{made.PREFIX}score.weight": torch.randn(2, 10).bfloat16(),
        f"{made.PREFIX}{made.LAYERS[0]}.lora_B.bias": torch.randn(12),
        f"{made.PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 10),
    }
    settings = {"modules_to_save": ["score"], "lora_bias": True, "trainable_token_indices": [3, 5]}
    old = made.peft_folder(tmp_path / "old", made.peft_tensors() | beside, **settings)
    assert resize(old, tmp_path / "new", "--rank", 2) == 0
    check(old, tmp_path / "new", 2)
    now = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for key, each in beside.items():
        assert torch.equal(now[key], each) and now[key].dtype == each.dtype
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert {key: config[key] for key in settings} == settings
    assert "Kept as they were: 3 tensors beside LoRA" in capsys.readouterr().out


def test_an_untrained_layer_is_left_out_and_no_longer_a_target(tmp_path, capsys):
    tensors = made.peft_tensors()
    tensors[f"{made.PREFIX}{made.LAYERS[1]}.lora_B.weight"].zero_()
    old = made.peft_folder(tmp_path / "old", tensors)
    assert resize(old, tmp_path / "new", "--rank", 2) == 0
    check(old, tmp_path / "new", {made.LAYERS[0]: 2})
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["target_modules"] == [
        made.LAYERS[0]
    ]
    assert f"Left out, of rank 0 now: 1 layers ({made.LAYERS[1]})" in capsys.readouterr().out


def test_kohya_keeps_its_names_kernels_and_alphas(tmp_path):
    old = made.kohya_file(tmp_path / "old.safetensors")
    assert resize(old, tmp_path / "new.safetensors", "--rank", 2) == 0
    check(old, tmp_path / "new.safetensors", 2)
    before, after = load_file(old), load_file(tmp_path / "new.safetensors")
    assert before.keys() == after.keys()
    assert after["lora_unet_down_conv1.lora_down.weight"].shape == (2, 2, 3, 3)
    assert after["lora_unet_down_conv1.lora_up.weight"].shape == (8, 2, 1, 1)
    assert after["lora_unet_mid_attn_to_q.alpha"] == 4 and after["lora_unet_mid_attn_to_q.alpha"].shape == ()
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        assert file.metadata() == {"ss_base_model_version": "sd_v1"}  # the old rank is not told on


def test_diffusers_without_alpha(tmp_path):
    old = made.diffusers_file(tmp_path / "old.safetensors")
    assert resize(old, tmp_path / "new.safetensors", "--energy", 0.95) == 0
    check(old, tmp_path / "new.safetensors", 3)


def test_mlx_takes_one_rank(tmp_path, capsys):
    old = made.mlx_folder(tmp_path / "old")
    assert resize(old, tmp_path / "new", "--energy", 0.9) == 2
    assert "MLX has one rank for all layers: give --rank" in capsys.readouterr().err
    assert resize(old, tmp_path / "new", "--rank", 3) == 0
    check(old, tmp_path / "new", 3)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 3, "scale": 2.0, "dropout": 0.0}


def test_an_empty_folder_may_be_there(tmp_path):
    old = made.peft_folder(tmp_path / "old")
    (tmp_path / "new").mkdir()
    assert resize(old, tmp_path / "new", "--rank", 2) == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new", "old"]
