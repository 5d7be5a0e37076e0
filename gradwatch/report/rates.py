"""Learning rates in the words of a finding: that of a parameter's group, or those of all groups."""

from __future__ import annotations

import json
import math

import numpy as np

from gradwatch.report.parameter_groups import GroupRate
from gradwatch.report.run_data import OptimizerArrays, RunData

NOT_RECORDED = "not recorded"

_MOST_GROUPS = 3


def usual_rate(run: RunData, name: str) -> str:
    """Names the usual rate of the parameter group that a parameter is in."""
    group = _group_of(run, name)
    if group is not None:
        return _in_group(group.rate, group)
    # Without groups nothing says which of several optimizers has the parameter.
    if run.group_rates or len(run.optimizers) != 1:
        return NOT_RECORDED
    rates = run.optimizers[0]["lr"]
    rates = rates[np.isfinite(rates)]
    return f"{np.median(rates):.3g}" if len(rates) else NOT_RECORDED


def rate_at(run: RunData, steps: OptimizerArrays, row: int, name: str = "") -> str:
    """Names the rate in one step of an optimizer.

    Args:
        run: The run.
        steps: The steps of the optimizer.
        row: Index of the step in them.
        name: The parameter whose group is meant. Without it the rates of all groups are named, the
            highest first: any of them may be the one that is too high.
    """
    rates = _rates(steps, row)
    groups = [group for group in run.group_rates if group.optimizer == steps.optimizer]
    if len(groups) != len(rates) or len(set(rates)) == 1:
        return f"{rates[0]:.3g}" if math.isfinite(rates[0]) else NOT_RECORDED
    group = _group_of(run, name)
    if group in groups:
        return _in_group(rates[groups.index(group)], group)
    order = sorted((-rate, at) for at, rate in enumerate(rates) if math.isfinite(rate))
    if not order:
        return NOT_RECORDED
    highest, *others = [f"{-rate:.3g} in {groups[at].name!r}" for rate, at in order]
    highest = highest.replace(" in ", " in parameter group ", 1)
    if len(order) > _MOST_GROUPS:
        return f"{highest} down to {others[-1]}"
    return ", ".join([highest, *others])


def _rates(steps: OptimizerArrays, row: int) -> list[float]:
    texts = steps.group_lr
    text = "" if texts is None else texts.values[texts.codes[row]]
    if not text:
        return [float(steps["lr"][row])]
    return [math.nan if rate is None else float(rate) for rate in json.loads(text)]


def _group_of(run: RunData, name: str) -> GroupRate | None:
    if name not in run.layout.names:
        return None
    index = run.layout.names.index(name)
    return next((group for group in run.group_rates if index in group.members), None)


def _in_group(rate: float, group: GroupRate) -> str:
    if not math.isfinite(rate):
        return NOT_RECORDED
    return f"{rate:.3g} in parameter group {group.name!r} of {group.optimizer}"
