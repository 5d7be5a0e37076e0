"""The steps of one optimizer, from the first backward of a window to the finished record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.accumulate.policies import check_window
from gradwatch.clip.policy import ClipPolicy
from gradwatch.clip.spikes import SpikeRule
from gradwatch.hooks.backward import Backward, inside_backward
from gradwatch.hooks.optimizer import (
    FusedStep,
    LearningRates,
    carried_by,
    learning_rate,
    refuse_what_needs_all_gradients,
    restore_learning_rates,
    scale_learning_rates,
)
from gradwatch.hooks.scaler import LossScale
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, defer_copy
from gradwatch.measure.norms import StepNorms
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.measure.sharded import PackedAllReduce
from gradwatch.measure.statistics import NO_SAMPLE, StatisticsSampler
from gradwatch.record.events import nonfinite_error, too_many_skips_error
from gradwatch.record.records import Event, StepRecord
from gradwatch.step.clipping import Clipping
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import Run
from gradwatch.step.skip_rule import APPLIED, SkipRule, StepOutcome, TooManySkipsError
from gradwatch.step.window import Losses, Window, WindowWeights


class MeasureCurvature(Protocol):
    """Measures the curvature of a loss after a step, if a measurement is due."""

    busy: bool
    """Whether it is computing the loss right now; its backwards are not part of the training."""

    def __call__(self, step: int, outcome: str) -> tuple[float, float]:
        """Returns the largest eigenvalue and the trace of the Hessian; NaN if none is due."""


class Steps:
    """The steps of a set of parameters: adds backwards to a window, and records each step.

    Attributes:
        label: Name of the optimizer in the records.
        window: The backwards since the last step.
        weights: The weights of its windows, and its gradient noise scale.
        step: The number of steps so far.
    """

    def __init__(self, label: str, window: Window, run: Run, scale: LossScale) -> None:
        """Starts with a window, which may already contain backwards.

        ``scale`` is the loss scale by which the gradients are multiplied.
        """
        self.label = label
        self.window = window
        self.weights = WindowWeights(run.hooks, run.data_parallel, run.accumulation.by_noise)
        self.step = 0
        self._run = run
        self._options = run.options
        self._scale = scale
        self._sampler = StatisticsSampler.of(
            run.options.statistics, run.options.every, len(run.table), run.shards
        )
        self._losses: Losses = []
        self._outcome = APPLIED
        self._lr: FloatOrDeferred = math.nan
        self._scale_at_backward: FloatOrDeferred = 1.0
        self._generation: object = None
        self._told_missing: set[int] = set()

    def add(self, backward: Backward, weight: FloatOrDeferred) -> bool:
        """Adds a backward that has ended; returns whether it gave any gradient to measure."""
        # Not self._scale: a scaler that is found later was already in use for these gradients.
        found = self._run.scale
        self._generation = None if found.scaler is None else found.generation()
        window = self.window
        arrivals, count = window.arrivals, len(window.arrivals)
        measurement = window.add(backward, weight)
        if window.arrivals is not arrivals:  # the gradients were reset, so drop the losses too
            self._losses = []
        if measurement is not None or len(window.arrivals) > count:
            self.weights.note(window, weight, measurement)
        if measurement is None:
            return False
        self._scale_at_backward = 1.0 if self._scale.scaler is None else self._scale.value()
        if self._sampler is not None and self._sampler.due(self.step + 1):
            self._sampler.measure_gradients(*window.gradients())
        return True

    def _scaler_has_updated(self) -> bool:
        before = self._generation
        return before is not None and before is not self._run.scale.generation()

    def _pending(
        self,
        norms: StepNorms,
        step: int,
        estimates: bool = False,
    ) -> PendingStep:
        """Collects everything that is known of a step.

        ``estimates`` says whether the step is added to the noise scale estimate.
        """
        window, weights, statistics = self.window, self.weights, NO_SAMPLE
        if self._sampler is not None and self._sampler.due(step):
            parameters = self._parameters()
            statistics = self._sampler.after_step(window.indices, parameters, norms.unit_before)
        own = None if self._run.hooks.local is None else weights.own_norm(window)
        # In nearly every window the first micro-batch reaches all parameters.
        complete = not window.arrivals or len(window.arrivals[0][0]) >= len(window.indices)
        return PendingStep(
            step=step,
            optimizer=self.label,
            time_s=self._run.stopwatch.elapsed(),
            global_step=self._run.global_step(step),
            micro_batches=len(window.arrivals),
            weight=window.weight if weights.weight is None else weights.weight,
            norms=norms,
            outcome=self._outcome,
            first_nonfinite=window.first_nonfinite,
            nonfinite_count=window.nonfinite_count,
            late_checks=window.late_checks,
            losses=self._losses,
            lr=self._lr,
            missing=() if complete else self._newly_missing(),
            local=None if own is None else Deferred(own),
            noise=weights.sample,
            table=self._run.table,
            exploding_norm=self._options.exploding_norm,
            estimator=weights.noise if estimates else None,
            statistics=statistics,
        )

    def _newly_missing(self) -> list[int]:
        """Lists the parameters that received no gradient; each is reported once in a run."""
        arrived, tensors = self.window.arrived, self._run.table.tensors
        missing = [
            index
            for index in self.window.indices
            if index not in arrived
            and index not in self._told_missing
            and tensors[index].requires_grad
            and self._run.hooks.hooked(index)
        ]
        self._told_missing.update(missing)
        return missing

    def _parameters(self) -> list[Tensor]:
        return [self._run.table.tensors[index] for index in self.window.indices]


class OptimizerSteps(Steps):
    """The steps of one optimizer; a :class:`~gradwatch.hooks.optimizer.StepListener`.

    Attributes:
        optimizer: The optimizer.
        skip_rule: Decides which steps are skipped.
        stepping: Whether a step is running.
        units: The number of batches that a managed loop has counted in the window; None if the loop
            is the user's own.
        ends_window: Set by a managed loop to step a window of any length.
    """

    def __init__(
        self,
        label: str,
        optimizer: Optimizer,
        window: Window,
        run: Run,
        clip: ClipPolicy | None,
        curvature: MeasureCurvature | None,
        on_finished: Callable[[OptimizerSteps], None],
    ) -> None:
        """Starts with a window, which may already contain backwards.

        The policy ``clip`` must not be shared with another optimizer, because it has a memory.
        ``on_finished`` is called at the end of every step.
        """
        super().__init__(label, window, run, run.scale)
        options = run.options
        spikes = None if options.skip_spikes is None else SpikeRule(options.skip_spikes)
        self.optimizer = optimizer
        self.skip_rule = SkipRule(options.on_nonfinite, spikes, options.max_consecutive_skips)
        self.stepping = False
        self.units: int | None = None
        self.ends_window = False
        self._curvature = curvature
        self._on_finished = on_finished
        # FusedStep tries the optimizer out, so it is made only if it may be used.
        may_act = clip is not None or self.skip_rule.may_refuse
        self._fused = FusedStep(optimizer) if may_act else None
        self._clipping = Clipping(clip, optimizer, run.table, self._fused)
        self._norms: StepNorms | None = None
        self._rates: LearningRates = []
        self._held_parameters = len(optimizer_parameters(optimizer))

    # -- backwards ---------------------------------------------------------------------------------

    def add(self, backward: Backward, weight: FloatOrDeferred) -> bool:
        """Adds a backward that has ended; see :meth:`Steps.add`."""
        late = self._refresh()
        if late:
            backward = backward._replace(arrived=[*backward.arrived, *late])
        scaled = self._scale.scaler is not None
        if scaled and self._may_be_left_out(backward) and self.left_out_by_scaler:
            self.abandon_window()
        self.units = None
        return super().add(backward, weight)

    def note_managed(
        self, loss: Tensor, weight: FloatOrDeferred, divisor: FloatOrDeferred | None
    ) -> None:
        """Notes what a managed loop knows of the micro-batch that has just been added.

        Args:
            loss: Tensor ``[]``, before it was weighted, divided and scaled.
            weight: Weight of the micro-batch.
            divisor: What the weighted loss was divided by; None if the loss was used as it is.
        """
        self._losses.append((_loss(loss), weight))
        self.window.divisor = divisor

    def drop_discarded_window(self) -> None:
        """Empties the window if no gradient is left; not with shards, which FSDP2 may keep back."""
        if self.window.arrivals and self._run.shards is None and not self.window.gradients()[0]:
            self.window.reset()
            self._losses = []

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the window to its present state."""
        window, losses = self.window.copy(), list(self._losses)

        def put_back() -> None:
            self.window, self._losses = window, losses

        return put_back

    def _refresh(self) -> list[int]:
        """Watches the parameters of groups that were added to the optimizer in the meantime.

        Returns:
            Those of them that already have a gradient.
        """
        held = 0
        for group in self.optimizer.param_groups:
            held += len(group["params"])
        if held == self._held_parameters:
            return []
        self._held_parameters = held
        self.window.indices = self._run.table.indices_of(optimizer_parameters(self.optimizer))
        self._clipping.refresh()
        return self._run.hooks.watch_also(self.window.indices)

    # -- a step ------------------------------------------------------------------------------------

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Prepares a step: undoes what a failed one left, and scales the learning rate."""
        self._refresh()
        self.stepping = True
        if self._rates or self._fused is not None:
            self._withdraw()  # left over if the last step raised
        self._norms = None
        self._outcome = APPLIED
        factor = self._run.accumulation.lr_factor
        if factor != 1.0:
            self._rates = scale_learning_rates(optimizer, factor)
        self._lr = learning_rate(optimizer)
        if has_closure:
            self._losses = []

    def gradients_ready(self, optimizer: Optimizer, loss: object) -> bool:
        """Measures the gradients, decides about the step, and clips; see :class:`StepListener`."""
        try:
            if self._run.replicas.active:
                self._run.replicas.before_step(self.window, self.weights, self.step + 1)
            return self._settle(optimizer, loss)
        except BaseException:
            self._withdraw()
            raise

    def _settle(self, optimizer: Optimizer, loss: object) -> bool:
        if inside_backward():
            self._step_inside_backward()
        if self._scale.candidates:
            self._scale.keep_scaler_of(optimizer)
        self._check_window()
        if loss is not None:
            self._losses = [(_loss(loss), 1.0)]
        units = (self.units or 0) if self.ends_window else 0
        self._losses = self.weights.weigh(
            self.window,
            self._losses,
            self._scale_at_backward,
            units,
            self._run.accumulation.micro_batches,
        )
        sampler = self._sampler
        if sampler is not None and not sampler.due(self.step + 1):
            sampler = None
        extra: Callable[[PackedAllReduce], None] | None = None
        if sampler is not None:
            sampler.measure_weights(self.window.indices, self._parameters())
            extra = sampler.add_to
        left, found_inf = carried_by(optimizer)
        norms = self._norms = self.window.step_norms(self._scale, left, extra)
        if found_inf != 0.0 or not self.skip_rule.takes_all:
            self._outcome = self._decide(norms, found_inf)
            if self._outcome.outcome != "applied":
                return not self._outcome.refused and not self._left_out_cleanly()
        if self._clipping.policy is not None or norms.correction != 1.0:
            self._norms = self._clipping.clip_(self.window, norms, left)
        if sampler is not None:
            sampler.before_step(self._parameters())
        return True

    def finish(self, optimizer: Optimizer) -> None:
        """Records a step that is over."""
        norms = self._norms
        if norms is None:  # the optimizer never called its closure
            norms = self.window.step_norms(self._scale, carried_by(optimizer)[0])
        self.step += 1
        self.stepping = False
        if self._rates or self._fused is not None:
            self._withdraw()
        late = self._outcome is not APPLIED and self._outcome.late
        if not late and (self.skip_rule.in_a_row or self._outcome is not APPLIED):
            self.skip_rule.note(self._outcome.outcome)
        pending = self._pending(norms, self.step, estimates=True)
        if self._curvature is not None:
            pending.curvature = self._curvature(self.step, self._outcome.outcome)
        if late:  # only the device knows the outcome: the rule is told once it has arrived
            pending.on_outcome = self.skip_rule.note
        self._run.recorder.expect(pending)
        if self._run.replicas.active:
            self._run.replicas.after_step()
        self.window.reset()
        self.weights.sample = self.weights.weight = None
        self._losses = []
        self._norms = self.units = None
        self._on_finished(self)

    def end(self) -> None:
        """Closes the open window at the end of the run."""
        self._withdraw()  # the last step may have raised
        if self.left_out_by_scaler:
            self.abandon_window(together=False)

    @property
    def applied(self) -> bool:
        """Whether the last step was applied; waits if only the device knows."""
        return self._outcome.final() == "applied"

    def _check_window(self) -> None:
        accumulation = self._run.accumulation
        if accumulation.checked and not self.ends_window:
            found = len(self.window.arrivals) if self.units is None else self.units
            if found != accumulation.micro_batches:
                check_window(self.label, found, accumulation.micro_batches)

    def _step_inside_backward(self) -> None:
        refuse_what_needs_all_gradients(self._options.deciding, f", as {self.label} does")
        if not self.window.arrivals:
            self.window.add_unfinished()

    def _decide(self, norms: StepNorms, found_inf: FloatOrDeferred) -> StepOutcome:
        """Decides whether the step is taken; a fused optimizer may be told to skip it by a flag."""
        late = not norms.after.total.at_hand
        by_flag = late and self._fused is not None and self._fused.can_skip
        try:
            outcome = self.skip_rule.decide(norms, found_inf, by_flag)
        except TooManySkipsError:
            skipped = self.skip_rule.in_a_row
            raise too_many_skips_error(*self._story(norms), skipped) from None
        refusal = outcome.refusal if outcome.late else None
        if self._fused is not None and refusal is not None:
            self._fused.refuse(refusal)
        if outcome.outcome == "skipped_nonfinite" and self._options.on_nonfinite == "raise":
            raise nonfinite_error(*self._story(norms))
        return outcome

    def _story(self, norms: StepNorms) -> tuple[StepRecord, list[Event]]:
        """Returns record and non-finite events of a step that will raise; flushes the sinks."""
        entry = self._pending(norms, self.step + 1).entry()
        events = [event for event in entry.events if event.nonfinite]
        self._run.recorder.note(tuple(events))
        self._run.recorder.flush()
        return entry.record, events

    def _left_out_cleanly(self) -> bool:
        """Whether gradwatch hides the gradients of a step that a scaler makes the optimizer skip.

        torch's fused SGD allocates its momentum buffers in its first step, and leaves them
        uninitialized if a scaler makes it skip that step.
        """
        return self._outcome.outcome == "skipped_scaler" and self._options.on_nonfinite == "skip"

    def _withdraw(self) -> None:
        """Undoes the changes to the optimizer that were for one step only; safe to call again."""
        if self._rates:
            restore_learning_rates(self._rates)
            self._rates = []
        if self._fused is not None and self._fused.saved:
            self._fused.restore()

    # -- steps that a scaler skips -----------------------------------------------------------------

    # A GradScaler that has found an overflow does not call optimizer.step() (unless the optimizer
    # is fused), so no step hook runs. The skip shows only in the scaler's next update().

    @property
    def left_out_by_scaler(self) -> bool:
        """Whether a scaler skipped the step: it has lowered its scale since the last backward."""
        return self._scale.lowered_since(self._scale_at_backward)

    def abandon_window(self, together: bool = True) -> None:
        """Records the step of a window that a scaler skipped without calling the optimizer.

        ``together`` says whether all ranks call this at once, so that they may communicate.
        """
        norms = self.window.unused_norms(self._scale_at_backward, together)
        if norms is not None and (self._run.shards is not None or not norms.before.finite):
            self._norms = norms
            self._outcome = StepOutcome("skipped_scaler")
            self.finish(self.optimizer)

    def _may_be_left_out(self, backward: Backward) -> bool:
        """Whether the scaler may have skipped a step: it has updated, or gradients were reset.

        This check never waits; :attr:`left_out_by_scaler`, which decides, waits on an accelerator.
        """
        if not self.window.arrivals:
            return False
        return self._scaler_has_updated() or self.window.discarded_before(backward)

    # -- state for a checkpoint --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to make the same decisions."""
        policy = self._clipping.policy
        clip = {} if policy is None else policy.state_dict()
        return {"clip": clip, "judge": self.skip_rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self.skip_rule.load_state_dict(state["judge"])
        if self._clipping.policy is not None:
            self._clipping.policy.load_state_dict(state["clip"])


def _loss(loss: object) -> FloatOrDeferred:
    if isinstance(loss, Tensor):
        return defer_copy(loss.reshape(())) if loss.numel() == 1 else math.nan
    return float(loss) if isinstance(loss, (int, float)) else math.nan
