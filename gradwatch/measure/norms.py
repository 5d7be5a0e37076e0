"""Norms of many gradients in one batched pass, and where they are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradwatch.measure.deferred import Deferred, FloatOrDeferred, as_operand, is_at_hand, resolve

_dtype = attrgetter("dtype")
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_UP_TO_FLOAT32 = (*_LOW_PRECISION, torch.float32)


class Measurement(NamedTuple):
    """Norms of some gradients, measured in one batched pass.

    Attributes:
        indices: Index in the parameter table of each gradient, ascending.
        norms: The norm of each: ``[len(indices)]``.
        total: The norm of all together: ``[]``.
        overflowed: Whether the elements are finite but their float32 norm was not; the numbers
            are then float64 ones. Found out only where they are at hand.
    """

    indices: Sequence[int]
    norms: Deferred
    total: Deferred
    overflowed: bool = False

    @property
    def finite(self) -> bool:
        """Whether the total norm is a finite number."""
        return math.isfinite(self.total.value())

    def nonfinite_indices(self) -> list[int]:
        """Lists the indices whose norm is NaN or Inf."""
        return [self.indices[i] for i in np.flatnonzero(~np.isfinite(self.norms.array())).tolist()]

    def subset(self, indices: Sequence[int], norm_type: float) -> Measurement:
        """Returns the measurement that a pass over some of the parameters would have given."""
        wanted = set(indices)
        keep = [i for i, index in enumerate(self.indices) if index in wanted]
        norms, kept = self.norms.tensor[keep], [self.indices[i] for i in keep]
        total = Deferred(total_norm(norms, norm_type))
        return Measurement(kept, Deferred(norms), total, self.overflowed)


def measure(
    indices: Sequence[int],
    gradients: list[Tensor],
    norm_type: float,
    dtype: torch.dtype | None = None,
) -> Measurement:
    """Measures gradients in one batched pass.

    Args:
        indices: Index in the parameter table of each gradient, ascending.
        gradients: As for :func:`gradient_norms`.
        norm_type: The p of the norm, positive or ``math.inf``.
        dtype: As for :func:`gradient_norms`.

    Returns:
        The norms. Where the float32 norm of finite gradients overflows they are measured again
        in float64, so that the true number stands there and a clip can still work with it; not so
        on an accelerator, where finding out would wait for it.
    """
    norms = gradient_norms(gradients, norm_type, dtype)
    total = total_norm(norms, norm_type)
    value = total.item() if is_at_hand(total) else None
    # The elements are looked at only where the norm is not finite: isfinite() is a second pass.
    if value is None or math.isfinite(value) or not _all_finite(gradients):
        return Measurement(indices, Deferred(norms), Deferred(total, value))
    norms = wide_norms(gradients, norm_type)
    total = total_norm(norms, norm_type)
    return Measurement(indices, Deferred(norms), Deferred(total), overflowed=True)


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient_values(g)).all()) for g in gradients)


def gradient_norms(
    gradients: list[Tensor], norm_type: float = 2.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Computes the p-norm of each gradient, float16 and bfloat16 accumulated in float32.

    On finite float32 gradients every value equals, bit for bit, the one that
    ``torch.nn.utils.clip_grad_norm_`` sums up.

    Args:
        gradients: Any number of tensors: any shapes, real or complex dtypes, dense or sparse.
        norm_type: The p of the norm, positive; ``math.inf`` for the largest magnitude.
        dtype: That of all gradients, where it is float16, bfloat16 or float32 and known: they need
            not be asked for it then. One that has another one after all is measured right.

    Returns:
        Tensor ``[len(gradients)]`` on the device of the first one, float32 or, where a gradient
        has double precision, float64.
    """
    if not gradients:
        return torch.zeros(0)
    known = dtype in _UP_TO_FLOAT32
    dtypes = {torch.float32} if known else set(map(_dtype, gradients))
    if len(dtypes) == 1:
        # To ask for float32 changes no bit of a float32 norm. torch refuses to narrow float64 to
        # it, with an error that lands below: so a wrong ``dtype`` does no harm.
        accumulator = torch.float32 if known else _accumulator(dtypes.pop())
        # Not torch.nn.utils.get_total_norm(), of torch 2.6 and later: its norm has the dtype of
        # the gradients, in which finite float16 ones add up to inf. ``_foreach_norm`` is what it
        # calls, with a dtype (seen on torch 2.4 to 2.13).
        try:
            norms = torch._foreach_norm(gradients, norm_type, accumulator)
            return torch.stack(norms)
        except (NotImplementedError, RuntimeError):
            # Some are sparse, or on another device. To look first would cost every step a pass
            # over the list, and such models are rare.
            pass
    return _norms_of_groups(gradients, norm_type)


