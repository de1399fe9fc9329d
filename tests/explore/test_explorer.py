"""Explorers without a browser: which pictures are drawn, what stands in the widgets, what is refused and how."""

import base64
import gc
import html
import io
import re
import sys

import ipywidgets as widgets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_edu import plots
from lora_edu.explore import Explorer
from lora_edu.explore import explorer as module

SENTENCE = """The line has "slope 2" & it's <steep>."""


def line(figure, slope, offset=0):
    axes = figure.subplots()
    axes.plot([0, 1], [offset, offset + slope], color=plots.BLUE)
    axes.set(title=f"slope {slope}", xlabel="x", ylabel="y", ylim=(-1, 9))
    return f"A line of slope {slope} from {offset}."


def words(figure, word):
    figure.text(0.5, 0.5, str(word), ha="center")
    return f"The word {word}."


def explorer(draw=line, sliders=None, start=None, **options) -> Explorer:
    return Explorer(draw, sliders or {"slope": [0, 1, 2]}, start or {"slope": 1}, size=(3, 2), **options)


def leaves(widget: widgets.Widget) -> list[widgets.HTML]:
    """The pages below a Stack, in order."""
    if isinstance(widget, widgets.Stack):
        return [page for child in widget.children for page in leaves(child)]
    return [widget]


def stack_of(shown: Explorer) -> widgets.Stack:
    return next(child for child in shown.children if isinstance(child, widgets.Stack))


def shown_png(page: str) -> bytes:
    return base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', page)[1])


def test_one_slider_has_a_page_for_each_value_in_order():
    shown = explorer()
    assert list(shown.pictures) == [(0,), (1,), (2,)]
    pages = leaves(stack_of(shown))
    assert [shown_png(page.value) for page in pages] == [picture.png for picture in shown.pictures.values()]
    assert stack_of(shown).selected_index == 1


def test_two_sliders_nest_slowest_first():
    shown = explorer(sliders={"slope": [0, 1], "offset": [3, 4, 5]}, start={"slope": 1, "offset": 5})
    assert list(shown.pictures) == [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5)]
    stack = stack_of(shown)
    assert [len(inner.children) for inner in stack.children] == [3, 3]
    assert [inner.selected_index for inner in stack.children] == [2, 2]
    assert [html.unescape(re.search('alt="([^"]*)"', page.value)[1]) for page in leaves(stack)] == [
        f"A line of slope {slope} from {offset}." for slope in (0, 1) for offset in (3, 4, 5)
    ]


def test_every_stack_follows_its_slider_in_the_browser():
    shown = explorer(sliders={"slope": [0, 1], "offset": [3, 4, 5]}, start={"slope": 1, "offset": 5})
    outer, inner = shown.controls
    linked = {(link.source, link.target) for link in shown._links}
    stack = stack_of(shown)
    assert linked == {
        ((outer, "index"), (stack, "selected_index")),
        *(((inner, "index"), (below, "selected_index")) for below in stack.children),
    }


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_any_sentence_survives_as_alt_text_and_caption(sentence):
    page = module.page(module.Picture(PNG, sentence), 1)
    assert html.unescape(re.search('<img alt="([^"]*)"', page)[1]) == sentence
    assert html.unescape(re.search("<figcaption[^>]*>([^<]*)</figcaption>", page)[1]) == sentence


PNG = plots.to_png(plots.figure((1, 1)))


def test_the_outputs_bundle_serves_those_without_widgets():
    shown = explorer(draw=lambda figure, slope: line(figure, slope) and SENTENCE)
    data, metadata = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]) == shown.pictures[(1,)].png
    assert data["text/plain"] == SENTENCE
    assert metadata["image/png"] == {"width": 300, "height": 200, "alt": SENTENCE}


def test_the_same_figure_gives_the_same_bytes():
    assert explorer().pictures == explorer().pictures


def test_equal_pictures_are_stored_once():
    shown = explorer(draw=lambda figure, slope: line(figure, max(slope, 1)))
    assert shown.pictures[(0,)] == shown.pictures[(1,)] != shown.pictures[(2,)]
    assert shown.bytes == len(shown.pictures[(1,)].png) + len(shown.pictures[(2,)].png)
    assert len(set(leaves(stack_of(shown)))) == 2


def test_axes_do_not_move_between_pictures():
    """Tick labels of other widths would shift the axes; the frames' left edges must be on the same pixel."""

    def heights(figure, top):
        axes = figure.subplots()
        axes.plot([0, top])
        axes.set_title(f"up to {top}")
        return f"A line up to {top}."

    shown = explorer(heights, {"top": [1, 1000, 10**6]}, {"top": 1})
    edges = set()
    for picture in shown.pictures.values():
        grey = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
        edges.add(int(np.argmax((grey < 120).mean(axis=0) > 0.5)))
    assert len(edges) == 1


