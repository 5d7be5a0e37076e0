"""The forwards before the first backward, kept where bad gradients shall be explained.

A model is watched from its first backward on, and its first forward is over by then. A NaN in the
very first step is common, so the model's forwards are kept from when its optimizer was built.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.hooks.forwards import KeptForwards
from gradwatch.hooks.holding import ModelReference
from gradwatch.process.modules import NotedModules
from gradwatch.process.owners import owners_of, roots_in


class EarlyForwards:
    """Keeps forwards of models that are not watched yet."""

    def __init__(self, noted: NotedModules) -> None:
        """Keeps nothing yet; models are looked for among the noted modules first."""
        self._noted = noted
        self._kept: list[tuple[list[weakref.ref[nn.Module]], KeptForwards]] = []

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Keeps the forwards of the models of some optimizers from now on."""
        for owner in owners_of(optimizers, self._noted):
            model = owner.model()
            if isinstance(model, nn.Module) and self._find(model) is None:
                kept = KeptForwards(ModelReference(model, owner.model))
                kept.attach()
                # Not the model itself, which may have been made for this call.
                self._kept.append(([weakref.ref(one) for one in roots_in(model)], kept))

    def take(self, model: nn.Module | Mapping[str, Tensor]) -> KeptForwards | None:
        """Returns what was kept of a model, which is the caller's from now on; None if nothing."""
        found = self._find(model)
        self._kept = [one for one in self._kept if one[1] is not found]
        return found

    def end(self) -> None:
        """Drops what nobody has taken."""
        for _, kept in self._kept:
            kept.detach()
        self._kept = []

    def _find(self, model: nn.Module | Mapping[str, Tensor]) -> KeptForwards | None:
        wanted = [id(one) for one in roots_in(model)]
        for roots, kept in self._kept:
            if wanted and [id(ref()) for ref in roots] == wanted:
                return kept
        return None
