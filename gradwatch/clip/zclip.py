"""ZClip: limits how many standard deviations a norm may lie above the mean of earlier norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradwatch.checks import check_between, check_choice, check_count, check_positive
from gradwatch.clip.norm_history import (
    Backend,
    Flag,
    HistoryClip,
    Scalar,
    moving_average,
    moving_deviation,
)
from gradwatch.pickles import stable_name

_LEAST_DEVIATION = {"winsorized": 0.01, "clipped": 0.0}  # as a share of the mean
_SOFTENING = {"winsorized": 0.0, "clipped": 1e-6}


@stable_name
@dataclass(frozen=True, eq=False)
class ZClip(HistoryClip):
    r"""Clips a norm that lies too many standard deviations above the mean of earlier norms.

    For the norm :math:`n`, the mean :math:`\mu` and the standard deviation :math:`\sigma` of
    earlier norms, and the limit :math:`z_t` on the z-score :math:`z = (n - \mu) / \sigma`:

    .. math::
        c = \frac{\mu + z_t^2 \sigma / z}{n} \text{ if } z > z_t, \text{ else } 1; \qquad
        \mu \leftarrow \alpha\mu + (1-\alpha)u, \quad
        \sigma^2 \leftarrow \alpha\sigma^2 + (1-\alpha)(u-\mu)^2

    The further out a norm is, the closer to the mean it is brought. The mean and the (population)
    standard deviation start from the first ``warmup_steps`` norms, which are not clipped. After
    that, :math:`u` is the norm itself or, if it was clipped, depends on ``update``:

    - ``"winsorized"``: :math:`\mu + z_t\sigma`, the largest norm that would not have been clipped.
      A lasting rise is accepted within some ten steps.
    - ``"clipped"``, as published: the norm after the clip. The larger a norm is, the less it
      counts, and after a lasting rise by a factor of three this variant clips forever.

    The published z-score has an epsilon of 1e-6. With ``"clipped"`` it is a millionth of the mean
    here, so that no decision depends on the scale of the loss. With ``"winsorized"`` the deviation
    is instead at least a hundredth of the mean. Norms that are zero or not finite enter no
    statistic.

    Attributes:
        alpha: The weight of the old statistics at each step, between 0 and 1.
        z_thresh: z_t, positive.
        warmup_steps: How many norms the mean and the deviation start from, at least 1.
        max_norm: A further, fixed limit of the norm, also during the warm-up; None for none. The
            authors' code uses 1.0, which makes the rule depend on the scale of the loss.
        update: ``"winsorized"`` or ``"clipped"``.
        norm_type: The p of the norm, positive.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds.

    References:
        Kumar, Owen, Chowdhury, Guera: ZClip: Adaptive Spike Mitigation for LLM Pre-Training.
        2025, arXiv 2504.02507.

    Example:
        >>> import torch
        >>> policy = ZClip(warmup_steps=4)
        >>> for norm in (0.9, 1.1, 0.9, 1.1):
        ...     _ = policy.decide(torch.tensor(norm))
        >>> round(policy.decide(torch.tensor(10.0)).threshold, 3)
        1.007
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    warmup_steps: int = 25
    max_norm: float | None = None
    update: str = "winsorized"
    norm_type: float = 2.0
    scope: str = field(default="global", init=False, repr=False)

    def __post_init__(self) -> None:
        check_between("ZClip(alpha=)", self.alpha, 0.0, 1.0, "Write 0.97 for about 33 steps.")
        check_positive("ZClip(z_thresh=)", self.z_thresh)
        check_count("ZClip(warmup_steps=)", self.warmup_steps, 1)
        if self.max_norm is not None:
            check_positive("ZClip(max_norm=)", self.max_norm)
        check_choice("ZClip(update=)", self.update, tuple(_LEAST_DEVIATION))
        check_positive("ZClip(norm_type=)", self.norm_type)
        self._remember(self.warmup_steps, ("mean", "deviation"))

    def _limit(self, backend: Backend, norm: Scalar, keep: Flag) -> Scalar:
        window, numbers = self._history.window, self._history.numbers
        warm, mean = window.count >= self.warmup_steps, numbers["mean"]
        deviation = backend.maximum(numbers["deviation"], _LEAST_DEVIATION[self.update] * mean)
        z = backend.divide(norm - mean, deviation + _SOFTENING[self.update] * mean)
        outlier = warm & (z > self.z_thresh)
        largest = mean + self.z_thresh * deviation
        limit = mean + backend.divide(self.z_thresh**2 * deviation, z)
        limit = backend.where(outlier, limit, backend.where(warm, largest, math.inf))
        entering = largest if self.update == "winsorized" else limit
        self._follow(backend, backend.where(outlier, entering, norm), keep & warm)
        self._start(backend, norm, keep & (window.count < self.warmup_steps))
        return limit if self.max_norm is None else backend.minimum(limit, self.max_norm)

    def _follow(self, backend: Backend, entering: Scalar, keep: Flag) -> None:
        numbers, past = self._history.numbers, self.alpha
        mean = moving_average(numbers["mean"], entering, past)
        deviation = moving_deviation(numbers["deviation"], entering - mean, past, backend.hypot)
        self._set(backend, keep, mean, deviation)

    def _start(self, backend: Backend, norm: Scalar, keep: Flag) -> None:
        # After the warm-up the host skips this work. On a device, checking the flag would wait.
        if keep is False:
            return
        window = self._history.window
        window.push(norm, keep)
        mean = window.mean()
        self._set(backend, keep, mean, window.deviation(mean))

    def _set(self, backend: Backend, keep: Flag, mean: Scalar, deviation: Scalar) -> None:
        numbers = self._history.numbers
        numbers["mean"] = backend.where(keep, mean, numbers["mean"])
        numbers["deviation"] = backend.where(keep, deviation, numbers["deviation"])
