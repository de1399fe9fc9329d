"""Pictures behind sliders: each is drawn once, when the cell runs, and the browser switches between them.

Not for pictures that can't be listed ahead (a reader's own input): those ask the kernel.
"""

import base64
import html
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import ipywidgets as widgets
from IPython import get_ipython
from ipywidgets.widgets.widget_string import HTMLStyle
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox

from lora_edu import plots

# JupyterLab puts a broken link on each widget without a kernel, though these need none
WITHOUT_KERNEL = (
    ".{name} .jupyter-widgets-disconnected::before{{display:none!important}}"
    ".{name}.jupyter-widgets-disconnected::before{{display:none!important}}"
)
MOST_PICTURES = 60  # at about 60 ms and 8 kB each, what stays within 5 s and 0.5 MB


@dataclass(frozen=True)
class Picture:
    """One PNG, the sentence that says what it shows, and the texts in it that are cut off or overlap."""

    png: bytes
    sentence: str
    complaints: tuple[str, ...] = field(default=(), compare=False)


class Linked(widgets.VBox):
    """A box whose parts are linked to each other in the browser; closed, it takes them all with it."""

    _links: Sequence[widgets.Widget] = ()

    def close(self) -> None:
        """Takes the box, all its parts and their links out of the kernel and the browser."""
        links, self._links = self._links, ()
        for part in [*links, *(parts(self) - {self} if links else ())]:
            part.close()
        super().close()


class Explorer(Linked):
    """One or two sliders above the picture for their values; without widgets, the picture for `start`.

    pictures: (value, …) in the sliders' order → Picture. seconds: what drawing them took.
    bytes: their PNGs together, a picture that occurs twice counted once.
    """

    def __init__(
        self,
        draw: Callable[..., str],
        sliders: Mapping[str, Sequence[Hashable]],
        start: Mapping[str, Hashable],
        size: tuple[float, float] = plots.SIZE,
        *,
        labels: Mapping[str, str] | None = None,
        formats: Mapping[str, str | Callable[[Hashable], str]] | None = None,
        colours: int = 64,
        density: float = plots.DENSITY,
    ):
        """
        draw(figure, **values) draws one picture and returns the sentence that says what it shows.
        sliders: name of draw's argument → its values, in order. Every combination is drawn.
        start: name → the value that stands there first.
        size: inches; 7.2 wide fills a notebook in a window of 1000 pixels.
        labels: name → what stands before the slider (default: the name).
        formats: name → how a value reads, '{} kB' or a function of it; two values must not read alike.
        colours: of the PNGs' palette; 64 do for lines and grey pictures, a colourful photograph wants 256.
        density: pixels stored for each one shown; 1 halves the bytes and is less sharp on dense screens.
        Raises ValueError for sliders that cannot work and TypeError when draw returns no sentence.
        """
        labels, formats = labels or {}, formats or {}
        sliders = {name: list(values) for name, values in sliders.items()}
        check(sliders, start, labels, formats)
        texts = {name: value_texts(name, values, formats.get(name)) for name, values in sliders.items()}
        began = time.perf_counter()
        self.pictures = render_all(draw, size, colours, density, sliders, start)
        self.seconds = time.perf_counter() - began
        self.bytes = sum(len(png) for png in {picture.png for picture in self.pictures.values()})
        self.start = self.pictures[tuple(start[name] for name in sliders)]
        self.controls = make_controls(sliders, start, texts, labels)
        pages = make_pages(self.pictures.values())
        by_values = {values: pages[picture] for values, picture in self.pictures.items()}
        links: list[widgets.Widget] = []
        stack = nest(self.controls, by_values, links)
        self._links = links
        name, css = make_css(texts)
        super().__init__([*self.controls, stack, css], layout=widgets.Layout(width="100%"))
        self.add_class(name)
        replace_earlier(self)

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        data, metadata = plots.bundle(self.start.png, self.start.sentence)
        return super()._repr_mimebundle_(**kwargs) | data, metadata


