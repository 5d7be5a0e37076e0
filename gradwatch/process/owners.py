"""Which model the parameters of an optimizer belong to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.measure.parameters import optimizer_parameters, unwrapped


class Owner:
    """A model that optimizers train; refers to its modules weakly."""

    def __init__(
        self,
        label: str,
        optimizers: list[Optimizer],
        model: Callable[[], nn.Module | Mapping[str, Tensor] | None],
    ) -> None:
        self.label = label
        self.optimizers = optimizers
        self.model = model


def owners_of(optimizers: Sequence[Optimizer]) -> list[Owner]:
    """Finds the models of optimizers."""
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    owners: dict[int, Owner] = {}
    for optimizer in optimizers:
        wanted = set(map(id, optimizer_parameters(optimizer)))
        holding = [m for m in modules if wanted <= set(map(id, m.parameters()))]
        inner = {id(one) for m in holding for one in m.modules() if one is not m}
        outer = [m for m in holding if id(m) not in inner]
        if outer:
            name = type(unwrapped(outer[0])).__name__
            owner = owners.setdefault(id(outer[0]), Owner(name, [], weakref.ref(outer[0])))
            owner.optimizers.append(optimizer)
    return list(owners.values())