def _norms_of_groups(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """Computes norms with one batched call per device and dtype."""
    values = [gradient_values(gradient) for gradient in gradients]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if value.numel():  # an empty tensor has no largest element, and its norm is the zero below
            groups.setdefault((value.device, value.dtype), []).append(index)
    norms = [torch.zeros((), device=v.device) for v in values]
    for (_, dtype), indices in groups.items():
        group = [values[i] for i in indices]
        found = torch._foreach_norm(group, norm_type, _accumulator(dtype))
        for index, norm in zip(indices, found, strict=True):
            norms[index] = norm
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _accumulator(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in _LOW_PRECISION else None


def total_norm(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Combines the p-norms ``[n]`` of parts into that of the whole: ``[]``, 0 where ``n`` is 0."""
    if norms.numel() == 0:  # for p = inf torch raises: nothing has no largest element
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def wide_norms(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Computes the same norms in float64, for gradients whose float32 norm overflows.

    Args:
        gradients: As for :func:`gradient_norms`.
        norm_type: As for :func:`gradient_norms`.

    Returns:
        Tensor ``[len(gradients)]``, float64.
    """
    # One gradient at a time, so that only one float64 copy is in memory.
    norms = []
    for gradient in gradients:
        wide = torch.complex128 if gradient.dtype.is_complex else torch.float64
        norms.append(torch.linalg.vector_norm(gradient_values(gradient).to(wide), norm_type))
    return torch.stack(norms)


def gradient_values(gradient: Tensor) -> Tensor:
    """Returns a dense gradient itself, of a sparse one its values, duplicate indices added up."""
    # An embedding lists a row once per use of it; the norm is that of the sums.
    return gradient if gradient.layout is torch.strided else gradient.coalesce().values()


class StepNorms(NamedTuple):
    """Both sides of the clip of one step; the properties are true units, and read the numbers.

    Attributes:
        before: The measurement before the clip.
        after: The measurement after the user's own clip; ``before`` itself where nothing was done.
        unit_before: The loss scale that ``before`` still carries.
        unit_after: The same for ``after``.
        correction: The factor that turns a sum over the window, and the ranks, into the mean.
        coefficient: The factor that gradwatch multiplied the gradients with on top; 1.0 for none.
        threshold: The limit of the clipping policy; NaN without one.
        loss_scale: The loss scale in force.
    """

    before: Measurement
    after: Measurement
    unit_before: FloatOrDeferred = 1.0
    unit_after: FloatOrDeferred = 1.0
    correction: FloatOrDeferred = 1.0
    coefficient: FloatOrDeferred = 1.0
    threshold: FloatOrDeferred = math.nan
    loss_scale: FloatOrDeferred = 1.0

    def true_norm(self) -> Tensor:
        """Returns the total norm when the step begins, in true units: tensor ``[]``."""
        return self._in_true_units(self.after.total.tensor)

    def true_norms(self) -> Tensor:
        """Returns the norm of each gradient when the step begins: tensor ``[n]``."""
        return self._in_true_units(self.after.norms.tensor)

    def _in_true_units(self, norms: Tensor) -> Tensor:
        # A multiplication by one would cost a call; a policy must see the very bits of the norm.
        if self.correction == self.unit_after == 1.0:
            return norms
        factor = as_operand(self.correction) / as_operand(self.unit_after)
        return norms if isinstance(factor, float) and factor == 1.0 else norms * factor

    @property
    def before_scale(self) -> float:
        """What to multiply ``before`` with to have true units."""
        return resolve(self.correction) / resolve(self.unit_before)

    @property
    def after_scale(self) -> float:
        """What to multiply ``after`` with to have true units."""
        return resolve(self.correction) / resolve(self.unit_after)

    @property
    def grad_norm(self) -> float:
        """The total norm before any clip."""
        return self.before.total.value() * self.before_scale

    @property
    def clip_coef(self) -> float:
        """The factor between both sides; 1.0 where there was no gradient."""
        if self.untouched or self.grad_norm == 0:
            return resolve(self.coefficient)
        return self.grad_norm_clipped / self.grad_norm

    @property
    def grad_norm_clipped(self) -> float:
        """The total norm after every clip."""
        if self.untouched:
            return self.grad_norm * resolve(self.coefficient)
        return self.after.total.value() * self.after_scale * resolve(self.coefficient)

    @property
    def clipped(self) -> bool:
        """Whether a clip changed the gradients: gradwatch's own, or one that shows in the norm."""
        return resolve(self.coefficient) < 1.0 or (
            not self.untouched and self.clip_coef < 1.0 - 1e-6
        )

    @property
    def untouched(self) -> bool:
        """Whether nobody but gradwatch changed the gradients after the last backward."""
        return self.after is self.before


class NonFiniteCount(NamedTuple):
    """How many elements of a gradient are NaN and Inf; a complex one with both is a NaN."""

    nan: int
    inf: int

    def __bool__(self) -> bool:
        return self.nan > 0 or self.inf > 0


def count_nonfinite(gradient: Tensor) -> NonFiniteCount:
    """Counts the NaN and Inf elements of a gradient of any shape, dense or sparse."""
    values = gradient_values(gradient)
    nan = torch.isnan(values)
    inf = torch.isinf(values) & ~nan
    return NonFiniteCount(int(nan.sum()), int(inf.sum()))


@dataclass(frozen=True, slots=True)
class FirstNonFinite:
    """The first parameter in backward order whose gradient went bad in a window.

    Attributes:
        index: Its index in the parameter table.
        micro_batch: The micro-batch in which it was seen, counted from 1.
        norm: Its norm, NaN or Inf.
        counts: Its NaN and Inf elements; None where the gradient was gone when its norm arrived
            from the device.
        position: Its position in the order of the backward.
    """

    index: int
    micro_batch: int
    norm: float
    counts: NonFiniteCount | None
    position: int = 0

    @property
    def is_nan(self) -> bool:
        """Whether it holds a NaN, rather than only Inf."""
        return math.isnan(self.norm) if self.counts is None else self.counts.nan > 0


class LateCheck(NamedTuple):
    """The gradients of a window at the end of one backward, or when the step begins.

    Attributes:
        micro_batch: Micro-batches so far.
        measurement: Their norms.
        order: Indices in the order in which they arrived.
    """

    micro_batch: int
    measurement: Measurement
    order: Sequence[int]

    def nonfinite(self, gradients: Sequence[Tensor] | None) -> list[FirstNonFinite]:
        """Lists the parameters that are bad, the first in backward order first.

        Args:
            gradients: Those that were measured; None where they are gone.
        """
        if self.measurement.finite or self.measurement.overflowed:
            return []
        positions = {index: position for position, index in enumerate(self.order)}
        found = []
        for index in self.measurement.nonfinite_indices():
            column = self.measurement.indices.index(index)
            counts = None if gradients is None else count_nonfinite(gradients[column])
            # A norm can overflow beside a gradient that is really bad: that one has no bad element.
            if counts is None or counts:
                norm = float(self.measurement.norms.array()[column])
                position = positions.get(index, len(positions) + column)
                found.append(FirstNonFinite(index, self.micro_batch, norm, counts, position))
        return sorted(found, key=lambda first: first.position)
