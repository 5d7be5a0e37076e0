"""WindowReducer: which steps make a window, and the windows that are complete."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch_tensorboard.windows import Windows

SINGLE_STEPS = 2048
"""So many steps have a window each; then the width doubles whenever their number has."""

EARLY_ENDS = 1_000
"""So many windows of a run end early."""


def window_ends(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tells where the window of each step ends.

    The width is 1 up to step 2048, 2 up to step 4096, 4 up to step 8192 and so on: a window is
    never more than 1/1024 of the run, and 1,000,000 steps are 11,000 windows.

    Args:
        steps: int64 array ``[steps]``: numbers of steps, from 1.

    Returns:
        int64 array ``[steps]``: the last step that belongs to the same window.

    >>> window_ends(np.array([7, 2048, 2049, 2050, 2051, 4097]))
    array([   7, 2048, 2050, 2050, 2052, 4100])
    """
    _, doublings = np.frexp((steps - 1) // SINGLE_STEPS)
    widths = np.left_shift(np.int64(1), doublings.astype(np.int64))
    ends: NDArray[np.int64] = ((steps - 1) // widths + 1) * widths
    return ends


class EarlyEnds:
    """Grants windows of a run an early end, as often as its file can bear."""

    def __init__(self, left: int = EARLY_ENDS) -> None:
        """Starts with all of them left.

        Args:
            left: How many there are.
        """
        self._left = left

    def grant(self, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Grants the first ones.

        Args:
            wanted: bool array ``[steps]``: where a window is to end early.

        Returns:
            bool array ``[steps]``: where it may.
        """
        places = np.flatnonzero(wanted)[: self._left]
        self._left -= len(places)
        granted = np.zeros_like(wanted)
        granted[places] = True
        return granted


class WindowReducer:
    """Gathers the steps of one stream into windows, whatever the batches that they come in.

    A window ends early at the first of several non-finite steps in a row, so that it need not wait
    for the rest of its steps to be seen.
    """

    def __init__(self, early_ends: EarlyEnds) -> None:
        """Starts with no step.

        Args:
            early_ends: Those of the run.
        """
        self._early_ends = early_ends
        self._open: Windows | None = None
        self._was_bad = False

    def take(self, steps: Windows) -> Windows:
        """Takes the next steps.

        Args:
            steps: A window for each, at least one; their numbers rise.

        Returns:
            The windows that are complete now, possibly none.
        """
        bad = steps.are_bad
        begins = bad & ~np.append(self._was_bad, bad[:-1])
        self._was_bad = bool(bad[-1])
        last_steps = steps.last_steps
        ends = window_ends(last_steps)
        closes = last_steps == ends
        closes |= self._early_ends.grant(begins & ~closes)
        if self._open is not None:
            ends = np.append(window_ends(self._open.last_steps), ends)
            closes = np.append(False, closes)
            steps = Windows.join([self._open, steps])
        is_start = np.append(True, closes[:-1] | (ends[1:] != ends[:-1]))
        windows = steps.merged(np.flatnonzero(is_start))
        complete = len(windows) - (not closes[-1])
        self._open = windows[complete:] if complete < len(windows) else None
        return windows[:complete]

    def rest(self) -> Windows | None:
        """Gives the window that is not complete, at the end; None where there is none."""
        rest, self._open = self._open, None
        return rest
