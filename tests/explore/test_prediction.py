"""Predictions without a browser: what stands in the widgets, what is stored, what is refused and how."""

import sys

import pytest

from lora_edu.explore import explorer, predict

REPLIES = {"about 2": "Too <few> & vague.", "about 20": "Look at the eyes.", "all": "None is needed."}


def test_nothing_is_revealed_before_a_choice():
    shown = predict("At which rank?", REPLIES)
    assert shown.buttons.index is None and shown.stack.selected_index is None
    assert list(shown.buttons.options) == list(REPLIES)
    stored, _ = shown._repr_mimebundle_()
    for reply in REPLIES.values():
        assert reply not in stored["text/plain"] and reply.split()[0] not in stored["text/html"]
    assert stored["text/plain"] == "Predict. At which rank?\n  ○ about 2\n  ○ about 20\n  ○ all"
    assert "<li>about 20</li>" in stored["text/html"]


def test_each_button_is_linked_to_its_own_reply():
    shown = predict("At which rank?", REPLIES)
    (link,) = shown._links
    assert link.source == (shown.buttons, "index") and link.target == (shown.stack, "selected_index")
    pages = [page.value for page in shown.stack.children]
    assert "about 2<" in pages[0] and "Too &lt;few&gt; &amp; vague." in pages[0]
    assert "Look at the eyes." in pages[1] and "None is needed." in pages[2]


@pytest.mark.parametrize(
    ("question", "replies", "message"),
    [
        ("", REPLIES, "needs a question"),
        (" \n", REPLIES, "needs a question"),
        (3, REPLIES, "needs a question"),
        ("Why?", {}, "at least two options"),
        ("Why?", {"so": "It is."}, "at least two options"),
        ("Why?", {"so": "It is.", "not": ""}, "reply to 'not'"),
        ("Why?", {"so": "It is.", "": "No."}, "option must be a text"),
        ("Why?", {"so": "It is.", 2: "No."}, "option must be a text"),
        ("Why?", {"so  it is": "Yes.", "so it is": "No."}, "read alike"),
    ],
)
def test_what_is_refused(question, replies, message):
    with pytest.raises(ValueError, match=message):
        predict(question, replies)


def test_closing_takes_all_parts_away():
    shown = predict("At which rank?", REPLIES)
    everything = explorer.parts(shown) | set(shown._links)
    shown.close()
    assert all(part.comm is None for part in everything)
    shown.close()  # a second time is no error


def test_a_cell_that_is_run_again_keeps_one_question(monkeypatch):
    class Shell:
        message = "first"

        def get_parent(self):
            return {"metadata": {"cellId": "cell"}, "header": {"msg_id": self.message}}

    shell = Shell()
    monkeypatch.setattr(sys.modules["lora_edu.explore.explorer"], "get_ipython", lambda: shell)
    monkeypatch.setattr(explorer, "alive", {})
    first = predict("At which rank?", REPLIES)
    shell.message = "second"
    second = predict("At which rank?", REPLIES)
    assert first.comm is None and second.comm is not None
