"""GradientSnapshot: tells whether gradients changed since they were measured; holds none."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

_WITNESSES = 16
_version = attrgetter("_version")


class GradientSnapshot:
    """The identity and the version counter of every gradient at one moment."""

    __slots__ = ("_ids", "_references", "_versions")

    # ``Tensor._version`` is private, but the autograd engine's own means to notice that a tensor
    # was written to: each in-place operation adds one (torch 2.4 to 2.13). What writes through
    # ``.data``, as a GradScaler does when it unscales, moves no counter.

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Looks at the gradients as they are now, in a fixed order."""
        # A reference to the gradients would keep them in memory. An id alone may be given to the
        # next tensor when a gradient is freed. Weak references to some of them, all of them in
        # small models, tell whether that has happened: gradients are freed together, and one weak
        # reference per parameter would cost more than the rest. Loops in C throughout, as this
        # runs in every step.
        stride = 1 + len(gradients) // _WITNESSES
        self._references = list(map(weakref.ref, gradients[::stride]))
        self._ids = list(map(id, gradients))
        self._versions = list(map(_version, gradients))

    def subset(self, keep: Sequence[bool]) -> GradientSnapshot:
        """Returns the snapshot of the gradients for which ``keep`` is true."""
        part = GradientSnapshot(())
        part._references = list(self._references)
        part._ids = list(compress(self._ids, keep))
        part._versions = list(compress(self._versions, keep))
        return part

    def matches(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tells whether these are the same tensors, and nothing wrote into them since.

        Args:
            gradients: Those of the parameters now, None where one has none.

        Returns:
            False as soon as one was replaced, written to, added or taken away.
        """
        # The ids first: with them equal no gradient is None, which has no version.
        return (
            self._ids == list(map(id, gradients))
            and self._versions == list(map(_version, gradients))
            and self._alive()
        )

    def was_discarded(self, gradients: Iterable[Tensor | None], grew: Iterable[bool]) -> bool:
        """Tells whether the gradients of this moment were thrown away before a backward added more.

        Args:
            gradients: Those of the same parameters after the backward; None where there is none.
            grew: For each whether the backward added to it.

        Returns:
            True where every dense gradient that grew had been reset.
        """
        # A backward adds in place, which moves the version counter by one. A new tensor means that
        # zero_grad() came between, a counter that moved further zero_grad(set_to_none=False).
        alive = self._alive()
        grown = []
        then_and_now = zip(self._ids, self._versions, gradients, grew, strict=True)
        for identity, version, gradient, added in then_and_now:
            # A sparse gradient is replaced by the sum, so that its identity tells nothing.
            if added and gradient is not None and gradient.layout is torch.strided:
                moved = gradient._version - version
                if alive and identity == id(gradient) and moved <= 1:
                    return False  # one that was kept tells that all were
                grown.append((gradient, identity, moved))
        # Gradients that are parts of one tensor, as torch.cat leaves them, share a counter, which
        # has moved by one for each of them.
        sharing = Counter(gradient.untyped_storage().data_ptr() for gradient, _, _ in grown)
        return bool(grown) and all(
            not alive or i != id(g) or moved > sharing[g.untyped_storage().data_ptr()]
            for g, i, moved in grown
        )

    def _alive(self) -> bool:
        for reference in self._references:  # noqa: SIM110 - a generator costs more than the loop
            if reference() is None:
                return False
        return True
