"""Heat map: the norms of all parameters over a range of steps."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gradwatch_dashboard.answers import pack
from gradwatch_dashboard.arguments import Arguments
from gradwatch_dashboard.binning import Cells, bin_bad, bin_norms, bin_table, spans_of
from gradwatch_dashboard.sessions import Track

MAX_COLUMNS = 4096
DEFAULT_COLUMNS = 1000
MAX_CELLS = 32 * 2**20
"""Cells of a heat map; with more parameters there are fewer columns."""


def heatmap(run: str, track: Track, cells: Cells, arguments: Arguments) -> bytes:
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
