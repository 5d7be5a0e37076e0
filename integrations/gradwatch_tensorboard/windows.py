"""Windows: consecutive steps of one optimizer merged into one row, to keep long runs small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch import StepRecord
from gradwatch.adapters import STEP_COLUMNS
from gradwatch_dashboard.wire import COLUMNS

MAX_COUNT = 65_535
"""The largest count of bad steps that a window can hold: the largest uint16."""

Floats = NDArray[np.floating[Any]]

_COLUMN = {name: column for column, name in enumerate(COLUMNS)}
_FIRST_STEP, _LAST_STEP = _COLUMN["first_step"], _COLUMN["last_step"]
_BAD_STEPS = _COLUMN["bad_steps"]
_LARGEST = [_COLUMN["grad_norm"], _COLUMN["grad_norm_clipped"]]
_SUMS = [_BAD_STEPS, _COLUMN["clipped_steps"], _COLUMN["skipped_steps"]]
_CLIP_COEF = _COLUMN["clip_coef"]

FURTHER_COLUMNS: tuple[tuple[str, str], ...] = tuple(
    (name, one.scalar.reduction)
    for name, one in STEP_COLUMNS.items()
    if one.tab and one.scalar is not None
)
"""Name and reduction of the step columns declared for the tab; they follow :data:`COLUMNS`."""

# fmax and fmin, not maximum: a column is NaN where the value is unknown, and that NaN must not hide
# a number.
_EXTREMES = [
    (len(COLUMNS) + place, np.fmax if reduction == "largest" else np.fmin)
    for place, (_, reduction) in enumerate(FURTHER_COLUMNS)
    if reduction != "newest"
]


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one stream, oldest first. A window covers one or more consecutive steps.

    Attributes:
        norms: float32 array ``[windows, parameters]``: the largest finite norm, or NaN or Inf if
            none is finite, or -1 if no step had a gradient.
        bad: uint16 array ``[windows, parameters]``: number of steps whose norm is NaN or Inf.
        table: float64 array ``[windows, C]``: :data:`gradwatch_dashboard.wire.COLUMNS`, then the
            :data:`FURTHER_COLUMNS`.
    """

    norms: NDArray[np.float32]
    bad: NDArray[np.uint16]
    table: NDArray[np.float64]

    @classmethod
    def of_steps(
        cls, records: Sequence[StepRecord], norms: Floats, times: Sequence[float]
    ) -> Windows:
        """Makes one window per step. The arrays are copies.

        Args:
            records: The steps, oldest first.
            norms: float array ``[steps, parameters]``; -1 where there was no gradient.
            times: Wall time of each step, in seconds since 1970.
        """
        narrow = _narrow(norms)
        bad = ~np.isfinite(narrow)
        is_bad: NDArray[np.bool_] = np.logical_or.reduce(bad, axis=1)
        table = [
            (
                r.step, r.step, r.global_step, time, r.grad_norm, r.grad_norm_clipped,
                r.clip_threshold, r.clip_coef, row_bad or r.nonfinite_parameters > 0,
                bool(r.clipped), r.outcome != "applied",
                *[getattr(r, name) for name, _ in FURTHER_COLUMNS],
            )
            for r, time, row_bad in zip(records, times, is_bad, strict=True)
        ]  # fmt: skip
        return cls(narrow, bad.astype(np.uint16), np.array(table, np.float64))

    @classmethod
    def join(cls, parts: Sequence[Windows]) -> Windows:
        """Concatenates windows of the same parameters. ``parts`` must not be empty."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.norms for part in parts]),
            np.concatenate([part.bad for part in parts]),
            np.concatenate([part.table for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: slice) -> Windows:
        return Windows(self.norms[rows], self.bad[rows], self.table[rows])

    @property
    def last_steps(self) -> NDArray[np.int64]:
        """The last step of each window, int64 array ``[windows]``."""
        return self.table[:, _LAST_STEP].astype(np.int64)

    @property
    def are_bad(self) -> NDArray[np.bool_]:
        """Whether each window has a step with a non-finite gradient, bool array ``[windows]``."""
        bad: NDArray[np.bool_] = self.table[:, _BAD_STEPS] > 0
        return bad

    def merged(self, starts: NDArray[np.intp]) -> Windows:
        """Merges neighbors into larger windows; ``starts`` are their first rows, rising from 0."""
        if len(starts) == len(self):
            return self
        # Summed as uint32: a uint16 could wrap around to 0 and show a bad window as a good one.
        bad = np.add.reduceat(self.bad, starts, axis=0, dtype=np.uint32)
        ends = np.append(starts[1:], len(self)) - 1
        table = self.table[ends]
        table[:, _FIRST_STEP] = self.table[starts, _FIRST_STEP]
        table[:, _LARGEST] = _largest_finite(self.table[:, _LARGEST], starts)
        # fmin, not minimum: a NaN coefficient must not hide those of the other steps.
        table[:, _CLIP_COEF] = np.fmin.reduceat(self.table[:, _CLIP_COEF], starts)
        for column, extreme in _EXTREMES:
            table[:, column] = extreme.reduceat(self.table[:, column], starts)
        table[:, _SUMS] = np.add.reduceat(self.table[:, _SUMS], starts, axis=0)
        return Windows(
            _largest_finite(self.norms, starts), np.minimum(bad, MAX_COUNT).astype(np.uint16), table
        )


def _largest_finite(values: Any, starts: NDArray[np.intp]) -> Any:
    """Returns the largest finite value of each group.

    A group without a finite norm (only -1, NaN or Inf) yields its NaN or Inf, or -1 if it has
    neither.
    """
    plain = np.maximum.reduceat(values, starts, axis=0)
    finite = np.isfinite(values)
    if finite.all():  # the usual case; the code below copies the whole matrix
        return plain
    best = np.maximum.reduceat(np.where(finite, values, -np.inf), starts, axis=0)
    return np.where((best < 0) & ~np.isfinite(plain), plain, best).astype(values.dtype, copy=False)


def _narrow(norms: Floats) -> NDArray[np.float32]:
    """Copies to float32, keeping finite values finite and positive values positive."""
    # A plain cast turns a float64 norm of 1e39 into Inf, which would look like a bad step.
    with np.errstate(over="ignore", under="ignore"):
        narrow = norms.astype(np.float32)
    if norms.dtype != np.float32:
        limits = np.finfo(np.float32)
        narrow[np.isfinite(norms) & ~np.isfinite(narrow)] = limits.max
        narrow[(norms > 0) & (narrow == 0)] = limits.smallest_subnormal
    return narrow


SINGLE_STEPS = 2048
"""The number of steps at the start of a run that have a window each; see :func:`window_ends`."""

EARLY_ENDS = 1_000
"""The number of windows in a run that may end early."""


def window_ends(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the last step of the window that each step belongs to.

    The width of a window is 1 up to step 2048, 2 up to step 4096, 4 up to step 8192 and so on. A
    window is never more than 1/1024 of the run, and 1,000,000 steps make 11,000 windows.

    Args:
        steps: int64 array ``[steps]``: step numbers, counted from 1.

    Returns:
        int64 array ``[steps]``.

    >>> window_ends(np.array([7, 2048, 2049, 2050, 2051, 4097]))
    array([   7, 2048, 2050, 2050, 2052, 4100])
    """
    _, doublings = np.frexp((steps - 1) // SINGLE_STEPS)
    widths = np.left_shift(np.int64(1), doublings.astype(np.int64))
    ends: NDArray[np.int64] = ((steps - 1) // widths + 1) * widths
    return ends


class EarlyEnds:
    """A budget of early window ends for a run, so that many bad steps do not bloat its file."""

    def __init__(self, left: int = EARLY_ENDS) -> None:
        """Starts with ``left`` early ends."""
        self._left = left

    def grant(self, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Grants early ends in order, until none are left.

        Args:
            wanted: bool array ``[steps]``: steps where a window should end early.

        Returns:
            bool array ``[steps]``: steps where it may.
        """
        granted = wanted & (np.cumsum(wanted) <= self._left)
        self._left -= int(granted.sum())
        return granted


class WindowReducer:
    """Gathers the steps of one stream into windows, independent of how they are batched.

    A window ends early at the first of several consecutive non-finite steps, so that it can be seen
    without waiting for the remaining steps of the window.
    """

    def __init__(self, early_ends: EarlyEnds) -> None:
        """Starts without steps. All streams of a run share its ``early_ends``."""
        self._early_ends = early_ends
        self._open: Windows | None = None
        self._was_bad = False

    def add(self, steps: Windows) -> Windows:
        """Adds the next steps.

        Args:
            steps: One window per step, at least one, with rising step numbers.

        Returns:
            The windows that are now complete, possibly none.
        """
        bad = steps.are_bad
        # Consecutive NaN steps end one window early, not one each: only the first of them is news.
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
        """Returns the incomplete window at the end of the run; None if there is none."""
        rest, self._open = self._open, None
        return rest
