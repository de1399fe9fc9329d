"""Figures of the course: a style that colour-blind readers can tell apart, and one function a figure.

A drawing function takes data and axes, returns artists, and is decorated with `@style()` so that it looks the
same whoever calls it. No widgets, no training, no loading here.
"""

import base64
import contextlib
import io
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LightSource, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch, Polygon, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image

# Okabe & Ito (2008), "Color universal design": colours that every common colour blindness keeps apart.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#767676"
PALETTE = (
    BLUE,
    VERMILION,
    GREEN,
    PURPLE,
    ORANGE,
    SKY,
    BLACK,
)  # yellow is too faint for a line

SEQUENTIAL = "cividis"  # for sizes: from dark to light, the same for every eye
DIVERGING = "RdBu_r"  # for signs: blue below zero, red above

SIZE = (7.2, 2.8)  # inches; the width of a notebook's output in a window 1000 pixels wide
PIXELS_PER_INCH = 100  # as shown on the page
DENSITY = 1.5  # pixels stored for each pixel shown: text stays sharp on screens that pack them closer

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 9.5,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # looking for room costs a third of the drawing; with ticks at the top, set your own
    "axes.titlepad": 6,
    "figure.constrained_layout.use": True,
    "figure.dpi": PIXELS_PER_INCH * DENSITY,
    "figure.facecolor": "white",
    "figure.titlesize": 10.5,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The course's style while the block runs; whatever the reader has set up is back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(size: tuple[float, float] = SIZE) -> Figure:
    """An empty figure, `size` in inches, that no window and no pyplot keeps alive."""
    with style():
        return Figure(figsize=size, layout="constrained")


def subplots(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **options) -> tuple:
    """(figure, axes) in the course's style; `options` as in matplotlib's Figure.subplots."""
    with style():
        made = Figure(figsize=size, layout="constrained")
        return made, made.subplots(rows, columns, **options)


class Shown:
    """A finished picture and the sentence that says what it shows; put it last in a cell."""

    def __init__(self, png: bytes, sentence: str):
        self.png, self.sentence = png, sentence

    def __repr__(self) -> str:
        return self.sentence

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        return bundle(self.png, self.sentence)


def show(figure: Figure, sentence: str) -> Shown:
    """The figure as a picture, with its sentence for those who cannot see it and for the outputs' test."""
    return Shown(to_png(figure), sentence)


def bundle(png: bytes, sentence: str) -> tuple[dict, dict]:
    """(data, metadata) of a notebook's output: the picture, its sentence, the size at which to show it."""
    width, height = shown_size(png)
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": sentence}
    return data, {"image/png": {"width": width, "height": height, "alt": sentence}}


def shown_size(png: bytes) -> tuple[int, int]:
    """Width and height on the page; the PNG itself says how many pixels it holds for each one shown."""
    with Image.open(io.BytesIO(png)) as picture:
        density = picture.info["dpi"][0] / PIXELS_PER_INCH
        return round(picture.width / density), round(picture.height / density)


def to_png(figure: Figure, colours: int = 64, density: float = DENSITY) -> bytes:
    """The figure as PNG with at most `colours` colours (2 to 256) and `density` pixels for each one shown.

    Takes a third to a tenth of matplotlib's own bytes. With 64 colours no pixel of a line plot or of a grey
    photograph is off by more than about 10 of 255. The same figure gives the same bytes.
    """
    if not 2 <= colours <= 256:
        raise ValueError(f"colours must be between 2 and 256 (a PNG palette's limits); got {colours}")
    if not has_grid(figure):
        figure.set_layout_engine("none")
    with style():
        figure.set_dpi(PIXELS_PER_INCH * density)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # Not the usual median cut: it spends the palette on what is frequent, and a small red dot turns brown.
    picture = drawn.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette = np.array(picture.getpalette(), dtype=np.uint8).reshape(-1, 3)
    palette[(palette > 250).all(axis=1)] = 255  # the page stays white
    picture.putpalette(palette.tobytes())
    packed = io.BytesIO()
    picture.save(packed, format="png", optimize=True, dpi=(PIXELS_PER_INCH * density,) * 2)
    return packed.getvalue()


def has_grid(figure: Figure) -> bool:
    """Whether any axes stand in a grid; without one constrained layout has nothing to do and warns of it."""
    return any(axes.get_subplotspec() is not None for axes in figure.axes)


def lay_out(figure: Figure) -> list[Bbox]:
    """The place that constrained layout gives to each axes, with all labels inside the figure."""
    FigureCanvasAgg(figure)
    with style():
        figure.get_layout_engine().execute(figure)
    return [axes.get_position(original=True) for axes in figure.axes]


def place(figure: Figure, boxes: Sequence[Bbox]) -> None:
    """Puts each axes in its box, so that pictures behind one slider differ in their data only."""
    figure.set_layout_engine("none")
    for axes, box in zip(figure.axes, boxes, strict=True):
        axes.set_position(box)


def crowded(figure: Figure) -> list[str]:
    """What a reader would complain of in a drawn figure: texts cut off at its edge, titles that overlap."""
    renderer = figure.canvas.get_renderer()
    edge = figure.bbox.padded(1)
    headings, notes = _headings(figure), _notes(figure)
    boxes = {text: text.get_window_extent(renderer) for text in headings + notes}
    cut = [
        f"cut off: {text.get_text()!r}"
        for text, box in boxes.items()
        if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0 or box.y1 > edge.y1
    ]
    overlapping = [
        f"overlap: {one.get_text()!r} and {other.get_text()!r}"
        for one, other in itertools.combinations(headings, 2)
        if boxes[one].overlaps(boxes[other])
    ]
    overlapping += [
        f"runs into the axes beside it: {text.get_text()!r}"
        for text, axes in itertools.product(headings, figure.axes)
        if text.axes is not axes and axes.get_visible() and _inside(boxes[text], axes.bbox)
    ]
    return cut + overlapping


