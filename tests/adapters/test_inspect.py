"""`lora-edu inspect`: figures against the whole ΔW, every layout, the recommendation and its reason, the page."""

import json

import pytest
import small_adapters as made
import torch

from lora_edu import cli, lowrank
from lora_edu.adapters.inspect import open_adapter
from lora_edu.adapters.usage import recommendation, use_of, uses_of
from lora_edu.lora import read_adapter
from lora_edu.lora.adapter_files import Factors


def inspect(*arguments) -> int:
    return cli.main(["inspect", *map(str, arguments)])


def test_the_figures_are_those_of_the_whole_update(tmp_path, capsys):
    folder = made.peft_folder(tmp_path / "a")
    assert inspect(folder, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    adapter = read_adapter(folder)
    assert [each["name"] for each in found["layers"]] == made.LAYERS
    for row in found["layers"]:
        S = torch.linalg.svdvals(adapter.layers[row["name"]].delta_weight().double())[:6]
        assert S.tolist() == pytest.approx(made.SPECTRUM, rel=1e-4)
        assert row["values"] == pytest.approx(S.tolist(), rel=1e-4)
        assert row["norm"] == pytest.approx(float(S.norm()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-5)
        assert row["effective_rank"] == pytest.approx(lowrank.effective_rank(S), rel=1e-4)
        assert row["half"] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-5)
        assert row["quarter"] == pytest.approx(float(S[:2].square().sum() / S.square().sum()), rel=1e-5)
        assert (row["rank_90"], row["rank_99"], row["recommended"]) == (2, 4, 4)
        edge = float(S.norm()) * lowrank.product_noise_edge(12, 10, 6)
        assert row["edge"] == pytest.approx(edge, rel=1e-5) and row["above"] == int((S > edge).sum())
    assert found["recommended"] == "resize" and "176 of 264 parameters (67 %)" in found["reason"]
    assert found["kept_at_half"] == pytest.approx(84 / 85.3125, rel=1e-4)


def test_the_tables_say_it_in_words(tmp_path, capsys):
    assert inspect(made.peft_folder(tmp_path / "a")) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out and "model.layers.*.mlp.down_proj (1)" in out
    assert "All 2 layers: 264 parameters" in out and "r/2 keeps 98.5 % of it squared" in out
    assert (
        "Cut it: lora-edu resize ADAPTER OUT --energy 0.99. Why: " in out and "Energy is not behaviour" in out
    )


LAYOUTS = {
    "kohya": lambda path: made.kohya_file(path / "lora.safetensors"),
    "diffusers": lambda path: made.diffusers_file(path / "lora.safetensors"),
    "MLX": lambda path: made.mlx_folder(path / "mlx"),
    "PEFT": lambda path: made.peft_folder(path / "peft"),
    "PEFT's file": lambda path: made.peft_folder(path / "peft") / "adapter_model.safetensors",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path, capsys):
    """One spectrum in all of them, kernels of convolutions flattened."""
    assert inspect(LAYOUTS[layout](tmp_path), "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == layout.removesuffix("'s file") and len(found["layers"]) == 2
    for row in found["layers"]:
        assert row["values"] == pytest.approx(made.SPECTRUM, rel=1e-4)


def noise(seed: int, rank: int = 8) -> Factors:
    drawn = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 64, generator=drawn), torch.randn(48, rank, generator=drawn)
    return Factors(A, B, 8.0, False, 0.0, False)


def even_update(seed: int) -> Factors:
    A, B = (made.orthonormal(64, 8, seed=each) for each in (seed, seed + 1))
    return noise(0)._replace(lora_A=A.T.contiguous(), lora_B=B[:48].contiguous())


def test_noise_has_nothing_above_noise_and_one_strong_direction_has():
    assert [use_of(noise(seed)).above for seed in range(20)].count(0) >= 18
    strong = noise(1)
    strong = strong._replace(lora_B=strong.lora_B * torch.tensor([6.0] + [1.0] * 7))
    assert use_of(strong).above == 1


def test_the_figures_do_not_depend_on_how_the_update_is_split():
    """(B M⁻¹)(M A) is the same ΔW, whatever M does to the factors' own norms."""
    factors = noise(2)
    M = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(8)
    other = factors._replace(lora_A=M @ factors.lora_A, lora_B=factors.lora_B @ torch.linalg.inv(M))
    one, two = use_of(factors), use_of(other)
    assert one.values == pytest.approx(two.values, rel=1e-4)
    assert one.edge == pytest.approx(two.edge, rel=1e-4) and one.above == two.above


def test_what_is_recommended():
    even = {f"l.{seed}": use_of(even_update(seed)) for seed in range(4)}
    what, why = recommendation(even)
    assert what == "higher" and "4 of 4 layers no direction has more than twice the average" in why
    assert "Noise has such a spectrum, too" in why
    falling = noise(0)
    falling = falling._replace(lora_B=falling.lora_B * torch.logspace(0, -1, 8))
    assert recommendation({"l": use_of(falling)})[0] == "keep"
    still = noise(0)._replace(lora_B=torch.zeros(48, 8))
    assert recommendation({"l": use_of(still)})[0] == "nothing"
    assert use_of(still).status == "equal"


def test_experts_are_counted_as_a_stack():
    drawn = torch.Generator().manual_seed(0)
    A, B = torch.randn(3 * 4, 10, generator=drawn), torch.randn(12, 4 * 3, generator=drawn)
    used = use_of(Factors(A, B, 4.0, False, 0.0, False, experts=3))
    whole = Factors(A, B, 4.0, False, 0.0, False, experts=3).delta_weight().double()
    S = torch.linalg.svdvals(whole)[:, :4]
    assert used.values == pytest.approx(S.square().sum(0).sqrt().tolist(), rel=1e-5)
    assert used.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert used.parameters == A.numel() + B.numel()


def test_what_stands_beside_lora_is_listed(tmp_path, capsys):
    tensors = made.peft_tensors() | {f"{made.PREFIX}score.modules_to_save.weight": torch.ones(2, 10)}
    folder = made.peft_folder(tmp_path / "a", tensors, modules_to_save=["score"])
    assert inspect(folder) == 0
    assert "Not measured (1):\n  score.weight: stored whole, 2 × 10" in capsys.readouterr().out


def test_nothing_to_measure_ends_with_1(tmp_path, capsys):
    zero = {
        key: torch.zeros_like(each) if "lora_B" in key else each for key, each in made.peft_tensors().items()
    }
    assert inspect(made.peft_folder(tmp_path / "zero", zero), "--html", tmp_path / "page.html") == 1
    assert "Nothing could be measured: no layer has an update" in capsys.readouterr().out
    assert not (tmp_path / "page.html").exists()
    nan = {key: each * torch.nan for key, each in made.peft_tensors().items()}
    assert inspect(made.peft_folder(tmp_path / "nan", nan)) == 1
    assert "NaN/Inf" in capsys.readouterr().out
    dora = made.peft_tensors() | {f"{made.PREFIX}{made.LAYERS[0]}.lora_magnitude_vector": torch.ones(12)}
    assert inspect(made.peft_folder(tmp_path / "dora", dora, use_dora=True)) == 1
    assert "DoRA" in capsys.readouterr().out


def test_a_folder_that_is_something_else_is_named(tmp_path, capsys):
    for name in ("one", "two"):
        made.peft_folder(tmp_path / "many" / name)
    assert inspect(tmp_path / "many") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no adapter. It is a folder of adapters (one, two)" in error


def test_the_file_alone_is_read_with_its_configuration(tmp_path):
    adapter, notes = open_adapter(str(made.peft_folder(tmp_path / "a") / "adapter_model.safetensors"))
    assert adapter.scaled and "its folder, with adapter_config.json, was read" in notes[0]
    assert uses_of(adapter)[made.LAYERS[0]].scaling == 2
