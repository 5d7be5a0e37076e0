"""The clip of a step: asks the policy, and has done what it decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.clip.apply import clamp_, scale_, scale_each_
from gradwatch.clip.policy import ClipDecision, ClipPolicy, UnitRule
from gradwatch.hooks.optimizer import FusedStep
from gradwatch.measure.deferred import (
    Deferred,
    FloatOrDeferred,
    as_operand,
    defer,
    is_at_hand,
    resolve,
)
from gradwatch.measure.norms import Measurement, StepNorms, total_norm
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.sharded import is_sharded, local_part
from gradwatch.step.window import Window

SCOPES = ("global", "group", "parameter")


class Scopes:
    """The parameters of one optimizer, and the groups that they are in."""

    def __init__(self, indices: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
        """Takes note of them.

        Args:
            indices: All parameters of the optimizer, ascending.
            groups: The same by parameter group.
        """
        self._indices = list(indices)
        place = {index: position for position, index in enumerate(self._indices)}
        self._group_of = [0] * len(self._indices)
        for number, members in enumerate(groups):
            for index in members:
                self._group_of[place[index]] = number
        self._groups = len(groups)
        self._tensors: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def norms(self, settled: StepNorms, scope: str, norm_type: float) -> Tensor:
        """Returns what a policy is given: tensor ``[n]``, one norm per group or parameter.

        Args:
            settled: Both sides of the clip so far.
            scope: ``"group"`` or ``"parameter"``.
            norm_type: The p of the norms.
        """
        norms = self._of_all(settled)
        if scope == "parameter":
            return norms
        groups = norms.new_zeros(self._groups)
        members = self._tensor(self._group_of, norms.device)
        if math.isinf(norm_type):
            return groups.scatter_reduce_(0, members, norms, "amax")
        return groups.index_add_(0, members, norms.pow(norm_type)).pow(1 / norm_type)

    def for_gradients(self, settled: StepNorms, scope: str, coefficients: Tensor) -> Tensor:
        """Returns the factor of each gradient that is there.

        Args:
            settled: Both sides of the clip so far.
            scope: ``"group"`` or ``"parameter"``.
            coefficients: Tensor ``[n]``, one per group or parameter.

        Returns:
            Tensor ``[number of gradients]``.
        """
        device = coefficients.device
        if scope == "group":
            coefficients = coefficients[self._tensor(self._group_of, device)]
        there = list(settled.after.indices)
        return coefficients if there == self._indices else coefficients[self._places(there, device)]

    def _of_all(self, settled: StepNorms) -> Tensor:
        norms, there = settled.true_norms(), list(settled.after.indices)
        if there == self._indices:
            return norms
        row = norms.new_zeros(len(self._indices))
        return row.index_copy_(0, self._places(there, norms.device), norms)

    def _places(self, there: Sequence[int], device: torch.device) -> Tensor:
        place = {index: position for position, index in enumerate(self._indices)}
        return self._tensor([place[index] for index in there], device)

    def _tensor(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Makes a tensor of whole numbers, once: the copy to a device waits for it."""
        key = (device, tuple(numbers))
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(list(numbers), dtype=torch.int64, device=device)
        return self._tensors[key]


UNITS_OF_SHARDS = (
    "AdaptiveGradientClip looks at whole output units, but {name} is sharded over ranks, each of "
    'which holds a part only. Use a policy of norms there, such as clip="auto".'
)


