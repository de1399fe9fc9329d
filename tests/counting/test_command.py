"""`lora-edu count`: what it prints, and what it refuses."""

import json

import pytest

from lora_edu import counting


def test_a_model_by_name(capsys):
    assert counting.main(["gpt-2-xl", "--rank", "8", "--targets", "c_attn"]) == 0
    printed = capsys.readouterr().out
    assert "1600 × 4800" in printed and "2 457 600" in printed
    assert counting.main(["TinyLM", "--targets", "embedding,head", "--dtype", "float32"]) == 0
    assert "161 600" in capsys.readouterr().out
    assert counting.main(["deberta-xxl"]) == 0
    assert "not worked out" in capsys.readouterr().out


def test_the_list_and_the_counts_in_print(capsys):
    assert counting.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(counting.ARCHITECTURES)
    assert counting.main(["--published"]) == 0
    assert "9 272-fold" in capsys.readouterr().out


@pytest.mark.parametrize(
    "same",
    [
        (["--dtype", "bf16"], ["--dtype", "bfloat16"]),
        (["--optimizer", "sgd"], ["--optimiser", "sgd"]),
        (["--targets", "all-linear"], ["--targets", "attention", "mlp"]),
        (["--targets", "query,value"], []),
        (["--batch", "1"], []),
    ],
    ids=lambda same: " ".join(same[0]),
)
def test_other_spellings_say_the_same(same, capsys):
    printed = []
    for arguments in same:
        assert counting.main(["Llama-3.1-8B", *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_reader_s_own_model(tmp_path, capsys):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, "vocab_size": 500}))
    assert counting.main([str(tmp_path), "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path.name}: LoRA of rank 4")
    assert "512 × 64" in printed and "256 × 64" in printed, (
        "Qwen 3 has heads of 128 where a config says nothing"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gtp-2"], "unknown architecture 'gtp-2'; did you mean GPT-2"),
        (["gpt-2", "--batch", "0"], "batch must be a whole number, 1 or more; got 0"),
        (["gpt-2", "--sequence", "-5"], "sequence must be a whole number, 1 or more; got -5"),
        (["gpt-2", "--sequence", "0"], "sequence must be a whole number, 1 or more; got 0"),
        (["gpt-2", "--rank", "0"], "rank must be between 1 and 768"),
        (["gpt-2", "--rank", "-3"], "rank must be between 1 and 768"),
        (["gpt-2", "--dtype", "bf17"], "unknown dtype 'bf17'; did you mean"),
        (["gpt-2", "--optimizer", "adamm"], "unknown optimiser 'adamm'; did you mean adam"),
        (["gpt-2", "--targets", ","], "targets must name at least one matrix"),
        (["deberta-xxl", "--batch", "0"], "batch must be a whole number"),
        (["./no-such-folder"], "there is no ./no-such-folder. Nothing is fetched"),
    ],
)
def test_what_can_t_be_counted_is_one_line(arguments, message, capsys):
    assert counting.main(arguments) == 2
    out, error = capsys.readouterr()
    assert (
        error.startswith(f"lora-edu count: {message}")
        and error.count("\n") == 1
        and out == "Nothing was counted.\n"
    )
