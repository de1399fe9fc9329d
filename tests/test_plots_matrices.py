"""The figures of matrices draw what they are given: nothing cut off, areas that add up, the colours that are named."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lora_edu import lowrank, plots


def test_the_histogram_and_the_law_of_noise_have_one_scale():
    S = torch.linalg.svdvals(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)))
    edge = lowrank.random_matrix_edge(300, 200)
    places = torch.linspace(0.01, edge, 200)
    _, axes = plots.subplots()
    bars = plots.noise_histogram(axes, S, (places, lowrank.marchenko_pastur(places, 300, 200)), edge)[:32]
    area = sum(bar.get_height() * bar.get_width() for bar in bars)
    assert area == pytest.approx(float((edge >= S).float().mean()))


def test_what_stands_above_the_edge_is_marked_and_only_then():
    law = (np.linspace(0.1, 2, 50), np.ones(50))
    names = []
    for values in ([3.0, 1.5, 1.0], [1.5, 1.0]):
        _, axes = plots.subplots()
        plots.noise_histogram(axes, torch.tensor(values), law, edge=2.0)
        names.append([text.get_text() for text in axes.get_legend().get_texts()])
    assert "found above the edge" in names[0] and "found above the edge" not in names[1]


def test_the_spectrum_colours_what_is_kept():
    figure, axes = plots.subplots()
    kept, cut, edge = plots.spectrum(axes, torch.arange(10.0, 0, -1), kept=3, edge=4.5, title="kept: 3")
    assert list(kept.get_xdata()) == [1, 2, 3] and list(cut.get_ydata()) == [7, 6, 5, 4, 3, 2, 1]
    assert to_hex(kept.get_color()) == plots.BLUE.lower() and set(edge.get_ydata()) == {4.5}
    plots.to_png(figure)
    assert not plots.crowded(figure)


def test_several_lines_of_one_name_share_a_colour_and_an_entry():
    _, axes = plots.subplots()
    lines = plots.curves(axes, {"one": (range(4), np.ones((4, 3))), "other": (range(4), np.ones(4))})
    assert [line.get_color() for line in lines] == [plots.BLUE] * 3 + [plots.VERMILION]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]


def test_flat_ground_is_lit_evenly_and_a_slope_towards_the_light_is_brighter():
    _, (one, other, third) = plots.subplots(1, 3)
    east = np.tile(np.arange(20.0) * 60, (20, 1))  # rises towards the east, so it faces west
    flat, towards, away = (
        np.asarray(plots.relief(axes, heights).get_array())[5:-5, 5:-5]
        for axes, heights in ((one, np.zeros((20, 20))), (other, east), (third, -east))
    )
    assert np.ptp(flat) == 0 and towards.mean() > away.mean()


def test_dots_by_kind_stand_in_the_row_of_their_kind_and_bars_say_their_share():
    figure, (left, right) = plots.subplots(1, 2)
    values = {"one": {"query": [1.0, 2.0], "head": [5.0]}, "other": {"query": [3.0], "head": [4.0, 6.0]}}
    one, other = plots.dots_by_kind(left, values)
    assert [round(y) for y in one.get_ydata()] == [0, 0, 1] and list(other.get_xdata()) == [3.0, 4.0, 6.0]
    assert [text.get_text() for text in left.get_yticklabels()] == ["query", "head"]
    plots.paired_bars(right, {"lost": {"query": 0.5, "head": 0.25}, "kept": {"query": 0.1, "head": 1.0}})
    assert {text.get_text() for text in right.texts} == {"50%", "25%", "10%", "100%"}
    plots.to_png(figure)
    assert not plots.crowded(figure)
