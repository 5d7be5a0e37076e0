"""tail as lines, for logs, pipes and simple terminals; and as lines of JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradwatch.commands.live.follower import New
from gradwatch.commands.live.row import Happening
from gradwatch.commands.live.words import event_line, step_line
from gradwatch.commands.shared.as_json import as_json
from gradwatch.commands.shared.numbers import counted


def text_lines(new: New, most: int, several: bool) -> Iterator[str]:
    """Writes what has come.

    Args:
        new: Steps and events.
        most: Steps to write.
        several: Whether the run has several optimizers.

    Yields:
        Lines, an event behind the step that it belongs to, or else at the end.
    """
    if new.resumed:
        yield "The run was resumed."
    rows = new.rows[-most:]
    left_out = new.left_out + len(new.rows) - len(rows)
    if left_out:
        yield f"... {counted(left_out, 'step')} not shown"
    waiting = list(new.events[-most:])
    if rows:
        yield from _events([one for one in waiting if one.step < rows[0].step], several)
        waiting = [one for one in waiting if one.step >= rows[0].step]
    for row in rows:
        yield step_line(row, several)
        mine = [one for one in waiting if (one.step, one.optimizer) == (row.step, row.optimizer)]
        yield from _events(mine, several)
        waiting = [one for one in waiting if one not in mine] if mine else waiting
    yield from _events(waiting, several)


def _events(events: Sequence[Happening], several: bool) -> Iterator[str]:
    return (f"  event  {event_line(event, several)}" for event in events)


def json_lines(new: New, most: int) -> Iterator[str]:
    """Writes what has come as one object per line, with ``type`` ``"step"`` or ``"event"``.

    Args:
        new: Steps and events.
        most: Steps to write.

    Yields:
        Lines of JSON.
    """
    for row in new.rows[-most:]:
        yield as_json({"type": "step", **row._asdict()})
    for event in new.events[-most:]:
        yield as_json({"type": "event", **event._asdict()})
