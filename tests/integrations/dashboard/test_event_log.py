"""Events: read once, joined over sessions, sent a page at a time."""

import json

import numpy as np
import pytest

from gradwatch_dashboard.answers import event_page
from gradwatch_dashboard.sessions import join_events
from gradwatch_dashboard.tensors import read_events
from gradwatch_dashboard.wire import LOOKS, OTHER_LOOK, Tag

from .logs import event
from .test_segments import Datum

TAG = Tag("events", "s")


def chunk(number, *events):
    """Events as TensorBoard gives them."""
    texts = [json.dumps(one).encode() for one in events]
    return Datum(number, float(number), np.array(texts, object))


def test_a_later_session_replaces_from_its_first_step_on():
    """An event in the step at which a later session begins is replaced, the one before is not."""
    old = read_events("run", TAG, [chunk(1, event(4), event(5), event(9, optimizer="B"))], {})
    new = read_events("run", TAG, [chunk(1, event(6))], {})
    kept = join_events({"b": new, "a": old}, {"A": {"b": 5}, "AdamW": {"a": 1, "b": 5, "c": 7}})
    assert [(one.step, one.optimizer) for one in kept] == [(4, "AdamW"), (9, "B"), (6, "AdamW")]


def test_the_last_session_is_whole():
    """A session does not replace its own events, whatever its first step."""
    own = read_events("run", TAG, [chunk(1, event(4), event(8))], {})
    assert len(join_events({"a": own}, {"AdamW": {"a": 1}})) == 2


def test_known_chunks_are_not_read_again():
    """What was read before is taken as it is; a new chunk is added behind it."""
    first = read_events("run", TAG, [chunk(1, event(1))], {})
    both = read_events("run", TAG, [chunk(1, event(99)), chunk(2, event(2))], first)
    assert [one.step for entries in both.values() for one in entries] == [1, 2]


def test_only_the_fields_of_an_event_are_sent():
    """What a stranger added is dropped, what is missing has its default, NaN is a word."""
    entries = read_events(
        "run", TAG, [chunk(1, {"step": 3, "evil": "<b>", "value": float("nan")})], {}
    )
    (sent,) = json.loads(event_page(next(iter(entries.values())), 0, 9, 5))["events"]
    assert "evil" not in sent
    assert sent.keys() == {*event(3), "color", "shape"}
    assert (sent["value"], sent["message"], sent["rank"]) == ("NaN", "", 0)


def test_pages():
    """A page counts all events of its range, both ends included, and lists the first ones."""
    entries = read_events("run", TAG, [chunk(1, *(event(step) for step in range(1, 10)))], {})
    found = json.loads(event_page(next(iter(entries.values())), 3, 7, 2))
    assert (found["total"], [one["step"] for one in found["events"]]) == (5, [3, 4])


def look_of(**fields):
    """Color and shape that the tab is told of an event."""
    entries = read_events("run", TAG, [chunk(1, {"step": 3, **fields})], {})
    (sent,) = json.loads(event_page(next(iter(entries.values())), 0, 9, 5))["events"]
    return sent["color"], sent["shape"]


def test_an_event_says_how_it_looks():
    """A kind that the tab has never heard of looks as its writer says."""
    assert look_of(kind="new", color="#123abc", shape="square") == ("#123abc", "square")


def test_events_of_version_1_look_as_they_did():
    """They say nothing, and are known by their kind; an unknown kind is a gray dot."""
    assert look_of(kind="nan") == ("#ff33ff", "triangle")
    assert look_of(kind="out_of_memory") == ("#d55e00", "square")
    assert look_of(kind="spike") == OTHER_LOOK == ("#8a94a3", "round")


@pytest.mark.parametrize(
    "look",
    [
        {"color": "red;background:url(//x)", "shape": "round"},
        {"color": "#12345", "shape": "round"},
        {"color": "#123abc\n", "shape": "round"},
        {"color": "#123abc", "shape": "round evil"},
        {"color": 3, "shape": ["round"]},
        {"color": "#123abc"},
    ],
)
def test_no_look_of_a_stranger_gets_into_the_page(look):
    """What is no color and no shape is replaced by that of the kind."""
    assert look_of(kind="nan", **look) == LOOKS["nan"]


def test_the_looks_of_version_1_are_those_declared():
    """Files from before and after look the same."""
    adapters = pytest.importorskip("gradwatch.adapters")
    declared = {name: (kind.color, kind.shape) for name, kind in adapters.EVENT_KINDS.items()}
    assert {name: declared[name] for name in LOOKS} == LOOKS
