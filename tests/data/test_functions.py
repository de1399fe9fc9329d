"""Functions of the standard library with what they say of themselves: nothing of the sentence is left in the source."""

import ast

import pytest

from lora_edu.data import functions
from lora_edu.data.functions import load_functions, summary_of

SOURCE = '''
def one(x):
    """Give the number that comes after x.

    More about it."""
    return x + 1


class Thing:
    """A thing of some kind, for a test."""

    @property
    def size(self):
        """Say how large the thing is."""

        def inside():
            """A function inside another one."""
            return 1

        return self.x + inside()

    def empty(self):
        """Do nothing, and say so at length."""

    def short(self):
        """Go."""
        return 2

    def tells(self):
        """Return what it says of itself."""
        return "Return what it says of itself."
'''


def test_the_source_is_the_functions_own_without_its_docstrings():
    found = {name: (summary, source) for name, summary, source in functions._functions(SOURCE)}
    assert found == {
        "one": ("Give the number that comes after x.", "def one(x):\n    return x + 1"),
        "Thing.size": (
            "Say how large the thing is.",
            "@property\ndef size(self):\n\n    def inside():\n        return 1\n\n    return self.x + inside()",
        ),
        "Thing.size.inside": ("A function inside another one.", "def inside():\n    return 1"),
    }
    assert list(functions._functions("def broken(:")) == []


def test_a_summary_is_the_first_paragraph_on_one_line():
    assert summary_of("  One\n    two.\n\n    Three.") == "One two." and summary_of("") == ""


def test_modules_are_apart_copies_are_gone_and_no_held_out_summary_stands_in_training(monkeypatch):
    one = 'def f(x):\n    """Say the same thing as before."""\n    return x\n'
    other = one.replace("return x", "return 2 * x")
    texts = [(f"m{i}.py", one) for i in range(20)] + [
        (f"n{i}.py", other.replace("2", str(i + 3))) for i in range(40)
    ]
    texts += [(f"k{i}.py", one.replace("same", f"same{i}")) for i in range(40)]
    monkeypatch.setattr(functions, "read_documents", lambda name: texts)
    found = load_functions()
    assert len({(each.summary, each.source) for each in found}) == len(found)
    assert {each.split for each in found} == {"train", "validation", "test"}
    training = {each.group for each in found if each.split == "train"}
    held_out = [each for each in found if each.split != "train"]
    assert held_out and not any(each.group in training for each in held_out)
    assert [*load_functions("train"), *load_functions("validation"), *load_functions("test")] == sorted(
        found, key=lambda each: ("train", "validation", "test").index(each.split)
    )
    with pytest.raises(ValueError, match='split must be "train", "validation", "test" or None'):
        load_functions("held out")


def test_the_library_has_enough_of_them_and_says_nothing_twice():
    found = load_functions()
    split = {name: [each for each in found if each.split == name] for name in ("train", "validation", "test")}
    assert len(split["train"]) > 2_000 and len(split["validation"]) > 150 and len(split["test"]) > 1_400
    modules = [{each.module for each in some} for some in split.values()]
    assert not (modules[0] & modules[2]) and not (modules[0] & modules[1]) and not (modules[1] & modules[2])
    assert all(each.summary not in each.source for each in found)
    for each in found[::97]:
        tree = ast.parse(each.source)
        assert ast.get_docstring(tree.body[0]) is None, each.name
