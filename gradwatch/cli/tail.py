"""``gradwatch tail``: watches a run while it trains, as lines or as a screen."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.cli.arguments import (
    FINE,
    CommandError,
    Commands,
    add_command,
    add_json,
    add_run,
    at_least_one,
    open_run,
    run_name,
)
from gradwatch.cli.follower import KEPT, EventRow, Follower, New, Row
from gradwatch.cli.terminal import (
    ASCII,
    BLOCKS,
    Output,
    as_json,
    number,
    percent,
    shortened,
    sparkline,
    times,
    width,
)
from gradwatch.record.folder.meta import NAME
from gradwatch.wording import counted, printable

if TYPE_CHECKING:
    from gradwatch.cli.follower import Follower
    from gradwatch.cli.terminal import Output


ADD_WAIT = " Add --wait to wait for it to begin."


def begun(run: str, wait: bool, once: bool, pause: Callable[[], object]) -> Follower:
    """Opens a run for following; one whose folder is there and empty begins within seconds.

    Args:
        run: The run folder.
        wait: Whether to wait for one that is not there.
        once: Whether to wait for none.
        pause: Waits a little, and says so.

    Raises:
        CommandError: If it is not there, or no run.
    """
    while not once and _may_begin(Path(run), wait):
        pause()
    try:
        open_run(run)
    except CommandError as problem:
        may_come = bool(run) and not once and not Path(run).exists()
        raise CommandError(f"{problem}{ADD_WAIT if may_come else ''}") from problem
    return Follower(Path(run))


def _may_begin(folder: Path, wait: bool) -> bool:
    """Tells of a folder that is not there, empty, or being made at this moment."""
    if not folder.exists():
        return wait
    if not folder.is_dir() or (folder / NAME).exists():
        return False
    return all(path.name.startswith(".") for path in folder.iterdir())


LONGEST_NAME = 60


def step_line(row: Row, several: bool) -> str:
    """Writes a step.

    Args:
        row: The step.
        several: Whether the run has several optimizers.
    """
    label = f"{printable(row.optimizer)} " if several else ""
    parts = [f"{label}step {row.step:>8,}", f"norm {number(row.grad_norm):>9}"]
    parts += [f"{name} {number(value):>9}" for name, value in _known(row)]
    parts += [text for text in (clip_text(row), _outcome(row)) if text]
    return "  ".join(parts)


def event_line(event: EventRow, several: bool = False) -> str:
    """Writes an event.

    Args:
        event: The event.
        several: Whether the run has several optimizers.
    """
    label = f"{printable(event.optimizer)} " if several else ""
    return f"{label}step {event.step:,}  {printable(event.kind)}: {printable(event.message)}"


def clip_text(row: Row) -> str:
    """Says what the clip did in a step; nothing where it did nothing.

    Args:
        row: The step.
    """
    return f"clipped {times(row.clip_coef)}" if row.clipped else ""


def clip_rate(rows: Iterable[Row]) -> str:
    """Says which share of the applied steps was clipped.

    Args:
        rows: The steps.
    """
    clipped = [row.clipped for row in rows if row.outcome == "applied"]
    return percent(sum(clipped) / len(clipped) if clipped else math.nan)


def where(event: EventRow) -> str:
    """Names the parameter of an event.

    Args:
        event: The event.
    """
    return shortened(printable(event.parameter), LONGEST_NAME)


def ago(seconds: float) -> str:
    """Writes how long ago something was.

    Args:
        seconds: The time.

    Example:
        >>> ago(3.2), ago(150), ago(7200)
        ('3 s', '2 min', '2 h')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _known(row: Row) -> list[tuple[str, float]]:
    pairs = [("loss", row.loss), ("lr", row.lr)]
    return [(name, value) for name, value in pairs if not math.isnan(value)]


def _outcome(row: Row) -> str:
    return "" if row.outcome == "applied" else printable(row.outcome).replace("_", " ")


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


def _events(events: Sequence[EventRow], several: bool) -> Iterator[str]:
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


