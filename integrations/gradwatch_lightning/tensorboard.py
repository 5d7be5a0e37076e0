"""What goes to the Trainer's loggers: scalars for all of them, more for TensorBoard.

In spite of its name this module hides nothing: ``import tensorboard`` is absolute.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gradwatch.record.records import Sink, StepRecord


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


GROUP = "gradwatch"
"""Tags of the first optimizer begin with it, as those of ``gradwatch_tensorboard`` do."""

NORM_TAG = f"{GROUP}/grad_norm"
"""What the progress bar shows."""


def step_scalars(records: Iterable[StepRecord], first: str, accumulated: bool) -> dict[str, float]:
    """Lists what is logged for the steps of one batch.

    ======================================  ======================================================
    tag                                     meaning
    ======================================  ======================================================
    ``gradwatch/grad_norm``                 total gradient norm before the clip, in true units
    ``gradwatch/grad_norm_clipped``         the same after the clip
    ``gradwatch/clip_coef``                 factor between both; 1 where nothing was clipped
    ``gradwatch/nonfinite_parameters``      parameters whose gradient holds a NaN or an Inf
    ``gradwatch/loss_scale``                scale of the GradScaler, where there is one
    ``gradwatch/noise_scale``               noise scale in micro-batches, above its standard error
    ``gradwatch/micro_batches``             micro-batches of the step, where the Trainer accumulates
    ======================================  ======================================================

    Each further optimizer has a group of its own, ``gradwatch-Adam-1/grad_norm`` say.

    Args:
        records: The newest step of each optimizer that stepped.
        first: Label of the optimizer whose group has no suffix.
        accumulated: Whether steps may have several micro-batches.
    """
    scalars: dict[str, float] = {}
    for record in records:
        suffix = "" if record.optimizer == first else f"-{record.optimizer.replace('/', '_')}"
        values = _values(record, accumulated)
        scalars |= {f"{GROUP}{suffix}/{name}": value for name, value in values.items()}
    return scalars


def _values(record: StepRecord, accumulated: bool) -> dict[str, float]:
    values = {
        "grad_norm": record.grad_norm,
        "grad_norm_clipped": record.grad_norm_clipped,
        "clip_coef": record.clip_coef,
        "nonfinite_parameters": float(record.nonfinite_parameters),
    }
    if record.loss_scale != 1.0:
        values["loss_scale"] = record.loss_scale
    # One below its standard error says nothing, and may be so large that it hides the others.
    if 0 <= record.noise_scale_stderr < record.noise_scale < math.inf:
        values["noise_scale"] = record.noise_scale
    if accumulated:
        values["micro_batches"] = float(record.micro_batches)
    return values


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
