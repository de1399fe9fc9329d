"""What is damaged, hostile or doesn't fit, for `inspect` and `resize`: one line, exit code 2, nothing half-written."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import small_adapters as made
import torch

from lora_edu import cli

COMMANDS = {
    "inspect": lambda adapter, tmp_path: ["inspect", str(adapter), "--json", str(tmp_path / "out")],
    "resize": lambda adapter, tmp_path: ["resize", str(adapter), str(tmp_path / "out"), "--rank", "2"],
}


def refused(arguments: list[str], capsys, *words: str) -> str:
    """The line that the command says; it ends with 2 and leaves nothing."""
    assert cli.main(arguments) == 2, capsys.readouterr()
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert not out and line.startswith(f"lora-edu {arguments[0]}: ") and "\x1b" not in err
    for word in words:
        assert word in line
    return line


def left(tmp_path: Path, *names: str) -> bool:
    """Whether nothing but the inputs is there, hidden or not."""
    return sorted(each.name for each in tmp_path.iterdir()) == sorted(names)


def without(key_end: str) -> dict:
    return {key: each for key, each in made.peft_tensors().items() if not key.endswith(key_end)}


def changed(key_end: str, change) -> dict:
    return {key: change(each) if key.endswith(key_end) else each for key, each in made.peft_tensors().items()}


BAD = {
    "one factor": (without("q_proj.lora_B.weight"), {}, "lora_A alone: the file is incomplete"),
    "mismatched": (changed("q_proj.lora_A.weight", lambda each: each[:4].clone()), {}, "must be (r, in)"),
    "no LoRA": ({"model.weight": torch.ones(2, 2)}, {}, "holds no LoRA tensor"),
    "integers": (
        changed("q_proj.lora_A.weight", lambda each: each.int()),
        {},
        "must be in F64, F32, F16, BF16",
    ),
    "other method": (None, {"peft_type": "LOHA"}, "peft_type must be LORA"),
    "alpha": (None, {"lora_alpha": "many"}, "alpha must be"),
    "hostile pattern": (None, {"alpha_pattern": {"(a+)+b": 2}}, "too involved to be matched safely"),
    "hostile alpha": (None, {"alpha_pattern": {"q_proj": float("inf")}}, "alpha must be"),
    "rank": (None, {"r": -3}, "r must be a whole number above 0"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_in_an_adapter(command, kind, tmp_path, capsys):
    tensors, settings, words = BAD[kind]
    folder = made.peft_folder(tmp_path / "a", tensors, **settings)
    refused(COMMANDS[command](folder, tmp_path), capsys, words)
    assert left(tmp_path, "a")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_adapter_at_all(command, tmp_path, capsys):
    arguments = lambda path: COMMANDS[command](path, tmp_path)
    refused(arguments(tmp_path / "nowhere"), capsys, "there is no adapter_config.json")
    (tmp_path / "empty").mkdir()
    refused(arguments(tmp_path / "empty"), capsys, "is no adapter")
    (tmp_path / "text.safetensors").write_text("no header")
    refused(arguments(tmp_path / "text.safetensors"), capsys, "damaged or truncated")
    pickled = made.peft_folder(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(arguments(pickled), capsys, "is a pickle, which can run any code when opened")
    deep = made.peft_folder(tmp_path / "deep")
    (deep / "adapter_config.json").write_text("[" * 100_000)
    refused(arguments(deep), capsys, "no JSON text")
    assert left(tmp_path, "empty", "text.safetensors", "pickled", "deep")


@pytest.mark.parametrize("command", COMMANDS)
def test_two_hundred_damaged_files(command, tmp_path, capsys):
    """Cut off or with bytes changed anywhere: figures, or one line; never a traceback, never half an output."""
    whole = (made.peft_folder(tmp_path / "a") / "adapter_model.safetensors").read_bytes()
    drawn, seen = random.Random(0), set()
    for number in range(200):
        data = bytearray(whole)
        if number % 2:
            del data[drawn.randrange(len(data)) :]
        else:
            for _ in range(drawn.randint(1, 8)):
                place = drawn.randrange(min(len(data), 900) if number % 4 else len(data))
                data[place] = drawn.randrange(256)
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(data)
        status = cli.main(COMMANDS[command](tmp_path / "a", tmp_path))
        out, err = capsys.readouterr()
        seen.add(status)
        if status == 2:
            assert not out and err.splitlines()[-1].startswith(f"lora-edu {command}: ") and "\x1b" not in err
            assert left(tmp_path, "a")
        else:
            assert status in (0, 1)
            path = tmp_path / "out"
            if path.is_dir():
                for each in path.iterdir():
                    each.unlink()
                path.rmdir()
            else:
                path.unlink()
    assert {0, 2} <= seen


def test_names_that_would_be_commands_or_markup(tmp_path, capsys):
    """A terminal's escape, a script: printed harmlessly, and text alone in the page."""
    A, B = made.pair()
    hostile = ["<script>alert(1)</script>", "\x1b[2J", '"><img src=x onerror=alert(1)>', "</script><b>&amp;"]
    tensors = {
        f"{made.PREFIX}{name}.lora_{side}.weight": each.clone()
        for name in hostile
        for side, each in (("A", A), ("B", B))
    }
    folder, page = made.peft_folder(tmp_path / "a", tensors), tmp_path / "page.html"
    assert cli.main(["inspect", str(folder), "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "?[2J" in out
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<img" not in text and "<b>" not in text and "\x1b" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


PLACES = {
    "the adapter itself": (lambda path: path / "a", "is there already"),
    "a file of it": (lambda path: path / "a" / "adapter_config.json", "is there already"),
    "inside of it": (lambda path: path / "a" / "new", "lies in the adapter's own folder"),
    "a folder with something in it": (lambda path: path / "full", "is there already"),
    "no folder": (lambda path: path / "none" / "new", "no such folder"),
    "a link": (lambda path: path / "link", "is there already"),
}


@pytest.mark.parametrize("place", PLACES)
def test_resize_writes_over_nothing(place, tmp_path, capsys):
    folder = made.peft_folder(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = {each: each.read_bytes() for each in folder.iterdir()}
    where, words = PLACES[place]
    refused(["resize", str(folder), str(where(tmp_path)), "--rank", "2"], capsys, words)
    assert {each: each.read_bytes() for each in folder.iterdir()} == before
    assert (tmp_path / "full" / "kept").read_text() == "kept" and left(tmp_path, "a", "full", "link")


def test_inspect_writes_over_nothing_that_it_reads(tmp_path, capsys):
    folder = made.peft_folder(tmp_path / "a")
    for option in ("--json", "--html"):
        for place, words in (
            (folder / "adapter_config.json", "is read, so it is not written over"),
            (folder, "it is a folder"),
            (tmp_path / "none" / "x", "no such folder"),
        ):
            refused(["inspect", str(folder), option, str(place)], capsys, words)
    refused(["inspect", str(folder), "--html", "-"], capsys, "a page isn't printed")


RULES = {
    "as large": (["--rank", "6"], "--rank must be below 6, the adapter's largest rank; got 6"),
    "larger": (["--rank", "600"], "--rank must be below 6"),
    "zero": (["--rank", "0"], "rank must be a whole number above 0"),
    "energy": (["--energy", "1.5"], "energy must be above 0 and at most 1"),
    "nan": (["--energy", "nan"], "energy must be above 0 and at most 1"),
    "error": (["--error", "1"], "error must be at least 0 and below 1"),
    "budget": (["--parameters", "5"], "nothing is left of the adapter"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_leave_nothing_or_change_nothing(rule, tmp_path, capsys):
    options, words = RULES[rule]
    folder = made.peft_folder(tmp_path / "a")
    refused(["resize", str(folder), str(tmp_path / "new"), *options], capsys, words)
    assert left(tmp_path, "a")


REFUSED = {
    "NaN": ({key: each * torch.nan for key, each in made.peft_tensors().items()}, {}, "infinite or NaN"),
    "PiSSA": (None, {"init_lora_weights": "pissa"}, "changes the base weights"),
    "DoRA": (None, {"use_dora": True}, "DoRA"),
    "other ranks than said": (None, {"r": 3}, "the files don't match"),
    "unknown setting": (None, {"quantum": 3}, "quantum=3 isn't supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_be_measured_but_not_cut(kind, tmp_path, capsys):
    tensors, settings, words = REFUSED[kind]
    folder = made.peft_folder(tmp_path / "a", tensors, **settings)
    refused(["resize", str(folder), str(tmp_path / "new"), "--energy", "0.9"], capsys, words)
    assert left(tmp_path, "a")


def test_a_file_needs_a_file(tmp_path, capsys):
    old = made.kohya_file(tmp_path / "old.safetensors")
    refused(["resize", str(old), str(tmp_path / "new"), "--rank", "2"], capsys, "must end in .safetensors")
    refused(["resize", str(old), str(old), "--rank", "2"], capsys, "is there already")
    assert left(tmp_path, "old.safetensors")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
from lora_edu import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="no limit on a file's size")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full(command, tmp_path):
    """A file may have 700 bytes: less than the factors, and less than the JSON."""
    folder = made.peft_folder(tmp_path / "a")
    run = [sys.executable, "-c", LIMITED, *COMMANDS[command](folder, tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"lora-edu {command}: ")
    assert left(tmp_path, "a")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_is_read_only(command, tmp_path, capsys):
    folder = made.peft_folder(tmp_path / "a")
    refused(COMMANDS[command](folder, Path("/proc")), capsys)
