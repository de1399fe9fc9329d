"""Names, bytes, nearness and ranks, as the whole package says them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_edu.text import check_rank, did_you_mean, format_bytes, nearest, printable


@given(st.text(st.characters()), st.integers(1, 200))
def test_whatever_is_printable_can_be_printed_and_is_short(text, most):
    shown = printable(text, most)
    assert shown.isprintable() and len(shown) <= most + 1
    shown.encode("utf-8")  # half a surrogate pair can't
    if text.isprintable() and len(text) <= most:
        assert shown == text


def test_a_value_that_is_no_text_is_shown_as_python_writes_it():
    assert printable({"r": [1, None]}) == "{'r': [1, None]}"
    assert printable("a\x1b[31mb") == "a?[31mb"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (840, "840 B"),
        (999.6, "1 kB"),
        (70_744, "70.7 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (4_210_000, "4.21 MB"),
        (37_748_736, "37.7 MB"),
        (2.5e9, "2.5 GB"),
        (9.99e14, "999 TB"),
        (1.5e15, "1,500 TB"),
    ],
)
def test_bytes_read_to_three_digits_in_units_of_1000(number, text):
    assert format_bytes(number) == text


@given(st.floats(1, 1e18))
def test_bytes_as_text_are_right_to_half_a_percent(number):
    digits, unit = format_bytes(number).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(digits.replace(",", "")) * scale / number - 1) <= (0.5 if unit == "B" else 0.005)
    assert unit == "TB" or float(digits) < 1000


def test_near_names_are_found_in_any_case():
    names = ["query", "key", "value", "Embedding"]
    assert nearest("QUERI", names) == ["query"] and nearest("embeding", names) == ["Embedding"]
    assert len(nearest("?", names, cutoff=0)) == 3 and nearest("?", names) == []
    assert did_you_mean("valu", names) == "; did you mean value?" and did_you_mean("?", names) == "."


def test_a_rank_is_a_whole_number_that_the_matrix_can_have():
    assert check_rank(np.int64(8), (10, 8)) == 8 and check_rank(9, (10, 8), bounded=False) == 9
    for rank, said in ((2.0, "got 2.0"), (True, "got True"), ("3", "got '3'"), (None, "got None")):
        with pytest.raises(ValueError, match=f"^rank must be a whole number; {said}$"):
            check_rank(rank, (10, 8))
    for rank in (0, 9):
        rule = rf"^rank must be between 1 and 8 \(the smaller side of the 10 × 8 head\); got {rank}$"
        with pytest.raises(ValueError, match=rule):
            check_rank(rank, (10, 8), "head")
    with pytest.raises(ValueError, match="got 0"):
        check_rank(0, (10, 8), bounded=False)
