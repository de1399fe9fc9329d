"""tools/animation.py: every picture of an explorer, in order, below a slider that stands where it should."""

import importlib.util
import io
from types import ModuleType

import ipywidgets
import numpy as np
import pytest
from PIL import Image

from lora_edu import notebooks
from lora_edu.explore import Explorer, explorer
from lora_edu.paths import REPOSITORY


@pytest.fixture(scope="module")
def animation() -> ModuleType:
    place = REPOSITORY / "tools" / "animation.py"
    specification = importlib.util.spec_from_file_location("animation", place)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def line(figure, r: int) -> str:
    figure.subplots().plot([0, 1], [0, r])
    return f"A line {r} high."


@pytest.fixture(scope="module")
def shown() -> Explorer:
    return Explorer(line, {"r": [1, 2, 5]}, start={"r": 2}, labels={"r": "how high"}, formats={"r": "{} m"})


def states(shown: Explorer) -> dict:
    return ipywidgets.Widget.get_manager_state(widgets=explorer.parts(shown))["state"]


def test_the_pictures_are_the_explorers_own_and_the_slider_moves(animation, shown):
    name, values, pictures = animation.first_explorer(states(shown))
    assert (name, values) == ("how high", ["1 m", "2 m", "5 m"])
    assert pictures == [picture.png for picture in shown.pictures.values()]
    bars = []
    for frame, png in zip(animation.frames(name, values, pictures), pictures, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        whole = np.asarray(frame)
        assert (whole[-len(picture) :] == picture).all()
        blue = (whole[: -len(picture)].astype(int) @ [1, 1, -2]) < -60
        bars.append(np.flatnonzero(blue.any(0)).max())
    steps = np.diff(bars)
    assert min(steps) > 100 and abs(steps[0] - steps[1]) <= 1, "evenly spaced, as on the page"


def test_the_gif_shows_each_frame_in_turn_for_ever(animation, shown):
    frames = list(animation.frames(*animation.first_explorer(states(shown))))
    gif = Image.open(io.BytesIO(animation.to_gif(frames)))
    assert gif.n_frames == 3 and gif.info["loop"] == 0 and gif.size == frames[0].size
    for number, frame in enumerate(frames):
        gif.seek(number)
        off = np.abs(np.asarray(gif.convert("RGB")).astype(int) - np.asarray(frame))
        assert off.mean() < 1, "few colours, the same picture"


def test_without_an_explorer_it_says_so(animation):
    with pytest.raises(ValueError, match="should open with one"):
        animation.first_explorer({"a": {"model_name": "HTMLModel", "state": {}}})


def test_the_readme_opens_with_what_was_made(animation):
    gif = Image.open(animation.TARGET)
    [edition] = notebooks.editions("index")
    assert "explore.what_each_rank_writes(" in edition.notebook.cells[1].source
    assert gif.n_frames == 6 and animation.TARGET.stat().st_size < animation.MOST_BYTES
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    before, _ = readme.split(f"](notebooks/images/{animation.TARGET.name})")
    assert "](" not in before and "## " not in before and len(before.split("![")[1]) > 100, (
        "first, and in words"
    )
