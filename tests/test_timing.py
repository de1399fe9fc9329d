"""Taking turns: who is called when, and what a ratio is of. No clock is asserted."""

import pytest

from lora_edu import timing


def test_every_call_comes_once_a_round_and_first_in_turn(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr(timing.time, "process_time", lambda: clock[0])

    def takes(name, seconds):
        def call():
            called.append(name)
            clock[0] += seconds * (1 + len(called))  # the machine slows down

        return call

    taken = timing.in_turns({"a": takes("a", 1), "b": takes("b", 2), "c": takes("c", 0)}, repeats=3, warm=1)
    assert "".join(called) == "abcbcacabab" + "c"
    # calls 4 to 12 count: a at 6, 8, 10; b at 4, 9, 11
    assert taken["a"] == [7, 9, 11] and taken["b"] == [10, 20, 24] and taken["c"] == [0, 0, 0]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    seconds = {"a": [1.0, 10.0, 2.0], "b": [2.0, 30.0, 4.0]}
    assert timing.ratios(seconds, "a") == {"a": 1, "b": 2}  # 2, 3, 2
    with pytest.raises(KeyError, match="'c' was not timed; there are: a, b"):
        timing.ratios(seconds, "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": {}}, "calls must hold at least one name and function; got none"),
        ({"calls": {"a": int}, "repeats": 0}, "repeats must be a whole number, 1 or more; got 0"),
        ({"calls": {"a": int}, "warm": -1}, "warm must be a whole number, 0 or more; got -1"),
    ],
)
def test_nothing_to_time_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timing.in_turns(**options)
