"""ClipPolicy: numbers in, a decision out; what every clipping rule looks like."""

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

    A policy may have an attribute ``scope``. With ``"global"``, or without it, the policy is given
    the total norm, tensor ``[]``; with ``"group"`` or ``"parameter"`` one norm for each parameter
    group, or each parameter, of the optimizer: tensor ``[n]``, always in the same order, 0 where
    there is no gradient.

    On the CPU it is never given a norm that is not finite. On an accelerator nobody has looked yet,
    and looking would wait: there it must keep such a norm out of its memory by itself, and what it
    answers is not used.
    """

    # `scope` is no member: isinstance() would then refuse a policy of the user without one.

    @property
    def norm_type(self) -> float:
        """The p of the norm that it wants, and that is recorded."""

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides about one step.

        Args:
            total_norm: Tensor ``[]``, or ``[n]`` for another scope than ``"global"``: pre-clip
                norms, unscaled and reduced over ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""


class UnitRule(Protocol):
    """A rule that looks at the gradient and the weight of each output unit."""

    def coefficient(self, name: str, gradient: Tensor, weight: Tensor) -> Tensor | None:
        """Computes the factors for one parameter, to broadcast against its gradient.

        Args:
            name: Its name.
            gradient: Its gradient, in true units.
            weight: Its value.

        Returns:
            The factors; None to leave the gradient.
        """


@stable_name
@dataclass(frozen=True, slots=True)
class ClipDecision:
    """What a policy wants done to the gradients of one step.

    Attributes:
        coefficient: The factor to multiply the gradients with, between 0 and 1, in the shape of the
            norms that the policy was given; None to leave them.
        threshold: The limit that was applied, in the unit of the norm or of the elements: a number
            or a tensor ``[]``; NaN where there is no single one.
        clip_value: Limit for the magnitude of each element; None to leave them.
        units: A rule for each output unit of each parameter; None for no such.
    """

    coefficient: Tensor | None = None
    threshold: float | Tensor = math.nan
    clip_value: float | None = None
    units: UnitRule | None = None


class Stateless:
    """What the policies without memory share."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the rule has no memory."""
