"""Owners: which columns belong to which of several optimizers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.batch import NO_GRADIENT


class Owners:
    """Tells whose parameters are whose, from who had gradients.

    Every row of a batch has a column for every watched parameter. Written so for each of many
    optimizers they would be a square, of which all but the diagonal is empty.
    """

    def __init__(self, parameters: int) -> None:
        """Starts with nothing seen.

        Args:
            parameters: Number of columns.
        """
        self._seen: dict[str, NDArray[np.bool_]] = {}
        self._owned = np.zeros(parameters, np.bool_)

    def see(self, optimizer: str, norms: NDArray[np.floating[Any]]) -> None:
        """Notes where an optimizer had gradients.

        Args:
            optimizer: Its label.
            norms: float array ``[steps, parameters]``: the norms of steps of it.
        """
        present = (norms != NO_GRADIENT).any(axis=0)
        self._seen[optimizer] = present | self._seen.get(optimizer, False)
        self._owned |= present

    def columns(self, optimizer: str) -> NDArray[np.intp]:
        """Lists the columns of an optimizer.

        Args:
            optimizer: Its label, seen before.

        Returns:
            intp array: rising; those where it had a gradient, and those where nobody had.
        """
        return np.flatnonzero(self._seen[optimizer] | ~self._owned)
