"""Ways of watching that must change nothing."""

from collections.abc import Callable
from typing import Any

from torch import nn

import gradwatch
from gradwatch.testing import CapturingSink

STEPS = 5


EVERY_STATISTIC = (
    "norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio", "histogram",
)  # fmt: skip


class Raises:
    """A sink that fails at every write and at its close."""

    def write(self, batch: object) -> None:
        raise OSError("disk full")

    def close(self) -> None:
        raise OSError("folder gone")


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "sink": lambda: {"sinks": [CapturingSink()]},
    "raising_sink": lambda: {"sinks": [Raises()]},
    "skip": lambda: {"on_nonfinite": "skip"},
    "raise": lambda: {"on_nonfinite": "raise"},
    "every_statistic": lambda: {"statistics": known(EVERY_STATISTIC)},
    "every_second": lambda: {"statistics": known(EVERY_STATISTIC), "every": 2},
    "exploding": lambda: {"exploding_norm": 1e-9},
    "infinite_clip": lambda: {"clip": float("inf")},
}


def known(statistics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the statistics of the design that this version has."""
    known = []
    for statistic in statistics:
        try:
            gradwatch.watch(nn.Linear(1, 1), statistics=("norm", statistic))
        except ValueError:
            continue
        known.append(statistic)
    return tuple(known)
