"""Chapter 12's explorers draw the rows that they are given and say what is true of them."""

import functools

import pytest
from made_up_llm import FUNCTIONS, ROWS

from lora_edu import plots
from lora_edu.data import load_llm_functions, load_llm_runs
from lora_edu.explore import docstring_writer
from lora_edu.explore import five_cases as explorer_of
from lora_edu.explore.real_llm import OFFERED, draw_cases, writers
from lora_edu.five_cases import Case, cases, language_model


def case(name, width, trained=True, curves=("gentle", "steep")):
    cut = {each: {0: 0.1, 1: 0.4, 8: 0.8, 64: 0.99} for each in curves}
    found = (
        ({1: 0.7, 8: 0.9}, {1: 300 * width, 8: 2400 * width}, 10_000 * width) if trained else ({}, {}, None)
    )
    return Case(name, width, "nats a token", cut, *found, "all matrices")


MADE_UP = [
    case("TinyLM, far text", 100),
    case("TinyLM, near text", 100, curves=("gentle",)),
    case("rxnfp, reactions", 256, trained=False, curves=("one tuning",)),
    case("MiniLM, search", 384),
    language_model(ROWS),
]


@functools.cache
def drawn(name):
    if name == "five cases":
        return explorer_of(MADE_UP)
    return docstring_writer(ROWS, FUNCTIONS, ["C.f0", "C.f6"])


@pytest.mark.parametrize("name", ["writer", "five cases"])
def test_pictures_are_whole_and_each_says_something_of_its_own(name):
    explorer = drawn(name)
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)
    assert explorer.bytes <= 15_000 * len(explorer.pictures) or name == "five cases"


def test_writers_are_the_untuned_model_lora_by_rank_at_its_tuned_rate_and_full_tuning():
    rows = writers(ROWS)
    assert list(rows) == ["untuned", "LoRA r = 1", "LoRA r = 4", "LoRA r = 8", "full tuning"]
    assert [row["rate"] for row in rows.values()] == [None, 2e-3, 2e-3, 2e-3, 1e-4]
    assert {row["seed"] for row in rows.values()} == {None, 0}
    with pytest.raises(ValueError, match="the untuned model's row"):
        writers(ROWS[2:])


def test_what_is_written_is_said_with_its_loss_and_size_and_whether_it_ended():
    pictures = drawn("writer").pictures
    assert pictures["LoRA r = 8", "C.f0"].sentence == (
        "LoRA r = 8 at a rate of 0.002, 9.77 MB: 2.70 nats a token on held-out answers, one seed. For C.f0 the library "
        "has “Return the 0th thing.”; the model writes “lora 8 writes 0.”."
    )
    assert pictures["untuned", "C.f6"].sentence == (
        "Untuned: 3.60 nats a token on held-out answers, one seed. For C.f6 the library has “Return the 6th thing.”; "
        "the model writes “on and on” and does not end there."
    )
    assert "538 MB" in pictures["full tuning", "C.f0"].sentence
    with pytest.raises(ValueError, match="nothing was written for 'C.f1'"):
        docstring_writer(ROWS, FUNCTIONS, ["C.f0", "C.f1"])


def test_long_names_sources_and_answers_stay_within_the_picture():
    long = {
        "module": "a/long/path/to/a/module_of_the_library.py",
        "name": "AClassWithALongName.and_a_method_with_one",
    }
    long |= {
        "summary": "Return " + "many words " * 20,
        "source": "def f(self):\n" + f"    x = {'y' * 90}\n" * 30,
        "tokens": 24,
    }
    other = long | {"name": "AnotherClassWithAnEvenLongerName.and_a_method_with_a_much_longer_one"}
    rows = [row | {"answers": ["wordwithoutend" * 9, "two\nlines"]} for row in ROWS]
    explorer = docstring_writer(rows, [long, other])
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert (
        "writes “two ⏎ lines” and does not end there" in explorer.pictures["untuned", other["name"]].sentence
    )


def test_a_rank_is_said_for_every_case_and_full_tuning_is_no_cut():
    said = drawn("five cases").pictures[(8,)].sentence
    assert said.startswith(
        "r = 8. TinyLM, far text (8 % of 100): cut, gentle 80%, steep 80%, trained 90% (240,000 numb"
    )
    assert "rxnfp, reactions (3.1 % of 256): cut, 80% of the way; MiniLM" in said
    assert said.endswith(
        "SmolLM2, docstrings (1.4 % of 576): cut, gentle 80%, steep 75%, trained 80% (2,442,240 numbers)."
    )
    assert [r for (r,) in drawn("five cases").pictures] == [1, 8, 64]
    assert "trained" not in drawn("five cases").pictures[(64,)].sentence


def test_without_a_rank_the_figure_stands_for_itself():
    figure = plots.figure((7.2, 3.9))
    said = draw_cases(figure, MADE_UP)
    left, right = figure.axes
    assert "five cases" in said and left.get_title("left") == "ΔW cut to r: of its own gain"
    assert len(left.get_legend().get_texts()) == 5
    x, y = left.lines[-2].get_data()  # the last curve: SmolLM2, steep
    assert list(x) == pytest.approx([100 * r / 576 for r in (1, 2, 8, 64)]) and y[0] == pytest.approx(0.25)
    curves = [line for line in right.lines if len(line.get_xdata()) == 3]
    assert list(curves[0].get_xdata()) == [305_280, 1_221_120, 2_442_240]


@pytest.mark.slow
def test_the_recorded_rows_are_drawn_within_the_budget():
    writer = docstring_writer(load_llm_runs(), load_llm_functions())
    assert len(writer.pictures) == 7 * OFFERED and writer.bytes <= 500_000
    assert list(writers(load_llm_runs())) == [
        "untuned",
        *(f"LoRA r = {r}" for r in (1, 4, 8, 16, 64)),
        "full tuning",
    ]
    five = explorer_of(cases())
    assert len(five.pictures) == 7 and five.bytes <= 500_000
    for explorer in (writer, five):
        assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
