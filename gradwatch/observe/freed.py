"""FreedGradients: gradients that a hook of the user uses up and frees inside the backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.norms import gradient_norms, total_norm
from gradwatch.observe.readings import Reading


class FreedGradients:
    """Measures each gradient before it reaches the parameter, where it is gone afterwards.

    Where no gradient is left from an earlier backward, what reaches the parameter is its gradient.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet.

        Args:
            tensors: The tensors of the parameter table.
        """
        self._tensors = tensors
        self._norm_type = 2.0
        self._handles: dict[int, RemovableHandle] = {}
        self._norms: dict[int, Tensor] = {}

    def attach(self, indices: Iterable[int], norm_type: float) -> None:
        """Begins with the parameters that a hook of the user is waiting for already.

        Args:
            indices: The watched parameters, which carry no hook of gradwatch yet.
            norm_type: The p of the norms.
        """
        self._norm_type = norm_type
        hooked = [i for i in indices if getattr(self._tensors[i], "_post_accumulate_grad_hooks", 0)]
        self.watch(hooked)

    def watch(self, indices: Iterable[int]) -> None:
        """Measures the gradients of some parameters from the next backward on."""
        for index in indices:
            if index not in self._handles and self._tensors[index].requires_grad:
                hook = partial(self._see, index)
                self._handles[index] = self._tensors[index].register_hook(hook)  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def take(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of the gradients that are gone at the end of a backward.

        Args:
            arrived: The parameters that received one.

        Returns:
            Tensors ``[]`` by index. Where one is missing, the next backward will have it.
        """
        norms, self._norms = self._norms, {}
        gone = [index for index in arrived if self._tensors[index].grad is None]
        self.watch(gone)
        return {index: norms[index] for index in gone if index in norms}

    @torch.no_grad()
    def _see(self, index: int, gradient: Tensor) -> None:
        self._norms[index] = gradient_norms([gradient], self._norm_type)[0]


def with_freed(
    measurement: Measurement, freed: Mapping[int, Tensor], norm_type: float
) -> Measurement:
    """Adds the norms of gradients that are gone to those of gradients that are there.

    Args:
        measurement: What was measured at the end of the backward.
        freed: Norms by index.
        norm_type: The p of the norms.

    Returns:
        The measurement that a pass over all of them would have given.
    """
    norms = dict(zip(measurement.indices, measurement.norms.tensor.unbind(), strict=True))
    norms.update(freed)
    indices = sorted(norms)
    row = torch.stack([norms[index] for index in indices])
    return Measurement(indices, Reading(row), Reading(total_norm(row, norm_type)))
