"""Operands: what operations are given and return: where it is, whether it is finite, its range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from gradwatch.record.explanation import Operand

_OF_NUMBERS = frozenset({"self", "other", "exponent", "value"})


class State(IntEnum):
    """The worst that is in a tensor."""

    FINITE = 0
    INFINITE = 1
    NAN = 2


def operand_of(name: str, tensor: Tensor) -> Operand:
    """Describes a tensor: shape, dtype, range of its finite elements, and how many are not."""
    values = values_of(tensor)
    shape, dtype = tuple(tensor.shape), dtype_of(tensor)
    if not values.numel() or values.is_quantized or values.is_meta:
        return Operand(name, shape, dtype, math.nan, math.nan)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.dtype is torch.bool:
        values = values.to(torch.uint8)
    if not values.dtype.is_floating_point:
        low, high = torch.aminmax(values)
        return Operand(name, shape, dtype, float(low), float(high), int((values == 0).sum()))
    finite = values[torch.isfinite(values)]
    lowest, highest = torch.aminmax(finite) if finite.numel() else (math.nan, math.nan)
    return Operand(
        name,
        shape,
        dtype,
        float(lowest),
        float(highest),
        zeros=int((values == 0).sum()),
        nans=int(torch.isnan(values).sum()),
        infs=int(torch.isinf(values).sum()),
        negative_infs=int(torch.isneginf(values).sum()),
    )


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among values, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def named_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an operation by the names that torch gives them, in their order."""
    names = (one.name for one in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def numbers_in(given: Mapping[str, Any]) -> Iterator[Operand]:
    """Describes the numbers of Python among the arguments that stand for a tensor."""
    for name, value in given.items():
        if name in _OF_NUMBERS and type(value) in (int, float):
            infinite, nan = math.isinf(value), math.isnan(value)
            bound = math.nan if infinite or nan else float(value)
            counts = int(value == 0), int(nan), int(infinite), int(value == -math.inf)
            yield Operand(name, (), type(value).__name__, bound, bound, *counts)


def memory_of(tensor: Tensor) -> int | None:
    """Returns what stands for the memory of a tensor; None if it has none of its own."""
    try:
        return int(values_of(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def values_of(tensor: Tensor) -> Tensor:
    """Returns the elements that a tensor stores: for a sparse one those that are not left out."""
    if tensor._is_zerotensor():  # of forward-mode differentiation; it has no memory
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return tensor.values()
    return tensor


def state_of(tensor: Tensor) -> State:
    """Returns the worst that is in a tensor; waits for its device."""
    values = values_of(tensor)
    if not (values.is_floating_point() or values.is_complex()) or not values.numel():
        return State.FINITE
    if values.is_meta or values.is_quantized or values.layout is not torch.strided:
        return State.FINITE
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.dtype.itemsize < 2:  # float8 knows no comparison
        values = values.float()
    # One pass, which tells of NaN as well.
    low, high = (one.item() for one in torch.aminmax(values))
    if math.isnan(low):
        return State.NAN
    return State.INFINITE if math.isinf(low) or math.isinf(high) else State.FINITE


def is_opaque(tensor: Tensor) -> bool:
    """Returns whether a tensor is of a class that does not let its elements be looked at.

    Those of torchao's float8 training are: they hold 8-bit numbers and a scale, and know what a
    matrix product needs.
    """
    kind = type(tensor)
    if kind not in _OPAQUE:
        _OPAQUE[kind] = False
        try:
            state_of(tensor)
        except (NotImplementedError, TypeError):
            _OPAQUE[kind] = True
    return _OPAQUE[kind]


_OPAQUE: dict[type[Tensor], bool] = {Tensor: False, torch.nn.Parameter: False}


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all elements are finite."""
    return state_of(tensor) is State.FINITE


def has_nan(tensor: Tensor) -> bool:
    """Returns whether any element is NaN."""
    return bool(torch.isnan(values_of(tensor)).any())


def covers(tensor: Tensor) -> bool:
    """Returns whether a tensor is all that its memory holds."""
    try:
        return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return True


def can_mask(values: Tensor) -> bool:
    """Returns whether all elements are minus infinity or one and the same finite value."""
    rest = values[~torch.isneginf(values)]
    return not rest.numel() or bool((rest == rest[0]).all() & torch.isfinite(rest[0]))


def dtype_of(tensor: Tensor) -> str:
    """Returns the name of a dtype: ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")