def _inside(box: Bbox, axes_box: Bbox) -> bool:
    """Whether a text's box reaches more than a pixel into the axes' box (twin axes touch)."""
    common = Bbox.intersection(box, axes_box)
    return common is not None and common.width > 1 and common.height > 1


def ink_at_edge(figure: Figure) -> bool:
    """Whether a drawn figure has anything on its outermost pixels: mostly a tick's label that is cut off."""
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    paper = np.array(to_rgb(figure.get_facecolor())) * 255
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((np.abs(frame - paper) > 8).any())


def _headings(figure: Figure) -> list[Text]:
    """Titles and axis labels that are seen (constrained layout looks after the ticks' labels)."""
    texts = [figure._suptitle]
    for axes in figure.get_axes():
        if axes.get_visible():
            texts += [axes.title, axes._left_title, axes._right_title]
            texts += [axis.label for axis in (axes.xaxis, axes.yaxis) if axes.axison and axis.get_visible()]
    return [text for text in texts if text is not None and text.get_visible() and text.get_text().strip()]


def _notes(figure: Figure) -> list[Text]:
    legends = [axes.get_legend() for axes in figure.get_axes()] + figure.legends
    texts = [text for axes in figure.get_axes() if axes.get_visible() for text in axes.texts]
    texts += [text for legend in legends if legend is not None for text in legend.get_texts()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


# --- what LoRA costs ------------------------------------------------------------------------------------


@style()
def area_in_area(axes: Axes, share: float, inner: str, outer: str) -> list[Artist]:
    """A square for what is there, and in its corner one of `share` of its area (beyond 1 it sticks out)."""
    side = share**0.5
    fits = side <= 0.6
    whole = axes.add_patch(Rectangle((0, 0), 1, 1, facecolor="#d9d9d9", edgecolor=GREY, linewidth=0.8))
    part = axes.add_patch(Rectangle((0, 0), side, side, facecolor=BLUE, edgecolor=BLUE))
    axes.set(xlim=(-0.02, 1.45), ylim=(-0.02, 1.45), aspect="equal")
    axes.set_axis_off()
    if fits:
        place, look = (side + 0.04, max(side / 2, 0.08)), {"ha": "left", "color": BLUE}
    else:
        place, look = (side / 2, min(side, 1) / 2), {"ha": "center", "color": "white"}
    label = axes.text(*place, inner, va="center", **look)
    name = axes.text(0.5, 0.9, outer, ha="center", va="center", color=BLACK if side < 0.8 else "white")
    return [whole, part, label, name]


@style()
def share_of_rank(
    axes: Axes, ranks: Sequence[int], shares: Sequence[float], rank: int, even: float
) -> list[Artist]:
    """The adapter's share of its matrix against r, both on log scales, with the break-even rank marked."""
    artists = axes.plot(ranks, shares, color=BLUE)
    artists.append(axes.axhline(1, color=GREY, linewidth=1, linestyle="--"))
    artists.append(axes.axvline(even, color=VERMILION, linewidth=1.4, linestyle=":"))
    artists += axes.plot(rank, shares[list(ranks).index(rank)], "o", color=BLUE, markersize=7)
    axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel="share of the matrix")
    plain_log(axes, (1, 10, 100, 1000), (0.0001, 0.001, 0.01, 0.1, 1))
    return artists


def plain_log(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Log scales with these ticks as plain numbers, and no others (which cost most of the drawing)."""
    for axis, ticks in ((axes.xaxis, x), (axes.yaxis, y)):
        plain_ticks(axis, ticks)


def plain_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """These ticks as plain numbers on a log scale, and no others."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())


@style()
def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    texts: Sequence[str],
    **labels,
) -> list[Artist]:
    """Horizontal bars from the top down, each with its value written beside it; `labels` go to Axes.set."""
    drawn = axes.barh(range(len(names)), values, color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(values))
    axes.grid(False, axis="y")
    axes.bar_label(drawn, texts, padding=3, fontsize=8.5)
    axes.set(**labels)
    return list(drawn)


