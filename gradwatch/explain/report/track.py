"""Track: the steps of one optimizer as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

NUMBERS = (
    "micro_batches",
    "weight",
    "grad_norm",
    "grad_norm_clipped",
    "grad_norm_local",
    "clip_threshold",
    "clipped",
    "nonfinite_parameters",
    "loss",
    "lr",
    "loss_scale",
    "noise_scale",
    "noise_scale_stderr",
)
COLUMNS = ("optimizer", "outcome", *NUMBERS)
"""What a report reads of the steps."""


@dataclass(frozen=True, slots=True)
class Track:
    """The steps of one optimizer, oldest first.

    Attributes:
        optimizer: Its label.
        step: int64 ``[steps]``.
        columns: By name of :data:`NUMBERS` an array ``[steps]``.
        applied: bool ``[steps]``.
        by_scaler: bool ``[steps]``: whether the scaler left the step out.
    """

    optimizer: str
    step: Array
    columns: Mapping[str, Array]
    applied: Array
    by_scaler: Array

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def bad(self) -> Array:
        """Whether a step's gradients were not finite, and that is no affair of the scaler's."""
        unsound = (self["nonfinite_parameters"] > 0) | ~np.isfinite(self["grad_norm"])
        return unsound & ~self.by_scaler

    @property
    def finite(self) -> Array:
        """The finite norms, oldest first."""
        norms = self["grad_norm"]
        return norms[np.isfinite(norms)]


def tracks_of(frame: pd.DataFrame) -> list[Track]:
    """Takes the steps apart by optimizer.

    Args:
        frame: ``History.steps(columns=COLUMNS)``.
    """
    labels = frame["optimizer"]
    names = [str(name) for name in labels.unique()]
    if len(names) == 1:
        return [_track(names[0], frame)]
    return [_track(name, frame[labels == name]) for name in names]


def _track(name: str, frame: pd.DataFrame) -> Track:
    outcome = frame["outcome"]
    return Track(
        name,
        frame.index.to_numpy(),
        {column: frame[column].to_numpy() for column in NUMBERS},
        (outcome == "applied").to_numpy(bool),
        (outcome == "skipped_scaler").to_numpy(bool),
    )
