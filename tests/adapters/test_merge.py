"""`lora-edu merge`: what is written computes what the base with the adapter computes, and what rounding did is said."""

import copy
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_edu import cli
from lora_edu.adapters import merge as command
from lora_edu.adapters.extract import extract
from lora_edu.adapters.merge import Options, merge, rounded
from lora_edu.delta.files import CheckpointError
from lora_edu.lora import AdapterError, read_adapter, write_adapter
from lora_edu.lora.adapter_files import Factors

FAMILIES = ["bert", "gpt2", "llama", "opt", "t5", "mixtral", "gpt_oss"]


def run(*arguments) -> int:
    return cli.main(["merge", *map(str, arguments)])


def drawn(rows, columns, rank=2, seed=0, scale=1.0, alpha=None) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: scale * torch.randn(*shape, generator=generator)
    return Factors(draw(rank, columns), draw(rows, rank), float(alpha or rank), False, 0.0, False)


@pytest.fixture
def small(tmp_path):
    """A base of two shards with an index, config and tokenizer, and two adapters for it."""
    torch.manual_seed(0)
    state = {f"layers.{k}.{n}.weight": torch.randn(24, 16) for k in range(2) for n in ("q", "v")}
    state |= {"norm.weight": torch.ones(16), "step": torch.tensor([3])}
    shards = {"model-1.safetensors": list(state)[:2], "model-2.safetensors": list(state)[2:]}
    base = tmp_path / "base"
    base.mkdir()
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, base / file)
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (base / "config.json").write_text('{"model_type": "toy"}', encoding="utf-8")
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"\x80old")
    for number, name in enumerate(("one", "two")):
        layers = {f"layers.{k}.q": drawn(24, 16, 2 + number, 10 * number + k, alpha=3) for k in range(2)}
        write_adapter(tmp_path / name, layers)
    return base, tmp_path / "one", tmp_path / "two"


def tensors(folder) -> dict[str, torch.Tensor]:
    return {n: each for file in folder.glob("*.safetensors") for n, each in load_file(file).items()}


# --- PEFT and transformers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_reloads_to_what_base_and_adapter_compute(family, families, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = families.model(family)
    base.save_pretrained(tmp_path / "base")
    families.moved(base).save_pretrained(tmp_path / "after")
    extract(tmp_path / "base", tmp_path / "after", tmp_path / "adapter", rank=3)
    assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    wanted = families.logits(adapted)
    assert (wanted - families.logits(base)).abs().max() > 0.1
    assert torch.allclose(families.logits(reloaded), wanted, atol=2e-5)
    assert reloaded.config.tie_word_embeddings == base.config.tie_word_embeddings
    if not base.config.tie_word_embeddings:
        theirs = families.logits(adapted.merge_and_unload())
        assert torch.allclose(families.logits(reloaded), theirs, atol=2e-5)