def check(sliders: Mapping[str, list], start: Mapping, labels: Mapping, formats: Mapping) -> None:
    """Raises ValueError with what is wrong with the sliders and with the words for them."""
    if not 1 <= len(sliders) <= 2:
        raise ValueError(
            f"an explorer has one slider or two (more cannot be taken in at once); got {len(sliders)}"
        )
    for name, values in sliders.items():
        if len(values) < 2:
            raise ValueError(f"slider {name!r} needs at least two values to move between; got {values}")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise ValueError(f"slider {name!r} has {twice[0]!r} more than once; list each value once")
    if set(start) != set(sliders):
        raise ValueError(f"start must name a value for each slider {sorted(sliders)}; got {sorted(start)}")
    for name, value in start.items():
        if value not in sliders[name]:
            raise ValueError(f"start value of {name!r} must be one of {sliders[name]}; got {value!r}")
    for what, words in (("labels", labels), ("formats", formats)):
        if unknown := sorted(set(words) - set(sliders)):
            raise ValueError(f"{what} names {unknown[0]!r}, which is no slider {sorted(sliders)}")
    count = math.prod(len(values) for values in sliders.values())
    if count > MOST_PICTURES:
        counts = " × ".join(str(len(values)) for values in sliders.values())
        raise ValueError(
            f"an explorer draws at most {MOST_PICTURES} pictures (5 s, 0.5 MB); {counts} values make "
            f"{count}: list fewer values"
        )


def value_texts(name: str, values: Sequence, form: str | Callable | None) -> list[str]:
    """How each value reads beside the slider."""
    if form is None:
        form = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
    texts = [form.format(value) if isinstance(form, str) else form(value) for value in values]
    alike = [text for index, text in enumerate(texts) if text in texts[:index]]
    if alike:
        raise ValueError(
            f"two values of slider {name!r} both read {alike[0]!r}; give a format that tells them apart"
        )
    return texts


def render_all(
    draw: Callable[..., str],
    size: tuple[float, float],
    colours: int,
    density: float,
    sliders: Mapping[str, Sequence],
    start: Mapping,
) -> dict[tuple, Picture]:
    """A picture for every combination; the axes stand where the sliders' ends and the start leave room."""
    combinations = list(itertools.product(*sliders.values()))
    ends = itertools.product(*({values[0], values[-1]} for values in sliders.values()))
    wanted = dict.fromkeys([*ends, tuple(start[name] for name in sliders)])
    drawn = {values: sketch(draw, size, dict(zip(sliders, values, strict=True))) for values in wanted}
    boxes = common_boxes([figure for figure, _ in drawn.values()])
    pictures = {}
    for values in combinations:
        figure, sentence = drawn.get(values) or sketch(draw, size, dict(zip(sliders, values, strict=True)))
        pictures[values] = finish(figure, sentence, boxes, colours, density)
    return pictures


def sketch(draw: Callable[..., str], size: tuple[float, float], values: Mapping) -> tuple[Figure, str]:
    """The figure with all on it, not yet rendered; an error in `draw` says for which values it came."""
    figure = plots.figure(size)
    try:
        with plots.style():
            sentence = draw(figure, **values)
        if not isinstance(sentence, str) or not sentence.strip():
            raise TypeError(f"draw must return a sentence that says what the picture shows; got {sentence!r}")
    except Exception as error:
        where = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        error.add_note(f"while drawing the picture for {where}")
        raise
    return figure, " ".join(sentence.split())


def common_boxes(figures: Sequence[Figure]) -> list[Bbox] | None:
    """For each axes the box that fits it in every figure; None where the figures are laid out otherwise."""
    if not all(isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine) for figure in figures):
        return None
    if len({len(figure.axes) for figure in figures}) != 1 or not all(map(plots.has_grid, figures)):
        return None
    return [reduce(Bbox.intersection, boxes) for boxes in zip(*map(plots.lay_out, figures), strict=True)]


def finish(figure: Figure, sentence: str, boxes: list[Bbox] | None, colours: int, density: float) -> Picture:
    """The figure rendered with its axes in the given boxes; laid out on its own where it would not fit."""
    if boxes is not None and len(boxes) == len(figure.axes):
        engine = figure.get_layout_engine()
        plots.place(figure, boxes)
        png = plots.to_png(figure, colours, density)
        if not plots.crowded(figure) and not plots.ink_at_edge(figure):
            return Picture(png, sentence)
        figure.set_layout_engine(engine)
    png = plots.to_png(figure, colours, density)
    return Picture(png, sentence, tuple(plots.crowded(figure)))


def make_controls(
    sliders: Mapping[str, Sequence], start: Mapping, texts: Mapping[str, list[str]], labels: Mapping[str, str]
) -> list[widgets.SelectionSlider]:
    """Sliders one below the other, their rails in line."""
    widest = max(width_of(labels.get(name, name)) for name in sliders)
    return [
        widgets.SelectionSlider(
            description=labels.get(name, name),
            tooltip=labels.get(name, name),  # else it reads "null"
            options=list(zip(texts[name], values, strict=True)),
            value=start[name],
            style={"description_width": f"{widest:.1f}ch"},
            layout=widgets.Layout(width="min(100%, 42rem)"),
        )
        for name, values in sliders.items()
    ]


