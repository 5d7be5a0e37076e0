"""The steps of one optimizer, from the first backward of a window to the finished record."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.accumulate.policies import check_window
from gradwatch.clip.policy import ClipPolicy
from gradwatch.clip.spikes import SpikeRule
from gradwatch.errors import NonFiniteGradientError
from gradwatch.hooks.backward import Backward, inside_backward
from gradwatch.hooks.buffers import MOST_BYTES, ModelBuffers
from gradwatch.hooks.optimizer import (
    FusedStep,
    LearningRates,
    carried_by,
    group_learning_rates,
    group_names,
    has_no_rate,
    learning_rate,
    refuse_what_needs_all_gradients,
    restore_learning_rates,
    scale_learning_rates,
    unscalable_rates,
)
from gradwatch.hooks.scaler import LossScale
from gradwatch.hooks.snapshot import WeightSnapshot
from gradwatch.measure.deferred import FloatOrDeferred, as_operand, defer, number_or_nan
from gradwatch.measure.gathering import multiplied
from gradwatch.measure.norms import StepNorms
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.measure.sharded import PackedAllReduce
from gradwatch.measure.statistics import StatisticsSampler
from gradwatch.record.events import (
    nonfinite_error,
    not_put_back_event,
    too_many_skips_error,
)
from gradwatch.record.records import Event, ParameterGroups, StepRecord
from gradwatch.step.clipping import Clipping
from gradwatch.step.loop_clip import LoopClip
from gradwatch.step.mistakes import (
    tell_captured,
    tell_clip_of_loop,
    tell_early_clip,
    tell_foreign,
    tell_left_behind,
    tell_lost,
    tell_moved,
    tell_no_gradient,
    tell_stale,
    tell_unscaled,
)
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import POISONED, Run
from gradwatch.step.skip_rule import APPLIED, SkipRule, StepOutcome, TooManySkipsError
from gradwatch.step.stale import StaleGradients
from gradwatch.step.steps import Steps
from gradwatch.step.weights import Losses
from gradwatch.step.window import Window

CLIPPED_BELOW = 0.99  # what is left of a norm after a clip; noise on gradients changes it less
AT_ZERO_GRAD = "zero_grad() came"
AT_END = "the run ended"
MOST_IN_DOUBT = 64  # windows that were thrown away since the last step


class MeasureCurvature(Protocol):
    """Measures the curvature of a loss after a step, if a measurement is due."""

    busy: bool
    """Whether it is computing the loss right now; its backwards are not part of the training."""

    def __call__(self, step: int, outcome: str) -> tuple[float, float]:
        """Returns the largest eigenvalue and the trace of the Hessian; NaN if none is due."""


class OptimizerSteps(Steps):
    """The steps of one optimizer; a :class:`~gradwatch.hooks.optimizer.StepListener`.

    They do not keep the optimizer alive, and another one may go on where it has ended.

    Attributes:
        kind: The class of the optimizer.
        skip_rule: Decides which steps are skipped.
        stepping: The optimizer whose step is running: this one or one in it; None between steps.
        has_begun: Whether any step has begun, be it that it raised.
        passed_over: Whether the step is refused, and the backwards in the rest of it do not count.
        beyond_undo: Whether the step has moved the weights, and nothing can put them back.
        closures: Where closures are kept, to be run again; None if nobody asks.
        units: The number of batches that a managed loop has counted in the window; None if the loop
            is the user's own.
        ends_window: Set by a managed loop to step a window of any length.
        in_time: Whether the last step was over before the next forward began; one that a scaler
            has left out may be noticed later.
        stale: Notices windows that begin with the gradients of the step before.
    """

    def __init__(
        self,
        label: str,
        optimizer: Optimizer,
        members: Sequence[Optimizer],
        window: Window,
        run: Run,
        clip: ClipPolicy | None,
        curvature: MeasureCurvature | None,
        on_finished: Callable[[OptimizerSteps], None],
        on_joined: Callable[[Sequence[int]], None],
        on_first: Callable[[OptimizerSteps, Optimizer], None] | None,
        on_gone: Callable[[], None],
    ) -> None:
        """Starts with a window, which may already contain backwards.

        ``members`` are the optimizers whose steps are its steps: itself, or those that it wraps.
        The policy ``clip`` must not be shared with another optimizer, because it has a memory.
        ``on_finished`` is called at the end of every step, ``on_joined`` with the indices of
        parameters that have joined the optimizer, and ``on_first`` before the first step with the
        member that takes it. ``on_gone`` is called when the optimizer is gone, at any moment.
        """
        super().__init__(label, window, run, LossScale(run.scale.scaler))
        self.scale_is_certain = run.options.scaler is not None
        options = run.options
        spikes = None if options.skip_spikes is None else SpikeRule(options.skip_spikes)
        self.skip_rule = SkipRule(options.on_nonfinite, spikes, options.max_consecutive_skips)
        self.stepping: weakref.ref[Optimizer] | None = None
        self.has_begun = False
        self._usual_backwards = max(1, run.accumulation.micro_batches)
        self.passed_over = self.beyond_undo = False
        self.in_time = True
        self._has_closure = False
        self._lost: list[int] = []  # parameters that have just left the optimizer
        # Whose tensors were replaced; the optimizer may still hold the old ones.
        self._exchanged: set[int] = set()
        self._older: list[int] = []  # the first backward of the window, if before the closure
        self._of_closure: Losses = []
        self._divisor_is_known = True
        self.units: int | None = None
        self.ends_window = False
        self._curvature = curvature
        self._on_finished = on_finished
        self._on_joined = on_joined
        self._on_first = on_first
        self._doubted: list[PendingStep] = []
        self._uncertain: list[PendingStep] = []
        self._makes_state = False
        self._explaining = run.explaining
        # Whether somebody on the host asks whether a step is bad, before it is taken.
        self._must_know = run.explaining is not None or not self.skip_rule.takes_all
        # A framework passes a closure of its own, which does more than to compute the loss.
        plain = run.explaining is not None and run.accumulation.checked
        self.closures = run.explaining.forwards.closures if run.explaining and plain else None
        self.stale = StaleGradients()
        self._loop_clip = None if clip is None else LoopClip()
        self._norms: StepNorms | None = None
        self._unclipped: StepNorms | None = None  # of a step of which only the device knows
        self._rates: LearningRates = []
        self._tell_gone = on_gone
        self._follow(optimizer, members, clip)
        inner = members[-1]
        self._held_parameters = len(optimizer_parameters(inner))
        self._held_groups = len(inner.param_groups)
        self._foreign = self._held_parameters - len(window.indices)
        self.note_groups(from_step=0)

    # -- the optimizer -----------------------------------------------------------------------------

    def _follow(
        self, optimizer: Optimizer, members: Sequence[Optimizer], clip: ClipPolicy | None
    ) -> None:
        inner = members[-1]
        self.kind = type(members[0])
        self._optimizer = weakref.ref(optimizer)
        self._members = [weakref.ref(one) for one in members]
        self._inner = weakref.ref(inner, partial(_note_gone, weakref.ref(self)))
        # FusedStep tries the optimizer out, so it is made only if it may be used.
        may_act = clip is not None or self.skip_rule.may_refuse
        self._fused = FusedStep(inner) if may_act else None
        self._clipping = Clipping(clip, inner, self._run.table, self._fused)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as it was named or found; None once it is gone."""
        return self._optimizer() or self._inner()

    @property
    def is_vacant(self) -> bool:
        """Whether the optimizer is gone: these steps have ended, unless another one goes on."""
        return self._inner() is None

    def has(self, optimizer: Optimizer) -> bool:
        """Returns whether the steps of an optimizer are these steps."""
        return any(member() is optimizer for member in self._members)

    def may_go_on(self, optimizer: Optimizer, indices: Sequence[int]) -> bool:
        """Returns whether an optimizer takes the place of one that is gone.

        It does if it is of the same class and holds all of its parameters, or some of them and no
        others: a loop builds its optimizer anew in every epoch, or when it thaws layers.

        Args:
            optimizer: The new optimizer.
            indices: Those of its parameters.
        """
        mine, its = set(self.window.indices), set(indices)
        fits = type(optimizer) is self.kind and (its >= mine or its <= mine)
        return self.is_vacant and fits and bool(mine and its)

    def go_on(self, optimizer: Optimizer, members: Sequence[Optimizer]) -> None:
        """Goes on with another optimizer, under the same label and with the same memory."""
        self._follow(optimizer, members, self._clipping.policy)
        self.forget_groups()
        self._catch_up()

    def let_go_of_optimizer(self) -> None:
        """Drops what a step that has raised may have left of the optimizer that is gone."""
        self._rates, self.stepping = [], None
        if self._fused is not None:
            self._fused.saved = {}

    def let_go(self) -> None:
        """Drops the parameters and their gradients; see :meth:`Steps.let_go`."""
        super().let_go()
        self.let_go_of_optimizer()
        self._explaining = self.closures = self._curvature = None
        inner = self._inner()
        if inner is not None:
            self._inner = weakref.ref(inner)  # nobody need be told any more

    # -- backwards ---------------------------------------------------------------------------------

    @property
    def scale(self) -> LossScale:
        """The loss scale by which its gradients are multiplied."""
        return self._scale

    @property
    def in_closure(self) -> bool:
        """Whether its step is running, and evaluates a closure."""
        return self._has_closure and self.stepping is not None

    @property
    def looks_ahead(self) -> bool:
        """Whether :meth:`begin_backward` must be called before the next backward."""
        return not self.passed_over and (self.stale.looks or bool(self.window.arrivals))

    def begin_backward(self, first: int) -> None:
        """Looks, when a backward begins, at what became of the gradients of the window.

        ``first`` is the index of the parameter that has just received a gradient.
        """
        if not self.window.arrivals:
            self.stale.look(self._run.table.tensors, first)
            self.window.stale = self.stale.bad
            return
        # A scaler that has found an overflow may have left out a step since the last backward.
        updated = self._scale.scaler is not None and self._scaler_has_updated()
        if updated and self._abandon_if_left_out():
            return
        left = self.window.left_before(first)
        if left == 0.0:
            self.discard(together=True)
        elif left < CLIPPED_BELOW:
            self.window.rescaled = True
            if not self._is_running_mean(left):
                self.window.clipped_early = True
                tell_early_clip(self._run, self.label, self.step + 1, left)

    def _is_running_mean(self, left: float) -> bool:
        """Returns whether the loop keeps a running mean: it multiplies by j / (j + 1)."""
        count = len(self.window.arrivals)
        return math.isclose(left, count / (count + 1), rel_tol=1e-3)

    def _note_uncertain(self, pending: PendingStep) -> None:
        pending.only_if_bad = True
        self._run.recorder.expect(pending)
        self._uncertain.append(pending)
        if len(self._uncertain) > MOST_IN_DOUBT:
            self.discarded += self._uncertain.pop(0).counts

    def _record_discard(self, pending: PendingStep) -> None:
        total = pending.norms.before.total.if_known()
        if total is not None and not math.isfinite(total):
            self._settle_doubts(true=True)  # in the order in which they came
            self._run.recorder.expect(pending)
            return
        # The loop may have copied the gradients, to set those of the next step by hand.
        self._doubted.append(pending)
        self._run.recorder.doubt(pending)
        if len(self._doubted) >= MOST_IN_DOUBT:
            self._settle_doubts(true=True)

    def _settle_doubts_of(self, norms: StepNorms) -> StepNorms:
        """Decides, at a step, whether gradients before it were thrown away, or merged into it."""
        by_hand = self.window.written_by_hand(norms)
        self._settle_doubts(true=not by_hand)
        if not by_hand:
            return norms
        # What the loop has set is no clip of the last backward.
        self.window.reset()
        return norms._replace(before=norms.after, unit_before=norms.unit_after)

    def _settle_doubts(self, true: bool) -> None:
        if not true:
            self.discarded -= len(self._doubted)
        self._run.recorder.settle(self._doubted, true)
        self._doubted = []

    def discard(self, at_end: bool = False, unused: bool = False, together: bool = False) -> None:
        """Empties the window, whose gradients were thrown away; records it if nothing used them.

        Args:
            at_end: Whether the run has ended before its step.
            unused: Whether it is known that nothing has used them.
            together: Whether all ranks call this at once, so that they may communicate.
        """
        if self._has_closure and self.stepping is not None:
            # The optimizer has used them, and evaluates its closure again: in a line search, say.
            self.window.begin_again()
            self._losses = []
            return
        norms = self.window.unused_norms(self._scale_at_backward, together)
        self._check_losses()
        used = norms is not None and not unused and self._used_otherwise(norms)
        if norms is not None and not (used and norms.before.total.at_hand):
            why = AT_END if at_end else AT_ZERO_GRAD
            pending = self._pending(norms, self.step + 1, discarded=why)
            if used:  # it counts if they turn out to be poisoned, which only the device knows yet
                self._note_uncertain(pending)
            else:
                self.discarded += 1
                self._record_discard(pending)
            if self._explaining is not None:
                self._explaining.note_discarded(self.label, self.step + 1, self.window)
        self.window.reset()
        self._losses = []
        self.stale.forget()

    def replay(
        self,
        window: Window,
        scale: FloatOrDeferred,
        by_scaler: bool,
        asked: frozenset[int] = frozenset(),
    ) -> None:
        """Records a window that ended without a step before this optimizer was found.

        Args:
            window: The backwards and their measurement.
            scale: The loss scale at its last backward.
            by_scaler: Whether a scaler skipped the step; if not, the gradients were thrown away.
            asked: The ids of the optimizers that it was asked to step.
        """
        now, self.window = self.window, window
        then, self._scale_at_backward = self._scale_at_backward, scale
        if by_scaler:
            self.abandon_window(together=False, certain=self._is_among(asked))
        else:
            self.discard(unused=True)
        self.window, self._scale_at_backward = now, then

    def _settle_scaler(self, optimizer: Optimizer) -> None:
        """Decides, at its first step, which scaler serves the optimizer that steps."""
        self.scale_is_certain = True
        scaler = self._run.scale.serving(optimizer)
        # A scaler with a step of its own is not seen; but it leaves this to a fused optimizer.
        if scaler is not None or carried_by(optimizer) == (1.0, 0.0):
            self._scale.scaler = scaler

    def add(self, backward: Backward, weight: FloatOrDeferred) -> bool:
        """Adds a backward that has ended; see :meth:`Steps.add`."""
        if self.passed_over:
            return False
        if not self._has_closure:
            self.stepping = None  # a step that has raised: a backward runs in a closure only
        late = self._refresh()
        if late:
            late = [index for index in late if index not in backward.arrived]
            backward = backward._replace(arrived=[*backward.arrived, *late])
        self._leave_lost()
        scaled = self._scale.scaler is not None
        if scaled and self._may_be_left_out(backward):
            self._abandon_if_left_out()
        if not self.scale_is_certain and not set(self.window.indices).isdisjoint(backward.arrived):
            self._scale.scaler = self._run.scale.scaler
        self.units = None
        begins = self.stale.looks and not self.window.arrivals
        measured = super().add(backward, weight)
        if self._must_know and self.window.late_checks and self._counts_before_scaler():
            self.window.look_closer_at_newest()
        if begins and self.window.arrivals:
            self.stale.begin_window()
        return measured

    def _counts_before_scaler(self) -> bool:
        """Returns whether NaN and Inf are counted at the end of a backward, as on a CPU.

        A scaler that leaves out a step calls nobody, and ``zero_grad()`` follows. So the host waits
        here rather than in the step, once: in the backward that was the last one of the window
        before. A fused optimizer is always called, and a managed loop looks in its step.
        """
        if self._scale.scaler is None or self._run.data_parallel is not None:
            return False
        fused = self._fused is not None and self._fused.can_skip
        return not fused and len(self.window.arrivals) == self._usual_backwards

    def note_managed(
        self, loss: Tensor, weight: FloatOrDeferred, divisor: FloatOrDeferred | None
    ) -> None:
        """Notes what a managed loop knows of the micro-batch that has just been added.

        Args:
            loss: Tensor ``[]``, before it was weighted, divided and scaled.
            weight: Weight of the micro-batch.
            divisor: What the weighted loss was divided by; None if the loss was used as it is.
        """
        self._losses.append((number_or_nan(loss), weight))
        self.window.divisor = divisor

    def note_loss(self, loss: Tensor, divisor: float | None) -> None:
        """Notes the loss of the backward that has just been added; see ``Watcher.note_loss``."""
        value = number_or_nan(loss)
        factor = (1.0 if divisor is None else divisor) / as_operand(self._scale.value())
        if isinstance(factor, Tensor) or factor != 1.0:  # a multiplication launches a kernel
            value = defer(multiplied(value, factor))
        self._losses.append((value, 1.0))
        self._divisor_is_known = divisor is not None

    def _check_losses(self) -> None:
        """Forgets the losses if they may be divided by a number that is not known."""
        if not self._divisor_is_known and len(self.window.arrivals) != 1:
            self._losses = []

    def drop_discarded_window(self) -> None:
        """Empties the window if no gradient is left; not with shards, which FSDP2 may keep back."""
        if self.window.arrivals and self._run.shards is None and not self.window.gradients()[0]:
            self.discard()

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the window to its present state."""
        window, losses = self.window.copy(), list(self._losses)

        def put_back() -> None:
            self.window, self._losses = window, losses

        return put_back

    def take_over(self, late: Sequence[int], other: Steps) -> None:
        """Takes over what was known of its parameters before this optimizer was found.

        Args:
            late: Parameters that already have a gradient, which nobody had noticed.
            other: The steps that its parameters belonged to.
        """
        self.window.widen(late)
        self.weights.take_over(self.window, other.weights)
        then = other.weights_then
        if then is not None:
            # A snapshot of its own parameters, if nothing has moved these or others since.
            self.weights_then = (
                copy.copy(then) if then.moved() else WeightSnapshot(self._parameters())
            )
        self._other_steps_then, self._generation = other._other_steps_then, other._generation
        self._scale_at_backward = other.scale_at_backward

    def exchange(self, indices: Iterable[int]) -> None:
        """Notes that other tensors have taken the place of watched ones in the table."""
        super().exchange(indices)
        self._exchanged.update(indices)
        self.forget_groups()

    def _refresh(self, steps: bool = False) -> list[int]:
        """Watches the parameters of groups that were added to the optimizer in the meantime.

        Args:
            steps: Whether the optimizer is about to step, with what it holds now.

        Returns:
            Those of them that already have a gradient.
        """
        inner = self._inner()
        if inner is None:
            return []
        held, groups = 0, inner.param_groups
        for group in groups:
            held += len(group["params"])
        if held == self._held_parameters and len(groups) == self._held_groups:
            return []
        then, unchanged = self.window.indices, len(groups) == self._held_groups
        self._held_parameters, self._held_groups = held, len(groups)
        now = self._run.table.indices_of(optimizer_parameters(inner))
        if held - len(now) > self._foreign and self._run.follow_model():
            now = self._run.table.indices_of(optimizer_parameters(inner))
        tensors = self._run.table.tensors
        behind = not self._exchanged.isdisjoint(then) and not set(now).issuperset(then)
        if behind and not steps:  # another optimizer may step the new ones
            self.forget_groups()
            return []
        new, self._exchanged = self._exchanged.intersection(now), set()
        if unchanged and now == then and held - len(now) == self._foreign:
            return sorted(index for index in new if tensors[index].grad is not None)
        self.note_groups(from_step=self.step + 1)
        self.window.own(now)
        self.weights_then = None
        lost = sorted(set(then).difference(self.window.indices))
        if lost:
            tell = tell_left_behind if behind else tell_lost
            tell(self._run, self.label, self.step + 1, lost)
            self._lost = lost
        foreign, self._foreign = self._foreign, held - len(self.window.indices)
        if self._foreign > foreign and not behind:
            tell_foreign(self._run, self.label, self.step + 1, self._foreign)
        self._clipping.refresh()
        self._on_joined(self.window.indices)
        self._run.hooks.watch_also(self.window.indices)
        joined = sorted(new.union(self.window.indices).difference(set(then).difference(new)))
        return [index for index in joined if tensors[index].grad is not None]

    def _follow_model(self, has_closure: bool) -> None:
        """Goes on with the parameters that the model has now; to be called before a step."""
        if self._run.follow_model() and not (has_closure or self.window.arrivals):
            tell_moved(self._run, self.label, self.step + 1)

    def _catch_up(self, steps: bool = False) -> None:
        """Takes in what the optimizer holds now, after the last backward of a window."""
        late = self._refresh(steps)
        if late:
            self.window.widen(late)
        self._leave_lost()

    def _leave_lost(self) -> None:
        """Drops the gradients of parameters that the optimizer holds no longer."""
        if self._lost:
            self.window.lose(self._lost)
            self._lost = []

    def forget_groups(self) -> None:
        """Has the parameter groups read again: parameters may have been exchanged in place."""
        self._held_parameters = -1

    def note_groups(self, from_step: int) -> None:
        """Notes which parameters are in which group of the optimizer, from one of its steps on."""
        table, inner = self._run.table, self._inner()
        if inner is None:
            return
        positions = table.positions()
        members = tuple(
            tuple(sorted(positions[id(p)] for p in group["params"] if id(p) in positions))
            for group in inner.param_groups
        )
        names = tuple(group_names(inner))
        norm_type = self.window.norm_type
        groups = ParameterGroups(self.label, from_step, norm_type, names, members)
        self._run.recorder.note_groups(groups)

    # -- a step ------------------------------------------------------------------------------------

    def stands_aside(self) -> bool:
        """Returns whether the step is captured into a graph; see :class:`StepListener`.

        Raises:
            NotImplementedError: If gradwatch acts, which it cannot when the graph is replayed.
        """
        # Here and not at the end of the backward: a backward that is captured by itself is no loss,
        # as its gradients are seen in the step. And that may be in a thread of autograd's own.
        aside = self._run.stands_aside()
        if aside:
            tell_captured(self._run, self.label, self.step + 1, acts=self._options.acts)
        return aside

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Prepares a step: undoes what a failed one left, and scales the learning rate."""
        if self.step == 0 and len(self._members) > 1 and self._on_first is not None:
            self._on_first(self, optimizer)
        if self._run.hooks.replaced.seem():
            self._follow_model(has_closure)
        self._catch_up(steps=True)
        self.stepping, self._has_closure = weakref.ref(optimizer), has_closure
        self.has_begun = True
        self.passed_over = self.beyond_undo = False
        if not self.scale_is_certain:
            self._settle_scaler(optimizer)
        if self._rates or self._fused is not None:
            self._withdraw()  # left over if the last step raised
        self._norms = self._unclipped = None
        self._outcome = APPLIED
        factor = self._run.accumulation.lr_factor
        if factor != 1.0:
            self._rates = scale_learning_rates(optimizer, factor)
            if len(self._rates) < len(optimizer.param_groups):
                tell_unscaled(self._run, self.label, self.step + 1, unscalable_rates(optimizer)[0])
        if len(optimizer.param_groups) > 1:
            self._group_lr = group_learning_rates(optimizer)
            self._lr = self._group_lr[0]
        else:
            self._group_lr, self._lr = (), learning_rate(optimizer)
        self._older = self.window.backwards[:1] if has_closure else []
        self._of_closure = []

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
        if not inside_backward():
            self._makes_state = not self.window.arrivals and self._only_makes_state(optimizer)
            if self._makes_state:
                return True
        else:
            self._step_inside_backward()
        self._weigh(loss)
        due = self._sampler is not None and self._sampler.due(self.step + 1)
        sampler = self._sampler if due else None
        left, found_inf = carried_by(optimizer)
        norms = self._norms = self._measured(left, sampler)
        decides = found_inf != 0.0 or not self.skip_rule.takes_all
        by_device = decides and self._leaves_to_device(norms)
        # Before anything has changed: weights, buffers, and the gradients that are counted.
        if self.window.late_checks and self._must_know and not by_device:
            norms = self._norms = self.window.look_closer(norms, left)
        if self._explaining is not None:
            self._explaining.look_at(self.label, self.step + 1, self.window, norms, found_inf)
        if decides:
            self._outcome = self._decide(norms, found_inf, by_device)
            if self._outcome.outcome != "applied":
                return not self._outcome.refused and not self._left_out_cleanly()
        if norms.after is not norms.before and self._loop_clip is not None and norms.clip_known:
            self._look_for_clip_of_loop(self._loop_clip, norms)
        if self._clipping.policy is not None or norms.correction != 1.0:
            self._unclipped = None if norms.after.total.at_hand else norms
            self._norms = self._clipping.clip_(self.window, norms, left, self._outcome.spike)
        if sampler is not None:
            sampler.before_step(self._parameters())
        return True

    def _look_for_clip_of_loop(self, loop_clip: LoopClip, norms: StepNorms) -> None:
        found = loop_clip.limit(norms, self.step + 1)
        if found is not None:
            self._loop_clip = None
            limit, step = found
            tell_clip_of_loop(self._run, self.label, step, limit)

    def _weigh(self, loss: object) -> None:
        """Checks the number of micro-batches, and weighs them against each other."""
        wanted = self._run.accumulation.micro_batches
        if wanted > 1 and self._run.accumulation.checked and not self.ends_window:
            found = self.window.micro_batches if self.units is None else self.units
            # Micro-batches that reach few parameters (experts, random depth) look like parts.
            own_and_full = self.units is None and self.window.backward_count == wanted
            if found != wanted and not own_and_full:
                check_window(self.label, found, wanted)
        noted = bool(self._losses) or loss is not None
        self._of_closure = self._loss_of_closure(loss) if noted else []
        losses = self._losses or self._of_closure
        units = (self.units or 0) if self.ends_window else 0
        weighed = self.weights.weigh(self.window, losses, self._scale_at_backward, units, wanted)
        if self._losses:
            self._losses = weighed
        else:
            self._of_closure = weighed

    def _loss_of_closure(self, loss: object) -> Losses:
        """Returns what the closure returned, if that is the loss of the whole window."""
        self._check_losses()
        if self._losses or loss is None:
            return []
        # With backwards before the closure's, it is the loss of the last micro-batch, and nothing
        # tells whether the loop has divided it.
        if self._older and self._older == self.window.backwards[:1]:
            return []
        return [(number_or_nan(loss), self.window.weight)]

    def _measured(self, left: FloatOrDeferred, sampler: StatisticsSampler | None) -> StepNorms:
        """Returns the norms before and after the loop's own clip; takes statistics if due."""
        extra: Callable[[PackedAllReduce], None] | None = None
        if sampler is not None:
            if not self.window.arrivals:  # gradients that were set by hand
                sampler.measure_gradients(*self.window.gradients())
            sampler.measure_weights(self.window.indices, self._parameters())
            extra = sampler.add_to
        norms = self.window.step_norms(self._scale, left, extra)
        if self._run.replicas.by_hand and norms.after.total.at_hand:
            clips = self._clipping.policy is not None
            norms = norms.averaged(self.window.micro_batches, clip_known=clips)
        if self.window.clipped_early:
            norms = norms._replace(clip_known=False)
        if self.window.zeroed:
            self.discard()
        return self._settle_doubts_of(norms) if self._doubted else norms

    def finish(self, optimizer: Optimizer | None, in_time: bool = True) -> None:
        """Records a step that is over; ``in_time`` if no forward has begun since."""
        if self._makes_state:
            self._makes_state, self.stepping = False, None
            self._withdraw()
            return
        # Without norms the optimizer never called its closure.
        norms = self._norms or self.window.step_norms(self._scale, carried_by(optimizer)[0])
        self.step += 1
        self.stepping, self.in_time = None, in_time
        if self._rates or self._fused is not None:
            self._withdraw()
        late = self._outcome is not APPLIED and self._outcome.late
        if self._run.hooks.buffers.restores:
            self._put_back_buffers()
        if not late and (self.skip_rule.in_a_row or self._outcome is not APPLIED):
            self.skip_rule.note(self._outcome.outcome)
        self._losses = self._losses or self._of_closure
        pending = self._pending(norms, self.step, estimates=True, unclipped=self._unclipped)
        pending.discarded, self.discarded = self.discarded, 0
        pending.uncertain, self._uncertain = self._uncertain, []
        pending.beyond_undo, self.passed_over = self.beyond_undo, False
        if self.stale.looks or self.window.nonfinite_count or not norms.before.indices:
            self._look_for_mistakes(norms)
        if self._curvature is not None:
            pending.curvature = self._curvature(self.step, self._outcome.outcome)
        if late:  # only the device knows the outcome
            self.skip_rule.note_later(self._outcome, pending.transfer)
        joint = self._run.joint_steps
        if joint.several:
            self._run.used.update(self.window.backwards)
            pending.join(joint.of(self.label, self.step))
            joint.close_if_complete()
        self._run.recorder.expect(pending)
        self._usual_backwards = max(1, len(self.window.arrivals))
        if self._run.replicas.active:
            self._run.replicas.after_step()
        self.window.reset()
        self.weights.sample = self.weights.weight = None
        self._losses = []
        self._norms = self._unclipped = self.units = None
        self._on_finished(self)

    def _put_back_buffers(self) -> None:
        """Restores the model's buffers if the step was skipped, so that it leaves no trace."""
        buffers, outcome = self._run.hooks.buffers, self._outcome
        if outcome is APPLIED or not self.in_time:
            return
        with_scaler = self._options.on_nonfinite == "skip"
        flag = outcome.skips(with_scaler)
        if outcome.refused or (with_scaler and outcome.outcome == "skipped_scaler"):
            self._put_back(buffers)
        elif flag is not None:
            buffers.put_back_where(flag)

    def _put_back(self, buffers: ModelBuffers) -> None:
        changed = buffers.put_back()
        if changed:
            event = not_put_back_event(self.step, self.label, changed, MOST_BYTES)
            self._run.tell(event, key=POISONED)

    def _look_for_mistakes(self, norms: StepNorms) -> None:
        run = self._run
        tensors = run.table.tensors
        if run.table.is_gone:
            return
        if self.stale.looks:
            step = self.stale.note_step(tensors, self.window.indices, self.step)
            if step is not None:
                tell_stale(run, self.label, step, StaleGradients.ENOUGH)
        if self.window.nonfinite_count and norms.after.norms.at_hand:
            self.stale.note_bad(tensors, norms.after.nonfinite_indices())
        if not (norms.before.indices or run.hooks.arrivals.ended):
            tell_no_gradient(run, self.label, self.step)

    def end(self) -> None:
        """Closes the open window at the end of the run."""
        self._withdraw()  # the last step may have raised
        if not self._abandon_if_left_out(together=False) and self.window.arrivals:
            self.discard(at_end=True)
        if self._doubted:
            self._settle_doubts(true=True)

    def _only_makes_state(self, optimizer: Optimizer) -> bool:
        """Returns whether a first step changes nothing: all rates and all gradients are zero.

        ``torch.distributed.checkpoint`` takes such a step to have the state of an optimizer made.
        """
        if optimizer.state or not has_no_rate(optimizer):
            return False
        gradients = self.window.gradients()[1]
        return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)

    @property
    def outcome(self) -> StepOutcome:
        """What became of the last step, as far as the host knows."""
        return self._outcome

    def _step_inside_backward(self) -> None:
        refuse_what_needs_all_gradients(self._options.deciding, f", as {self.label} does")
        if not self.window.arrivals:
            self.window.add_unfinished()

    def _leaves_to_device(self, norms: StepNorms) -> bool:
        """Whether the device decides: a fused optimizer is told by a flag to skip the step."""
        if norms.after.total.at_hand or self._explaining is not None or self.skip_rule.takes_all:
            return False
        can_skip = self._fused is not None and self._fused.can_skip
        return can_skip and self.skip_rule.leaves_to_device()

    def _decide(self, norms: StepNorms, found_inf: FloatOrDeferred, by_device: bool) -> StepOutcome:
        """Decides whether the step is taken."""
        try:
            outcome = self.skip_rule.decide(norms, found_inf, by_device)
        except TooManySkipsError:
            skipped = self.skip_rule.in_a_row
            if self._run.hooks.buffers.restores:
                self._put_back(self._run.hooks.buffers)
            raise self._explained(too_many_skips_error(*self._story(norms), skipped)) from None
        refusal = outcome.refusal if outcome.late else None
        if self._fused is not None and refusal is not None:
            self._fused.refuse(refusal)
        if outcome.outcome == "skipped_nonfinite" and self._options.on_nonfinite == "raise":
            raise self._explained(nonfinite_error(*self._story(norms), moved=self.beyond_undo))
        if outcome.outcome == "skipped_policy" and self._explaining is not None:
            self._explaining.look_at_spike(self.label, self.step + 1, self.window, norms)
        return outcome

    def _explained(self, error: NonFiniteGradientError) -> NonFiniteGradientError:
        explaining = self._explaining
        return error if explaining is None else error.explained(explaining.newest_of(self.label))

    def _story(self, norms: StepNorms) -> tuple[StepRecord, list[Event]]:
        """Returns record and non-finite events of a step that will raise; flushes the sinks."""
        if self._run.on_first_step:
            self._run.begin()
        entry = self._pending(norms, self.step + 1).entry()
        events = [event for event in entry.events if event.nonfinite]
        self._run.recorder.receive(wait=True, unsettled=True)  # steps before it come first
        self._run.recorder.note(tuple(events))
        self._run.recorder.flush()
        self._run.tell_poisoned(wait=True)
        # Should the loop catch the error and throw the gradients away, this is not told again.
        self.window.first_nonfinite, self.window.late_checks = None, []
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

    def _abandon_if_left_out(self, together: bool = True) -> bool:
        """Records the step of the window if a scaler has skipped it; returns whether it has.

        This waits for a device only if the scaler was not asked to step this optimizer.
        """
        if not self.window.arrivals:
            return False
        asked = self._scaler_has_updated() and self._is_among(
            self._scale.asked_to_step(self._generation)
        )
        if not asked and not self._scale.lowered_since(self._scale_at_backward):
            return False
        self.abandon_window(together, certain=asked)
        return True

    def _is_among(self, ids: frozenset[int]) -> bool:
        return bool(ids) and not ids.isdisjoint(
            map(id, (self.optimizer, *(member() for member in self._members)))
        )

    def abandon_window(
        self, together: bool = True, at_once: bool = False, certain: bool = False
    ) -> None:
        """Records the step of a window that a scaler skipped without calling the optimizer.

        Args:
            together: Whether all ranks call this at once, so that they may communicate.
            at_once: Whether no forward has begun since the step was skipped.
            certain: Whether the scaler has found an overflow in the gradients of this optimizer.
        """
        norms = self.window.unused_norms(self._scale_at_backward, together)
        # Parameters that are not watched may have overflowed as well. Only the norms tell.
        known = certain and not self._foreign and not self.window.is_known
        whole = self._run.shards is not None or known
        if norms is not None and (whole or not norms.before.finite):
            if at_once and self._must_know and self.window.late_checks:
                norms = self.window.look_closer(norms, 1.0)
            if self._explaining is not None:
                scale = self._scale_at_backward
                self._explaining.note_discarded(self.label, self.step + 1, self.window, scale)
            self._norms = norms
            self._outcome = StepOutcome("skipped_scaler")
            self.finish(self.optimizer, in_time=at_once)

    @property
    def is_left_out(self) -> bool:
        """Whether the scaler has updated since the last backward, without a step; never waits."""
        return bool(self.window.arrivals) and self._scaler_has_updated()

    def _may_be_left_out(self, backward: Backward) -> bool:
        """Whether the scaler may have skipped a step: it has updated, or gradients were reset.

        This check never waits; :meth:`_abandon_if_left_out`, which decides, may.
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


def _note_gone(reference: weakref.ref[OptimizerSteps], optimizer: object) -> None:
    """Notes that an optimizer is gone; called by the interpreter at any moment."""
    steps = reference()
    if steps is None:
        return
    # Nobody could catch an error, and Python would print it. Not by suppress(): at the end of the
    # interpreter the names of modules are gone.
    try:
        steps.let_go_of_optimizer()
        steps._tell_gone()
    except Exception:
        return
