"""Chapter 04's explorers say what counting says, and the calculator answers any input with a sentence."""

import functools

import pytest

from lora_edu import counting
from lora_edu.explore import calculator, rank_and_shape, table_and_square, which_matrices
from lora_edu.explore import counting as explorers

PICTURES = 60
BYTES = 500_000


@functools.cache
def drawn(make):
    return make()


@pytest.mark.parametrize("make", [rank_and_shape, table_and_square, which_matrices])
def test_pictures_are_whole_and_within_the_budget(make):
    explorer = drawn(make)
    assert len(explorer.pictures) <= PICTURES and explorer.bytes <= BYTES
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]
    assert len({picture.sentence for picture in explorer.pictures.values()}) == len(explorer.pictures)


def test_the_sentences_hold_the_numbers():
    shapes = drawn(rank_and_shape).pictures
    assert "80 800 numbers, 8.08%" in shapes["10 000 × 100 (our table)", 8].sentence
    assert "200% of the 10 000 in W" in shapes["100 × 100 (our W_q)", 100].sentence
    tables = drawn(table_and_square).pictures
    assert "0.20% of its table (a square matrix's: 0.39%)" in tables[128_256, 4096].sentence
    models = drawn(which_matrices).pictures
    expected = counting.spaced(counting.count("GPT-3 175B", ("query", "value"), 8).parameters)
    assert f"{expected} numbers to train" in models["GPT-3 175B", "W_q and W_v"].sentence


def test_parts_of_a_fused_matrix_are_shown_where_they_are_chosen():
    roles = [row.role for row in explorers.other_rows(counting.count("GPT-2", ("query", "value"), 8))]
    assert roles == ["embedding", "query", "key", "value", "output", "up", "down", "head"]
    roles = [row.role for row in explorers.other_rows(counting.count("GPT-2", "attention", 8))]
    assert roles == ["embedding", "query_key_value", "output", "up", "down", "head"]


def test_calculator_follows_its_fields():
    widget = calculator()
    shown = widget.text
    assert "4 194 304, 0.39% of them" in shown and "tuned fully instead   6.44 GB" in shown
    assert widget._repr_mimebundle_()["text/plain"] == shown  # what a reader without a kernel sees
    widget.fields["rows"].value = 10_000
    widget.fields["columns"].value = 100
    widget.fields["copies"].value = 1
    assert "80 800, 8.08% of them" in widget.output.value
    widget.fields["dtype"].value = "int4"
    assert "A and B in float32    323 kB" in widget.text and "tuned fully" not in widget.text
    widget.fields["optimiser"].value = "sgd"
    assert "state of sgd          0 B" in widget.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "rank",
            5000,
            "rank must be between 1 and 4096 (the smaller side of the 4096 × 4096 weight); got 5000",
        ),
        ("rank", 0, "got 0"),
        ("rows", -3, "rows must be a whole number, 1 or more; got -3"),
        ("copies", 0, "matrices must be a whole number, 1 or more; got 0"),
    ],
)
def test_calculator_says_what_is_wrong_and_recovers(field, value, message):
    widget = calculator()
    before = widget.text
    kept = widget.fields[field].value
    widget.fields[field].value = value
    assert message in widget.text and "<pre" in widget.output.value
    widget.fields[field].value = kept
    assert widget.text == before
