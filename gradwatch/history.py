"""History: what a run left behind, as pandas frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gradwatch.explain.advice import clip_advice, clip_rate
from gradwatch.record.batch import RecordBatch
from gradwatch.record.frames import events_frame, parameters_frame, steps_frame

if TYPE_CHECKING:
    import pandas as pd


class History:
    """The newest steps of a run and all its events; reading it never changes the run."""

    def __init__(self, source: Callable[[], RecordBatch]) -> None:
        """Reads from a source.

        Args:
            source: Gives what is there when it is called.
        """
        self._source = source

    def __len__(self) -> int:
        return len(self._source().steps)

    def __repr__(self) -> str:
        batch = self._source()
        return (
            f"History({len(batch.steps)} steps, {len(batch.layout.names)} parameters, "
            f"{len(batch.events)} events)"
        )

    def steps(self) -> pd.DataFrame:
        """Returns one row per optimizer step.

        Returns:
            Index ``step`` (from 1 per optimizer); columns ``optimizer, time_s, micro_batches,
            weight, grad_norm, grad_norm_clipped, grad_norm_local, clip_coef, clip_threshold,
            clipped, outcome, nonfinite_parameters, loss, lr, loss_scale, noise_scale`` as
            :class:`~gradwatch.record.step.StepRecord` explains them.
        """
        return steps_frame(self._source())

    def parameters(self) -> pd.DataFrame:
        """Returns one row per step and parameter that had a gradient in it.

        Returns:
            Columns ``step, parameter, grad_norm`` (before the clip), ``grad_norm_clipped`` (after
            it) and one per further statistic that ``watch(statistics=)`` asked for.
        """
        return parameters_frame(self._source())

    def events(self) -> pd.DataFrame:
        """Returns one row per event.

        Returns:
            Columns ``step, micro_batch, kind, parameter, module, value, rank, message, nan_count,
            inf_count, optimizer`` as :class:`~gradwatch.record.event.Event` explains them.
        """
        return events_frame(self._source().events)

    def clip_rate(self, window: int = 1000) -> float:
        """Returns the share of the newest applied steps that a clip has changed.

        Args:
            window: How many steps count at most; no more than ``watch(buffer_size=)`` are kept.

        Returns:
            A number from 0 to 1; NaN before the first step.
        """
        return clip_rate(self._source().steps, window)

    def advice(self) -> list[str]:
        """Returns a line for each optimizer whose clip acts on most steps, or on none."""
        return clip_advice(self._source().steps)
