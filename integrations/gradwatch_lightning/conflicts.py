"""Conflicts: settings of the monitor that the Trainer owns too, refused before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsIndex

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from gradwatch.control.accumulate import AccumulatePolicy, accumulate_policy
from gradwatch.control.policy import ClipPolicy
from gradwatch_lightning.accumulation import schedulers

FIXED_NUMBER = (
    "GradientMonitor(accumulate={accumulate!r}) asks for a number of micro-batches that never "
    "changes, and under Lightning such a number belongs to the Trainer. Write "
    "Trainer(accumulate_grad_batches={accumulate!r}) instead; the monitor records how many "
    "micro-batches are in each step."
)
NO_POLICY = (
    'GradientMonitor(accumulate=) must be "auto", a mapping {{step: micro-batches}}, a function of '
    "the step or an accumulation policy, got {accumulate!r} of type {kind}. Write accumulate="
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
    """Turns ``GradientMonitor(accumulate=)`` into the policy that it means.

    Args:
        accumulate: What the user gave; None for nothing.

    Returns:
        The policy; None for nothing.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is a number, which belongs to the Trainer, or out of bounds.
    """
    if accumulate is None:
        return None
    known = (
        accumulate == "auto" if isinstance(accumulate, str) else not isinstance(accumulate, bool)
    )
    if known and not isinstance(accumulate, type):
        if isinstance(accumulate, SupportsIndex) and not isinstance(accumulate, AccumulatePolicy):
            raise ValueError(FIXED_NUMBER.format(accumulate=accumulate))
        if isinstance(accumulate, (str, Mapping, AccumulatePolicy)) or callable(accumulate):
            return accumulate_policy("GradientMonitor(accumulate=)", accumulate)
    text = NO_POLICY.format(accumulate=accumulate, kind=type(accumulate).__name__)
    raise (ValueError if isinstance(accumulate, str) else TypeError)(text)


def refuse_two_numbers(
    accumulate: AccumulatePolicy | None, trainer: Trainer, module: LightningModule
) -> None:
    """Refuses a policy of the monitor's that the Trainer cannot follow.

    Args:
        accumulate: The monitor's policy; None where the number is the Trainer's own.
        trainer: The Trainer of the fit that begins.
        module: The module that it fits.

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
        side, remove = (
            f"Trainer(accumulate_grad_batches={number})",
            "remove accumulate_grad_batches",
        )
    elif schedulers(trainer):
        side, remove = "a GradientAccumulationScheduler", "remove that callback"
    else:
        return
    raise ValueError(TWO_NUMBERS.format(accumulate=accumulate, trainer_side=side, remove=remove))


def refuse_two_clips(clip: ClipPolicy | None, trainer: Trainer, module: LightningModule) -> None:
    """Refuses a clip of the monitor's where Lightning clips too.

    Args:
        clip: The monitor's policy; None where it only watches.
        trainer: The Trainer of the fit that begins.
        module: The module that it fits.

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
