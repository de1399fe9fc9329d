"""Figures of recorded runs and of what they are compared with."""

import pytest
from matplotlib.colors import to_hex

from lora_edu import plots


def test_a_twin_is_dashed_in_the_colour_of_its_line_and_has_no_entry_of_its_own():
    figure, axes = plots.subplots()
    ranks, found = [1, 2, 4], {"query": [3, 2, 1], "head": [1, 2, 2]}
    lines = plots.curves_with_twins(
        axes,
        {name: (ranks, values) for name, values in found.items()},
        {"head": ([1, 4], [1.5, 1.5])},
        xlabel="rank r",
        title="dashed: full tuning",
    )
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
    query, head, twin = (to_hex(line.get_color()).upper() for line in lines)
    assert (query, head, twin) == (plots.BLUE, plots.VERMILION, plots.VERMILION)
    assert list(lines[1].get_ydata()) == found["head"] and set(lines[2].get_ydata()) == {1.5}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["query", "head"]
    plots.to_png(figure)
    assert not plots.crowded(figure)


def test_a_twin_of_no_line_is_refused_by_name():
    _, axes = plots.subplots()
    with pytest.raises(ValueError, match=r"name of a line \(query\); got 'hed'"):
        plots.curves_with_twins(axes, {"query": ([1], [1])}, {"hed": ([1], [1])})
