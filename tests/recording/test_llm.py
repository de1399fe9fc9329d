"""Chapter 12's record: which runs there are, what one leaves behind, cuts, intruders, memory; every wanted row."""

import json
from itertools import pairwise

import pytest
import tiny_language_model as tiny
import torch
from made_up_rows import all_rows
from safetensors.torch import load, save_file

from lora_edu import docstrings, lowrank
from lora_edu.data import load_llm_functions, load_llm_memory, load_llm_runs, load_llm_spectra
from lora_edu.data.runs import method_grid, tuned_method, tuned_rate
from lora_edu.lora import lora_layers, quantise_model
from lora_edu.recording import llm, real_models
from lora_edu.recording.methods import name_of

transformers = pytest.importorskip("transformers")
# A loss whose best rate is known: log2 of its distance from it.
BEST = {
    "full": 3e-4,
    "lora": 5e-3,
    "lora attention": 1.6e-2,
    "lora MLP": 5e-3,
    "lora table": 5e-2,
    "lora NF4": 5e-3,
}
SUBJECT = llm.SUBJECT


def low_of(rows):
    return real_models.how_low(SUBJECT, rows, llm.STEPS)


def test_every_grid_grows_until_its_best_lies_inside_then_come_seeds_the_two_ends_and_the_quantised_base():
    rows, steps = all_rows(llm.wanted, [], BEST), llm.STEPS
    others = [(method, SUBJECT.rank) for method in list(SUBJECT.targets)[1:]]
    for method, size in [("full", None), *(("lora", r) for r in SUBJECT.grids), *others]:
        best = tuned_method(rows, llm.TASK, method, size, steps)
        assert best is not None and 0.7 < best["rate"] / BEST[method] < 1.5
        rates = [row["rate"] for row in method_grid(rows, llm.TASK, method, size, steps)]
        assert len(rates) >= 3 and all(1.9 < b / a < 2.1 or method == "full" for a, b in pairwise(rates))
    seeds_at = lambda method, size, rate: {
        row["seed"] for row in rows if (row["method"], row["size"], row["rate"]) == (method, size, rate)
    }
    for rank in SUBJECT.ranks:
        rate = tuned_rate(rows, llm.TASK, "lora", rank, steps)
        assert seeds_at("lora", rank, rate) == ({0, 1, 2} if rank == SUBJECT.rank else {0})
    lora = tuned_rate(rows, llm.TASK, "lora", SUBJECT.rank, steps)
    quantised = [row for row in rows if row["method"] == llm.QUANTISED]
    assert [(row["size"], row["rate"], row["seed"]) for row in quantised] == [(8, lora, 0), (8, lora, 1)]
    full = tuned_rate(rows, llm.TASK, "full", None, steps)
    low = {(run["rate"], run["seed"]) for run in low_of(rows)}
    assert low == {(float(f"{full * factor:.3g}"), seed) for factor in (0.25, 2) for seed in (0, 1)}
    assert low <= {(row["rate"], row["seed"]) for row in rows if row["method"] == "full"}
    assert len(llm.tuned(rows)) == len(SUBJECT.ranks) + 2 + 3 + 3 + 2
    looked_at = llm.to_look_for_intruders(rows)
    assert [
        (row["method"], row["rate"] > {"lora": lora, "full": full}[row["method"]]) for row in looked_at
    ] == [
        ("lora", False),
        ("lora", True),
        ("full", True),
    ]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A Llama of two layers in the real one's place, and a dozen functions in the library's."""
    (tmp_path / "runs").mkdir()
    tiny.save(transformers, tmp_path / "model")
    monkeypatch.setenv("LORA_EDU_LANGUAGE_MODEL", str(tmp_path / "model"))
    found = tiny.functions(12)
    parts = {"train": found, "validation": found[:6], "test": found}
    monkeypatch.setattr(real_models.retrieval, "load_pairs", lambda: parts)
    sizes = {"BATCH": 4, "VALIDATED": 4, "TESTED": 12, "CUT_ON": 6, "WRITTEN": 3}
    for name, number in sizes.items():
        monkeypatch.setattr(llm, name, number)
    draw = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(3, 20, (2, 10), generator=draw) for name in ("prose", "code")}
    monkeypatch.setattr(llm, "windows", lambda: texts)
    caches = llm.opened, llm.pairs, real_models.texts
    for each in caches:
        each.cache_clear()
    yield tmp_path / "runs"
    for each in caches:
        each.cache_clear()


def run_of(method, size, rate=1e-2):
    return {"task": llm.TASK, "method": method, "size": size, "rate": rate, "steps": 9, "seed": 0}


@pytest.mark.parametrize(
    "run",
    [run_of("lora", 2), run_of("full", None, 3e-3), run_of("lora table", 2), run_of("lora NF4", 2)],
    ids=name_of,
)
def test_a_run_is_done_once_and_what_it_left_gives_the_same_loss(small, monkeypatch, run):
    before = llm.loss_on(llm.untuned(), "validation")
    row = llm.record(run, small)
    assert row["validation"] < before - 0.05 and row["seconds"] >= 0
    # full tuning's ΔW is kept in half precision
    assert llm.loss_on(llm.trained_again(run, small), "validation") == pytest.approx(
        row["validation"], abs=2e-3
    )
    found = llm.tested(run, small)
    assert len(found["nats"]) == 12 and len(found["answers"]) == 3
    tokens = [len(pair.answer) for pair in llm.pairs("test")[1]]
    assert found["test"] == pytest.approx(sum(found["nats"]) / sum(tokens), abs=2e-3)
    half = llm.docstrings.spread(list(range(12)), 6)
    part = sum(found["nats"][i] for i in half) / sum(tokens[i] for i in half)
    assert found["cut_on"] == pytest.approx(part, abs=2e-3)
    monkeypatch.setattr(real_models, "train", None)  # neither is done again
    monkeypatch.setattr(llm, "measured", None)
    assert llm.record(run, small) == row and llm.tested(run, small) == found
    assert json.loads((small / f"{name_of(run)}.json").read_text()) == row


def test_a_rate_that_is_too_large_is_a_row_without_a_loss(small, monkeypatch):
    def explode(*args, **kwargs):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(real_models, "train", explode)
    row = llm.record(run_of("lora", 2, 99.0), small)
    assert row["validation"] is None and row["failed"] == "step 3: loss nan"
    assert llm.to_look_for_intruders([row]) == []


def test_lora_sits_on_the_matrices_that_its_name_says(small):
    names = {method: set(lora_layers(llm.apply(llm.untuned(), method, 2))) for method in SUBJECT.targets}
    assert len(names["lora attention"]) == 8 and len(names["lora MLP"]) == 6
    assert names["lora table"] == {"model.embed_tokens"}  # and not the head
    assert names["lora"] == names["lora attention"] | names["lora MLP"]
    kinds = {llm.kind_of(f"{name}.weight") for name in names["lora"] | names["lora table"]}
    assert kinds == set(llm.KINDS)
    assert llm.kind_of("model.layers.3.self_attn.q_proj.weight") == "query"
    assert llm.kind_of("model.norm.weight") is None and llm.kind_of("lm_head.weight") is None


# ---- cuts and intruders ------------------------------------------------------------------------------------------


def leave(run, delta, folder):
    """ΔW in place of a full tuning that was done; what isn't named stays."""
    base = real_models.weights_of(llm.untuned())
    whole = {name: delta.get(name, torch.zeros_like(W)).half().contiguous() for name, W in base.items()}
    save_file(whole, folder / f"{name_of(run)}.safetensors")
    return base


