"""Events as Markdown."""

import warnings
from html.parser import HTMLParser

import markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_tensorboard.events import MAX_LENGTH, MAX_TEXT_EVENTS, EventText, escape

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of html5lib, inside TensorBoard
    from tensorboard.plugin_util import markdown_to_safe_html

# TensorBoard 2.14 brings an html5lib that warns at each call.
pytestmark = pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://example.com/x.png)",
    "**bold** _it_ __init__ ~~no~~",
    "`code` ``` fence",
    "a | b | c",
    "&lt;b&gt; &amp; &#42;",
    "<http://example.com>",
    "\\*not escaped\\*",
    "line\n\n# heading\n* item\n---",
    "[ref]: http://example.com",
    "1. one",
    "\u0002wzxhzdk:0\u0003",
]


class Page(HTMLParser):
    """What a browser makes of HTML: its elements, and the text in them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def rendered(markdown_text):
    """The elements and the text that TensorBoard shows."""
    parser = Page()
    parser.feed(markdown_to_safe_html(markdown_text))
    parser.close()
    return parser.tags, parser.text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_is_shown_as_it_is(name):
    """A name adds no element, and every character of it that can be seen is seen."""
    tags, text = rendered(f"* step 1, **nan** ({escape(name)}): x")
    assert tags == ["ul", "li", "strong"]
    shown = "".join(" " if c in "\n\t" else "\ufffd" if ord(c) < 32 else c for c in name)
    assert " ".join(text.split()) == " ".join(f"step 1, nan ({shown}): x".split())


MARKUP = st.text(alphabet="<>[]()!`*_|~\\&;#-+=:/\"'.1ab \n\t\x02\x03", max_size=60)


@given(st.text(max_size=60) | MARKUP)
def test_no_text_adds_an_element(name):
    """Any string at all stays text inside its list item, without TensorBoard's sanitizer too."""
    line = f"* step 1, **nan** ({escape(name)}): x"
    tags, _ = rendered(line)
    assert tags == ["ul", "li", "strong"]
    html = markdown.markdown(line, extensions=["tables", "fenced_code"])
    assert html.count("<") == 6


def test_long_text_is_cut():
    """One message cannot fill the page."""
    assert len(escape("x" * 10_000)) == MAX_LENGTH


def test_direction_marks_and_lone_surrogates_are_replaced():
    """What would turn the line around, or cannot be written as UTF-8, is shown as U+FFFD."""
    assert escape("a\u202eb\ud800c") == "a\ufffdb\ufffdc"
    escape("\ud800").encode()


def test_list_grows_until_it_is_full(run):
    """Each text holds all events so far, since TensorBoard's sampling keeps the last one only."""
    text = EventText()
    first = text.add([run.event(1)], "AdamW")
    second = text.add([run.event(2, kind="inf")], "AdamW")
    assert first.splitlines() == second.splitlines()[:1]
    assert "step 2, **inf**" in second


def test_notes_once_that_more_follow(run):
    """Twenty events are listed; the text that leaves one out says so, and no further text comes."""
    text = EventText()
    full = text.add([run.event(step) for step in range(MAX_TEXT_EVENTS)], "AdamW")
    more = text.add([run.event(MAX_TEXT_EVENTS)], "AdamW")
    assert full.count("* step") == more.count("* step") == MAX_TEXT_EVENTS
    assert "More events" not in full
    assert "More events" in more
    assert text.add([run.event(99)], "AdamW") is None


def test_exactly_twenty_events_are_all(run):
    """No note where nothing was left out."""
    text = EventText().add([run.event(step) for step in range(MAX_TEXT_EVENTS)], "AdamW")
    assert "More events" not in text


def test_parameter_is_named_once(run):
    """A message that names the parameter is not preceded by the name."""
    name = run.layout.names[0]
    text = EventText().add([run.event(1), run.event(2, message=f"NaN in {name}")], "AdamW")
    assert [line.count(name) for line in text.splitlines()] == [1, 1]


def test_names_a_further_optimizer(run):
    """An event says which optimizer it is of, unless that goes without saying."""
    text = EventText().add([run.event(1), run.event(1, optimizer="SGD-1")], "AdamW")
    assert ["AdamW" in line for line in text.splitlines()] == [False, False]
    assert ["SGD" in line for line in text.splitlines()] == [False, True]
