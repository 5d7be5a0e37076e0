"""SpikeRule: detects a finite norm so far above the others that its step should be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradwatch.checks import check_positive, shown
from gradwatch.clip.norm_history import MAD_TO_DEVIATION, Backend, Flag, HistoryRule, Scalar
from gradwatch.pickles import stable_name

AUTO_Z = 6.0
_WINDOW = 128
_FEWEST = 25
_LEAST_DEVIATION = 0.05  # as a share of the median: with z = 6 no norm below 1.3 medians is a spike


@stable_name
@dataclass(frozen=True, eq=False)
class SpikeRule(HistoryRule):
    r"""Detects spikes by comparing a norm with the median of those before it; ``skip_spikes=``.

    A norm :math:`n` is a spike if :math:`n > m + z \max(1.4826\,\mathrm{MAD}, 0.05\,m)` for the
    median :math:`m` and the median absolute deviation of the last 128 norms, of which there must be
    at least 25. Spikes enter this window as well, so a lasting rise is accepted after at most 64
    steps. Norms that are zero or not finite are never spikes, and never enter the window.

    Attributes:
        z: How many deviations above the median are allowed, positive; ``"auto"`` for 6.

    Raises:
        TypeError: If ``z`` is neither a number nor ``"auto"``.
        ValueError: If ``z`` is not positive, or is another word.

    References:
        allenai/OLMo-core, ``optim/skip_step_optimizer.py``, skips at six standard deviations. A
        spike in the window inflates a standard deviation, but neither the median nor the MAD.

    Example:
        >>> import torch
        >>> rule = SpikeRule()
        >>> spikes = [rule.is_spike(torch.tensor(n)).item() for n in [1.0, 1.1] * 15 + [9.0, 1.0]]
        >>> spikes.index(True), sum(spikes)
        (30, 1)
    """

    z: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.z, str) and self.z != "auto":
            raise ValueError(
                f"skip_spikes must be a number, 'auto' or None, got {shown(self.z)}. Write "
                "'auto' to skip at six deviations above the median."
            )
        if self.z != "auto":
            check_positive("skip_spikes", self.z)
        self._remember(_WINDOW)

    def is_spike(self, total_norm: Tensor) -> Tensor:
        """Returns whether a norm is a spike compared with those before it, and remembers it.

        Args:
            total_norm: Tensor ``[]``: before the clip, without loss scale, reduced over ranks.

        Returns:
            A bool tensor ``[]`` on the device of the norm.
        """
        backend, norm, keep = self._history.read(total_norm)
        spike = keep & self._exceeds(backend, norm, keep)
        return spike if isinstance(spike, Tensor) else torch.tensor(spike, device="cpu")

    def _exceeds(self, backend: Backend, norm: Scalar, keep: Flag) -> Flag:
        window = self._history.window
        median = window.quantile(0.5)
        deviation = MAD_TO_DEVIATION * window.median_distance(median)
        deviation = backend.maximum(deviation, _LEAST_DEVIATION * median)
        limit = median + (AUTO_Z if self.z == "auto" else self.z) * deviation
        spike = (window.count >= _FEWEST) & (norm > limit)
        # Spikes enter as well: otherwise norms that settle at a higher level would be skipped
        # forever.
        window.push(norm, keep)
        return spike
