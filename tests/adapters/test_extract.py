"""`lora-edu extract`: adapters that PEFT opens, for every way of storing weights, and what is said of the rest."""

import copy
import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_edu import cli
from lora_edu.adapters import extract as command
from lora_edu.adapters.extract import extract
from lora_edu.delta.files import CheckpointError
from lora_edu.lora import read_adapter

FAMILIES = ["bert", "gpt2", "llama", "opt", "t5", "mixtral", "gpt_oss"]


def run(*arguments) -> int:
    return cli.main(["extract", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path):
    """Two folders of one file: a matrix of full rank, one of rank 2, one that is equal, and a norm."""
    torch.manual_seed(0)
    before = {f"layers.{k}.q.weight": torch.randn(24, 16) for k in range(3)} | {"norm.weight": torch.ones(16)}
    after = {name: each.clone() for name, each in before.items()}
    after["layers.0.q.weight"] += 0.1 * torch.randn(24, 16)
    after["layers.1.q.weight"] += torch.randn(24, 2) @ torch.randn(2, 16)
    after["norm.weight"] += 0.1
    for side, state in (("before", before), ("after", after)):
        (tmp_path / side).mkdir()
        save_file(state, tmp_path / side / "model.safetensors")
    return tmp_path / "before", tmp_path / "after"


# --- PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_in_peft_are_base_and_truncated_delta(family, families, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    before = families.model(family)
    after = families.moved(before)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    capsys.readouterr()
    assert run(tmp_path / "before", tmp_path / "after", tmp_path / "out", "--rank", 3) == 0
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "out").eval()
    wanted = families.logits(families.truncated(before, after, 3))
    assert (wanted - families.logits(before)).abs().max() > 0.1
    assert torch.allclose(families.logits(adapted), wanted, atol=2e-5)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["after", "before", "out"]
    said, noted = capsys.readouterr()
    assert ("embed_positions" in said) == (family == "opt") and "matrices that changed" in said
    assert ("share one table" in noted) == (family in ("bert", "gpt2", "opt", "t5"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "t5"])
def test_with_all_ranks_and_the_rest_whole_the_adapter_is_the_fine_tune(family, families, tmp_path):
    """Norms and biases in modules_to_save and bias="all": nothing of AFTER is lost."""
    peft = pytest.importorskip("peft")
    before = families.model(family)
    after = families.moved(before, vectors=True)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    report = extract(tmp_path / "before", tmp_path / "after", tmp_path / "out", rank=40, keep_whole=True)
    assert report.kept and not report.left
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "out").eval()
    assert torch.allclose(families.logits(adapted), families.logits(after), atol=5e-5)


@pytest.mark.filterwarnings("ignore")
def test_ranks_by_matrix_and_one_rank_for_all_experts(families, tmp_path):
    peft = pytest.importorskip("peft")
    before = families.model("mixtral")
    after = families.moved(before)
    with torch.no_grad():  # three experts as they were, a block of the fourth
        stack, old = (each.model.layers[0].mlp.experts.gate_up_proj for each in (after, before))
        stack[:3] = old[:3]
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    report = extract(tmp_path / "before", tmp_path / "after", tmp_path / "out", error=0.4)
    ranks = {name: row.rank for name, row in report.rows.items()}
    assert len(set(ranks.values())) > 2
    assert all(row.error <= 0.4 for name, row in report.rows.items() if "moe" not in name)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "out").eval()
    for name, module in adapted.named_modules():
        if name.endswith("q_proj"):
            wanted = after.get_submodule(name.removeprefix("base_model.model.")).weight
            mine = module.base_layer.weight + module.get_delta_weight("default")
            assert (mine - wanted).norm() <= 0.4 * (wanted - module.base_layer.weight).norm() * (1 + 1e-5)
    moe = {each.rank for name, each in read_adapter(tmp_path / "out").layers.items() if "moe" in name}
    assert len(moe) == 1
    state = load_file(tmp_path / "before" / "model.safetensors")
    for name, layer in read_adapter(tmp_path / "out").layers.items():
        state[f"{name}.weight"] += layer.delta_weight()
    save_file(state, tmp_path / "after" / "model.safetensors", metadata={"format": "pt"})
    wanted = type(before).from_pretrained(tmp_path / "after").eval()
    assert torch.allclose(families.logits(adapted), families.logits(wanted), atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_table_that_grew(families, tmp_path):
    """The common rows as factors for the base as it is; or the whole table, for one that was resized."""
    peft = pytest.importorskip("peft")
    before = families.model("llama")
    after = families.moved(before)
    after.resize_token_embeddings(44)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    report = extract(tmp_path / "before", tmp_path / "after", tmp_path / "a", rank=40)
    assert "rows 40 to 43" in report.left["model.embed_tokens.weight"]
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "a").eval()
    assert torch.allclose(families.logits(adapted), families.logits(after)[..., :40], atol=5e-5)
    extract(tmp_path / "before", tmp_path / "after", tmp_path / "b", rank=40, keep_whole=True)
    resized = copy.deepcopy(before)
    resized.resize_token_embeddings(44)
    adapted = peft.PeftModel.from_pretrained(resized, tmp_path / "b").eval()
    assert torch.allclose(families.logits(adapted), families.logits(after), atol=5e-5)


