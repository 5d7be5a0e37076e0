"""ScalarSink: calls a function of the user's with the numbers of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from gradwatch import RecordBatch
from gradwatch.adapters import LoggerScalars
from gradwatch_loggers.arguments import (
    Deliver,
    checked_call,
    checked_count,
    checked_deliver,
    checked_flag,
    checked_seconds,
)
from gradwatch_loggers.background import CLOSED, Background

Scalars = dict[str, float]
NAME = "ScalarSink"


class ScalarSink:
    """Gives the numbers of each step to a function: ``function(step, scalars)``.

    For any logger that has no sink of its own; ``docs/boards.md`` has recipes. The function is
    called once per step and optimizer, in order, in a thread of its own: if it is slow or raises,
    records are lost and counted, and the training goes on at its speed.

    Attributes:
        deliver: When the watcher hands records over.

    Example:
        >>> import gradwatch
        >>> from gradwatch.testing import LinearModel
        >>> model, seen = LinearModel([3.0, 4.0]), {}
        >>> sink = ScalarSink(lambda step, scalars: seen.update({step: scalars}))
        >>> with gradwatch.watch(model, sinks=[sink]):
        ...     model().backward()
        >>> seen[1]["gradwatch/grad_norm"]
        5.0
    """

    def __init__(
        self,
        function: Callable[[int, Scalars], object],
        *,
        background: bool = True,
        blocks: bool = False,
        statistics: bool = False,
        deliver: Deliver = "batch",
        most_waiting: int = 4_096,
        wait_s: float = 30.0,
    ) -> None:
        """Makes a sink; the thread starts with the first step.

        Args:
            function: Called with the step on the x-axis of loggers (``StepRecord.global_step``) and
                a dict of its own: tags such as ``gradwatch/grad_norm``, and their values, which may
                be NaN or Inf.
            background: Whether a thread of its own calls the function. False for a logger that must
                be called by the thread that trains; then the training waits for it.
            blocks: Whether to pass the norm of each part of the model, too.
            statistics: Whether to pass what ``watch(statistics=)`` measures of each part, in the
                steps in which it was taken.
            deliver: ``"batch"``: up to 64 steps or 5 seconds at a time. ``"step"``: each step as
                soon as its numbers are there; with ``background=False`` the function is then called
                before ``optimizer.step()`` returns, where the device allows.
            most_waiting: The most records that are kept for a function that is slow or fails; the
                oldest are lost beyond that.
            wait_s: The longest time, in seconds, that the end of the run waits for what is kept.

        Raises:
            TypeError: If an argument has the wrong type, or the function takes other arguments.
            ValueError: If a number is out of bounds.
        """
        self._function = checked_call(f"{NAME}(function)", function, "(step, scalars)")
        self._in_background = checked_flag(f"{NAME}(background=)", background)
        self._scalars = LoggerScalars(
            blocks=checked_flag(f"{NAME}(blocks=)", blocks),
            statistics=checked_flag(f"{NAME}(statistics=)", statistics),
        )
        self.deliver: Deliver = checked_deliver(NAME, deliver)
        most = checked_count(f"{NAME}(most_waiting=)", most_waiting, "Write 4096, for instance.")
        self._make = partial(
            Background[tuple[int, Scalars]],
            self._call,
            NAME,
            most=most,
            wait_s=checked_seconds(f"{NAME}(wait_s=)", wait_s),
        )
        # Made with the first record: until then the sink can be pickled, as its function can.
        self._background: Background[tuple[int, Scalars]] | None = None
        self._left: tuple[RecordBatch, list[tuple[int, Scalars]]] | None = None
        self._closed = False

    def write(self, batch: RecordBatch) -> None:
        """Passes a batch on; after an error of the function, pass the same batch again.

        Raises:
            Exception: What the function raises, with ``background=False``.
        """
        if self._closed:
            raise RuntimeError(CLOSED.format(name=NAME))
        if not self._in_background:
            self._call_here(batch)
            return
        if self._background is None:
            self._background = self._make()
        self._background.put(self._rows(batch))

    def flush(self, seconds: float = 30.0) -> bool:
        """Waits for the function to have been called with all that was handed over.

        ``watcher.flush()`` hands records over, and does not wait for the function.

        Returns:
            Whether that was so within the time.
        """
        return self._background is None or self._background.flush(seconds)

    def close(self) -> None:
        """Calls the function with what waits, for a limited time; says how much is lost."""
        self._closed = True
        if self._background is not None:
            self._background.close()

    def _rows(self, batch: RecordBatch) -> list[tuple[int, Scalars]]:
        return [(record.global_step, values) for record, values in self._scalars.rows(batch)]

    def _call(self, rows: Sequence[tuple[int, Scalars]]) -> None:
        for step, scalars in rows:
            # A copy: what the function does to it must not show when it is tried again.
            self._function(step, dict(scalars))

    def _call_here(self, batch: RecordBatch) -> None:
        # The function has had the first rows of a batch that comes again, and not the others.
        if self._left is None or self._left[0] is not batch:
            self._left = batch, self._rows(batch)
        rows = self._left[1]
        while rows:
            self._call(rows[:1])
            del rows[0]
        self._left = None
