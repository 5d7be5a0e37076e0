"""Splitting a batch into parts of equal size along dimension 0, each in its structure."""

from __future__ import annotations

import copy
import enum
import numbers
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradwatch.checks import described

CALL = "watcher.micro_batches"
SIZE = "{name}(size=) must be a whole number of examples, at least 1, got {size}. Write 1 or more."
UNEQUAL = (
    "{name}() got a batch in which {first} has {first_length} examples and {other} has "
    "{other_length}, so it is not clear where to cut it. Put the examples on dimension 0 of every "
    "tensor, and leave out of the batch what is not per example."
)
NO_EXAMPLES = (
    "{name}() got a batch of type {kind} without a tensor, an array or a list of examples: there "
    "is nothing to cut. Pass a tensor, or tuples, lists and dicts of tensors."
)
EMPTY = "{name}() got a batch of no examples: {path} has length 0. Leave empty batches out."
NOT_CUT = (
    "{name}() got a {kind} at {path}, which cannot be cut along dimension 0. Pass a padded tensor "
    "and its lengths, and build the {kind} from them in the loop."
)
UNKNOWN = (
    "{name}() got a {kind} at {path}, and cannot tell whether it holds examples. Pass its tensors "
    "in a dict, register the class with torch.utils._pytree.register_pytree_node, or leave it out "
    "of the batch."
)

_SAME_IN_EACH_PART = (
    *(str, bytes, numbers.Number, np.generic, np.dtype, enum.Enum, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.Size),
)
_LAYOUTS = (torch.strided, torch.sparse_coo)
# One level of a container: the paths of its items as the user would write them, the items, and a
# function that rebuilds the container from other items.
_Level = tuple[list[str], list[Any], Callable[[list[Any]], Any]]


