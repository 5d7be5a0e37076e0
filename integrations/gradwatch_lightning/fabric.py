"""FabricSink: the numbers of each step for the loggers of a Fabric."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from gradwatch import RecordBatch, Sink, Watcher
from gradwatch.adapters import SinkQueue, described
from gradwatch_lightning.fabric_loggers import sink_of
from gradwatch_loggers.arguments import checked_flag, checked_name

if TYPE_CHECKING:
    from lightning.fabric import Fabric

NOT_A_FABRIC = (
    "FabricSink(fabric) must be a lightning.fabric.Fabric, got {value}. Write "
    "gradwatch.watch(model, optimizer, sinks=[FabricSink(fabric)])."
)

MOST_WAITING = 64
LONGEST_WAIT_S = 5.0


class FabricSink:
    """Logs every step to the loggers of a ``Fabric``, in the process of rank 0.

    The tags are those of every logger: ``gradwatch/grad_norm``, ``gradwatch/grad_norm_clipped``,
    ``gradwatch/clip_coef`` and so on, under the number of the step, from 1 on; a loop that counts
    otherwise sets :attr:`gradwatch.Watcher.global_step`. It may log what it likes, under whatever
    step: no row of either side is lost. A logger that fails costs the others nothing and is tried
    again; the training goes on.

    A ``TensorBoardLogger`` gets what ``gradwatch_tensorboard.TensorBoardWriter`` writes, the
    Gradients tab included, a ``WandbLogger`` what ``gradwatch_loggers.WandbSink`` does, and an
    ``MLFlowLogger`` what ``MLflowSink`` does.

    Example:
        >>> from lightning.fabric import Fabric
        >>> fabric = Fabric(loggers=logger)  # doctest: +SKIP
        >>> model, optimizer = fabric.setup(model, optimizer)  # doctest: +SKIP
        >>> sinks = [FabricSink(fabric)]  # doctest: +SKIP
        >>> with gradwatch.watch(model, optimizer, sinks=sinks):  # doctest: +SKIP
        ...     train()
    """

    deliver: Literal["step"] = "step"  # so that each row comes in step with those of the loop
    _writing: ClassVar[weakref.WeakKeyDictionary[object, weakref.WeakSet[FabricSink]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(
        self, fabric: Fabric, *, name: str = "", blocks: bool = False, statistics: bool = False
    ) -> None:
        """Starts without a step; opens nothing.

        Args:
            fabric: Its loggers are asked for at the first step.
            name: What tags begin with, ``"generator"`` for ``generator/gradwatch/grad_norm``: where
                several watchers log to one Fabric. Left out, the second is ``"2"``.
            blocks: Whether to log the norm of each part of the model too, 20 at most:
                ``gradwatch_blocks/encoder``.
            statistics: Whether to log what ``watch(statistics=)`` takes: ``gradwatch_max/encoder``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``name`` begins or ends with a slash.
        """
        is_one = all(hasattr(fabric, member) for member in ("loggers", "log_dict", "setup"))
        if isinstance(fabric, type) or not is_one:
            raise TypeError(NOT_A_FABRIC.format(value=described(fabric)))
        more = {"blocks": blocks, "statistics": statistics}
        for argument, flag in more.items():
            checked_flag(f"FabricSink({argument}=)", flag)
        checked_name("FabricSink(name=)", name)
        self._fabric, self._name = fabric, name
        self._more = more
        self._watcher: Callable[[], Watcher | None] = lambda: None
        self._outlets: list[_Outlet] | None = None

    def attached(self, watcher: Watcher) -> None:
        """Notes whose steps come."""
        self._watcher = weakref.ref(watcher)

    def write(self, batch: RecordBatch) -> None:
        """Logs a batch of steps; a logger that fails is tried again later."""
        if self._outlets is None:
            self._outlets = self._open()
        for one in self._outlets:  # first into every queue: an interrupt in one costs no other
            one.add(batch)
        for one in self._outlets:
            one.deliver_due()

    def close(self) -> None:
        """Delivers what a logger has not taken, and saves; finalizing them is left to the loop."""
        outlets, self._outlets = self._outlets or [], None  # it can serve another watcher
        self._writing.get(self._fabric, set[FabricSink]()).discard(self)
        for one in outlets:
            one.queue.close()

    def _open(self) -> list[_Outlet]:
        others = self._writing.setdefault(self._fabric, weakref.WeakSet())
        name = self._name or (str(len(others) + 1) if others else "")
        others.add(self)
        found = []
        for logger in self._fabric.loggers:
            sink = sink_of(logger, name, **self._more)
            watcher, attached = self._watcher(), getattr(sink, "attached", None)
            if watcher is not None and attached is not None:
                attached(watcher)
            found.append(_Outlet(sink, f"the {type(logger).__name__} of FabricSink"))
        return found


class _Outlet:
    """The queue of one logger, which gets each step by itself, or several of them together.

    TensorBoard's writer hands what it is given to another thread, which costs the loop a switch of
    threads each time.
    """

    def __init__(self, sink: Sink, name: str) -> None:
        """Starts empty; ``name`` is what warnings call the sink."""
        self.queue = SinkQueue(sink, name)
        self._each = getattr(sink, "deliver", "batch") == "step"
        self._waiting = 0
        self._delivered_at = time.monotonic()

    def add(self, batch: RecordBatch) -> None:
        """Adds a batch, of one step as a rule."""
        self.queue.add(batch)
        self._waiting += MOST_WAITING if batch.events else 1

    def deliver_due(self) -> None:
        """Delivers what waits if it is time, or if something has happened."""
        now = time.monotonic()
        if self._each or self._waiting >= MOST_WAITING or now - self._delivered_at > LONGEST_WAIT_S:
            self.queue.deliver()
            self._waiting, self._delivered_at = 0, now
