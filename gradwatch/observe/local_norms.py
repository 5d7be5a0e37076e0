"""LocalNorms: this rank's own gradients, before DistributedDataParallel makes them everybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.arrivals import on_accumulated
from gradwatch.observe.norms import gradient_norms, total_norm
from gradwatch.observe.parameters import ParameterTable


class LocalNorms:
    """Measures at the last moment before the reduction; takes part in none itself.

    A reducer works on copies and writes the result into the gradients at the end of the backward:
    until then one batched pass sees all of them. With ``gradient_as_bucket_view=True`` a gradient
    may be reduced as soon as it is there, and with ``static_graph=True`` the first reduction runs
    before anything else at the end: there, and where it is sparse, each is measured by itself as it
    arrives.
    """

    def __init__(self, wrappers: Sequence[DistributedDataParallel], table: ParameterTable) -> None:
        """Looks up which parameters are reduced.

        Args:
            wrappers: The wrappers that are, or are in, the watched model.
            table: The watched parameters.
        """
        self._table = table
        self._at_once = [(ddp, table.indices_of(_reduced_at_end(ddp))) for ddp in wrappers]
        self._one_by_one = [(ddp, table.indices_of(_reduced_early(ddp))) for ddp in wrappers]
        self._norm_type = 2.0
        self._taken: list[tuple[list[int], Tensor]] = []
        self._arriving: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, Tensor], table: ParameterTable
    ) -> LocalNorms | None:
        """Makes them for a model; None where nothing in it is wrapped."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
        return cls(wrappers, table) if wrappers else None

    def attach(self, norm_type: float) -> None:
        """Hangs hooks where gradients must be measured as they arrive.

        Args:
            norm_type: The p of the norms.
        """
        self._norm_type = norm_type
        for ddp, indices in self._one_by_one:
            for index in indices:
                tensor = self._table.tensors[index]
                if tensor.requires_grad:
                    self._handles.append(on_accumulated(tensor, partial(self._see, ddp, index)))

    def detach(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> None:
        """Measures at the end of a backward, when nothing has been written back yet."""
        arrived, self._arriving = self._arriving, {}
        self._taken = [(list(arrived), torch.stack(list(arrived.values())))] if arrived else []
        for ddp, indices in self._at_once:
            if ddp.require_backward_grad_sync:
                self._measure(indices)

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of some parameters before the newest reduction.

        Args:
            indices: The parameters.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None where nothing was reduced.
        """
        wanted = set(indices)
        parts = [
            norms if wanted.issuperset(there) else norms[[index in wanted for index in there]]
            for there, norms in self._taken
        ]
        return total_norm(torch.cat(parts), self._norm_type) if parts else None

    def _measure(self, indices: Sequence[int]) -> None:
        found = [(i, g) for i in indices if (g := self._table.tensors[i].grad) is not None]
        if found:
            norms = gradient_norms([gradient for _, gradient in found], self._norm_type)
            self._taken.append(([index for index, _ in found], norms))

    @torch.no_grad()
    def _see(self, ddp: DistributedDataParallel, index: int, tensor: Tensor) -> None:
        if ddp.require_backward_grad_sync and tensor.grad is not None:
            self._arriving[index] = gradient_norms([tensor.grad], self._norm_type)[0]


def _reduced_early(ddp: DistributedDataParallel) -> list[Tensor]:
    """Lists the parameters whose gradients may be reduced before all have arrived."""
    if ddp.gradient_as_bucket_view or ddp.static_graph:
        return list(ddp.module.parameters())
    sparse = [module for module in ddp.module.modules() if getattr(module, "sparse", False)]
    return [parameter for module in sparse for parameter in module.parameters(recurse=False)]


def _reduced_at_end(ddp: DistributedDataParallel) -> list[Tensor]:
    early = {id(parameter) for parameter in _reduced_early(ddp)}
    return [parameter for parameter in ddp.module.parameters() if id(parameter) not in early]