def test_a_cut_to_the_full_rank_changes_nothing_and_to_none_leaves_the_norms(small):
    run = run_of("full", None, 1e-2)
    llm.record(run, small)
    row = llm.cut(run, small)
    whole = llm.loss_on(llm.trained_again(run, small), "test", llm.CUT_ON)
    assert row["whole"] == whole == pytest.approx(row["cut"]["32"], abs=1e-3)
    assert row["cut"]["64"] == row["cut"]["32"] != row["cut"]["1"]
    untuned = llm.loss_on(llm.untuned(), "test", llm.CUT_ON)
    base, delta = real_models.weights_of(llm.untuned()), real_models.deltas(run, small)
    norms = {name: each for name, each in delta.items() if "norm" in name}
    assert len(norms) == 5
    of_norms = llm.loss_on(real_models.moved(llm.untuned(), base, norms), "test", llm.CUT_ON)
    assert row["cut"]["0"] == of_norms != untuned
    assert list(row["one_kind_cut"]) == list(llm.KINDS) == list(row["spectra"])
    layers = {kind: len(sizes) for kind, sizes in row["sizes"].items()}
    assert layers == dict.fromkeys(llm.KINDS, 2) | {"table": 1}
    assert len(row["sigma"]) == 15 and all(s == sorted(s, reverse=True) for s in row["sigma"].values())
    assert set(load(real_models.spectra([run | row]))) == {f"{name_of(run)}/{name}" for name in row["sigma"]}
    again = llm.cut(dict(run) | {"seed": 0}, small)
    assert again == row


