"""A real accelerator, as far as the stand-ins' tests can be run on one."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.device.counts import Counts
from tests.support.stand_ins import VARIABLE

_name = os.environ[VARIABLE]
_module: Any = getattr(torch, _name)
DEVICES = tuple(torch.device(_name, index) for index in range(min(_module.device_count(), 2)))
DEVICE = DEVICES[0]


def install() -> None:
    """Do nothing: torch knows the device."""


def tensor(on_host: Tensor, device: torch.device = DEVICE) -> Tensor:
    """Copy a tensor to the device."""
    return on_host.detach().to(device).requires_grad_(on_host.requires_grad)


class _Calls(TorchDispatchMode):
    """Counts what reaches torch's dispatcher: a wait of an event does not."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_look = function is torch.ops.aten._local_scalar_dense.default
        self.kinds["waits" if is_look else "kernels"] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count calls of operations, and numbers that were asked for, inside a block."""
    with _Calls() as calls:
        yield Counts(lambda: calls.kinds)


def late(polls: int = 1) -> contextlib.AbstractContextManager[None]:
    """Do nothing: a real device is late by itself."""
    return contextlib.nullcontext()


def _no_stand_in(*_: object) -> contextlib.AbstractContextManager[None]:
    pytest.skip("only a stand-in can be told to")


no_float64 = failing = capturing = _no_stand_in
