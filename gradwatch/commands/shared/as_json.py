"""JSON that every parser reads: it has no NaN and no Infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_json(value: Any, indent: int | None = None) -> str:
    """Writes a value as strict JSON in ASCII.

    Args:
        value: Mappings, sequences, strings and numbers, those of numpy too; what JSON has no form
            for becomes its text.
        indent: As for :func:`json.dumps`.

    Returns:
        The text; NaN is ``null``, and infinities are ``"Infinity"`` and ``"-Infinity"``.

    Example:
        >>> as_json({"norm": float("inf"), "loss": float("nan")})
        '{"norm": "Infinity", "loss": null}'
    """
    return json.dumps(plain(value), allow_nan=False, indent=indent)


def plain(value: Any) -> Any:
    """Turns a value into what strict JSON can say; see :func:`as_json`.

    Args:
        value: Anything.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return _number(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
