"""Unclaimed: the parameters that no optimizer has stepped yet, and backwards that are steps."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.account import Account
from gradwatch.control.window import Window
from gradwatch.explain.refusal import nonfinite_error
from gradwatch.observe.arrivals import Backward
from gradwatch.observe.readings import Number
from gradwatch.run import Run
from gradwatch.track import Track


class Unclaimed:
    """What happens to parameters before it is known which optimizer steps them.

    Where no optimizer ever steps, each backward is a step. That is settled as soon as the weights
    move without one, or at the end of the run; until then the backwards are held.
    """

    def __init__(self, run: Run, indices: Sequence[int], norm_type: float) -> None:
        """Starts with all watched parameters.

        Args:
            run: What all tracks share.
            indices: The parameters.
            norm_type: The p of the norms.
        """
        self._run = run
        window = Window(run.table, list(indices), norm_type, shards=run.shards)
        self._track = Track("none", None, window, run)
        self._by_backward = False
        self._versions = -1

    @property
    def _raises(self) -> bool:
        # A scaler overflows on purpose while it looks for its scale, and skips those steps.
        return self._run.options.on_nonfinite == "raise" and self._run.options.scaler is None

    @property
    def steps(self) -> int:
        """Backwards that count as steps so far."""
        return self._track.step

    @steps.setter
    def steps(self, value: int) -> None:
        self._track.step = value

    def add(self, backward: Backward, weight: Number, alone: bool) -> None:
        """Takes in a backward that has ended.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.
            alone: Whether no optimizer has been found at all.
        """
        if self._by_backward:
            self._track.window.reset()
        if not self._track.add(backward, weight) or not alone:
            return
        self._settle_how_steps_count()
        account = self._track.account_of_backward()
        self._keep(account)
        if self._raises and account.entry().record.nonfinite_parameters:
            raise nonfinite_error(account.entry().record, account.entry().events)

    @property
    def window(self) -> Window:
        """What has come for the parameters that no optimizer has stepped."""
        return self._track.window

    def give_up(self, indices: Sequence[int]) -> None:
        """Leaves parameters to an optimizer that is about to step them.

        Args:
            indices: Its parameters.
        """
        if not self._by_backward:
            self._run.recorder.retract()
            self._track.step = 0
        self._track.window.leave(indices)

    def commit(self) -> None:
        """Settles that each backward was a step."""
        self._by_backward = True
        self._run.recorder.commit()

    def _keep(self, account: Account) -> None:
        recorder = self._run.recorder
        if self._by_backward:
            recorder.expect(account)
        elif recorder.hold(account) >= self._run.options.buffer_size:
            self.commit()

    def _settle_how_steps_count(self) -> None:
        versions = sum(tensor._version for tensor in self._run.table.tensors)
        if not self._by_backward and 0 <= self._versions < versions:
            self.commit()
        self._versions = versions
