"""Conflicts: settings of the monitor that the Trainer owns too, refused before the first step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from gradwatch.control.policy import ClipPolicy

ACCUMULATE = (
    "GradientMonitor(accumulate={accumulate!r}) asks the monitor to accumulate micro-batches, but "
    "under Lightning the Trainer decides when the optimizer steps. Write "
    "Trainer(accumulate_grad_batches={accumulate!r}) instead; the monitor records how many "
    "micro-batches are in each step."
)
TWO_CLIPS = (
    "GradientMonitor(clip={clip!r}) and {trainer_side} would both clip the gradients of a step: "
    "the second would see what the first has left, and the recorded coefficient would be the "
    "product of both. Remove one side: leave clip out of GradientMonitor to keep Lightning's clip, "
    "whose norms before and after it are recorded all the same, or {remove} to keep gradwatch's."
)


def refuse_accumulate(accumulate: object) -> None:
    """Refuses the one argument of ``gradwatch.watch`` that belongs to the Trainer.

    Args:
        accumulate: What the user gave; None for nothing.

    Raises:
        ValueError: If anything was given.
    """
    if accumulate is not None:
        raise ValueError(ACCUMULATE.format(accumulate=accumulate))


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
