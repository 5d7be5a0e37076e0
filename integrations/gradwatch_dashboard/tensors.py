"""Tensors: reads and checks the data of a run: layouts, windows, cells and events.

The files may be damaged, or come from an untrusted source. Data that fails a check is left out, and
the log says so once.

Norms are stored *coded*, so that a plain maximum over the norms of a cell picks the one to show:
finite norm > NaN > Inf > no gradient > nothing recorded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.untrusted import fit_name, note
from gradwatch_dashboard.wire import (
    COLUMNS,
    LOOKS,
    NO_GRADIENT,
    OTHER_LOOK,
    REDUCTIONS,
    SHAPES,
    StreamLayout,
    Tag,
    checked_text,
)

NAN_CODE = -0.25
INF_CODE = -0.5
NOTHING = -2.0
"""The coded norm where nothing was recorded."""

MAX_FURTHER_COLUMNS = 64

MAX_STEP = 2**50
"""The largest valid step: its product with the columns of a heat map must fit in an int64."""

_DAMAGED_LAYOUT = "The Gradients tab leaves out the stream %s of run %s: its layout is damaged."
_DAMAGED_EVENT = "The Gradients tab leaves out an event of %s of run %s: it is damaged."
_DAMAGED_CHUNK = "The Gradients tab leaves out a chunk of %s of run %s: its tensor is %s"

_INTEGERS = ("step", "micro_batch", "rank", "nan_count", "inf_count", "global_step")
_TEXTS = ("kind", "parameter", "module", "message", "optimizer")
_COLOR = re.compile("#[0-9a-f]{6}")
_MAX_INTEGER = 2**53  # JavaScript numbers are exact up to here

ChunkKey = tuple[int, float]
"""Step and wall time of an Event; all tensors of a chunk share them."""


def read_layout(run: str, tag: Tag, data: Sequence[Any]) -> StreamLayout | None:
    """Returns the first undamaged layout, with its names cut by :func:`fit_name`; None if none is.

    Here as below, ``run`` and ``tag`` are only for the log, and ``data`` are the ``TensorDatum``s
    of the tag.
    """
    layouts = [layout for datum in data if (layout := _parse_layout(datum.numpy)) is not None]
    if not layouts:
        note(_DAMAGED_LAYOUT, str(tag), run)
        return None
    return layouts[0]


def _parse_layout(array: Any) -> StreamLayout | None:
    try:
        (text,) = array.ravel().tolist()
        return _checked_layout(StreamLayout.from_json(text))
    except ValueError:
        return None


def _checked_layout(layout: StreamLayout) -> StreamLayout:
    count = len(layout.parameters)
    shapes = layout.shapes or ((),) * count
    if len(layout.modules) != count or len(shapes) != count:
        raise ValueError("the numbers of modules, shapes and parameters differ")
    if any(not 0 <= size < 2**53 for shape in shapes for size in shape):
        raise ValueError("a shape has an invalid size")
    parameters = tuple(map(fit_name, layout.parameters))
    if len(set(parameters)) != count:
        raise ValueError("two parameters have the same name")
    columns = tuple((fit_name(name), reduction) for name, reduction in layout.columns)
    names = {*COLUMNS, *(name for name, _ in columns)}
    if len(names) < len(COLUMNS) + len(columns) or len(columns) > MAX_FURTHER_COLUMNS:
        raise ValueError("two columns have the same name, or there are too many columns")
    if any(reduction not in REDUCTIONS for _, reduction in columns):
        raise ValueError("a column has an unknown reduction")
    modules = tuple(map(fit_name, layout.modules))
    return StreamLayout(fit_name(layout.optimizer), parameters, modules, shapes, columns)


@dataclass(frozen=True, slots=True)
class Steps:
    """The windows of a segment.

    Attributes:
        table: float64 array ``[windows, C]``, as written. The steps rise, and no two windows share
            one.
        chunks: Key of each chunk, with a bool array ``[rows]`` of its valid rows.
    """

    table: NDArray[np.float64]
    chunks: tuple[tuple[ChunkKey, NDArray[np.bool_]], ...]


@dataclass(frozen=True, slots=True)
class MatrixChunks:
    """The cells of a segment.

    Attributes:
        norms: float32 array ``[windows, P]``, coded.
        bad_rows: intp array ``[rows]``, rising: the windows that have bad steps.
        bad: uint16 array ``[rows, P]``: the number of bad steps in those windows.
    """

    norms: NDArray[np.float32]
    bad_rows: NDArray[np.intp]
    bad: NDArray[np.uint16]

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return self.norms.nbytes + self.bad_rows.nbytes + self.bad.nbytes


def read_steps(run: str, tag: Tag, data: Sequence[Any], further: int = 0) -> Steps:
    """Returns the windows of a segment, without those whose steps are not integers or do not rise.

    ``further`` is the number of columns that the layout lists in addition to :data:`COLUMNS`.
    """
    width = len(COLUMNS) + further
    tables = _by_chunk(run, tag, data, np.float64, width)
    table = np.concatenate([np.empty((0, width)), *tables.values()])
    good = _are_good(table[:, 0], table[:, 1])
    ends = np.cumsum([len(part) for part in tables.values()], dtype=np.intp)
    return Steps(table[good], tuple(zip(tables, np.split(good, ends)[:-1], strict=True)))


def read_matrix(
    run: str, tag: Tag, steps: Steps, parameters: int, norms: Sequence[Any], bad: Sequence[Any]
) -> MatrixChunks:
    """Returns the cells of a segment, one row per window.

    Cells without a valid tensor are :data:`NOTHING`. ``norms`` and ``bad`` are the
    ``TensorDatum``s of the two tags, and ``tag`` is that of the norms.
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
        # Keep only the rows with a bad step: nearly all are zero, and all of them would take half
        # as much memory as the norms.
        if found_bad is not None and len(found_bad) == len(good):
            here = found_bad[good]
            bad_rows = np.flatnonzero(here.any(axis=1))
            rows.append(bad_rows + start)
            counts.append(here[bad_rows])
        start = stop
    return MatrixChunks(cells, np.concatenate(rows), np.concatenate(counts))


