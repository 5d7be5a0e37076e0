"""What ``tail`` prints into a pipe: a line per step and event, as text or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict

from gradwatch.cli.follower import KEPT, Follower, New, declared_texts
from gradwatch.cli.terminal import Output, as_json, event_line, number, times
from gradwatch.record.records import Event, StepRecord
from gradwatch.record.wording import counted, printable


class Lines:
    """Writes a line per new step and event.

    Args:
        most: Maximum number of existing steps to write at the first look.
        json: Whether the lines are JSON.
    """

    def __init__(self, out: Output, run: str, most: int, *, json: bool) -> None:
        self._out, self._run, self._most, self._json = out, printable(run), most, json
        self._told = False
        self._begun: set[str] = set()  # models of which steps have been written

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def waiting(self) -> None:
        """Says once that the run has not begun."""
        if not self._told and not self._json:
            self._out.line(f"Waiting for {self._run} to begin ...")
            self._out.flush()
        self._told = True

    def show(self, looks: Mapping[str, tuple[Follower, New]]) -> None:
        """Writes the new steps and events, by model."""
        for model, (follower, new) in looks.items():
            named = f"{printable(model)}  " if len(looks) > 1 and not self._json else ""
            for line in self._lines(model, follower, new):
                self._out.line(f"{named}{line}")
            # Only the first look is limited: later steps are all new.
            if follower.rows:
                self._begun.add(model)
        # Without a flush, lines to a pipe would wait in a buffer of some thousand bytes.
        self._out.flush()

    def _lines(self, model: str, follower: Follower, new: New) -> Iterator[str]:
        most = KEPT if model in self._begun else self._most
        if self._json:
            return _json_lines(new, most, {"model": model} if model else {})
        if not follower.rows and not self._told:
            self._told = True
            return iter([f"{self._run} has no steps yet."])
        several = len({row.optimizer for row in follower.rows}) > 1
        return _text_lines(new, most, several)


def _json_lines(new: New, most: int, model: Mapping[str, str]) -> Iterator[str]:
    for row in new.rows[-most:]:
        yield as_json({"type": "step", **model, **asdict(row)})
    for event in new.events[-most:]:
        yield as_json({"type": "event", **model, **asdict(event)})


def _text_lines(new: New, most: int, several: bool) -> Iterator[str]:
    """Yields a line per step, each followed by its events; other events come last."""
    if new.resumed:
        yield "The run was resumed."
    rows = new.rows[-most:]
    left_out = new.left_out + len(new.rows) - len(rows)
    if left_out:
        yield f"... {counted(left_out, 'step')} not shown"
    waiting = list(new.events[-most:])
    if rows:
        # Events of steps that are not shown come first.
        yield from _event_lines((one for one in waiting if one.step < rows[0].step), several)
        waiting = [one for one in waiting if one.step >= rows[0].step]
    for row in rows:
        yield _step_line(row, several)
        mine = [one for one in waiting if (one.step, one.optimizer) == (row.step, row.optimizer)]
        yield from _event_lines(mine, several)
        waiting = [one for one in waiting if one not in mine] if mine else waiting
    yield from _event_lines(waiting, several)


def _event_lines(events: Iterable[Event], several: bool) -> Iterator[str]:
    for event in events:
        optimizer = event.optimizer if several else ""
        yield f"  event  {event_line(event.step, event.kind, event.message, optimizer)}"


def _step_line(row: StepRecord, several: bool) -> str:
    label = f"{printable(row.optimizer)} " if several else ""
    # Pad the numbers to a fixed width, so that the lines align.
    parts = [f"{label}step {row.step:>8,}", f"norm {number(row.grad_norm):>9}"]
    parts += [f"{name} {text:>9}" for name, text in declared_texts(row).items() if text]
    parts += [f"clipped {times(row.clip_coef)}"] if row.clipped else []
    parts += [] if row.outcome == "applied" else [printable(row.outcome).replace("_", " ")]
    return "  ".join(parts)