def test_a_head_that_came_off_its_table(families, tmp_path):
    before = families.model("llama", tie_word_embeddings=True)
    after = families.moved(families.model("llama"))
    with torch.no_grad():
        after.model.embed_tokens.weight.copy_(before.model.embed_tokens.weight)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    report = extract(tmp_path / "before", tmp_path / "after", tmp_path / "out", rank=16)
    assert report.rows["lm_head.weight"].rank == 16 and "model.embed_tokens.weight" not in report.rows
    delta = read_adapter(tmp_path / "out").layers["lm_head"].delta_weight()
    assert torch.allclose(delta, after.lm_head.weight - before.lm_head.weight, atol=1e-5)


# --- ranks and rounding -------------------------------------------------------------------------------------


def test_the_record_is_never_written_over_what_is_read(pair, tmp_path, capsys):
    weights = (pair[0] / "model.safetensors").read_bytes()
    assert run(*pair, tmp_path / "out", "--rank", 2, "--json", pair[0] / "model.safetensors") == 2
    assert "is read, so it is not written over" in capsys.readouterr().err
    assert (pair[0] / "model.safetensors").read_bytes() == weights and not (tmp_path / "out").exists()


def test_what_is_said_and_recorded(pair, tmp_path, capsys):
    assert run(*pair, tmp_path / "out", "--energy", 0.9, "--json", tmp_path / "e.json") == 0
    out, err = capsys.readouterr()
    assert not err
    record = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["matrices"]}
    before, after = (load_file(path / "model.safetensors") for path in pair)
    assert set(rows) == {"layers.0.q.weight", "layers.1.q.weight"}
    for name, row in rows.items():
        S = torch.linalg.svdvals(after[name].double() - before[name].double())
        left = float(S[row["rank"] :].norm() / S.norm())
        assert row["error"] == pytest.approx(left, abs=1e-5) and left**2 <= 0.1
        assert row["delta_norm"] == pytest.approx(float(S.norm()), rel=1e-5)
    assert rows["layers.1.q.weight"]["rank"] <= 2
    adapter = read_adapter(tmp_path / "out")
    assert record["parameters"] == sum(each.rank * 40 for each in adapter.layers.values())
    assert "a vector (norm or scale): norm.weight" in out and "--keep-whole" in out
    assert "layers.*.q (2)" in out and "2 of 2 matrices that changed" in out


def test_no_rank_is_spent_on_rounding_and_how_much_it_is(tmp_path, capsys):
    torch.manual_seed(0)
    before = {f"layers.{k}.q.weight": torch.randn(64, 48).bfloat16() for k in range(2)}
    gentle = before["layers.0.q.weight"].float() * (1 + 1e-3 * torch.randn(64, 48))
    signal = before["layers.1.q.weight"].float() + torch.randn(64, 3) @ torch.randn(3, 48)
    after = {"layers.0.q.weight": gentle.bfloat16(), "layers.1.q.weight": signal.bfloat16()}
    save_file(before, tmp_path / "b.safetensors")
    save_file(after, tmp_path / "a.safetensors")
    report = extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "out", rank=16)
    assert [row.rank for row in report.rows.values()] == [0, 3]
    lost, kept = report.rows.values()
    assert lost.why == "no direction above the rounding floor" and lost.floor > 0.7 * lost.delta_norm
    assert kept.floor < 0.01 * kept.delta_norm
    save_file({"layers.0.q.weight": gentle.bfloat16()}, tmp_path / "a.safetensors")
    assert run(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "none", "--rank", 4) == 1
    assert "Nothing could be extracted" in capsys.readouterr().out and not (tmp_path / "none").exists()


@settings(max_examples=10, deadline=None)
@given(st.integers(30, 2000))
def test_the_budget_is_never_exceeded(tmp_path_factory, budget):
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(budget)
    before = {f"{k}.weight": torch.randn(10 + 2 * k, 12) for k in range(4)}
    after = {name: each + torch.randn(each.shape) * (k + 1) for k, (name, each) in enumerate(before.items())}
    save_file(before, folder / "b.safetensors")
    save_file(after, folder / "a.safetensors")
    report = extract(folder / "b.safetensors", folder / "a.safetensors", folder / "out", parameters=budget)
    held = load_file(folder / "out" / "adapter_model.safetensors")
    assert report.parameters == sum(each.numel() for each in held.values()) <= budget


