"""SpikeRule: tells a finite norm so far out that its step had better be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gradwatch.clip.fixed import check_positive
from gradwatch.clip.norm_history import Backend, Flag, NormHistory, Scalar
from gradwatch.clip.robust import MAD_TO_DEVIATION

_AUTO = 6.0
_WINDOW = 128
_FEWEST = 25
_LEAST_DEVIATION = 0.05  # as a share of the median: nothing below 1.3 times it is a spike at 6


@dataclass(frozen=True, eq=False)
class SpikeRule:
    r"""Tells spikes by the median of the norms before them; ``skip_spikes=``.

    A norm :math:`n` is a spike if :math:`n > m + z \max(1.4826\,\mathrm{MAD}, 0.05\,m)` for the
    median :math:`m` and the median absolute deviation of the last 128 norms. There must be 25 of
    them. Spikes enter like all others, so a rise that lasts is accepted after at most 64 steps.
    Norms that are zero or not finite are no spikes, and never enter.

    Attributes:
        z: How many deviations above the median pass, positive; ``"auto"`` for 6.

    Raises:
        TypeError: If ``z`` is neither a number nor ``"auto"``.
        ValueError: If it is not positive, or another word.

    References:
        allenai/OLMo-core, ``optim/skip_step_optimizer.py``, skips at six standard deviations, which
        a spike in the window inflates; median and MAD are immune to that.

    Example:
        >>> import torch
        >>> rule = SpikeRule()
        >>> spikes = [rule.is_spike(torch.tensor(n)).item() for n in [1.0, 1.1] * 15 + [9.0, 1.0]]
        >>> spikes.index(True), sum(spikes)
        (30, 1)
    """

    z: float | Literal["auto"] = "auto"
    _memory: NormHistory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.z, str) and self.z != "auto":
            raise ValueError(
                f"skip_spikes must be a number, 'auto' or None, got {self.z!r}. Write 'auto' to "
                "skip at six deviations above the median."
            )
        if self.z != "auto":
            check_positive("skip_spikes", self.z)
        object.__setattr__(self, "_memory", NormHistory(_WINDOW))

    def is_spike(self, total_norm: Tensor) -> Tensor:
        """Judges one norm by those before it, and takes note of it.

        Args:
            total_norm: Tensor ``[]``: pre-clip, unscaled and reduced over ranks.

        Returns:
            Tensor ``[]`` of bool, on the device of the norm.
        """
        place = self._memory.at(total_norm)
        norm, keep = place.take(total_norm)
        spike = keep & self._judge(place, norm, keep)
        return spike if isinstance(spike, Tensor) else torch.tensor(spike)

    def _judge(self, place: Backend, norm: Scalar, keep: Flag) -> Flag:
        history: Any = self._memory.window
        median = history.quantile(0.5)
        deviation = MAD_TO_DEVIATION * history.spread(median)
        deviation = place.larger(deviation, _LEAST_DEVIATION * median)
        limit = median + (_AUTO if self.z == "auto" else self.z) * deviation
        spike = (history.count >= _FEWEST) & (norm > limit)
        history.push(norm, keep)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """Returns the last norms; on an accelerator this waits for them."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._memory.load_state_dict(state)
