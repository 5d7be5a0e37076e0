"""Parameters that a model has in place of those that are watched.

``model.to()`` keeps the parameters on most devices, and replaces them on others (XLA, tensors of a
class of their own), after ``torch.__future__.set_overwrite_module_params_on_conversion(True)``, and
where the model was on the meta device. With ``set_swap_module_params_on_conversion(True)`` they
stay the same objects, but lose the hooks that torch keeps in C++.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.context import REPLAY, is_replaying
from gradwatch.hooks.data_parallel import fully_sharded
from gradwatch.hooks.holding import ModelReference
from gradwatch.hooks.scripting import NotScripted, hide_from_scripting
from gradwatch.measure.parameters import ParameterTable, is_sharded


class ReplacedParameters:
    """Tells whether a model has other parameters, under the same names, than are watched."""

    def __init__(self, model: ModelReference, table: ParameterTable) -> None:
        """Notes what is watched now."""
        self._model = model
        self._table = table
        self._inside: dict[int, int] = {}
        # A move replaces all of them, so two tell. Their modules must not be kept alive.
        self._witnesses: list[tuple[weakref.ref[nn.Module], str, int]] = []
        self.note()

    def note(self) -> None:
        """Notes what is watched now, as it has changed."""
        self._inside = {id(tensor): _inside(tensor) for tensor in self._table.tensors}
        there = {id(t): (module, key) for module, key, t in _places(self._model.module())}
        few = [self._table.tensors[0], self._table.tensors[-1]] if self._table.tensors else []
        self._witnesses = [
            (weakref.ref(module), key, index)
            for index, tensor in zip((0, -1), few, strict=False)
            for module, key in [there.get(id(tensor), (None, ""))]
            if module is not None
        ]

    def seem(self) -> bool:
        """Returns whether parameters seem to be replaced; a few attribute reads."""
        tensors = self._table.tensors
        for reference, key, index in self._witnesses:
            module = reference()
            if module is None or not tensors:
                continue
            tensor, now = tensors[index], module._parameters.get(key)
            if now is not None and (now is not tensor or self._inside[id(now)] != _inside(now)):
                return not (REPLAY.under_way and is_replaying())
        return False

    def find(self, reshaped: bool) -> dict[int, Tensor]:
        """Finds the parameters that were replaced; reads all of them.

        Args:
            reshaped: Whether one may have another shape than before.

        Returns:
            By index what the model has in place of a watched tensor: another tensor, or the same
            without the hooks that it had. Empty if the model is gone, is sharded, or is no module.
        """
        model, table = self._model.module(), self._table
        if model is None or table.is_gone or (REPLAY.under_way and is_replaying()):
            return {}
        if next(fully_sharded(model), None) is not None:  # it replaces them in every forward
            return {}
        now = ParameterTable.of(model)
        known = table.positions()

        def replaces(new: Tensor | None, old: Tensor) -> bool:
            # Not the tensors of functional_call(), which are in the model for one call.
            if not isinstance(new, nn.Parameter) or id(new) in known or is_sharded(new):
                return False
            return reshaped or new.shape == old.shape

        named = dict(zip(now.names, now.tensors, strict=True))
        found: dict[int, Tensor] = {}
        for index, (name, tensor) in enumerate(zip(table.names, table.tensors, strict=True)):
            new = named.get(name)
            if new is tensor:
                if self._inside[id(tensor)] != _inside(tensor):
                    found[index] = tensor
            elif new is not None and replaces(new, tensor):
                found[index] = new
        return found


def _inside(tensor: Any) -> int:
    """Returns what tells apart the tensors that ``torch.utils.swap_tensors()`` puts into one."""
    # The address of the C++ object, which has the hooks (private, torch 2.4 to 2.13).
    address: int = getattr(tensor, "_cdata", 0)
    return address


def _places(model: nn.Module | None) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in () if model is None else model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    yield module, key, tensor


def revive_hooks(tensor: Any) -> bool:
    """Lets hooks be registered on a tensor whose C++ object was swapped; to be called without ours.

    Returns:
        False if it has hooks of others, which are as dead as new ones would be.
    """
    # Private, but there is no other way (torch 2.4 to 2.13): torch tells C++ of a dict of hooks
    # only once, and goes on with the dict that is there.
    for name in ("_post_accumulate_grad_hooks", "_backward_hooks"):
        if getattr(tensor, name, None):
            return False
        setattr(tensor, name, None)
    return True


class BeforeFirstBackward:
    """Has a function called before each forward of a model, until it is removed.

    A model is often moved after it is watched, and before it is trained.
    """

    def __init__(self, model: nn.Module | None, call: Callable[[], object]) -> None:
        """Hooks the model, if it is a module that runs hooks; None for none."""
        self._handle: RemovableHandle | None = None
        # In a module that is compiled in place a hook would be compiled, too.
        if model is None or isinstance(model, torch.jit.ScriptModule):
            return
        if model._compiled_call_impl is None:
            hide_from_scripting()
            self._handle = model.register_forward_pre_hook(_Hook(call))

    def remove(self) -> None:
        """Removes the hook; safe to call again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Hook(NotScripted):
    """The hook on a model; a copy of the model gets one that does nothing."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def __call__(self, module: nn.Module, args: Any) -> None:
        # In a compiled model this is a constant: nothing of the hook is left in its graph.
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._call()

    def __reduce__(self) -> tuple[Any, ...]:
        # Called with the module and its arguments, this returns the arguments.
        return getattr, ({}, "get")