# --- interrupted --------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(pair, tmp_path, monkeypatch):
    calls = []
    measure = command._measure

    def interrupted(matrix, *rest):
        calls.append(matrix.key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(matrix, *rest)

    monkeypatch.setattr(command, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, tmp_path / "out", rank=2)
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    extract(*pair, tmp_path / "out", rank=2)
    assert calls == ["layers.0.q.weight", "layers.1.q.weight", "layers.1.q.weight", "layers.2.q.weight"]
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.undo()
    extract(*pair, tmp_path / "at_once", rank=2)
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("out", "at_once"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_other_files_or_another_rule_start_anew(pair, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, tmp_path / "out", rank=1)
    monkeypatch.undo()
    report = extract(*pair, tmp_path / "out", rank=2)
    assert all(row.rank == 2 for row in report.rows.values())


# --- bad input ----------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints; it ends with code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("lora-edu extract: ") and err.count("\n") == 1, err
    return err


def test_out_that_can_not_be_made(pair, tmp_path, capsys):
    before, after = pair
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine", encoding="utf-8")
    for out, said in (
        (before, "is, or lies in, what is read"),
        (after / "new", "is, or lies in, what is read"),
        (tmp_path / "full", "has something in it already"),
        (tmp_path / "full" / "x", "is a file"),
        (tmp_path / "no" / "where", "there is no folder"),
    ):
        assert said in refused(capsys, before, after, out, "--rank", 1)
    assert (tmp_path / "full" / "x").read_text(encoding="utf-8") == "mine"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    assert "was not made here" in refused(capsys, before, after, tmp_path / "out", "--rank", 1)
    assert (tmp_path / "out.partial" / "mine").exists()


def test_a_full_disk_and_a_read_only_folder(pair, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "write_adapter"):
        monkeypatch.setattr(command, name, full)
        assert "No space left on device" in refused(capsys, *pair, tmp_path / "out", "--rank", 1)
        monkeypatch.undo()
        assert sorted(each.name for each in tmp_path.iterdir()) == ["after", "before"]
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "not to be written to" in refused(capsys, *pair, tmp_path / "out", "--rank", 1)


def test_an_adapter_and_strangers_are_named(pair, tmp_path, capsys):
    before, after = pair
    extract(before, after, tmp_path / "adapter", rank=1)
    assert "is an adapter already" in refused(
        capsys, before, tmp_path / "adapter", tmp_path / "o", "--rank", 1
    )
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    other = tmp_path / "other.safetensors"
    assert "no tensor's name in common" in refused(capsys, before, other, tmp_path / "o", "--rank", 1)
    assert "there is no" in refused(capsys, before, tmp_path / "nowhere", tmp_path / "o", "--rank", 1)
    for rule, value in (("--rank", 0), ("--energy", 1.5), ("--error", 2), ("--parameters", -3)):
        assert rule[2:] in refused(capsys, before, after, tmp_path / "o", rule, value)


def test_what_is_not_finite_is_left_out_and_said(pair, tmp_path):
    state = load_file(pair[1] / "model.safetensors")
    state["layers.0.q.weight"][3, 3] = float("nan")
    save_file(state, pair[1] / "model.safetensors")
    report = extract(*pair, tmp_path / "out", rank=1)
    assert "NaN" in report.left["layers.0.q.weight"]
    assert list(read_adapter(tmp_path / "out").layers) == ["layers.1.q"]


def test_an_index_that_leaves_the_folder(pair, tmp_path, capsys):
    index = {"weight_map": {"layers.0.q.weight": "../before/model.safetensors"}}
    (pair[1] / "model.safetensors").unlink()
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "leaves the folder" in refused(capsys, *pair, tmp_path / "o", "--rank", 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files_get_one_line_and_leave_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(4)}
    save_file(state, folder / "b.safetensors")
    save_file({name: each + 1 for name, each in state.items()}, folder / "a.safetensors")
    victim = folder / data.draw(st.sampled_from(["a.safetensors", "b.safetensors"]))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    try:
        extract(folder / "b.safetensors", folder / "a.safetensors", folder / "out", rank=2)
    except CheckpointError as refusal:
        assert "\n" not in str(refusal) and not (folder / "out").exists()
    assert {each.name for each in folder.iterdir()} <= {"a.safetensors", "b.safetensors", "out"}
    shutil.rmtree(folder)


def test_the_help_names_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert re.search(r"--rank R \| --energy SHARE \| --error E \| --parameters N", out)
