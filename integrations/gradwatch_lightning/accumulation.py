"""Accumulation: the monitor's policy decides, and the Trainer's own number follows it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gradwatch.control.accumulate import AccumulatePolicy


class TrainerAccumulation:
    """Sets ``Trainer.accumulate_grad_batches`` to what the policy of a monitor says.

    Lightning divides each loss by the number of the moment, and steps at the batches of an epoch
    that are divisible by it. So it is changed only between two windows, and only where the next one
    begins at a multiple of the new number; until then the old one stays.

    Attributes:
        number: What the Trainer was given; None where the number is the Trainer's own.
    """

    def __init__(self, policy: AccumulatePolicy | None) -> None:
        """Gives nothing to a Trainer yet.

        Args:
            policy: Decides; None to leave the number alone.
        """
        self.number: int | None = None
        self._policy = policy
        self._fresh = {} if policy is None else policy.state_dict()

    def forget(self) -> None:
        """Puts the policy back as it was made: another training begins."""
        self.number = None
        if self._policy is not None and self._fresh:
            self._policy.load_state_dict(self._fresh)

    def prepare(self, trainer: Trainer) -> None:
        """Gives the Trainer a first number, by which it estimates how many steps there will be."""
        if self._policy is not None:
            self._give(trainer, self.number or self._policy.micro_batches)

    def start(self, trainer: Trainer, saved: int | None, wanted: int) -> None:
        """Gives the Trainer the number of the window that it begins with.

        Args:
            trainer: Its progress is restored by now.
            saved: The number that the Trainer had when its checkpoint was written; None without.
            wanted: What the policy says.
        """
        if self._policy is not None:
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
        if self.number is not None:
            trainer.accumulate_grad_batches = 1

    def _give(self, trainer: Trainer, number: int) -> None:
        self.number = trainer.accumulate_grad_batches = number


def schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """Lists the callbacks of Lightning's own that change the number."""
    return [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]


def accumulates(trainer: Trainer) -> bool:
    """Tells whether a step of the Trainer may have several micro-batches."""
    planned = any(one.going_to_accumulate_grad_batches() for one in schedulers(trainer))
    return planned or trainer.accumulate_grad_batches > 1
