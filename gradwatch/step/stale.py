"""StaleGradients: notices gradients that zero_grad() should have removed before a step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor

from gradwatch.measure.deferred import Deferred, FloatOrDeferred, Transfer, defer, resolve


class StaleGradients:
    """Notices steps whose window begins with the gradients of the step before.

    It compares one gradient, at the first :attr:`ENOUGH` windows and as long as they are stale; and
    those that were NaN or Inf in the step before. It never waits: whether a gradient that nothing
    has written to is zero, as a write through ``.data`` makes it, may be known a few steps later.

    Attributes:
        looks: Whether it is still looking.
        bad: Indices of parameters whose gradient was NaN or Inf in the step before, and still is
            the same when the next window begins.
    """

    ENOUGH = 10

    def __init__(self) -> None:
        """Starts with no step."""
        self.looks = True
        # By its id, which tells enough here: a tensor that somebody refers to weakly cannot be
        # swapped, as model.to() does where torch is told so.
        self._spent: tuple[int, int, int] | None = None
        self._seen: FloatOrDeferred = 0.0
        self._is_stale: FloatOrDeferred = 0.0
        self._steps: deque[tuple[int, FloatOrDeferred, Transfer | None]] = deque()
        self._stale = self._fresh = 0
        self._was_bad: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.bad: Collection[int] = ()

    def look(self, tensors: Sequence[Tensor], first: int) -> None:
        """Looks at the first arrival of a backward, which is that of the parameter ``first``."""
        self._seen = 0.0
        self.bad = self._still_bad(tensors, first) if self._was_bad else ()
        self._was_bad = {}
        if self._spent is None or self._spent[0] == first:
            return
        index, identity, version = self._spent
        gradient = tensors[index].grad
        # A write through .data may have zeroed it, though its version counter has not moved.
        if gradient is not None and (id(gradient), gradient._version) == (identity, version):
            self._seen = defer(gradient.detach().any().float())

    def note_bad(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Notes the parameters whose gradient was NaN or Inf in a step that is over."""
        gradients = [(index, tensors[index].grad) for index in indices]
        self._was_bad = {i: (weakref.ref(g), g._version) for i, g in gradients if g is not None}
        self.looks = True

    def _still_bad(self, tensors: Sequence[Tensor], first: int) -> Collection[int]:
        return {
            index
            for index, (then, version) in self._was_bad.items()
            # By reference: a new gradient may have the id of one that is gone. The first one has
            # its new gradient already: added in place, which is one write.
            if (gradient := tensors[index].grad) is not None
            and then() is gradient
            and gradient._version - version <= (index == first)
        }

    def begin_window(self) -> None:
        """Notes that the backward that was looked at is the first one of a window."""
        self._is_stale, self._seen, self._spent = self._seen, 0.0, None

    def forget(self) -> None:
        """Forgets the window, whose gradients were thrown away."""
        self._is_stale = self._seen = 0.0

    def note_step(self, tensors: Sequence[Tensor], indices: Sequence[int], step: int) -> int | None:
        """Notes the end of a step.

        Returns:
            The step with which enough of them in a row were stale, once that is known.
        """
        stale, self._is_stale = self._is_stale, 0.0
        self._steps.append((step, stale, Transfer([stale]) if type(stale) is Deferred else None))
        gradient = tensors[indices[0]].grad if indices else None
        self._spent = None
        if gradient is not None:
            self._spent = (indices[0], id(gradient), gradient._version)
        return self._count()

    def _count(self) -> int | None:
        """Counts the steps of which it is known whether they were stale."""
        steps, enough = self._steps, None
        while steps and (steps[0][2] is None or steps[0][2].arrived()):
            step, stale, _ = steps.popleft()
            is_stale = resolve(stale) > 0
            self._stale = self._stale + 1 if is_stale else 0
            self._fresh += not is_stale
            enough = step if self._stale == self.ENOUGH else enough
        self.looks = max(self._stale, self._fresh) < self.ENOUGH
        return enough
