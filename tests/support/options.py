"""Ways of watching, as the options of `gradwatch.watch`: none of them changes a finite training."""

from collections.abc import Callable
from typing import Any

from gradwatch.testing import CapturingSink

STATISTICS = ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")


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
    "explain": lambda: {"on_nonfinite": "explain"},
    "every_statistic": lambda: {"statistics": STATISTICS},
    "every_second": lambda: {"statistics": STATISTICS, "every": 2},
    "exploding": lambda: {"exploding_norm": 1e-9},
    "infinite_clip": lambda: {"clip": float("inf")},
}
