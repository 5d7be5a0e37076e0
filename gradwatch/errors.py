"""The exceptions that gradwatch raises on purpose."""

from __future__ import annotations

from gradwatch.pickles import stable_name


@stable_name
class NonFiniteGradientError(RuntimeError):
    """A gradient held a NaN or an Inf and ``on_nonfinite="raise"`` was asked for.

    Raised before any weight changes.

    Attributes:
        step: The optimizer step that was not taken, counted from 1.
        micro_batch: The micro-batch of the window in which it was first seen, counted from 1.
        parameter: The first parameter in backward order that went bad.
        nan_count: NaN elements in that parameter's gradient.
        inf_count: Inf elements in that parameter's gradient.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int = 0,
        micro_batch: int = 0,
        parameter: str = "",
        nan_count: int = 0,
        inf_count: int = 0,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.micro_batch = micro_batch
        self.parameter = parameter
        self.nan_count = nan_count
        self.inf_count = inf_count


@stable_name
class AccumulationError(RuntimeError):
    """A step or a backward came against the number of micro-batches that was asked for."""
