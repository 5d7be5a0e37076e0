"""The rule by which the sessions of a run that was resumed are one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gradwatch.record.columns import Array, Labels
from gradwatch.record.folder.event_log import Noted

FirstSteps = Mapping[int, Mapping[str, int]]
"""By session and optimizer the first step of it."""


def first_steps(sessions: Array, optimizers: Labels, steps: Array) -> dict[int, dict[str, int]]:
    """Finds where each session begins.

    Args:
        sessions: int array ``[rows]``.
        optimizers: Label of each row's optimizer.
        steps: int array ``[rows]``.

    Returns:
        By session the lowest step of each optimizer.
    """
    first: dict[int, dict[str, int]] = {}
    for session in np.unique(sessions).tolist():
        of_session = sessions == session
        first[session] = {
            label: int(steps[mine].min())
            for code, label in enumerate(optimizers.values)
            if (mine := of_session & (optimizers.codes == code)).any()
        }
    return first


def replaced_from(first: FirstSteps, session: int, optimizer: str) -> int | None:
    """Finds the step from which on a session's steps of an optimizer are void.

    Args:
        first: Where each session begins.
        session: The session.
        optimizer: Label of the optimizer.

    Returns:
        The lowest step that a later session has of it; None if no later one has any.
    """
    later = [of[optimizer] for number, of in first.items() if number > session and optimizer in of]
    return min(later, default=None)


def is_valid(first: FirstSteps, sessions: Array, optimizers: Labels, steps: Array) -> np.ndarray:
    """Tells which rows no later session has replaced.

    Args:
        first: Where each session begins.
        sessions: int array ``[rows]``.
        optimizers: Label of each row's optimizer.
        steps: int array ``[rows]``.

    Returns:
        bool array ``[rows]``.
    """
    valid = np.ones(len(steps), bool)
    for session in np.unique(sessions).tolist():
        for code, label in enumerate(optimizers.values):
            end = replaced_from(first, session, label)
            if end is not None:
                mine = (sessions == session) & (optimizers.codes == code)
                valid &= ~(mine & (steps >= end))
    return valid


def valid_events(first: FirstSteps, session: int, events: Iterable[Noted]) -> list[Noted]:
    """Leaves out the events of steps that a later session has replaced.

    Args:
        first: Where each session begins.
        session: The session of the events.
        events: Its events.

    Returns:
        The others. An event that belongs to no optimizer goes with the steps of any.
    """
    labels = {label for of in first.values() for label in of}
    ends: dict[str, int | None] = {}
    kept = []
    for noted in events:
        event = noted.event
        if event.optimizer not in ends:
            of_any = event.optimizer == "none" and "none" not in labels
            owners = sorted(labels) if of_any else [event.optimizer]
            found = [replaced_from(first, session, label) for label in owners]
            ends[event.optimizer] = min((end for end in found if end is not None), default=None)
        end = ends[event.optimizer]
        if end is None or event.step < end:
            kept.append(noted)
    return kept
