"""The steps of one optimizer, from the first backward of a window to the finished record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.accumulate.policies import check_window
from gradwatch.clip.policy import ClipPolicy
from gradwatch.clip.spikes import SpikeRule
from gradwatch.hessian.every import NOT_TAKEN, TakeCurvature, never
from gradwatch.hooks.backward import Backward, inside_backward
from gradwatch.hooks.optimizer import (
    FusedStep,
    ScaledLearningRate,
    learning_rate,
    refuse_what_needs_all_gradients,
)
from gradwatch.hooks.scaler import LossScale
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, reading_of
from gradwatch.measure.norms import StepNorms
from gradwatch.measure.parameters import ParameterTable, optimizer_parameters
from gradwatch.measure.sharded import Exchange
from gradwatch.measure.statistics import NO_SAMPLE, StatisticsSampler
from gradwatch.record.events import nonfinite_error, too_many_skips_error
from gradwatch.record.records import Event, StepRecord
from gradwatch.step.clipping import Clipping, Scopes
from gradwatch.step.pending import Facts, PendingStep
from gradwatch.step.run import Run
from gradwatch.step.skip_rule import APPLIED, SkipRule, StepOutcome, TooManySkipsError
from gradwatch.step.window import Window, WindowWeights


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
        self.judge = SkipRule(rules.on_nonfinite, rules.spikes, rules.max_consecutive_skips)
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

    def decide(self, settled: StepNorms, found_inf: FloatOrDeferred) -> StepOutcome:
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

    def clip(self, window: Window, settled: StepNorms, left: FloatOrDeferred) -> StepNorms:
        """Clips the gradients of a step; see :meth:`Clipping.clip_`."""
        return self._clipping.clip_(window, settled, left)

    def finish(self, verdict: StepOutcome) -> None:
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


class Missing:
    """Remembers which parameters of one optimizer have been told of."""

    def __init__(self, run: Run) -> None:
        """Starts with none told.

        Args:
            run: The run.
        """
        self._run = run
        self._told: set[int] = set()

    def of(self, window: Window) -> list[int]:
        """Lists the parameters that required a gradient and received none, for the first time.

        Args:
            window: The window of a step that is over.

        Returns:
            Their indices, ascending.
        """
        filled, indices = window.filled, window.indices
        if not filled or len(filled[0][0]) >= len(indices):
            return []
        arrived = window.arrived
        tensors, hooked = self._run.table.tensors, self._run.hooks.hooked
        missing = [
            index
            for index in indices
            if index not in arrived
            and index not in self._told
            and tensors[index].requires_grad
            and hooked(index)
        ]
        self._told.update(missing)
        return missing


NO_OPTIMIZER = "gradwatch has a bug: a track without an optimizer was stepped."


class OptimizerSteps:
    """Listens to the steps of one optimizer; see :class:`~gradwatch.hooks.optimizer.StepListener`.

    Attributes:
        label: Name of the optimizer in the records.
        optimizer: The optimizer; None where each backward is a step.
        window: What has come since its last step.
        control: Decides about its steps.
        weighing: What its windows weigh, and its gradient noise scale.
        curvature: Takes the curvature after a step, if it is due.
        on_finished: Told of every step that is over.
        step: Its steps so far.
        stepping: Whether a step is under way.
        last_window: Set by a managed loop whose short last window is to be stepped all the same.
        units: What a managed loop counts the window as; None where the loop is the user's own.
    """

    def __init__(
        self,
        label: str,
        optimizer: Optimizer | None,
        window: Window,
        run: Run,
        control: StepControl | None = None,
    ) -> None:
        """Starts with a window.

        Args:
            label: Name of the optimizer in the records.
            optimizer: The optimizer; None where each backward is a step.
            window: What has come so far.
            run: What all tracks share.
            control: Decides about the steps of the optimizer.
        """
        self.label = label
        self.optimizer = optimizer
        self.window = window
        self.control = control
        self.weighing = WindowWeights(run.hooks, run.accumulation, run.data_parallel)
        self.step = 0
        self.last_window = False
        self.units: int | None = None
        self.stepping = False
        self._run = run
        self._options = run.options
        # Where no optimizer steps, nobody can tell whether a scaler that was found is in use.
        self._scale = LossScale(run.options.scaler) if optimizer is None else run.scale
        self._sampler = StatisticsSampler(
            run.options.statistics, run.options.every, len(run.table), run.shards
        )
        self._losses: list[tuple[FloatOrDeferred, FloatOrDeferred]] = []
        self._settled: StepNorms | None = None
        self._verdict = APPLIED
        self._lr: FloatOrDeferred = math.nan
        self._scale_at_backward: FloatOrDeferred = 1.0
        self._generation: object = None
        self._missing = Missing(run)
        self._held_parameters = 0 if optimizer is None else len(optimizer_parameters(optimizer))
        self.curvature: TakeCurvature = never
        self.on_finished: Callable[[], None] = lambda: None
        self.on_parameters_added: Callable[[Sequence[int]], list[int]] = lambda indices: []

    @property
    def applied(self) -> bool:
        """Whether the last step was applied; waits where only the device knows."""
        return self._verdict.final() == "applied"

    def add(self, backward: Backward, weight: FloatOrDeferred) -> bool:
        """Takes in a backward that has ended.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.

        Returns:
            Whether any of the optimizer's parameters received a gradient.
        """
        late = self._refresh()
        if late:
            backward = backward._replace(arrived=[*backward.arrived, *late])
        if self.optimizer is None:
            self._drop_what_a_scaler_left_out()
        elif self._scale.scaler is not None and self._may_be_left_out(backward):
            self.abandon_window(self.left_out_by_scaler)
        self._generation = self._run.scale.generation()
        window = self.window
        self.units, filled, before = None, window.filled, len(window.filled)
        measurement = window.add(backward, weight)
        if window.filled is not filled:  # the gradients were thrown away, and so the losses
            self._losses = []
        if measurement is not None or len(window.filled) > before:
            self.weighing.note(window, weight, measurement)
        if measurement is None:
            return False
        self._scale_at_backward = self._scale.value()
        if self._sampler.due(self.step + 1):
            self._sampler.see_gradients(*self.window.gradients())
        return True

    def account_of_backward(self) -> PendingStep:
        """Makes a step of the newest backward, where no optimizer steps."""
        whole, self.window = self.window, self.window.latest()
        self.step += 1
        settled = self.window.look(self._scale, self._scale.left_in(None))
        account = self._account(settled, self.step)
        self.window = whole
        return account

    def _refresh(self) -> list[int]:
        """Takes in the parameters of groups that were added to the optimizer since.

        Returns:
            Those of them that have a gradient already.
        """
        if self.optimizer is None:
            return []
        held = 0
        for group in self.optimizer.param_groups:
            held += len(group["params"])
        if held == self._held_parameters:
            return []
        self._held_parameters = held
        self.window.indices = self._run.table.indices_of(optimizer_parameters(self.optimizer))
        self._require_control().refresh()
        return self.on_parameters_added(self.window.indices)

    def require_optimizer(self) -> Optimizer:
        """Returns the optimizer of a track that has one."""
        if self.optimizer is None:
            raise RuntimeError(NO_OPTIMIZER)
        return self.optimizer

    def _require_control(self) -> StepControl:
        if self.control is None:
            raise RuntimeError(NO_OPTIMIZER)
        return self.control

    def add_loss(self, loss: Tensor, weight: FloatOrDeferred) -> None:
        """Takes note of the loss of a micro-batch.

        Args:
            loss: Tensor ``[]``, not yet divided or scaled.
            weight: Weight of the micro-batch.
        """
        self._losses.append((_loss(loss), weight))

    def drop_what_was_thrown_away(self) -> None:
        """Begins a new window where no gradient is left; FSDP2 may just keep them out of sight."""
        if self.window.filled and self._run.shards is None and not self.window.gradients()[0]:
            self.window.reset()
            self._losses = []

    def mark(self) -> Callable[[], None]:
        """Returns a function that puts the window back as it is now."""
        window, losses = self.window.copy(), list(self._losses)

        def put_back() -> None:
            self.window, self._losses = window, losses

        return put_back

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """A step begins."""
        self._refresh()
        self.stepping = True
        control = self._require_control()
        control.withdraw()  # what is left over where the step before raised
        self._settled = None
        self._verdict = APPLIED
        factor = self._run.accumulation.lr_factor
        if factor != 1.0:
            control.learning_rate.scale(factor)
        self._lr = learning_rate(optimizer)
        if has_closure:
            self._losses = []

    def settle(self, optimizer: Optimizer, loss: object) -> bool:
        """Measures, decides and clips; raises where that was asked for."""
        control = self._require_control()
        try:
            return self._settle(optimizer, loss, control)
        except BaseException:
            control.withdraw()
            raise

    def _settle(self, optimizer: Optimizer, loss: object, control: StepControl) -> bool:
        if inside_backward():
            self._step_inside_backward()
        self._scale.settle_whose(optimizer)
        accumulation = self._run.accumulation
        if accumulation.checked and not self.last_window:
            found = len(self.window.filled) if self.units is None else self.units
            if found != accumulation.micro_batches:
                check_window(self.label, found, accumulation.micro_batches)
        if loss is not None:
            self._losses = [(_loss(loss), 1.0)]
        self._losses = self.weighing.weigh(self.window, self._losses, self._scale_at_backward)
        sampled = self._sampler.due(self.step + 1)
        if sampled:
            self._sampler.see_weights(self.window.indices, self._parameters())
        ride = self._sampler.exchange if sampled else _no_ride
        left = self._scale.left_in(optimizer)
        settled = self.window.look(self._scale, left, ride)
        self._settled = settled  # what is known where the judge raises
        found_inf = LossScale.found_inf(optimizer)
        if found_inf != 0.0 or not control.judge.takes_all:
            self._verdict = self._judge(settled, found_inf)
            if self._verdict.outcome != "applied":
                return not self._verdict.refused and not self._left_out_cleanly()
        if control.clips or settled.correction != 1.0:
            self._settled = control.clip(self.window, settled, left)
        if sampled:
            self._sampler.before_step(self._parameters())
        return True

    def _left_out_cleanly(self) -> bool:
        """Whether gradwatch sees to it that a step which a scaler leaves out leaves no trace.

        Torch's fused SGD makes its momentum buffers in its first step, and leaves them
        uninitialised where the scaler has that one left out.
        """
        return self._verdict.outcome == "skipped_scaler" and self._options.on_nonfinite == "skip"

    def _step_inside_backward(self) -> None:
        refuse_what_needs_all_gradients(self._options.deciding, f", as {self.label} does")
        if not self.window.filled:
            self.window.add_unfinished()

    def finish(self, optimizer: Optimizer) -> None:
        """Records the step that is over."""
        settled = self._settled
        if settled is None:  # the optimizer never called the closure that it was given
            settled = self.window.look(self._scale, self._scale.left_in(optimizer))
        self.step += 1
        self.stepping = False
        if self.control is not None:
            self.control.finish(self._verdict)
        self._run.recorder.expect(self._account(settled, self.step))
        self.window.reset()
        self.weighing.reset()
        self._losses = []
        self._settled = self.units = None
        self.on_finished()

    def shares(self, indices: Sequence[int]) -> bool:
        """Tells whether the optimizer holds any of some parameters."""
        return not set(indices).isdisjoint(self.window.indices)

    def _drop_what_a_scaler_left_out(self) -> None:
        """Begins a new window where a scaler has ended the one before without a step."""
        if self._scaler_has_updated():
            self.window.reset()

    def _may_be_left_out(self, backward: Backward) -> bool:
        """Whether something has happened that a scaler's skip brings with it."""
        if not self.window.filled:
            return False
        return self._scaler_has_updated() or self.window.discarded_before(backward)

    def _scaler_has_updated(self) -> bool:
        before = self._generation
        return before is not None and before is not self._run.scale.generation()

    @property
    def left_out_by_scaler(self) -> bool:
        """Whether a scaler has lowered its scale since the last backward: its step was left out."""
        return self._scale.lowered_since(self._scale_at_backward)

    def end(self) -> None:
        """Ends the window that is open when the run ends."""
        if self.control is not None:
            self.control.withdraw()  # the last step may have raised
        self.abandon_window(self.left_out_by_scaler, together=False)

    def abandon_window(self, left_out: bool, together: bool = True) -> None:
        """Records the step of a window that a scaler left out without calling the optimizer.

        Args:
            left_out: Whether it did. Else the loop threw the gradients away, or the run ended in
                the middle of the window: that is no step.
            together: Whether all ranks come here at once.
        """
        if not left_out:
            return
        settled = self.window.unapplied(self._scale_at_backward, together)
        if settled is None:
            return
        if self._run.shards is not None or not settled.before.finite:
            self._settled = settled
            self._verdict = StepOutcome("skipped_scaler")
            self.finish(self.require_optimizer())

    def _judge(self, settled: StepNorms, found_inf: FloatOrDeferred) -> StepOutcome:
        control = self._require_control()
        try:
            verdict = control.decide(settled, found_inf)
        except TooManySkipsError:
            skipped = control.judge.in_a_row
            raise too_many_skips_error(*self._story(settled), skipped) from None
        if verdict.outcome == "skipped_nonfinite" and self._options.on_nonfinite == "raise":
            raise nonfinite_error(*self._story(settled))
        return verdict

    def _story(self, settled: StepNorms) -> tuple[StepRecord, list[Event]]:
        """Writes a step down that will not be taken, and hands the sinks what is known of it."""
        entry = self._account(settled, self.step + 1, taken=False).entry()
        events = [event for event in entry.events if event.nonfinite]
        self._run.recorder.note(tuple(events))
        self._run.recorder.flush()
        return entry.record, events

    def _account(self, settled: StepNorms, step: int, taken: bool = True) -> PendingStep:
        sample = NO_SAMPLE
        if self._sampler.due(step):
            sample = self._sampler.after_step(
                self.window.indices, self._parameters(), settled.unit_before
            )
        window, verdict = self.window, self._verdict
        own = self.weighing.own_norm(window)
        facts = Facts(
            step=step,
            optimizer=self.label,
            time_s=self._run.stopwatch.elapsed(),
            global_step=self._run.global_step(step),
            micro_batches=len(window.filled),
            weight=self.weighing.weight(window),
            settled=settled,
            verdict=verdict,
            offender=window.offender,
            nonfinite=window.nonfinite,
            late=window.late,
            losses=self._losses,
            lr=self._lr,
            missing=self._missing.of(window),
            local=None if own is None else Deferred(own),
            noise=self.weighing.sample,
            sample=sample,
            curvature=self.curvature(step, verdict.outcome) if taken else NOT_TAKEN,
        )
        known = not (taken and verdict.late)
        note = None if self.control is None or known else self.control.judge.note
        noise = self.weighing.noise if taken and self.optimizer is not None else None
        return PendingStep(facts, self._run.table, self._options.exploding_norm, note, noise)

    def _parameters(self) -> list[Tensor]:
        return [self._run.table.tensors[index] for index in self.window.indices]


def _no_ride(exchange: Exchange) -> None:
    """Adds nothing to an exchange between ranks."""


def _loss(loss: object) -> FloatOrDeferred:
    if isinstance(loss, Tensor):
        return reading_of(loss.reshape(())) if loss.numel() == 1 else math.nan
    return float(loss) if isinstance(loss, (int, float)) else math.nan
