"""Event: one thing worth a person's attention, with where it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EventKind = Literal[
    "nan",
    "inf",
    "overflow",
    "exploding",
    "vanishing",
    "spike",
    "no_gradient",
    "skipped",
    "accumulate",
    "dropped",
    "out_of_memory",
]
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)


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
        nan_count: NaN elements in ``parameter``'s gradient, exactly.
        inf_count: Inf elements in ``parameter``'s gradient, exactly.
        optimizer: Label of the optimizer, as in :class:`~gradwatch.record.step.StepRecord`.
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
