"""Norms of many gradients in one batched pass, and which gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from gradwatch.measure.deferred import (
    Deferred,
    FloatOrDeferred,
    is_at_hand,
    resolve,
)
from gradwatch.measure.devices import home_of, in_double, in_exact
from gradwatch.measure.gathering import (
    are_alike,
    by_kind,
    gathered,
    joined,
    operand_on,
    selected,
    sorted_by,
)

_layout = attrgetter("layout")
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_UP_TO_FLOAT32 = (*_LOW_PRECISION, torch.float32)


class Measurement(NamedTuple):
    """Norms of some gradients, measured in one batched pass.

    Attributes:
        indices: Index of each gradient's parameter in the parameter table, ascending.
        norms: The norm of each gradient: ``[len(indices)]``.
        total: The norm of all gradients together: ``[]``.
        overflowed: Whether the elements are finite but their float32 norm was not; the norms are
            then in float64. Checked only if the norms can be read without waiting.
    """

    indices: Sequence[int]
    norms: Deferred
    total: Deferred
    overflowed: bool = False

    @property
    def finite(self) -> bool:
        """Whether the total norm is finite."""
        return math.isfinite(self.total.value())

    def nonfinite_indices(self) -> list[int]:
        """Lists the indices whose norm is NaN or Inf."""
        return [self.indices[i] for i in np.flatnonzero(~np.isfinite(self.norms.array())).tolist()]

    def subset(self, indices: Sequence[int], norm_type: float) -> Measurement:
        """Returns the measurement that a pass over a subset of the parameters would have given."""
        wanted = set(indices)
        keep = [i for i, index in enumerate(self.indices) if index in wanted]
        norms, kept = Deferred(selected(self.norms.tensor, keep)), [self.indices[i] for i in keep]
        return Measurement(kept, norms, combined(norms, norm_type), self.overflowed)


def measure(
    indices: Sequence[int],
    gradients: list[Tensor],
    norm_type: float,
    dtype: torch.dtype | None = None,
) -> Measurement:
    """Measures gradients in one batched pass.

    Args:
        indices: Index of each gradient's parameter in the parameter table, ascending.
        gradients: As for :func:`gradient_norms`.
        norm_type: The p of the norm, positive or ``math.inf``.
        dtype: As for :func:`gradient_norms`.

    Returns:
        The norms. Where the powers of finite elements overflow or underflow float32, gradients are
        measured again in float64, so that the recorded norm is true and a clip can still use it. On
        an accelerator this is not done: to detect it would mean waiting for the device.
    """
    norms, summands = _norms(gradients, norm_type, dtype)
    total = total_norm(summands, norm_type)
    if not is_at_hand(total):
        return Measurement(indices, Deferred(norms), Deferred(total))
    value, values = total.item(), norms.numpy()
    each = Deferred(norms, array=values)
    # One comparison in NumPy, which costs no ATen call. A NaN and an Inf are below no bound.
    if (
        np.minimum.reduce(values, initial=math.inf) >= underflow_bound(norm_type)
        and value < math.inf
    ):
        return Measurement(indices, each, Deferred(total, value))
    # The elements are checked only if the norm is not finite: isfinite() is a second pass.
    if math.isfinite(value) or not _all_finite(gradients):
        # A total above the bound keeps its bits, which are those of clip_grad_norm_.
        if mend_underflow_(each, gradients, norm_type) and value < underflow_bound(norm_type):
            return Measurement(indices, each, combined(each, norm_type))
        return Measurement(indices, each, Deferred(total, value))
    norms = wide_norms(gradients, norm_type)
    total = total_norm(norms, norm_type)
    return Measurement(indices, Deferred(norms), Deferred(total), overflowed=True)


@lru_cache
def underflow_bound(norm_type: float) -> float:
    """Returns the norm below which a float32 p-norm may have lost digits; 0 where none is lost.

    A float32 power below 1.2e-38 is rounded to a multiple of 1.4e-45, or to 0: an element of 1e-23
    adds nothing to a 2-norm. Each of n powers is off by at most 7e-46, so their sum, the norm to
    the power p, is right to a float32 digit (6e-8) from 1.2e-38 n on. That is 1e-26 for a parameter
    of 8e11 elements, more than any has. For the 2-norm the bound is 1e-13.
    """
    # The largest magnitude and the sum of magnitudes take no power; for p < 1 a power is larger.
    return 0.0 if norm_type <= 1.0 or math.isinf(norm_type) else 1e-26 ** (1.0 / norm_type)


def mend_underflow_(norms: Deferred, gradients: Sequence[Tensor], norm_type: float) -> bool:
    """Replaces norms that underflow has made too small, in place, by those of float64.

    Nothing is done if the norms cannot be read without waiting.

    Args:
        norms: ``[len(gradients)]``, that nothing else has read yet.
        gradients: The gradients that were measured.
        norm_type: The p of the norm.

    Returns:
        Whether a norm was replaced.
    """
    if not norms.at_hand:
        return False
    values = norms.array()
    tiny = values < underflow_bound(norm_type)
    if not tiny.any():
        return False
    suspects = [i for i in np.flatnonzero(tiny).tolist() if _may_underflow(gradients[i])]
    if not suspects:
        return False
    # Most of them are gradients of zero, such as those of a layer behind a dead ReLU: one batched
    # pass, in which nothing underflows, tells these from the others.
    elements = [_real_values(gradients[i]) for i in suspects]
    largest = gradient_norms(elements, math.inf).cpu().tolist()
    found = [(i, one) for i, one in zip(suspects, largest, strict=True) if one > 0]
    for i, one in found:
        # Divided by the largest element, so that no power underflows float64 either.
        scaled = in_double(gradient_values(gradients[i])) / one
        values[i] = one * torch.linalg.vector_norm(scaled, norm_type).item()
    return bool(found)


def _may_underflow(gradient: Tensor) -> bool:
    # Double precision reaches down to 1e-154; empty gradients are parts of sharded parameters.
    return gradient.numel() > 0 and gradient.dtype not in (torch.float64, torch.complex128)


def _real_values(gradient: Tensor) -> Tensor:
    # The magnitude of a complex number is a square root of squares, which underflow.
    values = gradient_values(gradient)
    return torch.view_as_real(values) if values.is_complex() else values


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient_values(g)).all()) for g in gradients)


def gradient_norms(
    gradients: list[Tensor], norm_type: float = 2.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Computes the p-norm of each gradient; float16 and bfloat16 are accumulated in float32.

    On finite float32 gradients every value is bit for bit the one that
    ``torch.nn.utils.clip_grad_norm_`` combines into its total. There is one batched call for the
    gradients of each device and dtype.

    Args:
        gradients: Any number of tensors: any shapes, devices, real or complex dtypes, dense or
            sparse.
        norm_type: The p of the norm, positive; ``math.inf`` for the largest magnitude.
        dtype: The dtype of all gradients, if it is known to be float16, bfloat16 or float32, and
            all are known to be on one device; this saves a look at each of them. If a gradient has
            another dtype or device after all, the result is still correct.

    Returns:
        Tensor ``[len(gradients)]`` on the device of the gradients, if they are on several on
        :func:`home_of` them: float32, or float64 if a gradient has double precision.
    """
    return _norms(gradients, norm_type, dtype)[0]