@dataclass(frozen=True, slots=True)
class Clipping:
    """The clip of one optimizer.

    Attributes:
        policy: The rule; None for none.
        scopes: The parameters of the optimizer, and its groups.
        fused: The optimizer, where it can scale by itself; None where it cannot.
        table: Names and values of the parameters.
        scope: What the norms are of that the policy is given.
    """

    policy: ClipPolicy | None
    scopes: Scopes
    fused: FusedStep | None
    table: ParameterTable
    scope: str

    def clip_(self, window: Window, settled: StepNorms, left: FloatOrDeferred) -> StepNorms:
        """Clips the gradients that a step is about to use.

        Args:
            window: Holds them.
            settled: What :meth:`Window.look` saw; the policy is not asked where the norm is known
                not to be finite.
            left: The loss scale that the gradients still carry.

        Returns:
            Both sides of every clip.
        """
        total = settled.after.total.if_known()
        if total is not None and not math.isfinite(total):
            return settled
        decision, settled = self.decide(settled)
        if not self.changes(decision, settled):
            return settled
        indices, gradients = window.gradients()
        settled, limited = self.carry_out_(decision, gradients, settled, left)
        if not limited:
            return settled
        # The correction has been multiplied in by now.
        unit = defer(as_operand(left) * as_operand(settled.correction))
        return settled._replace(after=window.measure_clipped(indices, gradients), unit_after=unit)

    def decide(self, settled: StepNorms) -> tuple[ClipDecision, StepNorms]:
        """Asks the policy about a step.

        Args:
            settled: Both sides so far.

        Returns:
            What it wants done, and both sides with its limit in them.
        """
        if self.policy is None:
            return _NO_DECISION, settled
        if self.scope == "global":
            norms = settled.true_norm()
        else:
            norms = self.scopes.norms(settled, self.scope, self.policy.norm_type)
        decision = self.policy.decide(norms)
        return decision, settled._replace(threshold=_number(decision.threshold))

    def changes(self, decision: ClipDecision, settled: StepNorms) -> bool:
        """Tells whether any gradient must be written to: for the clip, or to make up the mean.

        Args:
            decision: What the policy wants done.
            settled: Both sides so far.
        """
        return (
            decision.coefficient is not None
            or decision.clip_value is not None
            or decision.units is not None
            or settled.correction != 1.0
        )

    def carry_out_(
        self,
        decision: ClipDecision,
        gradients: list[Tensor],
        settled: StepNorms,
        left: FloatOrDeferred,
    ) -> tuple[StepNorms, bool]:
        """Clips the gradients of a step, in place or in the optimizer's own kernel.

        Args:
            decision: What the policy wants done.
            gradients: The gradients; of sharded ones the parts of this rank.
            settled: Both sides so far.
            left: The loss scale that the gradients still carry.

        Returns:
            Both sides of the clip, and whether elements were changed one by one, so that the norm
            must be taken anew.
        """
        coefficient = decision.coefficient
        if coefficient is not None and not settled.after.total.at_hand:
            # Nobody has looked yet whether the norm is finite; if it is not, leave the gradients.
            finite = torch.isfinite(settled.after.total.tensor)
            coefficient = torch.where(finite, coefficient, 1.0)
        if coefficient is not None and self.scope != "global":
            if settled.correction != 1.0:
                scale_(gradients, as_operand(settled.correction))
            factors = self.scopes.for_gradients(settled, self.scope, coefficient)
            scale_each_(gradients, factors)
            settled = _with_factors(settled, factors, self.policy)
        else:
            settled = self._scale(gradients, settled, coefficient)
        if decision.clip_value is not None:
            clamp_(gradients, decision.clip_value * resolve(left))
        if decision.units is not None:
            self._scale_units(decision.units, settled.after.indices, gradients, resolve(left))
        return settled, decision.clip_value is not None or decision.units is not None

    def _scale(
        self, gradients: list[Tensor], settled: StepNorms, coefficient: Tensor | None
    ) -> StepNorms:
        factor = 1.0 if coefficient is None else _number(coefficient)
        whole: float | Tensor | None = None  # what is left to multiply the gradients with
        if settled.correction != 1.0:
            whole = as_operand(factor) * as_operand(settled.correction)
        elif coefficient is not None and factor != 1.0:
            whole = coefficient
        if whole is not None:
            if self.fused is not None and factor != 0.0 and self._scales(gradients):
                self.fused.scale(whole, gradients[0].device)
            else:
                scale_(gradients, whole)
        return settled._replace(coefficient=factor)

    def _scales(self, gradients: list[Tensor]) -> bool:
        """Tells whether the optimizer can be left to scale the gradients.

        It takes a float32 factor: not near enough for gradients in double precision.
        """
        if self.fused is None or not self.fused.can_scale:
            return False
        return torch.float64 not in set(map(_dtype, gradients))

    def _scale_units(
        self, rule: UnitRule, indices: Sequence[int], gradients: list[Tensor], left: float
    ) -> None:
        for index, gradient in zip(indices, gradients, strict=True):
            weight, name = self.table.tensors[index], self.table.names[index]
            if is_sharded(weight):
                raise NotImplementedError(UNITS_OF_SHARDS.format(name=name))
            true = gradient if left == 1.0 else gradient / left
            factors = rule.coefficient(name, true, local_part(weight.detach()))
            if factors is not None:
                gradient.mul_(factors)


_NO_DECISION = ClipDecision()
_dtype = attrgetter("dtype")


def _number(value: Tensor | float) -> FloatOrDeferred:
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if is_at_hand(value) else Deferred(value)


def _with_factors(settled: StepNorms, factors: Tensor, policy: ClipPolicy | None) -> StepNorms:
    """Works the norms after the clip out of those before it, where each has its own factor."""
    after = settled.after
    norms = after.norms.tensor * factors
    total = total_norm(norms, 2.0 if policy is None else policy.norm_type)
    scaled = Measurement(after.indices, Deferred(norms), Deferred(total), after.overflowed)
    return settled._replace(after=scaled)
