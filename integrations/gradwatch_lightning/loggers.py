"""LoggedSteps: what goes to all loggers of a Trainer, and to its progress bar."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from lightning.pytorch import LightningModule, Trainer

from gradwatch import StepRecord
from gradwatch.adapters import GROUP, LoggerScalars, warn_safely

NORM_TAG = "gradwatch/grad_norm"
"""The one scalar that the progress bar shows."""


NOT_LOGGED = (
    "GradientMonitor logs nothing any more in this fit, because log_dict() of the module failed "
    "with {kind}: {error} Its history goes on. Turn its logging off: GradientMonitor(log=False)."
)


class LoggedSteps:
    """Keeps the newest step of each optimizer until Lightning writes logs."""

    def __init__(self, *, accumulates: bool = False) -> None:
        """Starts without a step; ``accumulates`` as for :class:`LoggerScalars`."""
        self._scalars = LoggerScalars(accumulates=accumulates)
        self._newest: dict[str, dict[str, float]] = {}
        self._last: StepRecord | None = None
        self._failed = False

    def keep(self, record: StepRecord | None) -> None:
        """Keeps a record; to be given that of the watcher after every step."""
        # Compared by identity: after a rewind, another record may have the same step. The label
        # "none" means backwards without a known optimizer: Lightning's x-axis has no step for them.
        if record is None or record is self._last or record.optimizer == "none":
            return
        self._last = record
        self._newest[record.optimizer] = self._scalars.of(record)

    def log(self, trainer: Trainer, module: LightningModule) -> None:
        """Logs what was kept, at the batches where Lightning writes logs.

        To be called in ``on_train_batch_end``.
        """
        # Lightning spends about 0.1 ms on each logged number, even if it then discards it.
        due = trainer._logger_connector.should_update_logs
        if not due or trainer.barebones or self._failed:
            return
        scalars = {tag: value for one in self._newest.values() for tag, value in one.items()}
        self._newest = {}
        _retire(trainer, scalars)
        in_bar = {NORM_TAG: scalars.pop(NORM_TAG)} if NORM_TAG in scalars else {}
        # The size says nothing here, but without one Lightning looks for it in the batch, and
        # raises for a training_step(dataloader_iter), which has none.
        log = partial(module.log_dict, on_step=True, on_epoch=False, batch_size=1)
        try:
            log(in_bar, prog_bar=True)
            log(scalars)
        except Exception as error:  # the module may have a log_dict() of its own
            self._failed = True
            warn_safely(NOT_LOGGED.format(kind=type(error).__name__, error=error))


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
