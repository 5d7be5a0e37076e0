"""watcher_of: the watcher that a fit gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer

from gradwatch import Sink, Watcher
from gradwatch.adapters import Options, build_watcher
from gradwatch_lightning.trainer import logged_step_of, optimizers_of, scaler_of, watched_of


def watcher_of(
    trainer: Trainer,
    module: LightningModule,
    options: Options,
    sinks: Iterable[Sink],
    accumulates: bool,
) -> Watcher:
    """Makes a watcher for a Trainer, not attached yet.

    Args:
        trainer: The Trainer.
        module: Its module.
        options: The options of the user.
        sinks: Further ones than the user's own.
        accumulates: Whether a step may have several micro-batches.
    """
    sinks = (*options.sinks, *sinks)
    options = replace(options, scaler=scaler_of(trainer), sinks=sinks)
    watched = watched_of(trainer, module, with_lazy=options.acts)
    tensors = watched.values() if isinstance(watched, Mapping) else watched.parameters()
    optimizers = optimizers_of(trainer, set(map(id, tensors)), options.acts)
    watcher = build_watcher(watched, optimizers, options)
    watcher.leave_windows(accumulates)
    watcher.global_step = logged_step_of(trainer)
    return watcher
