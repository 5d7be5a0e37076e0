"""Windows of steps in the columns of a picture: the heat map, and the curve of one parameter."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard import errors

from gradwatch_dashboard.arguments import Arguments
from gradwatch_dashboard.segments import NOTHING, MatrixChunks, decode, encode
from gradwatch_dashboard.sessions import Piece, Timeline
from gradwatch_dashboard.wire import COLUMNS

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


_BLOCK = 64  # columns that are transposed together: they fit into the cache

Ints = NDArray[np.int64]

Cells = Sequence[tuple[Piece, MatrixChunks]]
"""The pieces of a track, each with the cells of its segment."""


class Spans(NamedTuple):
    """The windows that each column shows.

    Attributes:
        start: intp array ``[columns]``: number of the first window in the track.
        stop: intp array ``[columns]``: number of the one after the last; ``start`` where there is
            none.
    """

    start: NDArray[np.intp]
    stop: NDArray[np.intp]


def spans_of(first_steps: Ints, last_steps: Ints, first: int, last: int, columns: int) -> Spans:
    """Divides steps evenly into columns.

    Column c covers the steps s with ``floor((s - first) * columns / (last - first + 1)) == c``.

    Args:
        first_steps: int64 array ``[windows]``, rising.
        last_steps: int64 array ``[windows]``; no two windows share a step.
        first: The first step, below 2**50.
        last: The last step, below 2**50.
        columns: 1 to 4096, and not more than there are steps.
    """
    steps = last - first + 1
    edges = first - (-np.arange(columns + 1, dtype=np.int64) * steps) // columns
    start = np.searchsorted(last_steps, edges[:-1])
    return Spans(start, np.maximum(start, np.searchsorted(first_steps, edges[1:])))


def bin_table(table: NDArray[np.float64], spans: Spans) -> dict[str, NDArray[np.float32]]:
    """Bins what is known of whole steps.

    Args:
        table: float64 array ``[windows, 11]``.
        spans: The windows of each column.

    Returns:
        Name to float32 array ``[columns]``: the largest finite ``grad_norm`` and
        ``grad_norm_clipped`` (NaN or Inf where none is finite), the last ``clip_threshold``, the
        smallest ``clip_coef``, and the sums of ``bad_steps``, ``clipped_steps`` and
        ``skipped_steps``. NaN, and 0 for the sums, where nothing was recorded.
    """
    named = dict(zip(COLUMNS, table.T, strict=True))
    binned: dict[str, NDArray[Any]] = {}
    for name in ("grad_norm", "grad_norm_clipped"):
        largest = reduce_spans(np.maximum, encode(named[name].copy()), spans, np.nan)
        binned[name] = decode(np.where(largest == -1.0, np.nan, largest))
    ends = Spans(np.maximum(spans.stop - 1, spans.start), spans.stop)
    binned["clip_threshold"] = reduce_spans(np.fmax, named["clip_threshold"], ends, np.nan)
    binned["clip_coef"] = reduce_spans(np.fmin, named["clip_coef"], spans, np.nan)
    for name in ("bad_steps", "clipped_steps", "skipped_steps"):
        counts = np.nan_to_num(named[name], nan=0.0, posinf=0.0, neginf=0.0)
        binned[name] = reduce_spans(np.add, np.maximum(counts, 0.0), spans, 0.0)
    return {name: _narrow(values) for name, values in binned.items()}


def reduce_spans(
    function: np.ufunc, values: NDArray[Any], spans: Spans, nothing: float
) -> NDArray[Any]:
    """Reduces the values of each column to one.

    Args:
        function: Of two numbers.
        values: array ``[windows]``.
        spans: The windows of each column.
        nothing: For a column without a window.

    Returns:
        array ``[columns]``.
    """
    pairs = np.stack([spans.start, spans.stop], axis=1).ravel()
    padded = np.append(values, values.dtype.type(nothing))
    reduced = function.reduceat(padded, pairs)[::2]
    return np.where(spans.start < spans.stop, reduced, nothing)


def bin_norms(pieces: Cells, parameters: int, spans: Spans) -> NDArray[np.float32]:
    """Bins the norms: the largest finite one of each cell.

    Args:
        pieces: The pieces of the track with their cells.
        parameters: P of the track.
        spans: The windows of each column.

    Returns:
        float32 array ``[P, columns]``: NaN or Inf where no norm is finite, -1 where there was no
        gradient, -2 where nothing was recorded.
    """
    columns = len(spans.start)
    cells = np.empty((parameters, columns), np.float32)
    for begin in range(0, columns, _BLOCK):
        here = slice(begin, min(begin + _BLOCK, columns))
        block = np.full((here.stop - begin, parameters), NOTHING, np.float32)
        for piece, matrix in pieces:
            rows = matrix.norms[piece.rows]
            for column, start, stop in _overlaps(spans, here, piece):
                _take_larger(block[column], rows[start:stop], piece.columns)
        cells[:, here] = decode(block).T
    return cells


def bin_bad(
    pieces: Cells, parameters: int, spans: Spans
) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    """Counts the bad steps of each cell.

    Args:
        pieces: As for :func:`bin_norms`.
        parameters: P of the track.
        spans: The windows of each column.

    Returns:
        array ``[P, columns]`` of the narrowest type that holds the counts, or of uint16, where
        65535 stands for more; None where there is none.
    """
    if not any(len(matrix.bad_rows) for _, matrix in pieces):
        return None
    columns = len(spans.start)
    counts = np.zeros((columns, parameters), np.uint32)
    for piece, matrix in pieces:
        numbers = matrix.bad_rows - piece.rows.start + piece.start
        inside = slice(*np.searchsorted(numbers, [piece.start, piece.stop]).tolist())
        numbers, bad = numbers[inside], matrix.bad[inside]
        starts = np.searchsorted(numbers, spans.start)
        stops = np.searchsorted(numbers, spans.stop)
        for column in np.flatnonzero(starts < stops).tolist():
            total = bad[starts[column] : stops[column]].sum(axis=0, dtype=np.uint32)
            if piece.columns is None:
                counts[column] += total
            else:
                counts[column, piece.columns] += total
    largest = int(counts.max(initial=0))
    if largest == 0:
        return None
    if largest <= np.iinfo(np.uint8).max:
        return np.ascontiguousarray(counts.T, np.uint8)
    return np.ascontiguousarray(np.minimum(counts, np.iinfo(np.uint16).max).T, np.uint16)


def _narrow(values: NDArray[Any]) -> NDArray[np.float32]:
    """Copies as float32; what is finite stays so."""
    limit = float(np.finfo(np.float32).max)
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -limit, limit), values).astype(np.float32)


def _overlaps(spans: Spans, here: slice, piece: Piece) -> list[tuple[int, int, int]]:
    """Lists the columns of a block that show rows of a piece: which, and the rows in the piece."""
    start = np.maximum(spans.start[here], piece.start) - piece.start
    stop = np.minimum(spans.stop[here], piece.stop) - piece.start
    columns = np.flatnonzero(start < stop)
    return list(zip(columns.tolist(), start[columns].tolist(), stop[columns].tolist(), strict=True))


def _take_larger(
    cells: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.intp] | None
) -> None:
    row = rows[0] if len(rows) == 1 else np.maximum.reduce(rows, axis=0)
    if columns is None:
        np.maximum(cells, row, out=cells)
    else:
        cells[columns] = np.maximum(cells[columns], row)


MAX_COLUMNS = 4096
DEFAULT_COLUMNS = 1000
MAX_CELLS = 32 * 2**20
"""Cells of a heat map; with more parameters there are fewer columns."""


def heatmap(run: str, track: Timeline, cells: Cells, arguments: Arguments) -> bytes:
    """Answers the route ``heatmap``.

    Args:
        run: Name of the run.
        track: What is asked for.
        cells: Its cells.
        arguments: The range and the columns.
    """
    parameters = len(track.layout.parameters)
    first, last = arguments.range(track.first_step, track.last_step)
    asked = arguments.integer("columns", DEFAULT_COLUMNS, 1, MAX_COLUMNS)
    columns = max(1, min(asked, last - first + 1, MAX_CELLS // max(1, parameters)))
    spans = spans_of(track.first_steps, track.last_steps, first, last, columns)
    arrays: dict[str, NDArray[Any]] = {"norms": bin_norms(cells, parameters, spans)}
    bad = bin_bad(cells, parameters, spans)
    if bad is not None:
        arrays["bad"] = bad
    header = {
        "run": run,
        "optimizer": track.layout.optimizer,
        "first_step": first,
        "last_step": last,
        "columns": columns,
        "parameters": parameters,
    }
    return pack(header, arrays | bin_table(track.table, spans))


MAX_WINDOWS = 20_000
"""Points of a curve; where there are more, neighbours share one."""

_NO_PARAMETER = "parameter must be 0 to {highest}, got {parameter}"


def curve(track: Timeline, cells: Cells, arguments: Arguments) -> str:
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