class Plain:
    """Writes what has come, a line per step and event."""

    def __init__(self, out: Output, run: str, most: int, *, json: bool) -> None:
        """Writes nothing yet.

        Args:
            out: Where to write.
            run: How the run is called.
            most: Steps to write of those that are there at the first look.
            json: Whether to write JSON.
        """
        self._out, self._run, self._most, self._json = out, printable(run), most, json
        self._told = False

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def waiting(self) -> None:
        """Says once that the run has not begun."""
        if not self._told and not self._json:
            self._out.line(f"Waiting for {self._run} to begin ...")
            self._out.flush()
        self._told = True

    def show(self, follower: Follower, new: New) -> None:
        """Writes what has come.

        Args:
            follower: What is known.
            new: What has come.
        """
        for line in self._lines(follower, new):
            self._out.line(line)
        self._out.flush()
        if follower.rows:
            self._most = KEPT

    def _lines(self, follower: Follower, new: New) -> Iterator[str]:
        if self._json:
            return json_lines(new, self._most)
        if not follower.rows and not self._told:
            self._told = True
            return iter([f"{self._run} has no steps yet."])
        several = len({row.optimizer for row in follower.rows}) > 1
        return text_lines(new, self._most, several)


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
        if not follower.event_counts:
            yield Text("No events", style="dim")
            return
        kinds = follower.event_counts.most_common(8)
        counts = ", ".join(f"{printable(kind)} {amount:,}" for kind, amount in kinds)
        yield Text(f"Events: {counts}", no_wrap=True, overflow="ellipsis")
        for event in list(follower.events)[-EVENTS:]:
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


STEPS = 10
INTERVAL_S = 1.0
SHORTEST_S = 0.1
LONGEST_S = 3600.0

NO_RICH = "gradwatch tail: plain lines, as rich is not installed: pip install 'gradwatch[runs]'\n"

DESCRIPTION = """\
Shows the newest steps of a run, the curve of the gradient norm, how often the clip acts,
and the events, and follows the run while it is written (a watcher writes every 64 steps,
or 5 seconds). Ctrl-C ends it, with exit code 0.

Into a file or a pipe it writes a line per step and event instead of a screen."""

EXAMPLES = """\
gradwatch tail runs/a
gradwatch tail runs/a --once -n 50
gradwatch tail runs/a --json | jq 'select(.type == "event")'"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(commands, "tail", "watch a run while it trains", DESCRIPTION, EXAMPLES)
    add_run(parser)
    parser.add_argument(
        "-n",
        "--steps",
        type=at_least_one,
        default=STEPS,
        metavar="N",
        help="steps to show at first (default: %(default)s, at most 1024)",
    )
    parser.add_argument("--once", action="store_true", help="show what is there, and end")
    parser.add_argument("--wait", action="store_true", help="wait for a run that is not there yet")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=INTERVAL_S,
        metavar="S",
        help="seconds between two looks (default: %(default)g)",
    )
    add_json(parser, "one line per step and event")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    try:
        with _view(arguments, out) as view:
            _follow(arguments, out, view)
    except KeyboardInterrupt:
        if arguments.once:
            raise
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    return FINE


def _follow(arguments: argparse.Namespace, out: Output, view: Plain | Screen) -> None:
    def pause() -> None:
        view.waiting()
        time.sleep(arguments.interval)

    follower: Follower = begun(arguments.run, arguments.wait, arguments.once, pause)
    while not out.closed:
        view.show(follower, follower.look())
        if arguments.once:
            return
        time.sleep(arguments.interval)


def _view(arguments: argparse.Namespace, out: Output) -> Plain | Screen:
    plain = arguments.json or arguments.once or not out.is_terminal
    if not plain and importlib.util.find_spec("rich") is None:
        sys.stderr.write(NO_RICH)
        plain = True
    name = run_name(arguments.run)
    if plain:
        return Plain(out, name, arguments.steps, json=arguments.json)

    return Screen(out, name, arguments.steps)


def _seconds(text: str) -> float:
    """Reads a time.

    Raises:
        argparse.ArgumentTypeError: If it is no number of seconds, or out of bounds.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"must be {SHORTEST_S:g} to {LONGEST_S:g} seconds, got {text!r}"
        )
    return seconds
