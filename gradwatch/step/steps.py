"""Steps: adds backwards to a window, notices what is thrown away, and collects what a step was."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor

from gradwatch.hooks.backward import Backward
from gradwatch.hooks.scaler import LossScale
from gradwatch.hooks.snapshot import WeightSnapshot
from gradwatch.measure.deferred import Deferred, FloatOrDeferred
from gradwatch.measure.norms import StepNorms
from gradwatch.measure.statistics import NO_SAMPLE, StatisticsSampler
from gradwatch.step.mistakes import tell_frozen
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import Run
from gradwatch.step.skip_rule import APPLIED
from gradwatch.step.weights import Losses, WindowWeights
from gradwatch.step.window import Window


class Steps(ABC):
    """The steps of a set of parameters: adds backwards to a window, and records each step.

    Attributes:
        label: Name of the optimizer in the records.
        window: The backwards since the last step.
        weights: The weights of its windows, and its gradient noise scale.
        step: The number of steps so far.
        discarded: Windows that were thrown away since the last step.
        weights_then: Tells whether the weights have moved since the newest backward.
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
        self._scale = self._found = scale
        self._sampler = StatisticsSampler.of(
            run.options.statistics, run.options.every, len(run.table), run.shards
        )
        self._losses: Losses = []
        self._outcome = APPLIED
        self._lr: FloatOrDeferred = math.nan
        self._group_lr: Sequence[FloatOrDeferred] = ()
        self._scale_at_backward: FloatOrDeferred = 1.0
        self._generation: object = None
        self._told_missing: set[int] = set()
        self.discarded = 0
        self.weights_then: WeightSnapshot | None = None
        self._other_steps_then = 0

    def add(self, backward: Backward, weight: FloatOrDeferred) -> bool:
        """Adds a backward that has ended; returns whether it gave any gradient to measure."""
        found = self._found
        self._generation = None if found.scaler is None else found.generation()
        window = self.window
        if window.arrivals and window.discarded_before(backward):
            self.discard()
        count = len(window.arrivals)
        hooks = self._run.hooks
        # Nothing tells what sharded gradients were before they were reduced. On an accelerator it
        # is asked in every backward, so only where a wrapper reduces.
        tells = hooks.local is not None or window.table.tensors[0].is_cpu
        own = hooks.own_norm if tells and self._run.shards is None else None
        measurement = window.add(backward, weight, own)
        if measurement is not None or len(window.arrivals) > count:
            self.weights.note(window, weight, measurement, backward.graph)
        if measurement is None:
            return False
        self._scale_at_backward = 1.0 if self._scale.scaler is None else self._scale.value()
        if self._sampler is not None and self._sampler.due(self.step + 1):
            self._sampler.measure_gradients(*window.gradients())
        if self.weights_then is not None:
            self.weights_then.take()
        else:
            self.weights_then = WeightSnapshot(self._parameters())
        self._other_steps_then = self._run.other_steps
        return True

    def exchange(self, indices: Iterable[int]) -> None:
        """Notes that other tensors have taken the place of watched ones in the table."""
        self.window.exchange(indices)
        self.weights_then = None

    def let_go(self) -> None:
        """Drops the parameters and their gradients, as nothing will come any more.

        What is known of the window stays, and is recorded at the end of the run.
        """
        self.window.let_go()
        self.weights.let_go()
        self._sampler = None
        if self.weights_then is not None:
            self.weights_then.let_go()

    @property
    def scale_at_backward(self) -> FloatOrDeferred:
        """The loss scale at the newest backward."""
        return self._scale_at_backward

    @abstractmethod
    def discard(self) -> None:
        """Empties the window, whose gradients were thrown away; records it if nothing used them."""

    def _used_otherwise(self, norms: StepNorms) -> bool:
        """Returns whether something but this optimizer has used the gradients of the window."""
        run, window = self._run, self.window
        # Poisoned gradients are told in any case: loops also put a checkpoint back after them.
        total = norms.before.total.if_known()
        if total is not None and not math.isfinite(total):
            return False
        # Another optimizer has stepped with all of these backwards: that of a GAN's generator
        # leaves gradients in the discriminator as well.
        if run.used.issuperset(window.backwards) or run.other_steps != self._other_steps_then:
            return True
        # SAM moves the weights along the first gradient, other loops update them by hand.
        return self.weights_then is not None and self.weights_then.moved()

    def _scaler_has_updated(self) -> bool:
        before = self._generation
        return before is not None and before is not self._found.generation()

    def _pending(
        self,
        norms: StepNorms,
        step: int,
        estimates: bool = False,
        discarded: str = "",
        unclipped: StepNorms | None = None,
    ) -> PendingStep:
        """Collects everything that is known of a step.

        Args:
            norms: Its norms.
            step: Its number.
            estimates: Whether the step is added to the noise scale estimate.
            discarded: Why the step will never come; empty for a step.
            unclipped: Its norms if it turns out that gradwatch has clipped nothing; None if that
                is known.
        """
        window, weights, statistics = self.window, self.weights, NO_SAMPLE
        if self._sampler is not None and not discarded and self._sampler.due(step):
            parameters = self._parameters()
            statistics = self._sampler.after_step(window.indices, parameters, norms.unit_before)
        backwards = micro_batches = len(window.arrivals)
        weight = window.weight if weights.weight is None else weights.weight
        if window.partial and backwards > 1:
            micro_batches = window.micro_batches
            if micro_batches < backwards and window.divisor is None:  # no weight was given
                weight = float(micro_batches)
        own = None if self._run.hooks.local is None else weights.own_norm(window)
        # In nearly every window the first micro-batch reaches all parameters.
        complete = not window.arrivals or len(window.arrivals[0][0]) >= len(window.indices)
        complete = complete or bool(discarded)
        return PendingStep(
            step=step,
            optimizer=self.label,
            time_s=self._run.stopwatch.elapsed(),
            global_step=self._run.global_step(step),
            micro_batches=micro_batches,
            weight=weight,
            norms=norms,
            unclipped=unclipped,
            outcome=self._outcome,
            first_nonfinite=window.first_nonfinite,
            nonfinite_count=window.nonfinite_count,
            late_checks=window.late_checks,
            losses=self._losses,
            lr=self._lr,
            group_lr=self._group_lr,
            missing=() if complete else self._newly_missing(),
            told_missing=self._told_missing,
            local=None if own is None else Deferred(own),
            noise=weights.sample,
            table=self._run.table,
            exploding_norm=self._options.exploding_norm,
            estimator=weights.noise if estimates else None,
            statistics=statistics,
            thrown_away=discarded,
            by_hand=self._run.replicas.by_hand,
            on_nonfinite=self._run.suspect,
            backwards=backwards,
        )

    def _newly_missing(self) -> list[int]:
        """Lists the parameters in which no gradient has arrived, unless it was told of them."""
        arrived, tensors = self.window.arrived, self._run.table.tensors
        missing = [
            index
            for index in self.window.indices
            if index not in arrived
            and index not in self._told_missing
            and self._run.hooks.hooked(index)
        ]
        frozen = [index for index in missing if not tensors[index].requires_grad]
        self._told_missing.update(frozen)
        if frozen and self.label != "none":  # in a backward that is held nothing is certain yet
            tell_frozen(self._run, self.label, self.step, frozen)
        return [index for index in missing if tensors[index].requires_grad]

    def _parameters(self) -> list[Tensor]:
        return [self._run.table.tensors[index] for index in self.window.indices]
