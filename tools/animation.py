"""The README's animation: the first slider of the index, moved from its first value to its last.

    python tools/animation.py

Runs notebooks/source/index.py and writes notebooks/images/what_each_rank_writes.gif. The pictures are the
explorer's own; only the slider above them is drawn here.
"""

import base64
import io
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lora_edu import notebooks, plots
from lora_edu.paths import write_atomically
from lora_edu.site import book, pages

TARGET = notebooks.FOLDER / "images" / "what_each_rank_writes.gif"
MOST_BYTES = 1_000_000
SECONDS = 2.2  # each picture stays; the last twice as long
BAR = 40  # height of the slider, in pixels of the page
INK, RAIL = "#222222", "#b0b0b0"


def first_explorer(models: pages.Models) -> tuple[str, list[str], list[bytes]]:
    """The first slider among a notebook's widgets with one stack of pictures: its name, its values, their PNGs.

    Raises ValueError where there is none.
    """
    for identity, model in models.items():
        below = [models[child] for child in pages.children(models, identity)]
        named = {child["model_name"]: child["state"] for child in below}
        if model["model_name"] == "VBoxModel" and {"SelectionSliderModel", "StackModel"} <= set(named):
            slider, stack = named["SelectionSliderModel"], named["StackModel"]
            values = [models[pages.reference(page)]["state"].get("value", "") for page in stack["children"]]
            found = [re.search(r"data:image/png;base64,([^\"]+)", value) for value in values]
            if all(found):
                pictures = [base64.b64decode(match[1]) for match in found]
                return slider["description"], list(slider["_options_labels"]), pictures
    raise ValueError("no explorer with one slider: the first page should open with one")


def frames(name: str, values: list[str], pictures: list[bytes]) -> Iterator[Image.Image]:
    """Each picture below the slider that stands at its value."""
    for position, png in enumerate(pictures):
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        scale = picture.width / plots.shown_size(png)[0]
        frame = Image.new("RGB", (picture.width, picture.height + round(BAR * scale)), "white")
        frame.paste(picture, (0, frame.height - picture.height))
        draw_slider(frame, scale, name, values, position)
        yield frame


def draw_slider(frame: Image.Image, scale: float, name: str, values: list[str], position: int) -> None:
    """Name, rail, handle and value, in a bar at the top. scale: pixels of the frame for each one shown."""
    draw = ImageDraw.Draw(frame)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), round(13 * scale))
    middle, room = BAR * scale / 2, 14 * scale
    begin = room + draw.textlength(name, font) + room
    end = frame.width - room - max(draw.textlength(value, font) for value in values) - room
    handle, radius = begin + (end - begin) * position / (len(values) - 1), 8 * scale
    draw.text((room, middle), name, INK, font, anchor="lm")
    draw.line((begin, middle, end, middle), RAIL, round(3 * scale))
    draw.line((begin, middle, handle, middle), plots.BLUE, round(3 * scale))
    draw.ellipse(
        (handle - radius, middle - radius, handle + radius, middle + radius),
        "white",
        plots.BLUE,
        round(2 * scale),
    )
    draw.text((end + room, middle), values[position], INK, font, anchor="lm")


def to_gif(images: list[Image.Image]) -> bytes:
    """The frames as a GIF that never ends, in 64 colours."""
    few = [image.quantize(64, dither=Image.Dither.NONE) for image in images]
    durations = [round(1000 * SECONDS)] * (len(few) - 1) + [round(2000 * SECONDS)]
    file = io.BytesIO()
    few[0].save(file, "GIF", save_all=True, append_images=few[1:], duration=durations, loop=0, optimize=True)
    return file.getvalue()


def main() -> None:
    [edition] = notebooks.editions("index")
    edition.notebook.cells = book.until_heading(edition.notebook.cells)  # what the site's first page shows
    widgets: Mapping = notebooks.run(edition.notebook, keep_widgets=True).metadata.widgets
    data = to_gif(list(frames(*first_explorer(widgets[pages.STATE]["state"]))))
    if len(data) > MOST_BYTES:
        sys.exit(f"the animation has {len(data) / 1e6:.2f} MB; it may have {MOST_BYTES / 1e6:.0f}")
    write_atomically(TARGET, data)
    print(f"{TARGET.relative_to(notebooks.FOLDER.parent)}: {len(data) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
