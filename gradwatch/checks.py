"""Checks of what a user gave to a policy: each names the argument, the bound and the value.

``name`` is the argument as the user wrote it, ``advice`` is what to write instead. A value of the
wrong kind is a ``TypeError``, one out of bounds a ``ValueError``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence


def check_count(name: str, value: object, least: int) -> None:
    """Refuses what is not a whole number of steps."""
    # bool is a subclass of int: without this test window=True would be a window of one step.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of steps, got {_typed(value)}. Write {least} or more."
        )
    check_at_least(name, value, least, f". Write {least} or more.")


def check_positive(name: str, value: object) -> None:
    """Refuses what is not a positive number; infinity is one."""
    number = _number(name, value)
    # NaN compares false with everything, so `number <= 0` alone would let it pass.
    if math.isnan(number) or number <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}.")


def check_between(name: str, value: object, low: float, high: float, advice: str) -> None:
    """Refuses what is not a number between two bounds, both of them excluded."""
    if not low < _number(name, value, f" {advice}") < high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}. {advice}")


def check_at_least(name: str, value: float, least: float, reason: str) -> None:
    """Refuses a number below a bound; the reason follows the value in the message."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}{reason}")


def check_at_most(name: str, value: int, most: int, bound: str, reason: str) -> None:
    """Refuses a number above a bound that another argument sets: ``bound`` is its name."""
    if value > most:
        raise ValueError(f"{name} must be at most the {bound} of {most}, got {value!r}{reason}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses what is not one of a few words."""
    words = " or ".join(map(repr, choices))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {words}, got {_typed(value)}.")
    if value not in choices:
        raise ValueError(f"{name} must be {words}, got {value!r}.")


def check_power_of_two(name: str, value: object) -> None:
    """Refuses what is not a power of two, and names the nearest ones."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an integer, a power of two, got {_typed(value)}. "
            "Write 2, for instance."
        )
    check_at_least(name, value, 1, ". Write 2, for instance.")
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise ValueError(
            f"{name} must be a power of two, got {value!r}. Write {below} or {2 * below}."
        )


def check_names(name: str, value: object, advice: str) -> None:
    """Refuses what is not a tuple or list of patterns of names."""
    # A bare string is a sequence of strings too, and would exclude by single letters.
    if not isinstance(value, (tuple, list)) or not all(isinstance(one, str) for one in value):
        raise TypeError(
            f"{name} must be a tuple of patterns of names, got {_typed(value)}. {advice}"
        )


def whole_number(name: str, value: object, least: int, advice: str) -> int:
    """Returns an integer as Python's own; refuses anything else, and what is below the bound."""
    try:
        if isinstance(value, bool):
            raise TypeError
        # Unlike int(), this takes integers of NumPy and torch, but cuts no fraction off a float.
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be an integer of at least {least}, got {_typed(value)}. {advice}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}. {advice}")
    return number


def _number(name: str, value: object, advice: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_typed(value)}.{advice}")
    return value


def _typed(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
