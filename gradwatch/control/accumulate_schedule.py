"""Accumulation as it was said beforehand: one number, or a number for each step."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, SupportsIndex

from gradwatch.control.noise_scale import NoiseScale

_SCHEDULE = "AccumulationSchedule(schedule=)"


class FixedAccumulation:
    """The same number of micro-batches in every window.

    Args:
        number: How many, at least 1.
        name: What errors call the number.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is less than 1.
    """

    __slots__ = ("_number",)

    def __init__(self, number: SupportsIndex, *, name: str = "FixedAccumulation(number=)") -> None:
        self._number = _whole(name, number, least=1, advice="Write 1 to step after every backward.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._number})"

    def __str__(self) -> str:
        return str(self._number)

    @property
    def micro_batches(self) -> int:
        """The number."""
        return self._number

    @property
    def most(self) -> int:
        """The number."""
        return self._number

    @property
    def lr_factor(self) -> float:
        """1, for nothing changes."""
        return 1.0

    def looks_at(self, step: int) -> bool:
        """Tells that the noise scale is never read."""
        return False

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Returns the number."""
        return self._number

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing: the rule has no memory."""


class AccumulationSchedule:
    """A number of micro-batches that depends on the step.

    Args:
        schedule: ``{step: micro-batches}``, each from that step on, with a number for step 0; or a
            function that takes the step and returns the number. Steps are optimizer steps, and the
            first is 0. The function is called once for each window, for step 0 at once.
        name: What errors call the schedule.

    Raises:
        TypeError: If a step or a number is not an integer.
        ValueError: If a step is negative, a number less than 1, or step 0 left out.

    Example:
        >>> from gradwatch.control.noise_scale import NoiseScaleEstimator
        >>> noise = NoiseScaleEstimator().read()
        >>> schedule = AccumulationSchedule({0: 1, 1000: 4})
        >>> [schedule.decide(step, noise) for step in (0, 999, 1000, 5000)]
        [1, 1, 4, 4]
    """

    __slots__ = ("_function", "_micro_batches", "_most", "_name", "_schedule")

    def __init__(
        self, schedule: Mapping[int, int] | Callable[[int], int], *, name: str = _SCHEDULE
    ) -> None:
        self._name, self._schedule = name, schedule
        self._most: int | None = None
        self._function: Callable[[int], int]
        if isinstance(schedule, Mapping):
            table = _table(name, schedule)
            self._schedule, self._most = table, max(table.values())
            self._function = partial(_looked_up, table)  # a lambda cannot be pickled
        elif callable(schedule):
            self._function = schedule
        else:
            raise TypeError(
                f"{name} must be a mapping {{step: micro-batches}} or a function of the step, got "
                f"{schedule!r} of type {type(schedule).__name__}. Write {{0: 1, 1000: 4}}."
            )
        self._micro_batches = self._at(0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._schedule!r})"

    def __str__(self) -> str:
        return str(self._schedule)

    @property
    def micro_batches(self) -> int:
        """The number of the window under way."""
        return self._micro_batches

    @property
    def most(self) -> int | None:
        """The largest number of the mapping; None for a function, which may give any."""
        return self._most

    @property
    def lr_factor(self) -> float:
        """1: the learning rate is the schedule's author's to choose."""
        return 1.0

    def looks_at(self, step: int) -> bool:
        """Tells that the noise scale is never read."""
        return False

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Returns the number for a step; see ``AccumulatePolicy``.

        Raises:
            TypeError: If the function returned no integer.
            ValueError: If it returned less than 1.
        """
        self._micro_batches = self._at(step)
        return self._micro_batches

    def _at(self, step: int) -> int:
        name = f"The micro-batches that {self._name} gives for step {step}"
        return _whole(name, self._function(step), least=1, advice="Return 1 or more.")

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the window under way."""
        return {"micro_batches": self._micro_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._micro_batches = int(state["micro_batches"])


def _table(name: str, schedule: Mapping[int, int]) -> dict[int, int]:
    table = {}
    for key, value in schedule.items():
        advice = "Steps count from 0: write {0: 1, 1000: 4}."
        step = _whole(f"A step of {name}", key, least=0, advice=advice)
        advice = f"Write {{{step}: 1}} or more."
        number = f"The micro-batches that {name} gives for step {step}"
        table[step] = _whole(number, value, least=1, advice=advice)
    if 0 not in table:
        raise ValueError(
            f"{name} must say how many micro-batches step 0 has, got {dict(schedule)!r}. "
            "Add 0 to it: {0: 1, ...}."
        )
    return dict(sorted(table.items()))


def _looked_up(table: Mapping[int, int], step: int) -> int:
    steps = list(table)
    return table[steps[bisect_right(steps, step) - 1]]


def _whole(name: str, value: object, least: int, advice: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type] # of NumPy and torch as well
    except TypeError:
        raise TypeError(
            f"{name} must be an integer of at least {least}, got {value!r} of type "
            f"{type(value).__name__}. {advice}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}. {advice}")
    return number
