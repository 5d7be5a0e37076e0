"""AutoClip: limits the norm to a percentile of earlier norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradwatch.checks import check_at_most, check_between, check_count, check_positive
from gradwatch.clip.norm_history import Backend, Flag, HistoryClip, Scalar
from gradwatch.pickles import stable_name


@stable_name
@dataclass(frozen=True, eq=False)
class AutoClip(HistoryClip):
    r"""Limits the norm to a percentile of the norms of earlier steps.

    The factor is :math:`c = \min(1, P_p(H) / n)` for the norm :math:`n` and the p-th percentile
    :math:`P_p`, interpolated linearly, of a history :math:`H`: the last ``window`` norms before
    this one, each taken before the clip. Nothing is clipped until the history has ``warmup`` norms.
    Norms that are zero or not finite never enter it. The rule does not depend on the scale of the
    loss: multiplying the loss by 100 changes no decision.

    It clips about ``100 - percentile`` percent of all steps, however steady they are. The paper
    recommends the 10th percentile of all norms so far, including the current one, which clips
    nine steps in ten: ``AutoClip(10, window=1_000_000, warmup=1, include_current=True)``. The
    default, the 90th percentile of a bounded history, clips one in ten and follows decaying norms.

    Attributes:
        percentile: p, between 0 and 100.
        window: The length of the history in steps, at least 1.
        warmup: How many norms the history needs before anything is clipped; 1 to ``window``.
        include_current: Whether the current norm counts as part of the history.
        norm_type: The p of the norm itself (not of the percentile), positive.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds.

    References:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source
        Separation Networks. MLSP 2020, arXiv 2007.14469.

    Example:
        >>> import torch
        >>> policy = AutoClip(percentile=50, warmup=3)
        >>> for norm in (1.0, 2.0, 3.0):
        ...     _ = policy.decide(torch.tensor(norm))
        >>> policy.decide(torch.tensor(8.0)).coefficient
        tensor(0.2500)
    """

    percentile: float = 90.0
    window: int = 1000
    warmup: int = 5
    include_current: bool = False
    norm_type: float = 2.0
    scope: str = field(default="global", init=False, repr=False)

    def __post_init__(self) -> None:
        advice = "Write 90 to clip the largest tenth of the norms."
        check_between("AutoClip(percentile=)", self.percentile, 0.0, 100.0, advice)
        check_count("AutoClip(window=)", self.window, 1)
        check_count("AutoClip(warmup=)", self.warmup, 1)
        reason = ": the history would never be long enough. Write a larger window."
        check_at_most("AutoClip(warmup=)", self.warmup, self.window, "window", reason)
        check_positive("AutoClip(norm_type=)", self.norm_type)
        self._remember(self.window)

    def _limit(self, backend: Backend, norm: Scalar, keep: Flag) -> Scalar:
        window = self._history.window
        if self.include_current:
            window.push(norm, keep)
        # By default the percentile is read before the push, so a spike cannot raise its own limit.
        enough, percentile = window.count >= self.warmup, window.quantile(self.percentile / 100)
        if not self.include_current:
            window.push(norm, keep)
        return backend.where(enough, percentile, math.inf)
