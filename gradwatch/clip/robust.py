"""RobustClip: the rule behind ``clip="auto"``; needs no tuning, and follows lasting changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradwatch.checks import check_at_most, check_count, check_positive
from gradwatch.clip.norm_history import MAD_TO_DEVIATION, Backend, Flag, HistoryClip, Scalar
from gradwatch.pickles import stable_name

_LEAST_DEVIATION = 0.05  # of the logarithm: norms within some 15 % of the median always pass
_FARTHEST = math.log(8.0)  # above 8 times the median is an outlier, however much the norms spread
_GUARD = math.log(4.0)  # during the warm-up, above 4 times the median is an outlier
_FEWEST = 3  # the median of fewer norms means little


@stable_name
@dataclass(frozen=True, eq=False)
class RobustClip(HistoryClip):
    r"""Clips a norm that is an outlier relative to the median of the last norms; ``clip="auto"``.

    Norms vary by factors, so the rule works on their logarithms. Let :math:`m` be the median of
    the logarithms of the last ``window`` norms, each taken before the clip,
    :math:`s = 1.4826\,\mathrm{MAD}` their deviation, estimated by the median absolute deviation and
    at least 0.05, and :math:`d = \min(z_t s, \log 8)` the allowed distance. A norm :math:`n` with

    .. math::
        \log n - m > d \quad\text{is scaled to}\quad
        \exp\left(m + d \left(\frac{d}{\log n - m}\right)^2\right)

    so that the further out it is, the closer to the median it is brought. Until there are
    ``warmup`` norms, a norm above four times the median is scaled to the median; the first three
    norms are never clipped. Norms that are zero or not finite never enter the window.

    The rule recovers because a median does not depend on how far out an outlier is. A burst of a
    third of a window, 20 steps, hardly moves it; a lasting rise becomes the median after half a
    window, 32 steps, however high it is. Rules that follow a mean of clipped norms (ZClip) have no
    such bound, and rules with standard deviations let the second half of a burst pass. Multiplying
    the loss by any number changes no decision, because it shifts all logarithms alike.

    On steady norms the rule clips about one step in 300, however much they spread; with heavy
    tails, or norms that drift, two or three in a hundred.

    Attributes:
        z_thresh: z_t, how many deviations above the median are allowed; positive.
        window: How many norms are remembered, at least 3. A lasting rise is accepted after about
            half as many steps, so a burst is clipped to its end only if it is shorter than that.
        warmup: How many norms are needed before their deviation is used; 3 to ``window``.
        norm_type: The p of the norm, positive.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds.

    References:
        A limit that falls with the distance: Kumar et al., ZClip, 2025, arXiv 2504.02507.
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

    def __post_init__(self) -> None:
        check_positive("RobustClip(z_thresh=)", self.z_thresh)
        check_count("RobustClip(window=)", self.window, _FEWEST)
        check_count("RobustClip(warmup=)", self.warmup, _FEWEST)
        reason = ": the warm-up would never end. Write a larger window."
        check_at_most("RobustClip(warmup=)", self.warmup, self.window, "window", reason)
        check_positive("RobustClip(norm_type=)", self.norm_type)
        self._remember(self.window)

    def _limit(self, backend: Backend, norm: Scalar, keep: Flag) -> Scalar:
        logs = self._history.window
        log, median = backend.log(norm), logs.quantile(0.5)
        above = log - median
        allowed = self._allowed(backend, above, MAD_TO_DEVIATION * logs.median_distance(median))
        guarded = backend.where(above > _GUARD, median, median + _GUARD)
        highest = backend.where(logs.count >= self.warmup, median + allowed, guarded)
        limit = backend.where(logs.count >= _FEWEST, backend.exp(highest), math.inf)
        # The norm before the clip, as clipped norms would keep the median from following a rise.
        logs.push(log, keep)
        return limit

    def _allowed(self, backend: Backend, above: Scalar, deviation: Scalar) -> Scalar:
        passing = self.z_thresh * backend.maximum(deviation, _LEAST_DEVIATION)
        passing = backend.minimum(passing, _FARTHEST)
        # For a norm within the limit the ratio is 1. So no branch is needed, which would wait for
        # the device.
        return passing * backend.divide(passing, backend.maximum(above, passing)) ** 2
