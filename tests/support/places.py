"""Where a training runs: on the host, on the host as if it were a device, on a device.

Tests take a place from a fixture: see the ones in `tests/conftest.py`, and in `tests/device`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradwatch.testing import late_readings
from tests.support.calls import CountCalls


@dataclass(frozen=True)
class Place:
    """A kind of device, and how a test gets things there.

    Attributes:
        name: For the ids of tests.
        type: The type of the device, as `torch.autocast` and `torch.amp.GradScaler` take it.
        to: Moves a module in place and returns it; its parameters may be new objects.
        tensor: Copies a tensor there.
        late: A context in which numbers come after so many polls; without a meaning on the host.
        counting: A context that counts; the object that it gives has `waits`.
    """

    name: str
    type: str = "cpu"
    to: Callable[[nn.Module], nn.Module] = lambda module: module
    tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor
    late: Callable[..., AbstractContextManager[object]] = lambda polls=1: nullcontext()
    counting: Callable[[], AbstractContextManager[Any]] = CountCalls

    @property
    def at_hand(self) -> bool:
        """Whether numbers can be read at once."""
        return self.name == HOST.name

    def __str__(self) -> str:
        return self.name


HOST = Place("at hand")
LATE = Place("late", late=late_readings)
