"""GradientSnapshot: tells whether gradients have changed since they were measured.

It decides whether a step must measure the gradients again, and it does so without holding a
reference to them or reading their elements.
"""

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

    # ``Tensor._version`` is private, but it is how the autograd engine itself notices that a tensor
    # was written to: each in-place operation adds one to it (torch 2.4 to 2.13). Writes through
    # ``.data`` do not change it, and neither does a GradScaler when it unscales.

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Notes the state of the gradients now; later calls must pass them in the same order."""
        # Strong references would keep the gradients in memory after zero_grad(). Ids alone are not
        # enough: once a gradient is freed, a new tensor may get its id. Weak references show that a
        # gradient was freed. A sample of at most 16 is enough (all, if there are fewer): gradients
        # are freed together, and one weak reference per parameter would cost more than the rest.
        # As this runs in every step, the loops over all gradients (map) run in C.
        stride = 1 + len(gradients) // _WITNESSES
        self._references = list(map(weakref.ref, gradients[::stride]))
        self._ids = list(map(id, gradients))
        self._versions = list(map(_version, gradients))

    def subset(self, keep: Sequence[bool]) -> GradientSnapshot:
        """Returns the snapshot of the gradients for which ``keep`` is true."""
        part = GradientSnapshot(())
        # The sampled weak references need not be of these gradients, but all are freed together.
        part._references = list(self._references)
        part._ids = list(compress(self._ids, keep))
        part._versions = list(compress(self._versions, keep))
        return part

    def matches(self, gradients: Sequence[Tensor | None]) -> bool:
        """Returns whether these are the same tensors, and nothing has written into them since.

        Args:
            gradients: The current gradients of the same parameters; None for one without.

        Returns:
            False if any gradient was replaced, written to, added or removed.
        """
        # The ids are compared first: if they are equal, no gradient is None (which has no version).
        return (
            self._ids == list(map(id, gradients))
            and self._versions == list(map(_version, gradients))
            and self._alive()
        )

    def was_discarded(self, gradients: Iterable[Tensor | None], grew: Iterable[bool]) -> bool:
        """Returns whether the gradients were reset (``zero_grad()``) before the latest backward.

        Args:
            gradients: The gradients of the same parameters after the backward; None for one
                without.
            grew: For each gradient whether the backward added to it.

        Returns:
            True if every dense gradient that the backward added to had been reset before.
        """
        # A backward adds in place, which moves the version counter by one. A new tensor means that
        # zero_grad() came in between; a counter that moved by more than one means that
        # zero_grad(set_to_none=False) did, which writes zeros.
        alive = self._alive()
        grown = []
        then_and_now = zip(self._ids, self._versions, gradients, grew, strict=True)
        for identity, version, gradient, added in then_and_now:
            # Adding to a sparse gradient makes a new tensor, so its identity shows nothing.
            if added and gradient is not None and gradient.layout is torch.strided:
                moved = gradient._version - version
                if alive and identity == id(gradient) and moved <= 1:
                    return False  # zero_grad() resets all, so one kept gradient is enough
                grown.append((gradient, identity, moved))
        # Gradients that are views of one tensor, as the backward of torch.cat makes them, share a
        # version counter, and the backward has moved it by one for each of them.
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
