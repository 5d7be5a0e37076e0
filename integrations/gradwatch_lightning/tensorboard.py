"""What goes to the Trainer's loggers: scalars for all of them, more for TensorBoard.

The module's name does not shadow the ``tensorboard`` package, because imports are absolute.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gradwatch import Sink
from gradwatch.adapters import GROUP


def tensorboard_sinks(trainer: Trainer) -> list[Sink]:
    """Makes a sink for each TensorBoardLogger, on the global rank 0 only.

    The sink shares the logger's event file, so both appear as one run, and leaves the step scalars
    to the logger. A logger that fell back to tensorboardX gets no sink: its writer does not accept
    our Events.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not trainer.is_global_zero:
        return []
    # Imported here: torch's writer needs TensorBoard, which users of other loggers may not have.
    try:
        from torch.utils.tensorboard import SummaryWriter

        from gradwatch_tensorboard import TensorBoardWriter
    except ModuleNotFoundError as exc:
        if exc.name not in ("tensorboard", "gradwatch_tensorboard"):
            raise
        return []
    experiments = [logger.experiment for logger in loggers]
    return [
        TensorBoardWriter(experiment, step_scalars=False)
        for experiment in experiments
        if isinstance(experiment, SummaryWriter)
    ]


NORM_TAG = "gradwatch/grad_norm"
"""The one scalar that the progress bar shows."""


def retire_scalars(trainer: Trainer, fresh: Collection[str]) -> None:
    """Keeps Lightning from repeating an old value at a batch that logs no new one.

    Lightning repeats a value, once logged, at each later batch of the epoch. In manual optimization
    every batch is a step on the x-axis, so norms would appear at batches without an optimizer step.
    Call this in ``on_train_batch_end``, with the tags that this batch logs as ``fresh``.
    """
    # `_results` is private. Should a later Lightning rename it, old values are repeated.
    results = getattr(trainer, "_results", None) or {}
    for metric in results.values():
        if metric.meta.name.startswith(GROUP) and metric.meta.name not in fresh:
            metric.reset()
