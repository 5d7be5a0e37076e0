"""tail as a screen that is drawn anew at each look; rich is loaded here only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.commands.live.follower import Follower, New
from gradwatch.commands.live.row import Row
from gradwatch.commands.live.words import ago, clip_rate, clip_text, event_line
from gradwatch.commands.shared.numbers import counted, number
from gradwatch.commands.shared.printable import printable, shortened, width
from gradwatch.commands.shared.sparkline import ASCII, BLOCKS, sparkline

if TYPE_CHECKING:
    from gradwatch.commands.shared.output import Output

EVENTS = 5
OTHER_LINES = 11
"""Lines of the screen besides the table of steps and the events."""

STALE_S = 30.0
LEFT_OUT = ("lr", "after clip", "loss", "clip")
"""Columns that a narrow terminal does without, in this order: a number that is cut is none."""

GAP = 1
CURVES = 3
"""Optimizers that get a curve each."""


class Screen:
    """Shows a follower on a terminal until it is left."""

    def __init__(self, out: Output, run: str, most: int) -> None:
        """Draws nothing yet.

        Args:
            out: A terminal.
            run: How the run is called.
            most: Steps to show, as far as they fit.
        """
        self._console = Console(file=out.stream, markup=False, highlight=False, emoji=False)
        self._levels = BLOCKS if out.can_show(BLOCKS) else ASCII
        self._run, self._most = printable(run), most
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def waiting(self) -> None:
        """Says that the run has not begun."""
        self._live.update(Text(f"Waiting for {self._run} to begin ... (Ctrl-C ends)"), refresh=True)

    def show(self, follower: Follower, new: New) -> None:
        """Draws the newest state.

        Args:
            follower: What is known.
            new: What has come; it is part of the follower.
        """
        self._live.update(Group(*self._parts(follower)), refresh=True)

    def _parts(self, follower: Follower) -> Iterator[RenderableType]:
        rows = list(follower.rows)
        yield self._head(rows, time.monotonic() - follower.changed_at)
        if not rows:
            yield Text("No steps yet.")
        else:
            yield from self._curves(rows)
            yield _clip(rows)
            yield Text()
            yield self._table(rows)
        yield from self._events(follower, len({row.optimizer for row in rows}) > 1)
        yield Text("Ctrl-C ends", style="dim")

    def _head(self, rows: Sequence[Row], idle_s: float) -> Text:
        step = f"  step {rows[-1].step:,}" if rows else ""
        since = f"  nothing new for {ago(idle_s)}" if idle_s >= STALE_S else ""
        room = max(8, self._console.width - len(step) - len(since))
        head = Text(shortened(self._run, room), style="bold")
        return head.append(step, style="bold green").append(since, style="yellow")

    def _curves(self, rows: Sequence[Row]) -> Iterator[Text]:
        labels = _labels(rows)
        if len(labels) == 1 or len(labels) > CURVES:
            yield self._curve("norm", rows)
            return
        for label in labels:
            mine = [row for row in rows if row.optimizer == label]
            yield self._curve(f"norm, {shortened(printable(label), 16)}", mine)

    def _curve(self, name: str, rows: Sequence[Row]) -> Text:
        norms = [row.grad_norm for row in rows]
        finite = [norm for norm in norms if math.isfinite(norm)]
        bounds = f"  {number(min(finite))} to {number(max(finite))}" if finite else ""
        columns = max(8, self._console.width - len(name) - 1 - len(bounds) - 1)
        curve = Text(f"{name} ").append(sparkline(norms, columns, self._levels), style="cyan")
        return curve.append(bounds, style="dim")

    def _table(self, rows: Sequence[Row]) -> Table:
        labels = _labels(rows)
        shown = rows[-self._room(len(labels)) :]
        cells = _columns(shown, len(labels) > 1)
        for name in LEFT_OUT:
            if _width(cells) > self._console.width:
                cells.pop(name, None)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in cells:
            left = name in ("optimizer", "outcome")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row, texts in zip(shown, zip(*cells.values(), strict=True), strict=True):
            table.add_row(*map(Text, texts), style=_style(row))
        return table

    def _room(self, optimizers: int) -> int:
        taken = OTHER_LINES + EVENTS + (optimizers - 1 if optimizers <= CURVES else 0)
        return max(1, min(self._most, self._console.height - taken))

    def _events(self, follower: Follower, several: bool) -> Iterator[Text]:
        if not follower.events.counts:
            yield Text("No events", style="dim")
            return
        kinds = follower.events.counts.most_common(8)
        counts = ", ".join(f"{printable(kind)} {amount:,}" for kind, amount in kinds)
        yield Text(f"Events: {counts}", no_wrap=True, overflow="ellipsis")
        for event in list(follower.events.newest)[-EVENTS:]:
            text = f"  {event_line(event, several)}"
            yield Text(text, style="yellow", no_wrap=True, overflow="ellipsis")


def _clip(rows: Sequence[Row]) -> Text:
    skipped = sum(row.outcome != "applied" for row in rows)
    threshold = rows[-1].clip_threshold
    parts = [f"clipped {clip_rate(rows)} of the last {counted(len(rows), 'step')}"]
    parts += [] if math.isnan(threshold) else [f"threshold {number(threshold)}"]
    parts += [f"skipped {skipped:,}"] if skipped else []
    return Text(", ".join(parts))


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.optimizer for row in rows))


def _columns(rows: Sequence[Row], several: bool) -> dict[str, list[str]]:
    """Writes the table column by column, without those that say nothing."""
    columns = {
        "optimizer": [printable(row.optimizer) if several else "" for row in rows],
        "step": [f"{row.step:,}" for row in rows],
        "loss": ["" if math.isnan(row.loss) else number(row.loss) for row in rows],
        "norm": [number(row.grad_norm) for row in rows],
        "after clip": [number(row.grad_norm_clipped) if row.clipped else "" for row in rows],
        "clip": [clip_text(row).removeprefix("clipped ") for row in rows],
        "lr": ["" if math.isnan(row.lr) else number(row.lr) for row in rows],
        "outcome": [printable(row.outcome).replace("_", " ") for row in rows],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Tells how wide a table is; rich puts a space to the left and to the right of each gap."""
    cells = (max(map(width, (name, *texts))) for name, texts in columns.items())
    return sum(cells) + 2 * GAP * (len(columns) - 1)


def _style(row: Row) -> str:
    if row.nonfinite_parameters:
        return "bold red"
    return "" if row.outcome == "applied" else "yellow"