def width_of(text: str) -> float:
    """Room that a text needs, in CSS's ch (the width of a '0'), rather too much than too little."""
    room = dict.fromkeys(" .,:;'|!ijl", 0.5) | dict.fromkeys("mwMW", 1.6)
    return sum(room.get(letter, 0.9 if letter.islower() else 1.0) for letter in text) + 0.5


def make_css(texts: Mapping[str, list[str]]) -> tuple[str, widgets.HTML]:
    """A CSS class for the explorer, and the widget that defines it.

    ipywidgets cuts a value after some 20 letters and lets a rail end where its value happens to begin.
    """
    room = max(width_of(text) for column in texts.values() for text in column)
    name = f"lora-edu-explorer-{room:.1f}".replace(".", "-")
    css = (
        f".{name} .widget-readout{{min-width:{room:.1f}ch;max-width:none;margin-left:14px;"
        f"text-align:left;overflow:visible}}" + WITHOUT_KERNEL.format(name=name)
    )
    return name, widgets.HTML(f"<style>{css}</style>", layout=widgets.Layout(display="none"))


def make_pages(pictures: Iterable[Picture]) -> dict[Picture, widgets.HTML]:
    """A page for each picture: the image with its sentence as alt text and as a visible caption.

    Equal pictures share a page, all pages share one layout and one style: fewer bytes, fewer messages.
    """
    different = list(dict.fromkeys(pictures))
    lines = max(math.ceil(len(picture.sentence) / 80) for picture in different)
    layout, style = widgets.Layout(width="100%", margin="0"), HTMLStyle()
    return {picture: widgets.HTML(page(picture, lines), layout=layout, style=style) for picture in different}


def page(picture: Picture, lines: int) -> str:
    """The picture as HTML; `lines` of caption are kept free, so that what stands below does not move."""
    width, height = plots.shown_size(picture.png)
    text = html.escape(picture.sentence, quote=True)
    source = base64.b64encode(picture.png).decode()
    caption = f"max-width:{width}px;min-height:{1.4 * lines:.1f}em;line-height:1.4;padding:4px 6px"
    return (
        f'<figure style="margin:0">'
        f'<img alt="{text}" width="{width}" height="{height}" decoding="sync" '
        f'style="max-width:100%;height:auto;display:block" src="data:image/png;base64,{source}">'
        f'<figcaption role="status" aria-live="polite" style="{caption}">{text}</figcaption>'
        f"</figure>"
    )


def nest(
    controls: Sequence[widgets.SelectionSlider],
    pages: Mapping[tuple, widgets.HTML],
    links: list[widgets.Widget],
) -> widgets.Widget:
    """A Stack for each slider, linked to it in the browser; the innermost holds the pages. Fills `links`."""
    if not controls:
        return pages[()]
    first, *rest = controls
    inner = [
        nest(rest, {values[1:]: page for values, page in pages.items() if values[0] == value}, links)
        for _, value in first.options
    ]
    stack = widgets.Stack(inner, selected_index=first.index, layout=widgets.Layout(width="100%"))
    links.append(widgets.jslink((first, "index"), (stack, "selected_index")))
    return stack


def parts(widget: widgets.Widget) -> set[widgets.Widget]:
    """The widget and all that it is made of."""
    inner = [
        *getattr(widget, "children", ()),
        getattr(widget, "layout", None),
        getattr(widget, "style", None),
    ]
    return {widget}.union(*(parts(part) for part in inner if isinstance(part, widgets.Widget)))


# a notebook's cell → (its latest run, what that run made)
alive: dict[str, tuple[str, list[widgets.Widget]]] = {}


def replace_earlier(made: widgets.Widget) -> None:
    """Closes what an earlier run of the same cell made: JupyterLab would save it too, a megabyte a time."""
    shell = get_ipython()
    message = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = message.get("metadata", {}).get("cellId")
    if cell is None:  # no notebook, or a front end that does not say which cell it runs
        return
    run, before = alive.get(cell, (None, []))
    if run != message["header"]["msg_id"]:
        for earlier in before:
            earlier.close()
        before = []
    alive[cell] = message["header"]["msg_id"], [*before, made]
