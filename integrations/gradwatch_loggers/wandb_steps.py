"""RunSteps: writes our rows into a run of W&B so that none of the user's is lost.

W&B has one open row per run, with a step that only rises. ``log(data, step=k)`` with a higher ``k``
closes the row and opens that of ``k``; with a lower one it is dropped. ``log(data)`` closes the row
after it has been added, unless ``commit=False``.

A row of our own raises the step, and the user may count as he likes, by epochs say: what he logs
with a lower step is lost then. So our rows wait for his:

- he logs with ``step=k``: the steps below ``k`` are free, as he gives them up himself. Ours are
  written there, and one goes into his own row.
- he logs without a step: one goes into his row. Who has done so twice, and never gave a step, will
  hardly count himself. From then on rows that find no place in his become rows of their own. Should
  he give a step after all, it is raised by their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gradwatch_loggers.wandb_rows import HeldRows

SURE = 2
"""Rows without a step, at different steps of the training, until we write rows of our own."""

MOST_AT_ONCE = 1_000
"""Most rows that are written before one of the user's, at 0.1 to 0.3 ms each."""

LOOK_SECONDS = 1.0
"""Time after which W&B is asked for its step again: some of what is logged may not be seen.

Another process may log to the run, or who has kept ``run.log`` from before."""


class RunSteps:
    """The open row of a run, as far as it can be seen from this process.

    Attributes:
        rows: What waits for room.
        live: Whether rows of our own are written before the end: True from the first on, None once
            the user has shown that he does not count, False never.
        ending: Whether the user logs nothing any more.
        shifted: Called with the user's step, and with the one that it is raised to.
    """

    def __init__(
        self, log: Callable[..., None], step: Callable[[], int] | None, live: bool | None
    ) -> None:
        """Starts with the next row of a run.

        Args:
            log: ``run.log``.
            step: Asks W&B for the step of the open row; None where the server numbers the rows.
            live: See the class.
        """
        self.rows = HeldRows()
        self.live = live
        self.ending = False
        self.shifted: Callable[[int, int], None] = lambda step, raised: None
        self._log = log
        self._ask = step
        self._asked_at = time.monotonic()
        self._step = 0 if step is None else step()
        self._holds_ours = self._holds_his = False  # the open row
        self._debt = 0  # rows of our own, by which the step is higher than without us
        self._counts = False  # whether the user has given a step
        self._without = 0  # rows of his without a step, those between two of ours counted once
        self._is_new = False  # whether one of ours has come since the last of these

    @property
    def settled(self) -> bool:
        """Whether nothing waits, and the step is what it would be without us."""
        return not (len(self.rows) or self._debt)

    def may_write(self) -> bool:
        """Returns whether rows of our own cost none of the user's."""
        if self.ending:
            return True
        sure = self.live or (self.live is None and self._without >= SURE)
        return bool(sure) and not (self._counts or self._holds_his)

    def add(self, axis: str, step: int, values: dict[str, float]) -> None:
        """Adds a row to a series, see :meth:`HeldRows.add`.

        Raises:
            Exception: If W&B does not take an earlier row; this one is not added then.
        """
        if self.rows.has(axis) and self.may_write():
            self.write()
        self.rows.add(axis, step, values)
        self._is_new = True
        if self.ending:
            self.write()

    def write(self, keep: int = 0) -> None:
        """Writes all but the newest ``keep`` rows as rows of our own."""
        while len(self.rows) > keep:
            if self._holds_ours:  # W&B would replace the numbers that are in it
                self._close_row({})
            self._close_row(self.rows.first())
            self.rows.drop_first()

    def before(self, step: int | None, commit: bool | None) -> tuple[dict[str, Any], int | None]:
        """Writes what has room before a row of the user's.

        Args:
            step: As he gave it.
            commit: As he gave it.

        Returns:
            What goes into his row, and its step.
        """
        if self._ask is None or step is None:
            return self._before_next(commit), None
        self._counts = True
        # Always where rows of ours stand on steps of their own: they may be behind it.
        self._look(len(self.rows) > 1 and step > self._step + 1)
        if self._debt and self._clashes(step):
            self.shifted(step, step + self._debt)
            step += self._debt
        elif step >= self._step:
            self._debt = 0
        if step < self._step:  # W&B drops it, with or without us
            return {}, step
        self._fill(step)
        return self._beside(same_row=step == self._step), step

    def after(self, step: int | None, commit: bool | None, ours: bool) -> None:
        """Notes that a row of the user's has been logged; ``ours``: with one of ours in it."""
        if self._ask is None:
            step = None
        if step is not None and step < self._step:
            return
        if step is not None and step > self._step:
            self._step, self._holds_ours = step, False
        self._holds_ours |= ours
        self._holds_his = True
        if commit or (commit is None and step is None):
            self._step += 1
            self._holds_ours = self._holds_his = False

    def _clashes(self, step: int) -> bool:
        """Returns whether a row would be dropped, or end in an earlier one, only because of us."""
        if step == self._step:
            return self._holds_his
        return self._step - self._debt <= step < self._step

    def _before_next(self, commit: bool | None) -> dict[str, Any]:
        if commit is False:
            return {}
        self._without += self._is_new
        self._is_new = False
        if self.may_write():
            self.write(keep=1)
        return self._beside(same_row=True)

    def _beside(self, same_row: bool) -> dict[str, Any]:
        return {} if same_row and self._holds_ours else self.rows.first()

    def _fill(self, step: int) -> None:
        """Writes rows at the steps that the user leaves out, all but the newest one."""
        free = range(self._step + self._holds_ours, step)
        count = max(min(len(self.rows) - 1, len(free), MOST_AT_ONCE), 0)
        for number in free[len(free) - count :]:
            self._log(self.rows.first(), step=number)
            self.rows.drop_first()
            if number > self._step:
                self._step, self._holds_his = number, False
            self._holds_ours = True

    def _close_row(self, more: dict[str, Any]) -> None:
        self._log(more, commit=True)
        self._step += 1
        self._debt += 1
        self._holds_ours = self._holds_his = False

    def _look(self, surely: bool) -> None:
        now = time.monotonic()
        if self._ask is None or not (surely or now - self._asked_at >= LOOK_SECONDS):
            return
        self._asked_at = now
        step = self._ask()
        if step != self._step:
            self._step, self._holds_ours = step, False
