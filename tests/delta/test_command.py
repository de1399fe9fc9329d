"""`lora-edu delta` from end to end: folders, adapters, tables, JSON, figure, exit status and memory."""

import io
import json
import re
import struct
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from lora_edu import cli
from lora_edu.delta import compare, report
from lora_edu.delta.compare import kind
from lora_edu.lora import add_lora, lora_layers, save_adapter

RANKS = ("rank_50", "rank_90", "rank_99")


def delta(*arguments) -> int:
    return cli.main(["delta", *map(str, arguments)])


def state(seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    matrices = {
        f"model.layers.{i}.{n}.weight": torch.randn(40, 30) for i in range(3) for n in ("attn.q", "mlp.up")
    }
    return {name: each.to(dtype) for name, each in {**matrices, "model.norm.weight": torch.randn(30)}.items()}


def tuned(before: dict[str, torch.Tensor], rank: int = 2, size: float = 0.1) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    update = lambda W: size * torch.randn(W.shape[0], rank) @ torch.randn(rank, W.shape[1])
    return {
        name: (W.float() + (update(W) if W.ndim == 2 else size)).to(W.dtype) for name, W in before.items()
    }


@pytest.fixture
def pair(tmp_path):
    before = state()
    save_file(before, tmp_path / "before.safetensors")
    save_file(tuned(before), tmp_path / "after.safetensors")
    return tmp_path / "before.safetensors", tmp_path / "after.safetensors"


# --- what is shown ------------------------------------------------------------------------------------------


def test_tables_json_and_figure_say_the_same(pair, tmp_path, capsys):
    assert delta(*pair, "--json", tmp_path / "d.json", "--plot", tmp_path / "d.png") == 0
    out, err = capsys.readouterr()
    assert not err, "no progress bar where nobody looks"
    found = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    before, after = (load_file(path) for path in pair)
    assert [each["name"] for each in found["matrices"]] == [name for name in before if before[name].ndim == 2]
    for row in found["matrices"]:
        S = torch.linalg.svdvals(after[row["name"]].double() - before[row["name"]].double())
        assert row["shape"] == [40, 30] and row["kind"] in ("model.layers.*.attn.q", "model.layers.*.mlp.up")
        assert row["relative_norm"] == pytest.approx(
            float(S.norm() / before[row["name"]].double().norm()), rel=1e-5
        )
        assert (
            row["rank_99"] == 2 and row["above"] == 2 and row["marked"] == [] and row["status"] == "measured"
        )
        line = next(line for line in out.splitlines() if line.startswith(row["name"].removesuffix(".weight")))
        assert f"{row['relative_norm']:.3g}" in line and f"{row['stable_rank']:.3g}" in line
    kinds = {each["kind"]: each for each in found["kinds"]}
    assert kinds["model.layers.*.attn.q"]["matrices"] == 3 and "model.layers.*.attn.q (3)" in out
    assert kinds["model.layers.*.mlp.up"]["medians"]["rank_99"] == 2
    assert [each["name"] for each in found["vectors"]] == ["model.norm.weight"] and "model.norm (1)" in out
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert not list(tmp_path.glob(".d.*")), "written in one go"


def test_json_alone_on_the_standard_output(pair, capsys):
    assert delta(*pair, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["matrices"]) == 6 and found["made_by"] == "lora-edu delta"
    assert set(found["meaning"]) >= {"*", "floor", "equal"}


def test_below_the_floor_it_says_so_in_words(tmp_path, capsys):
    before = state(dtype=torch.bfloat16)
    save_file(before, tmp_path / "b.safetensors")
    gentle = {name: (W.float() * (1 + 1e-3 * torch.randn(W.shape))).bfloat16() for name, W in before.items()}
    save_file(gentle, tmp_path / "a.safetensors")
    assert delta(tmp_path / "b.safetensors", tmp_path / "a.safetensors") == 0
    out = capsys.readouterr().out
    assert re.search(r"layers\.0\.attn\.q .*\d\* .*  0  floor", out)
    words = " ".join(out.split())
    assert "ΔW is at or below the rounding floor" in words and "those of rounding noise" in words
    assert "3 floor" in out, "the summary counts them"
    rows = [line for line in out.splitlines() if line.startswith("model.layers.") and "floor" in line]
    assert all(line.count("*") >= 6 for line in rows)


def test_tables_fit_a_terminal(pair):
    found = compare(*pair)
    long = found.figures["model.layers.0.attn.q.weight"]
    wide = found._replace(figures={"base_model.decoder." * 5 + f"{i}.q_proj.weight": long for i in range(3)})
    for width in (100, 120, 200):
        lines = report.text(wide, width).splitlines()
        tables = [line for line in lines if "40×30" in line]
        assert len(tables) == 4 and max(map(len, tables)) <= width
        assert all("q_proj" in line for line in tables), "the end of a name is what tells"
    assert "base_model.decoder." * 5 in report.text(wide, None), "a pipe gets the names whole"


def test_a_long_list_is_cut_and_the_record_has_it_all(pair):
    found = compare(*pair)._replace(only_before=[f"n{i}" for i in range(50)])
    assert "  n19\n  and 30 more; --json lists all\n" in report.text(found, 100)
    assert len(report.record(found)["only_in_before"]) == 50


def test_kinds_are_names_without_the_layers_numbers():
    assert kind("h.3.attn.c_attn.weight") == "h.*.attn.c_attn"
    assert (
        kind("model.layers.12.block_sparse_moe.experts.7.w1.weight")
        == "model.layers.*.block_sparse_moe.experts.*.w1"
    )
    assert kind("blocks.0.attention.query.weight") == "blocks.*.attention.query"
    assert kind("conv1.weight") == "conv1" and kind("0.weight") == "*"


def test_the_figure_has_room_for_many_kinds_and_for_none(pair, tmp_path):
    found = compare(*pair)
    one = found.figures["model.layers.0.attn.q.weight"]
    for figures in ({}, {f"kind{chr(97 + i)}.q.weight": one for i in range(25)}):
        with Image.open(io.BytesIO(report.picture(found._replace(figures=figures)))) as picture:
            assert picture.height > 200


# --- what doesn't fit ---------------------------------------------------------------------------------------


def test_names_and_shapes_that_differ_are_listed_and_the_rest_is_measured(tmp_path, capsys):
    before, after = state(), tuned(state())
    before["old"], after["new"] = torch.ones(2, 2), torch.ones(3, 3)
    after["model.layers.0.attn.q.weight"] = torch.ones(41, 30)
    for each in (before, after):
        each["ids"] = torch.arange(4)
        each["eight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
        each["nothing"] = torch.ones(0, 4)
    after["model.layers.1.attn.q.weight"][0, 0] = torch.nan
    save_file(before, tmp_path / "b.safetensors")
    save_file(after, tmp_path / "a.safetensors")
    assert delta(tmp_path / "b.safetensors", tmp_path / "a.safetensors", "--json", tmp_path / "d.json") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["only_in_before"] == ["old"] and found["only_in_after"] == ["new"]
    assert list(found["shapes_differ"]) == ["model.layers.0.attn.q.weight"]
    assert set(found["not_measured"]) == {"ids", "eight", "nothing"}
    assert (
        "model.layers.0.attn.q.weight: (40, 30) → (41, 30)" in out
        and "Only in BEFORE, not compared (1):" in out
    )
    assert "  eight: F8_E4M3 (eight bits or fewer, quantised); measured are F64, F32, F16, BF16\n" in out
    assert "  ids: I64 (no floating point)" in out and "  nothing: empty, (0, 4)" in out
    states = {each["name"]: each["status"] for each in found["matrices"]}
    assert states.pop("model.layers.1.attn.q.weight") == "not finite" and set(states.values()) == {"measured"}
    assert "model.layers.1.attn.q.weight: NaN or infinite: 1 in AFTER" in out and "NaN/Inf" in out


def test_one_side_may_have_a_prefix_before_all_names(pair, tmp_path, capsys):
    bare = {name.removeprefix("model."): W for name, W in load_file(pair[0]).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    for way in ((tmp_path / "bare.safetensors", pair[1]), (pair[1], tmp_path / "bare.safetensors")):
        assert delta(*way, "--json", "-") == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["matrices"]) == 6 and len(found["vectors"]) == 1 and not found["only_in_after"]
        assert "have model. before them" in found["notes"][0]


def test_names_of_any_letters(tmp_path, capsys):
    """Half a character, mathematics for matplotlib, a terminal's commands, letters without a font."""
    names = ["\udc80", "$x^$ $y_$", "\x1b[2J\n", "層.0.重み", "a" * 300]
    header = {name: {"dtype": "F32", "shape": [4, 4]} for name in names}
    for number, entry in enumerate(header.values()):
        entry["data_offsets"] = [64 * number, 64 * number + 64]
    text = json.dumps(header).encode()
    for file in ("b", "a"):
        body = torch.randn(16 * len(names)).numpy().tobytes()
        (tmp_path / f"{file}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    pair = (tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert delta(*pair, "--json", tmp_path / "d.json", "--plot", tmp_path / "d.png") == 0
    out, err = capsys.readouterr()
    assert not err and "\x1b" not in out and "層.0.重み" in out
    found = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in found["matrices"]] == names


def test_nothing_in_common_is_one_line(pair, tmp_path, capsys):
    save_file({"other": torch.ones(2, 2)}, tmp_path / "c.safetensors")
    assert delta(pair[0], tmp_path / "c.safetensors") == 2
    err = capsys.readouterr().err
    assert "have no tensor's name in common" in err and "AFTER has other" in err and err.count("\n") == 1


def test_what_cannot_be_written_is_said_before_the_work(pair, tmp_path, capsys):
    for option in ("--json", "--plot"):
        for place, why in (
            (tmp_path, "it is a folder"),
            (tmp_path / "no" / "x", "no such folder"),
            (pair[1], "is read"),
        ):
            before = pair[1].read_bytes()
            assert delta(*pair, option, place) == 2
            assert why in capsys.readouterr().err
            assert pair[1].read_bytes() == before


def test_the_command_line_itself(pair):
    """Another process: its exit status, and no traceback."""
    run = [sys.executable, "-m", "lora_edu.cli", "delta"]
    done = subprocess.run([*run, str(pair[0]), "nowhere"], capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(b"lora-edu delta: there is no nowhere")


def test_a_home_folder_that_no_shell_has_put_in_is_found(pair, tmp_path, capsys, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    before, after = (f"~/{path.relative_to(tmp_path).as_posix()}" for path in pair)
    assert delta(before, after, "--json", "~/out.json", "--quiet") == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["matrices"]
    assert delta("~/nothing", after) == 2
    assert f"there is no {tmp_path / 'nothing'}" in capsys.readouterr().err


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_ours_is_measured_as_if_merged(tmp_path, capsys, rank_stabilised, dtype):
    model = tiny(vocabulary=50, width=16).to(dtype)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    ranks = {"embedding": 3, "query": 2, "mlp.0": 4}
    add_lora(model, ranks, 5, list(ranks), rank_stabilised=rank_stabilised)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter")
    assert delta(tmp_path / "base", tmp_path / "adapter", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["matrices"]}
    assert rows.keys() == {f"{name}.weight" for name in lora_layers(model)}
    for name, layer in lora_layers(model).items():
        S = torch.linalg.svdvals(layer.delta_weight().double())
        row = rows[f"{name}.weight"]
        assert row["delta_norm"] == pytest.approx(
            float(S.norm()), rel=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
        assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-2)
        assert row["rank_99"] <= layer.rank and row["floor"] is None and row["marked"] == []
        assert row["shape"] == list(layer.weight.shape) and row["method"] == "factors"
    assert "head.weight" in found["only_in_before"] and "embedding.weight" not in found["only_in_before"]


def test_an_untrained_adapter_one_for_another_model_and_one_in_the_wrong_place(tmp_path, capsys, pair):
    model = tiny()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    add_lora(model, 2, 4, ["query"])
    save_adapter(model, tmp_path / "adapter")
    assert delta(tmp_path / "base.safetensors", tmp_path / "adapter") == 0
    out = capsys.readouterr().out
    assert "2 equal" in out and "An adapter holds ΔW itself" in out
    assert delta(tmp_path / "adapter", tmp_path / "base.safetensors") == 2
    assert "is an adapter, which needs the weights" in capsys.readouterr().err
    assert delta(pair[0], tmp_path / "adapter") == 0  # its factors say all but ‖W‖
    assert "missing" in capsys.readouterr().out
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 40)
    assert delta(tmp_path / "base.safetensors", tmp_path / "adapter") == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err


def test_a_merged_adapter_and_its_folder_agree(tmp_path):
    model = tiny(width=16)
    state = {name: W.clone() for name, W in model.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    add_lora(model, 2, 4, ["embedding", "value", "mlp.2"])
    for name, layer in lora_layers(model).items():
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
        state[f"{name}.weight"] += layer.delta_weight().detach()
    save_adapter(model, tmp_path / "adapter")
    save_file(state, tmp_path / "merged.safetensors")
    whole = compare(tmp_path / "base.safetensors", tmp_path / "merged.safetensors").figures
    for name, row in compare(tmp_path / "base.safetensors", tmp_path / "adapter").figures.items():
        assert whole[name].delta_norm == pytest.approx(row.delta_norm, rel=1e-4)
        assert whole[name].effective_rank == pytest.approx(row.effective_rank, rel=0.02)
        assert all(getattr(whole[name], each) == getattr(row, each) for each in RANKS)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_on_conv1d_and_on_an_embedding(tmp_path, capsys):
    """GPT-2 stores its linear layers transposed, and GPT2Model names them without `transformer.`."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    model.transformer.save_pretrained(tmp_path / "bare")
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc", "wte"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for base, prefix in (("base", "transformer."), ("bare", "")):
        assert delta(tmp_path / base, tmp_path / "adapter", "--json", "-") == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["matrices"]}
        assert len(rows) == 5
        for name in ("wte", "h.0.attn.c_attn", "h.1.mlp.c_fc"):
            layer = adapted.base_model.model.get_submodule(f"transformer.{name}")
            expected = layer.get_delta_weight("default").double()
            row = rows[f"{prefix}{name}.weight"]
            S = torch.linalg.svdvals(expected)
            assert row["delta_norm"] == pytest.approx(float(S.norm()), rel=1e-5)
            assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-5)
            assert row["shape"] == list(layer.get_base_layer().weight.shape)


# --- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, psutil
from pathlib import Path
import lora_edu.delta
peak, done, smaps = 0, threading.Event(), Path("/proc/self/smaps_rollup")
def private():
    # pages that no file backs; where the system can't tell, what no other process has, libraries' code included
    if smaps.exists():
        return 1024 * next(int(line.split()[1]) for line in smaps.read_text().splitlines() if "Anonymous:" in line)
    return psutil.Process().memory_full_info().uss
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private())
bare = private()
watcher = threading.Thread(target=watch)
watcher.start()
lora_edu.delta.compare(*sys.argv[1:])
done.set()
watcher.join()
print(peak - bare)
"""


def test_memory_is_that_of_one_matrix_whatever_the_checkpoint_holds(tmp_path):
    """Four times the largest matrix in float32, at most: a tall one, a wide one, and square ones, the largest."""
    torch.manual_seed(0)
    shapes = {f"tall{i}": (5000, 780) for i in range(3)} | {"wide": (780, 5000), "square": (2000, 2000)}
    before = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    after = {name: (W.float() * 1.1 + 0.1 * torch.randn(W.shape)).bfloat16() for name, W in before.items()}
    save_file(before, tmp_path / "b.safetensors")
    save_file(after, tmp_path / "a.safetensors")
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(tmp_path / "b.safetensors"),
        str(tmp_path / "a.safetensors"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 4 * 2000 * 2000