def test_a_small_coloured_dot_keeps_its_colour():
    def photograph(figure, seed):
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(np.random.default_rng(seed).random((60, 90)), cmap="gray", aspect="auto")
        axes.plot(45, 30, "o", color=plots.VERMILION, markersize=4)
        return f"Noise with the seed {seed}."

    for picture in explorer(photograph, {"seed": [0, 1]}, {"seed": 0}).pictures.values():
        image = Image.open(io.BytesIO(picture.png))
        assert len(image.getpalette()) // 3 <= 64
        wanted = np.array([int(plots.VERMILION[place : place + 2], 16) for place in (1, 3, 5)])
        distance = np.abs(np.asarray(image.convert("RGB")).astype(int) - wanted).max(axis=-1)
        assert distance.min() <= 12
        assert np.asarray(image.convert("RGB")).shape == (300, 450, 3)


def test_paper_stays_white():
    picture = explorer().pictures[(1,)]
    assert Image.open(io.BytesIO(picture.png)).convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_values_read_as_their_format_says():
    shown = explorer(formats={"slope": "{} m"}, labels={"slope": "how steep"})
    (slider,) = shown.controls
    assert [text for text, _ in slider.options] == ["0 m", "1 m", "2 m"]
    assert slider.description == slider.tooltip == "how steep"
    assert (slider.value, slider.label) == (1, "1 m")
    named = explorer(
        words, {"word": [0.1, 0.25]}, {"word": 0.1}, formats={"word": lambda share: f"{share:.0%}"}
    )
    assert [text for text, _ in named.controls[0].options] == ["10%", "25%"]
    assert [
        text for text, _ in explorer(words, {"word": [1e-3, 2.0]}, {"word": 2.0}).controls[0].options
    ] == [
        "0.001",
        "2",
    ]


def test_closing_leaves_no_widget_behind():
    before = set(widgets.Widget.get_manager_state()["state"])
    explorer(sliders={"slope": [0, 1], "offset": [3, 4]}, start={"slope": 1, "offset": 3}).close()
    assert set(widgets.Widget.get_manager_state()["state"]) == before


def test_crowded_titles_are_found():
    def crowded(figure, count):
        for axes in figure.subplots(1, count, squeeze=False)[0]:
            axes.set_title("a title that needs much more room than it has")
        return f"{count} axes."

    with_two = explorer(crowded, {"count": [1, 2]}, {"count": 1}).pictures[(2,)]
    assert any(complaint.startswith("overlap") for complaint in with_two.complaints)
    assert any(complaint.startswith("cut off") for complaint in with_two.complaints)
    assert not explorer().start.complaints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": {"slope": 7}}, r"start value of 'slope' must be one of \[0, 1, 2\]; got 7"),
        ({"start": {"other": 1}}, r"start must name a value for each slider \['slope'\]; got \['other'\]"),
        ({"sliders": {"slope": []}}, "slider 'slope' needs at least two values .* got"),
        ({"sliders": {"slope": [1]}}, "slider 'slope' needs at least two values"),
        ({"sliders": {"slope": [1, 2, 1]}}, "slider 'slope' has 1 more than once"),
        (
            {"sliders": {"slope": range(10), "offset": range(7)}, "start": {"slope": 1, "offset": 1}},
            r"at most 60 pictures .*; 10 × 7 values make 70: list fewer values",
        ),
        (
            {"sliders": {name: [0, 1] for name in "abc"}, "start": dict.fromkeys("abc", 1)},
            "an explorer has one slider or two .*; got 3",
        ),
        (
            {"formats": {"slope": "{:.0e}"}, "sliders": {"slope": [1, 1.01]}},
            "two values .* both read '1e\\+00'",
        ),
        ({"labels": {"slop": "x"}}, r"labels names 'slop', which is no slider \['slope'\]"),
        ({"formats": {"slop": "{}"}}, r"formats names 'slop', which is no slider \['slope'\]"),
        ({"colours": 1000}, "colours must be between 2 and 256 .*; got 1000"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        explorer(**options)


@pytest.mark.parametrize("result", [None, "", 3])
def test_a_picture_without_its_sentence_is_refused(result):
    with pytest.raises(TypeError, match="draw must return a sentence .*; got") as caught:
        explorer(draw=lambda figure, slope: result)
    assert "while drawing the picture for slope = 0" in caught.value.__notes__


def test_an_error_in_draw_says_for_which_values():
    def draw(figure, slope):
        return f"{1 / (slope - 2)}"

    with pytest.raises(ZeroDivisionError) as caught:
        explorer(draw=draw)
    assert caught.value.__notes__ == ["while drawing the picture for slope = 2"]


def test_a_refused_explorer_leaves_no_noise(monkeypatch):
    """`close` also runs when Python throws away an object whose making failed."""
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    with pytest.raises(ValueError, match="start value"):
        explorer(start={"slope": 7})
    gc.collect()
    assert not noise
