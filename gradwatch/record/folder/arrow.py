"""Arrow arrays of NumPy arrays and texts, made without pandas.

``pyarrow.array()`` imports pandas where it is installed. That takes some tenths of a second, for
which the training would wait at its first part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradwatch.record.columns import Array


def arrow_values(values: Array, known: Array | None = None) -> Any:
    """Makes a ``pyarrow.Array`` of numbers or bools.

    Args:
        values: ``[rows]``; numbers are not copied, and must not change any more.
        known: bool ``[rows]``: those that are False become null; None if all are known.
    """
    import pyarrow as pa

    is_bool = values.dtype == np.bool_
    data = _bits(values) if is_bool else np.ascontiguousarray(values)
    valid = None if known is None or known.all() else pa.py_buffer(_bits(known))
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(data)])


def arrow_texts(texts: Sequence[str]) -> Any:
    """Makes a ``pyarrow.StringArray``.

    Raises:
        UnicodeEncodeError: If a text has a lone surrogate.
    """
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(one) for one in encoded], out=offsets[1:])
    data = b"".join(encoded)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(data))


def _bits(flags: Array) -> Array:
    return np.packbits(flags, bitorder="little")