def trained(families, family, folder, targets, **options):
    """A base, and an adapter that PEFT made for it, with something in every factor."""
    peft = pytest.importorskip("peft")
    base = families.model(family, **options.pop("model", {}))
    base.save_pretrained(folder / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if each.requires_grad and "lora_" not in name:
                each += 0.3 * torch.randn(each.shape)
    adapted.save_pretrained(folder / "adapter")
    return base, adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", ["q_proj", "down_proj"], {}),
        ("llama", ["q_proj"], {"use_rslora": True}),
        ("llama", ["q_proj", "embed_tokens", "lm_head"], {}),
        ("llama", ["q_proj"], {"modules_to_save": ["lm_head", "norm"]}),
        ("gpt2", ["c_attn", "c_proj"], {}),
        ("bert", ["query", "value"], {"bias": "all"}),
        ("opt", ["k_proj"], {"lora_bias": True}),
        ("opt", ["fc1", "fc2"], {"rank_pattern": {"fc1": 4}, "alpha_pattern": {"fc2": 5}}),
        ("gpt_oss", ["q_proj"], {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        ("mixtral", ["q_proj"], {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        ("mixtral", ["q_proj"], {"target_parameters": ["mlp.experts.down_proj"]}),
        ("llama", ["q_proj"], {"trainable_token_indices": {"embed_tokens": [3, 7]}}),
    ],
)
def test_adapters_of_peft_are_merged_as_merge_and_unload_does(family, targets, options, families, tmp_path):
    base, adapted = trained(families, family, tmp_path, targets, **options)
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(families.logits(reloaded), families.logits(adapted), atol=2e-4, rtol=1e-4)
    theirs = dict(adapted.merge_and_unload().named_parameters())
    for name, mine in reloaded.named_parameters():
        assert torch.allclose(mine, theirs[name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "table"), [("gpt2", "wte"), ("opt", "embed_tokens"), ("llama", "embed_tokens")]
)
def test_an_embeddings_adapter_on_a_tied_table_unties_it(family, table, families, tmp_path, capsys):
    """As transformers #45127 has it: stored tied, the head would get the embedding's update on reload, or lose it."""
    model = {"model": {"tie_word_embeddings": True}}
    base, adapted = trained(families, family, tmp_path, [table], **model)
    wanted = families.logits(adapted)
    assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    assert "tie_word_embeddings: false" in capsys.readouterr().err
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert not reloaded.config.tie_word_embeddings
    assert torch.allclose(families.logits(reloaded), wanted, atol=2e-4, rtol=1e-4)
    assert torch.equal(reloaded.lm_head.weight, base.lm_head.weight)
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "tied", Options(keep_tied=True))
    tied = type(base).from_pretrained(tmp_path / "tied").eval()
    theirs = adapted.merge_and_unload()  # PEFT changes the shared table, so the head too
    assert torch.allclose(families.logits(tied), families.logits(theirs), atol=2e-3, rtol=1e-4)
    assert (families.logits(theirs) - wanted).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_which_only_one_side_can_be_changed_is_refused(families, tmp_path, capsys):
    trained(families, "t5", tmp_path, ["shared"])
    assert "--keep-tied" in refused(capsys, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "--keep-tied") == 0


@pytest.mark.filterwarnings("ignore")
def test_a_grown_vocabulary_comes_with_the_adapter(families, tmp_path):
    peft = pytest.importorskip("peft")
    base = families.model("llama")
    base.save_pretrained(tmp_path / "base")
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(44)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(grown, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert reloaded.config.vocab_size == 44
    assert torch.allclose(families.logits(reloaded), families.logits(adapted), atol=2e-5)


# --- several adapters ---------------------------------------------------------------------------------------


def test_the_record_is_never_written_over_what_is_read(small, tmp_path, capsys):
    base, one, _ = small
    weights = (one / "adapter_model.safetensors").read_bytes()
    assert run(base, f"{one}:0.5", tmp_path / "out", "--json", one / "adapter_model.safetensors") == 2
    assert "is read, so it is not written over" in capsys.readouterr().err
    assert (one / "adapter_model.safetensors").read_bytes() == weights and not (tmp_path / "out").exists()


def test_weighted_adapters_are_added_and_the_rest_is_copied(small, tmp_path, capsys):
    base, one, two = small
    assert run(base, f"{one}:0.5", f"{two}:-2", tmp_path / "out", "--json", tmp_path / "m.json") == 0
    before, after = tensors(base), tensors(tmp_path / "out")
    parts = [(read_adapter(one).layers, 0.5), (read_adapter(two).layers, -2.0)]
    assert after.keys() == before.keys()
    for name, old in before.items():
        layer = name.removesuffix(".weight")
        update = sum(w * layers[layer].delta_weight() for layers, w in parts if layer in layers)
        assert torch.allclose(after[name], old + update, atol=1e-5)
        assert torch.equal(after[name], old) or layer.endswith(".q")
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {each.name for each in base.iterdir()} - {"pytorch_model.bin"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    old = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        each.numel() * each.element_size() for each in after.values()
    )
    with safe_open(tmp_path / "out" / "model-1.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    record = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert {each["name"] for each in record["tensors"]} == {f"layers.{k}.q.weight" for k in range(2)}


def test_a_combination_cut_to_a_rank(small, tmp_path):
    base, one, two = small
    merge(base, [(one, 1.0), (two, 1.0)], tmp_path / "out", Options(rank=2))
    before, after = tensors(base), tensors(tmp_path / "out")
    whole = sum(read_adapter(each).layers["layers.0.q"].delta_weight() for each in (one, two))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    made = after["layers.0.q.weight"] - before["layers.0.q.weight"]
    assert torch.allclose(made, (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-4)


# --- half precision -----------------------------------------------------------------------------------------


def half_precision(folder, dtype=torch.bfloat16, scale=0.01):
    torch.manual_seed(0)
    W = torch.randn(96, 64).to(dtype)
    V = torch.randn(96, 64).to(dtype)
    save_file({"q.weight": W, "v.weight": V}, folder / "base.safetensors")
    write_adapter(folder / "a", {"q": drawn(96, 64, 2, 1, scale), "v": drawn(96, 64, 2, 2, 1.0)})
    return {"q.weight": W, "v.weight": V}, read_adapter(folder / "a").layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_swallows_is_measured(dtype, tmp_path, capsys):
    state, layers = half_precision(tmp_path, dtype)
    report = merge(tmp_path / "base.safetensors", [(tmp_path / "a", 1.0)], tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, old in state.items():
        delta = layers[name.removesuffix(".weight")].delta_weight()
        assert after[name].dtype == dtype and torch.equal(after[name], (old.float() + delta).to(dtype))
        lost = (delta - (after[name].float() - old.float())).norm() / delta.norm()
        assert report.tensors[name].swallowed == pytest.approx(float(lost), rel=1e-3)
        assert report.tensors[name].nearest == report.tensors[name].swallowed
    if dtype == torch.bfloat16:
        assert report.tensors["q.weight"].swallowed > 0.5 > 0.05 > report.tensors["v.weight"].swallowed
        assert run(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "again") == 0
        out = capsys.readouterr().out
        assert "--keep-float32" in out and "q.weight: " in out and "v.weight: " not in out


def test_what_would_be_lost_is_kept_in_float32(tmp_path, capsys):
    state, layers = half_precision(tmp_path)
    assert run(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out", "--keep-float32") == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after["q.weight"].dtype == torch.float32 and after["v.weight"].dtype == torch.bfloat16
    assert torch.allclose(
        after["q.weight"], state["q.weight"].float() + layers["q"].delta_weight(), atol=1e-6
    )
    assert "1 tensors are in float32" in capsys.readouterr().out


def test_stochastic_rounding_keeps_the_update_on_average(tmp_path):
    half_precision(tmp_path, scale=0.02)
    base, adapter = tmp_path / "base.safetensors", [(tmp_path / "a", 1.0)]
    nearest = merge(base, adapter, tmp_path / "n").tensors["q.weight"]
    random = merge(base, adapter, tmp_path / "s", Options(stochastic=5)).tensors["q.weight"]
    assert nearest.kept < 0.5 and random.kept == pytest.approx(1, abs=0.2), (nearest, random)
    assert random.nearest == pytest.approx(nearest.swallowed)
    merge(base, adapter, tmp_path / "again", Options(stochastic=5))
    merge(base, adapter, tmp_path / "other", Options(stochastic=6))
    s, again, other = (
        load_file(tmp_path / n / "model.safetensors")["q.weight"] for n in ("s", "again", "other")
    )
    assert torch.equal(s, again) and not torch.equal(s, other)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-6e4, max_value=6e4),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_a_random_rounding_is_one_of_the_two_neighbours_and_right_on_average(value, dtype, seed):
    values = torch.full((4000,), value)
    made = rounded(values, dtype, torch.Generator().manual_seed(seed)).float()
    low, high = float(made.min()), float(made.max())
    nearest = float(values[0].to(dtype))
    assert low <= value <= high or low == high == nearest
    assert len(made.unique()) <= 2
    gap = max(high - low, abs(nearest - value))
    assert abs(float(made.double().mean()) - value) <= 6 * gap / (2 * 4000**0.5) + 1e-30
    exact = torch.tensor([nearest])
    assert torch.equal(rounded(exact, dtype, torch.Generator().manual_seed(seed)).float(), exact)


# --- bad input ----------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints; it ends with code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("lora-edu merge: ") and err.count("\n") == 1, err
    return err


def test_what_does_not_fit_is_named(small, tmp_path, capsys):
    base, one, _ = small
    out = tmp_path / "out"
    write_adapter(tmp_path / "other", {"layers.9.q": drawn(24, 16)})
    write_adapter(tmp_path / "wide", {"layers.0.q": drawn(30, 16)})
    for adapter, said in (
        ("other", "layers.9.q is not in BASE"),
        ("wide", "layers.0.q is 30×16 in the adapter and 24×16 in BASE"),
        ("nowhere", "is no adapter"),
        ("base", "is no adapter"),
    ):
        assert said in refused(capsys, base, tmp_path / adapter, out)
    assert "is an adapter: BASE must be" in refused(capsys, one, one, out)
    assert "weight must be a finite number; got nan" in refused(capsys, base, f"{one}:nan", out)
    assert "rank must be" in refused(capsys, base, one, out, "--rank", 0)
    assert not out.exists()
    config = json.loads((one / "adapter_config.json").read_text(encoding="utf-8"))
    (one / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}), encoding="utf-8")
    assert "DoRA" in refused(capsys, base, one, out)


def test_out_is_new_and_apart_from_what_is_read(small, tmp_path, capsys):
    base, one, _ = small
    kept = {path: path.read_bytes() for folder in (base, one) for path in folder.iterdir()}
    for out, said in (
        (base, "what is read"),
        (one / "merged", "what is read"),
        (base / "config.json", "what is read"),
        (tmp_path / "two", "has something in it"),
        (tmp_path / "a" / "b", "no folder"),
    ):
        assert said in refused(capsys, base, one, out)
    assert kept == {path: path.read_bytes() for folder in (base, one) for path in folder.iterdir()}


def test_a_full_disk_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    base, one, _ = small
    names = sorted(each.name for each in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("write_safetensors", "_copy_others"):
        monkeypatch.setattr(command, name, full)
        assert "No space left on device" in refused(capsys, base, one, tmp_path / "out")
        monkeypatch.undo()
    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in refused(capsys, base, one, tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == names


def test_an_update_that_overflows_half_precision_is_refused(tmp_path, capsys):
    save_file({"q.weight": torch.full((8, 8), 6e4).half()}, tmp_path / "base.safetensors")
    factors = Factors(torch.full((1, 8), 100.0), torch.full((8, 1), 100.0), 1.0, False, 0.0, False)
    write_adapter(tmp_path / "a", {"q": factors})
    assert "infinite or NaN in F16" in refused(
        capsys, tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_nothing_outside_the_folder_is_copied_or_read(small, tmp_path, capsys):
    base, one, _ = small
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert run(base, one, tmp_path / "out") == 0
    assert "notes.txt" in capsys.readouterr().err and not (tmp_path / "out" / "notes.txt").exists()
    index = {"weight_map": {"layers.0.q.weight": "../secret.txt"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "leaves the folder" in refused(capsys, base, one, tmp_path / "again")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files_get_one_line_and_leave_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a.weight": torch.randn(6, 5), "b.weight": torch.randn(4)}, folder / "b.safetensors")
    write_adapter(folder / "a", {"a": drawn(6, 5)})
    victim = folder / data.draw(
        st.sampled_from(["b.safetensors", "a/adapter_model.safetensors", "a/adapter_config.json"])
    )
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    try:
        merge(folder / "b.safetensors", [(folder / "a", 1.0)], folder / "out")
    except (CheckpointError, AdapterError) as refusal:
        assert "\n" not in str(refusal) and not (folder / "out").exists()
    assert {each.name for each in folder.iterdir()} <= {"a", "b.safetensors", "out"}
    shutil.rmtree(folder)
