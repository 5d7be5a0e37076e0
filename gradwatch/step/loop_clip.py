"""LoopClip: notices that the loop clips the gradients itself, beside gradwatch's clip."""

from __future__ import annotations

import math
from collections import deque

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import StepNorms

SAME = 1e-3  # relative: what clip_grad_norm_ leaves of its limit, in the coarsest dtype
LOWER = 0.99  # what is left of a norm after a clip; noise on gradients changes it less


class LoopClip:
    """Compares the steps in which the loop has lowered the norm of the gradients.

    A clip leaves the same norm whatever there was before. A division, by the number of tokens say,
    and noise do not.
    """

    def __init__(self) -> None:
        """Has seen no step yet."""
        self._waiting: deque[tuple[int, StepNorms]] = deque()
        self._earlier: tuple[float, float] | None = None

    def limit(self, norms: StepNorms, step: int) -> tuple[float, int] | None:
        """Returns the limit of the loop's clip once two steps have shown it; never waits.

        Numbers that are still on a device are looked at when a later step asks.

        Args:
            norms: Those of a step before gradwatch's own clip, measured on both sides of the
                loop's code.
            step: The number of the step.

        Returns:
            The limit, and the step that has shown it.
        """
        self._waiting.append((step, norms))
        while self._waiting and _at_hand(self._waiting[0][1]):
            step, norms = self._waiting.popleft()
            limit = self._compare(norms)
            if limit is not None:
                return limit, step
        return None

    def _compare(self, norms: StepNorms) -> float | None:
        before, after = norms.grad_norm, norms.grad_norm_clipped
        if not 0 < after < LOWER * before < math.inf:
            return None
        earlier, self._earlier = self._earlier, (before, after)
        if earlier is None or math.isclose(earlier[0], before, rel_tol=10 * SAME):
            return None
        return after if math.isclose(earlier[1], after, rel_tol=SAME) else None


def _at_hand(norms: StepNorms) -> bool:
    numbers = (*norms[2:], norms.before.total, norms.after.total)
    return all(one.at_hand for one in numbers if isinstance(one, Deferred))
