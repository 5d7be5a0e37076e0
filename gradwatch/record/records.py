"""What is written down: steps, events, batches of both, and the sinks that receive them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gradwatch.pickles import stable_name

Outcome = Literal["applied", "skipped_nonfinite", "skipped_scaler", "skipped_policy"]


@stable_name
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


EventKind = Literal[
    "nan",
    "inf",
    "overflow",
    "exploding",
    "no_gradient",
    "skipped",
    "accumulate",
    "dropped",
    "out_of_memory",
]
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)


@stable_name
@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in one optimizer step.

    Attributes:
        step: Optimizer step, counted from 1 per optimizer.
        micro_batch: Micro-batch of the window in which it was first seen, counted from 1;
            0 where the event belongs to the whole step.
        kind: One of :data:`EVENT_KINDS`.
        parameter: Name of the parameter; for a non-finite event the first in backward order that
            went bad. Empty where the event belongs to no parameter.
        module: Name of the module that owns the parameter.
        value: The number behind the event: a count of bad elements for ``nan`` and ``inf``, a
            norm for ``overflow``, ``exploding`` and ``skipped``, micro-batches for ``accumulate``
            and ``dropped``, examples for ``out_of_memory``.
        rank: Rank of the process that saw it.
        message: One sentence for people.
        nan_count: NaN elements in ``parameter``'s gradient, exactly; -1 where the gradient was gone
            before they could be counted.
        inf_count: Inf elements in it, likewise.
        optimizer: Label of the optimizer, as in :class:`~gradwatch.record.records.StepRecord`.
        global_step: The x-axis of loggers, as in the StepRecord.
    """

    step: int
    micro_batch: int
    kind: EventKind
    parameter: str
    module: str
    value: float
    rank: int
    message: str
    nan_count: int = 0
    inf_count: int = 0
    optimizer: str = "none"
    global_step: int = 0

    @property
    def nonfinite(self) -> bool:
        """Whether the event says that a gradient held a NaN or an Inf."""
        return self.kind in ("nan", "inf")


@stable_name
@dataclass(frozen=True, slots=True)
class Layout:
    """The watched parameters in model order; index ``i`` is column ``i`` of every row.

    Attributes:
        names: Full parameter names, ``"encoder.0.weight"``.
        modules: Name of the module that owns each parameter, ``"encoder.0"``.
        shapes: Shape of each parameter.
        aliases: Further names of a parameter that is used in several places (tied weights).
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    aliases: tuple[tuple[str, ...], ...] = ()


@stable_name
@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Some consecutive steps, oldest first, as sinks receive them.

    Attributes:
        layout: The parameters that the columns of ``norms`` stand for.
        steps: One record per optimizer step.
        norms: float array ``[len(steps), len(layout.names)]``: pre-clip norm per parameter, in
            true units; :data:`NO_GRADIENT` (-1) where a parameter had no gradient.
        clipped_norms: The same after the clip.
        statistics: Further per-parameter statistics by name, shaped like ``norms``; NaN in steps
            at which a statistic was not taken.
        events: What happened in these steps, oldest first.
    """

    layout: Layout
    steps: Sequence[StepRecord]
    norms: NDArray[np.floating[Any]]
    clipped_norms: NDArray[np.floating[Any]]
    statistics: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)
    events: Sequence[Event] = ()


@stable_name
@runtime_checkable
class Sink(Protocol):
    """Anything that receives batches of records: a file, a logger, TensorBoard, a list."""

    def write(self, batch: RecordBatch) -> None:
        """Receives some consecutive steps, oldest first, and their events.

        Args:
            batch: The records. A sink keeps no reference to the arrays that it changes itself.
        """

    def close(self) -> None:
        """Writes what is still held and releases files; called once, at the end."""


NO_GRADIENT = -1.0
"""Stands in a row of norms where the parameter had no gradient; no norm is negative."""


def clipped_by(
    norms: NDArray[np.floating[Any]], coefficients: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Returns the norms after a clip that multiplied the gradients.

    Args:
        norms: float array: norms before it; :data:`NO_GRADIENT` stays.
        coefficients: float64 array that fits ``norms``: the factors.
    """
    # The live history, the writer and the reader of a run folder all come here, so that their bits
    # agree: the folder stores only what differs from this.
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (norms * coefficients).astype(norms.dtype)
    return np.where(norms == NO_GRADIENT, NO_GRADIENT, scaled).astype(norms.dtype, copy=False)


logger = logging.getLogger("gradwatch")


@stable_name
class GradwatchWarning(UserWarning):
    """Something in gradwatch failed or was left out; the training itself is untouched."""


def warn_safely(message: str) -> None:
    """Warns, or logs where the user's filters turn warnings into errors: never raises."""
    try:
        warnings.warn(message, GradwatchWarning, stacklevel=3)
    except Exception:
        logger.warning(message)
