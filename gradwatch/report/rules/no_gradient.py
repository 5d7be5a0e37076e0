"""No gradient: the optimizer has parameters that no backward pass reaches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import safe_text
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, named
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "They are in the optimizer and require a gradient, but keep their values (apart from weight "
    "decay): a part of the model does not learn."
)
ADVICE = (
    "Look for detach(), no_grad(), .item() or .data between them and the loss, for a module that "
    "forward() does not call, and for an output that the loss does not use. If this is intended, "
    "call requires_grad_(False) on them."
)


def no_gradient(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds parameters without a gradient throughout the second half of the run.

    Frozen parameters do not count: they do not require a gradient. Nor do parameters that receive
    one now and then, such as an expert that is seldom chosen.
    """
    events = [one for one in run.events if one.kind == "no_gradient"]
    if not events:
        return
    present = run.sample.present
    # Escaped as the names in the events of a RunData are, to compare both.
    names = [safe_text(name) for name in run.layout.names]
    ever = {names[index] for index in np.flatnonzero(present.any(axis=0))}
    late = {names[index] for index in np.flatnonzero(present[len(present) // 2 :].any(axis=0))}
    # The event is logged at the first step without a gradient; only the sample tells whether one
    # came later.
    lost: dict[str, int] = {}  # parameters, and the step of their first event
    for one in events:
        if one.parameter not in late:
            lost.setdefault(one.parameter, one.step)
    for never in (True, False):
        mine = {name: step for name, step in lost.items() if (name in ever) != never}
        if mine:
            yield _finding(tuple(mine), min(mine.values()), never)


def _finding(names: tuple[str, ...], step: int, never: bool) -> Finding:
    lost = "never received a gradient"
    if not never:
        lost = "received no gradient in the second half of the run"
    title = f"{counted(len(names), 'parameter')} {lost}: {named(names)}."
    seen = Evidence((step,), names, {"parameters": float(len(names))})
    return Finding("no_gradient", "warning", title, seen, WHY, ADVICE)
