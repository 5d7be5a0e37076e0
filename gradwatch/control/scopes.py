"""Scopes: the norms that a policy is given, of all gradients, of each group or each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.control.settled import Settled

SCOPES = ("global", "group", "parameter")


class Scopes:
    """The parameters of one optimizer, and the groups that they are in."""

    def __init__(self, indices: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
        """Takes note of them.

        Args:
            indices: All parameters of the optimizer, ascending.
            groups: The same by parameter group.
        """
        self._indices = list(indices)
        place = {index: position for position, index in enumerate(self._indices)}
        self._group_of = [0] * len(self._indices)
        for number, members in enumerate(groups):
            for index in members:
                self._group_of[place[index]] = number
        self._groups = len(groups)
        self._tensors: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def norms(self, settled: Settled, scope: str, norm_type: float) -> Tensor:
        """Returns what a policy is given: tensor ``[n]``, one norm per group or parameter.

        Args:
            settled: Both sides of the clip so far.
            scope: ``"group"`` or ``"parameter"``.
            norm_type: The p of the norms.
        """
        norms = self._of_all(settled)
        if scope == "parameter":
            return norms
        groups = norms.new_zeros(self._groups)
        members = self._tensor(self._group_of, norms.device)
        if math.isinf(norm_type):
            return groups.scatter_reduce_(0, members, norms, "amax")
        return groups.index_add_(0, members, norms.pow(norm_type)).pow(1 / norm_type)

    def for_gradients(self, settled: Settled, scope: str, coefficients: Tensor) -> Tensor:
        """Returns the factor of each gradient that is there.

        Args:
            settled: Both sides of the clip so far.
            scope: ``"group"`` or ``"parameter"``.
            coefficients: Tensor ``[n]``, one per group or parameter.

        Returns:
            Tensor ``[number of gradients]``.
        """
        device = coefficients.device
        if scope == "group":
            coefficients = coefficients[self._tensor(self._group_of, device)]
        there = list(settled.after.indices)
        return coefficients if there == self._indices else coefficients[self._places(there, device)]

    def _of_all(self, settled: Settled) -> Tensor:
        norms, there = settled.true_norms(), list(settled.after.indices)
        if there == self._indices:
            return norms
        row = norms.new_zeros(len(self._indices))
        return row.index_copy_(0, self._places(there, norms.device), norms)

    def _places(self, there: Sequence[int], device: torch.device) -> Tensor:
        place = {index: position for position, index in enumerate(self._indices)}
        return self._tensor([place[index] for index in there], device)

    def _tensor(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Makes a tensor of whole numbers, once: the copy to a device waits for it."""
        key = (device, tuple(numbers))
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(list(numbers), dtype=torch.int64, device=device)
        return self._tensors[key]
