"""No gradient: parameters that the optimizer steps and that no backward reaches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import safe_text
from gradwatch.report.finding import Evidence, Finding, counted, named
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "They are in the optimizer and require a gradient, but stay as they were initialised (weight "
    "decay apart): a part of the model does not learn."
)
ADVICE = (
    "Look for detach(), no_grad(), .item() or .data between them and the loss, for a module that "
    "forward() does not call, and for an output that the loss leaves out. If that is meant, call "
    "requires_grad_(False) on them."
)


def no_gradient(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds parameters that miss their gradient, now and in the later half of the run.

    Frozen parameters are none: they do not require a gradient. Nor are those that receive one now
    and then, such as an expert that is seldom chosen.
    """
    events = run.events[run.events["kind"] == "no_gradient"]
    if not len(events):
        return
    present = run.sample.present
    # As events_frame() writes them.
    names = [safe_text(name) for name in run.layout.names]
    ever = {names[index] for index in np.flatnonzero(present.any(axis=0))}
    late = {names[index] for index in np.flatnonzero(present[len(present) // 2 :].any(axis=0))}
    # The event comes at the first step without; only the numbers tell whether it stayed so.
    lost = events[~events["parameter"].isin(list(late))].drop_duplicates("parameter")
    for never in (True, False):
        mine = lost[lost["parameter"].isin(list(ever)) != never]
        if len(mine):
            step = int(mine["step"].min())
            yield _finding(tuple(map(str, mine["parameter"])), step, never)


def _finding(names: tuple[str, ...], step: int, never: bool) -> Finding:
    lost = "never received a gradient"
    if not never:
        lost = "received no gradient in the later half of the run"
    title = f"{counted(len(names), 'parameter')} {lost}: {named(names)}."
    seen = Evidence((step,), names, {"parameters": float(len(names))})
    return Finding("no_gradient", "warning", title, seen, WHY, ADVICE)
