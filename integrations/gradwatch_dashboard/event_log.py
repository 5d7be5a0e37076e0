"""EventLog: what happened in a run, checked and ready to be sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradwatch_dashboard.arguments import fit_name, note
from gradwatch_dashboard.segments import ChunkKey
from gradwatch_dashboard.wire import Tag, checked_text

_WRONG = "The Gradients tab leaves out an event of %s of run %s: it is damaged."
_INTEGERS = ("step", "micro_batch", "rank", "nan_count", "inf_count", "global_step")
_TEXTS = ("kind", "parameter", "module", "message", "optimizer")
_MAX_INTEGER = 2**53  # what a browser can count

Chunks = Mapping[ChunkKey, Sequence["Entry"]]


class Entry(NamedTuple):
    """An event.

    Attributes:
        step: Its step.
        optimizer: Label of the optimizer.
        json: All of it, as it is sent.
    """

    step: int
    optimizer: str
    json: str


def read_events(run: str, tag: Tag, data: Sequence[Any], known: Chunks) -> Chunks:
    """Reads the events of a session.

    Args:
        run: For the log.
        tag: Their tag.
        data: Its ``TensorDatum``s.
        known: What was read before: it is not read again.

    Returns:
        The entries of each chunk, oldest first.
    """
    chunks: dict[ChunkKey, Sequence[Entry]] = {}
    for datum in data:
        key = (datum.step, datum.wall_time)
        if key not in chunks:
            chunks[key] = known[key] if key in known else _entries(run, tag, datum.numpy)
    return chunks


def kept_events(
    sessions: Mapping[str, Chunks], first_steps: Mapping[str, Mapping[str, int]]
) -> list[Entry]:
    """Joins the sessions: a later one replaces earlier events from its first step on.

    Args:
        sessions: Session to its events.
        first_steps: Optimizer to session to the first step that it holds.

    Returns:
        The events, oldest first.
    """
    kept: list[Entry] = []
    for session in sorted(sessions):
        limits = {
            optimizer: min((first for other, first in firsts.items() if other > session), default=0)
            for optimizer, firsts in first_steps.items()
            if any(other > session for other in firsts)
        }
        for entries in sessions[session].values():
            kept += (
                entry
                for entry in entries
                if entry.optimizer not in limits or entry.step < limits[entry.optimizer]
            )
    return kept


def page(events: Sequence[Entry], first: int, last: int, limit: int) -> str:
    """Answers the route ``events``.

    Args:
        events: All of them, oldest first.
        first: The first step that is asked for.
        last: The last step that is asked for.
        limit: How many to list.

    Returns:
        JSON.
    """
    inside = [entry for entry in events if first <= entry.step <= last]
    texts = ", ".join(entry.json for entry in inside[:limit])
    return f'{{"total": {len(inside)}, "events": [{texts}]}}'


def _entries(run: str, tag: Tag, texts: Any) -> list[Entry]:
    entries = [_read_entry(text) for text in texts.ravel().tolist()]
    if None in entries:
        note(_WRONG, str(tag), run)
    return [entry for entry in entries if entry is not None]


def _read_entry(text: Any) -> Entry | None:
    try:
        return _entry(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None


def _entry(fields: Any) -> Entry:
    """Takes the fields of an event, and nothing else that a stranger may have put there."""
    event: dict[str, int | float | str] = {}
    for name in _INTEGERS:
        event[name] = _integer(fields.get(name, 0) if name != "step" else fields["step"])
    for name in _TEXTS:
        event[name] = fit_name(checked_text(fields.get(name, "")))
    value = float(fields.get("value", math.nan))
    event["value"] = value if math.isfinite(value) else str(value).replace("inf", "Infinity")
    if event["value"] == "nan":
        event["value"] = "NaN"
    return Entry(int(event["step"]), str(event["optimizer"]), json.dumps(event))


def _integer(value: Any) -> int:
    number = int(value)
    if number != value or abs(number) > _MAX_INTEGER:
        raise ValueError(f"{number} is no count")
    return number
