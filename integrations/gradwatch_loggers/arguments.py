"""Checks of the arguments that the sinks have in common."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gradwatch.adapters import described, shown

Deliver = Literal["batch", "step"]


def checked_deliver(caller: str, value: object) -> Deliver:
    """Returns ``deliver``, when a sink is given its records.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is neither ``"batch"`` nor ``"step"``.
    """
    wanted = f'{caller}(deliver=) must be "batch" or "step"'
    if not isinstance(value, str):
        raise TypeError(f"{wanted}, got {described(value)}.")
    if value == "batch":
        return "batch"
    if value == "step":
        return "step"
    raise ValueError(f"{wanted}, got {shown(value)}.")


def checked_flag(name: str, value: object) -> bool:
    """Returns a flag.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {described(value)}.")
    return value


def checked_name(name: str, value: object) -> str:
    """Returns what tags begin with.

    Raises:
        TypeError: If it is no string.
        ValueError: If it begins or ends with a slash.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {described(value)}.")
    if value != value.strip("/"):
        wanted = "a string that neither begins nor ends with a slash"
        raise ValueError(f"{name} must be {wanted}, got {described(value)}.")
    return value


def checked_count(name: str, value: object, advice: str) -> int:
    """Returns a whole number of at least 1.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {described(value)}. {advice}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}. {advice}")
    return value


def checked_seconds(name: str, value: object) -> float:
    """Returns a number of seconds.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {described(value)}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {shown(value)}.")
    return float(value)


def checked_call(name: str, value: object, takes: str) -> Callable[..., Any]:
    """Returns a function that can be called as ``takes`` says, ``"(step, scalars)"``.

    Raises:
        TypeError: If it is no function, or takes other arguments.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function of {takes}, got {described(value)}.")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # a function in C need not have one
        return value
    try:
        signature.bind(*takes.strip("()").split(", "))
    except TypeError as error:
        raise TypeError(
            f"{name} cannot be called as function{takes}: {error}. "
            f"Write lambda {takes.strip('()')}: ..."
        ) from None
    return value


def checked_file(name: str, value: object, example: str) -> Path:
    """Returns the path of a file that can be made.

    Raises:
        TypeError: If it is neither a str nor a PathLike.
        ValueError: If it is empty or a folder, or a folder above it is a file.
    """
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(
            f"{name} must be the path of a file, got {described(value)}. Write {example!r}."
        )
    if not path.strip():
        raise ValueError(f"{name} must not be empty. Write {example!r}.")
    file = Path(path)
    if file.is_dir() or path.endswith(("/", os.sep)):
        raise ValueError(f"{name} is {path!r}, which is a folder. Write {str(file / example)!r}.")
    above = next((one for one in file.parents if one.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{name} is {path!r}, but {str(above)!r} is a file. Name another folder.")
    return file.absolute()
