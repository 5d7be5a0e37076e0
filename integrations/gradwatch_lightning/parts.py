"""Parts: what a watcher needs to know of a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradwatch.observe.parameters import optimizer_parameters


def optimizers_of(trainer: Trainer, module: LightningModule) -> list[Optimizer] | None:
    """Lists the optimizers; None, so that they are found at their first step, where none is named.

    Where ``configure_optimizers`` returns nothing, Lightning puts an optimizer there that holds a
    tensor of its own.
    """
    owned = {id(parameter) for parameter in module.parameters()}
    held = [p for optimizer in trainer.optimizers for p in optimizer_parameters(optimizer)]
    return trainer.optimizers if any(id(parameter) in owned for parameter in held) else None


def wrapped_of(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Returns the module as the strategy wrapped it, so that a rank's own gradients can be seen."""
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else module


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Returns the scaler of the precision plugin, if it has one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def logged_step_of(trainer: Trainer) -> Callable[[], int]:
    """Returns a function that tells the step under which Lightning logs the batch under way."""
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_batches_that_stepped"):  # private: a later Lightning may rename it
        return lambda: trainer.global_step
    return lambda: int(loop._batches_that_stepped)
