"""Account: what is written down of a step, once its numbers are on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from gradwatch.accumulate.noise_scale import NoiseSample, NoiseScaleEstimator, noise_terms
from gradwatch.hessian.every import NOT_TAKEN, CurvatureSample
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, Transfer, resolve
from gradwatch.measure.norms import FirstNonFinite, LateCheck, StepNorms
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.statistics import NO_SAMPLE, StatisticsSample
from gradwatch.record.events import (
    exploding_event,
    no_gradient_events,
    nonfinite_event,
    overflow_event,
    skipped_event,
)
from gradwatch.record.recorder import Entry
from gradwatch.record.records import Event, Outcome, StepRecord
from gradwatch.step.skip_rule import StepOutcome


class Facts(NamedTuple):
    """What is known of a step when it ends; numbers may still be on their way from the device.

    Attributes:
        step: Its number.
        optimizer: Label of its optimizer.
        time_s: Seconds since the watcher was attached.
        global_step: The x-axis of loggers.
        micro_batches: Backwards in its window.
        weight: Sum of their weights.
        settled: Both sides of the clip.
        verdict: What became of it.
        offender: The first parameter that went bad.
        nonfinite: How many parameters were bad at the worst moment.
        late: What was measured and not looked at yet.
        losses: Losses and weights of the micro-batches.
        lr: Learning rate of the first parameter group.
        missing: Parameters that received no gradient, for the first time.
        local: The norm of this rank's own gradients before the reduction, in the unit of the
            measurement before the clip; None where there is none.
        noise: What the micro-batches tell about the noise; None where it is nothing.
        sample: Further statistics.
        curvature: That of the loss after the step.
    """

    step: int
    optimizer: str
    time_s: float
    global_step: int
    micro_batches: int
    weight: FloatOrDeferred
    settled: StepNorms
    verdict: StepOutcome
    offender: FirstNonFinite | None = None
    nonfinite: int = 0
    late: Sequence[LateCheck] = ()
    losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]] = ()
    lr: FloatOrDeferred = math.nan
    missing: Sequence[int] = ()
    local: Deferred | None = None
    noise: NoiseSample | None = None
    sample: StatisticsSample = NO_SAMPLE
    curvature: CurvatureSample = NOT_TAKEN

    def awaited(self) -> list[Deferred]:
        """Lists the numbers that must arrive from a device before the step can be written down."""
        before, after, *units = self.settled
        numbers = [*units, self.lr, self.weight, *chain(*self.losses), *self.verdict[1:]]
        more = self.local is not None or self.noise is not None or self.sample.parts or self.late
        if before.total.at_hand and not more and Deferred not in map(type, numbers):
            return []
        looks = [r for look in self.late for r in (look.measurement.norms, look.measurement.total)]
        readings = [
            *(before.norms, before.total, after.norms, after.total),
            *(one for one in (*numbers, self.local) if isinstance(one, Deferred)),
            *looks,
            *(() if self.noise is None else self.noise.readings()),
            *self.sample.readings(),
        ]
        each_once = {id(reading): reading for reading in readings}.values()
        return [reading for reading in each_once if not reading.at_hand]


class PendingStep:
    """One step on its way into the records: there at once, or when a transfer has arrived.

    Attributes:
        can_wait: Whether it may be written down later, together with other steps: its numbers are
            on the host, and they are all finite.
    """

    __slots__ = (
        "_entry",
        "_exploding_norm",
        "_facts",
        "_noise",
        "_note",
        "_table",
        "_transfer",
        "can_wait",
    )

    def __init__(
        self,
        facts: Facts,
        table: ParameterTable,
        exploding_norm: float | None,
        note: Callable[[Outcome], None] | None = None,
        noise: NoiseScaleEstimator | None = None,
    ) -> None:
        """Sends for the numbers.

        Args:
            facts: What is known of the step.
            table: The names of the parameters.
            exploding_norm: A norm above it is an event; None for no limit.
            note: Told what became of the step, once that is known.
            noise: Told what the micro-batches say about the noise; None where nothing is.
        """
        self._noise = noise
        self._note = note
        self._facts = facts
        self._table = table
        self._exploding_norm = exploding_norm
        awaited = facts.awaited()
        self._transfer = Transfer(awaited) if awaited else None
        self._entry: Entry | None = None
        self.can_wait = not (awaited or facts.nonfinite or facts.settled.before.overflowed)

    def ready(self) -> bool:
        """Tells, without waiting, whether the step can be written down."""
        return self._transfer is None or self._transfer.arrived()

    def entry(self) -> Entry:
        """Writes the step down; waits for its numbers where they have not arrived."""
        if self._entry is None:
            if self._transfer is not None:
                self._transfer.wait()
            self._entry = self._make_entry()
            if self._note is not None:
                self._note(self._entry.record.outcome)
        return self._entry

    def _make_entry(self) -> Entry:
        facts, settled = self._facts, self._facts.settled
        offender, nonfinite = self._offender()
        record = self._record(nonfinite)
        self._add_noise_scale(record)
        before, after = settled.before, settled.after
        norms = before.norms.array()
        if settled.before_scale != 1.0:
            norms = norms * settled.before_scale
        entry = Entry(
            record,
            before.indices,
            norms,
            statistics=facts.sample.rows(),
            events=self._events(record, offender),
        )
        if settled.untouched:
            return entry
        factor = settled.after_scale * resolve(settled.coefficient)
        return entry.with_clipped(after.indices, after.norms.array() * factor)

    def _offender(self) -> tuple[FirstNonFinite | None, int]:
        """Looks at what could not be looked at in time."""
        facts = self._facts
        if not facts.late:
            return facts.offender, facts.nonfinite
        looks = [*facts.late, LateCheck(facts.micro_batches, facts.settled.before, ())]
        bad = [offenders for look in looks if (offenders := look.offenders(None))]
        first = facts.offender or (bad[0][0] if bad else None)
        return first, max(facts.nonfinite, *map(len, bad), 0)

    def _record(self, nonfinite: int) -> StepRecord:
        facts, settled = self._facts, self._facts.settled
        return StepRecord(
            step=facts.step,
            optimizer=facts.optimizer,
            time_s=facts.time_s,
            micro_batches=facts.micro_batches,
            weight=resolve(facts.weight),
            grad_norm=settled.grad_norm,
            grad_norm_clipped=settled.grad_norm_clipped,
            grad_norm_local=math.nan
            if facts.local is None
            else facts.local.value() * settled.before_scale,
            clip_coef=settled.clip_coef,
            clip_threshold=resolve(settled.threshold),
            clipped=settled.clipped,
            outcome=facts.verdict.final(),
            nonfinite_parameters=nonfinite,
            loss=_mean(facts.losses),
            lr=resolve(facts.lr),
            loss_scale=resolve(settled.loss_scale),
            hessian_eigenvalue=facts.curvature.largest_eigenvalue,
            hessian_trace=facts.curvature.trace,
            global_step=facts.global_step,
        )

    def _add_noise_scale(self, record: StepRecord) -> None:
        estimator, sample = self._noise, self._facts.noise
        if estimator is None:
            return
        if sample is not None and record.outcome == "applied":
            small, large = resolve(sample.small), resolve(sample.large)
            if 0 < small < large:  # else a single micro-batch weighs something
                norm_sq = record.grad_norm * record.grad_norm
                terms = noise_terms(sample.small_norm_sq(), small, norm_sq, large)
                estimator.update(*terms, sample.batch(), resolve(sample.per_micro_batch))
        if estimator.updates:
            noise = estimator.read()
            record.noise_scale, record.noise_scale_stderr = noise.b_simple, noise.stderr

    def _events(self, record: StepRecord, offender: FirstNonFinite | None) -> tuple[Event, ...]:
        before, table, limit = self._facts.settled.before, self._table, self._exploding_norm
        events = []
        if offender is not None:
            events.append(nonfinite_event(record, offender, table))
        if before.overflowed:
            events.append(overflow_event(record, before, table))
        if limit is not None and record.grad_norm > limit:
            events.append(exploding_event(record, before, table, limit))
        if record.outcome != "applied":
            events.append(skipped_event(record))
        return (*events, *no_gradient_events(record, self._facts.missing, table))


def _mean(losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]]) -> float:
    total = sum(resolve(weight) for _, weight in losses)
    weighed = (resolve(loss) * resolve(weight) for loss, weight in losses)
    return sum(weighed) / total if total else math.nan
