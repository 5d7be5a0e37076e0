"""ZClip: a limit on how many standard deviations a norm may lie above the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradwatch.checks import check_between, check_choice, check_count
from gradwatch.clip.fixed import check_positive
from gradwatch.clip.norm_history import Backend, Flag, NormHistory, Scalar, limit_norm
from gradwatch.clip.policy import ClipDecision

_LEAST_DEVIATION = {"winsorized": 0.01, "clipped": 0.0}  # as a share of the mean
_SOFTENING = {"winsorized": 0.0, "clipped": 1e-6}


@dataclass(frozen=True, eq=False)
class ZClip:
    r"""Clips a norm that lies too many standard deviations above the mean of the norms before it.

    For the norm :math:`n`, the mean :math:`\mu` and the standard deviation :math:`\sigma` of
    earlier norms, and the limit :math:`z_t` on the z-score :math:`z = (n - \mu) / \sigma`:

    .. math::
        c = \frac{\mu + z_t^2 \sigma / z}{n} \text{ if } z > z_t, \text{ else } 1; \qquad
        \mu \leftarrow \alpha\mu + (1-\alpha)u, \quad
        \sigma^2 \leftarrow \alpha\sigma^2 + (1-\alpha)(u-\mu)^2

    The further out a norm is, the closer to the mean it is brought. Mean and standard deviation
    (that of the population) start from the first ``warmup_steps`` norms, which are not clipped.
    What enters them afterwards, :math:`u`, depends on ``update`` where a norm was clipped:

    - ``"winsorized"``: :math:`\mu + z_t\sigma`, the largest norm that would have passed. A lasting
      rise is accepted within some ten steps.
    - ``"clipped"``, as published: the norm after the clip. The more a norm exceeds, the less it
      counts, and after a lasting rise by three ZClip as published clips for ever.

    The epsilon of 1e-6 in the published z-score is here a millionth of the mean, so that no
    decision depends on the scale of the loss; with ``"winsorized"`` the deviation is at least a
    hundredth of the mean. Norms that are zero or not finite enter no statistic.

    Attributes:
        alpha: The share that the past keeps at each step, between 0 and 1.
        z_thresh: z_t, positive.
        warmup_steps: How many norms the mean and the deviation start from.
        max_norm: A further, fixed limit, for the warm-up too; None for none. The authors' code
            has 1.0 there, which is a rule of its own and not independent of scale.
        update: ``"winsorized"`` or ``"clipped"``.
        norm_type: The p of the norm, positive.

    Raises:
        TypeError: If an argument is not of the kind that is asked for.
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
    _memory: NormHistory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_between("ZClip(alpha=)", self.alpha, 0.0, 1.0, "Write 0.97 for about 33 steps.")
        check_positive("ZClip(z_thresh=)", self.z_thresh)
        check_count("ZClip(warmup_steps=)", self.warmup_steps, 1)
        if self.max_norm is not None:
            check_positive("ZClip(max_norm=)", self.max_norm)
        check_choice("ZClip(update=)", self.update, tuple(_LEAST_DEVIATION))
        check_positive("ZClip(norm_type=)", self.norm_type)
        object.__setattr__(self, "_memory", NormHistory(self.warmup_steps, ("mean", "deviation")))

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides about one norm; see :class:`~gradwatch.clip.policy.ClipPolicy`."""
        return limit_norm(total_norm, self._memory, self._limit)

    def _limit(self, place: Backend, norm: Scalar, keep: Flag) -> Scalar:
        warm = self._memory.window.count >= self.warmup_steps
        mean, deviation = self._mean, self._deviation(place)
        z = place.ratio(norm - mean, deviation + _SOFTENING[self.update] * mean)
        outlier = warm & (z > self.z_thresh)
        largest = mean + self.z_thresh * deviation
        limit = mean + place.ratio(self.z_thresh**2 * deviation, z)
        limit = place.where(outlier, limit, place.where(warm, largest, math.inf))
        entering = largest if self.update == "winsorized" else limit
        self._follow(place, place.where(outlier, entering, norm), keep & warm)
        self._start(place, norm, keep & (self._memory.window.count < self.warmup_steps))
        return limit if self.max_norm is None else place.smaller(limit, self.max_norm)

    @property
    def _mean(self) -> Scalar:
        return self._memory.numbers["mean"]

    def _deviation(self, place: Backend) -> Scalar:
        floor = _LEAST_DEVIATION[self.update] * self._mean
        return place.larger(self._memory.numbers["deviation"], floor)

    def _follow(self, place: Backend, entering: Scalar, keep: Flag) -> None:
        """Moves mean and deviation; the root of the variance, so that no tiny square is lost."""
        numbers, past, new = self._memory.numbers, self.alpha, 1 - self.alpha
        mean = past * numbers["mean"] + new * entering
        deviation = place.hypot(
            math.sqrt(past) * numbers["deviation"], math.sqrt(new) * (entering - mean)
        )
        self._set(place, keep, mean, deviation)

    def _start(self, place: Backend, norm: Scalar, keep: Flag) -> None:
        if not place.may_be(keep):
            return
        window: Any = self._memory.window
        window.push(norm, keep)
        mean = window.mean()
        self._set(place, keep, mean, window.deviation(mean))

    def _set(self, place: Backend, keep: Flag, mean: Scalar, deviation: Scalar) -> None:
        numbers = self._memory.numbers
        numbers["mean"] = place.where(keep, mean, numbers["mean"])
        numbers["deviation"] = place.where(keep, deviation, numbers["deviation"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the norms of the warm-up, mean and deviation; this waits for an accelerator."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._memory.load_state_dict(state)
