"""LoggedSteps: what goes to all loggers of a Trainer, and to its progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from gradwatch.adapters import GROUP, warn_safely
from gradwatch_lightning.newest import ComingStep, NewestSteps
from gradwatch_lightning.trainer import is_between_steps, logged_step_of

BAR_NAME = "grad_norm"
"""What the progress bar calls the norm; it has no room for a tag."""

MOST_ASKED = 64
"""Steps that are asked in a batch whether their numbers have arrived, the oldest ones."""

NOT_LOGGED = (
    "GradientMonitor logs nothing any more in this fit, because {what} failed with {kind}: "
    "{error} Its history goes on. Turn its logging off: GradientMonitor(log=False)."
)


class LoggedBatch(NamedTuple):
    """A batch at which Lightning writes logs.

    Attributes:
        step: The step under which it writes them.
        writes: Whether it does so after all: not in the middle of a window of micro-batches.
    """

    step: int
    writes: bool


class LoggedSteps:
    """Logs, at the batches where Lightning writes logs, the newest step of each optimizer.

    On a device the numbers of a step may arrive some batches later. Nothing waits for them: they
    are written as they arrive, under the step of their batch, so that each series is that of a fit
    on the CPU. Numbers that are there at the end of their batch go through ``log_dict()`` of the
    module; later ones straight to the loggers, as ``log_dict()`` would write them under the step of
    the batch under way. The progress bar has the newest norm that has arrived.
    """

    def __init__(
        self, *, log: bool = True, blocks: bool = False, bar: bool = True, accumulates: bool = False
    ) -> None:
        """Starts without a step.

        Args:
            log: Whether the loggers are written to.
            blocks: Whether they get the norms and the statistics of module blocks.
            bar: Whether the progress bar shows the norm.
            accumulates: As for :class:`~gradwatch.adapters.LoggerScalars`.
        """
        self._newest = NewestSteps(blocks=blocks, accumulates=accumulates)
        self._coming: deque[ComingStep | LoggedBatch] = deque()
        self._log, self._bar = log, bar
        self._failed = False

    def expect(self, step: ComingStep) -> None:
        """Notes a step that is over."""
        self._coming.append(step)

    def log(self, trainer: Trainer, module: LightningModule) -> None:
        """Logs what has arrived; to be called in ``on_train_batch_end``."""
        now = None
        # Lightning spends about 0.1 ms on each logged number, even if it then discards it.
        if self._log and trainer._logger_connector.should_update_logs:
            now = LoggedBatch(logged_step_of(trainer)(), writes=not is_between_steps(trainer))
            self._coming.append(now)
        # Each one is asked: the numbers of a step may come from another device than those before.
        asked = islice(self._coming, MOST_ASKED)
        waiting = {id(one) for one in asked if not _has_arrived(one)}
        while self._coming and id(self._coming[0]) not in waiting:
            one = self._coming.popleft()
            if not isinstance(one, LoggedBatch):
                self._newest.keep(one)
            elif one is now:
                self._log_now(trainer, module, self._newest.taken())
            else:
                self._write(trainer, one, self._newest.taken())
        if now is not None and self._coming:
            _retire(trainer, ())
        self._show(trainer)

    def end(self, trainer: Trainer) -> None:
        """Writes what is outstanding at the end of a fit, when all numbers have arrived."""
        wrote = False
        while self._coming:
            one = self._coming.popleft()
            if isinstance(one, LoggedBatch):
                wrote |= self._write(trainer, one, self._newest.taken())
            else:
                self._newest.keep(one)
        self._show(trainer)
        for logger in trainer.loggers if wrote else ():
            logger.save()

    def _show(self, trainer: Trainer) -> None:
        norm = self._newest.norm
        if not self._bar or norm is None:
            return
        # The dict itself (private), as progress_bar_metrics waits for what others have logged. They
        # may log a number of the same name, which then counts.
        shown = getattr(trainer._logger_connector, "_progress_bar_metrics", None)
        if isinstance(shown, dict):
            shown[BAR_NAME] = _tensors({BAR_NAME: norm})[BAR_NAME].item()  # as it is logged

    def _log_now(
        self, trainer: Trainer, module: LightningModule, scalars: Mapping[str, float]
    ) -> None:
        if trainer.barebones or self._failed:
            return
        _retire(trainer, scalars)
        try:
            # The size says nothing here, but without one Lightning looks for it in the batch, and
            # raises for a training_step(dataloader_iter), which has none.
            module.log_dict(_tensors(scalars), on_step=True, on_epoch=False, batch_size=1)
        except Exception as error:  # the module may have a log_dict() of its own
            self._fail("log_dict() of the module", error)

    def _write(self, trainer: Trainer, batch: LoggedBatch, scalars: Mapping[str, float]) -> bool:
        """Writes the scalars of a batch that is over; returns whether it did."""
        if not (scalars and batch.writes) or trainer.barebones or self._failed:
            return False
        tensors = _tensors(scalars)
        values = {tag: tensor.item() for tag, tensor in tensors.items()}
        # What other callbacks read: each of these dicts is Lightning's own, and log() fills it.
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        return all(self._give(logger, values, batch.step) for logger in trainer.loggers)

    def _give(self, logger: Logger, values: dict[str, float], step: int) -> bool:
        try:
            logger.log_metrics(values, step=step)
        except Exception as error:
            self._fail(f"log_metrics() of {type(logger).__name__}", error)
        return not self._failed

    def _fail(self, what: str, error: Exception) -> None:
        self._failed = True
        warn_safely(NOT_LOGGED.format(what=what, kind=type(error).__name__, error=error))


def _has_arrived(one: ComingStep | LoggedBatch) -> bool:
    return isinstance(one, LoggedBatch) or one.arrived()


def _tensors(scalars: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns the tensors ``[]`` that Lightning would make of numbers, but on the CPU.

    It makes them on the device of the module, and waits for each when it writes them.
    """
    default = torch.get_default_dtype()
    dtype = default if default in (torch.float32, torch.float64) else torch.float32
    return {tag: torch.tensor(value, dtype=dtype, device="cpu") for tag, value in scalars.items()}


def _retire(trainer: Trainer, fresh: Collection[str]) -> None:
    """Keeps Lightning from repeating an old value at a batch that logs no new one.

    Lightning repeats a value, once logged, at each later batch of the epoch. In manual optimization
    every batch is a step on the x-axis, so norms would appear at batches without an optimizer step.
    ``fresh`` are the tags that this batch logs.
    """
    # `_results` is private. Should a later Lightning rename it, old values are repeated.
    results = getattr(trainer, "_results", None) or {}
    for metric in results.values():
        if metric.meta.name.startswith(GROUP) and metric.meta.name not in fresh:
            metric.reset()
