"""Answers: the content that each route of the Gradients tab sends, as JSON or framed arrays."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard import errors

from gradwatch_dashboard.arguments import Arguments
from gradwatch_dashboard.binning import (
    Cells,
    bin_bad,
    bin_norms,
    bin_table,
    parameter_column,
    spans_of,
)
from gradwatch_dashboard.sessions import Timeline
from gradwatch_dashboard.tensors import TabEvent, decode, encode
from gradwatch_dashboard.wire import COLUMNS

MAX_COLUMNS = 4096
DEFAULT_COLUMNS = 1000
MAX_CELLS = 32 * 2**20
"""Maximum cells of a heat map: with many parameters, it gets fewer columns."""

MAX_WINDOWS = 20_000
"""Maximum points of a curve: if there are more windows, neighbors share a point."""

_NO_PARAMETER = "parameter must be 0 to {highest}, got {parameter}"

_ALIGNMENT = 8
_WORDS = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}


def describe(timeline: Timeline) -> dict[str, Any]:
    """Answers the route ``layout``."""
    return {
        "optimizer": timeline.layout.optimizer,
        "parameters": timeline.layout.parameters,
        "modules": timeline.layout.modules,
        "shapes": timeline.layout.shapes,
        "first_step": timeline.first_step,
        "last_step": timeline.last_step,
        "windows": len(timeline.table),
        "columns": [name for name, _ in timeline.layout.columns],
    }


def heatmap(run: str, timeline: Timeline, cells: Cells, arguments: Arguments) -> bytes:
    """Answers the route ``heatmap``; its query arguments are ``first``, ``last``, ``columns``."""
    parameters = len(timeline.layout.parameters)
    first, last = arguments.range(timeline.first_step, timeline.last_step)
    asked = arguments.integer("columns", DEFAULT_COLUMNS, 1, MAX_COLUMNS)
    columns = max(1, min(asked, last - first + 1, MAX_CELLS // max(1, parameters)))
    spans = spans_of(timeline.first_steps, timeline.last_steps, first, last, columns)
    arrays: dict[str, NDArray[Any]] = {"norms": bin_norms(cells, parameters, spans)}
    bad = bin_bad(cells, parameters, spans)
    if bad is not None:
        arrays["bad"] = bad
    header = {
        "run": run,
        "optimizer": timeline.layout.optimizer,
        "first_step": first,
        "last_step": last,
        "columns": columns,
        "parameters": parameters,
    }
    return pack(header, arrays | bin_table(timeline.table, spans, timeline.layout.columns))


def curve(timeline: Timeline, cells: Cells, arguments: Arguments) -> str:
    """Answers the route ``curve``; its query arguments are ``parameter``, ``first`` and ``last``.

    Raises:
        errors.InvalidArgumentError: If an argument is malformed, or ``parameter`` is missing.
        errors.NotFoundError: If there is no parameter of that number.
    """
    arguments.text("parameter")  # required, whereas integer() would use its default
    parameter = arguments.integer("parameter", 0, -1, 10**18)
    highest = len(timeline.layout.parameters) - 1
    if not 0 <= parameter <= highest:
        raise errors.NotFoundError(_NO_PARAMETER.format(highest=highest, parameter=parameter))
    first, last = arguments.range(timeline.first_step, timeline.last_step)
    start = int(np.searchsorted(timeline.last_steps, first))
    stop = max(start, int(np.searchsorted(timeline.first_steps, last, side="right")))
    norms, bad = parameter_column(cells, parameter, len(timeline.table))
    total = encode(timeline.table[start:stop, COLUMNS.index("grad_norm")].copy())
    groups = np.arange(0, stop - start, max(1, -(-(stop - start) // MAX_WINDOWS)))
    ends = np.append(groups[1:], stop - start)[: len(groups)] - 1
    numbers: dict[str, NDArray[Any]] = {
        "first": timeline.first_steps[start:stop][groups],
        "last": timeline.last_steps[start:stop][ends],
        "norm": decode(_reduce(np.maximum, norms[start:stop], groups)),
        "bad": _reduce(np.add, bad[start:stop], groups),
        "grad_norm": decode(_reduce(np.maximum, total, groups)),
    }
    parts = [f'"{name}": {json_numbers(values)}' for name, values in numbers.items()]
    name = json.dumps(timeline.layout.parameters[parameter])
    return f'{{"parameter": {name}, {", ".join(parts)}}}'


def _reduce(function: np.ufunc, values: NDArray[Any], groups: NDArray[np.intp]) -> NDArray[Any]:
    reduced: NDArray[Any] = function.reduceat(values, groups) if len(groups) else values
    return reduced


def event_page(events: Sequence[TabEvent], first: int, last: int, limit: int) -> str:
    """Answers the route ``events``: counts those in the range, and lists the first ``limit``."""
    inside = [event for event in events if first <= event.step <= last]
    texts = ", ".join(event.json for event in inside[:limit])
    return f'{{"total": {len(inside)}, "events": [{texts}]}}'


def pack(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Packs a header and arrays into binary, which takes a fifth of the size of JSON.

    Returns:
        The length of the header as a little-endian uint32, the header as JSON with a list
        ``arrays`` added, and the arrays, little-endian, each starting at a multiple of 8 bytes.
    """
    described = [
        {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        for name, array in arrays.items()
    ]
    text = json.dumps({**header, "arrays": described}).encode()
    # A Float64Array in JavaScript can only start at a multiple of 8 bytes.
    text += b" " * (-(len(text) + 4) % _ALIGNMENT)
    parts: list[Any] = [struct.pack("<I", len(text)), text]
    for array in arrays.values():
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        parts += [plain.data if plain.size else b"", b"\0" * (-plain.nbytes % _ALIGNMENT)]
    return b"".join(parts)


def json_numbers(values: NDArray[Any]) -> str:
    """Writes numbers as a JSON array; NaN and Inf, which JSON lacks, become strings.

    Args:
        values: array ``[n]`` of integers or floats; floats are rounded to 7 digits.
    """
    if values.dtype.kind in "iu":
        return json.dumps(values.tolist())
    # Not json.dumps: it would write a float32 as a float64, with up to 17 digits.
    texts = map("%.7g".__mod__, values.tolist())
    if np.isfinite(values).all():
        return f"[{','.join(texts)}]"
    return f"[{','.join(_WORDS.get(text, text) for text in texts)}]"
