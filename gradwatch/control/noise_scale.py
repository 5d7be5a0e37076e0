"""The gradient noise scale: how many examples until a gradient is as much signal as noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradwatch.control.averages import PairAverage, over
from gradwatch.control.checks import check_between

MIN_UPDATES = 20
"""Fewer windows give no estimate, and no standard error, worth the name."""

LEAST_SIGNIFICANCE = 2.0
"""How many standard errors above 0 the squared gradient must be."""

MOST_BATCHES = 4.0
"""A noise scale above this many batches is further away than the batches can tell."""

_LARGEST = 1e300  # the difference of two such numbers is still a float


def noise_terms(small_sq: float, small: float, big_sq: float, big: float) -> tuple[float, float]:
    r"""Separates the noise from the gradient by its squared norm at two batch sizes.

    The squared norm of the mean gradient over :math:`b` examples is on average
    :math:`|G|^2 + \mathrm{tr}(\Sigma)/b`, so two sizes give two equations:

    .. math::
        \mathrm{tr}(\Sigma) \approx \frac{q - Q}{1/b - 1/B} \qquad
        |G|^2 \approx \frac{BQ - bq}{B - b}

    Neither is biased. Of k micro-batches, pass the weighted mean of their squared norms,
    :math:`q = \sum_i (w_i/W) |g_i|^2`, and :math:`b = W/k`, whether they are equally large or not:
    the noise of micro-batch i is :math:`\mathrm{tr}(\Sigma)/w_i`, and weighing it by
    :math:`w_i/W` leaves :math:`\mathrm{tr}(\Sigma)\, k/W`. The plain mean would need the harmonic
    mean of the sizes instead and varies more.

    Args:
        small_sq: q, the squared norm of a small batch's mean gradient, or the mean of several.
        small: b, its size in the unit of the weights: examples or tokens; positive.
        big_sq: Q, the squared norm of the big batch's mean gradient.
        big: B, its size in the same unit; above ``small``.

    Returns:
        tr(Sigma), the variance of the gradient of one example (or token) summed over all
        elements, and |G|^2, the squared norm of the true gradient, which may come out negative.

    References:
        McCandlish, Kaplan, Amodei: An Empirical Model of Large-Batch Training. 2018,
        arXiv 1812.06162, appendix A.1.

    Example:
        >>> noise_terms(small_sq=3.0, small=8, big_sq=2.0, big=16)
        (16.0, 1.0)
    """
    tr_sigma = (small_sq - big_sq) / (1 / small - 1 / big)
    grad_sq = (big * big_sq - small * small_sq) / (big - small)
    return tr_sigma, grad_sq


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """An estimate of the simple noise scale tr(Sigma) / |G|^2, and whether to believe it.

    Sizes, and tr(Sigma), are in the unit of the weights given to ``watcher.backward(weight=)``:
    examples or tokens, and micro-batches where none were given. What is not known is NaN.

    Attributes:
        b_simple: The noise scale: the batch at which the noise is as large as the gradient.
        tr_sigma: tr(Sigma), the variance of the gradient of one unit, summed over all elements.
        grad_sq: |G|^2, the squared norm of the gradient without its noise; may be negative.
        stderr: Standard error of ``b_simple``, by the delta method.
        valid: Whether to believe it: ``reason`` is empty.
        updates: Windows that went into the estimate.
        suggested_micro_batches: The power of two nearest to ``micro_batches``, at least 1; None
            unless valid.
        reason: Why it is not valid: too few windows, a gradient that does not stand out from the
            noise, or a ``b_simple`` above four times the batch; empty where it is valid.
        micro_batches: ``b_simple`` as a number of micro-batches per step, not rounded.
        significance: How many standard errors ``grad_sq`` is above 0.
        batch: The size of the last window, over all ranks.
    """

    b_simple: float
    tr_sigma: float
    grad_sq: float
    stderr: float
    valid: bool
    updates: int
    suggested_micro_batches: int | None
    reason: str = ""
    micro_batches: float = math.nan
    significance: float = math.nan
    batch: float = math.nan

    @property
    def out_of_range(self) -> bool:
        """Whether ``b_simple`` is above four times the batch, and so not to be told from more."""
        return self.b_simple > MOST_BATCHES * self.batch

    def __float__(self) -> float:
        return self.b_simple


class NoiseScaleEstimator:
    """Follows the noise scale from window to window.

    Two bias-corrected exponential moving averages, of tr(Sigma) and of |G|^2, are divided by each
    other. The average of the ratios would be off by tens of percent, for |G|^2 is at times near 0,
    or below. The standard errors take the windows for independent.

    Args:
        beta: How much of the averages stays at each window, between 0 and 1. With 0.99 they span
            about 200 windows, and a noise scale that grows is seen 100 windows late.

    Raises:
        TypeError: If ``beta`` is not a number.
        ValueError: If it is out of bounds.

    Example:
        >>> estimator = NoiseScaleEstimator()
        >>> for small_sq in (2.9, 3.1) * 10:
        ...     estimator.update(*noise_terms(small_sq, 8, 2.0, 16), batch=16, per_micro_batch=8)
        >>> noise = estimator.read()
        >>> round(noise.b_simple), noise.valid, noise.suggested_micro_batches
        (16, True, 2)
    """

    __slots__ = ("_averages", "_batch", "_per", "_updates")

    def __init__(self, beta: float = 0.99) -> None:
        advice = "Write 0.99 for averages over about 200 windows."
        check_between("NoiseScaleEstimator(beta=)", beta, 0.0, 1.0, advice)
        self._averages = PairAverage(beta)
        self._updates = 0
        self._batch = self._per = 0.0

    def update(self, tr_sigma: float, grad_sq: float, batch: float, per_micro_batch: float) -> None:
        """Takes in a window; one with a number that is not finite, or without a size, is ignored.

        Args:
            tr_sigma: As of :func:`noise_terms`, like ``grad_sq``.
            grad_sq: Any sign; its scale does not matter.
            batch: The weight of the window over all ranks.
            per_micro_batch: The weight that one more micro-batch on every rank adds to it.
        """
        sizes, terms = (batch, per_micro_batch), (tr_sigma, grad_sq)
        if not all(0 < size < math.inf for size in sizes):
            return
        if not all(abs(term) <= _LARGEST for term in terms):
            return
        self._updates += 1
        self._batch, self._per = sizes
        self._averages.push(*terms)

    @property
    def updates(self) -> int:
        """Windows so far."""
        return self._updates

    def read(self) -> NoiseScale:
        """Returns the estimate after the windows so far."""
        averages, batch = self._averages, self._batch or math.nan
        tr_sigma, grad_sq = averages.mean_x, averages.mean_y
        # The mean of tr(Sigma) is below 0 by rounding only, where there is no noise.
        b_simple = over(max(tr_sigma, 0.0), grad_sq) if grad_sq > 0 else math.nan
        significance = over(grad_sq, averages.error_y)
        reason = _reason(self._updates, significance, b_simple, batch)
        micro_batches = b_simple / (self._per or math.nan)
        return NoiseScale(
            b_simple=b_simple,
            tr_sigma=tr_sigma,
            grad_sq=grad_sq,
            stderr=averages.error_ratio() if grad_sq > 0 else math.nan,
            valid=not reason,
            updates=self._updates,
            suggested_micro_batches=None if reason else _nearest_power(micro_batches),
            reason=reason,
            micro_batches=micro_batches,
            significance=significance,
            batch=batch,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain finite numbers; ``beta`` is not among them."""
        sizes = {"batch": self._batch, "per_micro_batch": self._per}
        return {"updates": self._updates, **sizes, **self._averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, and goes on bit for bit as it would have."""
        self._updates = int(state["updates"])
        self._batch, self._per = float(state["batch"]), float(state["per_micro_batch"])
        self._averages.load_state_dict(state)


def _nearest_power(number: float) -> int:
    return 1 << round(math.log2(number)) if 1 < number < math.inf else 1


def _reason(updates: int, significance: float, b_simple: float, batch: float) -> str:
    if updates < MIN_UPDATES:
        return f"{MIN_UPDATES} windows are needed, {updates} were seen"
    if not significance > LEAST_SIGNIFICANCE:
        least = f"{LEAST_SIGNIFICANCE:g} standard errors"
        return f"the noise drowns the gradient: |G|^2 is not above {least}"
    if not b_simple <= MOST_BATCHES * batch:
        return (
            f"b_simple {_short(b_simple)} is above {MOST_BATCHES:g} times the batch of "
            f"{_short(batch)}, beyond what micro-batches of this size can tell"
        )
    return ""


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
