"""ClipPolicy: the interface of every clipping rule, and the decision that it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gradwatch.pickles import stable_name

SCOPES = ("global", "group", "parameter")


@stable_name
@runtime_checkable
class ClipPolicy(Protocol):
    """A clipping rule: norms in, a decision out. It never sees a gradient.

    A policy may have an attribute ``scope``. With ``"global"``, or without the attribute, it is
    given the total norm, a tensor ``[]``. With ``"group"`` or ``"parameter"`` it is given one norm
    for each parameter group, or for each parameter, of the optimizer: a tensor ``[n]``, always in
    the same order, with 0 for what has no gradient.

    On the CPU, a policy is never given a norm that is not finite. On an accelerator it may be, as
    checking would mean waiting for the device: the policy must then keep such a norm out of its
    memory by itself, and its decision for that step is not used.
    """

    # `scope` is not a member, or isinstance() would refuse a user's policy that has none.

    @property
    def norm_type(self) -> float:
        """The p of the norm that is measured for this policy, and recorded."""

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides what is done to the gradients of one step.

        Args:
            total_norm: Tensor ``[]``, or ``[n]`` with a scope other than ``"global"``: norms before
                the clip, without loss scale and reduced over ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""


class UnitRule(Protocol):
    """A rule that needs the gradient and the weight of each output unit, not only norms."""

    def coefficient(self, name: str, gradient: Tensor, weight: Tensor) -> Tensor | None:
        """Computes the factors for one parameter.

        The gradient is without loss scale and has the shape of the weight.

        Returns:
            The factors, broadcastable to the gradient; None to leave it unchanged.
        """


@stable_name
@dataclass(frozen=True, slots=True)
class ClipDecision:
    """What a policy wants done to the gradients of one step.

    Attributes:
        coefficient: The factor to multiply the gradients by, between 0 and 1, in the shape of the
            norms that the policy was given; None to leave the gradients unchanged.
        threshold: The limit that was applied, a number or a tensor ``[]``, in the unit of the norm
            or, with ``clip_value``, of the elements; NaN if there is no single limit. It is
            recorded only.
        clip_value: The limit for the magnitude of each element; None for no such limit.
        units: A rule that is applied to each output unit of each parameter; None for no such rule.
    """

    coefficient: Tensor | None = None
    threshold: float | Tensor = math.nan
    clip_value: float | None = None
    units: UnitRule | None = None


class Stateless:
    """The empty state of policies without memory."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the rule has no memory."""
