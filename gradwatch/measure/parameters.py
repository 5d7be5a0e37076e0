"""The watched parameters: tensors and names in model order, plain or sharded (DTensor)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Prefixes that torch.compile(), FSDP and activation checkpointing add to parameter names.
_WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# torch 2.4 already has a package with the public name, but without the class.
_DTENSOR_MODULE = (
    "torch.distributed._tensor" if torch.__version__ < "2.5" else "torch.distributed.tensor"
)


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """The watched tensors; index ``i`` means the same tensor in every field.

    Attributes:
        tensors: The leaf tensors, frozen ones included, in model order, each once.
        names: Their names in the user's model, free of wrapper prefixes.
        modules: For each tensor the name of the module that owns it.
        aliases: For each tensor its further names, if several modules share it (tied weights).
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
        """Returns the indices of the given tensors, ascending, each once; skips unknown tensors."""
        position = self.positions()
        return sorted({position[id(t)] for t in tensors if id(t) in position})


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, Mapping):
        yield from model.items()
        return
    module: nn.Module = model
    # Unwrapped here, as the prefix "module." cannot be removed from a name afterwards: the user
    # may have a submodule of that name.
    while isinstance(module, _WRAPPERS):
        module = module.module
    # With duplicates, to collect every name of a tied tensor.
    yield from module.named_parameters(remove_duplicate=False)


def _clean(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Lists the parameters of an optimizer, in the order of its parameter groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Returns whether a tensor is a DTensor."""
    # Importing torch's module takes long. If nobody has imported it, no DTensor exists.
    module: Any = sys.modules.get(_DTENSOR_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, as a plain tensor that shares its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part
