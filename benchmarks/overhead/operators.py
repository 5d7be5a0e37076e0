"""How much of watch()'s time is spent outside of PyTorch's operators.

The time of ``watch()`` is what it adds to a step of the bare loop, in turn with it. The operators
are those that it adds to a step: they are recorded, with their arguments, and called again one
after the other from Python, as ``torch.stack`` and the like, with nothing between them. What is
left is outside: Python, the marks that parameters leave as their gradients arrive, and the engine's
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

from benchmarks.overhead.counts import CountCalls
from benchmarks.overhead.timing import TIMERS, InterleavedTiming
from benchmarks.overhead.variants import Variant, bare, watched
from benchmarks.overhead.workloads import Training, narrow_training
from benchmarks.spread import Spread, spread

REPLAYS = 15

Call = tuple[Callable[..., Any], Any, Any]


@dataclass(frozen=True)
class OperatorTime:
    """The time of ``watch()`` per step.

    Attributes:
        added_s: What it adds to a step.
        operators_s: What its operators take when they are called alone.
        outside: The share of the first that is not the second.
    """

    added_s: Spread
    operators_s: Spread
    outside: Spread


def operator_time(tensors: int, rounds: int, turns: int) -> OperatorTime:
    """Measures on many small tensors how much of ``watch()`` is in its operators.

    Args:
        tensors: How many tensors of 16 elements.
        rounds: Rounds to take the median of.
        turns: Turns in a round.
    """
    training = narrow_training(tensors)
    watching = Variant("watch()", partial(watched, training))
    timing = InterleavedTiming(bare(training), [watching], TIMERS["wall"], steps=4)
    timing.rehearse()
    calls = added_calls(training)
    both = [
        (timing.measure_round(turns).added[watching.key], _replayed(calls)) for _ in range(rounds)
    ]
    shares = [1 - alone / added if added > 0 else math.nan for added, alone in both]
    added, alone = map(spread, zip(*both, strict=True))
    return OperatorTime(added, alone, spread(shares))


class _CaptureCalls(CountCalls):
    """Keeps every ATen call that is made under it, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.made.append((function, args, kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def added_calls(training: Training) -> list[Call]:
    """Returns the calls of a watched step that the bare one does not make."""
    own = Counter(str(function) for function, _, _ in _captured(bare(training)))
    more = []
    for call in _captured(Variant("watch()", partial(watched, training))):
        own[str(call[0])] -= 1
        if own[str(call[0])] < 0:
            more.append(call)
    return more


def _as_users_call(function: Any) -> Callable[..., Any]:
    """Finds ``torch.stack`` for ``aten.stack``: on long lists the latter takes a third more."""
    found: Callable[..., Any] = getattr(torch, function.overloadpacket.__name__, function)
    return found


def _captured(variant: Variant) -> list[Call]:
    with variant.prepare() as loop:
        loop.step()
        with _CaptureCalls() as capture:
            loop.step()
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
