"""When gradients are measured again although nothing is known to have changed them."""

from __future__ import annotations

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import StepNorms

EARLY = 64
EVERY = 128


class Looks:
    """Finds out whether a loop changes its gradients in ways that no version counter shows.

    ``p.grad.data.mul_()``, a NumPy view and DLPack write past the counter that a
    :class:`~gradwatch.hooks.snapshot.GradientSnapshot` compares, and several frameworks clip like
    that. So the gradients are measured once more in some steps: in steps 1, 2, 4 and so on up to
    64, where a loop shows what it does, and in every 128th. A loop that was seen to change them is
    looked at in every step from then on.
    """

    __slots__ = ("_found", "_late", "_steps")

    def __init__(self) -> None:
        """Starts before the first step."""
        self._steps = 0
        self._found = False
        self._late: list[StepNorms] = []

    def due(self) -> bool:
        """Counts a step whose gradients seem unchanged; returns whether to measure them again."""
        self._steps += 1
        if self._late:
            self._compare_arrived()
        if self._found:
            return True
        steps = self._steps
        return steps & (steps - 1) == 0 if steps <= EARLY else steps % EVERY == 0

    def found(self) -> None:
        """Notes that a look has found other gradients than those of the last backward."""
        self._found = True
        self._late = []

    def compare_later(self, norms: StepNorms) -> None:
        """Keeps the norms of a look whose numbers are still on a device."""
        if not self._found:
            self._late.append(norms)

    def _compare_arrived(self) -> None:
        waiting = []
        for norms in self._late:
            if not _is_at_hand(norms):
                waiting.append(norms)
            elif not norms.untouched:
                self.found()
                return
        self._late = waiting


def _is_at_hand(norms: StepNorms) -> bool:
    needed = (norms.before.norms, norms.after.norms, norms.unit_before, norms.unit_after)
    return all(not isinstance(one, Deferred) or one.at_hand for one in needed)
