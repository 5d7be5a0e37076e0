"""Checks the arguments of a monitor, and refuses what the Trainer decides as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsIndex

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from gradwatch import AccumulatePolicy, ClipPolicy
from gradwatch.adapters import accumulate_policy, described, shown
from gradwatch_lightning.trainer import schedulers_of

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
    "remove that line to let the Trainer step."
)
STRATEGY = (
    "GradientMonitor(accumulate={accumulate}) changes Trainer.accumulate_grad_batches between two "
    "steps, but {strategy} accumulates by itself, with the number it was set up with. Leave "
    "accumulate out of GradientMonitor and write Trainer(accumulate_grad_batches=4), or use "
    'another strategy, such as "ddp".'
)
TWO_CLIPS = (
    "GradientMonitor(clip={clip!r}) and {trainer_side} would both clip the gradients of a step: "
    "the second clip would act on the result of the first, and the recorded coefficient would be "
    "the product of both. Remove one side: leave clip out of GradientMonitor to keep Lightning's "
    "clip, whose norms before and after are recorded all the same, or {remove} to keep gradwatch's."
)


def check_flags(**flags: object) -> None:
    """Raises a TypeError unless all arguments of these names are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"GradientMonitor({name}=) must be True or False, got {shown(value)}.")


def accumulate_policy_of(accumulate: object) -> AccumulatePolicy | None:
    """Converts ``GradientMonitor(accumulate=)`` to a policy; None stays None.

    Raises:
        TypeError: If the argument has the wrong type.
        ValueError: If it is a plain number, which belongs in the Trainer, or is out of bounds.
    """
    if accumulate is None:
        return None
    if isinstance(accumulate, AccumulatePolicy) and not isinstance(accumulate, type):
        return accumulate
    # True is an int and a class is callable, but neither is meant as a number or a function.
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
    """Refuses an accumulation policy that conflicts with the Trainer.

    Raises:
        ValueError: If the Trainer sets a number too, if optimization is manual, or if the strategy
            accumulates by itself.
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
    elif schedulers_of(trainer):
        side, remove = "a GradientAccumulationScheduler", "remove that callback"
    else:
        return
    raise ValueError(TWO_NUMBERS.format(accumulate=accumulate, trainer_side=side, remove=remove))


def refuse_two_clips(clip: ClipPolicy | None, trainer: Trainer, module: LightningModule) -> None:
    """Refuses ``GradientMonitor(clip=)`` if Lightning clips too.

    Raises:
        ValueError: If both would clip.
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
