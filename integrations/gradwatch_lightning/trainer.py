"""The Trainer: what the monitor reads of it, what it sets, and what both would decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import SupportsIndex

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradwatch import AccumulatePolicy, ClipPolicy
from gradwatch.adapters import accumulate_policy, described, optimizer_parameters, shown


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
    # MixedPrecision and FSDPPrecision have the attribute, None for bf16; other plugins have none.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def logged_step_of(trainer: Trainer) -> Callable[[], int]:
    """Returns a function that tells the step under which Lightning logs the batch under way."""
    # Not trainer.global_step: that counts the steps of all optimizers, several in a batch of a GAN.
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_batches_that_stepped"):  # private: a later Lightning may rename it
        return lambda: trainer.global_step
    return lambda: int(loop._batches_that_stepped)


def accumulates(trainer: Trainer) -> bool:
    """Tells whether a step of the Trainer may have several micro-batches."""
    # A scheduler may begin with 1 and raise it in a later epoch.
    planned = any(one.going_to_accumulate_grad_batches() for one in _schedulers(trainer))
    return planned or trainer.accumulate_grad_batches > 1


def _schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """Lists the callbacks of Lightning's own that change the number."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # by a connector
    return [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]


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
        """Leaves the Trainer as it is until :meth:`prepare`."""
        self.policy = policy
        self.number: int | None = None
        self._gave = False
        # A policy learns as it runs, and the monitor may be given to a second, unrelated fit.
        self._fresh = {} if policy is None else policy.state_dict()

    def prepare(self, trainer: Trainer, goes_on: bool) -> None:
        """Gives the Trainer a first number, by which it estimates how many steps there will be.

        Unless it goes on with the fit before, the policy begins anew.
        """
        if self.policy is None:
            return
        if not goes_on:
            self.number = None
            if self._fresh:
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
            # First the old number, for follow() to wait until the restored window is over.
            self._give(trainer, saved or 1)
            self.follow(trainer, wanted)

    def follow(self, trainer: Trainer, wanted: int) -> None:
        """Gives the Trainer another number, if one of its windows ends with the batch under way.

        Nothing is done while another callback has taken the number over, as
        ``StochasticWeightAveraging`` does in its last epoch.
        """
        if self.number in (None, wanted) or trainer.accumulate_grad_batches != self.number:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # As Lightning's _num_ready_batches_reached() tells it: there a window is cut short, and the
        # next epoch counts its batches from 0.
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


FIXED_NUMBER = (
    "GradientMonitor(accumulate={accumulate}) asks for a number of micro-batches that never "
    "changes, and under Lightning such a number belongs to the Trainer. Write "
    "Trainer(accumulate_grad_batches={accumulate}) instead; the monitor records how many "
    "micro-batches are in each step."
)
NO_POLICY = (
    'GradientMonitor(accumulate=) must be "auto", a mapping {{step: micro-batches}}, a function of '
    "the step or an accumulation policy, got {accumulate}. Write accumulate="
    '"auto" (or an object, AccumulateByNoiseScale(min=2, max=32)) to follow the gradient noise, '
    "accumulate={{0: 2, 1000: 4}} to change the number at a step, or "
    "Trainer(accumulate_grad_batches=4) for one that never changes."
)
TWO_NUMBERS = (
    "GradientMonitor(accumulate={accumulate}) and {trainer_side} would both decide how many "
    "micro-batches a step has. Remove one side: leave accumulate out of GradientMonitor to keep "
    "Lightning's number, whose windows and noise scale are recorded all the same, or {remove} to "
    "keep the monitor's."
)
MANUAL = (
    "GradientMonitor(accumulate={accumulate}) decides how many batches the Trainer accumulates, "
    "but {module} sets automatic_optimization = False: its training_step() steps the optimizers "
    "itself, and the Trainer accumulates nothing. Leave accumulate out of GradientMonitor, or "
    "remove that line to have the Trainer step."
)
STRATEGY = (
    "GradientMonitor(accumulate={accumulate}) changes Trainer.accumulate_grad_batches between two "
    "steps, but {strategy} accumulates by itself, by the number it was set up with. Leave "
    "accumulate out of GradientMonitor and write Trainer(accumulate_grad_batches=4), or use "
    'another strategy, such as "ddp".'
)
TWO_CLIPS = (
    "GradientMonitor(clip={clip!r}) and {trainer_side} would both clip the gradients of a step: "
    "the second would see what the first has left, and the recorded coefficient would be the "
    "product of both. Remove one side: leave clip out of GradientMonitor to keep Lightning's clip, "
    "whose norms before and after it are recorded all the same, or {remove} to keep gradwatch's."
)


def accumulate_policy_of(accumulate: object) -> AccumulatePolicy | None:
    """Turns ``GradientMonitor(accumulate=)`` into the policy that it means; None for nothing.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is a number, which belongs to the Trainer, or out of bounds.
    """
    if accumulate is None:
        return None
    if isinstance(accumulate, AccumulatePolicy) and not isinstance(accumulate, type):
        return accumulate
    # True is an int and a class is callable: neither is what it looks like.
    is_auto = isinstance(accumulate, str) and accumulate == "auto"
    if is_auto or not isinstance(accumulate, (str, bool, type)):
        if isinstance(accumulate, SupportsIndex):  # an int, or one of numpy or torch
            raise ValueError(FIXED_NUMBER.format(accumulate=shown(accumulate)))
        if is_auto or isinstance(accumulate, Mapping) or callable(accumulate):
            return accumulate_policy("GradientMonitor(accumulate=)", accumulate)
    text = NO_POLICY.format(accumulate=described(accumulate))
    raise (ValueError if isinstance(accumulate, str) else TypeError)(text)


def refuse_two_numbers(
    accumulate: AccumulatePolicy | None, trainer: Trainer, module: LightningModule
) -> None:
    """Refuses a policy of the monitor's that the Trainer cannot follow.

    Raises:
        ValueError: If the Trainer decides too, if it does not accumulate at all, or if its strategy
            does so by itself.
    """
    if accumulate is None:
        return
    if not module.automatic_optimization:
        raise ValueError(MANUAL.format(accumulate=accumulate, module=type(module).__name__))
    strategy = trainer.strategy
    if strategy.handles_gradient_accumulation:
        raise ValueError(STRATEGY.format(accumulate=accumulate, strategy=type(strategy).__name__))
    number = trainer.accumulate_grad_batches
    if number != 1:
        side = f"Trainer(accumulate_grad_batches={number})"
        remove = "remove accumulate_grad_batches"
    elif _schedulers(trainer):
        side, remove = "a GradientAccumulationScheduler", "remove that callback"
    else:
        return
    raise ValueError(TWO_NUMBERS.format(accumulate=accumulate, trainer_side=side, remove=remove))


def refuse_two_clips(clip: ClipPolicy | None, trainer: Trainer, module: LightningModule) -> None:
    """Refuses a clip of the monitor's where Lightning clips too.

    Raises:
        ValueError: If both clip.
    """
    if clip is None:
        return
    value = trainer.gradient_clip_val
    if value:
        side, remove = f"Trainer(gradient_clip_val={value!r})", "remove gradient_clip_val"
    elif is_overridden("configure_gradient_clipping", module):
        side = f"{type(module).__name__}.configure_gradient_clipping()"
        remove = "remove that method"
    else:
        return
    raise ValueError(TWO_CLIPS.format(clip=clip, trainer_side=side, remove=remove))
