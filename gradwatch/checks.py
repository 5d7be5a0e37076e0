"""Checks of what a user gave to a policy: each names the argument, the bound and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCOPES = ("global", "group", "parameter")


def check_count(name: str, value: object, least: int) -> None:
    """Refuses what is not a whole number of steps.

    Args:
        name: The argument as the user wrote it.
        value: What the user gave.
        least: The smallest number allowed.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of steps, got {value!r} of type "
            f"{type(value).__name__}. Write {least} or more."
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}. Write {least} or more.")


def check_between(name: str, value: object, low: float, high: float, advice: str) -> None:
    """Refuses what is not a number between two bounds, both of them left out.

    Args:
        name: The argument as the user wrote it.
        value: What the user gave.
        low: The bound below.
        high: The bound above.
        advice: What to write instead.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If it is NaN or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number, got {value!r} of type {kind}. {advice}")
    if math.isnan(value) or not low < value < high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}. {advice}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses what is not one of a few words.

    Args:
        name: The argument as the user wrote it.
        value: What the user gave.
        choices: The words.

    Raises:
        TypeError: If the value is not a string.
        ValueError: If it is another word.
    """
    words = " or ".join(map(repr, choices))
    if not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{name} must be {words}, got {value!r} of type {kind}.")
    if value not in choices:
        raise ValueError(f"{name} must be {words}, got {value!r}.")
