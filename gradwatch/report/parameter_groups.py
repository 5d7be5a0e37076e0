"""Norm and learning rate of each parameter group, from the norms of its parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradwatch.errors import warn_safely
from gradwatch.record.columns import (
    NORM_COLUMNS,
    ROWS_AT_ONCE,
    Array,
    Labels,
    Source,
    Span,
    Table,
    array_of,
    labels_in,
    safe_text,
    table_frame,
)
from gradwatch.record.records import ParameterGroups
from gradwatch.record.wording import counted

if TYPE_CHECKING:
    import pandas as pd

NOT_RECORDED = (
    "history.groups() needs to know which parameters are in which group, but the version of "
    "gradwatch that recorded this run did not write it down. history.parameters() has the norm of "
    "each parameter, and history.steps() the learning rate of the first group."
)

LEFT_OUT = (
    "history.groups() leaves out {count}, which a version of gradwatch recorded that did not write "
    "down which parameters are in which group."
)

_STEP_COLUMNS = ("step", "optimizer", "lr", "group_lr", *NORM_COLUMNS)


class _Rows(NamedTuple):
    """Rows of the table, each field an array ``[rows]``.

    Attributes:
        step: Number of the step.
        place: Its place among the steps that were read.
        entry: Index of the :class:`ParameterGroups` that applied.
        group: Index of the group in it.
        lr: Learning rate.
        norms: Norm before the clip.
        clipped_norms: Norm after it.
    """

    step: Array
    place: Array
    entry: Array
    group: Array
    lr: Array
    norms: Array
    clipped_norms: Array


def groups_frame(source: Source, span: Span) -> pd.DataFrame:
    """Makes the table; see :meth:`gradwatch.History.groups`.

    Raises:
        ValueError: If the groups were not recorded.
    """
    import pandas as pd

    known, parameters = source.groups(), len(source.layout().names)
    pieces = [_NO_ROWS]
    unknown = place = 0
    for steps, norms in _blocks(source, known, parameters, span):
        entries = _entries(steps, known)
        unknown += int(((entries < 0) & ~_is(steps, "none")).sum())
        pieces += _pieces(steps, norms, entries, known, parameters, place)
        place += len(entries)
    if unknown and len(pieces) == 1:
        raise ValueError(NOT_RECORDED)
    if unknown:
        warn_safely(LEFT_OUT.format(count=counted(unknown, "step")))
    rows = _Rows(*map(np.concatenate, zip(*pieces, strict=True)))
    labels = [safe_text(one.optimizer) for one in known]
    first = np.array([labels.index(label) for label in labels], np.int64)
    rows = _Rows(*(column[_order(rows, first)] for column in rows))
    names = [name for one in known for name in one.names]
    begins = np.cumsum([0, *(len(one.names) for one in known)])
    named = np.empty(len(rows.step), object)
    named[:] = [names[index] for index in (begins[rows.entry] + rows.group).tolist()]
    frame = table_frame(
        {
            "step": rows.step,
            "optimizer": Labels(labels or ("none",), rows.entry),
            "grad_norm": rows.norms,
            "grad_norm_clipped": rows.clipped_norms,
            "lr": rows.lr,
        }
    )
    # Of dtype object in every run: most groups have a number and no name.
    frame.insert(2, "group", pd.Series(named, dtype=object))
    return frame


_NO_ROWS = _Rows(*[np.empty(0, np.int64)] * 4, *[np.empty(0, np.float64)] * 3)


def _order(rows: _Rows, first: Array) -> Array:
    """Sorts by step, then optimizers as they were found, then groups.

    A loop that went back to an earlier checkpoint has a step twice; its place tells them apart.
    """
    optimizer = first[rows.entry] if len(rows.entry) else rows.entry
    order: Array = np.lexsort((rows.group, rows.place, optimizer, rows.step))
    return order


def _blocks(
    source: Source, known: Sequence[ParameterGroups], parameters: int, span: Span
) -> Iterator[tuple[Table, Table | None]]:
    """Reads steps, and the norms of parameters whose optimizer has several groups."""
    several = [one for one in known if len(one.names) > 1]
    wanted = sorted({index for one in several for group in one.members for index in group})
    if not wanted:
        yield source.steps(_STEP_COLUMNS, span), None
        return
    steps = array_of(source.steps(("step",), span)["step"])
    if not len(steps):
        return
    first, end, length = int(steps.min()), int(steps.max()) + 1, max(1, ROWS_AT_ONCE // len(wanted))
    indices = wanted if len(wanted) < parameters else None
    for start in range(first, end, length):
        block = Span(start, min(start + length, end))
        yield source.steps_and_parameters(_STEP_COLUMNS, indices, NORM_COLUMNS, block)


def _is(steps: Table, optimizer: str) -> Array:
    labels = labels_in(steps["optimizer"])
    same = np.array([safe_text(label) == optimizer for label in labels.values], bool)
    by_step: Array = same[labels.codes]
    return by_step


def _entries(steps: Table, known: Sequence[ParameterGroups]) -> Array:
    """Returns by step the index of the groups that applied; -1 if they are not known."""
    step = array_of(steps["step"])
    entries = np.full(len(step), -1, np.int64)
    for index, one in enumerate(known):
        # A later entry replaces an earlier one; one without names says that they are not known.
        applies = _is(steps, safe_text(one.optimizer)) & (step >= one.from_step)
        entries[applies] = index if one.names else -1
    return entries


def _pieces(
    steps: Table,
    norms: Table | None,
    entries: Array,
    known: Sequence[ParameterGroups],
    parameters: int,
    place: int,
) -> Iterator[_Rows]:
    for entry in np.unique(entries[entries >= 0]).tolist():
        at, groups = np.flatnonzero(entries == entry), len(known[entry].names)
        if groups == 1 or norms is None:
            both = [array_of(steps[name])[at] for name in NORM_COLUMNS]
        else:
            both = _group_norms(known[entry], at, len(entries), norms, parameters)
        yield _Rows(
            np.repeat(array_of(steps["step"])[at], groups),
            np.repeat(at + place, groups),
            np.full(len(at) * groups, entry, np.int64),
            np.tile(np.arange(groups), len(at)),
            _rates(steps, groups)[at].ravel(),
            *both,
        )


def _group_norms(
    groups: ParameterGroups, at: Array, steps: int, norms: Table, parameters: int
) -> list[Array]:
    """Combines norms of parameters: for each column an array ``[len(at) * groups]``."""
    group_of = np.full(parameters, -1, np.int64)
    for index, members in enumerate(groups.members):
        group_of[list(members)] = index
    row_of = np.full(steps, -1, np.int64)
    row_of[at] = np.arange(len(at))
    rows = row_of[array_of(norms["place"])]
    group = group_of[labels_in(norms["parameter"]).codes]  # codes are indices in the layout
    mine = (rows >= 0) & (group >= 0)
    slots = rows[mine] * len(groups.names) + group[mine]
    return [
        _norms_of_slots(array_of(norms[name])[mine], slots, len(at) * len(groups.names), groups)
        for name in NORM_COLUMNS
    ]


def _norms_of_slots(norms: Array, slots: Array, count: int, groups: ParameterGroups) -> Array:
    # A parameter may have lost its gradient between backward and step: -1 after the clip.
    norms = np.maximum(norms.astype(np.float64), 0.0)
    largest = np.zeros(count)
    with np.errstate(invalid="ignore"):
        np.maximum.at(largest, slots, norms)  # a NaN stays a NaN
    if groups.norm_type == np.inf:
        return largest
    # Relative to the largest one, so that no power overflows or vanishes.
    usual = np.isfinite(largest) & (largest > 0)
    unit = np.where(usual, largest, 1.0)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        powers = (norms / unit[slots]) ** groups.norm_type
        sums = np.bincount(slots, powers, minlength=count)
        combined: Array = np.where(usual, unit * sums ** (1 / groups.norm_type), largest)
    return combined


def _rates(steps: Table, groups: int) -> Array:
    """Returns the learning rates: float64 ``[steps, groups]``."""
    if groups == 1:
        return array_of(steps["lr"])[:, None]
    texts = labels_in(steps["group_lr"])
    # Each text once: a million steps often have a handful of them.
    rates: Array = np.full((max(1, len(texts.values)), groups), np.nan)
    for row, text in enumerate(texts.values):
        found = json.loads(text)[:groups] if text else []
        rates[row, : len(found)] = found
    by_step: Array = rates[texts.codes]
    return by_step


@dataclass(frozen=True, slots=True)
class GroupRate:
    """The learning rate of a parameter group.

    Attributes:
        optimizer: Label of the optimizer.
        name: Name or index of the group.
        members: Indices of its parameters in the layout.
        rate: Median over the steps that have the group; NaN if it has no rate.
    """

    optimizer: str
    name: str | int
    members: tuple[int, ...]
    rate: float


def group_rates(source: Source) -> list[GroupRate]:
    """Returns the rates of the newest groups of all optimizers; empty if the run has one group."""
    known = source.groups()
    newest = {one.optimizer: index for index, one in enumerate(known)}
    if sum(len(known[index].names) for index in newest.values()) < 2:
        return []
    steps = source.steps(_STEP_COLUMNS, Span())
    entries, found = _entries(steps, known), []
    for index in newest.values():
        one = known[index]
        rates = _rates(steps, len(one.names))[entries == index]
        for name, members, rate in zip(one.names, one.members, rates.T, strict=True):
            finite = rate[np.isfinite(rate)]
            usual = float(np.median(finite)) if len(finite) else np.nan
            found.append(GroupRate(safe_text(one.optimizer), name, members, usual))
    return found
