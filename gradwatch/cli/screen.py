"""The screen of ``gradwatch tail``: curve, clip rate, newest steps and events; needs rich."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.cli.follower import HEADINGS, Follower, New, declared_texts
from gradwatch.cli.terminal import (
    ASCII,
    BLOCKS,
    Output,
    event_line,
    number,
    percent,
    shortened,
    sparkline,
    times,
    width,
)
from gradwatch.record.records import StepRecord
from gradwatch.record.wording import counted, printable

_EVENTS = 5
_OTHER_LINES = 11  # lines of the screen besides the table of steps and the events
_LINES_WITH_TABLE = 14  # for a table of one step and all events; with fewer there is the curve
_FEWEST_LINES = 3  # of one model among several
_STALE_S = 30.0
_CURVES = 3  # optimizers that get a curve each

_LEFT_OUT = ("norm of all", "lr", "after clip", "loss", "clip")
"""Columns that are left out on a narrow terminal, in this order; numbers are never cut."""


class Screen:
    """Shows a run on a terminal for the length of a ``with`` block.

    Args:
        out: Must be a terminal.
        most: Maximum number of steps to show; fewer if they do not fit.
    """

    def __init__(self, out: Output, run: str, most: int) -> None:
        # Names come from the run: "[red]" or ":smile:" in one must stay text.
        self._console = Console(file=out.stream, markup=False, highlight=False, emoji=False)
        self._levels = BLOCKS if out.can_show(BLOCKS) else ASCII
        self._run, self._most = printable(run), most
        # Draw once per look: rich's refresh thread would draw the same several times.
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def waiting(self) -> None:
        """Shows that the run has not begun."""
        self._live.update(Text(f"Waiting for {self._run} to begin ... (Ctrl-C ends)"), refresh=True)

    def show(self, looks: Mapping[str, tuple[Follower, New]]) -> None:
        """Draws the newest state of each follower; what is new is already part of it."""
        self._live.update(Group(*self._all_parts(looks)), refresh=True)

    def _all_parts(self, looks: Mapping[str, tuple[Follower, New]]) -> Iterator[RenderableType]:
        lines = self._console.height - 1
        # Of many models those are shown that train: a fold after the other, for example.
        newest = sorted(looks, key=lambda model: -looks[model][0].changed_at)
        shown = newest[: max(1, lines // _FEWEST_LINES)]
        for model, (follower, _) in looks.items():
            if model in shown:
                yield from self._parts(follower, model if len(looks) > 1 else "", len(shown))
        if len(shown) < len(looks):
            yield Text(f"{len(looks) - len(shown):,} more, which have not changed since", "dim")
        yield Text("Ctrl-C ends", style="dim")

    def _parts(
        self, follower: Follower, model: str = "", models: int = 1
    ) -> Iterator[RenderableType]:
        """Draws a model; ``models`` share the screen."""
        rows = list(follower.rows)
        labels = len(_labels(rows))
        lines = self._console.height // models
        yield self._head(printable(model) or self._run, rows, follower)
        if not rows:
            yield Text("No steps yet.")
        else:
            yield from self._curves(rows)
            yield _clip_line(rows)
            if models > 1 and lines < _LINES_WITH_TABLE:
                return
            yield Text()
            yield self._table(rows, lines)
        yield from _event_lines(follower, labels > 1)

    def _head(self, name: str, rows: Sequence[StepRecord], follower: Follower) -> Text:
        idle_s = time.monotonic() - follower.changed_at
        step = f"  step {rows[-1].step:,}" if rows else ""
        since = f"  nothing new for {_ago(idle_s)}" if idle_s >= _STALE_S else ""
        # Shorten a long path: the console would wrap it, and the step, onto a second line.
        room = max(8, self._console.width - len(step) - len(since))
        head = Text(shortened(name, room), style="bold")
        return head.append(step, style="bold green").append(since, style="yellow")

    def _curves(self, rows: Sequence[StepRecord]) -> Iterator[Text]:
        # The norms of two optimizers in one curve would zigzag; many curves would fill the screen.
        labels = _labels(rows)
        if len(labels) == 1 or len(labels) > _CURVES:
            yield self._curve("norm", rows)
            return
        for label in labels:
            mine = [row for row in rows if row.optimizer == label]
            yield self._curve(f"norm, {shortened(printable(label), 16)}", mine)

    def _curve(self, name: str, rows: Sequence[StepRecord]) -> Text:
        norms = [row.grad_norm for row in rows]
        finite = [norm for norm in norms if math.isfinite(norm)]
        bounds = f"  {number(min(finite))} to {number(max(finite))}" if finite else ""
        columns = max(8, self._console.width - len(name) - 1 - len(bounds) - 1)
        curve = Text(f"{name} ").append(sparkline(norms, columns, self._levels), style="cyan")
        return curve.append(bounds, style="dim")

    def _table(self, rows: Sequence[StepRecord], lines: int) -> Table:
        labels = _labels(rows)
        shown = rows[-self._room(len(labels), lines) :]
        cells = _columns(shown, len(labels) > 1)
        for name in _LEFT_OUT:
            if _width(cells) > self._console.width:  # checked again after each column
                cells.pop(name, None)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in cells:
            left = name in ("optimizer", "outcome")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row, texts in zip(shown, zip(*cells.values(), strict=True), strict=True):
            table.add_row(*map(Text, texts), style=_style(row))
        return table

    def _room(self, optimizers: int, lines: int) -> int:
        taken = _OTHER_LINES + _EVENTS + (optimizers - 1 if optimizers <= _CURVES else 0)
        return max(1, min(self._most, lines - taken))


def _event_lines(follower: Follower, several: bool) -> Iterator[Text]:
    if not follower.event_counts:
        yield Text("No events", style="dim")
        return
    kinds = follower.event_counts.most_common(8)
    counts = ", ".join(f"{printable(kind)} {amount:,}" for kind, amount in kinds)
    yield Text(f"Events: {counts}", no_wrap=True, overflow="ellipsis")
    for event in list(follower.events)[-_EVENTS:]:
        optimizer = event.optimizer if several else ""
        text = f"  {event_line(event.step, event.kind, event.message, optimizer)}"
        yield Text(text, style="yellow", no_wrap=True, overflow="ellipsis")


def _clip_line(rows: Sequence[StepRecord]) -> Text:
    applied = [row for row in rows if row.outcome == "applied"]
    clipped = [row.clipped for row in applied if row.clipped is not None]
    rate = percent(sum(clipped) / len(clipped) if clipped else math.nan)
    skipped = len(rows) - len(applied)
    threshold = rows[-1].clip_threshold
    parts = [f"clipped {rate} of the last {counted(len(rows), 'step')}"]
    parts += [] if math.isnan(threshold) else [f"threshold {number(threshold)}"]
    parts += [f"skipped {skipped:,}"] if skipped else []
    return Text(", ".join(parts))


def _labels(rows: Sequence[StepRecord]) -> list[str]:
    return list(dict.fromkeys(row.optimizer for row in rows))


def _columns(rows: Sequence[StepRecord], several: bool) -> dict[str, list[str]]:
    """Formats the table by columns, without empty ones."""
    declared = list(map(declared_texts, rows))
    columns = {
        "optimizer": [printable(row.optimizer) if several else "" for row in rows],
        "step": [f"{row.step:,}" for row in rows],
        "norm": [number(row.grad_norm) for row in rows],
        "after clip": [number(row.grad_norm_clipped) if row.clipped else "" for row in rows],
        "clip": [times(row.clip_coef) if row.clipped else "" for row in rows],
        **{heading: [texts[heading] for texts in declared] for heading in HEADINGS.values()},
        "outcome": [printable(row.outcome).replace("_", " ") for row in rows],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    # rich does not give the width of a table before it has cut it to fit. It pads each cell with
    # one space on both sides, except at the outer edges.
    cells = (max(map(width, (name, *texts))) for name, texts in columns.items())
    return sum(cells) + 2 * (len(columns) - 1)


def _style(row: StepRecord) -> str:
    if row.nonfinite_parameters:
        return "bold red"
    return "" if row.outcome == "applied" else "yellow"


def _ago(seconds: float) -> str:
    """Formats a duration in its largest unit.

    Example:
        >>> _ago(3.2), _ago(150), _ago(7200)
        ('3 s', '2 min', '2 h')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