@style()
def log_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str], texts: Sequence[str]
) -> list[Artist]:
    """Horizontal bars on a log scale from the top down, each with its value written beside it."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    drawn = axes.barh(range(len(names)), values, color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.bar_label(drawn, texts, padding=3, fontsize=8.5)
    return list(drawn)


@style()
def product(panels: Mapping[str, Sequence], signs: Sequence[str]) -> Figure:
    """Matrices in a row by title, blue below zero and red above, with a sign after each but the last."""
    made, row = subplots(
        1, len(panels), size=(7.2, 2.4), width_ratios=[np.shape(m)[1] + 2 for m in panels.values()]
    )
    for index, (axes, (title, matrix)) in enumerate(zip(row, panels.items(), strict=True)):
        values = np.asarray(matrix)
        axes.imshow(
            values, cmap=DIVERGING, vmin=-2.5, vmax=2.5, extent=(0, values.shape[1], values.shape[0], 0)
        )
        axes.set(title=title, xticks=[], yticks=[])
        axes.title.set_horizontalalignment("left")
        axes.spines[:].set_visible(True)
        if index < len(signs):
            axes.annotate(
                signs[index],
                (1, 0.5),
                (9, 0),
                xycoords="axes fraction",
                textcoords="offset points",
                va="center",
            )
    return made


@style()
def stacked_bars(
    axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str
) -> list[Artist]:
    """Horizontal bars from the top down, each the sum of the same (at most four) parts, in `unit`."""
    left = np.zeros(len(names))
    drawn = []
    for (part, values), colour in zip(parts.items(), (GREY, VERMILION, ORANGE, SKY), strict=False):
        drawn += axes.barh(range(len(names)), values, left=left, height=0.6, color=colour, label=part)
        left = left + np.asarray(values)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.05 * left.max()))
    axes.grid(False, axis="y")
    return drawn


@style()
def stacked_panels(panels: Mapping[str, Mapping[str, Mapping[str, float]]], unit: str) -> Figure:
    """Side by side, stacked bars for each panel: title → name of the bar → part → value."""
    made, row = subplots(1, len(panels), size=(7.2, 2.5), squeeze=False)
    for axes, (title, ways) in zip(row[0], panels.items(), strict=True):
        parts = {part: [way[part] for way in ways.values()] for part in next(iter(ways.values()))}
        stacked_bars(axes, list(ways), parts, unit)
        axes.set_title(title)
    made.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return made


@style()
def factors(axes: Axes, names: Sequence[str], values: Sequence[float]) -> list[Line2D]:
    """Factors as dots on a log scale from 1/16 to 16, each with its value; a line from 1 to the dot."""
    drawn = []
    for row, value in enumerate(values):
        drawn += axes.plot([1, value], [row, row], color=BLUE, linewidth=2)
        drawn += axes.plot(value, row, "o", color=BLUE, markersize=7)
        axes.annotate(
            f"{value:.3g}", (value, row), (0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set(xscale="log", xlim=(1 / 32, 32), ylim=(len(names) - 0.5, -0.6))
    axes.set_yticks(range(len(names)), names)
    axes.grid(False, axis="y")
    plain_ticks(axes.xaxis, (1 / 16, 1 / 4, 1, 4, 16))
    axes.xaxis.set_major_formatter(FixedFormatter(["1/16", "1/4", "1", "4", "16"]))
    return drawn


# --- LoRA in one picture, and what a model writes -------------------------------------------------------


@style()
def to_scale(axes: Axes, rows: int, columns: int, rank: int, strips: int = 10) -> list[Artist]:
    """W (rows × columns, frozen) and beside it B · A of this rank (trained), every length to one scale.

    The long sides of W and B are cut into `strips` pieces of equal length, laid side by side.
    """
    if rows % strips:
        raise ValueError(f"strips must divide the {rows} rows; got {strips}")
    high, gap = rows / strips, columns / 5
    drawn: list[Artist] = []

    def matrix(x: float, width: int, height: float, pieces: int, name: str, colour: str) -> float:
        """Draws pieces of width × height side by side from x, names them; returns where they end."""
        for number in range(pieces):
            corner = (x + number * (width + gap), (high - height) / 2)
            drawn.append(
                axes.add_patch(Rectangle(corner, width, height, facecolor=colour, linewidth=0, snap=False))
            )
        end = x + pieces * (width + gap) - gap
        above, below = (high - height) / 2 - 0.06 * high, (high + height) / 2 + 0.06 * high
        size = f"{height * pieces:,.0f} × {width:,}\n{height * pieces * width:,.0f} numbers".replace(",", " ")
        drawn.append(axes.text((x + end) / 2, above, name, ha="center", va="bottom", weight="bold"))
        drawn.append(axes.text((x + end) / 2, below, size, ha="center", va="top"))
        return end

    def sign(x: float, text: str) -> None:
        drawn.append(axes.text(x, high / 2, text, ha="center", va="center", size=13))

    end = matrix(0, columns, high, strips, "W, frozen", "#cccccc")
    sign(end + 0.24 * high, "+   s ·")
    end = matrix(end + 0.48 * high, rank, high, strips, "B, trained", BLUE)
    sign(end + 0.2 * high, "·")
    end = matrix(end + 0.4 * high, columns, rank, 1, "A, trained", BLUE)
    axes.set(xlim=(-gap, end + 0.2 * high), ylim=(1.3 * high, -0.18 * high), aspect="equal")
    axes.set_axis_off()
    return drawn


@style()
def page_of_text(
    axes: Axes, text: str, title: str = "", given: str = "", columns: int = 52, lines: int = 13
) -> list[Text]:
    """Text as it stands, in letters of one width, from the top left; `given` is how it begins, in blue.

    A line longer than `columns` goes on below, further in; what does not fit into `lines` is left out.
    """
    if not text.startswith(given) or "\n" in given or len(given) > columns:
        raise ValueError(f"the text must begin with {given!r}, on one line; got {text[:40]!r}")
    shown = []
    for line in text.expandtabs(4).split("\n"):
        plain = "".join(letter if letter.isprintable() else " " for letter in line)
        further = " " * (len(plain) - len(plain.lstrip()) + 4)
        shown += textwrap.wrap(plain, columns, subsequent_indent=further[: columns // 2]) or [""]
    axes.set(xticks=[], yticks=[], title=title, facecolor="#f4f4f4")
    axes.spines[:].set_visible(False)
    axes.grid(False)
    look = {"family": "DejaVu Sans Mono", "size": 9.2, "parse_math": False}
    place = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    rest = [" " * len(given) + shown[0][len(given) :], *shown[1:lines]]
    return [
        axes.annotate(words, xytext=(6, -14 - 11.8 * row), color=colour, **place, **look)
        for row, words, colour in [(0, given, BLUE), *((row, line, BLACK) for row, line in enumerate(rest))]
        if words.strip()
    ]


@style()
def loss_against_size(axes: Axes, sizes: Mapping[int, float], losses: Mapping[int, float]) -> list[Artist]:
    """Loss (nats a token) against bytes on disk, in MB on a log scale: a dot for each rank, with its number."""
    megabytes, nats = [size / 1e6 for size in sizes.values()], [losses[rank] for rank in sizes]
    drawn: list[Artist] = axes.plot(megabytes, nats, color=BLUE, marker="o")
    for rank, x, y in zip(sizes, megabytes, nats, strict=True):
        drawn.append(axes.annotate(str(rank), (x, y), (1, 6), textcoords="offset points", fontsize=8.5))
    axes.set(xscale="log", xlabel="MB on disk", ylabel="held-out loss, nats a token")
    plain_ticks(axes.xaxis, (0.1, 0.3, 1, 3))
    return drawn


# --- matrices as pictures and their spectra ------------------------------------------------------------


@style()
def picture(axes: Axes, matrix, title: str = "", low: float = 0.0, high: float = 1.0) -> AxesImage:
    """A matrix as a grey picture without axes, `low` black and `high` white."""
    axes.set_axis_off()
    axes.set_title(title)
    return axes.imshow(np.asarray(matrix), cmap="gray", vmin=low, vmax=high)


@style()
def relief(axes: Axes, heights, title: str = "", step: tuple[float, float] = (74.0, 93.0)) -> AxesImage:
    """Heights in metres as hills under light from the north-west; `step`: metres between points, x and y."""
    shaded = LightSource(azdeg=315, altdeg=45).hillshade(np.asarray(heights), dx=step[0], dy=step[1])
    shown = picture(axes, shaded, title)
    shown.axes.set_aspect(step[1] / step[0])
    return shown


@style()
def spectrum(
    axes: Axes,
    singular_values,
    kept: int | None = None,
    edge: float | None = None,
    most: int | None = None,
    edge_name: str = "edge of noise",
    **labels,
) -> list[Artist]:
    """Singular values against their number, on a log scale: the first `kept` in blue, the rest in grey.

    edge: a dashed line at the largest that noise alone would have. most: how many are drawn.
    `labels` go to Axes.set.
    """
    S = np.asarray(singular_values)[:most]
    number = np.arange(1, len(S) + 1)
    kept = len(S) if kept is None else kept
    cut = axes.semilogy(number[kept:], S[kept:], ".", color=GREY, markersize=3, label="cut off")
    stay = axes.semilogy(number[:kept], S[:kept], ".", color=BLUE, markersize=5, label="kept")
    artists = [*stay, *cut]
    if edge is not None:
        artists.append(axes.axhline(edge, color=VERMILION, linestyle="--", linewidth=1.2, label=edge_name))
        axes.legend(handles=artists[-1:], loc="upper right")
    axes.set(**{"xlabel": "number k", "ylabel": "singular value σ$_k$"} | labels)
    return artists


@style()
def curves(axes: Axes, series: Mapping[str, tuple], **labels) -> list[Line2D]:
    """Lines by name, each (x, y), with a legend where there are several; `labels` go to Axes.set.

    A y of two axes is several lines of one name, a column each.
    """
    drawn = []
    for (name, (x, y)), colour in zip(series.items(), itertools.cycle(PALETTE), strict=False):
        lines = axes.plot(np.asarray(x), np.asarray(y), color=colour)
        lines[0].set_label(name)
        drawn += lines
    if len(series) > 1:
        axes.legend()
    axes.set(**labels)
    return drawn


@style()
def curves_with_twins(
    axes: Axes, series: Mapping[str, tuple], twins: Mapping[str, tuple], **labels
) -> list[Line2D]:
    """Lines with dots by name, each (x, y), and for some names a dashed line in the same colour to compare it with.

    twins: name → (x, y) of its dashed line. The legend has the names of the solid lines; the title or the sentence
    says what is dashed. `labels` go to Axes.set. Raises ValueError for a twin of no line.
    """
    if strangers := sorted(set(twins) - set(series)):
        raise ValueError(
            f"each twin must have the name of a line ({', '.join(series)}); got {strangers[0]!r}"
        )
    drawn = []
    for (name, (x, y)), colour in zip(series.items(), itertools.cycle(PALETTE), strict=False):
        drawn += axes.plot(np.asarray(x), np.asarray(y), color=colour, marker="o", label=name)
        if name in twins:
            drawn += axes.plot(*map(np.asarray, twins[name]), color=colour, linestyle="--", linewidth=1.2)
    if len(series) > 1:
        axes.legend()
    axes.set(**labels)
    return drawn


@style()
def mark_level(axes: Axes, y: float, text: str, x: float = 1.0) -> list[Artist]:
    """A dashed horizontal line and what it means, written above it, ending at the share `x` of the width."""
    line = axes.axhline(y, color=GREY, linestyle="--", linewidth=1)
    note = axes.annotate(
        text, (x, y), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right"
    )
    return [line, note]


@style()
def noise_histogram(axes: Axes, singular_values, density: tuple, edge: float, **labels) -> list[Artist]:
    """Histogram of singular values under the density that noise would have, (places, heights), and its edge.

    Those above the edge are marked one by one. `labels` go to Axes.set.
    """
    S, heights = np.asarray(singular_values), np.asarray(density[1])
    bins = np.linspace(0, edge, 33)
    bars = axes.hist(S, bins, weights=np.full(len(S), 1 / (len(S) * bins[1])), color=SKY, label="found")[2]
    law = axes.plot(np.asarray(density[0]), heights, color=BLACK, label="Marchenko–Pastur")
    line = axes.axvline(edge, color=VERMILION, linestyle="--", linewidth=1.2, label="edge σ(√m + √n)")
    artists = [*bars, *law, line]
    above = S[edge < S]
    if above.size:
        height = 0.2 * heights.max()
        artists.append(axes.vlines(above, 0, height, color=GREEN, linewidth=3, label="found above the edge"))
    axes.legend(loc="upper right")
    axes.set(**{"xlabel": "singular value", "ylabel": "density"} | labels)
    return artists


@style()
def profile(axes: Axes, distance, heights: Mapping[str, Sequence], title: str = "") -> list[Line2D]:
    """Heights along one line of a map, the first in grey and the others over it."""
    colours = [GREY, *PALETTE]
    lines = [
        axes.plot(np.asarray(distance), np.asarray(values), color=colour, linewidth=width, label=name)[0]
        for (name, values), colour, width in zip(
            heights.items(), colours, [2.6, *[1.2] * len(heights)], strict=False
        )
    ]
    axes.set(xlabel="distance (km)", ylabel="height (m)", title=title)
    axes.legend(loc="upper right")
    return lines


# --- two models and their difference ------------------------------------------------------------------


@style()
def heat(axes: Axes, grid, title: str, x: str, y: str) -> AxesImage:
    """Values from 0 to 1 at places counted from 1, the first row at the top."""
    values = np.asarray(grid)
    axes.grid(False)
    axes.set(title=title, xlabel=x, ylabel=y)
    extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
    return axes.imshow(values, vmin=0, vmax=1, extent=extent, aspect="auto")


@style()
def dots_by_kind(
    axes: Axes, groups: Mapping[str, Mapping[str, Sequence[float]]], legend: bool = True, **labels
) -> list[Line2D]:
    """A row for each kind of matrix, a colour for each group of values, a dot for each layer.

    groups: name → kind → values; the kinds of the first one name the rows, from the top down. `labels` go to Axes.set.
    """
    kinds = list(next(iter(groups.values())))
    drawn = []
    for place, ((name, values), colour) in enumerate(
        zip(groups.items(), itertools.cycle(PALETTE), strict=False)
    ):
        down = 0.24 * (place - (len(groups) - 1) / 2)
        x = [value for kind in kinds for value in values[kind]]
        y = [row + down for row, kind in enumerate(kinds) for _ in values[kind]]
        drawn += axes.plot(x, y, "o", color=colour, markersize=4.5, markeredgewidth=0, alpha=0.75, label=name)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    if legend:
        axes.legend(loc="best", handletextpad=0.2)
    axes.set(**labels)
    return drawn


@style()
def paired_bars(
    axes: Axes, groups: Mapping[str, Mapping[str, float]], form: str = ".0%", **labels
) -> list[Artist]:
    """Horizontal bars in groups, a group a row, each with its share written beside it; `labels` go to Axes.set.

    groups: name of the bar → row → value; the rows of the first name the axis, from the top down.
    """
    rows = list(next(iter(groups.values())))
    thick = 0.8 / len(groups)
    drawn: list[Artist] = []
    for place, ((name, values), colour) in enumerate(
        zip(groups.items(), itertools.cycle(PALETTE), strict=False)
    ):
        y = [row + thick * (place - (len(groups) - 1) / 2) for row in range(len(rows))]
        bars = axes.barh(y, [values[row] for row in rows], height=0.92 * thick, color=colour, label=name)
        axes.bar_label(bars, [f"{values[row]:{form}}" for row in rows], padding=3, fontsize=8)
        drawn += list(bars)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlim=(0, 1.18 * max(max(values.values()) for values in groups.values())), **labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.legend(loc="best")
    return drawn


@style()
def roofline(
    axes: Axes, bandwidth: float, peak: float, points: Mapping[str, tuple[float, float]]
) -> list[Artist]:
    """The most operations a second that a card allows for each operation a byte, and named points below it.

    bandwidth: bytes a second; peak: operations a second; points: name → (operations a byte, a second).
    """
    x = np.array([0.5, peak / bandwidth, 2000])
    drawn = axes.plot(x, np.minimum(bandwidth * x, peak) / 1e12, color=BLACK)
    for (name, (intensity, speed)), colour in zip(points.items(), PALETTE, strict=False):
        drawn += axes.plot(intensity, speed / 1e12, "o", color=colour, markersize=7, label=name)
    axes.set(xscale="log", yscale="log", xlim=(0.5, 2000), ylim=(0.1, 2000))
    plain_log(axes, (1, 10, 100, 1000), (0.1, 1, 10, 100, 1000))
    axes.set(xlabel="operations a byte", ylabel="10$^{12}$ operations a second")
    return drawn


@style()
def norm_against_count(axes: Axes, counts, norms: Mapping[str, Sequence[float]], **labels) -> list[Line2D]:
    """Row norm of an update against how often the row's token occurs, a dot a token; count 0 stands at 0.2."""
    x = np.maximum(np.asarray(counts, float), 0.2)
    drawn = []
    for (name, y), colour in zip(norms.items(), PALETTE, strict=False):
        drawn += axes.loglog(x, np.asarray(y), ".", color=colour, markersize=2, alpha=0.35, label=name)
    legend = axes.legend(markerscale=5)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    axes.set(
        **{"xlabel": "times the token occurs in the tuning text", "ylabel": "norm of its row of ΔW"} | labels
    )
    plain_ticks(axes.xaxis, (0.2, 1, 10, 100, 1000, 10_000))
    axes.xaxis.set_major_formatter(FixedFormatter(["never", "1", "10", "100", "1,000", "10,000"]))
    plain_ticks(axes.yaxis, (0.01, 0.1, 1, 10))
    return drawn


