"""`lora-edu count`: what it prints, and what it refuses."""

from lora_edu import counting


def test_command_line(capsys):
    assert counting.main(["gpt-2-xl", "--rank", "8", "--targets", "c_attn"]) == 0
    printed = capsys.readouterr().out
    assert "1600 × 4800" in printed and "2 457 600" in printed
    assert counting.main(["TinyLM", "--targets", "embedding,head", "--dtype", "float32"]) == 0
    assert "161 600" in capsys.readouterr().out
    assert counting.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(counting.ARCHITECTURES)
    assert counting.main(["--published"]) == 0
    assert "9 272-fold" in capsys.readouterr().out
    assert counting.main(["deberta-xxl"]) == 0
    assert "not worked out" in capsys.readouterr().out
    assert counting.main(["gtp-2"]) == 2
    assert "did you mean GPT-2" in capsys.readouterr().err
