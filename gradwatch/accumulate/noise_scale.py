"""The gradient noise scale: how many examples until a gradient is as much signal as noise.

The micro-batches of a window (:class:`MicroBatch`) are added up, over the ranks too
(:class:`WindowSums`). That gives the squared norm of a small batch beside that of the window, a
large one (:class:`NoiseSample`), and two sizes tell noise from gradient (:func:`noise_terms`).
Averages over many windows (:class:`NoiseScaleEstimator`) give the :class:`NoiseScale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.checks import check_between
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, as_operand, defer, resolve
from gradwatch.pickles import stable_name

MIN_UPDATES = 20
"""Fewer windows give no estimate, and no standard error, worth the name."""

LEAST_SIGNIFICANCE = 2.0
"""How many standard errors above 0 the squared gradient must be."""

MOST_BATCHES = 4.0
"""A noise scale above this many batches is further away than the batches can tell."""

_LARGEST = 1e300  # the difference of two such numbers is still a float


@stable_name
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


class MicroBatch(NamedTuple):
    """One micro-batch of a window.

    Attributes:
        weight: Its weight.
        norm: L2 norm of what it added to the gradients, weighed and scaled as they are; None where
            that is not known.
    """

    weight: FloatOrDeferred
    norm: FloatOrDeferred | None


@dataclass(frozen=True, slots=True)
class WindowSums:
    """What adds up over the micro-batches of a window, and over the ranks.

    Attributes:
        weight: Sum of the weights.
        count: Micro-batches whose weight is not zero.
        spread: Sum of the squared norms, each over its weight; NaN where one is not known.
        loss: Sum of the losses, each times its weight.
    """

    weight: FloatOrDeferred
    count: FloatOrDeferred
    spread: FloatOrDeferred
    loss: FloatOrDeferred

    @classmethod
    def of(
        cls,
        micro_batches: Sequence[MicroBatch],
        losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]],
    ) -> WindowSums:
        """Adds up the micro-batches of this rank, and their losses times weights."""
        weights = [as_operand(one.weight) for one in micro_batches]
        return cls(
            weight=defer(sum(weights)),
            count=defer(sum(weight > 0 for weight in weights)),
            spread=defer(sum(map(_spread, micro_batches))),
            loss=defer(sum(as_operand(loss) * as_operand(weight) for loss, weight in losses)),
        )

    def over_ranks(self, sum_: Callable[[Tensor], Tensor], device: torch.device) -> WindowSums:
        """Adds up the sums of all ranks.

        Args:
            sum_: Sums a tensor over the ranks, in place.
            device: Where their process group works.
        """
        parts = map(as_operand, (self.weight, self.count, self.spread, self.loss))
        # One all-reduce for all four. NaN, the mark of an unknown norm, reaches every rank with it.
        payload = [torch.as_tensor(part, dtype=torch.float64).to(device) for part in parts]
        return WindowSums(*map(defer, sum_(torch.stack(payload)).unbind()))


def _spread(one: MicroBatch) -> float | Tensor:
    if one.norm is None:
        return math.nan
    norm, weight = as_operand(one.norm), as_operand(one.weight)
    # In float32 the square of a norm above 1.8e19 is infinite.
    squared = norm.double() ** 2 if isinstance(norm, Tensor) else norm**2
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, squared / weight, 0.0)
    return squared / weight if weight > 0 else 0.0


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """The gradient of a small batch beside that of a large one.

    Attributes:
        small_sq: Squared norm of the mean gradient of the small one, in the unit of the loss scale.
        small: Its size: a sum of weights.
        large: The size of the large one, which is the whole window.
        scale: The loss scale that ``small_sq`` carries twice.
        per_micro_batch: What one more micro-batch on every rank adds to ``large``.
        micro_batches: How many a window has, where that is another number than this one had.
    """

    small_sq: FloatOrDeferred
    small: FloatOrDeferred
    large: FloatOrDeferred
    scale: FloatOrDeferred
    per_micro_batch: FloatOrDeferred
    micro_batches: int | None = None

    def deferred(self) -> list[Deferred]:
        """Lists what must be read before the numbers can be."""
        numbers = (self.small_sq, self.small, self.large, self.scale, self.per_micro_batch)
        return [one for one in numbers if isinstance(one, Deferred)]


def sample_of_all(
    sums: WindowSums, divisor: FloatOrDeferred, scale: FloatOrDeferred, batches: int
) -> NoiseSample | None:
    """Makes a sample of the norms of all micro-batches.

    For micro-batches of unequal weight :math:`w_i` the mean of their squared norms is weighed by
    :math:`w_i / W`, and their size is :math:`W / k`: then the estimates of
    :func:`~gradwatch.accumulate.noise_scale.noise_terms` have no bias.

    Args:
        sums: Over all micro-batches, of all ranks.
        divisor: What each loss was divided by, after it was multiplied with its weight.
        scale: The loss scale.
        batches: What the window counts as, in the unit of ``watch(accumulate=)``.

    Returns:
        The sample; None where a norm is not known, or nothing weighs anything.
    """
    # Where the sums are still on a device nobody looks; the estimator leaves such windows out.
    if isinstance(sums.spread, float) and math.isnan(sums.spread):
        return None
    weight, count, each = as_operand(sums.weight), as_operand(sums.count), as_operand(divisor)
    if isinstance(weight, float) and weight == 0.0:
        return None
    return NoiseSample(
        # In this order nothing overflows unless the result does.
        small_sq=defer(each * (each * as_operand(sums.spread) / weight)),
        small=defer(weight / count),
        large=sums.weight,
        scale=scale,
        per_micro_batch=defer(weight / batches),
    )


def sample_of_first(
    micro_batches: Sequence[MicroBatch], divisor: FloatOrDeferred, scale: FloatOrDeferred
) -> NoiseSample | None:
    """Makes a sample of the norm of the first micro-batch, where only that is known.

    Returns:
        The sample; None where that norm is not known either.
    """
    # The first needs no hook to be known alone: until the second one comes, it is all of .grad.
    first = micro_batches[0]
    weight, small = sum(as_operand(one.weight) for one in micro_batches), as_operand(first.weight)
    if first.norm is None or (isinstance(small, float) and small == 0.0):
        return None
    mean = as_operand(divisor) * as_operand(first.norm) / small
    return NoiseSample(
        small_sq=defer(mean * mean),
        small=first.weight,
        large=defer(weight),
        scale=scale,
        per_micro_batch=defer(weight / len(micro_batches)),
    )


def sample_of_rank(
    own_norm: Tensor, weight: FloatOrDeferred, ranks: int, scale: FloatOrDeferred, batches: int
) -> NoiseSample:
    """Makes a sample of this rank's own gradient, before it became the mean over the ranks.

    Args:
        own_norm: Norm of the whole window on this rank: tensor ``[]``.
        weight: Weight of the window on this rank, taken to be the same on every other.
        ranks: How many there are.
        scale: The loss scale.
        batches: As for :func:`sample_of_all`.
    """
    # A loop that is only watched gets no collective of ours: the other ranks' weights are unknown.
    large = as_operand(weight) * ranks
    return NoiseSample(
        small_sq=defer(own_norm.double().square()),
        small=weight,
        large=defer(large),
        scale=scale,
        per_micro_batch=defer(large / batches),
    )


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


@stable_name
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

    __slots__ = ("_averages", "_batch", "_per_micro_batch", "updates")

    def __init__(self, beta: float = 0.99) -> None:
        advice = "Write 0.99 for averages over about 200 windows."
        check_between("NoiseScaleEstimator(beta=)", beta, 0.0, 1.0, advice)
        self._averages = PairAverage(beta)
        self._batch = self._per_micro_batch = 0.0
        self.updates = 0
        """Windows so far."""

    def add(self, sample: NoiseSample, norm_sq: float) -> None:
        """Adds what the micro-batches of a window tell; its numbers must have arrived.

        Args:
            sample: The gradient of a small batch.
            norm_sq: Squared norm of that of the whole window, in true units.
        """
        small, large, each = map(resolve, (sample.small, sample.large, sample.per_micro_batch))
        if 0 < small < large:  # else a single micro-batch weighs something
            small_sq = resolve(sample.small_sq) / resolve(sample.scale) ** 2
            full = sample.micro_batches
            batch = large if full is None else each * full
            self.update(*noise_terms(small_sq, small, norm_sq, large), batch, each)

    def update(self, tr_sigma: float, grad_sq: float, batch: float, per_micro_batch: float) -> None:
        """Adds a window; one with a number that is not finite, or without a size, is ignored.

        Args:
            tr_sigma: As of :func:`noise_terms`, like ``grad_sq``.
            grad_sq: Any sign; its scale does not matter.
            batch: The weight of the window over all ranks.
            per_micro_batch: The weight that one more micro-batch on every rank adds to it.
        """
        sizes, terms = (batch, per_micro_batch), (tr_sigma, grad_sq)
        sized = all(0 < size < math.inf for size in sizes)
        if sized and all(abs(term) <= _LARGEST for term in terms):
            self.updates += 1
            self._batch, self._per_micro_batch = sizes
            self._averages.push(*terms)

    def read(self) -> NoiseScale:
        """Returns the estimate after the windows so far."""
        averages, batch = self._averages, self._batch or math.nan
        tr_sigma, grad_sq = averages.mean_x, averages.mean_y
        # The mean of tr(Sigma) is below 0 by rounding only, where there is no noise.
        b_simple = over(max(tr_sigma, 0.0), grad_sq) if grad_sq > 0 else math.nan
        significance = over(grad_sq, averages.error_y)
        reason = _reason(self.updates, significance, b_simple, batch)
        micro_batches = b_simple / (self._per_micro_batch or math.nan)
        return NoiseScale(
            b_simple=b_simple,
            tr_sigma=tr_sigma,
            grad_sq=grad_sq,
            stderr=averages.error_ratio() if grad_sq > 0 else math.nan,
            valid=not reason,
            updates=self.updates,
            suggested_micro_batches=None if reason else _nearest_power(micro_batches),
            reason=reason,
            micro_batches=micro_batches,
            significance=significance,
            batch=batch,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain finite numbers; ``beta`` is not among them."""
        sizes = {"batch": self._batch, "per_micro_batch": self._per_micro_batch}
        return {"updates": self.updates, **sizes, **self._averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, and goes on bit for bit as it would have."""
        self.updates = int(state["updates"])
        self._batch = float(state["batch"])
        self._per_micro_batch = float(state["per_micro_batch"])
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


_Root = tuple[float, float, float]


class PairAverage:
    """Bias-corrected exponential moving averages of pairs, with their standard errors.

    The errors take the pairs for independent. No scale is too large or too small: variances are
    kept by a root of their matrix, so nothing is ever squared.

    Args:
        beta: How much of the averages stays at each pair, between 0 and 1.
    """

    __slots__ = ("_beta", "_count", "_root", "_share", "mean_x", "mean_y")

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._count = 0.0  # 1 + beta + beta^2 + ...
        self._share = 0.0  # the sum of the squared weights: 1 / effective number of samples
        self._root = (0.0, 0.0, 0.0)
        self.mean_x = self.mean_y = math.nan
        """The averages; NaN before the first pair."""

    def push(self, x: float, y: float) -> None:
        """Adds a pair of finite numbers."""
        if not self._count:
            self.mean_x, self.mean_y = x, y
        self._count = 1.0 + self._beta * self._count
        new = 1.0 / self._count
        self._share = (1.0 - new) ** 2 * self._share + new**2
        far_x, far_y = x - self.mean_x, y - self.mean_y
        self._root = _rotated(self._root, far_x, far_y, new)
        self.mean_x, self.mean_y = self.mean_x + new * far_x, self.mean_y + new * far_y

    @property
    def error_y(self) -> float:
        """Standard error of the average of y; NaN before the second pair."""
        return self._error(math.hypot(*self._root[1:]))

    def error_ratio(self) -> float:
        """Returns the standard error of the ratio of the averages, by the delta method."""
        a, b, c = self._root
        ratio = over(self.mean_x, self.mean_y)
        # The root times the gradient of the ratio, (1, -ratio): as long as the ratio's deviation.
        return over(self._error(math.hypot(a - ratio * b, ratio * c)), abs(self.mean_y))

    def _error(self, deviation: float) -> float:
        # n_eff / (n_eff - 1) for the variance, 1 / n_eff for the mean.
        share = self._share
        return math.sqrt(share / (1.0 - share)) * deviation if self._count > 1 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Returns plain finite numbers; ``beta`` is not among them."""
        # NaN is no JSON: before the first pair there are no means.
        return {
            "count": self._count,
            "share": self._share,
            "root": list(self._root),
            "means": [self.mean_x, self.mean_y] if self._count else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._count, self._share = float(state["count"]), float(state["share"])
        a, b, c = map(float, state["root"])
        self._root = (a, b, c)
        self.mean_x, self.mean_y = map(float, state["means"] or (math.nan, math.nan))


def _rotated(root: _Root, x: float, y: float, new: float) -> _Root:
    """Adds a sample of weight ``new`` to the root of a 2 x 2 covariance.

    The root is the triangle ``R = [[a, b], [0, c]]`` with ``R.T @ R`` the covariance. A row is
    added by a rotation, so no variance turns negative by rounding.
    """
    a, b, c = root
    x, y = math.sqrt(new) * x, math.sqrt(new) * y
    longer = math.hypot(a, x)
    cos, sin = (a / longer, x / longer) if longer else (1.0, 0.0)
    keep = math.sqrt(1.0 - new)
    return keep * longer, keep * (cos * b + sin * y), keep * math.hypot(c, cos * y - sin * b)


def over(number: float, divisor: float) -> float:
    """Divides as IEEE 754 and torch do: by 0 it gives an infinity, or NaN for 0 / 0."""
    return number / divisor if divisor else number * math.inf
