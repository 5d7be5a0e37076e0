"""The watched parameters: tensors and names in model order, plain or sharded (DTensor)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# By the attribute under which a wrapper of torch's holds the user's module: home and name of the
# wrapper's class. Only there it is cut out of names: a user may call a submodule "module".
_WRAPPERS = {
    "module": (
        ("torch.nn.parallel.data_parallel", "DataParallel"),
        ("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ("torch.optim.swa_utils", "AveragedModel"),
    ),
    "_orig_mod": (("torch._dynamo.eval_frame", "OptimizedModule"),),
    "_fsdp_wrapped_module": (
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
    ),
    "_checkpoint_wrapped_module": (
        ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
    ),
    # Ours, around a model and parameters that are not in it.
    "(model)": (("gradwatch.process.owners", "Together"),),
    "(loose)": (("gradwatch.process.owners", "Together"),),
}
_PROBE = "_gradwatch_probe"
_OF_FABRIC = ("_forward_module", "_original_module")
# In a mapping nobody can tell whose these are. No user calls a module like that.
_PREFIXES = tuple(f"{name}." for name in (*_WRAPPERS, *_OF_FABRIC) if name.startswith("_"))

# torch 2.4 already has a package with the public name, but without the class.
_DTENSOR_MODULE = (
    "torch.distributed._tensor" if torch.__version__ < "2.5" else "torch.distributed.tensor"
)


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """The watched tensors; index ``i`` means the same tensor in every field.

    Attributes:
        tensors: The leaf tensors, frozen ones included, in model order, each once; empty after
            :meth:`let_go`. Whoever needs them all shares this list and makes none of its own.
        names: Their names in the user's model, free of wrapper prefixes, each different. Where two
            would be the same without the prefixes, these stay.
        modules: For each tensor the name of the module that owns it.
        aliases: For each tensor its further names, if several modules share it (tied weights).
    """

    tensors: list[Tensor]
    names: tuple[str, ...]
    modules: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    _elements: list[int] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, Tensor]) -> ParameterTable:
        """Lists the tensors of a module, or of a mapping from names to leaf tensors.

        Tied tensors are listed once, under their first name.
        """
        named: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in _each_different(list(_named_tensors(model))):
            # By id, not by the tensor: ``==`` between tensors compares their elements.
            names = named.setdefault(id(tensor), (tensor, []))[1]
            if name not in names:  # a wrapper may hold the same module twice
                names.append(name)
        entries = list(named.values())
        return cls(
            tensors=[tensor for tensor, _ in entries],
            names=tuple(names[0] for _, names in entries),
            modules=tuple(names[0].rpartition(".")[0] for _, names in entries),
            aliases=tuple(tuple(names[1:]) for _, names in entries),
        )

    def __len__(self) -> int:
        return len(self.names)

    def let_go(self) -> None:
        """Drops the tensors, and keeps what is said about them; safe to call again."""
        self._elements.extend(tensor.numel() for tensor in self.tensors)
        self.tensors.clear()

    @property
    def is_gone(self) -> bool:
        """Whether the tensors were let go."""
        return not self.tensors and bool(self.names)

    def elements(self, index: int) -> int:
        """Returns the number of elements of a tensor, also after it was let go."""
        return self.tensors[index].numel() if self.tensors else self._elements[index]

    def positions(self) -> dict[int, int]:
        """Maps ``id(tensor)`` to its index."""
        return {id(tensor): index for index, tensor in enumerate(self.tensors)}

    def indices_of(self, tensors: Iterable[Tensor]) -> list[int]:
        """Returns the indices of the given tensors, ascending, each once; skips unknown tensors."""
        position = self.positions()
        return sorted({position[id(t)] for t in tensors if id(t) in position})


def wraps(module: object, attribute: str) -> bool:
    """Returns whether a module is a wrapper of torch's that holds the user's as that attribute.

    Args:
        module: Any object.
        attribute: ``"module"`` (data parallel), ``"_orig_mod"`` (``torch.compile``),
            ``"_fsdp_wrapped_module"`` or ``"_checkpoint_wrapped_module"``; False for any other.
    """
    # Importing torch's modules takes long. If nobody has imported one, no such wrapper exists.
    classes = (
        getattr(sys.modules.get(home), name, None) for home, name in _WRAPPERS.get(attribute, ())
    )
    return any(one is not None and isinstance(module, one) for one in classes)


def unwrapped(model: Any) -> Any:
    """Returns the module inside data-parallel wrappers and wrappers of torch.compile."""
    # In any order and more than once: a compiled DDP of a compiled module is common.
    while found := [name for name in ("module", "_orig_mod") if wraps(model, name)]:
        model = getattr(model, found[0])
    return model


def forward_of(module: Any) -> Any:
    """Returns the forward that has names for the arguments: of a wrapper, or of what is in it."""
    module = unwrapped(module)
    while isinstance(module, nn.Module) and (keys := wrapped_keys(module)):
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or code.co_argcount + code.co_kwonlyargcount > 1:  # not only self
            break
        module = unwrapped(module.get_submodule(keys[0]))
    return module.forward


def wrapped_keys(module: nn.Module) -> list[str]:
    """Returns under which names a wrapper holds what it stands for; empty for any other module.

    Wrappers are those of torch, and a module of any other library (Fabric, PEFT) that holds one
    other module and no parameters, and whose attributes are those of that module.
    """
    children = [(key, one) for key, one in module._modules.items() if one is not None]
    keys = [key for key, _ in children if wraps(module, key)]
    # Nearly all modules have the __getattr__() of nn.Module, which finds nothing in children.
    if keys or not children or type(module).__getattr__ is nn.Module.__getattr__:
        return keys
    key, first = children[0]
    inside = set(map(id, first.modules()))
    # Fabric's also holds the module as the user gave it.
    alone = all(id(one) in inside for _, one in children)
    is_bare = not any(one is not None for one in module._parameters.values())
    return [key] if alone and is_bare and _passes_on(module, first) else []


def _passes_on(wrapper: nn.Module, inner: nn.Module) -> bool:
    """Returns whether a wrapper passes a look-up of attributes on to the module inside."""
    # An attribute of the user's may have the name of one of the wrapper's, so one is made up.
    probe, inside = object(), vars(inner)
    inside[_PROBE] = probe
    try:
        if getattr(wrapper, _PROBE, None) is probe:
            return True
    except Exception:  # code of another library
        return False
    finally:
        del inside[_PROBE]
    # It may pass on to what is inside of another wrapper, such as that of DDP.
    return any(_passes_on(wrapper, inner.get_submodule(key)) for key in wrapped_keys(inner))


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields ``(name, full name, module)`` of each module inside, parents first.

    The full name is that of ``model.named_modules()``; the name leaves out what wrappers add to it
    (:func:`wrapped_keys`). A module that is used in several places comes several times.
    """
    waiting = [("", "", model)]
    while waiting:
        name, full, module = waiting.pop()
        yield name, full, module
        keys = wrapped_keys(module)
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        waiting += [
            (name if key in keys else _join(name, key), _join(full, key), child)
            for key, child in reversed(children)
            if not keys or key in keys or wraps(module, keys[0])
        ]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _named_tensors(
    model: nn.Module | Mapping[str, Tensor],
) -> Iterator[tuple[str, str, Tensor]]:
    """Yields each tensor under every name of it, free of prefixes and in full."""
    if isinstance(model, Mapping):
        yield from ((_without_prefixes(name), name, tensor) for name, tensor in model.items())
        return
    for name, full, module in named_modules(model):
        for key, tensor in module._parameters.items():
            if tensor is not None:
                yield _join(name, key), _join(full, key), tensor


def _without_prefixes(name: str) -> str:
    short = name
    for prefix in _PREFIXES:
        short = short.replace(prefix, "")
    return short or name


def _each_different(named: Sequence[tuple[str, str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields names of which none stands for two tensors: the full ones where short ones would."""
    owners: dict[str, set[int]] = {}
    for name, _, tensor in named:
        owners.setdefault(name, set()).add(id(tensor))
    taken: dict[str, int] = {}
    for name, full, tensor in named:
        chosen = candidate = name if len(owners[name]) == 1 else full
        copy = 1
        # Only names with dots of their own can still be the same, as in a mapping.
        while taken.setdefault(chosen, id(tensor)) != id(tensor):
            copy += 1
            chosen = f"{candidate}#{copy}"
        yield chosen, tensor


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


def readable_part(weight: Tensor) -> Tensor:
    """Returns this rank's part of a weight, as numbers that can be calculated with.

    A quantized weight is a tensor of a class of its own, which can do what a forward and an
    optimizer ask of it, and little else; this returns its values.
    """
    part = local_part(weight)
    is_quantized = type(part).dequantize is not Tensor.dequantize
    return part.dequantize() if is_quantized else part
