"""`--text`: the held-out loss beside each rank, against a model whose weights were changed by hand."""

import json
import warnings

import pytest
import small_adapters as made
import torch
from torch.nn import functional as F

from lora_edu import cli, lowrank
from lora_edu.adapters import text_loss
from lora_edu.delta import CheckpointError
from lora_edu.lora import AdapterError, read_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")

SENTENCE = "Energy is not behaviour. "


def tokenizer(folder):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made_of_bytes = tokenizers.Tokenizer(
        tokenizers.models.BPE({each: i for i, each in enumerate(letters)}, [])
    )
    made_of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made_of_bytes).save_pretrained(folder)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, max_position_embeddings=64, tie_word_embeddings=False, **sizes
        )
    ).eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, a text, and an adapter of every kind of layer that text_loss has to cut."""
    work = tmp_path_factory.mktemp("text")
    base = llama()
    base.save_pretrained(work / "base")
    tokenizer(work / "base")
    (work / "text.txt").write_text(SENTENCE * 20, encoding="utf-8")
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=6, lora_alpha=12, target_modules=targets, rank_pattern={"q_proj": 20})
    )
    for name, each in theirs.named_parameters():
        if "lora_" in name:
            each.data = 0.3 * torch.randn_like(each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(work / "adapter")
    return work


def by_hand(work, ranks) -> float:
    """The loss with W + the truncation of ΔW in every layer's place."""
    model, ids = llama(), torch.tensor(list(SENTENCE.encode() * 20))
    table = {each: i for i, each in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    space = {32: "Ġ"}
    ids = torch.tensor([table[space.get(int(each), chr(int(each)))] for each in ids])
    for name, factors in read_adapter(work / "adapter").layers.items():
        rank = min(ranks(factors), *factors.sides)
        if rank:
            model.get_submodule(name).weight.data += lowrank.truncate(factors.delta_weight(), rank)
    total = 0.0
    windows = [each for each in ids.split(64) if len(each) > 1]
    with torch.no_grad():
        for each in windows:
            total += float(F.cross_entropy(model(each[None]).logits[0, :-1], each[1:], reduction="sum"))
    return total / sum(len(each) - 1 for each in windows)


def test_each_cut_has_the_loss_of_the_truncated_weights(work):
    held = text_loss.open_text(work / "base", work / "text.txt")
    before = {name: each.clone() for name, each in held.model.state_dict().items()}
    rows = {row.title: row for row in text_loss.losses(held, work / "adapter", text_loss.USUAL)}
    assert rows["base"].loss == pytest.approx(by_hand(work, lambda factors: 0), rel=1e-5)
    assert rows["0"].loss == rows["base"].loss and rows["0"].energy == 0 and rows["r"].energy == 1
    assert rows["r/4"].loss == pytest.approx(by_hand(work, lambda factors: -(-factors.rank // 4)), rel=1e-4)
    assert rows["r/2"].loss == pytest.approx(by_hand(work, lambda factors: -(-factors.rank // 2)), rel=1e-4)
    assert rows["r"].loss == pytest.approx(by_hand(work, lambda factors: factors.rank), rel=1e-4)
    assert len({round(row.loss, 4) for row in rows.values()}) == 4
    after = held.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert held.predicted == 500 - 8  # of 64 letters 63 are predicted


def test_inspect_and_resize_print_it(work, tmp_path, capsys):
    options = ["--text", str(work / "text.txt"), "--model", str(work / "base"), "--tokens", "200"]
    assert (
        cli.main(["inspect", str(work / "adapter"), *options, "--quiet", "--json", str(tmp_path / "j")]) == 0
    )
    out = capsys.readouterr().out
    assert "Held-out loss, nats a token, on 196 tokens of text.txt" in out and "Energy is not" not in out
    found = json.loads((tmp_path / "j").read_text())
    assert {"base", "0", "r/4", "r/2", "r"} <= {row["title"] for row in found["losses"]}
    assert cli.main(["resize", str(work / "adapter"), str(tmp_path / "new"), "--rank", "2", *options]) == 0
    out = capsys.readouterr().out
    held = text_loss.open_text(work / "base", work / "text.txt", 200)
    again = text_loss.losses(held, tmp_path / "new", {"r": text_loss.whole})[-1].loss
    assert f"{again:.4f}" in next(line for line in out.splitlines() if line.startswith("new "))


def test_extract_prints_it_beside_what_the_full_fine_tune_has(work, tmp_path, capsys):
    tuned = llama()
    torch.manual_seed(3)
    for each in tuned.parameters():
        if each.dim() > 1:
            each.data += 0.1 * torch.randn_like(each)
    tuned.save_pretrained(tmp_path / "after")
    capsys.readouterr()
    run = [
        "extract",
        str(work / "base"),
        str(tmp_path / "after"),
        str(tmp_path / "out"),
        "--rank",
        "16",
        "--quiet",
    ]
    assert cli.main([*run, "--text", str(work / "text.txt"), "--tokens", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held = text_loss.open_text(work / "base", work / "text.txt", 200)
    full = text_loss.loss_of(held, tmp_path / "after")
    assert lines[-1] == f"AFTER itself, the full fine-tune: {full:.4f}"
    at_r = float(next(line for line in lines if line.startswith("r  ")).split()[3])
    assert at_r == pytest.approx(full, abs=2e-4)  # of matrices with a side of 16, all is kept


def wrong(work, tmp_path) -> dict[str, tuple]:
    """What is wrong → (model, text, tokens, words of the message)."""
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve " * 30)
    return {
        "no text": (work / "base", tmp_path / "none.txt", 100, "none.txt can't be read"),
        "one token": (work / "base", tmp_path / "short.txt", 100, "it has 1 tokens"),
        "no UTF-8": (
            work / "base",
            tmp_path / "latin.txt",
            100,
            "must be plain text in UTF-8: invalid continuation byte",
        ),
        "no model": (tmp_path, work / "text.txt", 100, "it has no config.json"),
        "few tokens": (work / "base", work / "text.txt", 1, "--tokens must be at least 2"),
    }


def test_what_cannot_be_opened(work, tmp_path):
    for model, text, tokens, words in wrong(work, tmp_path).values():
        with pytest.raises(CheckpointError, match=words) as caught:
            text_loss.open_text(model, text, tokens)
        assert "\n" not in str(caught.value)


def test_a_model_that_is_no_causal_language_model(work, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=256, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"looks at the tokens that follow|lacks weights"):
        text_loss.open_text(tmp_path / "bert", work / "text.txt")


def test_code_and_pickles_in_a_folder_are_not_run(work, tmp_path):
    base = llama()
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    base.config.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="can't be opened by transformers"):
        text_loss.open_text(tmp_path, work / "text.txt")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Mine")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="can't be opened by transformers"):
        text_loss.open_text(tmp_path, work / "text.txt")
    assert not (tmp_path / "ran").exists()


def test_options_that_need_each_other_and_an_adapter_of_another_model(work, tmp_path, capsys, monkeypatch):
    adapter = str(work / "adapter")
    assert cli.main(["inspect", adapter, "--text", "x"]) == 2
    assert "--text needs the base to measure the loss of: --model FOLDER" in capsys.readouterr().err
    assert cli.main(["inspect", adapter, "--model", "x"]) == 2
    assert "give --text FILE, too" in capsys.readouterr().err
    other = made.peft_folder(tmp_path / "other")
    options = ["--text", str(work / "text.txt"), "--model", str(work / "base")]
    assert cli.main(["resize", str(other), str(tmp_path / "new"), "--rank", "2", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()
    held = text_loss.open_text(work / "base", work / "text.txt", 100)
    with pytest.raises(AdapterError, match="in the adapter and"):
        text_loss.losses(held, other, text_loss.USUAL)
    monkeypatch.setattr(text_loss.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["inspect", adapter, *options]) == 2
    assert "transformers, which is not installed: pip install transformers" in capsys.readouterr().err