def test_the_table_and_the_head_are_cut_together(small):
    """Tied, they stay one matrix: a ΔW of the table moves the logits, too."""
    run = run_of("full", None, 5e-3)
    base = leave(run, {}, small)
    assert "model.embed_tokens.weight" in base and "lm_head.weight" not in base
    leave(run, {"model.embed_tokens.weight": torch.randn(base["model.embed_tokens.weight"].shape)}, small)
    model = llm.trained_again(run, small)
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight)
    assert not model.lm_head.weight.equal(base["model.embed_tokens.weight"])
    row = llm.cut(run, small)
    assert row["cut"]["0"] == llm.loss_on(llm.untuned(), "test", llm.CUT_ON) != row["whole"]


NAME = "model.layers.1.mlp.down_proj.weight"


def planted(small, number=1):
    """(run, W): a 'full tuning' that only adds directions to one matrix, each as unlike all of W's as can be."""
    run = run_of("full", None, 4e-3)
    W = real_models.weights_of(llm.untuned())[NAME]
    U, S, Vh = lowrank.svd(W)
    n = len(S)
    signs = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(number)]
    )  # Walsh's
    left, right = signs @ U.T / n**0.5, signs @ Vh / n**0.5
    size = torch.tensor([4.0 - i / 10 for i in range(number)]) * S[0]
    leave(run, {NAME: (left.T * size) @ right}, small)
    return run, W


def test_planted_intruders_are_found_and_taken_out_and_at_one_nothing_changes(small):
    run, _ = planted(small)
    row = llm.intruding(run, small)
    assert row["number"] == pytest.approx(1 / 14, abs=1e-3) == row["share"]
    untuned = llm.loss_on(llm.untuned(), "test", llm.CUT_ON)
    whole = llm.loss_on(llm.trained_again(run, small), "test", llm.CUT_ON)
    assert row["scaled"]["1"]["task"] == row["control"]["1"]["task"] == pytest.approx(whole, abs=1e-3)
    away = {name: abs(row["scaled"][name]["task"] - untuned) for name in ("0", "1")}
    assert away["0"] < 0.3 * away["1"]
    for text in ("prose", "code"):
        before = docstrings.text_loss(llm.untuned(), llm.windows()[text])
        assert abs(row["scaled"]["0"][text] - before) < 0.5 * abs(row["scaled"]["1"][text] - before)
    assert row["control"]["0"] != row["control"]["1"]
    assert row["control"]["0"] != row["scaled"]["0"]
    assert llm.intruding(run, small) == row


def test_without_an_intruder_nothing_is_scaled(small):
    run = run_of("full", None, 4e-3)
    base = leave(run, {}, small)
    leave(run, {name: W / 10 for name, W in base.items() if llm.kind_of(name)}, small)
    row = llm.intruding(run, small)
    assert row["number"] == row["share"] == 0
    assert len({json.dumps(each) for what in ("scaled", "control") for each in row[what].values()}) == 1


def test_the_control_takes_as_many_as_there_are_intruders(small, monkeypatch):
    """Eight of the ten strongest are intruders; the others' directions come from further down."""
    run, W = planted(small, 8)
    seen = []
    moved = real_models.moved
    monkeypatch.setattr(
        real_models, "moved", lambda model, base, delta: seen.append(delta) or moved(model, base, delta)
    )
    row = llm.intruding(run, small)
    assert row["number"] == pytest.approx(8 / 14, abs=1e-3) and row["share"] == pytest.approx(
        1 / 14, abs=1e-3
    )
    tuned = W + real_models.deltas(run, small)[NAME]
    gone = [int(torch.linalg.matrix_rank(tuned - W - delta[NAME], tol=1e-3)) for delta in seen]
    # trained_again first, then intruders at 0 and 1 and the others at 0
    assert gone == [0, 8, 0, 8]


