"""The gradient noise scale: the batch size at which a gradient is as much signal as noise.

The micro-batches of a window (:class:`MicroBatch`) are summed, also over the ranks
(:class:`WindowSums`). This gives the squared gradient norm of a small batch and that of the whole
window, a large batch (:class:`NoiseSample`). Two batch sizes are enough to separate the noise from
the gradient (:func:`noise_terms`). Averages over many windows (:class:`NoiseScaleEstimator`) give
the :class:`NoiseScale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradwatch.checks import check_between
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, as_operand, defer, resolve
from gradwatch.measure.devices import as_exact, exact_dtype, sent
from gradwatch.measure.gathering import added
from gradwatch.pickles import stable_name

MIN_UPDATES = 20
"""The fewest windows for an estimate and its standard error to mean anything."""

LEAST_SIGNIFICANCE = 3.0
"""How many standard errors above 0 the squared gradient must be.

With 2, one reading in 15 passes where the scale is far above the batch: those that are far too low.
"""

MOST_BATCHES = 4.0
"""A noise scale above this many batches is too far away to be measured with such batches."""

NOT_COMPARABLE = -math.inf
"""Stands for the spread of a window whose backwards are not micro-batches of one loss.

In a sum over ranks it reaches every rank.
"""

DIFFERENT = "the backwards of a step, at least on one rank, are not micro-batches of one loss"

_RECENT = 0.9  # averages over about 20 windows, to tell whether anything has changed
_CHANGED = 3.0  # standard errors by which these must differ from the averages over all
_QUANTILE = 2.2  # of the normal distribution: for 97 %, as what is averaged is skewed

_LARGEST = 1e300  # the difference of two such numbers is still a float


@stable_name
@dataclass(frozen=True, slots=True)
class NoiseScale:
    """An estimate of the simple noise scale tr(Sigma) / |G|^2, and whether to believe it.

    Batch sizes and tr(Sigma) are in the unit of the weights given to ``watcher.backward(weight=)``:
    examples or tokens, or micro-batches if no weights were given. Unknown values are NaN.

    Attributes:
        b_simple: The noise scale: the batch size at which the noise is as large as the gradient.
        tr_sigma: tr(Sigma), the variance of the gradient of one unit, summed over all elements.
        grad_sq: |G|^2, the squared norm of the gradient without its noise; may be negative.
        stderr: Standard error of ``b_simple``, by the delta method.
        valid: Whether the estimate can be trusted; if so, ``reason`` is empty.
        updates: The number of windows that went into the estimate.
        suggested_micro_batches: The power of two nearest to ``micro_batches``, at least 1; None
            if the estimate is not valid.
        reason: Why the estimate is not valid: too few windows, a gradient that does not stand out
            from the noise, or a ``b_simple`` above four times the batch. Empty if it is valid.
        micro_batches: ``b_simple`` as a number of micro-batches per step, not rounded.
        significance: How many standard errors ``grad_sq`` is above 0.
        batch: The size of the last window, over all ranks.
        low: The lower end of an interval that holds the noise scale in about 95 % of runs; NaN
            before 20 windows.
        high: Its upper end; infinite if the windows do not tell how large the noise scale is, only
            that it is at least ``low``.
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
    # Follow from the rest; NaN at first, which equals nothing, not even itself on another rank.
    low: float = field(default=math.nan, repr=False, compare=False)
    high: float = field(default=math.nan, repr=False, compare=False)

    @property
    def out_of_range(self) -> bool:
        """Whether ``b_simple`` is above four times the batch, too large to be measured with it."""
        return self.b_simple > MOST_BATCHES * self.batch

    def __float__(self) -> float:
        return self.b_simple

    def __str__(self) -> str:
        if self.valid:
            between = f" ({_short(self.low)} to {_short(self.high)})" if self.low >= 0 else ""
            return f"{_short(self.b_simple)}{between}"
        least = f"at least {_short(self.low)}" if self.low > 0 else "unknown"
        reason = self.reason.removesuffix(_at_least(self.low))
        return f"{least} ({reason})" if reason else least

    def __setstate__(self, state: list[float]) -> None:
        # In pickles of earlier versions the last fields are missing.
        names = [one.name for one in fields(self)]
        values = [*state, *[math.nan] * (len(names) - len(state))]
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)


