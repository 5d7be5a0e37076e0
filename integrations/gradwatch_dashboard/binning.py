"""Binning: reduces windows of steps to the columns of a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.sessions import Piece
from gradwatch_dashboard.tensors import NOTHING, MatrixChunks, decode, encode
from gradwatch_dashboard.wire import COLUMNS

_BLOCK = 64  # columns that are transposed together; so many fit in the CPU cache

Ints = NDArray[np.int64]

Cells = Sequence[tuple[Piece, MatrixChunks]]
"""The pieces of a timeline, each with the cells of its segment."""


class Spans(NamedTuple):
    """The windows that each column shows.

    Attributes:
        start: intp array ``[columns]``: index of the first window in the timeline.
        stop: intp array ``[columns]``: index after the last window; equal to ``start`` for a column
            without windows.
    """

    start: NDArray[np.intp]
    stop: NDArray[np.intp]


def spans_of(first_steps: Ints, last_steps: Ints, first: int, last: int, columns: int) -> Spans:
    """Divides a range of steps evenly into columns.

    Column c covers the steps s with ``floor((s - first) * columns / (last - first + 1)) == c``.

    Args:
        first_steps: int64 array ``[windows]``, rising: the first step of each window.
        last_steps: int64 array ``[windows]``: the last step of each. No two windows share a step.
        first: The first step of the range, below 2**50.
        last: The last step of the range, below 2**50.
        columns: Number of columns: 1 to 4096, at most the number of steps in the range.
    """
    steps = last - first + 1
    # Integer arithmetic, rounding up: float64 cannot hold a step times 4096 exactly.
    edges = first - (-np.arange(columns + 1, dtype=np.int64) * steps) // columns
    start = np.searchsorted(last_steps, edges[:-1])
    return Spans(start, np.maximum(start, np.searchsorted(first_steps, edges[1:])))


def bin_table(
    table: NDArray[np.float64], spans: Spans, further: Sequence[tuple[str, str]] = ()
) -> dict[str, NDArray[np.float32]]:
    """Bins the per-step values, which do not depend on a parameter.

    Args:
        table: float64 array ``[windows, C]``: :data:`COLUMNS`, then the further ones.
        spans: The windows of each column of the heat map.
        further: Name and reduction of each further column of the table.

    Returns:
        Name to float32 array ``[columns]``: the largest finite ``grad_norm`` and
        ``grad_norm_clipped`` (NaN or Inf if none is finite), the last ``clip_threshold``, the
        smallest ``clip_coef``, the sums of ``bad_steps``, ``clipped_steps`` and ``skipped_steps``,
        and the further columns. Where nothing was recorded, sums are 0 and the others NaN.
    """
    names = (*COLUMNS, *(name for name, _ in further))
    named = dict(zip(names, table.T, strict=True))
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
    for name, reduction in further:
        over = ends if reduction == "newest" else spans
        binned[name] = reduce_spans(_UFUNCS[reduction], named[name], over, np.nan)
    return {name: _narrow(values) for name, values in binned.items()}


_UFUNCS = {"largest": np.fmax, "smallest": np.fmin, "newest": np.fmax}
"""fmax and fmin ignore NaN, which a further column holds where its value is unknown."""


def reduce_spans(
    function: np.ufunc, values: NDArray[Any], spans: Spans, nothing: float
) -> NDArray[Any]:
    """Reduces the values of each column to one; ``nothing`` for a column without windows."""
    # reduceat needs indices within the array, hence the padding. For an empty span it returns the
    # value at `start`, which np.where replaces.
    pairs = np.stack([spans.start, spans.stop], axis=1).ravel()
    padded = np.append(values, values.dtype.type(nothing))
    reduced = function.reduceat(padded, pairs)[::2]
    return np.where(spans.start < spans.stop, reduced, nothing)


def bin_norms(pieces: Cells, parameters: int, spans: Spans) -> NDArray[np.float32]:
    """Bins the norms of parameters: the largest finite norm of each cell.

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
            rows = matrix.norms[piece.rows]  # a view
            for column, start, stop in _overlaps(spans, here, piece):
                _keep_larger(block[column], rows[start:stop], piece.columns)
        cells[:, here] = decode(block).T
    return cells


def bin_bad(
    pieces: Cells, parameters: int, spans: Spans
) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    """Counts the bad steps of each cell.

    Returns:
        Array ``[P, columns]``, uint8 if all counts fit, else uint16, where 65535 also stands for
        larger counts. None if there are no bad steps.
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
    # The narrowest type: an answer has up to 32 million cells, most of them 0.
    largest = int(counts.max(initial=0))
    if largest == 0:
        return None
    if largest <= np.iinfo(np.uint8).max:
        return np.ascontiguousarray(counts.T, np.uint8)
    return np.ascontiguousarray(np.minimum(counts, np.iinfo(np.uint16).max).T, np.uint16)


def _narrow(values: NDArray[Any]) -> NDArray[np.float32]:
    """Copies to float32, keeping finite values finite."""
    # A plain cast turns a value above 3.4e38 into Inf, which would be drawn as a bad step.
    limit = float(np.finfo(np.float32).max)
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -limit, limit), values).astype(np.float32)


def _overlaps(spans: Spans, here: slice, piece: Piece) -> list[tuple[int, int, int]]:
    """Lists each column of a block that shows rows of a piece, as (column, start, stop).

    The column is counted from the start of the block, the rows from the start of the piece.
    """
    start = np.maximum(spans.start[here], piece.start) - piece.start
    stop = np.minimum(spans.stop[here], piece.stop) - piece.start
    columns = np.flatnonzero(start < stop)
    return list(zip(columns.tolist(), start[columns].tolist(), stop[columns].tolist(), strict=True))


def _keep_larger(
    cells: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.intp] | None
) -> None:
    row = rows[0] if len(rows) == 1 else np.maximum.reduce(rows, axis=0)
    if columns is None:
        np.maximum(cells, row, out=cells)
    else:
        cells[columns] = np.maximum(cells[columns], row)


def parameter_column(
    cells: Cells, parameter: int, windows: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Extracts one parameter from the cells of a timeline that has ``windows`` windows.

    Returns:
        Its coded norms, float32 array ``[windows]``, and its bad steps, int64 array ``[windows]``.
    """
    norms = np.full(windows, NOTHING, np.float32)
    bad = np.zeros(windows, np.int64)
    for piece, matrix in cells:
        column = parameter
        if piece.columns is not None:
            positions = np.flatnonzero(piece.columns == parameter)
            if not len(positions):
                continue
            column = int(positions[0])
        norms[piece.start : piece.stop] = matrix.norms[piece.rows, column]
        rows = slice(
            *np.searchsorted(matrix.bad_rows, [piece.rows.start, piece.rows.stop]).tolist()
        )
        numbers = matrix.bad_rows[rows] - piece.rows.start + piece.start
        bad[numbers] = matrix.bad[rows, column]
    return norms, bad
