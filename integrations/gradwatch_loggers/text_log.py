"""LogSink: a readable line per 50 steps, and one per event, through ``logging``."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from gradwatch import Event, RecordBatch, StepRecord, Watcher
from gradwatch.adapters import SCALARS, accumulates, described, shown, warn_safely
from gradwatch_loggers.arguments import Deliver, checked_count
from gradwatch_loggers.background import CLOSED
from gradwatch_loggers.order import in_order

NAME = "LogSink"
LOGGER = "gradwatch.steps"
TOLD_EVENTS = 5
"""Events of a kind that have a line each; after them only the 10th, 20th, 40th and so on has."""

QUIET = (
    "LogSink writes to the logger {logger!r} at level {level}, which shows {shown} and above only. "
    "Write logging.basicConfig(level=logging.INFO), or LogSink(level={number})."
)
HARMLESS = frozenset({"no_gradient", "accumulate", "changed", "explained", "discarded"})
"""Kinds of events that are told at the level of the steps; others are warnings."""


@dataclass(slots=True)
class Stretch:
    """What the steps of one optimizer since its last line have shown.

    Attributes:
        newest: The last of them.
        steps: Their number.
        largest: The largest norm before the clip; 0 if none was finite.
        clipped: Steps that were clipped.
        skipped: Steps that were not applied.
        events: Events by kind.
    """

    newest: StepRecord | None = None
    steps: int = 0
    largest: float = 0.0
    clipped: int = 0
    skipped: int = 0
    events: Counter[str] = field(default_factory=Counter)

    def add(self, record: StepRecord) -> None:
        """Adds a step."""
        self.newest = record
        self.steps += 1
        if self.largest < record.grad_norm < math.inf:
            self.largest = record.grad_norm
        self.clipped += bool(record.clipped)
        self.skipped += record.outcome != "applied"


class LogSink:
    """Writes the newest step to the text log every 50 steps, and events when they happen.

    A line looks like this::

        gradwatch step 150: norm 3.21, clipped to 1 | 50 steps: largest norm 8.44, 31 clipped (62 %)

    and goes on with what there is to say: steps that were skipped, micro-batches, noise scale,
    loss, learning rate, events. It goes to the logger ``gradwatch.steps``, at level INFO; events
    that say that something is wrong are warnings. In a program that has not set up ``logging`` at
    all the lines go to the standard error stream.

    Attributes:
        deliver: When the watcher hands records over: as soon as they are there.
    """

    deliver: Deliver = "step"

    def __init__(
        self,
        every: int = 50,
        *,
        logger: str | logging.Logger = LOGGER,
        level: int = logging.INFO,
    ) -> None:
        """Makes a sink.

        Args:
            every: Steps between two lines of an optimizer: one at each step that it divides.
            logger: The logger, or its name.
            level: Level of the lines about steps.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``every`` is below 1.
        """
        self._every = checked_count(f"{NAME}(every=)", every, "Write 50, for instance.")
        if not isinstance(logger, (str, logging.Logger)):
            raise TypeError(
                f"{NAME}(logger=) must be a logger or its name, got {described(logger)}. "
                f"Write {LOGGER!r}."
            )
        if isinstance(level, bool) or not isinstance(level, int):
            raise TypeError(
                f"{NAME}(level=) must be a level of logging, got {shown(level)}. "
                "Write logging.INFO."
            )
        self._logger, self._level = logger, level
        self._checked = self._closed = False
        self._stretches: dict[str, Stretch] = {}
        self._events: Counter[str] = Counter()
        self._written: RecordBatch | None = None
        self._label = ""

    def attached(self, watcher: Watcher) -> None:
        """Notes which of the models of ``gradwatch.watch_all()`` is told of, if there are any."""
        self._label = watcher.label

    def write(self, batch: RecordBatch) -> None:
        """Writes the lines of some steps."""
        if self._closed:
            raise RuntimeError(CLOSED.format(name=NAME))
        if batch is self._written:  # a handler of the program has raised
            return
        self._written = batch
        for _, together in groupby(in_order(batch), key=lambda one: (type(one), one.step)):
            self._note(list(together))

    def close(self) -> None:
        """Writes a last line about the steps since the one before."""
        if not self._closed:
            self._closed = True
            for optimizer in list(self._stretches):
                self._tell_steps(optimizer)

    def _note(self, together: Sequence[Event | StepRecord]) -> None:
        """Notes the events of one step, or steps."""
        events = [one for one in together if isinstance(one, Event)]
        if events:
            self._tell_events(events)
        for one in together:
            if isinstance(one, StepRecord):
                self._stretch_of(one.optimizer).add(one)
                if one.step % self._every == 0:
                    self._tell_steps(one.optimizer)

    def _tell_events(self, events: Sequence[Event]) -> None:
        """Writes a line about the events of one step, unless there were many like them."""
        told = []
        for event in events:
            self._stretch_of(event.optimizer).events[event.kind] += 1
            self._events[event.kind] += 1
            if _is_told(self._events[event.kind]):
                told.append(event)
        if not told:
            return
        is_harmless = all(event.kind in HARMLESS for event in told)
        level = self._level if is_harmless else max(self._level, logging.WARNING)
        first = told[0]
        where = f"gradwatch step {first.global_step:,}{self._of(first.optimizer)}"
        counts = (f"{self._events[one.kind]:,} {one.kind} so far" for one in told)
        self._log(level, f"{where}: {' '.join(one.message for one in told)} [{', '.join(counts)}]")

    def _stretch_of(self, optimizer: str) -> Stretch:
        return self._stretches.setdefault(optimizer, Stretch())

    def _tell_steps(self, optimizer: str) -> None:
        stretch = self._stretches[optimizer]
        record, self._stretches[optimizer] = stretch.newest, Stretch()
        if record is None:
            return
        parts = [part for part in _parts(record, stretch) if part]
        where = f"gradwatch step {record.global_step:,}{self._of(optimizer)}"
        self._log(self._level, f"{where}: {_norm(record)} | {', '.join(parts)}")

    def _of(self, optimizer: str) -> str:
        """Names the model and the optimizer where there are several."""
        several = len(self._stretches) > 1
        names = [name for name in (self._label, optimizer if several else "") if name]
        return f" of {', '.join(names)}" if names else ""

    def _log(self, level: int, text: str) -> None:
        logger = self._logger
        if isinstance(logger, str):
            logger = logging.getLogger(logger)
        if not logger.hasHandlers():
            # Somebody who asks for lines must see them, whether the program logs or not.
            print(text, file=sys.stderr, flush=True)  # noqa: T201
            return
        if not self._checked:
            self._checked = True
            _tell_if_quiet(logger, self._level)
        logger.log(level, "%s", text)


def _is_told(number: int) -> bool:
    """Returns whether the event of a kind with this number, from 1, has a line."""
    if number <= TOLD_EVENTS:
        return True
    times, rest = divmod(number, 2 * TOLD_EVENTS)
    return not rest and not times & (times - 1)  # a power of two


def _tell_if_quiet(logger: logging.Logger, level: int) -> None:
    if not logger.isEnabledFor(level):
        effective = max(logger.getEffectiveLevel(), logger.manager.disable + 1)
        warn_safely(
            QUIET.format(
                logger=logger.name,
                level=logging.getLevelName(level),
                shown=logging.getLevelName(effective),
                number=effective,
            )
        )


def _norm(record: StepRecord) -> str:
    text = f"norm {record.grad_norm:.4g}"
    return f"{text}, clipped to {record.grad_norm_clipped:.4g}" if record.clipped else text


def _parts(record: StepRecord, stretch: Stretch) -> Iterator[str]:
    """Yields what a line says besides the norm of the newest step; some of it empty."""
    steps = stretch.steps
    if steps > 1:
        yield f"{steps:,} steps: largest norm {stretch.largest:.4g}"
    if stretch.clipped:
        yield f"{stretch.clipped:,} clipped ({stretch.clipped / steps:.0%})".replace("%", " %")
    elif record.clipped is not None:
        yield "none clipped"
    if stretch.skipped:
        yield f"{stretch.skipped:,} skipped"
    yield _numbers(record)
    if stretch.events:
        yield "events: " + ", ".join(f"{n:,} {kind}" for kind, n in stretch.events.items())


def _numbers(record: StepRecord) -> str:
    exceeds_its_error = SCALARS["noise_scale"].when
    says_noise = exceeds_its_error is None or exceeds_its_error(record)
    parts: Sequence[tuple[bool, str]] = (
        (accumulates(record), f"{record.micro_batches} micro-batches"),
        (says_noise, f"noise scale {record.noise_scale:.3g}"),
        (math.isfinite(record.loss), f"loss {record.loss:.4g}"),
        (math.isfinite(record.lr), f"lr {record.lr:.3g}"),
    )
    return ", ".join(text for is_there, text in parts if is_there)
