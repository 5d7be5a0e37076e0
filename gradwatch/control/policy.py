"""ClipPolicy: numbers in, a decision out; what every clipping rule looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClipDecision:
    """What a policy wants done to the gradients of one step.

    Attributes:
        coefficient: Tensor ``[]``: the factor to multiply all gradients with, at most 1; None to
            leave them.
        threshold: The limit that was applied, in the unit of the norm or of the elements.
        clip_value: Limit for the magnitude of each element; None to leave them.
    """

    coefficient: Tensor | None = None
    threshold: float = math.nan
    clip_value: float | None = None


@runtime_checkable
class ClipPolicy(Protocol):
    """A clipping rule. It never sees a gradient, and never a norm that is not finite."""

    @property
    def norm_type(self) -> float:
        """The p of the norm that it wants, and that is recorded."""

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides about one step.

        Args:
            total_norm: Tensor ``[]``: the finite pre-clip norm, unscaled and reduced over ranks.

        Returns:
            What to do.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
