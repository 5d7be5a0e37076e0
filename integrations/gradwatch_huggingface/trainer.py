"""The Trainer's side: how it is found, what is read from it, and what is refused as a conflict."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from gradwatch import ClipPolicy
from gradwatch.adapters import optimizer_parameters

TWO_CLIPS = (
    "GradientMonitorCallback(clip={clip!r}) and TrainingArguments(max_grad_norm={most}) would both "
    "clip the gradients of a step: the second clip would act on the result of the first, and the "
    "recorded coefficient would be the product of both. Remove one side: leave clip out of "
    "GradientMonitorCallback to keep the Trainer's clip, whose norms before and after are recorded "
    "all the same, or write TrainingArguments(max_grad_norm=0) to keep gradwatch's. The Trainer "
    "clips at 1.0 if max_grad_norm is left out."
)
DEEPSPEED = (
    "the Trainer uses DeepSpeed, whose engine reduces, clips and steps copies of the gradients "
    "that are in no parameter's .grad."
)


def trainer_that_calls(callback: object) -> Any:
    """Returns the Trainer whose event is being told to a callback; None if there is none.

    Callbacks are given the model, but not the Trainer. An event is told by a method of the Trainer,
    so it is among the callers of the callback, whatever its version, its subclass, and whether the
    callback was added by the constructor or later.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        # Not isinstance: others, such as SetFit's, use the callbacks with a Trainer of their own.
        called = getattr(getattr(owner, "callback_handler", None), "callbacks", ())
        if any(one is callback for one in called):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def refuse_two_clips(clip: ClipPolicy | None, args: TrainingArguments) -> None:
    """Refuses ``GradientMonitorCallback(clip=)`` if the Trainer clips too.

    Raises:
        ValueError: If both would clip.
    """
    if clip is not None and args.max_grad_norm:
        raise ValueError(TWO_CLIPS.format(clip=clip, most=args.max_grad_norm))


def watched_of(trainer: Any) -> nn.Module:
    """Returns the model as it was prepared: with the wrapper of DDP, or of ``torch.compile``.

    Raises:
        RuntimeError: If DeepSpeed trains it.
    """
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise RuntimeError(DEEPSPEED)
    prepared: nn.Module | None = getattr(trainer, "model_wrapped", None)
    return trainer.model if prepared is None else prepared


def optimizer_of(trainer: Any, model: nn.Module, acts: bool) -> Optimizer | None:
    """Returns the optimizer that steps the parameters; None to find it at its first step.

    It is found where it holds a tensor that is not watched, and where it is not torch's: nothing
    tells of its steps then, so a callback that acts has it refused.

    Args:
        trainer: The Trainer.
        model: What is watched.
        acts: Whether the callback changes the training.
    """
    optimizer = trainer.optimizer
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner  # Accelerate's wrapper passes calls on to it
    if acts:
        return optimizer  # type: ignore[no-any-return]
    watched = set(map(id, model.parameters()))
    if isinstance(optimizer, Optimizer) and watched.issuperset(
        map(id, optimizer_parameters(optimizer))
    ):
        return optimizer
    return None


def scaler_of(trainer: Any) -> torch.amp.GradScaler | None:
    """Returns the scaler of Accelerate, if it has one."""
    scaler = getattr(getattr(trainer, "accelerator", None), "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def micro_batches_of(trainer: Any) -> int:
    """Returns by how many micro-batches the Trainer divides a loss of the window under way."""
    # The attribute is there since about Transformers 4.53. Before, the Trainer divided by the
    # number in the arguments in every window, also in the short last one of an epoch.
    planned = trainer.args.gradient_accumulation_steps
    return max(1, int(getattr(trainer, "current_gradient_accumulation_steps", planned)))


def divides_loss(trainer: Any, items: object) -> bool:
    """Tells whether the Trainer divides a loss by the number of micro-batches before the backward.

    Args:
        trainer: The Trainer.
        items: ``num_items_in_batch`` as ``compute_loss`` is given it. With it, the model or
            ``compute_loss_func`` has divided the loss by the tokens of the whole window.
    """
    # A subclass may say it, from Transformers 5 on.
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = getattr(trainer, "model_accepts_loss_kwargs", False) and items is not None
        scaled = by_model or getattr(trainer, "compute_loss_func", None) is not None
    return not scaled


GUARDED = {
    "trainer": ("_run_epoch", "_finalize_training", "_evaluate"),
    "trainer.callback_handler": ("on_epoch_begin",),
}
"""Methods by which a Trainer's loop does everything, since Transformers 5: one that fails ends it.

They are private: the loop has no other place at which an error could be seen, and no event tells of
one.
"""

GUARDED_BEFORE = {
    "trainer": ("_evaluate", "_maybe_log_save_evaluate", "get_batch_samples", "training_step"),
    "trainer.callback_handler": (
        *("on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"),
        *("on_step_end", "on_substep_end", "on_epoch_end", "on_train_end"),
    ),
    "trainer.optimizer": ("step",),
}
"""The same of a Trainer that has no ``_run_epoch``: its loop is one long function."""


class Wrapped:
    """Methods that call a function of ours, for one training.

    They are attributes of the one object, and not of its class: other Trainers have none.
    """

    def __init__(self) -> None:
        """Wraps nothing."""
        self._over = False
        self._places: list[tuple[dict[str, Any], str, Any, Any]] = []

    def wrap(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        """Has ``around(original, *args, **kwargs)`` called for a method, if the owner has it."""
        original = getattr(owner, name, None)
        if original is None:
            return

        # Some ask for the signature. torch's schedulers look for a mark that they left on step().
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Somebody who has wrapped it as well may still call it later.
            return original(*args, **kwargs) if self._over else around(original, *args, **kwargs)

        inside = vars(owner)
        self._places.append((inside, name, inside.get(name), call))
        inside[name] = call

    def guard(self, trainer: Any, end: Callable[[], None]) -> None:
        """Has a function called when an error ends the training, of which no callback is told."""

        def guarded(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException:
                end()
                raise

        owners = {
            "trainer": trainer,
            "trainer.callback_handler": trainer.callback_handler,
            "trainer.optimizer": trainer.optimizer,
        }
        is_split = hasattr(trainer, "_run_epoch")
        for owner, names in (GUARDED if is_split else GUARDED_BEFORE).items():
            for name in names:
                self.wrap(owners[owner], name, guarded)

    def end(self) -> None:
        """Leaves the objects as they were; safe to call again."""
        self._over = True
        while self._places:
            inside, name, before, call = self._places.pop()
            if inside.get(name) is not call:
                continue
            if before is None:
                del inside[name]
            else:
                inside[name] = before
