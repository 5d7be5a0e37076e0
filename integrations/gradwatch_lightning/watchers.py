"""watcher_of: the watcher that a fit gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer

from gradwatch import Watcher
from gradwatch.adapters import Options, build_watcher
from gradwatch_lightning.tensorboard import tensorboard_sinks
from gradwatch_lightning.trainer import logged_step_of, optimizers_of, scaler_of, watched_of


def watcher_of(
    trainer: Trainer, module: LightningModule, options: Options, logs: bool, accumulates: bool
) -> Watcher:
    """Makes a watcher for a Trainer, not attached yet.

    Args:
        trainer: The Trainer.
        module: Its module.
        options: The options of the user.
        logs: Whether the loggers of the Trainer are written to.
        accumulates: Whether a step may have several micro-batches.
    """
    sinks = [*options.sinks, *(tensorboard_sinks(trainer) if logs else ())]
    options = replace(options, scaler=scaler_of(trainer), sinks=tuple(sinks))
    watched = watched_of(trainer, module, with_lazy=options.acts)
    tensors = watched.values() if isinstance(watched, Mapping) else watched.parameters()
    optimizers = optimizers_of(trainer, set(map(id, tensors)), options.acts)
    watcher = build_watcher(watched, optimizers, options)
    watcher.leave_windows(accumulates)
    watcher.global_step = logged_step_of(trainer)
    return watcher