# ---- memory ------------------------------------------------------------------------------------------------------


def test_memory_is_measured_with_the_base_that_was_written(small, tmp_path, monkeypatch):
    folder = tmp_path / "bases"
    folder.mkdir()
    llm.write_bases(folder)
    trained = []
    monkeypatch.setattr(real_models, "train", lambda model, *_: trained.append(model))
    rows = [llm.memory(base, "lora", folder) for base in llm.BASES] + [llm.memory("float32", "full", folder)]
    assert [(row["base"], row["method"]) for row in rows] == [
        *((b, "lora") for b in llm.BASES),
        ("float32", "full"),
    ]
    files = [row["file"] for row in rows]
    assert files[0] == files[3] > files[1] > files[2] and files[1] < 0.6 * files[0]
    assert all(row["peak"] >= 0 for row in rows)
    quantised = llm.untuned()
    quantise_model(quantised)
    expected = [llm.untuned(), llm.untuned().bfloat16(), quantised, llm.untuned()]
    for model, like in zip(trained, expected, strict=True):
        assert llm.loss_on(model, "test") == pytest.approx(llm.loss_on(like, "test"), abs=2e-3)
    free = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in trained]
    assert free[0] == free[1] == free[2] < free[3] == sum(p.numel() for p in llm.untuned().parameters())


# ---- what was recorded -------------------------------------------------------------------------------------------


def test_every_wanted_row_is_recorded_and_every_tuned_one_measured():
    rows, functions = load_llm_runs(), load_llm_functions()
    assert [row["method"] for row in rows[:2]] == ["none", "none NF4"]
    own, tokens = rows[2:], sum(each["tokens"] for each in functions)
    assert {name_of(row) for row in own} == {name_of(run) for run in llm.wanted(own)}
    measured = {name_of(row) for row in llm.tuned(own)}
    assert measured == {name_of(row) for row in own if "nats" in row}
    sources = [each for each in functions if "source" in each]
    assert len(functions) == llm.TESTED and len(sources) == llm.WRITTEN
    for row in (*rows[:2], *llm.tuned(own)):
        assert len(row["nats"]) == llm.TESTED and len(row["answers"]) == llm.WRITTEN
        assert row["test"] == pytest.approx(sum(row["nats"]) / tokens, abs=1e-3)
        assert row["chrf"] == pytest.approx(
            docstrings.chrf(row["answers"], [each["summary"] for each in sources]), abs=0.01
        )
        found = sum(map(docstrings.is_imperative_line, row["answers"])) / llm.WRITTEN
        assert row["imperative"] == pytest.approx(found, abs=1e-3)
    for method, size in dict.fromkeys((row["method"], row["size"]) for row in own):
        if method != llm.QUANTISED:  # which has LoRA's rate
            assert tuned_rate(own, llm.TASK, method, size, llm.STEPS) is not None, (method, size)
    low = [row for row in own if "cut" in row]
    assert {name_of(row) for row in low} == {name_of(run) for run in low_of(own)}
    spectra = load_llm_spectra()
    assert set(spectra) == {name_of(row) for row in low}
    for row in low:
        assert list(row["cut"]) == [str(r) for r in (llm.CUT_AGAIN if row["seed"] else llm.CUT_TO)]
        assert len(spectra[name_of(row)]) == 211  # seven matrices in each of 30 layers, and the table
        for name, sigma in spectra[name_of(row)].items():
            assert sigma[0] == sigma.max() and llm.kind_of(name) in llm.KINDS
    looked_at = {name_of(row) for row in llm.to_look_for_intruders(own)}
    assert looked_at == {name_of(row) for row in own if "intruders" in row}
    for row in own:
        if "intruders" in row:
            assert set(row["intruders"]["scaled"]) == set(row["intruders"]["control"]) == {"0", "1"}


def test_memory_of_every_base_is_recorded():
    rows = {(row["base"], row["method"]): row for row in load_llm_memory()}
    assert set(rows) == {*((base, "lora") for base in llm.BASES), ("float32", "full")}
    files = [rows[base, "lora"]["file"] for base in llm.BASES]
    assert files[0] > 1.9 * files[1] > 1.9 * files[2]
    assert all(0 < row["loaded"] < row["peak"] for row in rows.values())
    assert rows["float32", "full"]["peak"] > rows["float32", "lora"]["peak"] > rows["NF4", "lora"]["peak"]
