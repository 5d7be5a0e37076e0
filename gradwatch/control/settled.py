"""Settled: both sides of the clip of one step, and what was decided."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.readings import Number, number, operand


class Settled(NamedTuple):
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
    unit_before: Number = 1.0
    unit_after: Number = 1.0
    correction: Number = 1.0
    coefficient: Number = 1.0
    threshold: Number = math.nan
    loss_scale: Number = 1.0

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
        factor = operand(self.correction) / operand(self.unit_after)
        return norms if isinstance(factor, float) and factor == 1.0 else norms * factor

    @property
    def before_scale(self) -> float:
        """What to multiply ``before`` with to have true units."""
        return number(self.correction) / number(self.unit_before)

    @property
    def after_scale(self) -> float:
        """What to multiply ``after`` with to have true units."""
        return number(self.correction) / number(self.unit_after)

    @property
    def grad_norm(self) -> float:
        """The total norm before any clip."""
        return self.before.total.value() * self.before_scale

    @property
    def clip_coef(self) -> float:
        """The factor between both sides; 1.0 where there was no gradient."""
        if self.untouched or self.grad_norm == 0:
            return number(self.coefficient)
        return self.grad_norm_clipped / self.grad_norm

    @property
    def grad_norm_clipped(self) -> float:
        """The total norm after every clip."""
        if self.untouched:
            return self.grad_norm * number(self.coefficient)
        return self.after.total.value() * self.after_scale * number(self.coefficient)

    @property
    def clipped(self) -> bool:
        """Whether a clip changed the gradients: gradwatch's own, or one that shows in the norm."""
        return number(self.coefficient) < 1.0 or (
            not self.untouched and self.clip_coef < 1.0 - 1e-6
        )

    @property
    def untouched(self) -> bool:
        """Whether nobody but gradwatch changed the gradients after the last backward."""
        return self.after is self.before
