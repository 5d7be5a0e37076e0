"""StepRecord: what is kept of one optimizer step, one number per field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["applied", "skipped_nonfinite", "skipped_scaler", "skipped_policy"]


@dataclass(slots=True)
class StepRecord:
    """One optimizer step in true units: unscaled, and reduced over ranks.

    Attributes:
        step: Optimizer steps so far, counted from 1 per optimizer.
        optimizer: Label of the optimizer (``"AdamW"``, a second one ``"AdamW-1"``), or ``"none"``
            where no optimizer steps the model and each backward counts as a step.
        time_s: Seconds since the watcher was attached, at the end of the step.
        micro_batches: Backward passes whose gradients are in this step.
        weight: Sum of the micro-batch weights, of all ranks where gradwatch accumulates; where none
            were given the number of micro-batches.
        grad_norm: Total gradient norm BEFORE the clip.
        grad_norm_clipped: Total gradient norm AFTER the clip; ``clip_coef * grad_norm``.
        grad_norm_local: Norm of this rank's own gradients just before the last reduction over the
            ranks; NaN where there is none to be had.
        clip_coef: Factor that the gradients were multiplied with; 1.0 where nothing was clipped.
        clip_threshold: Norm (or element) limit of the clipping policy; NaN without one.
        clipped: Whether the clip changed any gradient.
        outcome: Whether the step was applied, or why it was not.
        nonfinite_parameters: Number of parameters whose gradient holds a NaN or an Inf.
        loss: Weighted mean of the window's losses where gradwatch saw them, else NaN.
        lr: Learning rate of the first parameter group during the step.
        loss_scale: Scale of a ``GradScaler`` during the step; 1.0 without one.
        noise_scale: Gradient noise scale tr(Sigma) / |G|^2 up to this step, in the unit of the
            weights; NaN where it is not known.
        noise_scale_stderr: Its standard error.
        hessian_eigenvalue: Largest eigenvalue of the Hessian of the loss that
            :class:`~gradwatch.CurvatureEvery` was given, for the weights after the step; NaN where
            it was not taken.
        hessian_trace: Its trace; an estimate.
        global_step: The x-axis of loggers: ``step``, or the framework's own count.
    """

    step: int
    optimizer: str = "none"
    time_s: float = 0.0
    micro_batches: int = 1
    weight: float = 1.0
    grad_norm: float = 0.0
    grad_norm_clipped: float = 0.0
    grad_norm_local: float = math.nan
    clip_coef: float = 1.0
    clip_threshold: float = math.nan
    clipped: bool = False
    outcome: Outcome = "applied"
    nonfinite_parameters: int = 0
    loss: float = math.nan
    lr: float = math.nan
    loss_scale: float = 1.0
    noise_scale: float = math.nan
    noise_scale_stderr: float = math.nan
    hessian_eigenvalue: float = math.nan
    hessian_trace: float = math.nan
    global_step: int = 0