class MicroBatch(NamedTuple):
    """One micro-batch of a window.

    Attributes:
        weight: Its weight in the mean over the window: examples, tokens, or 1.
        norm: L2 norm of what it added to the gradients, with the same weights and loss scale as
            these; None if unknown.
    """

    weight: FloatOrDeferred
    norm: FloatOrDeferred | None


@dataclass(frozen=True, slots=True)
class OnHost:
    """A number that the host computes from others, once these have arrived.

    A square is safe in float64, the only floating-point type of the host. Not every device has it,
    and in float32 the square of a norm above 1.8e19 is infinite.

    Attributes:
        formula: Computes it; a function of a module, so that it can be pickled.
        parts: What it is given, some of it still on a device.
    """

    formula: Callable[..., float]
    parts: tuple[HostNumber, ...]

    def value(self) -> float:
        """Returns the number; waits for what has not arrived."""
        return self.formula(*map(_known, self.parts))

    def deferred(self) -> list[Deferred]:
        """Lists the numbers that may still be on a device."""
        return [one for part in self.parts for one in _deferred(part)]


HostNumber: TypeAlias = float | Deferred | OnHost


def _on_host(formula: Callable[..., float], *parts: HostNumber) -> float | OnHost:
    """Computes a number of others: at once if all of them are on the host."""
    later = OnHost(formula, parts)
    return later if any(isinstance(one, (Deferred, OnHost)) for one in parts) else later.value()


def _known(number: HostNumber) -> float:
    return number.value() if isinstance(number, (Deferred, OnHost)) else number


def _deferred(number: HostNumber) -> list[Deferred]:
    if isinstance(number, OnHost):
        return number.deferred()
    return [number] if isinstance(number, Deferred) else []


@dataclass(frozen=True, slots=True)
class WindowSums:
    """Sums over the micro-batches of a window, and over the ranks.

    Attributes:
        weight: Sum of the weights.
        count: Number of micro-batches whose weight is not zero.
        spread: Sum of the squared norms, each divided by its weight; NaN if one is unknown.
        loss: Sum of the losses, each times its weight; NaN where nobody needs it.
    """

    weight: FloatOrDeferred
    count: HostNumber
    spread: HostNumber
    loss: FloatOrDeferred = math.nan

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch], comparable: bool = True) -> WindowSums:
        """Sums the micro-batches of this rank; ``comparable`` says whether they can be compared."""
        weights = [one.weight for one in micro_batches]
        norms = [one.norm for one in micro_batches if one.norm is not None]
        spread: HostNumber = NOT_COMPARABLE
        if comparable:
            # Known on the host, whatever is still on a device: a late NaN would say nothing.
            known = len(norms) == len(weights)
            spread = _on_host(_spread_of, *norms, *weights) if known else math.nan
        return cls(defer(added(weights)), _on_host(_count_of, *weights), spread)

    @classmethod
    def over_ranks(
        cls,
        micro_batches: Sequence[MicroBatch],
        losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]],
        sum_: Callable[[Tensor], Tensor],
        device: torch.device,
        comparable: bool = True,
    ) -> WindowSums:
        """Sums the micro-batches of all ranks, and their losses.

        Args:
            micro_batches: Those of this rank.
            losses: Pairs of loss and weight on this rank.
            sum_: Sums a tensor over the ranks, in place, and returns it.
            device: A device that the process group can communicate from.
            comparable: Whether the micro-batches of this rank can be compared.
        """
        weights = [_there(one.weight, device) for one in micro_batches]
        norms = [_there(one.norm, device) for one in micro_batches if one.norm is not None]
        known = len(norms) == len(weights)
        # Both marks reach every rank in the sum.
        spread: float | Tensor = NOT_COMPARABLE
        if comparable:
            spread = sum(map(_spread, norms, weights)) if known else math.nan
        parts = (
            sum(weights),
            sum(weight > 0 for weight in weights),
            spread,
            sum(_there(loss, device) * _there(weight, device) for loss, weight in losses),
        )
        # One all-reduce for all four.
        weight, count, total, loss = map(defer, sum_(_row(parts, device)).unbind())
        return cls(weight, count, total if known or not comparable else math.nan, loss)


def _there(number: FloatOrDeferred, device: torch.device) -> Any:
    """Returns a number to calculate with on a device: a float, or a tensor of its best dtype."""
    operand = as_operand(number)
    return as_exact(operand, device) if isinstance(operand, Tensor) else operand


