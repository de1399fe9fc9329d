"""What `lora-edu resize` writes, opened by PEFT: every ΔW is the truncation of the old one."""

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft_matrix as matrix  # noqa: E402

from lora_edu import cli, lowrank  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}}
CASES = {
    "patterns": ("llama", LINEAR, ["--energy", "0.8"]),
    "rslora, biases": ("opt", {"use_rslora": True, "bias": "all"}, ["--parameters", "300"]),
    "table and classifier": (
        "bert",
        {"target_modules": ["word_embeddings", "query"], "modules_to_save": ["classifier"]},
        ["--error", "0.5"],
    ),
    "Conv1D, tied table": ("gpt2", {"target_modules": ["wte", "c_attn"]}, ["--rank", "2"]),
    "regex": ("t5", {"target_modules": r".*\.(q|wo)"}, ["--energy", "0.7"]),
    "convolution": ("vit", {"target_modules": ["projection"]}, ["--rank", "3"]),
    "lora_bias": ("qwen2", {"lora_bias": True}, ["--rank", "1"]),
    "experts": ("mixtral", {"target_modules": "all-linear"}, ["--rank", "3"]),
    "experts, another rank and alpha": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 6},
            "alpha_pattern": {"experts.gate_up_proj": 11},
        },
        ["--rank", "2"],
    ),
}


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    if delta.dim() == 3 and delta.shape[0] <= 3:  # experts
        return torch.stack([lowrank.truncate(each, min(rank, *each.shape)) for each in delta])
    flat = delta.flatten(1)
    return lowrank.truncate(flat, min(rank, *flat.shape)).reshape(delta.shape)


@pytest.mark.parametrize("case", CASES)
def test_peft_opens_the_smaller_adapter(case, tmp_path, capsys):
    family, options, rule = CASES[case]
    family = matrix.FAMILIES[family]
    plain = {"r": 4, "lora_alpha": 6, "target_modules": list(family.linear)}
    theirs = peft.get_peft_model(family.make(), peft.LoraConfig(**plain | options)).eval()
    matrix._randomise(theirs)
    theirs.save_pretrained(tmp_path / "old")
    assert cli.main(["resize", str(tmp_path / "old"), str(tmp_path / "new"), *rule]) == 0, capsys.readouterr()
    again = peft.PeftModel.from_pretrained(family.make(), tmp_path / "new").eval()
    before, after = matrix._deltas(theirs), matrix._deltas(again)
    assert before.keys() == after.keys() and before
    ranks = []
    for name, delta in after.items():
        numbers = torch.linalg.svdvals(
            delta if delta.dim() == 3 and delta.shape[0] <= 3 else delta.flatten(1)
        )
        rank = int((numbers > 1e-5 * numbers.amax(-1, keepdim=True)).sum(-1).max())
        assert torch.allclose(
            delta, truncated(before[name], rank), atol=2e-6 * float(before[name].abs().max()) + 2e-6
        )
        ranks.append(rank)
    assert max(ranks) < max(4, *options.get("rank_pattern", {"": 4}).values())
    now = again.state_dict()
    for name, each in theirs.state_dict().items():
        if "modules_to_save" in name or "lora_B.default.bias" in name:
            assert torch.equal(now[name], each), name


def test_two_stacks_of_one_rank_and_two_alphas_are_not_guessed(tmp_path, capsys):
    """The file's keys don't say which of the two parameters is which."""
    family = matrix.FAMILIES["mixtral"]
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=parameters, alpha_pattern={parameters[0]: 11}
    )
    theirs = peft.get_peft_model(family.make(), config)
    matrix._randomise(theirs)
    theirs.save_pretrained(tmp_path / "old")
    assert cli.main(["inspect", str(tmp_path / "old")]) == 0
    out = capsys.readouterr().out
    assert "its keys don't say which of target_parameters it is for" in out and "self_attn.q_proj" in out
    assert cli.main(["resize", str(tmp_path / "old"), str(tmp_path / "new"), "--rank", "2"]) == 2
    assert "can't be cut: its keys don't say which" in capsys.readouterr().err
