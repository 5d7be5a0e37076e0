"""ParameterTable: the watched tensors in model order, with the names that their user gave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """The watched tensors; index ``i`` means the same tensor in every field.

    Attributes:
        tensors: The leaf tensors, frozen ones included, in model order, each once.
        names: Their names in the user's model, free of wrapper prefixes.
        modules: The name of the module that owns each.
        aliases: Further names of a tensor that is used in several places (tied weights).
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    modules: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, Tensor]) -> ParameterTable:
        """Lists the tensors of a module or of a mapping of names.

        Args:
            model: The module, or a mapping from names to leaf tensors.

        Returns:
            The table, tied tensors listed once under their first name.
        """
        named: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in _named_tensors(model):
            named.setdefault(id(tensor), (tensor, []))[1].append(_clean(name))
        entries = list(named.values())
        return cls(
            tensors=tuple(tensor for tensor, _ in entries),
            names=tuple(names[0] for _, names in entries),
            modules=tuple(names[0].rpartition(".")[0] for _, names in entries),
            aliases=tuple(tuple(names[1:]) for _, names in entries),
        )

    def __len__(self) -> int:
        return len(self.tensors)

    def positions(self) -> dict[int, int]:
        """Maps ``id(tensor)`` to its index."""
        return {id(tensor): index for index, tensor in enumerate(self.tensors)}

    def indices_of(self, tensors: Iterable[Tensor]) -> list[int]:
        """Finds tensors in the table.

        Args:
            tensors: Any tensors, the parameters of an optimizer say.

        Returns:
            The indices of those that are in the table, in model order, each once.
        """
        position = self.positions()
        return sorted({position[id(t)] for t in tensors if id(t) in position})


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, Mapping):
        yield from model.items()
        return
    module: nn.Module = model
    while isinstance(module, _WRAPPERS):
        module = module.module
    yield from module.named_parameters(remove_duplicate=False)


def _clean(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Lists the parameters of all groups of an optimizer.

    Args:
        optimizer: Any optimizer.

    Returns:
        Its parameters in the order of its groups.
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
