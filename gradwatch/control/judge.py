"""Judge: whether a step is taken, from its norm alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.control.settled import Settled
from gradwatch.control.spikes import SpikeRule
from gradwatch.observe.readings import Number, Reading, number
from gradwatch.record.step import Outcome

OURS: tuple[Outcome, ...] = ("skipped_nonfinite", "skipped_policy")


class Verdict(NamedTuple):
    """What becomes of a step.

    Attributes:
        outcome: What is known now; ``"applied"`` where only the device knows better.
        found_inf: Above 0 where a scaler makes a fused optimizer leave the step out.
        nonfinite: Above 0 where the norm is not finite and the device is told to leave it out.
        spike: Above 0 where it is an outlier and the device is told to leave it out.
    """

    outcome: Outcome = "applied"
    found_inf: Number = 0.0
    nonfinite: Number = 0.0
    spike: Number = 0.0

    @property
    def refused(self) -> bool:
        """Whether it is known already that gradwatch leaves the step out."""
        return self.outcome in OURS

    @property
    def refusal(self) -> Tensor | None:
        """Tensor ``[]``, float32, above 0 where the device is to leave it out; None for no such."""
        flags = [one.tensor for one in (self.nonfinite, self.spike) if isinstance(one, Reading)]
        return torch.stack(flags).amax() if flags else None

    @property
    def late(self) -> bool:
        """Whether something must be read before :meth:`final` can be."""
        return Reading in (type(self.found_inf), type(self.nonfinite), type(self.spike))

    def final(self) -> Outcome:
        """Returns what became of the step; waits where only the device knows."""
        if number(self.found_inf) > 0:
            return "skipped_scaler"
        if number(self.nonfinite) > 0:
            return "skipped_nonfinite"
        return "skipped_policy" if number(self.spike) > 0 else self.outcome


APPLIED = Verdict()


class TooManySkipsError(Exception):
    """More steps in a row would be left out than is allowed; caught and told in full above."""


class Judge:
    """Decides about the steps of one optimizer.

    Attributes:
        takes_all: Whether every step is taken, unless a scaler leaves it out.
        in_a_row: Steps that it has left out since the last one that was taken.
    """

    def __init__(self, on_nonfinite: str, spikes: SpikeRule | None, most_in_a_row: int) -> None:
        """Starts with no step.

        Args:
            on_nonfinite: As for ``watch``.
            spikes: The rule for outliers; None to take them.
            most_in_a_row: How many steps in a row may be left out.
        """
        self._on_nonfinite = on_nonfinite
        self._spikes = spikes
        self._most_in_a_row = most_in_a_row
        self.takes_all = on_nonfinite == "record" and spikes is None
        self.in_a_row = 0
        self._last_skip: Outcome = "skipped_nonfinite"
        self._fresh_spikes = {} if spikes is None else spikes.state_dict()

    @property
    def may_refuse(self) -> bool:
        """Whether it may ever leave a step out."""
        return self._on_nonfinite == "skip" or self._spikes is not None

    def judge(self, settled: Settled, found_inf: Number, by_flag: bool) -> Verdict:
        """Decides about one step.

        Args:
            settled: Both sides of the clip so far.
            found_inf: What the scaler has found, above 0 for an overflow.
            by_flag: Whether the norm is not at hand and the optimizer can be told on the device to
                leave the step out, so that nobody needs to wait for it.

        Returns:
            The verdict.

        Raises:
            TooManySkipsError: If this step would be one too many in a row to leave out.
        """
        if by_flag and self._on_nonfinite != "raise":
            return self._by_flag(settled, found_inf)
        if self.takes_all and isinstance(found_inf, Reading) and not found_inf.at_hand:
            return Verdict(found_inf=found_inf)
        if number(found_inf) > 0:
            return Verdict("skipped_scaler")
        outcome = "applied" if self.takes_all else self._outcome(settled)
        if outcome in OURS and self.in_a_row >= self._most_in_a_row:
            if outcome == "skipped_nonfinite":
                raise TooManySkipsError
            self._accept_the_new_level()
            return Verdict()
        return Verdict(outcome)

    def note(self, outcome: Outcome) -> None:
        """Takes note of what became of a step.

        Args:
            outcome: Its outcome; what a scaler left out counts neither way.
        """
        if outcome == "applied":
            self.in_a_row = 0
        elif outcome in OURS:
            self.in_a_row += 1
            self._last_skip = outcome

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to decide the same."""
        spikes = {} if self._spikes is None else self._spikes.state_dict()
        return {"in_a_row": self.in_a_row, "spikes": spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.in_a_row = int(state["in_a_row"])
        if self._spikes is not None and state["spikes"]:
            self._spikes.load_state_dict(state["spikes"])

    def _outcome(self, settled: Settled) -> Outcome:
        finite = settled.after.finite or settled.after.overflowed
        if not finite:
            return "applied" if self._on_nonfinite == "record" else "skipped_nonfinite"
        if self._spikes is not None and bool(self._spikes.is_spike(settled.true_norm())):
            return "skipped_policy"
        return "applied"

    def _accept_the_new_level(self) -> None:
        """Forgets the usual norm: so many outliers in a row are a rise that lasts, no spike."""
        if self._spikes is not None:
            self._spikes.load_state_dict(self._fresh_spikes)
        self.in_a_row = 0

    def _by_flag(self, settled: Settled, found_inf: Number) -> Verdict:
        if self.in_a_row >= self._most_in_a_row and self._last_skip == "skipped_policy":
            self._accept_the_new_level()
        elif self.in_a_row > self._most_in_a_row:
            raise TooManySkipsError
        norm = settled.true_norm()
        nonfinite: Number = 0.0
        spike: Number = 0.0
        if self._on_nonfinite == "skip":
            nonfinite = Reading((~torch.isfinite(norm)).float())
        if self._spikes is not None:
            spike = Reading(self._spikes.is_spike(norm).float())
        return Verdict("applied", found_inf, nonfinite, spike)