# --- recorded runs ------------------------------------------------------------------------------------


@style()
def bands(axes: Axes, series: Mapping[str, tuple], **labels) -> list[Line2D]:
    """Mean over repeats as a line and dots, from the lowest to the highest repeat as a band, by name.

    A series is (x, repeats): for each x the values of its repeats. `labels` go to Axes.set.
    """
    drawn = []
    for (name, (x, repeats)), colour in zip(series.items(), itertools.cycle(PALETTE), strict=False):
        low, high = ([pick(values) for values in repeats] for pick in (min, max))
        means = [sum(values) / len(values) for values in repeats]
        drawn += axes.plot(x, means, color=colour, marker="o", label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    if len(series) > 1:
        axes.legend()
    axes.set(**labels)
    return drawn


@style()
def rate_curves(axes: Axes, losses: Mapping[str, Mapping[float, float]], **labels) -> list[Line2D]:
    """Loss against learning rate, a line for each name, its best rate ringed; `labels` go to Axes.set."""
    drawn = []
    for (name, values), colour in zip(losses.items(), itertools.cycle(PALETTE), strict=False):
        rates = sorted(values)
        drawn += axes.plot(rates, [values[rate] for rate in rates], color=colour, marker="o", label=name)
        best = min(rates, key=values.get)
        axes.plot(best, values[best], "o", markersize=10, markerfacecolor="none", color=colour)
    axes.legend()
    axes.set(**{"xscale": "log", "xlabel": "learning rate", "ylabel": "held-out loss, nats a token"} | labels)
    return drawn


@style()
def level_grid(axes: Axes, grid, rows: Sequence, columns: Sequence, high: float = 1.0, **labels) -> AxesImage:
    """Values from 0 to `high` as a table of coloured cells with the value in each; `labels` go to Axes.set."""
    values = np.asarray(grid, float)
    image = axes.imshow(values, vmin=0, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * high else BLACK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), [str(each) for each in columns])
    axes.set_yticks(range(len(rows)), [str(each) for each in rows])
    axes.grid(False)
    axes.set(**labels)
    return image


