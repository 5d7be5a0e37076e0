"""How much of watch()'s time is spent outside of PyTorch's operators.

The time of ``watch()`` is what it adds to a step of the bare loop, in turns. The operators are
those that it adds to a step: they are recorded, with their arguments, and called again one after
the other from Python, as ``torch.stack`` and the like, with nothing between them. The share outside
is the rest: Python, the marks that parameters leave as their gradients arrive, and the engine's
calls of these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _overhead_spread import Spread, spread
from _overhead_turns import TIMERS, Turns
from _overhead_ways import Way, bare, watched
from _overhead_workloads import Training
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ELEMENTS = 16
REPLAYS = 15

Call = tuple[Callable[..., Any], Any, Any]


@dataclass(frozen=True)
class Outside:
    """The time of ``watch()`` per step.

    Attributes:
        added_s: What it adds to a step.
        operators_s: What its operators take when they are called alone.
        share: The share of the first that is not the second.
    """

    added_s: Spread
    operators_s: Spread
    share: Spread


def narrow_training(tensors: int) -> Training:
    """Makes a training of many tensors of 16 elements, with a loss that is soon taken."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(ELEMENTS) for _ in range(tensors)])
    parameters = list(model)

    def loss_of() -> Tensor:
        return torch.cat(parameters).square().mean()

    training = Training(model, loss_of)
    training.optimizer = torch.optim.SGD(parameters, lr=1e-7, foreach=True)
    return training


def outside_operators(tensors: int, rounds: int, turns: int) -> Outside:
    """Measures the share.

    Args:
        tensors: How many tensors of 16 elements.
        rounds: Rounds to take the median of.
        turns: Turns in a round.
    """
    training = narrow_training(tensors)
    way = Way("watch()", partial(watched, training))
    order = Turns(bare(training), [way], TIMERS["wall"], steps=4)
    order.rehearse()
    calls = added_calls(training)
    both = [(order.round(turns).added[way.key], _replayed(calls)) for _ in range(rounds)]
    shares = [1 - alone / added if added > 0 else math.nan for added, alone in both]
    added, alone = map(spread, zip(*both, strict=True))
    return Outside(added, alone, spread(shares))


class _Capture(TorchDispatchMode):
    """Keeps every ATen call that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.made.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def added_calls(training: Training) -> list[Call]:
    """Returns the calls of a watched step that the bare one does not make."""
    own = Counter(str(function) for function, _, _ in _captured(bare(training)))
    more = []
    for call in _captured(Way("watch()", partial(watched, training))):
        own[str(call[0])] -= 1
        if own[str(call[0])] < 0:
            more.append(call)
    return more


def _as_users_call(function: Any) -> Callable[..., Any]:
    """Finds ``torch.stack`` for ``aten.stack``: on long lists the latter takes a third more."""
    found: Callable[..., Any] = getattr(torch, function.overloadpacket.__name__, function)
    return found


def _captured(way: Way) -> list[Call]:
    with way.lend() as step:
        step()
        with _Capture() as capture:
            step()
    return capture.made


def _replayed(calls: list[Call]) -> float:
    calls, times = [(_as_users_call(function), *rest) for function, *rest in calls], []
    with torch.no_grad():
        for _ in range(REPLAYS):
            start = time.perf_counter()
            for function, args, kwargs in calls:
                function(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return statistics.median(times)
