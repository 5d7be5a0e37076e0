"""tail as a screen that is drawn anew at each look; rich is loaded here only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.commands.live.follower import Follower, New
from gradwatch.commands.live.row import Row
from gradwatch.commands.live.words import ago, clip_rate, clip_text, event_line
from gradwatch.commands.shared.numbers import counted, number, or_dash
from gradwatch.commands.shared.printable import printable
from gradwatch.commands.shared.sparkline import ASCII, BLOCKS, sparkline

if TYPE_CHECKING:
    from gradwatch.commands.shared.output import Output

EVENTS = 5
OTHER_LINES = 11
"""Lines of the screen besides the table of steps and the events."""

STALE_S = 30.0
HEADER = ("step", "loss", "norm", "after clip", "clip", "lr", "outcome")


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
            yield self._curve(rows)
            yield _clip(rows)
            yield Text()
            yield self._table(rows)
        yield from self._events(follower, len({row.optimizer for row in rows}) > 1)
        yield Text("Ctrl-C ends", style="dim")

    def _head(self, rows: Sequence[Row], idle_s: float) -> Text:
        head = Text(self._run, style="bold")
        if rows:
            head.append(f"  step {rows[-1].step:,}", style="bold green")
        since = f"  nothing new for {ago(idle_s)}" if idle_s >= STALE_S else ""
        return head.append(since, style="yellow")

    def _curve(self, rows: Sequence[Row]) -> Text:
        norms = [row.grad_norm for row in rows]
        finite = [norm for norm in norms if math.isfinite(norm)]
        bounds = f"  {number(min(finite))} to {number(max(finite))}" if finite else ""
        columns = max(8, self._console.width - len("norm ") - len(bounds) - 1)
        curve = Text("norm ").append(sparkline(norms, columns, self._levels), style="cyan")
        return curve.append(bounds, style="dim")

    def _table(self, rows: Sequence[Row]) -> Table:
        several = len({row.optimizer for row in rows}) > 1
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in (("optimizer",) if several else ()) + HEADER:
            table.add_column(name, justify="left" if name in ("optimizer", "outcome") else "right")
        for row in rows[-self._room() :]:
            label = [Text(printable(row.optimizer))] if several else []
            table.add_row(*label, *map(Text, _cells(row)), style=_style(row))
        return table

    def _room(self) -> int:
        return max(1, min(self._most, self._console.height - OTHER_LINES - EVENTS))

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


def _cells(row: Row) -> list[str]:
    norms = [or_dash(row.loss), number(row.grad_norm), number(row.grad_norm_clipped)]
    outcome = printable(row.outcome).replace("_", " ")
    return [
        f"{row.step:,}",
        *norms,
        clip_text(row).removeprefix("clipped "),
        or_dash(row.lr),
        outcome,
    ]


def _style(row: Row) -> str:
    if row.nonfinite_parameters:
        return "bold red"
    return "" if row.outcome == "applied" else "yellow"