# --- every other way to tune ---------------------------------------------------------------------------

# What a frozen model has, by name: (left, bottom, width, height) of a box, and what stands in it.
_BLOCK = {
    "embedding": ((1.35, 3.2, 1.2, 2.2), "embed-\nding"),
    "norm 1": ((4.05, 2.6, 0.4, 2.6), ""),
    "query": ((5.1, 5.2, 1.0, 1.0), "query"),
    "key": ((5.1, 3.4, 1.0, 1.0), "key"),
    "value": ((5.1, 1.6, 1.0, 1.0), "value"),
    "attention": ((7.9, 0.85, 1.15, 5.35), "atten-\ntion"),
    "output": ((9.75, 3.4, 1.0, 1.0), "output"),
    "norm 2": ((13.0, 2.6, 0.4, 2.6), ""),
    "up": ((14.0, 3.0, 0.9, 1.8), "up"),
    "down": ((16.6, 3.0, 0.9, 1.8), "down"),
    "norm 3": ((20.0, 2.6, 0.4, 2.6), ""),
    "head": ((20.95, 2.8, 0.8, 2.2), "head"),
}
_FLOW = 3.9  # the height at which everything goes from left to right
_SUMS = (12.55, 19.45)  # where what attention and the MLP give is added
_WIRES = [
    [(2.4, _FLOW), (21.0, _FLOW)],
    *([(4.6, _FLOW), (4.6, y), (8.0, y)] for y in (5.7, 2.1)),  # queries and values; keys go along the middle
    *([(x, _FLOW), (x, 6.75), (to, 6.75), (to, _FLOW)] for x, to in zip((3.75, 12.75), _SUMS, strict=True)),
    [(2.3, 2.25), (3.4, 2.25), (3.4, _FLOW)],  # virtual tokens go the text's way
    [(6.5, 0.5), (7.23, 0.5), (7.23, 3.3)],
    *([(7.23, y), (8.0, y)] for y in (3.12, 1.32)),
]
_IN_BLOCKS = ("query", "key", "value", "output", "up", "down")
# Part that a method may train → (left, bottom, width, height) of its boxes; the other parts are made from _BLOCK.
_BOXES = {
    "virtual tokens": [(2.9, 2.3, 0.42, 0.42), (2.9, 1.8, 0.42, 0.42)],
    "prompt encoder": [(1.1, 1.75, 1.2, 1.0)],
    "prefix": [(7.05, y + dy, 0.36, 0.36) for y in (2.72, 0.92) for dy in (0, 0.44)],
    "prefix encoder": [(5.2, 0.15, 1.3, 0.75)],
}
_SCALES = [(6.55, 3.9), (6.55, 2.1), (15.95, 3.9)]  # on keys, on values, behind the GELU
_NARROW = [(11.2, 3.3, 0.85, 1.2), (17.95, 3.3, 0.85, 1.2)]  # after attention and after the MLP
PARTS = (
    "weights",
    "biases",
    "scales",
    "bottlenecks",
    "LoRA",
    "LoRA at the ends",
    *_BOXES,
)


