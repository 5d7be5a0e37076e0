"""Answers: arrays and numbers as they are sent."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 8
_WORDS = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}


def pack(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Frames arrays.

    Args:
        header: What is to be said of them.
        arrays: Name to array, in the order in which they are to be sent.

    Returns:
        The length of the header as uint32, the header with ``arrays`` added as JSON, and the
        arrays, little-endian, each from a multiple of 8 bytes on.
    """
    described = [
        {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        for name, array in arrays.items()
    ]
    text = json.dumps({**header, "arrays": described}).encode()
    text += b" " * (-(len(text) + 4) % _ALIGNMENT)
    parts: list[Any] = [struct.pack("<I", len(text)), text]
    for array in arrays.values():
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        parts += [plain.data if plain.size else b"", b"\0" * (-plain.nbytes % _ALIGNMENT)]
    return b"".join(parts)


def json_numbers(values: NDArray[Any]) -> str:
    """Writes numbers as a JSON array; NaN and Inf, which JSON has not, as texts.

    Args:
        values: array ``[n]``: of integers, or of floats, which are rounded to 7 digits.
    """
    if values.dtype.kind in "iu":
        return json.dumps(values.tolist())
    texts = map("%.7g".__mod__, values.tolist())
    if np.isfinite(values).all():
        return f"[{','.join(texts)}]"
    return f"[{','.join(_WORDS.get(text, text) for text in texts)}]"
