"""Accumulation: the monitor's policy decides, and the Trainer's own number follows it."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gradwatch.control.accumulate import AccumulatePolicy


class TrainerAccumulation:
    """Sets ``Trainer.accumulate_grad_batches`` to what the policy of a monitor says.

    Lightning divides each loss by the number of the moment, and steps at the batches of an epoch
    that are divisible by it. So it is changed only between two windows, and only where the next one
    begins at a multiple of the new number; until then the old one stays.

    Attributes:
        policy: Decides; None where the number is the Trainer's own.
        number: What the Trainer was given; None for nothing.
    """

    def __init__(self, policy: AccumulatePolicy | None) -> None:
        """Gives nothing to a Trainer yet.

        Args:
            policy: Decides; None to leave the number alone.
        """
        self.policy = policy
        self.number: int | None = None
        self._gave = False
        self._fresh = {} if policy is None else policy.state_dict()

    @property
    def active(self) -> bool:
        """Whether the number is the monitor's."""
        return self.policy is not None

    def prepare(self, trainer: Trainer, goes_on: bool) -> None:
        """Gives the Trainer a first number, by which it estimates how many steps there will be.

        Args:
            trainer: The Trainer of the fit that begins.
            goes_on: Whether it goes on with the fit before. Else the policy begins anew.
        """
        if self.policy is None:
            return
        if not goes_on:
            self.number = None
        if not goes_on and self._fresh:
            self.policy.load_state_dict(self._fresh)
        self._give(trainer, self.number or self.policy.micro_batches)

    def start(self, trainer: Trainer, saved: int | None, wanted: int) -> None:
        """Gives the Trainer the number of the window that it begins with.

        Args:
            trainer: Its progress is restored by now.
            saved: The number that the Trainer had when its checkpoint was written; None without.
            wanted: What the policy says.
        """
        if self.policy is not None:
            self._give(trainer, saved or 1)
            self.follow(trainer, wanted)

    def follow(self, trainer: Trainer, wanted: int) -> None:
        """Gives the Trainer another number, if one of its windows ends with the batch under way.

        Nothing is done while another callback has taken the number over, as
        ``StochasticWeightAveraging`` does in its last epoch.

        Args:
            trainer: The Trainer, between two batches.
            wanted: What the policy says.
        """
        if self.number in (None, wanted) or trainer.accumulate_grad_batches != self.number:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        last = trainer.is_last_batch or done == trainer.num_training_batches
        if last or done % self.number == done % wanted == 0:
            self._give(trainer, wanted)

    def give_back(self, trainer: Trainer) -> None:
        """Leaves the Trainer as it was made: without accumulation of its own."""
        if self._gave:
            trainer.accumulate_grad_batches, self._gave = 1, False

    def _give(self, trainer: Trainer, number: int) -> None:
        self.number = trainer.accumulate_grad_batches = number
        self._gave = True


def schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """Lists the callbacks of Lightning's own that change the number."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # by a connector
    return [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]


def accumulates(trainer: Trainer) -> bool:
    """Tells whether a step of the Trainer may have several micro-batches."""
    planned = any(one.going_to_accumulate_grad_batches() for one in schedulers(trainer))
    return planned or trainer.accumulate_grad_batches > 1
