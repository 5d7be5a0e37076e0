"""What goes to the Trainer's loggers: scalars for all of them, more for TensorBoard.

In spite of its name this module hides nothing: ``import tensorboard`` is absolute.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gradwatch import Sink
from gradwatch.adapters import GROUP


def tensorboard_sinks(trainer: Trainer) -> list[Sink]:
    """Makes a sink for each TensorBoardLogger, on the one rank that writes.

    It shares the logger's own event file, so that its steps stand beside the logged ones, and
    leaves the step scalars to the logger itself. A logger that fell back to tensorboardX gets none:
    its event files take no blocks and no text of ours.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not trainer.is_global_zero:
        return []
    # Only now: torch's writer needs TensorBoard, which a user of another logger need not have.
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
"""What the progress bar shows."""


def retire_scalars(trainer: Trainer, fresh: Collection[str]) -> None:
    """Keeps Lightning from logging a value again at a batch that brought no new one.

    Lightning repeats what was logged once at each later batch of the epoch. In manual optimization,
    where every batch is a step on the x-axis, a norm would stand at batches without any step.

    Args:
        trainer: The Trainer, in ``on_train_batch_end``.
        fresh: The tags that this batch logs.
    """
    results = getattr(trainer, "_results", None) or {}  # private: without it values are repeated
    for metric in results.values():
        if metric.meta.name.startswith(GROUP) and metric.meta.name not in fresh:
            metric.reset()
