"""Test doubles, also for users: a capturing sink, a model with known gradients, late numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradwatch.measure.deferred import late_readings
from gradwatch.record.records import Event, RecordBatch, StepRecord

__all__ = ["CapturingSink", "LinearModel", "late_readings"]

late_readings.__module__ = __name__  # defined in measure/, which must not import this module


class CapturingSink:
    """A sink that keeps everything it receives.

    Attributes:
        batches: The batches in the order in which they were delivered.
        closed: Whether :meth:`close` was called.

    Example:
        >>> import gradwatch
        >>> sink = CapturingSink()
        >>> model = LinearModel([3.0, 4.0])
        >>> with gradwatch.watch(model, sinks=[sink]):
        ...     model().backward()
        >>> sink.steps[0].grad_norm
        5.0
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.batches: list[RecordBatch] = []
        self.closed = False

    @property
    def steps(self) -> list[StepRecord]:
        """All steps, oldest first."""
        return [record for batch in self.batches for record in batch.steps]

    @property
    def events(self) -> list[Event]:
        """All events, oldest first."""
        return [event for batch in self.batches for event in batch.events]

    def write(self, batch: RecordBatch) -> None:
        """Keeps a batch."""
        self.batches.append(batch)

    def close(self) -> None:
        """Notes that the sink was closed."""
        self.closed = True


class LinearModel(nn.Module):
    """A model whose gradient is known: its loss is the dot product of its weight with it.

    Attributes:
        weight: Parameter ``[n]``, float32, initialized to zeros.
        slope: Buffer ``[n]``, float32: the gradient.
    """

    slope: Tensor

    def __init__(self, gradient: list[float]) -> None:
        """Sets the gradient.

        Args:
            gradient: The n numbers that every backward adds to ``weight.grad``.
        """
        super().__init__()
        self.register_buffer("slope", torch.tensor(gradient, dtype=torch.float32))
        self.weight = nn.Parameter(torch.zeros(len(gradient), dtype=torch.float32))

    def forward(self) -> Tensor:
        """Returns the loss: a tensor ``[]``."""
        return (self.weight * self.slope).sum()
