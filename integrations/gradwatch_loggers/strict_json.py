"""Steps and events as strict JSON, which has neither NaN nor Inf."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gradwatch import Event, StepRecord
from gradwatch.adapters import STEP_COLUMNS

EVENT_COLUMNS = tuple(field.name for field in fields(Event))

_encoded = json.JSONEncoder(allow_nan=False, default=str).encode


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


_UNKNOWN_AS_NAN = {field.name for field in fields(StepRecord) if _is_nan(field.default)}
"""Columns in which NaN says that the number is not known: they have it by default."""


def json_line(values: Mapping[str, Any]) -> bytes:
    """Returns an object as a line, with its newline."""
    return f"{_encoded(values)}\n".encode()


def number(value: Any) -> Any:
    """Returns a value as JSON can hold it: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def step_object(record: StepRecord) -> dict[str, Any]:
    """Returns a step with all its columns; ``None`` for a number that is not known."""
    values: dict[str, Any] = {"type": "step"}
    for name in STEP_COLUMNS:
        value = getattr(record, name)
        values[name] = None if name in _UNKNOWN_AS_NAN and _is_nan(value) else number(value)
    return values


def event_object(event: Event) -> dict[str, Any]:
    """Returns an event with all its columns."""
    values = {name: number(getattr(event, name)) for name in EVENT_COLUMNS}
    return {"type": "event", **values}
