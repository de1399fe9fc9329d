"""A question for the reader to answer before the code does: buttons, each linked in the browser to its reply.

No kernel is needed once the cell has run, so it answers on a published page, too. It keeps no score.
"""

import html
from collections.abc import Mapping

import ipywidgets as widgets
from ipywidgets.widgets.widget_string import HTMLStyle

from lora_edu.explore.explorer import WITHOUT_KERNEL, Linked, replace_earlier

CLASS = "lora-edu-prediction"  # what the site and the tests know a prediction by


class Prediction(Linked):
    """A question above its buttons; the reply of a button shows when it is pressed, and none before.

    Where no widget can be shown (GitHub, paper) the question and the options stand there, without the replies.
    """

    def __init__(self, question: str, replies: Mapping[str, str]):
        """question: plain text. replies: option → what is said to a reader who chose it, plain text.

        Raises ValueError for an empty question, fewer than two options, or an option without a reply.
        """
        check(question, replies)
        self.question, self.replies = (
            one_line(question),
            {one_line(option): one_line(reply) for option, reply in replies.items()},
        )
        options = list(self.replies)
        buttons = widgets.ToggleButtons(
            options=options,
            index=None,
            tooltips=options,  # else a screen reader reads an empty title
            style={"button_width": "auto"},
            layout=widgets.Layout(width="100%"),
        )
        layout, style = widgets.Layout(width="100%", margin="0"), HTMLStyle()
        pages = [
            widgets.HTML(reply_page(option, reply), layout=layout, style=style)
            for option, reply in self.replies.items()
        ]
        stack = widgets.Stack(pages, selected_index=None, layout=widgets.Layout(width="100%"))
        links = [widgets.jslink((buttons, "index"), (stack, "selected_index"))]
        asked = widgets.HTML(f"<b>{html.escape(self.question)}</b>", layout=layout, style=style)
        super().__init__([asked, buttons, stack, make_css()], layout=widgets.Layout(width="100%"))
        self._links = links  # VBox's own set-up comes first
        self.buttons, self.stack = buttons, stack
        self.add_class(CLASS)
        replace_earlier(self)

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        options = "".join(f"\n  ○ {option}" for option in self.replies)
        items = "".join(f"<li>{html.escape(option)}</li>" for option in self.replies)
        still = {
            "text/plain": f"Predict. {self.question}{options}",
            "text/html": f"<p><b>Predict.</b> {html.escape(self.question)}</p><ul>{items}</ul>",
        }
        return super()._repr_mimebundle_(**kwargs) | still, {}


def predict(question: str, replies: Mapping[str, str]) -> Prediction:
    """A question with a button for each option; pressing one shows its reply (see `Prediction`)."""
    return Prediction(question, replies)


def check(question: str, replies: Mapping[str, str]) -> None:
    """Raises ValueError with what is wrong with the question or with the replies."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"a prediction needs a question; got {question!r}")
    if len(replies) < 2:
        raise ValueError(f"a prediction needs at least two options to choose from; got {list(replies)}")
    for option, reply in replies.items():
        for what, text in (("option", option), (f"the reply to {option!r}", reply)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{what} must be a text to read; got {text!r}")
    if len(set(map(one_line, replies))) < len(replies):
        raise ValueError(f"two options read alike once their spaces are one: {list(replies)}")


def one_line(text: str) -> str:
    return " ".join(text.split())


def reply_page(option: str, reply: str) -> str:
    """The reply as HTML; a screen reader says it when it appears."""
    return (
        f'<div role="status" aria-live="polite" class="{CLASS}-reply"><b>{html.escape(option)}</b> · '
        f"{html.escape(reply)}</div>"
    )


def make_css() -> widgets.HTML:
    """The widget that defines how questions look: buttons as wide as their words, focus that can be seen."""
    css = (
        f".{CLASS}{{border-left:4px solid #0072b2;padding:4px 0 4px 12px;margin:4px 0}}"
        f".{CLASS} .widget-html-content{{line-height:1.4;white-space:normal}}"
        f".{CLASS} .widget-toggle-buttons{{flex-wrap:wrap}}"
        f".{CLASS} .jupyter-button{{width:auto;max-width:100%;height:auto;min-height:28px;padding:2px 12px;"
        f"line-height:1.4;white-space:normal}}"
        f".{CLASS} .jupyter-button:focus-visible{{outline:2px solid #0072b2;outline-offset:1px}}"
        f".{CLASS}-reply{{max-width:42rem;padding:4px 0}}" + WITHOUT_KERNEL.format(name=CLASS)
    )
    return widgets.HTML(f"<style>{css}</style>", layout=widgets.Layout(display="none"))
