"""From a notebook that was run to the source of a page: pictures with alt texts, explorers that need no kernel.

It knows what explorers are made of (widgets linked to each other), not what they show.
"""

import html
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from lora_edu.notebooks import LIVE_VIEW

STATE = "application/vnd.jupyter.widget-state+json"
INPUTS = (
    "Slider",
    "Text",
    "Dropdown",
    "Button",
    "Checkbox",
    "Select",
    "Picker",
)  # what a reader turns or types
LINKS = ("LinkModel", "DirectionalLinkModel")
CANNOT = "This part asks the Python kernel, which a page does not have: open the chapter with `make lab` to use it."
STARTS = "Here is what it says for the values it starts with."
NO_SCRIPTS = "Scripts are off, so the slider stays where it is."
NO_REPLIES = "Scripts are off, so no option answers."
PREDICTION = "lora-edu-prediction"  # the CSS class of explore.predict's widget

Models = Mapping[str, Mapping]  # a widget's id → its model_name and its state


@dataclass(frozen=True)
class Page:
    """One page: `source` for MyST-NB, and the widgets that its explorers are made of."""

    source: NotebookNode
    models: dict


def make_page(notebook: NotebookNode, name: str, solutions: str | None = None) -> Page:
    """The page of a notebook that was run with its widgets kept (or was not: then sliders stand still).

    solutions: the name of the page with the answers, which is linked from below the exercises.
    Raises ValueError for a picture without a sentence that says what it shows.
    """
    source = deepcopy(notebook)
    models = source.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    needed = set()
    for cell in source.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "remove-input"]
        for output in cell.get("outputs", []):
            needed |= convert(output, models, f"{name}, cell {cell.source[:60]!r}")
    if solutions:
        last = max(
            index for index, cell in enumerate(source.cells) if "exercise" in cell.metadata.get("tags", [])
        )
        source.cells.insert(
            last + 1,
            new_markdown_cell(
                f"The answers, and why they are right: [solutions]({solutions}).", id="solutions"
            ),
        )
    return Page(source, {identity: slim(models[identity]) for identity in sorted(needed)})


def convert(output: NotebookNode, models: Models, where: str) -> set[str]:
    """Puts the HTML that shows an output in its place, where there is something to do; returns the widgets it needs."""
    data = output.get("data", {})
    root = data.pop(LIVE_VIEW, {}).get("model_id")
    needed = parts(models, root) if root in models else set()
    if "image/png" in data:
        about = output.metadata.get("image/png", {})
        if not about.get("alt"):
            raise ValueError(
                f"{where} shows a picture without a sentence: show it with plots.show(figure, sentence)"
            )
        if inputs(models, needed):
            shown = explorer(root, models, needed)
        else:
            shown, needed = picture(data["image/png"], about), set()
        output.data = nbformat.from_dict({"text/html": shown})
        return needed
    if root in models and PREDICTION in models[root]["state"].get("_dom_classes", []):
        output.data = nbformat.from_dict({"text/html": prediction(root, models)})
        return needed
    if inputs(models, needed):
        output.data = nbformat.from_dict({"text/html": asks_kernel(data.get("text/plain", ""))})
    return set()


def picture(png: str, about: Mapping) -> str:
    """An image with its alt text, at the size at which the notebook shows it, or as wide as the page."""
    return (
        f'<img class="picture" alt="{html.escape(about["alt"], quote=True)}" width="{about["width"]}" '
        f'height="{about["height"]}" src="data:image/png;base64,{png.strip()}">'
    )


def explorer(root: str, models: Models, needed: set[str]) -> str:
    """Sliders' names and values, picture and sentence as they are at the start; a script puts the live view here."""
    rows = "".join(
        f'<div class="explorer-row"><span class="explorer-label" style="width:{width}">{html.escape(label)}</span>'
        f'<span class="explorer-value">{html.escape(value)}</span></div>'
        for label, width, value in sliders(models, root)
    )
    return (
        f'<div class="explorer" data-model="{root}"><div class="explorer-start">{rows}{start(models, root)}</div>'
        f'<noscript><p class="explorer-note">{NO_SCRIPTS}</p></noscript></div>'
    )


def prediction(root: str, models: Models) -> str:
    """A question and its options as they look before a choice, without the replies; a script brings them to life."""
    asked, buttons, *_ = (models[child]["state"] for child in children(models, root))
    options = "".join(f"<li>{html.escape(option)}</li>" for option in buttons["_options_labels"])
    return (
        f'<div class="prediction" data-model="{root}"><div class="prediction-start">'
        f"<p>{asked['value']}</p><ul>{options}</ul></div>"
        f'<noscript><p class="explorer-note">{NO_REPLIES}</p></noscript></div>'
    )


def asks_kernel(text: str) -> str:
    """One line that says why nothing can be turned here, and the text for the values it starts with."""
    line = html.escape(CANNOT).replace("`make lab`", "<code>make lab</code>")
    return f'<div class="asks-kernel"><p>{line} {STARTS}</p><pre tabindex="0">{html.escape(text)}</pre></div>'


def sliders(models: Models, root: str) -> Iterator[tuple[str, str, str]]:
    """Of each slider directly below a widget: its name, the width its name is given, and its value as text."""
    for child in children(models, root):
        state = models[child]["state"]
        if models[child]["model_name"] == "SelectionSliderModel":
            style = models[reference(state["style"])]["state"]
            yield state["description"], style["description_width"], state["_options_labels"][state["index"]]


def start(models: Models, root: str) -> str:
    """The HTML that a stack of stacks shows before anything was turned."""
    state = models[root]["state"]
    if models[root]["model_name"] == "HTMLModel":
        return state["value"]
    below = children(models, root)
    if models[root]["model_name"] == "StackModel":
        return start(models, below[state["selected_index"]])
    return (
        next(shown for child in below if (shown := start(models, child)) and "<img" in shown) if below else ""
    )


def children(models: Models, identity: str) -> list[str]:
    return [reference(child) for child in models[identity]["state"].get("children", [])]


def reference(value: str) -> str:
    return value.removeprefix("IPY_MODEL_")


def references(value) -> Iterator[str]:
    """The widgets that a value of a state names, lists included."""
    if isinstance(value, str) and value.startswith("IPY_MODEL_"):
        yield reference(value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from references(part)


def parts(models: Models, root: str) -> set[str]:
    """A widget, all that it is made of, and the links between these."""
    found, waiting = set(), [root]
    while waiting:
        identity = waiting.pop()
        if identity not in found and identity in models:
            found.add(identity)
            waiting += [name for value in models[identity]["state"].values() for name in references(value)]
    for identity, model in models.items():
        if model["model_name"] in LINKS and set(references(model["state"]["source"])) <= found:
            found.add(identity)
    return found


def inputs(models: Models, needed: set[str]) -> bool:
    """Whether there is something to turn or to type into."""
    names = (models[identity]["model_name"] for identity in needed)
    return any(kind in name.removesuffix("StyleModel") for name in names for kind in INPUTS)


def slim(model: Mapping) -> dict:
    """A widget without what is its default anyway; an index of none is not."""
    kept = ("index", "selected_index")
    state = {name: value for name, value in model["state"].items() if value is not None or name in kept}
    return {"model_name": model["model_name"], "state": state}


def script(models: Mapping) -> str:
    """The widgets as a script element that no browser runs; our own script reads it."""
    text = json.dumps(models, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="{STATE}">{text}</script>'
