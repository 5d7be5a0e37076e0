"""AcceleratorSink: the numbers of each step for all trackers of an Accelerator."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradwatch import RecordBatch, Watcher
from gradwatch.adapters import SinkQueue, described, warn_safely
from gradwatch_huggingface.accelerator_calls import Calls
from gradwatch_huggingface.trackers import name_of, sinks_of
from gradwatch_loggers.arguments import checked_flag, checked_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

KEPT_BATCHES = 512
"""Most batches, of one step each as a rule, that wait for ``accelerator.init_trackers()``."""

NOT_AN_ACCELERATOR = (
    "AcceleratorSink(accelerator) must be an accelerate.Accelerator, got {value}. Write "
    "gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)])."
)
NO_TRACKER = (
    "AcceleratorSink logged nothing of {steps:,} steps, as the Accelerator(log_with=...) has no "
    "tracker yet. Call accelerator.init_trackers(project_name) before the loop."
)
AFTER_THE_END = (
    "AcceleratorSink logged nothing of {steps:,} steps that came after accelerator.end_training(). "
    "Call that at the end."
)
NOT_FLUSHED = (
    "AcceleratorSink could not deliver the last steps before accelerator.end_training(), because "
    "of {kind}: {error}"
)


class AcceleratorSink:
    """Logs every step to the trackers of an ``Accelerator``, in its main process.

    The tags are those of every logger: ``gradwatch/grad_norm``, ``gradwatch/grad_norm_clipped``,
    ``gradwatch/clip_coef`` and so on. The loop may log what it likes, under whatever step numbers:
    no row of either side is lost. A tracker that fails costs the others nothing and is tried again;
    the training goes on.

    Trackers that ``accelerator.init_trackers()`` makes after ``watch()`` are found. At
    ``accelerator.end_training()`` everything is delivered before the trackers are finished. The
    column ``loss`` is filled from ``accelerator.backward(loss)``, as it was before accelerate
    divided it: the mean over the micro-batches of the step, of this process.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(log_with="tensorboard", project_dir="runs")  # doctest: +SKIP
        >>> accelerator.init_trackers("first")  # doctest: +SKIP
        >>> model, optimizer, loader = accelerator.prepare(
        ...     model, optimizer, loader
        ... )  # doctest: +SKIP
        >>> sinks = [AcceleratorSink(accelerator)]  # doctest: +SKIP
        >>> with gradwatch.watch(model, optimizer, sinks=sinks):  # doctest: +SKIP
        ...     train()
    """

    deliver = "step"  # so that each row comes in step with those of the loop

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        name: str = "",
        blocks: bool = False,
        statistics: bool = False,
    ) -> None:
        """Starts without a step; opens nothing.

        Args:
            accelerator: Its trackers are asked for at every step.
            name: What tags begin with, ``"generator"`` for ``generator/gradwatch/grad_norm``: where
                several watchers log to one accelerator. Left out, the second is ``"2"``.
            blocks: Whether to log the norm of each part of the model too, 20 at most:
                ``gradwatch_blocks/encoder``.
            statistics: Whether to log what ``watch(statistics=)`` takes: ``gradwatch_max/encoder``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``name`` begins or ends with a slash.
        """
        for member in ("trackers", "log", "end_training", "backward"):
            if isinstance(accelerator, type) or not hasattr(accelerator, member):
                raise TypeError(NOT_AN_ACCELERATOR.format(value=described(accelerator)))
        more = {"blocks": blocks, "statistics": statistics}
        for argument, flag in more.items():
            checked_flag(f"AcceleratorSink({argument}=)", flag)
        checked_name("AcceleratorSink(name=)", name)
        self._name = name
        self._accelerator = accelerator
        self._more = more
        self._prefix = f"{name}/".lstrip("/")
        self._watcher: Callable[[], Watcher | None] = lambda: None
        self._known: list[Any] = []  # the trackers that have, or had, a queue
        self._queues: list[SinkQueue] = []
        self._waiting: deque[RecordBatch] = deque(maxlen=KEPT_BATCHES)
        self._lost_steps = 0
        self._has_ended = False

    def attached(self, watcher: Watcher) -> None:
        """Learns which watcher it belongs to, and listens to the accelerator from now on."""
        self._watcher = weakref.ref(watcher)
        others = Calls.of(self._accelerator).add(self)
        self._prefix = f"{self._name or (others and others + 1) or ''}/".lstrip("/")
        self._open_queues()  # before the loop logs: a run of W&B is looked at from here on

    def write(self, batch: RecordBatch) -> None:
        """Logs a batch of steps; keeps it if there is no tracker yet."""
        self._open_queues()
        if not self._queues:
            self._keep(batch)
            return
        waiting = [*self._waiting, batch]
        self._waiting.clear()
        for queue in self._queues:  # first into every queue: an interrupt in one costs no other
            for one in waiting:
                queue.add(one)
        for queue in self._queues:
            queue.deliver()

    def close(self) -> None:
        """Delivers what a tracker has not taken; finishing the trackers is left to accelerate."""
        Calls.of(self._accelerator).discard(self)
        self._close_queues()
        steps = self._lost_steps + sum(len(batch.steps) for batch in self._waiting)
        self._waiting.clear()
        self._known.clear()  # so that it can serve another watcher
        if steps:
            text = AFTER_THE_END if self._has_ended else NO_TRACKER
            warn_safely(f"gradwatch: {text.format(steps=steps)}")

    # -- what the accelerator is about to do, or has done; never raises ----------------------------

    def before_end(self) -> None:
        """Delivers everything before the trackers are finished."""
        watcher = self._watcher()
        try:
            if watcher is not None:
                watcher.flush()
            self._close_queues()
        except Exception as error:
            warn_safely(NOT_FLUSHED.format(kind=type(error).__name__, error=error))
        self._has_ended = True

    def after_backward(self, loss: Tensor, divisor: float | None) -> None:
        """Notes the loss of a backward; the arguments are those of ``Watcher.note_loss``."""
        watcher = self._watcher()
        if watcher is not None:
            watcher.note_loss(loss, divisor)

    # ----------------------------------------------------------------------------------------------

    def _open_queues(self) -> None:
        watcher = self._watcher()
        for tracker in self._accelerator.trackers:
            if not any(tracker is one for one in self._known):
                sinks = sinks_of(tracker, self._prefix, **self._more)
                for sink in sinks if watcher is not None else ():
                    getattr(sink, "attached", lambda watcher: None)(watcher)
                name = f"AcceleratorSink (tracker {name_of(tracker)})"
                self._queues += [SinkQueue(sink, name) for sink in sinks]
                self._known.append(tracker)

    def _close_queues(self) -> None:
        queues, self._queues = self._queues, []
        for queue in queues:
            queue.close()  # says by itself what fails

    def _keep(self, batch: RecordBatch) -> None:
        # As accelerator.log(), which does nothing where nobody has asked for a tracker.
        if not (self._known or getattr(self._accelerator, "log_with", [])):
            return
        if len(self._waiting) == KEPT_BATCHES:
            self._lost_steps += len(self._waiting[0].steps)
        self._waiting.append(batch)
