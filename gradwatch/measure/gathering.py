"""Numbers that are on several devices: brought together with one copy per device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.measure.deferred import FloatOrDeferred, as_operand
from gradwatch.measure.devices import home_of, sent

Kind = tuple[torch.device, torch.dtype]
"""What tensors must have in common to be worked on in one batched call."""

_device, _dtype = attrgetter("device"), attrgetter("dtype")
_kind = attrgetter("device", "dtype")


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all tensors are of one kind; for hundreds of them at little cost."""
    # The index of a device is read in half the time that the device takes, and is -1 on the CPU.
    return len(set(map(_dtype, tensors))) < 2 and len(set(map(Tensor.get_device, tensors))) < 2


def by_kind(tensors: Sequence[Tensor]) -> dict[Kind, list[int]]:
    """Returns the positions of the tensors of each kind."""
    places: dict[Kind, list[int]] = {}
    for position, kind in enumerate(map(_kind, tensors)):
        places.setdefault(kind, []).append(position)
    return places


def gathered(numbers: Sequence[Tensor]) -> Tensor:
    """Stacks numbers that may be on several devices, with one copy per device.

    Args:
        numbers: At least one tensor ``[]``, of any dtypes.

    Returns:
        Tensor ``[len(numbers)]`` of the widest dtype, on :func:`home_of` them.
    """
    if len(set(map(_device, numbers))) == 1:
        return torch.stack(list(numbers))
    places: dict[torch.device, list[int]] = {}
    for position, number in enumerate(numbers):
        places.setdefault(number.device, []).append(position)
    rows = [torch.stack([numbers[i] for i in there]) for there in places.values()]
    return sorted_by(joined(rows, home_of(numbers)), [i for one in places.values() for i in one])


def joined(rows: Sequence[Tensor], home: torch.device | None = None) -> Tensor:
    """Concatenates rows ``[n]`` that may be on several devices.

    ``home`` is where they are brought together; None for :func:`home_of` them.
    """
    if len(rows) == 1 and home is None:
        return rows[0]
    there = home_of(rows) if home is None else home
    return torch.cat([sent(row, there) for row in rows])


def sorted_by(row: Tensor, positions: Sequence[int]) -> Tensor:
    """Brings a row ``[n]`` into order: ``positions`` says where each of its entries belongs."""
    entries = sorted(range(len(positions)), key=positions.__getitem__)
    return selected(row, entries)


def selected(row: Tensor, entries: Sequence[int]) -> Tensor:
    """Returns some entries of a row ``[n]``; does not wait, which indexing with a list does."""
    return row.index_select(0, index_tensor(tuple(entries), row.device))


@lru_cache(maxsize=128)
def index_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Makes an int64 tensor; each once, as a copy to a device costs more than to keep it."""
    # Outside of inference mode: such a tensor could take part in no backward later.
    with torch.inference_mode(False):
        return sent(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


def operand_on(value: FloatOrDeferred, device: torch.device) -> float | Tensor:
    """Returns a number to calculate with as :func:`as_operand` does; a tensor is on ``device``."""
    operand = as_operand(value)
    return sent(operand, device) if isinstance(operand, Tensor) else operand


def together(*values: FloatOrDeferred | Tensor) -> tuple[float | Tensor, ...]:
    """Returns numbers to calculate with as :func:`as_operand` does; all tensors on one device."""
    operands = tuple(one if isinstance(one, Tensor) else as_operand(one) for one in values)
    tensors = [one for one in operands if isinstance(one, Tensor)]
    if len(set(map(_device, tensors))) < 2:
        return operands
    home = home_of(tensors)
    return tuple(sent(one, home) if isinstance(one, Tensor) else one for one in operands)


def multiplied(value: FloatOrDeferred | Tensor, factor: FloatOrDeferred | Tensor) -> float | Tensor:
    """Multiplies two numbers that may be on two devices."""
    value, factor = together(value, factor)
    return value * factor


def added(values: Iterable[FloatOrDeferred | Tensor]) -> float | Tensor:
    """Adds up numbers that may be on several devices; 0 for none."""
    return sum(together(*values))