@style()
def where_it_acts(
    axes: Axes, lit: Sequence[str] = (), colour: str = BLUE, words: bool = True
) -> list[Artist]:
    """A transformer from left to right, one block of it drawn, with the parts that a method trains in `colour`.

    lit: names from PARTS. What the model has is grey and stays where it is; what a method adds is drawn faintly until
    it is lit, so that pictures of two methods differ in that alone. words: what the boxes are called.
    Raises ValueError for a part that is none.
    """
    if strangers := sorted(set(lit) - set(PARTS)):
        raise ValueError(f"the parts are {', '.join(PARTS)}; got {strangers[0]!r}")
    whole = lambda name: "weights" in lit and name != "attention"
    boxes = {name: Rectangle(box[:2], *box[2:]) for name, (box, _) in _BLOCK.items()}
    added = _added_parts()
    text = [Rectangle((2.9, 3.35 + 0.5 * place), 0.42, 0.42) for place in range(3)]
    grey = [*(box for name, box in boxes.items() if not whole(name)), *text]
    trained = [*(box for name, box in boxes.items() if whole(name))]
    trained += [shape for part in lit for shape in added.get(part, ())]
    faint = [shape for part, shapes in added.items() if part not in lit for shape in shapes]
    outline = {"facecolors": "white", "edgecolors": "#c4c4c4", "linewidths": 0.7, "linestyles": (0, (2, 1.5))}
    drawn: list[Artist] = [
        LineCollection(_WIRES, colors="#9a9a9a", linewidths=1, zorder=1),
        PatchCollection(grey, facecolors="#d4d4d4", linewidths=0, zorder=2),
        PatchCollection(faint, zorder=3, **outline),
        PatchCollection(trained, facecolors=colour, linewidths=0, zorder=4),
        PatchCollection(
            [Ellipse((x, _FLOW), 0.55, 0.9) for x in _SUMS],
            facecolors="white",
            edgecolors="#9a9a9a",
            linewidths=1,
            zorder=5,
        ),
    ]
    for each in drawn:
        axes.add_collection(each, autolim=False)
    drawn += _words(axes, {name for name in _BLOCK if whole(name)}) if words else []
    for each in drawn:  # they stay inside the axes, and layout need not look at each of them
        each.set_in_layout(False)
    axes.set(xlim=(0.6, 22.2), ylim=(0, 7.6))
    axes.set_axis_off()
    return drawn