def split_batch(batch: Any, size: int, name: str = CALL) -> list[tuple[Any, int]]:
    """Splits a batch into parts of equal size, which differ by at most one example.

    Tensors and arrays are cut along dimension 0 and share the memory of the batch (sparse tensors
    are copied). A list or tuple that contains no tensor is cut if it has one item per example.
    Numbers, strings, None and tensors ``[]`` are the same in each part.

    Args:
        batch: A tensor or array, or a tuple, list, mapping or registered pytree class of them.
        size: The most examples in a part, at least 1.
        name: How error messages call the function, as the user wrote it.

    Returns:
        The parts in the structure of the batch, each with its number of examples.

    Raises:
        TypeError: If the size is not an integer, or something cannot be cut.
        ValueError: If the size is below 1, the batch is empty, or its lengths differ.

    Example:
        >>> [count for _, count in split_batch(torch.zeros(9, 3), size=8)]
        [5, 4]
    """
    if type(size) is not int or size < 1:  # a bool is an int too
        text = SIZE.format(name=name, size=described(size))
        raise ValueError(text) if type(size) is int else TypeError(text)
    length = batch_length(batch, name)
    cut, count = _Cut(name, length), _count(length, size)
    bounds = pairwise(-(-part * length // count) for part in range(count + 1))  # larger parts first
    parts = [(cut(batch, "batch", start, end - start), end - start) for start, end in bounds]
    return parts if count > 1 else [(batch, length)]


def largest_part(length: int, size: int) -> int:
    """Returns the number of examples in the first part of a split batch, which is the largest.

    Example:
        >>> largest_part(9, size=8)
        5
    """
    return -(-length // _count(length, size))


def batch_length(batch: Any, name: str = CALL) -> int:
    """Returns the number of examples in a batch, as :func:`split_batch` accepts it.

    This is the length of dimension 0 of its tensors and arrays, or the length of its lists if it
    has neither.

    Raises:
        TypeError: If there is nothing to count, or a tensor cannot be cut.
        ValueError: If the batch is empty, or its lengths differ.
    """
    # Everything is checked before anything is cut, so that an error comes before a backward.
    leaves = list(_leaves(batch, "batch"))
    for path, leaf in leaves:
        _check_can_be_cut(name, path, leaf)
    lengths = [(p, int(leaf.shape[0])) for p, leaf in leaves if _is_array(leaf) and leaf.ndim]
    lengths = lengths or [(path, len(leaf)) for path, leaf in leaves if _is_list(leaf)]
    if not lengths:
        raise TypeError(NO_EXAMPLES.format(name=name, kind=type(batch).__name__))
    first, length = lengths[0]
    for other, found in lengths:
        if found != length:
            clash = {"first": first, "first_length": length, "other": other, "other_length": found}
            raise ValueError(UNEQUAL.format(name=name, **clash))
    if length == 0:
        raise ValueError(EMPTY.format(name=name, path=first))
    return length


def _count(length: int, size: int) -> int:
    return -(-length // size)


class _Cut:
    """Returns ``count`` examples, from ``start`` on, of a batch of ``length`` examples."""

    def __init__(self, name: str, length: int) -> None:
        self._name, self._length = name, length

    def __call__(self, value: Any, path: str, start: int, count: int) -> Any:
        if _is_array(value):
            return _narrow(value, start, count)
        if _is_list(value) and self._has_one_per_example(value):
            return value[start : start + count]
        level = _level(value)
        if level is not None:
            keys, items, rebuild = level
            pairs = zip(keys, items, strict=True)
            return rebuild([self(item, path + key, start, count) for key, item in pairs])
        if isinstance(value, _SAME_IN_EACH_PART) or _is_list(value) or callable(value):
            return value
        raise TypeError(UNKNOWN.format(name=self._name, path=path, kind=type(value).__name__))

    def _has_one_per_example(self, value: list[Any] | tuple[Any, ...]) -> bool:
        if len(value) != self._length or _is_flat(value):
            return len(value) == self._length and len(value) > 0
        leaves = [leaf for _, leaf in _leaves(value, "")]
        lists = [len(leaf) for leaf in leaves if _is_list(leaf)]
        # Two lists of two strings are ambiguous: they count as two columns of a collated batch, not
        # as two examples.
        columns = bool(lists) and all(length == self._length for length in lists)
        return not columns and not any(_is_array(leaf) for leaf in leaves)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    level = _level(value)
    if level is None:
        yield path, value
        return
    for key, item in zip(level[0], level[1], strict=True):
        yield from _leaves(item, path + key)


def _level(value: Any) -> _Level | None:
    """Splits one level of a container; None for a leaf: a tensor, a plain list, a number."""
    if isinstance(value, (Tensor, np.ndarray, PackedSequence, *_SAME_IN_EACH_PART)):
        return None
    if _is_list(value) and _is_flat(value):
        return None
    # One level only: flattened completely, a list of examples would become single strings.
    items, spec = pytree.tree_flatten(value, is_leaf=lambda one: one is not value)
    if len(items) == 1 and items[0] is value:
        return _mapping_level(value) if isinstance(value, Mapping) else None
    return _keys(value, len(items)), items, lambda new: pytree.tree_unflatten(new, spec)


def _mapping_level(value: Mapping[Any, Any]) -> _Level:
    def rebuild(items: list[Any]) -> Mapping[Any, Any]:
        # Keep the class: a BatchEncoding of transformers gives its items as attributes, too.
        same = copy.copy(value) if isinstance(value, MutableMapping) else {}
        same.update(zip(value, items, strict=True))
        return same

    return [f"[{key!r}]" for key in value], list(value.values()), rebuild


def _keys(value: Any, count: int) -> list[str]:
    try:
        found, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda one: one is not value)
    except ValueError:  # a pytree class that was registered without names for its fields
        return [f"[{index}]" for index in range(count)]
    return ["".join(map(str, path)) for path, _ in found]


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


def _is_flat(value: list[Any] | tuple[Any, ...]) -> bool:
    parts = (list, tuple, Tensor, np.ndarray)
    items = [item for item in value if not isinstance(item, _SAME_IN_EACH_PART)]
    return len(value) > 0 and not any(isinstance(i, parts) or _level(i) for i in items)


def _check_can_be_cut(name: str, path: str, leaf: Any) -> None:
    kind = "PackedSequence" if isinstance(leaf, PackedSequence) else ""
    if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout not in _LAYOUTS):
        kind = f"{'nested' if leaf.is_nested else leaf.layout} tensor"
    if kind:
        raise TypeError(NOT_CUT.format(name=name, kind=kind, path=path))


def _narrow(value: Any, start: int, count: int) -> Any:
    if value.ndim == 0 or not isinstance(value, Tensor):
        return value if value.ndim == 0 else value[start : start + count]
    # A sparse tensor cannot be viewed along a dimension of its indices, so it is copied.
    narrow = torch.narrow_copy if value.is_sparse else torch.narrow
    return narrow(value, 0, start, count)
