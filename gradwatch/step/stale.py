"""StaleGradients: notices gradients that zero_grad() should have removed before a step."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

from torch import Tensor


class StaleGradients:
    """Notices steps whose window begins with the gradients of the step before.

    It compares one gradient, at the first :attr:`ENOUGH` windows and as long as they are stale; and
    those that were NaN or Inf in the step before.

    Attributes:
        looks: Whether it is still looking.
        bad: Indices of parameters whose gradient was NaN or Inf in the step before, and still is
            the same when the next window begins.
    """

    ENOUGH = 10

    def __init__(self) -> None:
        """Starts with no step."""
        self.looks = True
        self._spent: tuple[int, weakref.ref[Tensor], int] | None = None
        self._seen = self._is_stale = False
        self._stale = self._fresh = 0
        self._was_bad: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.bad: Collection[int] = ()

    def look(self, tensors: Sequence[Tensor], first: int) -> None:
        """Looks at the first arrival of a backward, which is that of the parameter ``first``."""
        self._seen = False
        self.bad = self._still_bad(tensors, first) if self._was_bad else ()
        self._was_bad = {}
        if self._spent is None or self._spent[0] == first:
            return
        index, then, version = self._spent
        gradient = tensors[index].grad
        untouched = gradient is not None and then() is gradient and gradient._version == version
        # A write through .data may have zeroed it all the same.
        self._seen = untouched and gradient is not None and bool(gradient.any())

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
        self._is_stale, self._seen, self._spent = self._seen, False, None

    def forget(self) -> None:
        """Forgets the window, whose gradients were thrown away."""
        self._is_stale = self._seen = False

    def note_step(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> bool:
        """Notes the end of a step; returns whether enough steps in a row were stale."""
        self._stale = self._stale + 1 if self._is_stale else 0
        self._fresh += not self._is_stale
        self._is_stale = False
        self.looks = max(self._stale, self._fresh) < self.ENOUGH
        gradient = tensors[indices[0]].grad if indices else None
        self._spent = None
        if gradient is not None:
            self._spent = (indices[0], weakref.ref(gradient), gradient._version)
        return self._stale == self.ENOUGH
