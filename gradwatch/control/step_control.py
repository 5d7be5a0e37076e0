"""StepControl: what is decided about the steps of one optimizer, and how it is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from gradwatch.control.clipping import Clipping
from gradwatch.control.fused import FusedStep
from gradwatch.control.judge import Judge, Verdict
from gradwatch.control.learning_rate import ScaledLearningRate
from gradwatch.control.policy import ClipPolicy
from gradwatch.control.scopes import Scopes
from gradwatch.control.settled import Settled
from gradwatch.control.spikes import SpikeRule
from gradwatch.control.window import Window
from gradwatch.observe.parameters import ParameterTable
from gradwatch.observe.readings import Number


@dataclass(frozen=True, slots=True)
class Rules:
    """What the user asked for; see ``watch`` for the meaning of each.

    Attributes:
        clip: The clipping policy of this optimizer, with a memory of its own.
        on_nonfinite: ``"record"``, ``"skip"`` or ``"raise"``.
        spikes: The rule for outliers, with a memory of its own; None to take them.
        max_consecutive_skips: How many steps in a row may be left out.
    """

    clip: ClipPolicy | None
    on_nonfinite: str
    spikes: SpikeRule | None
    max_consecutive_skips: int


class StepControl:
    """Judges and clips the steps of one optimizer.

    Attributes:
        judge: Decides whether a step is taken.
        learning_rate: Follows the batch, where that was asked for.
        clips: Whether there is a policy.
    """

    def __init__(self, optimizer: Optimizer, table: ParameterTable, rules: Rules) -> None:
        """Finds out what the optimizer can do by itself, where that may be needed.

        Args:
            optimizer: The optimizer.
            table: The watched parameters.
            rules: What the user asked for.
        """
        self.judge = Judge(rules.on_nonfinite, rules.spikes, rules.max_consecutive_skips)
        self.learning_rate = ScaledLearningRate(optimizer)
        self._optimizer = optimizer
        self._table = table
        self._policy = rules.clip
        self.clips = rules.clip is not None
        needed = rules.clip is not None or self.judge.may_refuse
        self._fused = FusedStep(optimizer) if needed else None
        self.refresh()

    def refresh(self) -> None:
        """Looks at the parameter groups again: one was added."""
        groups = [self._table.indices_of(group["params"]) for group in self._optimizer.param_groups]
        indices = sorted({index for group in groups for index in group})
        scopes = Scopes(indices, groups)
        scope = getattr(self._policy, "scope", "global")
        self._clipping = Clipping(self._policy, scopes, self._fused, self._table, scope)

    def decide(self, settled: Settled, found_inf: Number) -> Verdict:
        """Judges a step, and tells the optimizer where it can leave the step out by itself.

        Args:
            settled: Both sides of the loop's own clip.
            found_inf: What the scaler has found, above 0 for an overflow.

        Raises:
            TooManySkipsError: If this step would be one too many in a row to leave out.
        """
        late = not settled.after.total.at_hand
        by_flag = late and self._fused is not None and self._fused.can_skip
        verdict = self.judge.judge(settled, found_inf, by_flag)
        refusal = verdict.refusal if verdict.late else None
        if self._fused is not None and refusal is not None:
            self._fused.refuse(refusal)
        return verdict

    def clip(self, window: Window, settled: Settled, left: Number) -> Settled:
        """Clips the gradients of a step; see :meth:`Clipping.clip_`."""
        return self._clipping.clip_(window, settled, left)

    def finish(self, verdict: Verdict) -> None:
        """Takes note of a step that is over.

        Args:
            verdict: What became of it; what only the device knows is noted when it has arrived.
        """
        self.withdraw()
        if not verdict.late:
            self.judge.note(verdict.outcome)

    def withdraw(self) -> None:
        """Takes back what the optimizer was told for one step; safe to call again."""
        if self.learning_rate.saved:
            self.learning_rate.restore()
        if self._fused is not None and self._fused.saved:
            self._fused.restore()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to decide the same."""
        clip = {} if self._policy is None else self._policy.state_dict()
        return {"clip": clip, "judge": self.judge.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.judge.load_state_dict(state["judge"])
        if self._policy is not None:
            self._policy.load_state_dict(state["clip"])
