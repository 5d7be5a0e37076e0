"""The Trainer's side: what the monitor reads from it, and sets on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch import AccumulatePolicy
from gradwatch.adapters import optimizer_parameters


def optimizers_of(trainer: Trainer, watched: set[int], acts: bool) -> list[Optimizer] | None:
    """Lists the Trainer's optimizers, or returns None to find them at their first step.

    They are found where one holds a tensor that is not watched, where ``configure_optimizers``
    returns None, as Lightning installs a mock then, and where one is not torch's: nothing tells of
    its steps, so a monitor that acts refuses it.

    Args:
        trainer: The Trainer.
        watched: The ids of the tensors that are watched.
        acts: Whether the monitor changes the training.
    """
    optimizers = list({id(one): one for one in trainer.optimizers}.values())
    if not all(isinstance(one, Optimizer) for one in optimizers):
        return optimizers if acts else None
    held = [p for optimizer in optimizers for p in optimizer_parameters(optimizer)]
    return optimizers if held and watched.issuperset(map(id, held)) else None


def is_watchable(module: LightningModule, with_lazy: bool) -> bool:
    """Returns whether a parameter requires a gradient.

    While one has no shape, it returns False, unless ``with_lazy`` says that this does not matter.
    """
    parameters = list(module.parameters())
    return (with_lazy or not any(map(is_lazy, parameters))) and any(
        parameter.requires_grad for parameter in parameters
    )


def watched_of(
    trainer: Trainer, module: LightningModule, with_lazy: bool
) -> nn.Module | dict[str, nn.Parameter]:
    """Returns the DDP wrapper if there is one, else the module.

    The watcher needs the wrapper to see the gradients of a single rank before their reduction.

    Args:
        trainer: The Trainer.
        module: Its module.
        with_lazy: Whether a parameter without a shape is to be refused. If not, the other ones are
            returned by name: the lazy module was not called in the first forward.
    """
    named = dict(module.named_parameters())
    lazy = [name for name in named if is_lazy(named[name])]
    if lazy and not with_lazy:
        return {name: named[name] for name in named if name not in lazy}
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else module


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Returns the scaler of the precision plugin, if it has one."""
    # MixedPrecision and FSDPPrecision have the attribute (None for bf16); other plugins lack it.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def logged_step_of(trainer: Trainer) -> Callable[[], int]:
    """Returns a function that gives the step under which Lightning logs the current batch."""
    # Not trainer.global_step: it counts the steps of all optimizers, and a GAN has several a batch.
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_batches_that_stepped"):  # private: a later Lightning may rename it
        return lambda: trainer.global_step
    return lambda: int(loop._batches_that_stepped)


def is_between_steps(trainer: Trainer) -> bool:
    """Returns whether the current batch ends without a step, so that Lightning writes no logs."""
    module: LightningModule = trainer.lightning_module
    # Private; Lightning asks itself the same before it writes logs (2.4 to 2.6).
    accumulates = getattr(trainer.fit_loop, "_should_accumulate", None)
    return module.automatic_optimization and accumulates is not None and bool(accumulates())


def loss_divisor_of(trainer: Trainer, module: LightningModule) -> float | None:
    """Returns what Lightning has divided the newest loss by; None if the module may have done it.

    In automatic optimization it is the full number of batches, also in a short last window.
    """
    return float(trainer.accumulate_grad_batches) if module.automatic_optimization else None


def accumulates(trainer: Trainer) -> bool:
    """Tells whether a step of the Trainer may have several micro-batches."""
    # A scheduler may start with 1 and raise the number in a later epoch.
    planned = any(one.going_to_accumulate_grad_batches() for one in schedulers_of(trainer))
    return planned or trainer.accumulate_grad_batches > 1


def schedulers_of(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """Lists Lightning's own callbacks that change the number of accumulated batches."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # by a connector
    return [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]


class TrainerAccumulation:
    """Sets ``Trainer.accumulate_grad_batches`` to the number that the monitor's policy chooses.

    Lightning divides each loss by the current number, and steps when the number of the batch in the
    epoch is divisible by it. So the number changes only between two windows, and only where the
    next window begins at a multiple of the new number. Until then the old number stays.

    Attributes:
        policy: Chooses the number; None if the monitor leaves it to the Trainer.
        number: The number last set on the Trainer; None if none was set.
    """

    def __init__(self, policy: AccumulatePolicy | None) -> None:
        """Changes nothing on a Trainer; :meth:`prepare` does."""
        self.policy = policy
        self.number: int | None = None
        self._gave = False
        # A policy learns while it runs, and the monitor may be reused for an unrelated fit.
        self._fresh = {} if policy is None else policy.state_dict()

    def prepare(self, trainer: Trainer, goes_on: bool) -> None:
        """Sets the first number, from which the Trainer estimates its total number of steps.

        The policy starts from scratch, unless ``goes_on`` says that the previous fit is resumed.
        """
        if self.policy is None:
            return
        if not goes_on:
            self.number = None
            if self._fresh:
                self.policy.load_state_dict(self._fresh)
        self._give(trainer, self.number or self.policy.micro_batches)

    def start(self, trainer: Trainer, saved: int | None, wanted: int) -> None:
        """Sets the number for the first window of the training.

        Args:
            trainer: A Trainer whose progress is already restored.
            saved: The Trainer's number when the checkpoint was written; None without a checkpoint.
            wanted: The number that the policy chooses.
        """
        if self.policy is not None:
            # First the old number, so that follow() waits for the end of the restored window.
            self._give(trainer, saved or 1)
            self.follow(trainer, wanted)

    def follow(self, trainer: Trainer, wanted: int) -> None:
        """Sets the number ``wanted`` if a window ends with the current batch.

        Does nothing while another callback has changed the number, as ``StochasticWeightAveraging``
        does in its last epoch.
        """
        if self.number in (None, wanted) or trainer.accumulate_grad_batches != self.number:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # The same test as Lightning's _num_ready_batches_reached(). The last batch of an epoch cuts
        # the window short, and the next epoch counts its batches from 0.
        last = trainer.is_last_batch or done == trainer.num_training_batches
        if last or done % self.number == done % wanted == 0:
            self._give(trainer, wanted)

    def give_back(self, trainer: Trainer) -> None:
        """Resets the Trainer to 1 batch per step, the only number it can have been built with."""
        if self._gave:
            trainer.accumulate_grad_batches, self._gave = 1, False

    def _give(self, trainer: Trainer, number: int) -> None:
        self.number = trainer.accumulate_grad_batches = number
        self._gave = True