def _added_parts() -> dict[str, list[Patch]]:
    """Part → its shapes: beside each matrix B (a column) and A (a row), on the edge of each layer its bias, …"""
    boxes: dict[str, list] = {"LoRA": [], "LoRA at the ends": [], "biases": []} | _BOXES
    for name, ((left, bottom, width, height), _) in _BLOCK.items():
        if name in (*_IN_BLOCKS, "embedding", "head"):
            part = "LoRA" if name in _IN_BLOCKS else "LoRA at the ends"
            boxes[part] += [(left - 0.3, bottom, 0.18, height), (left, bottom + height + 0.15, width, 0.22)]
        if name in _IN_BLOCKS or name.startswith("norm"):
            boxes["biases"].append((left + width - 0.02, bottom, 0.16, height))
    parts: dict[str, list[Patch]] = {
        part: [Rectangle(each[:2], *each[2:]) for each in them] for part, them in boxes.items()
    }
    parts["scales"] = [Ellipse(centre, 0.5, 0.8) for centre in _SCALES]
    parts["bottlenecks"] = []
    for left, bottom, width, height in _NARROW:
        right, top, middle, waist = left + width, bottom + height, left + width / 2, 0.36 * height
        left_side = [(middle, top - waist), (left, top), (left, bottom), (middle, bottom + waist)]
        parts["bottlenecks"].append(Polygon([*left_side, (right, bottom), (right, top)]))
    return parts


def _words(axes: Axes, on_colour: set[str]) -> list[Artist]:
    """What the boxes are called, white in those of `on_colour`, and the words beside them."""
    middle = {"ha": "center", "va": "center", "zorder": 6}
    drawn: list[Artist] = []
    for name, ((left, bottom, width, height), label) in _BLOCK.items():
        at = left + width / 2, bottom + height / 2
        look = middle | {"size": 7, "color": "white" if name in on_colour else BLACK}
        drawn.append(axes.text(*at, label, **look))
    for x in _SUMS:
        drawn.append(axes.text(x, _FLOW, "+", size=10, **middle))
    for x, y, word in ((3.1, 5.1, "text"), (15.45, _FLOW - 0.75, "GELU"), (11.6, 7.25, "one of the blocks")):
        drawn.append(axes.text(x, y, word, size=7, color="#555555", **middle))
    return drawn


