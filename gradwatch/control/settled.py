"""Settled: both sides of the clip of a step, and Offender: where its gradients went bad."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.nonfinite import NonFiniteCount


@dataclass(frozen=True, slots=True)
class Offender:
    """The first parameter in backward order whose gradient went bad in a window.

    Attributes:
        index: Its index in the parameter table.
        micro_batch: The micro-batch in which it was seen, counted from 1.
        counts: Its NaN and Inf elements.
    """

    index: int
    micro_batch: int
    counts: NonFiniteCount


@dataclass(frozen=True, slots=True)
class Settled:
    """Both sides of the clip of one step, in true units.

    Attributes:
        before: The measurement before the clip.
        after: The measurement after the user's own clip; ``before`` itself where nothing was done.
        before_scale: What to multiply ``before`` with to have true units.
        after_scale: The same for ``after``.
        coefficient: The factor that gradwatch multiplied the gradients with on top; 1.0 for none.
        threshold: The limit of the clipping policy; NaN without one.
        loss_scale: The loss scale in force.
    """

    before: Measurement
    after: Measurement
    before_scale: float = 1.0
    after_scale: float = 1.0
    coefficient: float = 1.0
    threshold: float = math.nan
    loss_scale: float = 1.0

    @property
    def grad_norm(self) -> float:
        """The total norm before any clip."""
        return self.before.total_value * self.before_scale

    @property
    def clip_coef(self) -> float:
        """The factor between both sides; 1.0 where there was no gradient."""
        if self.untouched or self.grad_norm == 0:
            return self.coefficient
        return self.after.total_value * self.after_scale / self.grad_norm * self.coefficient

    @property
    def grad_norm_clipped(self) -> float:
        """The total norm after every clip."""
        if self.untouched:
            return self.grad_norm * self.coefficient
        return self.after.total_value * self.after_scale * self.coefficient

    @property
    def clipped(self) -> bool:
        """Whether a clip changed the gradients: gradwatch's own, or one that shows in the norm."""
        return self.coefficient < 1.0 or (not self.untouched and self.clip_coef < 1.0 - 1e-6)

    @property
    def untouched(self) -> bool:
        """Whether nobody but gradwatch changed the gradients after the last backward."""
        return self.after is self.before
