"""The clip of a step: asks the policy, and carries out its decision.

The correction of the window (:attr:`StepNorms.correction`) is multiplied in together with a clip of
the total norm, so that both cost one pass over the gradients.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.clip.apply import clamp_, scale_, scale_each_
from gradwatch.clip.policy import (
    FACTORS,
    ClipDecision,
    ClipPolicy,
    UnitRule,
    check_decision,
)
from gradwatch.contracts import check_result, is_builtin
from gradwatch.hooks.optimizer import FusedStep
from gradwatch.measure.deferred import (
    Deferred,
    FloatOrDeferred,
    as_operand,
    defer,
    is_at_hand,
    resolve,
)
from gradwatch.measure.devices import as_exact, in_exact, sent
from gradwatch.measure.gathering import index_tensor, multiplied
from gradwatch.measure.norms import Measurement, StepNorms, total_norm
from gradwatch.measure.parameters import ParameterTable, is_sharded, local_part
from gradwatch.step.window import Window

UNITS_OF_SHARDS = (
    "AdaptiveGradientClip looks at whole output units, but {name} is sharded over ranks, each of "
    'which holds only a part. Use a policy that needs only norms there, such as clip="auto".'
)


class Scopes:
    """Norms and factors per parameter group, or per parameter, for a policy with such a scope."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        """Notes which parameter is in which group.

        Args:
            groups: For each group of the optimizer the indices of its parameters in the parameter
                table.
        """
        self._indices = sorted({index for group in groups for index in group})
        place = {index: position for position, index in enumerate(self._indices)}
        group_of = [0] * len(self._indices)
        for number, members in enumerate(groups):
            for index in members:
                group_of[place[index]] = number
        self._group_of = tuple(group_of)
        self._groups = len(groups)

    def norms(self, step: StepNorms, scope: str, norm_type: float) -> Tensor:
        """Returns the norms for a policy: tensor ``[n]``, one per group or parameter.

        Args:
            step: The norms before gradwatch's clip.
            scope: ``"group"`` or ``"parameter"``.
            norm_type: The p of the norms, positive or ``math.inf``.
        """
        norms, there = step.true_norms(), list(step.after.indices)
        if there != self._indices:
            row = norms.new_zeros(len(self._indices))
            norms = row.index_copy_(0, self._places(there, norms.device), norms)
        if scope == "parameter":
            return norms
        groups = norms.new_zeros(self._groups)
        members = index_tensor(self._group_of, norms.device)
        if math.isinf(norm_type):
            return groups.scatter_reduce_(0, members, norms, "amax")
        return groups.index_add_(0, members, norms.pow(norm_type)).pow(1 / norm_type)

    def for_gradients(self, there: Sequence[int], scope: str, coefficients: Tensor) -> Tensor:
        """Returns the factor of each existing gradient.

        Args:
            there: Indices of the parameters that have a gradient, ascending.
            scope: ``"group"`` or ``"parameter"``.
            coefficients: Tensor ``[n]``, one factor per group or parameter.

        Returns:
            Tensor ``[len(there)]``.
        """
        device = coefficients.device
        if scope == "group":
            coefficients = coefficients[index_tensor(self._group_of, device)]
        if list(there) == self._indices:
            return coefficients
        return coefficients[self._places(there, device)]

    def _places(self, there: Sequence[int], device: torch.device) -> Tensor:
        place = {index: position for position, index in enumerate(self._indices)}
        return index_tensor(tuple(place[index] for index in there), device)


class Clipping:
    """The clip of one optimizer."""

    def __init__(
        self,
        policy: ClipPolicy | None,
        optimizer: Optimizer,
        table: ParameterTable,
        fused: FusedStep | None,
    ) -> None:
        """Reads the parameter groups of the optimizer.

        Args:
            policy: The clipping rule. With None, gradients are only multiplied by the correction of
                the window.
            optimizer: The optimizer, for its parameter groups.
            table: All watched parameters.
            fused: Lets the optimizer scale the gradients in its kernel, if it can; None to never
                use this.
        """
        self.policy = policy
        self._trusted = is_builtin(policy)
        self._optimizer = weakref.ref(optimizer)
        self._table = table
        self._fused = fused
        self._scope: str = getattr(policy, "scope", "global")
        self.refresh()

    def refresh(self) -> None:
        """Reads the parameter groups again, after one was added."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        members = [] if self._scope == "global" else [g["params"] for g in groups]
        self._scopes = Scopes(list(map(self._table.indices_of, members)))

    def clip_(
        self,
        window: Window,
        norms: StepNorms,
        left: FloatOrDeferred,
        left_out: FloatOrDeferred = 0.0,
    ) -> StepNorms:
        """Clips the gradients of a window; returns the norms before and after all clips.

        Nothing is done if the total norm is known not to be finite.

        Args:
            window: The window.
            norms: Its norms before the clip.
            left: The loss scale by which the gradients are still multiplied.
            left_out: Above 0 if the device skips the step although its norm is finite: a policy
                must not remember such a norm.
        """
        total = norms.after.total.if_known()
        if total is not None and not math.isfinite(total):
            return norms
        decision, norms = self._decide(norms, left_out)
        if not _changes(decision, norms):
            return norms
        indices, gradients = window.gradients()
        norms = self._carry_out_(decision, gradients, norms, left)
        if decision.clip_value is None and decision.units is None:
            return norms
        # The gradients that were measured include the correction by now, so it is taken out.
        unit = defer(multiplied(left, norms.correction))
        after = window.measure_clipped(indices, gradients)
        return norms._replace(after=after, unit_after=unit, looked=False)

    def _decide(
        self, norms: StepNorms, left_out: FloatOrDeferred
    ) -> tuple[ClipDecision, StepNorms]:
        if self.policy is None:
            return _NO_DECISION, norms
        if self._scope == "global":
            given = norms.true_norm()
        else:
            given = self._scopes.norms(norms, self._scope, self.policy.norm_type)
        if isinstance(left_out, Deferred):
            given = torch.where(left_out.tensor > 0, torch.nan, given)
        decision = self.policy.decide(given)
        if not self._trusted:
            decision = check_decision(self.policy, decision, given)
        return decision, norms._replace(threshold=defer(decision.threshold))

    def _carry_out_(
        self,
        decision: ClipDecision,
        gradients: list[Tensor],
        norms: StepNorms,
        left: FloatOrDeferred,
    ) -> StepNorms:
        """Carries out a decision, in place or in the optimizer's own kernel."""
        coefficient, finite = decision.coefficient, None
        if not norms.after.total.at_hand:
            # The norm is still on the device, and may not be finite. If so, nothing is clipped.
            finite = torch.isfinite(norms.after.total.tensor)
        if coefficient is not None and finite is not None:
            coefficient = torch.where(finite, sent(coefficient, finite.device), 1.0)
        if coefficient is not None and self._scope != "global":
            if norms.correction != 1.0:
                # Kept apart from the factors below, by which the norms are multiplied as well:
                # StepNorms applies the correction to the norms by itself.
                scale_(gradients, as_operand(norms.correction))
            factors = self._scopes.for_gradients(norms.after.indices, self._scope, coefficient)
            scale_each_(gradients, factors)
            norms = _with_factors(norms, factors, self.policy)
        else:
            norms = self._scale(gradients, norms, coefficient)
        if decision.clip_value is not None:
            limit = multiplied(decision.clip_value, left)
            if finite is not None:
                limit = torch.where(finite, as_exact(limit, finite.device), math.inf)
            clamp_(gradients, limit)
        if decision.units is not None:
            places = norms.after.indices, gradients
            self._scale_units(decision.units, *places, as_operand(left), finite)
        return norms

    def _scale(
        self, gradients: list[Tensor], norms: StepNorms, coefficient: Tensor | None
    ) -> StepNorms:
        factor = 1.0 if coefficient is None else defer(coefficient)
        whole: float | Tensor | None = None  # the factor for the gradients; None to save the pass
        if norms.correction != 1.0:
            own = as_operand(factor)
            # As exact as on the host, where both factors are float64.
            exact = in_exact(own) if isinstance(own, Tensor) and self._scales(gradients) else own
            whole = multiplied(exact, norms.correction)
        elif coefficient is not None and factor != 1.0:
            whole = coefficient
        if whole is not None:
            # A factor of 0 has no reciprocal, which the fused kernel needs.
            if self._fused is not None and factor != 0.0 and self._scales(gradients):
                self._fused.scale(whole, gradients[0].device)
            else:
                scale_(gradients, whole)
        return norms._replace(coefficient=factor)

    def _scales(self, gradients: list[Tensor]) -> bool:
        """Returns whether the scaling can be left to the optimizer's kernel.

        The kernel takes a float32 factor, which is not exact enough for float64 gradients.
        """
        if self._fused is None or not self._fused.can_scale:
            return False
        return torch.float64 not in set(map(_dtype, gradients))

    def _scale_units(
        self,
        rule: UnitRule,
        indices: Sequence[int],
        gradients: list[Tensor],
        left: float | Tensor,
        finite: Tensor | None,
    ) -> None:
        flags: dict[torch.device, Tensor] = {}
        for index, gradient in zip(indices, gradients, strict=True):
            weight, name = self._table.tensors[index], self._table.names[index]
            if is_sharded(weight):
                raise NotImplementedError(UNITS_OF_SHARDS.format(name=name))
            true = _unscaled(gradient, left)
            factors = rule.coefficient(name, true, local_part(weight.detach()))
            if factors is None:
                continue
            check_result(rule, "coefficient()", factors, FACTORS, isinstance(factors, Tensor))
            if finite is not None:
                if gradient.device not in flags:
                    flags[gradient.device] = sent(finite, gradient.device)
                factors = torch.where(flags[gradient.device], factors, 1.0)
            gradient.mul_(factors)


