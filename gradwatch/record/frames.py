"""pandas frames of records; pandas is loaded here only, and only when used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.record.batch import NO_GRADIENT, RecordBatch
from gradwatch.record.event import Event
from gradwatch.record.step import StepRecord

if TYPE_CHECKING:
    import pandas as pd

STEP_COLUMNS = tuple(f.name for f in fields(StepRecord) if f.name not in ("step", "global_step"))
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


def steps_frame(batch: RecordBatch) -> pd.DataFrame:
    """Makes a frame with one row per optimizer step.

    Args:
        batch: The steps.

    Returns:
        Index ``step``, one column per field of :class:`~gradwatch.record.step.StepRecord`.
    """
    import pandas as pd

    columns = {name: [getattr(r, name) for r in batch.steps] for name in STEP_COLUMNS}
    index = pd.Index([record.step for record in batch.steps], name="step", dtype="int64")
    frame: pd.DataFrame = pd.DataFrame(columns, index=index, columns=list(STEP_COLUMNS))
    return frame


def parameters_frame(batch: RecordBatch) -> pd.DataFrame:
    """Makes a frame with one row per step and parameter that had a gradient in it.

    Args:
        batch: The steps.

    Returns:
        Columns ``step, parameter, grad_norm, grad_norm_clipped`` and one per further statistic.
    """
    import pandas as pd

    rows, columns = np.nonzero(batch.norms != NO_GRADIENT)
    steps = np.array([record.step for record in batch.steps], dtype=np.int64)
    names = np.array(batch.layout.names, dtype=object)
    data = {
        "step": steps[rows],
        "parameter": names[columns],
        "grad_norm": batch.norms[rows, columns],
        "grad_norm_clipped": batch.clipped_norms[rows, columns],
    }
    data.update({name: plane[rows, columns] for name, plane in batch.statistics.items()})
    frame: pd.DataFrame = pd.DataFrame(data)
    return frame


def events_frame(events: Sequence[Event]) -> pd.DataFrame:
    """Makes a frame with one row per event.

    Args:
        events: The events, oldest first.

    Returns:
        Columns as named by the fields of :class:`~gradwatch.record.event.Event`.
    """
    import pandas as pd

    columns = {name: [getattr(event, name) for event in events] for name in EVENT_COLUMNS}
    frame: pd.DataFrame = pd.DataFrame(columns, columns=list(EVENT_COLUMNS))
    return frame
