"""WandbSink: writes what gradwatch sees into a run of Weights & Biases."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

try:
    import wandb
except ModuleNotFoundError as exc:
    if exc.name != "wandb":
        raise
    raise ModuleNotFoundError(
        "gradwatch_loggers.WandbSink needs wandb, which is not installed. "
        "Run: pip install 'gradwatch[wandb]'",
        name="wandb",
    ) from exc

from gradwatch import RecordBatch, StepRecord, Watcher
from gradwatch.adapters import GROUP, LoggerScalars, described, group_of
from gradwatch_loggers.arguments import checked_flag, checked_name
from gradwatch_loggers.wandb_media import media_of
from gradwatch_loggers.wandb_shared import SharedRun

NO_RUN = (
    "WandbSink() writes into wandb.run, and there is none. Call wandb.init() before the first "
    "step, or pass the run: WandbSink(wandb.init(...))"
)
ENDED = (
    "the run {id} of W&B was finished before the watcher was closed. Call run.finish() behind the "
    "with block of watch()"
)
NOT_A_RUN = (
    "WandbSink(run=) takes what wandb.init() returned, or None for wandb.run at the first step, "
    "got {value}."
)
NAME = "WandbSink"


class WandbSink:
    """Writes the numbers of each step, and pictures at the end, into a run of W&B.

    No row of yours is lost, however you log: W&B drops what is logged with a lower step than
    before, so rows of gradwatch go into yours, between them, or behind them; see ``docs/wandb.md``.
    The tags are those of every logger, ``gradwatch/grad_norm``, with ``gradwatch/step`` as their
    x-axis.

    Example:
        >>> import wandb, gradwatch
        >>> with wandb.init(project="mnist") as run:  # doctest: +SKIP
        ...     with gradwatch.watch(model, optimizer, sinks=[WandbSink(run)]):
        ...         train(model, optimizer)
    """

    deliver: Literal["step"] = "step"

    def __init__(
        self,
        run: wandb.Run | None = None,
        *,
        name: str = "",
        blocks: bool = False,
        statistics: bool = False,
        media: bool = True,
        alert: bool = False,
        live: bool | None = None,
    ) -> None:
        """Starts without a row; nothing is written before the first step.

        Args:
            run: What ``wandb.init()`` returned. None takes ``wandb.run`` at the first step.
            name: What tags begin with, ``"generator"`` for ``generator/gradwatch/grad_norm``: where
                several watchers write into one run. Left out, the second is ``"2"``.
            blocks: Whether to write the norms of at most 20 parts of the model, too.
            statistics: Whether to write what ``watch(statistics=)`` measures of these parts, too.
            media: Whether to write the heat map (with matplotlib), the report and the events when
                the run or the watcher ends, and when the first NaN or Inf was seen.
            alert: Whether the first NaN or Inf is an alert of W&B, which sends mails if you like.
            live: Whether rows are written that you leave no room for. None does so once you have
                logged twice without ``step=``, and keeps them until the end of the run before. True
                does so from the first step on: also if you log nothing, but then do not log with
                ``step=``. False keeps them until the end of the run.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If ``name`` begins or ends with a slash.
        """
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise TypeError(NOT_A_RUN.format(value=described(run)))
        flags = {"blocks": blocks, "statistics": statistics, "media": media, "alert": alert}
        for argument, flag in flags.items():
            checked_flag(f"{NAME}({argument}=)", flag)
        if live is not None and not isinstance(live, bool):
            raise TypeError(f"{NAME}(live=) must be True, False or None, got {described(live)}.")
        self._run, self._name, self._live = run, checked_name(f"{NAME}(name=)", name), live
        self._blocks, self._statistics = blocks, statistics
        self._media, self._alert = media, alert
        self._start()

    def _start(self) -> None:
        self._scalars = LoggerScalars(blocks=self._blocks, statistics=self._statistics)
        self._shared: SharedRun | None = None
        self._prefix = ""
        self._watcher: Callable[[], Watcher | None] = lambda: None
        self._batch: RecordBatch | None = None
        self._coming: deque[tuple[StepRecord, dict[str, float]]] = deque()
        self._first = ""  # the optimizer whose tags have no suffix
        self._defined: set[str] = set()
        self._seen = False  # whether there was a NaN or Inf
        self._due = False  # whether it is still to be drawn
        self._newest: tuple[str, int] | None = None  # x-axis and step; None if it is drawn

    def __getstate__(self) -> dict[str, Any]:
        # A copy has written nothing yet.
        names = ("_run", "_name", "_live", "_blocks", "_statistics", "_media", "_alert")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, options: dict[str, Any]) -> None:
        self.__dict__.update(options)
        self._start()

    def attached(self, watcher: Watcher) -> None:
        """Notes whose steps come; the heat map, the report and the events are those of it."""
        self._watcher = weakref.ref(watcher)
        # Before the first step: in run.log({"loss": train()}) the method is looked up before that.
        with suppress(RuntimeError):  # there is no run yet, which write() tells
            self._joined()

    def write(self, batch: RecordBatch) -> None:
        """Writes some steps, or keeps them until there is room.

        Raises:
            RuntimeError: If there is no run, or it was finished.
            Exception: If W&B does not take a row; pass the batch again.
        """
        shared = self._joined()
        if shared is None:
            return
        if batch is not self._batch:  # else it comes again: W&B did not take one of its rows
            self._coming.extend(self._scalars.rows(batch))
            self._batch = batch
        while self._coming:
            self._add(shared, *self._coming[0])
            self._coming.popleft()
        self._batch = None
        self._note_events(shared, batch)

    def close(self) -> None:
        """Writes what is left; the run is left to whoever made it."""
        shared, self._shared = self._shared, None
        if shared is not None and not shared.is_over:
            self._draw(shared)
            shared.leave(self)

    def before_log(self) -> None:
        """Draws what is due since the first NaN or Inf."""
        # Not in write(), which is called while the watcher receives steps: none can be read then.
        if self._due and self._shared is not None:
            self._draw(self._shared)

    def before_end(self) -> None:
        """Takes the steps that have not arrived yet, and draws."""
        watcher = self._watcher()
        if watcher is not None:
            watcher.flush()
        if self._shared is not None:
            self._draw(self._shared)

    def _joined(self) -> SharedRun | None:
        """Returns the run, which is looked for when a record comes; None if it is disabled."""
        given, shared = self._run, self._shared
        if shared is not None and not shared.is_over:
            return shared
        if shared is not None and given is not None:
            raise RuntimeError(ENDED.format(id=given.id))
        run = wandb.run if given is None else given
        if run is None:
            raise RuntimeError(NO_RUN)
        if run.disabled:
            return None
        self._shared = SharedRun.join(run, self, self._name, self._live)
        self._prefix = self._shared.prefix_of(self)
        self._defined.clear()
        return self._shared

    def _add(self, shared: SharedRun, record: StepRecord, values: dict[str, float]) -> None:
        self._first = self._first or record.optimizer
        axis = f"{self._prefix}{group_of(record.optimizer, self._first)}/step"
        self._define(shared, axis, values)
        tagged = {self._prefix + tag: value for tag, value in values.items()}
        shared.add(axis, record.global_step, tagged)
        self._newest = axis, record.global_step

    def _define(self, shared: SharedRun, axis: str, values: dict[str, float]) -> None:
        """Makes ``axis`` the x-axis of new groups of tags."""
        for group in dict.fromkeys(tag.partition("/")[0] for tag in values):
            if group not in self._defined:
                shared.define(f"{self._prefix}{group}/*", axis)
                self._defined.add(group)

    def _note_events(self, shared: SharedRun, batch: RecordBatch) -> None:
        if self._seen:
            return
        # A GradScaler that searches for its scale makes Inf, and skips these steps.
        searching = {one.step for one in batch.steps if one.outcome == "skipped_scaler"}
        bad = (one for one in batch.events if one.nonfinite and one.step not in searching)
        event = next(bad, None)
        if event is not None:
            self._seen = self._due = True
            if self._alert:
                shared.alert(f"gradwatch: {event.kind} in step {event.step}", event.message)

    def _draw(self, shared: SharedRun) -> None:
        watcher = self._watcher()
        newest, self._newest, self._due = self._newest, None, False
        if watcher is not None and newest is not None and self._media:
            shared.show(*newest, media_of(watcher, f"{self._prefix}{GROUP}"))
