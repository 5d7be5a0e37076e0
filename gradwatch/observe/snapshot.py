"""GradientSnapshot: tells whether gradients changed since they were measured; holds none."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import compress
from operator import is_

import torch
from torch import Tensor


class GradientSnapshot:
    """The identity and the version counter of every gradient at one moment.

    Weak references stand for the tensors: an ``id`` may be given to the next gradient when this
    one is freed, and a real reference would keep it in memory.
    """

    __slots__ = ("_references", "_versions")

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Looks at the gradients as they are now.

        Args:
            gradients: Those of the parameters that have one, in a fixed order.
        """
        self._references = [weakref.ref(gradient) for gradient in gradients]
        self._versions = [gradient._version for gradient in gradients]

    def subset(self, keep: Sequence[bool]) -> GradientSnapshot:
        """Returns the snapshot of some of the gradients.

        Args:
            keep: For each gradient whether it stays.
        """
        part = GradientSnapshot(())
        part._references = list(compress(self._references, keep))
        part._versions = list(compress(self._versions, keep))
        return part

    def matches(self, gradients: Sequence[Tensor]) -> bool:
        """Tells whether these are the same tensors, and nothing wrote into them since.

        Args:
            gradients: Those of the parameters that have one now.

        Returns:
            False as soon as one was replaced, written to, added or taken away.
        """
        return self._same_tensors(gradients) and self._versions == [g._version for g in gradients]

    def was_discarded(self, gradients: Sequence[Tensor | None], grew: Sequence[bool]) -> bool:
        """Tells whether the gradients of this moment were thrown away before a backward added more.

        A backward adds in place, which moves the version counter by one. A new tensor means
        ``zero_grad()`` came between, a counter that moved further ``zero_grad(set_to_none=False)``.

        Args:
            gradients: Those of the same parameters after the backward; None where there is none.
            grew: For each whether the backward added to it.

        Returns:
            True where every dense gradient that grew had been reset.
        """
        resets = [
            reference() is not gradient or gradient._version > version + 1
            for reference, version, gradient, added in zip(
                self._references, self._versions, gradients, grew, strict=True
            )
            if added and gradient is not None and gradient.layout is torch.strided
        ]
        return bool(resets) and all(resets)

    def _same_tensors(self, gradients: Sequence[Tensor]) -> bool:
        references = self._references
        return len(references) == len(gradients) and all(
            map(is_, [reference() for reference in references], gradients)
        )
