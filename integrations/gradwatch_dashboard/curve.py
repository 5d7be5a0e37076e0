"""Curve: the norms of one parameter, every window of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard import errors

from gradwatch_dashboard.answers import json_numbers
from gradwatch_dashboard.arguments import Arguments
from gradwatch_dashboard.binning import Cells
from gradwatch_dashboard.segments import NOTHING, decode, encode
from gradwatch_dashboard.sessions import Track
from gradwatch_dashboard.wire import COLUMNS

MAX_WINDOWS = 20_000
"""Points of a curve; where there are more, neighbours share one."""

_NO_PARAMETER = "parameter must be 0 to {highest}, got {parameter}"


def curve(track: Track, cells: Cells, arguments: Arguments) -> str:
    """Answers the route ``curve``.

    Args:
        track: What is asked for.
        cells: Its cells.
        arguments: The parameter and the range.

    Returns:
        JSON.

    Raises:
        errors.InvalidArgumentError: If the parameter is left out or malformed.
        errors.NotFoundError: If there is none of that number.
    """
    arguments.text("parameter")
    parameter = arguments.integer("parameter", 0, -1, 10**18)
    highest = len(track.layout.parameters) - 1
    if not 0 <= parameter <= highest:
        raise errors.NotFoundError(_NO_PARAMETER.format(highest=highest, parameter=parameter))
    first, last = arguments.range(track.first_step, track.last_step)
    start = int(np.searchsorted(track.last_steps, first))
    stop = max(start, int(np.searchsorted(track.first_steps, last, side="right")))
    norms, bad = column_of(cells, parameter, len(track.table))
    total = encode(track.table[start:stop, COLUMNS.index("grad_norm")].copy())
    groups = np.arange(0, stop - start, max(1, -(-(stop - start) // MAX_WINDOWS)))
    ends = np.append(groups[1:], stop - start)[: len(groups)] - 1
    numbers: dict[str, NDArray[Any]] = {
        "first": track.first_steps[start:stop][groups],
        "last": track.last_steps[start:stop][ends],
        "norm": decode(_reduce(np.maximum, norms[start:stop], groups)),
        "bad": _reduce(np.add, bad[start:stop], groups),
        "grad_norm": decode(_reduce(np.maximum, total, groups)),
    }
    parts = [f'"{name}": {json_numbers(values)}' for name, values in numbers.items()]
    name = json.dumps(track.layout.parameters[parameter])
    return f'{{"parameter": {name}, {", ".join(parts)}}}'


def column_of(
    cells: Cells, parameter: int, windows: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Takes one parameter out of the cells.

    Args:
        cells: Of the track.
        parameter: Its number in the track.
        windows: Windows of the track.

    Returns:
        Its norms, coded, float32 array ``[windows]``, and its bad steps, int64 array ``[windows]``.
    """
    norms = np.full(windows, NOTHING, np.float32)
    bad = np.zeros(windows, np.int64)
    for piece, matrix in cells:
        column = parameter
        if piece.columns is not None:
            places = np.flatnonzero(piece.columns == parameter)
            if not len(places):
                continue
            column = int(places[0])
        norms[piece.start : piece.stop] = matrix.norms[piece.rows, column]
        rows = slice(
            *np.searchsorted(matrix.bad_rows, [piece.rows.start, piece.rows.stop]).tolist()
        )
        numbers = matrix.bad_rows[rows] - piece.rows.start + piece.start
        bad[numbers] = matrix.bad[rows, column]
    return norms, bad


def _reduce(function: np.ufunc, values: NDArray[Any], groups: NDArray[np.intp]) -> NDArray[Any]:
    reduced: NDArray[Any] = function.reduceat(values, groups) if len(groups) else values
    return reduced
