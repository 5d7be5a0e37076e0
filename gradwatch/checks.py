"""Checks of arguments: each error names the argument, the bound and the value.

``name`` is the argument as the user wrote it, and ``advice`` says what to write instead. A value of
the wrong type raises a ``TypeError``, a value out of bounds a ``ValueError``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from torch import Tensor

SHOWN_CHARACTERS = 100
"""The cut for a value in an error message: the repr of a parameter list can be very long."""


def shown(value: object) -> str:
    """Returns the ``repr`` of a value on one line, cut to a length that fits in an error message.

    Of tensors the shape is shown, not the elements.
    """
    if isinstance(value, Tensor) and value.ndim:
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        first = ", ".join(map(shown, value[:2]))
        return f"[{first}{', ...' if len(value) > 2 else ''}]"
    try:
        text = repr(value)
    except Exception:  # the error about the value says more than an error of its repr
        return "an object"
    text = text if isinstance(value, str) else " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def described(value: object) -> str:
    """Returns what :func:`shown` does and the name of the type, for an error message."""
    return f"{shown(value)} of type {type(value).__name__}"


def check_count(name: str, value: object, least: int) -> None:
    """Refuses a value that is not an integer number of steps, at least ``least``."""
    # bool is a subclass of int: without this check window=True would be a window of one step.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of steps, got {described(value)}. "
            f"Write {least} or more."
        )
    check_at_least(name, value, least, f". Write {least} or more.")


def check_positive(name: str, value: object) -> None:
    """Refuses a value that is not a positive number; infinity is accepted."""
    number = _number(name, value)
    # Every comparison with NaN is false, so `number <= 0` alone would accept it.
    if math.isnan(number) or number <= 0:
        raise ValueError(f"{name} must be greater than 0, got {shown(value)}.")


def check_between(name: str, value: object, low: float, high: float, advice: str) -> None:
    """Refuses a value that is not a number strictly between two bounds."""
    if not low < _number(name, value, f" {advice}") < high:
        raise ValueError(
            f"{name} must be between {low:g} and {high:g}, got {shown(value)}. {advice}"
        )


def check_at_least(name: str, value: float, least: float, reason: str) -> None:
    """Refuses a number below a bound; ``reason`` follows the value in the message."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}{reason}")


def check_at_most(name: str, value: int, most: int, bound: str, reason: str) -> None:
    """Refuses a number above ``most``, the value of another argument with the name ``bound``."""
    if value > most:
        raise ValueError(
            f"{name} must be at most the {bound} of {most}, got {shown(value)}{reason}"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a value that is not one of a few words."""
    words = " or ".join(map(repr, choices))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {words}, got {described(value)}.")
    if value not in choices:
        raise ValueError(f"{name} must be {words}, got {shown(value)}.")


def check_power_of_two(name: str, value: object) -> None:
    """Refuses a value that is not a power of two, and names the nearest ones."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an integer, a power of two, got {described(value)}. "
            "Write 2, for instance."
        )
    check_at_least(name, value, 1, ". Write 2, for instance.")
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise ValueError(
            f"{name} must be a power of two, got {shown(value)}. Write {below} or {2 * below}."
        )


def check_names(name: str, value: object, advice: str) -> None:
    """Refuses a value that is not a tuple or list of name patterns."""
    # A bare string is a sequence of strings too: each letter would be a pattern.
    if not isinstance(value, (tuple, list)) or not all(isinstance(one, str) for one in value):
        raise TypeError(
            f"{name} must be a tuple of patterns of names, got {described(value)}. {advice}"
        )


def whole_number(name: str, value: object, least: int, advice: str) -> int:
    """Converts an integer of any library to Python's int; refuses one below ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        # This accepts integers of NumPy and torch but, unlike int(), refuses floats.
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be an integer of at least {least}, got {described(value)}. {advice}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}. {advice}")
    return number


def _number(name: str, value: object, advice: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {described(value)}.{advice}")
    return value
