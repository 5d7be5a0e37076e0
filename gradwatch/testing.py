"""Test doubles for users too: a sink that keeps all, a model with known gradients, late numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradwatch.measure.deferred import late_readings
from gradwatch.record.records import Event, RecordBatch, StepRecord

__all__ = ["CapturingSink", "LinearModel", "late_readings"]

late_readings.__module__ = __name__  # it lives below, where numbers are read


class CapturingSink:
    """A sink that keeps what it is given.

    Attributes:
        batches: The batches as they came.
        closed: Whether it was closed.

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
        """Remembers that it was closed."""
        self.closed = True


class LinearModel(nn.Module):
    """A model whose loss is the dot product of its weight with fixed numbers: its gradient.

    Attributes:
        weight: Parameter ``[n]`` of zeros, float32.
    """

    slope: Tensor

    def __init__(self, gradient: list[float]) -> None:
        """Chooses the gradient.

        Args:
            gradient: What every backward adds to ``weight.grad``.
        """
        super().__init__()
        self.register_buffer("slope", torch.tensor(gradient))
        self.weight = nn.Parameter(torch.zeros(len(gradient)))

    def forward(self) -> Tensor:
        """Returns the loss: a tensor ``[]``."""
        return (self.weight * self.slope).sum()
