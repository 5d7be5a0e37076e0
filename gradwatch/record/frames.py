"""pandas frames of columns; pandas is loaded here only, and only when used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.record.columns import STEP_COLUMNS, Column, Labels, Table, array_of, safe_text
from gradwatch.record.event import Event

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EVENT_COLUMNS", "STEP_COLUMNS", "events_frame", "table_frame"]

EVENT_COLUMNS = (
    "step",
    "micro_batch",
    "kind",
    "parameter",
    "module",
    "value",
    "rank",
    "message",
    "nan_count",
    "inf_count",
    "optimizer",
)
_EVENT_DTYPES = {
    **dict.fromkeys(("step", "micro_batch", "rank", "nan_count", "inf_count"), np.int64),
    "value": np.float64,
}


def table_frame(table: Table, index: str | None = None) -> pd.DataFrame:
    """Makes a frame; its dtypes do not depend on what the rows hold, nor on whether there are any.

    Args:
        table: The columns by name.
        index: The column that becomes the index; None for a plain one.

    Returns:
        One column each: int64, float32 or float64, bool, and the dtype that pandas has for strings.
    """
    import pandas as pd

    columns = {name: _values(column) for name, column in table.items() if name != index}
    rows = None if index is None else pd.Index(array_of(table[index]), name=index, dtype="int64")
    # The arrays were made for this frame; a copy of a million steps takes longer than reading them.
    frame: pd.DataFrame = pd.DataFrame(columns, index=rows, columns=list(columns), copy=False)
    return frame


def events_frame(events: Sequence[Event]) -> pd.DataFrame:
    """Makes a frame with one row per event.

    Args:
        events: The events, oldest first.

    Returns:
        Columns as named by the fields of :class:`~gradwatch.record.event.Event`.
    """
    table: dict[str, Column] = {}
    for name in EVENT_COLUMNS:
        values = [getattr(event, name) for event in events]
        dtype = _EVENT_DTYPES.get(name)
        table[name] = Labels.of(values) if dtype is None else np.array(values, dtype)
    return table_frame(table)


def _values(column: Column) -> Any:
    if not isinstance(column, Labels):
        return column
    import pandas as pd

    # Taken by code, a million strings cost what a million integers cost.
    return pd.Series(list(map(safe_text, column.values)), dtype="str").array.take(column.codes)
