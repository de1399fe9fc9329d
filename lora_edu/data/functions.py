"""Functions of the standard library and what they say of themselves: pairs (docstring, source), split by module.

Chapter 11 finds a function by such a sentence, chapter 12 writes the sentence for a function. Read at run time from the
reader's own Python; nothing of it ships. Not for running text (corpus.py).
"""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_edu.data.corpus import SPLITS, read_documents, split_name

SHARES = (0.06, 0.40)  # validation, test: of modules; some 1 700 pairs are held out for testing
_SHORTEST, _LONGEST = 12, 20_000  # characters of a first line that says something; of source


class Function(NamedTuple):
    """A function with a docstring. module: path below the library; name: dotted, with its class; summary: the first
    paragraph of the docstring as one line; source: without the docstring, its indentation taken away; split: "train",
    "validation" or "test"; group: functions with the same summary have the same number."""

    module: str
    name: str
    summary: str
    source: str
    split: str
    group: int


def load_functions(split: str | None = None) -> list[Function]:
    """The functions and methods of the standard library that have a docstring, in the order of module and line.

    Those of one module are in one split, which depends on the module's name only. The source holds neither the
    docstring nor, anywhere else, its summary. Left out are functions whose body is the docstring alone, and copies: of
    the same source with the same summary the first stays. A summary that stands in training is not in a held-out split.
    Raises ValueError for another split, and FileNotFoundError where the library's source is not installed.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f'split must be "train", "validation", "test" or None for all; got {split!r}')
    groups: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    found: list[Function] = []
    for module, text in read_documents("code"):
        part = split_name(module, *SHARES)
        for name, summary, source in _functions(text):
            if (summary, source) in seen:
                continue
            seen.add((summary, source))
            group = groups.setdefault(_plain(summary), len(groups))
            found.append(Function(module, name, summary, source, part, group))
    trained_on = {each.group for each in found if each.split == "train"}
    kept = [each for each in found if each.split == "train" or each.group not in trained_on]
    return kept if split is None else [each for each in kept if each.split == split]


def _functions(text: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, summary, source without docstring) of every function with a docstring in a module's text."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from walk(child, prefix)
                continue
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                summary = summary_of(ast.get_docstring(child) or "")
                source = _without_docstring(child, lines) if len(summary) >= _SHORTEST else ""
                if source and len(source) <= _LONGEST and summary not in source:
                    yield name, summary, source
            yield from walk(child, f"{name}.")

    yield from walk(tree, "")


def summary_of(docstring: str) -> str:
    """A docstring's first paragraph as one line."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    return " ".join(paragraph.split())


def _without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's own lines but those of its docstring; "" where nothing else stands in its body.

    Docstrings of functions inside it go too.
    """
    if len(function.body) < 2:
        return ""
    gone: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            gone.update(range(text.lineno, text.end_lineno + 1))
    first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
    if function.body[0].lineno == function.lineno:  # all on one line
        return ""
    kept = [lines[i - 1] for i in range(first, function.end_lineno + 1) if i not in gone]
    return inspect.cleandoc("\n" + "\n".join(kept)) if kept else ""


def _plain(summary: str) -> str:
    return " ".join(re.findall(r"\w+", summary.lower()))
