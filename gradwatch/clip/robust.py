"""RobustClip: the rule behind ``clip="auto"``, a limit that needs no tuning and recovers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradwatch.checks import check_count
from gradwatch.clip.fixed import check_positive
from gradwatch.clip.norm_history import Backend, Flag, NormHistory, Scalar, limit_norm
from gradwatch.clip.policy import ClipDecision

MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

_LEAST_DEVIATION = 0.05  # of the logarithm: norms within some 15 % of the median always pass
_FARTHEST = math.log(8.0)  # eight times the median is out however much the norms spread
_GUARD = math.log(4.0)  # during the warm-up, four times the median is out
_FEWEST = 3  # fewer norms have no median worth the name


@dataclass(frozen=True, eq=False)
class RobustClip:
    r"""Clips a norm that is an outlier among the last ones, by their median; ``clip="auto"``.

    Norms vary by factors, so the rule works on their logarithms. Let :math:`m` be the median of
    the logarithms of the last ``window`` norms, each as it was before the clip,
    :math:`s = 1.4826\,\mathrm{MAD}` their deviation by the median absolute deviation, at least
    0.05, and :math:`d = \min(z_t s, \log 8)` the distance that passes. A norm :math:`n` with

    .. math::
        \log n - m > d \quad\text{is scaled to}\quad
        \exp\left(m + d \left(\frac{d}{\log n - m}\right)^2\right)

    so that the further out it is, the closer to the median it is brought. Until there are
    ``warmup`` norms, one of more than four times the median is scaled to the median; the first
    three pass. Norms that are zero or not finite never enter.

    Why it recovers: a median does not care how far out an outlier is. A burst of a third of a
    window, 20 steps, never moves it by much; a rise that lasts becomes the median after half a
    window, 32 steps, however high. Rules that follow a mean of clipped norms (ZClip) have no such
    bound, and rules with standard deviations let the second half of a burst pass. Multiplying the
    loss by any number changes no decision, for it moves all logarithms alike.

    On steady norms it clips about one step in 300, however much they spread; with heavy tails, or
    norms that wander, two or three in a hundred.

    Attributes:
        z_thresh: z_t, how many deviations above the median pass; positive.
        window: How many norms are remembered. Half of it is about the time in which a lasting
            rise is accepted; a burst that is to be clipped to its end must be shorter.
        warmup: How many norms there must be before their deviation is trusted.
        norm_type: The p of the norm, positive.

    Raises:
        TypeError: If an argument is not of the kind that is asked for.
        ValueError: If an argument is out of bounds.

    References:
        The limit that falls with the distance is after Kumar et al.: ZClip, 2025, arXiv 2504.02507.
        Median and MAD: Hampel, The Influence Curve and Its Role in Robust Estimation, JASA 1974.

    Example:
        >>> import torch
        >>> policy = RobustClip()
        >>> for norm in (2.0, 2.1, 1.9, 2.0):
        ...     decision = policy.decide(torch.tensor(norm))
        >>> decision.coefficient is None
        True
        >>> policy.decide(torch.tensor(200.0)).coefficient
        tensor(0.0100)
    """

    z_thresh: float = 3.0
    window: int = 64
    warmup: int = 25
    norm_type: float = 2.0
    scope: str = field(default="global", init=False, repr=False)
    _memory: NormHistory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("RobustClip(z_thresh=)", self.z_thresh)
        check_count("RobustClip(window=)", self.window, _FEWEST)
        check_count("RobustClip(warmup=)", self.warmup, _FEWEST)
        if self.warmup > self.window:
            raise ValueError(
                f"RobustClip(warmup=) must be at most the window of {self.window}, got "
                f"{self.warmup!r}: the warm-up would never end. Write a larger window."
            )
        check_positive("RobustClip(norm_type=)", self.norm_type)
        object.__setattr__(self, "_memory", NormHistory(self.window))

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides about one norm; see :class:`~gradwatch.clip.policy.ClipPolicy`."""
        return limit_norm(total_norm, self._memory, self._limit)

    def _limit(self, place: Backend, norm: Scalar, keep: Flag) -> Scalar:
        logs: Any = self._memory.window
        log, median = place.log(norm), logs.quantile(0.5)
        above = log - median
        allowed = self._allowed(place, above, MAD_TO_DEVIATION * logs.spread(median))
        guarded = place.where(above > _GUARD, median, median + _GUARD)
        highest = place.where(logs.count >= self.warmup, median + allowed, guarded)
        limit = place.where(logs.count >= _FEWEST, place.exp(highest), math.inf)
        logs.push(log, keep)
        return limit

    def _allowed(self, place: Backend, above: Scalar, deviation: Scalar) -> Scalar:
        """Returns how far above the median a norm may lie, given how far it does."""
        passing = self.z_thresh * place.larger(deviation, _LEAST_DEVIATION)
        passing = place.smaller(passing, _FARTHEST)
        return passing * place.ratio(passing, place.larger(above, passing)) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Returns the logarithms of the last norms; on an accelerator this waits for them."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._memory.load_state_dict(state)
