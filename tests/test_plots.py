"""Figures of recorded runs and of what they are compared with."""

import itertools

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


def test_two_methods_differ_in_nothing_but_what_is_lit():
    pictures = {}
    for part in plots.PARTS:
        _, axes = plots.subplots()
        drawn = plots.where_it_acts(axes, [part], plots.VERMILION)
        pictures[part] = [len(each.get_paths()) for each in drawn[1:4]]  # the model, not lit, lit
    added = {part: counts for part, counts in pictures.items() if part != "weights"}
    assert len({counts[0] for counts in added.values()}) == 1  # the model stays as it is
    assert len({counts[1] + counts[2] for counts in added.values()}) == 1 and all(
        c[2] for c in added.values()
    )
    assert pictures["weights"][0] < min(counts[0] for counts in added.values())
    # two factors beside each of the six matrices of a block, a bias on each of them and on the three norms
    assert (added["LoRA"][2], added["LoRA at the ends"][2], added["biases"][2]) == (12, 4, 9)


def test_no_part_of_the_diagram_stands_in_front_of_a_box_of_the_model():
    boxes = {name: box for name, (box, _) in plots._BLOCK.items()}
    shapes = {
        part: shapes for part, shapes in plots._added_parts().items() if part != "biases"
    }  # on the edge
    for part, (name, (left, bottom, width, height)) in itertools.product(shapes, boxes.items()):
        for shape in shapes[part]:
            of = shape.get_path().transformed(shape.get_patch_transform()).get_extents()
            apart = of.x1 <= left or of.x0 >= left + width or of.y1 <= bottom or of.y0 >= bottom + height
            assert apart, (part, name)


def test_a_part_that_is_none_is_refused_by_name():
    _, axes = plots.subplots()
    with pytest.raises(ValueError, match=r"the parts are weights, .*; got 'gate'"):
        plots.where_it_acts(axes, ["biases", "gate"])


def test_a_best_rate_at_the_edge_of_its_grid_is_marked_and_a_run_that_blew_up_is_shown():
    figure = plots.rate_panels(
        {"inside": {"": {0.1: 3.0, 0.2: 2.0, 0.4: None}}, "edge": {"r = 1": {0.1: 2.0, 0.2: 3.0}}}, columns=2
    )
    inside, edge = figure.axes
    marks = lambda axes: [line.get_marker() for line in axes.get_lines()]
    assert marks(inside) == [".", "x", "o"] and marks(edge) == [".", "x", "s"]
    cross = inside.get_lines()[1]
    assert cross.get_data()[0].tolist() == [0.4]
    inside.set_ylim(1.9, 2.5)  # a part of the losses: what blew up is seen all the same
    place = cross.get_transform().transform([(0.4, cross.get_ydata()[0])])[0]
    assert inside.get_window_extent().y0 < place[1] < inside.get_window_extent().y1
    assert edge.get_lines()[2].get_color() == "red"
    assert [line.get_data()[0].tolist() for line in (inside.get_lines()[2], edge.get_lines()[2])] == [
        [0.2],
        [0.1],
    ]


def test_quality_has_a_bar_over_the_seeds_and_a_hollow_mark_where_more_is_trained_than_stored():
    _, axes = plots.subplots()
    series = {"P-Tuning": ([1_600], [[5.3, 5.5]]), "prompt": ([400, 1_600], [[5.9], [5.7]])}
    looks = {"P-Tuning": (plots.ORANGE, "s"), "prompt": (plots.ORANGE, "o")}
    plots.quality_against(axes, series, looks, {"P-Tuning": [31_900], "prompt": [400, 1_600]})
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_data()[0].tolist() for line in hollow] == [[31_900]]
    bars = axes.collections[0].get_segments()
    assert bars[0][:, 1].tolist() == [5.3, 5.5] and axes.get_lines()[0].get_ydata().tolist() == [5.4]


def test_the_stairs_go_through_what_no_other_beats():
    _, axes = plots.subplots()
    points = {"a": (1, 5.0), "b": (2, 5.0), "c": (3, 4.0), "d": (4, 4.5), "e": (3, 4.0)}
    looks = dict.fromkeys(points, (plots.BLUE, "o"))
    drawn, best = plots.price_and_quality(axes, points, looks)
    assert best == [
        "a",
        "c",
        "e",
    ]  # b costs more than a, d is beaten by c; c and e are equal, and neither beats the other
    assert drawn[-1].get_xdata().tolist() == [1, 3, 3]


def test_before_and_after_stand_on_one_line():
    _, axes = plots.subplots()
    plots.before_and_after(axes, {"LoRA": (4.7, 4.4), "prompt": (5.7, 5.5)}, ("100 steps", "400 steps"))
    first, second = axes.get_lines()
    assert first.get_xdata().tolist() == [4.7, 5.7] and second.get_xdata().tolist() == [4.4, 5.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["100 steps", "400 steps"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["LoRA", "prompt"]


def test_a_line_without_rates_leaves_its_colour_to_nobody():
    lines = {"one": {0.1: 2.0, 0.2: 1.0, 0.4: 3.0}, "two": {}, "three": {0.1: 2.0, 0.2: 1.5, 0.4: 3.0}}
    axes = plots.rate_panels({"a": lines}).axes[0]
    named = {
        line.get_label(): line.get_color() for line in axes.lines if not line.get_label().startswith("_")
    }
    assert named == {"one": plots.PALETTE[0], "three": plots.PALETTE[2]}


def test_a_difference_is_blue_below_zero_red_above_and_grey_where_it_may_be_either():
    _, axes = plots.subplots()
    found = {"a": (-0.2, -0.3, -0.1), "b": (0.2, 0.1, 0.3), "d": (0.0, -0.1, 0.1)}
    plots.differences(axes, ["a", "b", "c", "d"], found, 0.05, "b")
    dots = {int(line.get_ydata()[0]): line for line in axes.lines if line.get_marker() == "o"}
    assert {y: line.get_color() for y, line in dots.items()} == {
        0: plots.BLUE,
        1: plots.VERMILION,
        3: plots.GREY,
    }
    assert dots[1].get_markersize() > dots[0].get_markersize() and axes.get_ylim() == (3.5, -0.5)
