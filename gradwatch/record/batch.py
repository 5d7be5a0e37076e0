"""RecordBatch: what a sink is given, and Layout: the parameters that its columns stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.event import Event
from gradwatch.record.step import StepRecord

NO_GRADIENT = -1.0
"""Stands in a row of norms where the parameter had no gradient; no norm is negative."""


def clipped_by(
    norms: NDArray[np.floating[Any]], coefficients: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Takes the norms after a clip that multiplied the gradients.

    Args:
        norms: float array: norms before it.
        coefficients: float64 array that fits ``norms``: the factors.

    Returns:
        Array like ``norms``; :data:`NO_GRADIENT` where there was none.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (norms * coefficients).astype(norms.dtype)
    return np.where(norms == NO_GRADIENT, NO_GRADIENT, scaled).astype(norms.dtype, copy=False)


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
