"""What an object holds, as plain values that JSON keeps exactly, NaN and infinities as words."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

SPELLED = {"float nan": math.nan, "float inf": math.inf, "float -inf": -math.inf}


def told(value):
    """Turns anything that gradwatch gives into values that JSON keeps without a loss."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.float32):
        return told(float(str(value)))  # as few digits as tell it from all others
    if isinstance(value, np.generic):
        return told(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else f"float {value}"
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype), "values": told_array(value.detach().numpy())}
    if isinstance(value, np.ndarray):
        return {"array": str(value.dtype), "values": told_array(value)}
    if isinstance(value, Mapping):
        return {str(key): told(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value):
        names = [one.name for one in dataclasses.fields(value) if not one.name.startswith("_")]
        return {
            "class": type(value).__name__,
            **{name: told(getattr(value, name)) for name in names},
        }
    if isinstance(value, (list, tuple)):
        return [told(one) for one in value]
    return f"a {type(value).__name__}"


def told_array(array):
    """Turns an array into nested lists."""
    return told(list(array)) if array.ndim else told(array[()])


def told_frame(frame):
    """Turns a pandas frame into its columns: the dtypes of numbers, and all values."""
    return {
        "index": frame.index.name,
        "rows": told(frame.index.tolist()),
        "columns": [
            {"name": name, "dtype": _dtype(frame[name]), "values": _values(frame[name])}
            for name in frame.columns
        ],
    }


def same(found, expected, rel=0.0):
    """Tells whether all of a told value is found again, but for a relative difference of the floats.

    What has been added since is passed over: fields of a record, columns of a frame, keys of JSON.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict) or [key for key in found if key in expected] != list(
            expected
        ):
            return False
        return all(same(found[key], one, rel) for key, one in expected.items())
    if isinstance(expected, list):
        if not isinstance(found, list) or _added(found, expected) < 0:
            return False
        return all(same(one, other, rel) for one, other in zip(found, expected, strict=False))
    one, other = _number(found), _number(expected)
    if rel and one is not None and other is not None:
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=rel, abs_tol=rel * 1e-6)
    return type(found) is type(expected) and found == expected


def _added(found, expected):
    """How many columns a list has more than before; -1 where it differs in another way."""
    more = len(found) - len(expected)
    columns = all(isinstance(one, dict) and {"name", "dtype"} <= one.keys() for one in found)
    return more if more == 0 or (columns and expected) else -1


def differences(found, expected, rel=0.0, place=""):
    """Lists where two told values differ, for the text of a failure."""
    if same(found, expected, rel):
        return []
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() <= found.keys():
        pairs = [(f"{place}.{key}", found[key], expected[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list) and _added(found, expected) >= 0:
        pairs = [(f"{place}[{n}]", found[n], one) for n, one in enumerate(expected)]
    else:
        return [f"{place}: found {found!r}, expected {expected!r}"]
    return [line for at, one, other in pairs for line in differences(one, other, rel, at)]


def _number(value):
    """The float that a told value stands for; None for other values."""
    if isinstance(value, str):
        return SPELLED.get(value)
    return value if isinstance(value, float) else None


def _values(column):
    return told_array(column.to_numpy()) if column.dtype.kind == "f" else told(column.tolist())


def _dtype(column):
    return str(column.dtype) if column.dtype.kind in "ifb" else "text"