def _by_chunk(
    run: str, tag: Tag, data: Sequence[Any], dtype: type, width: int
) -> dict[ChunkKey, NDArray[Any]]:
    found: dict[ChunkKey, NDArray[Any]] = {}
    for datum in data:
        if _fits(run, tag, datum.numpy, dtype, width):
            # Always the first tensor of a key, so that the rows of norms, bad and steps match.
            found.setdefault(_key(datum), datum.numpy)
    return found


def _key(datum: Any) -> ChunkKey:
    return datum.step, datum.wall_time


def _fits(run: str, tag: Tag, array: Any, dtype: type, width: int) -> bool:
    if array.dtype == dtype and array.ndim == 2 and array.shape[1] == width:
        return True
    note(_DAMAGED_CHUNK, str(tag), run, f"{array.dtype}{list(array.shape)}")
    return False


def _are_good(first: NDArray[np.float64], last: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tells which windows have integer steps that come after all valid windows before them."""
    # A NaN fails every comparison, so it needs no test of its own.
    good: NDArray[np.bool_] = (first >= 0) & (first <= last) & (last <= MAX_STEP)
    good[good] &= (first[good] % 1 == 0) & (last[good] % 1 == 0)
    # This slow loop in Python only runs for damaged files.
    if not (first[good][1:] > last[good][:-1]).all():
        end = -1.0
        for row in np.flatnonzero(good):
            good[row] = first[row] > end
            end = max(end, last[row]) if good[row] else end
    return good


def encode(norms: NDArray[Any]) -> NDArray[Any]:
    """Codes norms in place, and returns the array.

    Args:
        norms: float array of any shape, with NaN, Inf and -1 as written. Other negative numbers are
            not valid norms and become NaN.
    """
    norms[(norms < 0) & np.isfinite(norms) & (norms != NO_GRADIENT)] = NAN_CODE
    norms[np.isnan(norms)] = NAN_CODE
    norms[np.isinf(norms)] = INF_CODE
    return norms


def decode(norms: NDArray[Any]) -> NDArray[Any]:
    """Turns codes back into NaN and Inf in place, and returns the float array of any shape."""
    np.copyto(norms, np.nan, where=norms == NAN_CODE)
    np.copyto(norms, np.inf, where=norms == INF_CODE)
    return norms


class TabEvent(NamedTuple):
    """An event in the form in which the tab receives it.

    Attributes:
        step: The optimizer's step, as in ``Event.step``.
        json: The whole event as a JSON object.
    """

    step: int
    optimizer: str
    json: str


EventChunks = Mapping[ChunkKey, Sequence[TabEvent]]
"""The events of a session, by chunk."""


def read_events(run: str, tag: Tag, data: Sequence[Any], known: EventChunks) -> EventChunks:
    """Returns the events of each chunk of a session, oldest first; reuses the ``known`` chunks."""
    chunks: dict[ChunkKey, Sequence[TabEvent]] = {}
    for datum in data:
        key = _key(datum)
        if key not in chunks:
            chunks[key] = known[key] if key in known else _events_of(run, tag, datum.numpy)
    return chunks


def _events_of(run: str, tag: Tag, texts: Any) -> list[TabEvent]:
    events = [_parse_event(text) for text in texts.ravel().tolist()]
    if None in events:
        note(_DAMAGED_EVENT, str(tag), run)
    return [event for event in events if event is not None]


def _parse_event(text: Any) -> TabEvent | None:
    try:
        return _checked_event(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None


def _checked_event(fields: Any) -> TabEvent:
    """Copies the known fields of an event, and drops everything else in the untrusted object."""
    event: dict[str, int | float | str] = {}
    for name in _INTEGERS:
        event[name] = _integer(fields.get(name, 0) if name != "step" else fields["step"])
    for name in _TEXTS:
        event[name] = fit_name(checked_text(fields.get(name, "")))
    value = float(fields.get("value", math.nan))
    # JSON has no NaN, and browsers cannot parse what Python's json writes for it.
    event["value"] = value if math.isfinite(value) else str(value).replace("inf", "Infinity")
    if event["value"] == "nan":
        event["value"] = "NaN"
    event["color"], event["shape"] = _look(fields, str(event["kind"]))
    return TabEvent(int(event["step"]), str(event["optimizer"]), json.dumps(event))


def _look(fields: Any, kind: str) -> tuple[str, str]:
    color, shape = fields.get("color"), fields.get("shape")
    # Only an exact color and a known shape may get into the page; the text is untrusted.
    if isinstance(color, str) and _COLOR.fullmatch(color) and shape in SHAPES:
        return color, shape
    return LOOKS.get(kind, OTHER_LOOK)


def _integer(value: Any) -> int:
    number = int(value)
    if number != value or abs(number) > _MAX_INTEGER:
        raise ValueError(f"{number} is not a valid count")
    return number
