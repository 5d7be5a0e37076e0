"""Tensors inside tuples, lists, dicts and records, as models take and return them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], path: str) -> Any:
    """Rebuilds a structure with other tensors; what it does not know stays as it is.

    Args:
        value: A tensor, or tuples, lists, dicts and dataclasses with tensors in them.
        change: Given where a tensor is and the tensor, returns what comes in its place.
        path: What the structure is called.

    Returns:
        A structure of the same kind.

    Example:
        >>> import torch
        >>> map_tensors({"a": [torch.ones(1), 5]}, lambda path, tensor: path, "x")
        {'a': ["x['a'][0]", 5]}
    """
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return _with_items(
            value, {k: map_tensors(v, change, f"{path}[{k!r}]") for k, v in value.items()}
        )
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change, f"{path}[{i}]") for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(getattr(value, field.name), change, f"{path}.{field.name}")
            object.__setattr__(fresh, field.name, item)
        return fresh
    return value


def tensors_in(value: Any, path: str) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a structure with their places.

    Args:
        value: The structure.
        path: What it is called.

    Returns:
        Pairs of a place and a tensor, in order.
    """
    found: list[tuple[str, Tensor]] = []
    map_tensors(value, lambda place, tensor: found.append((place, tensor)), path)
    return found


def is_continuous(tensor: Tensor) -> bool:
    """Tells whether a tensor holds real or complex numbers, which alone have derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    fresh = copy.copy(value)
    fresh.update(items)
    return fresh