def _unscaled(gradient: Tensor, left: float | Tensor) -> Tensor:
    if not isinstance(left, Tensor):
        return gradient if left == 1.0 else gradient / left
    # Not in a half precision, in which a loss scale may be Inf; a number would not be rounded.
    wide = gradient.float() if gradient.dtype in _HALF else gradient
    return (wide / sent(left, gradient.device)).to(gradient.dtype)


_HALF = {torch.float16, torch.bfloat16}
_NO_DECISION = ClipDecision()
_dtype = attrgetter("dtype")


def _changes(decision: ClipDecision, norms: StepNorms) -> bool:
    """Returns whether gradients must be changed: for the clip, or for the mean of the window."""
    return (
        decision.coefficient is not None
        or decision.clip_value is not None
        or decision.units is not None
        or norms.correction != 1.0
    )


def _with_factors(step: StepNorms, factors: Tensor, policy: ClipPolicy | None) -> StepNorms:
    """Computes the norms after a clip from those before it and each gradient's own factor."""
    after = step.after
    norms = after.norms.tensor * factors
    sign = step.sign
    if is_at_hand(factors) and bool((factors.numpy() < 0).any()):
        # Their sum is the inner product of the gradients before and after, but for a factor.
        whole = float((norms * after.norms.tensor).sum())
        norms, sign = norms.abs(), -resolve(sign) if whole < 0 else sign
    total = total_norm(norms, 2.0 if policy is None else policy.norm_type)
    scaled = Measurement(after.indices, Deferred(norms), Deferred(total), after.overflowed)
    return step._replace(after=scaled, looked=False, sign=sign)
