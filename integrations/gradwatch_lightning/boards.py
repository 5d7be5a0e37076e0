"""Boards: what the Trainer's TensorBoard loggers show besides the logged scalars."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gradwatch.record.sinks import Sink


def tensorboard_sinks(trainer: Trainer) -> list[Sink]:
    """Makes a sink for each TensorBoardLogger, on the one rank that writes.

    It shares the logger's own event file, so that its steps stand beside the logged ones. A logger
    that fell back to tensorboardX gets none: its event files take no blocks and no text of ours.

    Args:
        trainer: The Trainer of the fit that begins.

    Returns:
        The sinks; the step scalars are left to the logger itself.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not trainer.is_global_zero:
        return []
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
