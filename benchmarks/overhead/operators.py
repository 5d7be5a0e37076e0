"""Measures how much of watch()'s time is spent outside PyTorch's operators.

The time of ``watch()`` is what it adds to a step of the bare loop, measured in turn with it. The
operators that it adds to a step are recorded with their arguments, and then called again from
Python one after another (as ``torch.stack`` and so on) with nothing in between. The rest of the
time is outside: Python code, the parameter hooks that mark arriving gradients, and the engine's
calls of these hooks.
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
        added_s: Seconds that it adds to a step.
        operators_s: Seconds of its operators when called alone.
        outside: Share of the added time that is not spent in operators.
    """

    added_s: Spread
    operators_s: Spread
    outside: Spread


def operator_time(tensors: int, rounds: int, turns: int) -> OperatorTime:
    """Measures, on many small tensors, how much of ``watch()``'s time its operators take.

    Args:
        tensors: Number of tensors, of 16 elements each.
        rounds: Number of rounds to take the median of.
        turns: Number of turns in a round.
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
    """Records every ATen call with its arguments while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.made.append((function, args, kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def added_calls(training: Training) -> list[Call]:
    """Returns the calls of a watched step that the bare step does not make."""
    own = Counter(str(function) for function, _, _ in _captured(bare(training)))
    more = []
    for call in _captured(Variant("watch()", partial(watched, training))):
        own[str(call[0])] -= 1
        if own[str(call[0])] < 0:
            more.append(call)
    return more


def _as_users_call(function: Any) -> Callable[..., Any]:
    """Returns ``torch.stack`` for ``aten.stack``, which is a third slower on long lists."""
    found: Callable[..., Any] = getattr(torch, function.overloadpacket.__name__, function)
    return found


def _captured(variant: Variant) -> list[Call]:
    with variant.prepare() as loop:
        for _ in range(2):  # in steps 1, 2, 4 and so on watch() measures once more than usual
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
