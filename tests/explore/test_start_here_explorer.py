"""Chapter 00's explorer and pictures show texts, losses and shapes as they are."""

import functools

import pytest

from lora_edu import plots
from lora_edu.explore import what_each_rank_writes

PROMPT = "Return the array"
TEXTS = {
    0: PROMPT + " of $self._x$\n            if not $x:\n\x0c\tyield" + " a_long_name," * 12,
    1: PROMPT,
    8: PROMPT + ".\n\nParameters\n----------\n" + "x : ndarray\n" * 30,
    16: PROMPT + "x" * 400,
}
LOSSES = {0: 5.95, 1: 4.70, 8: 4.27, 16: 4.1}
SIZES = {1: 70_744, 8: 504_872, 16: 1_001_000}


@functools.cache
def drawn():
    return what_each_rank_writes(PROMPT, TEXTS, LOSSES, SIZES, (5_464_336, 4.0))


def page(text, given="", **options):
    figure, axes = plots.subplots(size=(4.5, 3.1))
    plots.page_of_text(axes, text, given=given, **options)
    plots.to_png(figure)
    return figure, [words.get_text() for words in axes.texts]


def test_pictures_are_whole_and_within_the_budget():
    explorer = drawn()
    assert explorer.bytes <= 500_000
    assert not [picture.complaints for picture in explorer.pictures.values() if picture.complaints]


def test_the_sentence_says_loss_size_and_how_the_text_begins():
    said = {r: picture.sentence for (r,), picture in drawn().pictures.items()}
    assert said[8].startswith("With the adapter of rank 8, 505 kB: 4.27 nats a token")
    assert "it writes “. Parameters ---------- x : ndarray" in said[8]
    assert (
        said[0].startswith("The base, without an adapter: 5.95 nats") and "of $self._x$ if not $x:" in said[0]
    )
    assert len(said[16]) < 250


def test_a_page_shows_the_words_that_it_is_given_and_nothing_of_them_as_a_formula():
    figure, lines = page(TEXTS[0], PROMPT)
    assert lines[0] == PROMPT and lines[1] == " " * len(PROMPT) + " of $self._x$"
    assert lines[2] == "            if not $x:", "a dollar is a dollar, and indents stay"
    assert "\x0c" not in "".join(lines) and "\t" not in "".join(lines)
    words = "".join("".join(lines).split())
    assert words == "".join(TEXTS[0].split()), "wrapping loses no letter"
    assert not plots.crowded(figure)


@pytest.mark.parametrize("text", [TEXTS[8], TEXTS[16], "x" * 5000, "\n" * 50, ""])
def test_a_page_holds_what_fits(text):
    figure, lines = page(text)
    assert len(lines) <= 13 and all(len(line) <= 52 for line in lines)
    assert not plots.crowded(figure)


def test_a_page_must_begin_as_said():
    with pytest.raises(ValueError, match="must begin with 'Return'"):
        page("Yield", "Return")


def test_the_picture_of_lora_is_to_scale():
    figure, axes = plots.subplots(size=(7.2, 3.0))
    plots.to_scale(axes, 10_000, 100, 8)
    plots.to_png(figure)
    assert not plots.crowded(figure)
    areas = {}
    for patch in axes.patches:
        areas.setdefault(patch.get_facecolor()[:3], []).append(patch.get_width() * patch.get_height())
    assert sorted(map(sum, areas.values())) == [8 * 10_000 + 8 * 100, 10_000 * 100]
    boxes = [patch.get_window_extent() for patch in axes.patches]
    ratio = {round(b.width / p.get_width(), 3) for b, p in zip(boxes, axes.patches, strict=True)}
    assert len(ratio) == 1 and axes.get_aspect() == 1, "one scale for all, both ways"
    with pytest.raises(ValueError, match="strips must divide the 10000 rows; got 3"):
        plots.to_scale(axes, 10_000, 100, 8, strips=3)
