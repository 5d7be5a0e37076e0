"""Segments: the tensors of a segment, checked, as arrays.

Norms are kept *coded*, so that one maximum says what a cell is to show: what is finite is more than
anything else, a NaN is more than an Inf, that more than no gradient, and that more than nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.arguments import note
from gradwatch_dashboard.wire import COLUMNS, NO_GRADIENT, Tag

NAN_CODE = -0.25
INF_CODE = -0.5
NOTHING = -2.0
"""Stands for the norm where nothing was recorded."""

MAX_STEP = 2**50
"""Larger numbers of steps are none: an int64 has to hold one times the columns of a heat map."""

_WRONG = "The Gradients tab leaves out a chunk of %s of run %s: its tensor is %s"

ChunkKey = tuple[int, float]
"""Step and wall time of an Event: the same for all tensors of a chunk."""


def encode(norms: NDArray[Any]) -> NDArray[Any]:
    """Codes norms, in place.

    Args:
        norms: float array of any shape; NaN, Inf and -1 as on the wire. Other numbers below zero
            are no norms, and count as NaN.

    Returns:
        The same array.
    """
    norms[(norms < 0) & np.isfinite(norms) & (norms != NO_GRADIENT)] = NAN_CODE
    norms[np.isnan(norms)] = NAN_CODE
    norms[np.isinf(norms)] = INF_CODE
    return norms


def decode(norms: NDArray[Any]) -> NDArray[Any]:
    """Takes the codes of NaN and Inf back, in place.

    Args:
        norms: float array of any shape, coded.

    Returns:
        The same array.
    """
    np.copyto(norms, np.nan, where=norms == NAN_CODE)
    np.copyto(norms, np.inf, where=norms == INF_CODE)
    return norms


@dataclass(frozen=True, slots=True)
class Steps:
    """The windows of a segment.

    Attributes:
        table: float64 array ``[windows, 11]``, as :data:`~gradwatch_dashboard.wire.COLUMNS`; the
            steps rise and no two windows share one.
        chunks: Key of each chunk with the rows that are good, bool array ``[rows]``.
    """

    table: NDArray[np.float64]
    chunks: tuple[tuple[ChunkKey, NDArray[np.bool_]], ...]


@dataclass(frozen=True, slots=True)
class MatrixChunks:
    """The cells of a segment.

    Attributes:
        norms: float32 array ``[windows, P]``, coded.
        bad_rows: intp array ``[rows]``: the windows that have bad steps, rising.
        bad: uint16 array ``[rows, P]``: the bad steps of those windows.
    """

    norms: NDArray[np.float32]
    bad_rows: NDArray[np.intp]
    bad: NDArray[np.uint16]

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.norms.nbytes + self.bad_rows.nbytes + self.bad.nbytes


def read_steps(run: str, tag: Tag, data: Sequence[Any]) -> Steps:
    """Checks the tables of a segment.

    Args:
        run: For the log.
        tag: For the log.
        data: Its ``TensorDatum``s.

    Returns:
        Its windows, without those whose steps are no whole numbers or do not rise.
    """
    tables: dict[ChunkKey, NDArray[np.float64]] = {}
    for datum in data:
        if _fits(run, tag, datum.numpy, np.float64, len(COLUMNS)):
            tables.setdefault(_key(datum), datum.numpy)
    table = np.concatenate([np.empty((0, len(COLUMNS))), *tables.values()])
    good = _are_good(table[:, 0], table[:, 1])
    ends = np.cumsum([len(part) for part in tables.values()], dtype=np.intp)
    return Steps(table[good], tuple(zip(tables, np.split(good, ends)[:-1], strict=True)))


def read_matrix(
    run: str,
    tag: Tag,
    steps: Steps,
    parameters: int,
    norms: Sequence[Any],
    bad: Sequence[Any],
) -> MatrixChunks:
    """Checks the cells of a segment.

    Args:
        run: For the log.
        tag: Of the norms, for the log.
        steps: Its windows.
        parameters: P.
        norms: ``TensorDatum``s of its norms.
        bad: ``TensorDatum``s of its bad steps.

    Returns:
        Its cells, one row for each window; nothing where there is no fitting tensor.
    """
    norms_of = _by_chunk(run, tag, norms, np.float32, parameters)
    bad_of = _by_chunk(run, tag._replace(kind="bad"), bad, np.uint16, parameters)
    cells = np.full((len(steps.table), parameters), NOTHING, np.float32)
    rows: list[NDArray[np.intp]] = [np.empty(0, np.intp)]
    counts = [np.empty((0, parameters), np.uint16)]
    start = 0
    for key, good in steps.chunks:
        stop = start + int(good.sum())
        found, found_bad = norms_of.pop(key, None), bad_of.get(key)
        if found is not None and len(found) == len(good):
            cells[start:stop] = found if good.all() else found[good]
            encode(cells[start:stop])
        if found_bad is not None and len(found_bad) == len(good):
            here = found_bad[good]
            places = np.flatnonzero(here.any(axis=1))
            rows.append(places + start)
            counts.append(here[places])
        start = stop
    return MatrixChunks(cells, np.concatenate(rows), np.concatenate(counts))


def _by_chunk(
    run: str, tag: Tag, data: Sequence[Any], dtype: type, width: int
) -> dict[ChunkKey, NDArray[Any]]:
    found: dict[ChunkKey, NDArray[Any]] = {}
    for datum in data:
        if _fits(run, tag, datum.numpy, dtype, width):
            found.setdefault(_key(datum), datum.numpy)
    return found


def _key(datum: Any) -> ChunkKey:
    return datum.step, datum.wall_time


def _fits(run: str, tag: Tag, array: Any, dtype: type, width: int) -> bool:
    if array.dtype == dtype and array.ndim == 2 and array.shape[1] == width:
        return True
    note(_WRONG, str(tag), run, f"{array.dtype}{list(array.shape)}")
    return False


def _are_good(first: NDArray[np.float64], last: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tells which windows hold whole steps, later than all good ones before."""
    good: NDArray[np.bool_] = (first >= 0) & (first <= last) & (last <= MAX_STEP)
    good[good] &= (first[good] % 1 == 0) & (last[good] % 1 == 0)
    if not (first[good][1:] > last[good][:-1]).all():
        end = -1.0
        for row in np.flatnonzero(good):
            good[row] = first[row] > end
            end = max(end, last[row]) if good[row] else end
    return good
