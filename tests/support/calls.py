"""The one counter of what torch is asked to do.

`benchmarks/overhead/counts.py` has one of its own: the benchmarks run without the tests.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountCalls(TorchDispatchMode):
    """Counts the calls that reach torch's dispatcher while it is entered.

    Attributes:
        calls: How many there were of each operation, as torch writes it: "aten.mul_.Tensor". Two
            detaches in a row, as torch 2.4 makes, are one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._last: Any = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        again = function is self._last is torch.ops.aten.detach.default
        if not again and self.is_counted(function, args):
            self.calls[str(function)] += 1
        self._last = function
        return function(*args, **(kwargs or {}))

    def is_counted(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Return whether a call counts: every one does."""
        return True

    def by_name(self, namespace: str = "aten") -> Counter[str]:
        """Return the calls of one namespace by the operation's bare name: "mul_"."""
        names: Counter[str] = Counter()
        for call, count in self.calls.items():
            parts = call.split(".")
            if parts[0] == namespace:
                names[parts[1]] += count
        return names

    @property
    def waits(self) -> int:
        """How often the host asked for a number of a tensor, and so waited for the device."""
        return self.calls["aten._local_scalar_dense.default"]

    @property
    def sent(self) -> Counter[str]:
        """What was sent to other ranks, by kind: "allreduce"."""
        return Counter({name.strip("_"): n for name, n in self.by_name("c10d").items()})
