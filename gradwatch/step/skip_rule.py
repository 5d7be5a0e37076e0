"""SkipRule: decides from the norm alone whether a step is taken or skipped.

On an accelerator the decision may be made on the device: the optimizer is given a flag there, and
the host learns only later what became of the step. Nothing waits, unless so many outcomes are still
unknown that the limit of skips in a row may have been reached: then the host decides, as on a CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.clip.spikes import SpikeRule
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, Transfer, as_operand, resolve
from gradwatch.measure.devices import sent
from gradwatch.measure.gathering import gathered
from gradwatch.measure.norms import StepNorms
from gradwatch.pickles import stable_name
from gradwatch.record.records import Outcome

OURS: tuple[Outcome, ...] = ("skipped_nonfinite", "skipped_policy")


class StepOutcome(NamedTuple):
    """Whether a step is applied, or why it is skipped.

    Attributes:
        outcome: What the host knows; ``"applied"`` while only the device knows more.
        found_inf: Above 0 if a scaler makes a fused optimizer skip the step.
        nonfinite: Above 0 if the norm is not finite, and the device is told to skip the step.
        spike: Above 0 if the norm is an outlier, and the device is told to skip the step.
    """

    outcome: Outcome = "applied"
    found_inf: FloatOrDeferred = 0.0
    nonfinite: FloatOrDeferred = 0.0
    spike: FloatOrDeferred = 0.0

    @property
    def refused(self) -> bool:
        """Whether the host knows already that gradwatch skips the step."""
        return self.outcome in OURS

    @property
    def refusal(self) -> Tensor | None:
        """Tensor ``[]``, float32: above 0 to make the device skip the step; None if not needed."""
        flags = [one.tensor for one in (self.nonfinite, self.spike) if isinstance(one, Deferred)]
        return gathered(flags).amax() if flags else None

    def skips(self, with_scaler: bool) -> Tensor | None:
        """Tensor ``[]``: above 0 if the device skips the step; None if the host knows.

        ``with_scaler`` says whether a scaler's skip counts.
        """
        flags = [self.nonfinite, self.spike, *([self.found_inf] if with_scaler else [])]
        late = [one.tensor.reshape(()).float() for one in flags if isinstance(one, Deferred)]
        return gathered(late).amax() if late else None

    @property
    def late(self) -> bool:
        """Whether a number must be read before :meth:`final` can answer."""
        return Deferred in map(type, self)

    def final(self) -> Outcome:
        """Returns what became of the step; waits if only the device knows."""
        if resolve(self.found_inf) > 0:
            return "skipped_scaler"
        if resolve(self.nonfinite) > 0:
            return "skipped_nonfinite"
        return "skipped_policy" if resolve(self.spike) > 0 else self.outcome


APPLIED = StepOutcome()


@stable_name
class TooManySkipsError(Exception):
    """More steps in a row would be skipped than allowed; the caller raises the error for users."""


class SkipRule:
    """Decides which steps of one optimizer are skipped.

    Attributes:
        takes_all: Whether every step is taken, unless a scaler skips it.
        in_a_row: Steps skipped since the last one that was taken, as far as the host knows.
    """

    def __init__(self, on_nonfinite: str, spikes: SpikeRule | None, most_in_a_row: int) -> None:
        """Starts with no step.

        Args:
            on_nonfinite: ``"record"``, ``"skip"`` or ``"raise"``, as for ``watch()``.
            spikes: The rule that detects outliers; None to take their steps.
            most_in_a_row: How many steps in a row may be skipped.
        """
        self._on_nonfinite = on_nonfinite
        self._spikes = spikes
        self._most_in_a_row = most_in_a_row
        self.takes_all = on_nonfinite == "record" and spikes is None
        self.in_a_row = 0
        self._unknown: deque[tuple[StepOutcome, Transfer | None]] = deque()
        self._fresh_spikes = {} if spikes is None else spikes.state_dict()

    @property
    def may_refuse(self) -> bool:
        """Whether it may ever skip a step."""
        return self._on_nonfinite == "skip" or self._spikes is not None

    def leaves_to_device(self) -> bool:
        """Returns whether the device may decide about the next step.

        The host must if this step could be one skip too many in a row, which it learns by waiting
        for outcomes that are still unknown; and always if a bad step raises.
        """
        if self._on_nonfinite == "raise":
            return False
        unknown, most = self._unknown, self._most_in_a_row
        for _, transfer in unknown:  # each is asked, as any of them may have ended by now
            if transfer is not None:
                transfer.arrived()
        while unknown and (_has_arrived(unknown[0][0]) or self.in_a_row + len(unknown) >= most):
            self._learn()
        return self.in_a_row < most

    def decide(
        self, norms: StepNorms, found_inf: FloatOrDeferred, on_device: bool = False
    ) -> StepOutcome:
        """Decides about one step.

        Args:
            norms: The norms before gradwatch's own clip.
            found_inf: Above 0 if the scaler has found an overflow.
            on_device: Whether to leave the decision to the device (:meth:`leaves_to_device`): the
                norm is still there, and the optimizer can be told by a flag to skip the step, so
                that nothing waits.

        Raises:
            TooManySkipsError: If this step would be one skip too many in a row.
        """
        if on_device:
            return self._decide_on_device(norms, found_inf)
        if self.takes_all and isinstance(found_inf, Deferred) and not found_inf.at_hand:
            return StepOutcome(found_inf=found_inf)
        if resolve(found_inf) > 0:
            return StepOutcome("skipped_scaler")
        outcome = "applied" if self.takes_all else self._outcome(norms)
        if outcome in OURS:
            self._learn_all()
            if self.in_a_row >= self._most_in_a_row:
                if outcome == "skipped_nonfinite":
                    raise TooManySkipsError
                self._accept_new_level()
                return APPLIED
        return StepOutcome(outcome)

    def note(self, outcome: Outcome) -> None:
        """Counts skips in a row; a step that a scaler skipped changes nothing."""
        if outcome == "applied":
            self.in_a_row = 0
            self._unknown.clear()
        elif outcome in OURS and self._unknown:
            self._unknown.append((StepOutcome(outcome), None))
        elif outcome in OURS:
            self.in_a_row += 1

    def note_later(self, outcome: StepOutcome, transfer: Transfer | None) -> None:
        """Counts a step that the device has decided about, once its outcome is known.

        Args:
            outcome: The outcome.
            transfer: Copies it to the host, together with the other numbers of the step.
        """
        if not self.takes_all:
            self._unknown.append((outcome, transfer))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to make the same decisions; waits for outcomes."""
        self._learn_all()
        spikes = {} if self._spikes is None else self._spikes.state_dict()
        return {"in_a_row": self.in_a_row, "spikes": spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self.in_a_row = int(state["in_a_row"])
        self._unknown.clear()
        if self._spikes is not None and state["spikes"]:
            self._spikes.load_state_dict(state["spikes"])

    def _learn(self) -> None:
        """Counts the oldest step whose outcome was unknown; waits for it."""
        outcome, transfer = self._unknown.popleft()
        if transfer is not None:
            transfer.wait()  # for this copy alone, and not for what the device was given since
        final = outcome.final()
        if final == "applied":
            self.in_a_row = 0
        elif final in OURS:
            self.in_a_row += 1

    def _learn_all(self) -> None:
        while self._unknown:
            self._learn()

    def _outcome(self, norms: StepNorms) -> Outcome:
        # If the norm only overflowed, the gradients are finite, and the clip can still use them.
        if not (norms.after.finite or norms.after.overflowed):
            return "applied" if self._on_nonfinite == "record" else "skipped_nonfinite"
        if self._spikes is not None and bool(self._spikes.is_spike(norms.true_norm())):
            return "skipped_policy"
        return "applied"

    def _accept_new_level(self) -> None:
        """Forgets earlier norms: so many outliers in a row are a lasting rise, not a spike."""
        if self._spikes is not None:
            self._spikes.load_state_dict(self._fresh_spikes)
        self.in_a_row = 0

    def _decide_on_device(self, norms: StepNorms, found_inf: FloatOrDeferred) -> StepOutcome:
        norm = norms.true_norm()
        nonfinite: FloatOrDeferred = 0.0
        spike: FloatOrDeferred = 0.0
        if self._on_nonfinite == "skip":
            nonfinite = Deferred((~torch.isfinite(norm)).float())
        if self._spikes is not None:
            overflow = as_operand(found_inf)
            if isinstance(overflow, Tensor):  # what a scaler leaves out is not remembered
                overflow = sent(overflow.reshape(()), norm.device)
                norm = torch.where(overflow > 0, torch.nan, norm)
            spike = Deferred(self._spikes.is_spike(norm).float())
        return StepOutcome("applied", found_inf, nonfinite, spike)


def _has_arrived(outcome: StepOutcome) -> bool:
    """Returns whether an outcome can be read without waiting."""
    return all(not isinstance(one, Deferred) or one.at_hand for one in outcome)
