"""Row: what tail shows of a step."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A step, with the fields of :class:`~gradwatch.record.step.StepRecord` that tail shows."""

    step: int
    optimizer: str
    time_s: float
    grad_norm: float
    grad_norm_clipped: float
    clip_coef: float
    clip_threshold: float
    clipped: bool
    outcome: str
    nonfinite_parameters: int
    loss: float
    lr: float
    loss_scale: float


FIELDS = Row._fields


class Happening(NamedTuple):
    """An event, with the fields of :class:`~gradwatch.record.event.Event` that tail shows."""

    step: int
    optimizer: str
    kind: str
    parameter: str
    message: str

    @classmethod
    def of(cls, event: Any) -> Happening:
        """Takes them from an event.

        Args:
            event: The event.
        """
        return cls(*(getattr(event, name) for name in cls._fields))