def _row(parts: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Returns numbers as a tensor ``[n]`` on a device, without a wait."""
    if any(isinstance(part, Tensor) for part in parts):
        return torch.stack([as_exact(part, device) for part in parts])
    return sent(torch.tensor(parts, dtype=exact_dtype(device), device="cpu"), device)


def _spread(norm: Any, weight: Any) -> Any:
    """Returns a squared norm divided by its weight: a float, or a tensor ``[]``."""
    squared = norm * norm
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, squared / weight, 0.0)
    return squared / weight if weight > 0 else 0.0


def _spread_of(*numbers: float) -> float:
    """Returns the spread of micro-batches, given first their norms and then their weights."""
    half = len(numbers) // 2
    return sum(map(_spread, numbers[:half], numbers[half:]), 0.0)


def _count_of(*weights: float) -> float:
    return float(sum(weight > 0 for weight in weights))


def _sum_of(*numbers: float) -> float:
    return sum(numbers, 0.0)


def _scaled_spread(spread: float, divisor: float, weight: float) -> float:
    # Multiplied in this order, no intermediate result overflows unless the result does.
    return divisor * over(divisor * spread, weight)


def _squared(norm: float, divisor: float, weight: float) -> float:
    mean = over(divisor * norm, weight)
    return mean * mean


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """What one window tells about the noise: the gradient of a small batch, and both batch sizes.

    Sizes are sums of weights. The large batch is the whole window; its norm is not kept here.

    Attributes:
        small_sq: Squared norm of the mean gradient of the small batch, still multiplied by the
            square of the loss scale.
        small: The size of the small batch.
        large: The size of the large batch.
        scale: The loss scale.
        per_micro_batch: What one more micro-batch on every rank adds to ``large``.
        micro_batches: The number of batches in a full window, in the unit of
            ``watch(accumulate=)``; None if it is not known, and this window counts as full.
    """

    small_sq: HostNumber
    small: HostNumber
    large: HostNumber
    scale: FloatOrDeferred
    per_micro_batch: HostNumber
    micro_batches: int | None = None

    def deferred(self) -> list[Deferred]:
        """Lists the numbers that may still be on a device."""
        numbers = (self.small_sq, self.small, self.large, self.scale, self.per_micro_batch)
        found = (one for number in numbers for one in _deferred(number))
        return list(dict.fromkeys(found))  # some are parts of several of these


def sample_of_all(
    sums: WindowSums, divisor: FloatOrDeferred, scale: FloatOrDeferred, batches: int
) -> NoiseSample | None:
    """Makes a sample from the norms of all micro-batches.

    For :math:`k` micro-batches of unequal weight :math:`w_i` with the sum :math:`W`, the mean of
    the squared norms is weighted by :math:`w_i / W` and the small batch has the size
    :math:`W / k`. Then the estimates of :func:`noise_terms` are unbiased.

    Args:
        sums: Sums over all micro-batches of all ranks.
        divisor: What each loss was divided by, after it was multiplied by its weight.
        scale: The loss scale by which the norms are multiplied.
        batches: The number of batches in the window, in the unit of ``watch(accumulate=)``.

    Returns:
        The sample; None if a norm is unknown, or if all weights are zero.
    """
    # What is still on a device is not checked here. The estimator ignores such windows once the
    # numbers have arrived.
    if isinstance(sums.spread, float) and math.isnan(sums.spread):
        return None
    if sums.weight == 0.0:
        return None
    return NoiseSample(
        small_sq=_on_host(_scaled_spread, sums.spread, divisor, sums.weight),
        small=_on_host(over, sums.weight, sums.count),
        large=sums.weight,
        scale=scale,
        per_micro_batch=_on_host(over, sums.weight, float(batches)),
    )


def sample_of_first(
    micro_batches: Sequence[MicroBatch], divisor: FloatOrDeferred, scale: FloatOrDeferred
) -> NoiseSample | None:
    """Makes a sample from the norm of the first micro-batch, if only that is known.

    Returns:
        The sample; None if that norm is unknown too, or if the weight is zero.
    """
    # The first micro-batch needs no hook: until the second one comes, it is all of .grad.
    first = micro_batches[0]
    if first.norm is None or first.weight == 0.0:
        return None
    large = _on_host(_sum_of, *(one.weight for one in micro_batches))
    return NoiseSample(
        small_sq=_on_host(_squared, first.norm, divisor, first.weight),
        small=first.weight,
        large=large,
        scale=scale,
        per_micro_batch=_on_host(over, large, float(len(micro_batches))),
    )


def sample_of_rank(
    own_norm: FloatOrDeferred,
    weight: FloatOrDeferred,
    ranks: int,
    scale: FloatOrDeferred,
    batches: int,
) -> NoiseSample:
    """Makes a sample from this rank's own gradient, before it was averaged over the ranks.

    Args:
        own_norm: Norm of the whole window on this rank.
        weight: Weight of the window on this rank; assumed to be the same on all ranks.
        ranks: The number of ranks.
        scale: The loss scale by which ``own_norm`` is multiplied.
        batches: As for :func:`sample_of_all`.
    """
    # Assumed, as gradwatch adds no collective to a loop that it only watches.
    large = _on_host(_sum_of, *[weight] * ranks)
    return NoiseSample(
        small_sq=_on_host(_squared, own_norm, 1.0, 1.0),
        small=weight,
        large=large,
        scale=scale,
        per_micro_batch=_on_host(over, large, float(batches)),
    )


def noise_terms(small_sq: float, small: float, big_sq: float, big: float) -> tuple[float, float]:
    r"""Separates noise and gradient, given the squared gradient norm at two batch sizes.

    The squared norm of the mean gradient over :math:`b` examples is on average
    :math:`|G|^2 + \mathrm{tr}(\Sigma)/b`, so two sizes give two equations:

    .. math::
        \mathrm{tr}(\Sigma) \approx \frac{q - Q}{1/b - 1/B} \qquad
        |G|^2 \approx \frac{BQ - bq}{B - b}

    Both estimates are unbiased. For k micro-batches, pass the weighted mean of their squared norms,
    :math:`q = \sum_i (w_i/W) |g_i|^2`, and :math:`b = W/k`, even if their sizes differ: the noise
    of micro-batch i is :math:`\mathrm{tr}(\Sigma)/w_i`, and the weights :math:`w_i/W` turn the sum
    into :math:`\mathrm{tr}(\Sigma)\, k/W`. The plain mean would need the harmonic mean of the sizes
    instead, and varies more.

    Args:
        small_sq: q, the squared norm of a small batch's mean gradient, or the mean over several
            small batches.
        small: b, the size of the small batch in examples or tokens; positive.
        big_sq: Q, the squared norm of the big batch's mean gradient.
        big: B, the size of the big batch in the same unit; above ``small``.

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
    """Estimates the noise scale from many windows.

    The estimate is the ratio of two bias-corrected exponential moving averages, of tr(Sigma) and of
    |G|^2. An average of the ratios would be off by tens of percent, because |G|^2 is sometimes near
    or below 0. The standard errors assume that the windows are independent.

    Args:
        beta: The weight of the old averages at each window, between 0 and 1. With 0.99 they span
            about 200 windows, and follow a growing noise scale with a delay of 100 windows.

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

    __slots__ = (
        *("_averages", "_batch", "_beta", "_per_micro_batch", "_recent", "_refused"),
        "updates",
    )

    def __init__(self, beta: float = 0.99) -> None:
        advice = "Write 0.99 for averages over about 200 windows."
        check_between("NoiseScaleEstimator(beta=)", beta, 0.0, 1.0, advice)
        self._beta = beta
        self._refused = False
        self._clear()

    def _clear(self) -> None:
        self._averages = PairAverage(self._beta)
        self._recent = PairAverage(min(self._beta, _RECENT))
        self._batch = self._per_micro_batch = 0.0
        self.updates = 0
        """The number of windows so far."""

    def add(self, sample: NoiseSample, norm_sq: float) -> None:
        """Adds a window; waits for numbers that have not arrived from the device.

        A window that is :data:`NOT_COMPARABLE` throws away what was estimated before: the windows
        so far came from the same loop, and may not have been comparable either.

        Args:
            sample: What its micro-batches tell.
            norm_sq: Squared norm of the window's mean gradient, in true units.
        """
        small, large, each = map(_known, (sample.small, sample.large, sample.per_micro_batch))
        small_sq = _known(sample.small_sq)
        if small_sq == NOT_COMPARABLE:
            self._clear()
            self._refused = True
        elif 0 < small < large:  # false if only one micro-batch has a weight
            small_sq /= resolve(sample.scale) ** 2
            full = sample.micro_batches
            batch = large if full is None else each * full
            self.update(*noise_terms(small_sq, small, norm_sq, large), batch, each)

    def update(self, tr_sigma: float, grad_sq: float, batch: float, per_micro_batch: float) -> None:
        """Adds a window; it is ignored if a number is not finite, or a size is not positive.

        Args:
            tr_sigma: tr(Sigma) of :func:`noise_terms`.
            grad_sq: |G|^2 of :func:`noise_terms`; may be negative.
            batch: The weight of the window over all ranks.
            per_micro_batch: The weight that one more micro-batch on every rank adds to it.
        """
        sizes, terms = (batch, per_micro_batch), (tr_sigma, grad_sq)
        sized = all(0 < size < math.inf for size in sizes)
        if sized and all(abs(term) <= _LARGEST for term in terms):
            self.updates, self._refused = self.updates + 1, False
            self._batch, self._per_micro_batch = sizes
            self._averages.push(*terms)
            self._recent.push(*terms)

    def read(self) -> NoiseScale:
        """Returns the estimate after the windows so far."""
        averages, batch = self._averages, self._batch or math.nan
        tr_sigma, grad_sq = averages.mean_x, averages.mean_y
        # Without noise, rounding can make the mean of tr(Sigma) slightly negative.
        b_simple = over(max(tr_sigma, 0.0), grad_sq) if grad_sq > 0 else math.nan
        significance = over(grad_sq, averages.error_y)
        low, high = self._interval()
        reason = _reason(self.updates, significance, b_simple, batch, low)
        if self._refused:
            reason = DIFFERENT
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
            low=low,
            high=high,
        )

    def _interval(self) -> tuple[float, float]:
        """Returns the interval of the ratio; a wider one if it has changed over the windows."""
        if self.updates < MIN_UPDATES:
            return math.nan, math.nan
        low, high = self._averages.interval_of_ratio()
        if self._recent.differs_from(self._averages):
            recent = self._recent.interval_of_ratio()
            return min(low, recent[0]), max(high, recent[1])
        return low, high

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain finite numbers; ``beta`` is not among them."""
        sizes = {"batch": self._batch, "per_micro_batch": self._per_micro_batch}
        recent = {"recent": self._recent.state_dict()}
        return {"updates": self.updates, **sizes, **self._averages.state_dict(), **recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned, so that estimates go on exactly."""
        self.updates = int(state["updates"])
        self._batch = float(state["batch"])
        self._per_micro_batch = float(state["per_micro_batch"])
        self._averages.load_state_dict(state)
        # Earlier versions did not have it.
        self._recent.load_state_dict(state.get("recent", PairAverage(0.5).state_dict()))


def _nearest_power(number: float) -> int:
    return 1 << round(math.log2(number)) if 1 < number < math.inf else 1


def _reason(updates: int, significance: float, b_simple: float, batch: float, low: float) -> str:
    if updates < MIN_UPDATES:
        return f"{MIN_UPDATES} windows are needed, {updates} were seen"
    if not significance > LEAST_SIGNIFICANCE:
        least = f"{LEAST_SIGNIFICANCE:g} standard errors"
        return f"the noise drowns the gradient: |G|^2 is not above {least}{_at_least(low)}"
    if not b_simple <= MOST_BATCHES * batch:
        return (
            f"b_simple {_short(b_simple)} is above {MOST_BATCHES:g} times the batch of "
            f"{_short(batch)}, beyond what micro-batches of this size can tell{_at_least(low)}"
        )
    return ""


def _at_least(low: float) -> str:
    return f"; the noise scale is at least {_short(low)}" if 0 < low < math.inf else ""


def _short(number: float) -> str:
    """Writes a number with three digits or more."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


_Root = tuple[float, float, float]


class PairAverage:
    """Bias-corrected exponential moving averages of pairs, with their standard errors.

    The standard errors assume that the pairs are independent. The covariance matrix is kept as a
    matrix root, so that nothing is squared and numbers of any scale are safe.

    Args:
        beta: The weight of the old averages at each new pair, between 0 and 1.
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
        """Adds a pair of numbers, which must be finite."""
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
        # Delta method: the deviation of the ratio is the length of the root matrix times the
        # gradient of the ratio, (1, -ratio) / mean_y.
        return over(self._error(math.hypot(a - ratio * b, ratio * c)), abs(self.mean_y))

    def interval_of_ratio(self) -> tuple[float, float]:
        """Returns the ends of an interval that holds the ratio x / y in at least 95 % of cases.

        x is a variance and y a squared length, so both are at least 0 in truth, and so is the
        ratio. The interval holds each ratio r for which the average of x - r y is not significantly
        different from 0. Its upper end is infinite if y may be 0.

        References:
            Fieller: Some Problems in Interval Estimation. Journal of the Royal Statistical Society
            B 16, 1954.
        """
        quantile = _student(1.0 / self._share - 1.0) if self._count > 1 else math.inf
        if not math.isfinite(quantile):
            return 0.0, math.inf
        # In units of x and y in which no square overflows.
        a, b, c = (quantile * self._error(one) for one in self._root)
        unit_x = max(abs(self.mean_x), abs(a)) or 1.0
        unit_y = max(abs(self.mean_y), abs(b), abs(c)) or 1.0
        x, a = self.mean_x / unit_x, a / unit_x
        y, b, c = self.mean_y / unit_y, b / unit_y, c / unit_y
        # (x - r y)^2 <= a^2 - 2 r a b + r^2 (b^2 + c^2), as a quadratic in r.
        quadratic, linear, constant = y * y - b * b - c * c, x * y - a * b, x * x - a * a
        root = math.sqrt(max(linear * linear - quadratic * constant, 0.0))
        unit = over(unit_x, unit_y)
        bounded = quadratic > 0 and y > 0
        high = max(linear + root, 0.0) / quadratic if bounded else math.inf
        if constant <= 0 or x <= 0:
            low = 0.0
        elif linear + root > 0:
            low = constant / (linear + root)
        else:  # y is significantly below 0: what it would tell if it were 0
            low = over(x - abs(a), math.hypot(b, c))
        return low * unit, high * unit

    def differs_from(self, other: PairAverage) -> bool:
        """Returns whether an average of x or y is significantly different from another one."""
        apart = abs(self.mean_x - other.mean_x), abs(self.mean_y - other.mean_y)
        errors = self._error(abs(self._root[0])), self.error_y
        return any(far > _CHANGED * error for far, error in zip(apart, errors, strict=True))

    def _error(self, deviation: float) -> float:
        # n_eff / (n_eff - 1) for the variance, 1 / n_eff for the mean.
        share = self._share
        return math.sqrt(share / (1.0 - share)) * deviation if self._count > 1 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Returns plain finite numbers; ``beta`` is not among them."""
        # JSON has no NaN, so before the first pair the list of means is empty.
        return {
            "count": self._count,
            "share": self._share,
            "root": list(self._root),
            "means": [self.mean_x, self.mean_y] if self._count else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self._count, self._share = float(state["count"]), float(state["share"])
        a, b, c = map(float, state["root"])
        self._root = (a, b, c)
        self.mean_x, self.mean_y = map(float, state["means"] or (math.nan, math.nan))


def _rotated(root: _Root, x: float, y: float, new: float) -> _Root:
    """Adds a sample of weight ``new`` to the root of a 2 x 2 covariance.

    The root is the triangular matrix ``R = [[a, b], [0, c]]``, and ``R.T @ R`` is the covariance. A
    row is added by a Givens rotation, so that rounding never makes a variance negative.
    """
    a, b, c = root
    x, y = math.sqrt(new) * x, math.sqrt(new) * y
    longer = math.hypot(a, x)
    cos, sin = (a / longer, x / longer) if longer else (1.0, 0.0)
    keep = math.sqrt(1.0 - new)
    return keep * longer, keep * (cos * b + sin * y), keep * math.hypot(c, cos * y - sin * b)


def _student(freedom: float) -> float:
    """Returns the quantile of Student's distribution; infinite below 2 degrees of freedom.

    The first terms of the Cornish-Fisher expansion, within 1 % from 3 degrees of freedom on.
    """
    if freedom < 2:
        return math.inf
    z = _QUANTILE
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def over(number: float, divisor: float) -> float:
    """Divides as IEEE 754 and torch do: division by 0 gives an infinity, or NaN for 0 / 0."""
    return number / divisor if divisor else number * math.inf
