"""Makes another reader's text: the library's sources with a tenth of the files left out and a tenth altered.

`python tools/altered_corpus.py FOLDER`, then `LORA_EDU_CORPUS=FOLDER make test`: a chapter whose stored output
or assertion hangs on the exact text fails. Altered files lose a fifth of their definitions and of the lines of
their docstrings, and all comments.
"""

import ast
import random
import sys
from pathlib import Path

from lora_edu.data import corpus


def alter(source: str, chance: random.Random) -> str:
    """The module with definitions and lines of docstrings dropped at random."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            kept = [
                part for part in node.body if not isinstance(part, ast.FunctionDef) or chance.random() > 0.2
            ]
            node.body = kept or [ast.Pass()]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count("\n") > 3:
            node.value = "\n".join(line for line in node.value.split("\n") if chance.random() > 0.2)
    return ast.unparse(tree)


def main(target: Path) -> None:
    chance = random.Random(0)
    files = [("stdlib/" + key, path) for key, path in corpus._code_files()]
    files += [
        *corpus._package_files(),
        ("stdlib/pydoc_data/topics.py", corpus._library() / "pydoc_data/topics.py"),
    ]
    needed = {"stdlib/os.py", "stdlib/pydoc_data/topics.py", "numpy/__init__.py", "matplotlib/__init__.py"}
    counts = {"kept": 0, "left out": 0, "altered": 0}
    for key, path in files:
        draw = 1.0 if key in needed else chance.random()
        if draw < 0.1:
            counts["left out"] += 1
            continue
        text = corpus._read_text(path)
        if draw < 0.2:
            try:
                text = alter(text, chance)
                counts["altered"] += 1
            except (SyntaxError, ValueError, RecursionError):
                counts["kept"] += 1
        else:
            counts["kept"] += 1
        copy = target / key
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/altered_corpus.py FOLDER")
    main(Path(sys.argv[1]))