@style()
def quality_against(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    looks: Mapping[str, tuple[str, str]],
    others: Mapping[str, Sequence[float]] | None = None,
    **labels,
) -> list[Artist]:
    """Points joined by name over a logarithmic x: the mean of the repeats, and a bar from the lowest to the highest.

    series: name → (x, repeats at each x); looks: name → (colour, marker). others: name → a second x for each point, a
    hollow mark joined to the first by a dotted line (what is trained where x is what is stored). `labels`: Axes.set.
    """
    drawn: list[Artist] = []
    for name, (x, repeats) in series.items():
        colour, marker = looks[name]
        means = [sum(values) / len(values) for values in repeats]
        drawn += axes.plot(x, means, color=colour, marker=marker, markersize=5.5, linewidth=1.2, label=name)
        drawn.append(axes.vlines(x, [min(v) for v in repeats], [max(v) for v in repeats], color=colour))
        for at, second, y in zip(x, (others or {}).get(name, x), means, strict=True):
            if second != at:
                drawn += axes.plot([at, second], [y, y], ":", color=colour, linewidth=1)
                drawn += axes.plot(second, y, marker, color=colour, markerfacecolor="white", markersize=5.5)
    axes.set(**{"xscale": "log"} | labels)
    axes.xaxis.set_minor_locator(NullLocator())
    return drawn


@style()
def rate_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float | None]]], columns: int = 5, **labels
) -> Figure:
    """Small panels with one y: loss against learning rate, a line for each size, its best rate ringed.

    panels: title → name of the line → rate → loss, None where the run blew up (marked at the top); a line without rates
    isn't drawn, and those after it keep their colours. A best rate with none tried on one side of it gets a red square
    instead of the ring. `labels` go to Axes.set.
    """
    rows = -(-len(panels) // columns)
    made, grid = subplots(rows, columns, size=(7.2, 1.9 * rows), sharey=True, squeeze=False)
    for axes, (title, lines) in itertools.zip_longest(grid.flat, panels.items(), fillvalue=("", {})):
        axes.set_visible(bool(lines))
        for (name, losses), colour in zip(lines.items(), PALETTE, strict=False):
            if not losses:
                continue
            tried = sorted(losses)
            went = [rate for rate in tried if losses[rate] is not None]
            axes.plot(
                went, [losses[rate] for rate in went], color=colour, marker=".", linewidth=1.1, label=name
            )
            lost = [rate for rate in tried if losses[rate] is None]
            # in shares of the panel's height, whatever the losses are
            at_the_top = axes.get_xaxis_transform()
            axes.plot(lost, [0.96] * len(lost), "x", color=colour, transform=at_the_top)
            best = min(went, key=losses.get)
            edge = best in (tried[0], tried[-1])
            ring = {"marker": "s", "color": "red"} if edge else {"marker": "o", "color": colour}
            axes.plot(best, losses[best], markersize=9, markerfacecolor="none", linestyle="", **ring)
        if len(lines) > 1:
            axes.legend(fontsize=7, handlelength=1, loc="upper left", borderaxespad=0)
        axes.set_title(title, size=8)
        axes.set(**{"xscale": "log"} | labels)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=7)
    return made


@style()
def before_and_after(
    axes: Axes, values: Mapping[str, tuple[float, float]], names: tuple[str, str], **labels
) -> list[Artist]:
    """A row for each name from the top down: two values on one line, an arrow from the first to the second.

    names: what the two are called, in the legend. `labels` go to Axes.set.
    """
    rows = range(len(values))
    first, second = ([pair[place] for pair in values.values()] for place in (0, 1))
    drawn: list[Artist] = list(axes.plot(first, rows, "o", color=GREY, label=names[0]))
    drawn += axes.plot(second, rows, "o", color=BLUE, markersize=6.5, label=names[1])
    drawn.append(axes.hlines(rows, first, second, color=BLUE, linewidth=1.2, zorder=1))
    axes.set_yticks(rows, list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.legend()
    axes.set(**labels)
    return drawn


@style()
def price_and_quality(
    axes: Axes, points: Mapping[str, tuple[float, float]], looks: Mapping[str, tuple[str, str]], **labels
) -> tuple[list[Artist], list[str]]:
    """Points (price, loss) by name, and the stairs of those that no other beats on both; (artists, their names).

    looks: name → (colour, marker). A point is beaten by one that is nowhere worse and somewhere better.
    """
    best = sorted(
        (name for name in points if not any(_beats(other, points[name]) for other in points.values())),
        key=points.get,
    )
    stairs = [points[name] for name in best]
    drawn: list[Artist] = []
    for name, (x, y) in points.items():
        colour, marker = looks[name]
        inside = colour if name in best else "white"
        drawn += axes.plot(x, y, marker, color=colour, markerfacecolor=inside, markersize=7, label=name)
    drawn += axes.step(*zip(*stairs, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    axes.set(**labels)
    return drawn, best


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


# --- LoRA's variants -----------------------------------------------------------------------------------


@style()
def differences(
    axes: Axes,
    rows: Sequence[str],
    intervals: Mapping[str, tuple[float, float, float]],
    band: float,
    strong: str | None = None,
    **labels,
) -> list[Artist]:
    """A row for each name from the top down: a difference from 0 and its interval, in a grey band from −band to band.

    intervals: name → (difference, low, high); a row without one stays empty. Blue where the interval lies below 0, red
    where it lies above, else grey; `strong` is drawn thick. `labels` go to Axes.set.
    """
    drawn: list[Artist] = [axes.axvspan(-band, band, color="#ececec", zorder=0)]
    drawn.append(axes.axvline(0, color=GREY, linewidth=1))
    for place, name in enumerate(rows):
        if name not in intervals:
            continue
        middle, low, high = intervals[name]
        colour = BLUE if high < 0 else VERMILION if low > 0 else GREY
        thick = 1.8 if name == strong else 1.0
        drawn += axes.plot([low, high], [place, place], color=colour, linewidth=1.5 * thick)
        drawn += axes.plot(middle, place, "o", color=colour, markersize=5 * thick)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set(**labels)
    return drawn