def _norms(
    gradients: list[Tensor], norm_type: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Computes norms as :func:`gradient_norms` does.

    Returns:
        The norms, and again in the order in which ``clip_grad_norm_`` adds them up.
    """
    if not gradients:
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        return nothing, nothing
    known = dtype in _UP_TO_FLOAT32
    if known or are_alike(gradients):
        # Requesting float32 changes no bit of a float32 norm. For float64 gradients torch refuses
        # it with an error that is caught below, so a wrong ``dtype`` does no harm.
        accumulator = torch.float32 if known else _accumulator(gradients[0].dtype)
        # Not torch.nn.utils.get_total_norm() (torch 2.6 and later): its norm has the dtype of the
        # gradients, and finite float16 gradients can add up to inf. ``_foreach_norm``, which it
        # calls, accepts a dtype (seen on torch 2.4 to 2.13).
        try:
            norms = torch.stack(torch._foreach_norm(gradients, norm_type, accumulator))
        except (NotImplementedError, RuntimeError):
            # Some are sparse or on another device. Such models are rare, and checking first would
            # cost every step a pass over the list.
            pass
        else:
            return norms, norms
    return _norms_of_groups(gradients, norm_type)


def _norms_of_groups(gradients: Sequence[Tensor], norm_type: float) -> tuple[Tensor, Tensor]:
    """Computes norms with one batched call per device and dtype; returns what :func:`_norms` does.

    Each device stacks its own norms, so that their way to another one is one copy.
    """
    values = gradients
    if set(map(_layout, gradients)) != {torch.strided}:
        values = [gradient_values(gradient) for gradient in gradients]
    groups = by_kind(values)
    if len(groups) > 1 and not any(dtype in _LOW_PRECISION for _, dtype in groups):
        # torch adds up the norms group by group, in an order of its own. Where it rounds the norms
        # of low precision, no order would make the sums equal.
        firsts: list[Tensor | None] = [values[there[0]] for there in groups.values()]
        groups = {kind: groups[kind] for kind in _group_tensors_by_device_and_dtype([firsts])}
    found = [_norms_of_group([values[i] for i in there], norm_type) for there in groups.values()]
    places = [position for there in groups.values() for position in there]
    if not are_alike([norms[0] for norms in found]):
        row = joined([torch.stack(norms) for norms in found], home_of(values))
        return sorted_by(row, places), row
    flat = [norm for norms in found for norm in norms]
    if any(dtype in _LOW_PRECISION for _, dtype in groups):
        norms = torch.stack([one for _, one in sorted(zip(places, flat, strict=True), key=_first)])
        return norms, norms
    row = torch.stack(flat)
    return (row if len(groups) == 1 else sorted_by(row, places)), row


_first = itemgetter(0)


def _norms_of_group(values: list[Tensor], norm_type: float) -> list[Tensor]:
    """Computes the norms ``[]`` of dense tensors on one device and of one dtype."""
    if values[0].dtype.itemsize == 1:  # float8, with which torch hardly calculates
        values = [value.float() for value in values]
    accumulator = _accumulator(values[0].dtype)
    filled = list(filter(Tensor.numel, values))
    found = torch._foreach_norm(filled, norm_type, accumulator) if filled else []
    if len(filled) == len(values):
        return list(found)
    # torch cannot take the max of an empty tensor; its norm is 0.
    zero = torch.zeros((), dtype=torch.float32, device=values[0].device)
    norms = iter(found)
    return [next(norms) if value.numel() else zero for value in values]


def _accumulator(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in _LOW_PRECISION else None


def total_norm(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Combines the p-norms ``[n]`` of parts into the norm of the whole: ``[]``, 0 if ``n`` is 0."""
    if norms.numel() == 0:  # with p = inf torch raises an error for an empty tensor
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def combined(norms: Deferred, norm_type: float) -> Deferred:
    """Combines the p-norms of parts as :func:`total_norm` does, in float64 if they are tiny."""
    total = total_norm(norms.tensor, norm_type)
    if is_at_hand(total) and total.item() < underflow_bound(norm_type):
        parts = norms.array().astype(np.float64)
        largest = float(parts.max(initial=0.0))
        if largest > 0:  # no part is larger than 1 then, and the largest has no power to underflow
            total = total.new_tensor(largest * float(np.linalg.norm(parts / largest, norm_type)))
    return Deferred(total)


def norm_of_norms(norms: Sequence[float], norm_type: float = 2.0) -> float:
    """Combines the p-norms of parts, numbers on the host, into the norm of the whole, in float64.

    A single norm is returned as it is; 0 for none.
    """
    if len(norms) == 1:
        return norms[0]
    if any(map(math.isnan, norms)):  # hypot() and max() may pass over a NaN
        return math.nan
    if norm_type == 2.0:
        return math.hypot(*norms)
    largest = max(norms, default=0.0)
    if norm_type == math.inf or largest in (0.0, math.inf):
        return largest
    # Relative to the largest one, so that no power overflows.
    powers = math.fsum((norm / largest) ** norm_type for norm in norms)
    return float(largest * powers ** (1 / norm_type))


def wide_norms(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Computes the norms of :func:`gradient_norms` in float64, for when float32 overflows.

    Returns:
        Tensor ``[len(gradients)]``, float64.
    """
    # One gradient at a time, so that only one float64 copy is in memory at once.
    return gathered(
        [torch.linalg.vector_norm(in_double(gradient_values(g)), norm_type) for g in gradients]
    )


def has_negative_zero(gradients: Sequence[Tensor]) -> bool:
    """Tells whether gradients whose elements are all 0 hold a -0.0; waits for a device."""
    return any(bool(torch.signbit(_real_values(gradient)).any()) for gradient in gradients)


def gradient_values(gradient: Tensor) -> Tensor:
    """Returns a dense gradient itself, or the stored values of a sparse one; to be read only.

    Of float8, with which torch hardly calculates, they are float32.
    """
    if gradient.layout is torch.strided:
        return gradient.float() if gradient.dtype.itemsize == 1 else gradient
    if gradient.layout is not torch.sparse_coo:  # CSR and its like
        return gradient.detach().values().clone()  # a view of them has no real and imaginary parts
    # An embedding's gradient lists a row once for each use of it; the norm is that of the sums.
    return gradient.coalesce().values()


class StepNorms(NamedTuple):
    """The norms of one step before and after the clip.

    The fields are in the units in which they were measured. The properties are in true units
    (without loss scale, and of the mean gradient) and may wait for the numbers.

    Attributes:
        before: The measurement before any clip.
        after: The measurement after the user's own clip; the same object as ``before`` if the user
            is known not to have changed the gradients.
        unit_before: The loss scale by which ``before`` is still multiplied.
        unit_after: The loss scale by which ``after`` is still multiplied.
        correction: The factor that turns the sum over the window and the ranks into the mean.
        coefficient: The factor of gradwatch's own clip, which comes on top; 1.0 if there is none.
        threshold: The limit that the clipping policy applied; NaN if there is none.
        loss_scale: The loss scale in force.
        looked: Whether ``after`` is a second measurement of gradients that nothing is known to have
            changed, whose numbers had not arrived yet: whether they are the same is seen later.
        clip_known: Whether the gradients were measured after the last clip. If not, every number
            after the clip is NaN.
        sign: -1.0 if ``after`` is of gradients that were reversed; 1.0 also if that is not known.
    """

    before: Measurement
    after: Measurement
    unit_before: FloatOrDeferred = 1.0
    unit_after: FloatOrDeferred = 1.0
    correction: FloatOrDeferred = 1.0
    coefficient: FloatOrDeferred = 1.0
    threshold: FloatOrDeferred = math.nan
    loss_scale: FloatOrDeferred = 1.0
    looked: bool = False
    clip_known: bool = True
    sign: FloatOrDeferred = 1.0

    def averaged(self, micro_batches: int, clip_known: bool) -> StepNorms:
        """Returns the norms of gradients that a loop may have averaged by itself.

        A clip multiplies all gradients by one factor, and an average over ranks does not; one over
        micro-batches does, by a factor that is known. What they were before an average is a part of
        the gradient only, so the norms after it stand for both. May wait for the numbers.

        Args:
            micro_batches: The number of micro-batches.
            clip_known: Whether the loop surely clips nothing after an average over ranks.
        """
        before, after = self.before, self.after
        if self.untouched:
            return self
        factor = _factor(before, after) * (resolve(self.unit_before) / resolve(self.unit_after))
        of_micro_batches = math.isclose(factor * micro_batches, 1.0, rel_tol=_OF_UNITS)
        if not (math.isnan(factor) or of_micro_batches):
            return self
        known = clip_known or of_micro_batches
        return self._replace(
            before=after, unit_before=self.unit_after, clip_known=self.clip_known and known
        )

    def true_norm(self) -> Tensor:
        """Returns the total norm at the start of the step, in true units: tensor ``[]``."""
        return self._in_true_units(self.after.total.tensor)

    def true_norms(self) -> Tensor:
        """Returns the norm of each gradient at the start of the step, in true units: ``[n]``."""
        return self._in_true_units(self.after.norms.tensor)

    def _in_true_units(self, norms: Tensor) -> Tensor:
        # Return the tensor itself if the factor is 1: this saves a kernel launch, and the policy
        # gets the norm bit for bit.
        if self.correction == self.unit_after == 1.0:
            return norms
        device = norms.device
        factor = operand_on(self.correction, device) / operand_on(self.unit_after, device)
        if isinstance(factor, Tensor):  # of float64, to which it would promote a norm []
            return norms * factor.to(norms.dtype)
        return norms if factor == 1.0 else norms * factor

    @property
    def before_scale(self) -> float:
        """The factor that converts ``before`` to true units."""
        return resolve(self.correction) / resolve(self.unit_before)

    @property
    def after_scale(self) -> float:
        """The factor that converts ``after`` to true units."""
        return resolve(self.correction) / resolve(self.unit_after)

    @property
    def grad_norm(self) -> float:
        """The total norm before any clip."""
        return self.before.total.value() * self.before_scale

    @property
    def clip_coef(self) -> float:
        """The ratio of the total norm after the clip to that before; 1.0 without a gradient.

        Negative if the gradients were reversed, NaN if it is not known.
        """
        if not self.clip_known:
            return math.nan
        own = resolve(self.coefficient)
        if self.untouched or self.grad_norm == 0:
            return own
        ratio = self.grad_norm_clipped / self.grad_norm
        return -ratio if ratio > 0 > own * resolve(self.sign) else ratio

    @property
    def grad_norm_clipped(self) -> float:
        """The total norm after every clip; NaN if it is not known."""
        if not self.clip_known:
            return math.nan
        if self.untouched:
            return self.grad_norm * abs(resolve(self.coefficient))
        return self.after.total.value() * self.after_scale * abs(resolve(self.coefficient))

    @property
    def clipped(self) -> bool | None:
        """Whether a clip changed the gradients: gradwatch's own, or one that lowered the norm.

        Reversing them counts as well.

        None if it is not known.
        """
        if not self.clip_known:
            return None
        return resolve(self.coefficient) < 1.0 or (
            not self.untouched and (abs(self.clip_coef) < 1.0 - 1e-6 or resolve(self.sign) < 0)
        )

    @property
    def untouched(self) -> bool:
        """Whether nothing but gradwatch has changed the gradients since the last backward."""
        if self.after is self.before:
            return True
        return (
            self.looked
            and same_norms(
                self.before, self.after, resolve(self.unit_before), resolve(self.unit_after)
            )
            and resolve(self.sign) > 0
        )


_ONE_FACTOR = 1e-3  # relative; bfloat16 gradients are rounded by more, but their norms are not


def _factor(before: Measurement, after: Measurement) -> float:
    """Returns the factor that makes norms of others, as a clip does; NaN if there is none."""
    if list(before.indices) != list(after.indices):
        return math.nan
    old, new = (one.norms.array().astype(np.float64) for one in (before, after))
    if not np.isfinite(old).all():
        return 1.0  # whatever has happened since, they are lost
    there = old > 0
    ratios = new[there] / old[there]
    if not np.isfinite(new).all() or new[~there].any() or not len(ratios):
        return math.nan  # the gradient of another rank, or its NaN
    one_factor = float(np.ptp(ratios)) <= _ONE_FACTOR * float(ratios.max())
    return float(np.median(ratios)) if one_factor else math.nan


_OF_UNITS = 1e-5


def same_norms(
    before: Measurement, after: Measurement, unit_before: float = 1.0, unit_after: float = 1.0
) -> bool:
    """Returns whether two measurements are of the same gradients; waits for their numbers.

    Args:
        before: The measurement at the end of the last backward.
        after: One of the same gradients, taken later in the same way: unchanged gradients give the
            same bits.
        unit_before: The loss scale by which ``before`` is still multiplied.
        unit_after: The loss scale by which ``after`` is still multiplied. If it is another one, a
            ``GradScaler`` has multiplied every element in between, and rounded it.
    """
    old, new = before.norms.array(), after.norms.array()
    if unit_before == unit_after:
        return old.tobytes() == new.tobytes()
    # In float64, in which no true norm overflows; NaN equals NaN, and Inf equals Inf.
    return bool(
        np.allclose(
            new.astype(np.float64) / unit_after,
            old.astype(np.float64) / unit_before,
            rtol=_OF_UNITS,
            atol=0.0,
            equal_nan=True,
        )
    )


class NonFiniteCount(NamedTuple):
    """How many elements of a gradient are NaN or Inf; a complex element with both counts as NaN."""

    nan: int
    inf: int

    def __bool__(self) -> bool:
        return self.nan > 0 or self.inf > 0


def count_nonfinite(gradient: Tensor) -> NonFiniteCount:
    """Counts the NaN and Inf elements of a gradient of any shape, dense or sparse."""
    return NonFiniteCount(*map(int, _sums_of_nonfinite(gradient)))


def nonfinite_counts(gradients: Sequence[Tensor]) -> Tensor:
    """Counts the NaN and Inf elements of gradients as :func:`count_nonfinite` does; never waits.

    Returns:
        Tensor ``[n, 2]``: for each gradient the number of NaN and that of Inf elements, in the most
        precise dtype of the device of the gradients; if they are on several, of :func:`home_of`
        them.
    """
    counts = [count for gradient in gradients for count in _sums_of_nonfinite(gradient)]
    return in_exact(gathered(counts)).reshape(-1, 2)


def _sums_of_nonfinite(gradient: Tensor) -> tuple[Tensor, Tensor]:
    values = gradient_values(gradient)
    nan = torch.isnan(values)
    return nan.sum(), (torch.isinf(values) & ~nan).sum()


class Origin(IntEnum):
    """Where a gradient became NaN or Inf, as far as it is known."""

    BACKWARD = 0
    """In the backward of a micro-batch, and the order in which gradients arrived is known."""

    NO_ORDER = 1
    """In the backward of a micro-batch; no order is known."""

    SEVERAL = 2
    """In one of several micro-batches, whose gradients were reduced over the ranks together."""

    AFTER = 3
    """After the backward of a micro-batch, or before any: the loop has written to ``.grad``."""

    STALE = 4
    """In an earlier step: nothing has zeroed the gradient since."""

    WEIGHTS = 5
    """In the backward of a micro-batch, before which weights were NaN or Inf already."""

    @classmethod
    def among(cls, backwards: int) -> Origin:
        """Returns the origin of what came in one of so many backwards, in no known order."""
        return (cls.AFTER, cls.NO_ORDER, cls.SEVERAL)[min(backwards, 2)]


class OwnNorm(NamedTuple):
    """The norm of what a rank has computed by itself, before gradients were reduced over ranks.

    It tells whether a gradient that is not finite came from this rank.

    Attributes:
        norm: The norm ``[]``; None if it is not known.
        indices: The parameters that it is the norm of.
        rank: The rank.
    """

    norm: Deferred | None = None
    indices: Container[int] = ()
    rank: int = 0

    def rank_of(self, index: int) -> int | None:
        """Returns the rank that made the gradient of a parameter bad; waits for the norm.

        Returns:
            This rank if its own gradients were not finite; -1 if they were; None if it is not
            known.
        """
        if self.norm is None or index not in self.indices:
            return None
        return -1 if math.isfinite(self.norm.value()) else self.rank


NOT_KNOWN = OwnNorm()


@dataclass(frozen=True, slots=True)
class FirstNonFinite:
    """The first parameter whose gradient was not finite in a window.

    Attributes:
        index: Its index in the parameter table.
        micro_batch: The newest micro-batch when this was seen, counted from 1; 0 if the window had
            none.
        norm: The norm of its gradient, NaN or Inf.
        counts: The number of NaN and Inf elements; None if the gradient no longer existed when its
            norm arrived from the device.
        position: Its position in backward order, counted from 0.
        origin: Where its gradient became NaN or Inf.
        weights: Indices of parameters that were NaN or Inf themselves before the backward.
        rank: The rank whose own gradient was not finite; -1 if this rank's was finite before the
            gradients were reduced over the ranks; None if it is not known.
    """

    index: int
    micro_batch: int
    norm: float
    counts: NonFiniteCount | None
    position: int = 0
    origin: Origin = Origin.BACKWARD
    weights: Sequence[int] = ()
    rank: int | None = None

    @property
    def is_nan(self) -> bool:
        """Whether the gradient contains a NaN, rather than only Inf."""
        return math.isnan(self.norm) if self.counts is None else self.counts.nan > 0


class LateCheck(NamedTuple):
    """Norms whose finiteness can be checked only once they have arrived from the device.

    Attributes:
        micro_batch: Micro-batches in the window at the time of the measurement.
        measurement: The norms at the end of a backward, or at the start of the step.
        order: Indices of the parameters in the order in which their gradients arrived; empty if it
            is not known.
        origin: Where a gradient became NaN or Inf if it is so in this measurement, and in none
            before.
        own: The norm of this rank's own gradients.
    """

    micro_batch: int
    measurement: Measurement
    order: Sequence[int]
    origin: Origin = Origin.BACKWARD
    own: OwnNorm = NOT_KNOWN

    def nonfinite(
        self,
        gradients: Sequence[Tensor] | None,
        counted: Mapping[int, NonFiniteCount] | None = None,
    ) -> list[FirstNonFinite]:
        """Lists the parameters whose gradient is not finite, in backward order if it is known.

        Args:
            gradients: The gradients that were measured; None if they no longer exist, or their
                elements have been counted.
            counted: Their NaN and Inf elements by index, if these have been counted.
        """
        if self.measurement.finite or self.measurement.overflowed:
            return []
        positions = {index: position for position, index in enumerate(self.order)}
        found = []
        for index in self.measurement.nonfinite_indices():
            column = self.measurement.indices.index(index)
            counts = None if counted is None else counted.get(index)
            if gradients is not None:
                counts = count_nonfinite(gradients[column])
            # The norm of a finite gradient may have overflowed next to one that is not finite. It
            # has no NaN or Inf element, and is not reported.
            if counts is None or counts:
                norm = float(self.measurement.norms.array()[column])
                position = positions.get(index, len(positions) + column)
                first = FirstNonFinite(index, self.micro_batch, norm, counts, position, self.origin)
                found.append(replace(first, rank=self.own.rank_of(index)))
        return sorted(found, key=lambda first: first.position)
