"""The watched parameters: tensors in model order with their names, each whole or sharded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What torch.compile(), FSDP and activation checkpointing put into the names of parameters.
_WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# torch 2.4 has a package of the public name too, without the class.
_DTENSOR_MODULE = (
    "torch.distributed._tensor" if torch.__version__ < "2.5" else "torch.distributed.tensor"
)


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
        """Lists the tensors of a module, or of a mapping from names to leaf tensors.

        Tied tensors are listed once, under their first name.
        """
        named: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in _named_tensors(model):
            # By id, not by the tensor: ``==`` between tensors compares their elements.
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
        """Returns the indices of those tensors that are in the table, in model order, each once."""
        position = self.positions()
        return sorted({position[id(t)] for t in tensors if id(t) in position})


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, Mapping):
        yield from model.items()
        return
    module: nn.Module = model
    # Their prefix "module." cannot be cut out of a name: a user may call a submodule so.
    while isinstance(module, _WRAPPERS):
        module = module.module
    # With duplicates, for the further names of tied tensors.
    yield from module.named_parameters(remove_duplicate=False)


def _clean(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Lists the parameters of all groups of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Tells whether a tensor is a DTensor."""
    # Importing torch's module takes long, and where nobody has there is no such tensor.
    module: Any = sys.modules.get(_DTENSOR_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor: a plain tensor that shares its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def is_partial(gradient: Tensor | None) -> bool:
    """Tells whether a gradient is a sum over ranks that has not been taken yet (Partial)."""
    return is_sharded(gradient) and any(p.is_partial() for p in gradient.placements)
