"""StandIns: the tensors that a replay computes with, in place of those of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class ReplayError(RuntimeError):
    """A micro-batch cannot be run again; the message is a sentence that says why."""


class NoLossError(ReplayError):
    """A closure has returned no loss, and has run no backward."""


class StandIns:
    """Copies of tensors, one for each, however often it is asked for.

    A copy is a leaf that requires a gradient if its original does. No hook of the original is on
    it, and its ``.grad`` is its own. The copy of a tensor that was computed is no leaf, as some
    code writes to such a tensor in place; its gradient ends there.

    Attributes:
        by_id: The copies, by the ``id()`` of the original.
        swapped: Returns what stands in for another object, such as an iterator, or the object.
    """

    def __init__(self) -> None:
        """Has no copy yet."""
        self.by_id: dict[int, Tensor] = {}
        self.swapped: Callable[[Any], Any] = lambda value: value
        self._originals: list[Tensor] = []  # ids are only good while these are there

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the copy of a tensor.

        Raises:
            ReplayError: If it cannot be copied on this rank alone, or has no values yet.
        """
        found = self.by_id.get(id(tensor))
        if found is None:
            self._originals.append(tensor)
            found = self.by_id[id(tensor)] = _copy(tensor)
            self.by_id[id(found)] = found  # it may be found in a place where it was put
        return found

    def is_known(self, tensor: Tensor) -> bool:
        """Returns whether a tensor has a copy."""
        return id(tensor) in self.by_id


def _copy(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "to_local"):  # a DTensor; not every build of torch can import the class
        raise ReplayError(
            "The model is sharded over ranks (FSDP2 or tensor parallel), so that one rank cannot "
            "run it again by itself."
        )
    if is_lazy(tensor):
        raise ReplayError("The model has lazy parameters or buffers that have no shape yet.")
    with torch.no_grad():
        copied = tensor.detach().clone()
    # Not isinstance(), which is also true of tensors of other classes that are marked so.
    if issubclass(type(tensor), nn.Parameter):
        copied = torch.Tensor._make_subclass(type(tensor), copied, tensor.requires_grad)
    else:
        copied.requires_grad_(tensor.requires_grad)
    for name, value in vars(tensor).items():  # marks that frameworks and users have put there
        vars(copied).setdefault(name, value)
    return copied if tensor.is_leaf or not tensor.requires_grad else copied.clone()


def rebuilt(value: tuple[Any, ...], items: Iterable[Any]) -> tuple[Any, ...]:
    """Returns a tuple of the same class with other items."""
    kind: Any = type(value)
    try:
        # Not with the constructor: a named tuple takes its items one by one.
        return tuple.__new__(kind, items)
    except TypeError:  # what torch.max() and its like return
        return kind(items)  # type: ignore[no-any-return]
