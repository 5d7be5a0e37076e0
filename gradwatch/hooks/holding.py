"""Who keeps whom alive: a watcher its model, and a model the watcher that nobody else holds.

Nothing that torch holds in C++ may lead back to a parameter: the garbage collector cannot see it,
and would collect none of it. So hooks on tensors refer to gradwatch's objects weakly, by a function
that is given a weak reference.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Model: TypeAlias = nn.Module | Mapping[str, Tensor]

T = TypeVar("T")

_ATTRIBUTE = "_watched_by_gradwatch"


class ModelReference:
    """The watched model; calling it returns the model, or None once it is gone.

    It holds the model, as that may be a list of modules that was made for ``watch()`` alone; unless
    it was given a function that returns the model, which is then asked each time.
    """

    __slots__ = ("_ask", "_held")

    def __init__(self, model: Model, model_of: Callable[[], Model | None] | None = None) -> None:
        """Holds the model, if there is no ``model_of`` to ask for it."""
        self._held = model if model_of is None else None
        self._ask = model_of

    def __call__(self) -> Model | None:
        """Returns the model; None if the program has dropped it."""
        return self._held if self._ask is None else self._ask()

    def module(self) -> nn.Module | None:
        """Returns the model if it is there, and is a module rather than a mapping of tensors."""
        model = self()
        return model if isinstance(model, nn.Module) else None

    def or_nothing(self) -> Model:
        """Returns the model; an empty mapping if it is gone."""
        model = self()
        return {} if model is None else model

    def loosen(self) -> None:
        """Keeps the model alive no longer, and returns it for as long as it is there."""
        if self._held is not None:
            self._ask, self._held = _weakly(self._held), None


def _weakly(model: Model) -> Callable[[], Model | None]:
    if isinstance(model, Mapping):
        tensors = {name: weakref.ref(tensor) for name, tensor in model.items()}
        return lambda: _tensors_there(tensors)
    root, children = weakref.ref(model), dict(model.named_children())
    parts = {name: weakref.ref(child) for name, child in children.items()}

    def model_of() -> nn.Module | None:
        whole = root()
        if whole is not None:
            return whole
        # It may have been made for watch() alone. The modules in it keep their names.
        there = {name: child for name, part in parts.items() if (child := part()) is not None}
        stand_in = nn.Module()
        stand_in._modules.update(there)
        return stand_in if there else None

    return model_of


def _tensors_there(tensors: Mapping[str, weakref.ref[Tensor]]) -> dict[str, Tensor] | None:
    there = {name: tensor for name, one in tensors.items() if (tensor := one()) is not None}
    return there or None


class _Holder:
    """Stands among the hooks of a module, and holds a watcher; a copy of it holds nothing."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __call__(self, module: nn.Module, keys: Any) -> None:
        """Does nothing after a ``load_state_dict()`` of the module."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes any arguments and returns None. No gradwatch is needed where a pickled model is
        # loaded.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _HolderOfTensor(_Holder):
    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load(weights_only=True) accepts


class HeldByModel:
    """Has the modules of a model hold an object, for as long as any of them lives.

    The garbage collector sees it, and so collects the model with the object if nobody else holds
    either. The hooks that are used are called by ``load_state_dict()`` only.
    """

    def __init__(self, model: Model, held: object) -> None:
        """Begins to hold; the tensors of a mapping hold the object as an attribute."""
        self._handles: list[RemovableHandle] = []
        self._others: list[weakref.ref[Any]] = []
        if isinstance(model, nn.Module):
            holder = _Holder(held)
            for module in model.modules():
                if isinstance(module, torch.jit.ScriptModule):  # which has no such hooks
                    self._set_on(module, holder)
                else:
                    handle = module.register_load_state_dict_post_hook(holder)  # type: ignore[no-untyped-call]
                    self._handles.append(handle)
            return
        for tensor in model.values():
            self._set_on(tensor, _HolderOfTensor(held))

    def _set_on(self, one: object, holder: _Holder) -> None:
        vars(one)[_ATTRIBUTE] = holder  # not with setattr(), which a scripted module refuses
        self._others.append(weakref.ref(one))

    def end(self) -> None:
        """Holds the object no longer; safe to call again."""
        for handle in self._handles:
            handle.remove()
        for reference in self._others:
            one = reference()
            if one is not None:
                vars(one).pop(_ATTRIBUTE, None)
        self._handles, self._others = [], []


def call_when_gone(objects: Sequence[T], call: Callable[[], None]) -> list[weakref.ref[T]]:
    """Calls a function whenever one of some objects is gone, for as long as the result is kept.

    It may be called at any moment, in any thread: ``call`` must be cheap, wait for nothing and hold
    none of the objects.
    """

    def gone(reference: object) -> None:
        try:
            call()
        except Exception:  # nobody could catch it, and Python would print it
            return

    return [weakref.ref(one, gone) for one in objects]
