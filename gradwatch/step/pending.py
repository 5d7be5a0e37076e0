"""A step that is over, while its numbers are still being copied from a device.

All numbers of a step are copied to the host at once, asynchronously. The record is made when they
have arrived.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from gradwatch.accumulate.noise_scale import NoiseSample, NoiseScaleEstimator
from gradwatch.hooks.data_parallel import several_ranks
from gradwatch.measure.deferred import Deferred, FloatOrDeferred, Transfer, resolve
from gradwatch.measure.norms import FirstNonFinite, LateCheck, Measurement, Origin, StepNorms
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.statistics import NO_SAMPLE, StatisticsSample
from gradwatch.record.events import (
    discarded_event,
    exploding_event,
    no_gradient_events,
    nonfinite_event,
    overflow_event,
    skipped_event,
)
from gradwatch.record.recorder import Entry
from gradwatch.record.records import Event, StepRecord
from gradwatch.step.skip_rule import StepOutcome
from gradwatch.step.together import JointStep

NO_CURVATURE = (math.nan, math.nan)


@dataclass(slots=True, eq=False)
class PendingStep:
    """A finished step that becomes a record, at once or when its numbers have arrived.

    Attributes:
        step: The number of the step, counted from 1.
        optimizer: Label of its optimizer.
        time_s: Seconds since the watcher was attached.
        global_step: The step number that loggers use as their x-axis.
        micro_batches: Micro-batches in its window.
        weight: Sum of their weights.
        norms: Norms before and after the clip.
        unclipped: What they are if gradwatch has clipped nothing, as only the device knew: in a
            step that was skipped, or whose norm was not finite. None if the host knew.
        outcome: Whether it was applied, or why it was skipped.
        first_nonfinite: The first parameter whose gradient was not finite; None if there is none.
        nonfinite_count: The largest number of such parameters in any one measurement.
        late_checks: Measurements whose finiteness has not been checked yet.
        losses: Losses and weights of the micro-batches.
        lr: Learning rate of the first parameter group.
        group_lr: Those of all groups; empty if there is only one.
        missing: Indices of the parameters in which no gradient has arrived.
        told_missing: Indices of those that were reported before; each is reported once in a run.
        local: The norm of this rank's own gradients before the reduction, in the unit of the
            measurement before the clip; None if there is none.
        noise: What the micro-batches tell about the noise; None if nothing.
        statistics: Further statistics.
        curvature: Largest eigenvalue and trace of the Hessian after the step; NaN if not measured.
        thrown_away: Why the step will never come, if its gradients were thrown away; empty for a
            step that has been taken or skipped.
        only_if_bad: Whether gradients that were thrown away matter only if they were not finite,
            as something has used them.
        discarded: Windows that were thrown away since the step before.
        uncertain: Such windows of which it was not known yet whether they were finite.
        backwards: Backwards in its window, which may be more than its micro-batches.
        table: The watched parameters, for their names in events.
        exploding_norm: A norm above this limit is an event; None for no limit.
        estimator: The noise scale estimator that ``noise`` is added to; None for none.
        beyond_undo: Whether a skipped step has moved the weights nevertheless.
        on_nonfinite: Called with the record if a gradient held a NaN or an Inf; None for nobody.
        by_hand: Whether the loop may have averaged the gradients over ranks by itself.
        can_wait: Whether the record may be made later, together with those of other steps: all
            numbers are on the host and finite.
        transfer: Copies its numbers to the host; None if they are there.
    """

    step: int
    optimizer: str
    time_s: float
    global_step: int
    micro_batches: int
    weight: FloatOrDeferred
    norms: StepNorms
    outcome: StepOutcome
    first_nonfinite: FirstNonFinite | None
    nonfinite_count: int
    late_checks: Sequence[LateCheck]
    losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]]
    lr: FloatOrDeferred
    missing: Sequence[int]
    told_missing: set[int]
    local: Deferred | None
    noise: NoiseSample | None
    table: ParameterTable
    exploding_norm: float | None
    estimator: NoiseScaleEstimator | None
    statistics: StatisticsSample = NO_SAMPLE
    curvature: tuple[float, float] = NO_CURVATURE
    thrown_away: str = ""
    only_if_bad: bool = False
    discarded: int = 0
    uncertain: Sequence[PendingStep] = ()
    backwards: int = 0
    group_lr: Sequence[FloatOrDeferred] = ()
    beyond_undo: bool = False
    on_nonfinite: Callable[[StepRecord], None] | None = None
    by_hand: bool = False
    unclipped: StepNorms | None = None
    can_wait: bool = field(init=False)
    transfer: Transfer | None = field(init=False)
    _entry: Entry | None = field(init=False, default=None)
    _joint: JointStep | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Starts one asynchronous copy of all numbers that are still on a device."""
        awaited = self._awaited()
        self.transfer = Transfer(awaited) if awaited else None
        self.can_wait = not (awaited or self.nonfinite_count or self.norms.before.overflowed)

    def join(self, joint: JointStep) -> None:
        """Says which steps of other optimizers were taken together with this one."""
        joint.add(self.optimizer, self.norms, self.transfer)
        self._joint = joint

    @property
    def settled(self) -> bool:
        """Whether its record need not wait for another optimizer that may step together with it."""
        return self._joint is None or self._joint.closed or not self._joint.awaited

    def ready(self) -> bool:
        """Returns whether all numbers have arrived; never waits."""
        if self._joint is not None and not self._joint.arrived():
            return False
        if self.uncertain:
            arrived = [one.ready() for one in self.uncertain]  # each is asked
            if not all(arrived):
                return False
        return self.transfer is None or self.transfer.arrived()

    def wait(self) -> None:
        """Waits until all numbers have arrived."""
        if self.transfer is not None:
            self.transfer.wait()

    @property
    def counts(self) -> bool:
        """Whether it happened, for gradients that were thrown away; waits for their norm."""
        if not self.only_if_bad:
            return True
        self.wait()
        return not self.norms.before.finite

    def entry(self) -> Entry:
        """Returns the step with its record and events; waits for numbers that have not arrived."""
        if self._entry is None:
            self.wait()
            self._entry = self._make_entry()
            self.uncertain = ()
            if self.on_nonfinite is not None and self._entry.record.nonfinite_parameters:
                self.on_nonfinite(self._entry.record)
        elif self._joint is not None:
            self._joint.fill(self._entry.record)  # others may have joined since it was made
        return self._entry

    def _awaited(self) -> list[Deferred]:
        before, after, *units = self.norms
        rates = self.group_lr or (self.lr,)
        numbers = [*units, *rates, self.weight, *chain(*self.losses), *self.outcome[1:]]
        more = self.local or self.noise or self.statistics.parts or self.late_checks
        # On the CPU nothing has to be copied, and most steps return here.
        if before.total.at_hand and not more and Deferred not in map(type, numbers):
            return []
        whole: tuple[Measurement, ...] = ()
        if self.unclipped is not None:  # what it was measured in is another number than after
            _, last, *others = self.unclipped
            whole, numbers = (last,), [*numbers, *others]
        measured = [before, after, *whole, *(check.measurement for check in self.late_checks)]
        own = [check.own.norm for check in self.late_checks]
        deferred = [
            *(norms for one in measured for norms in (one.norms, one.total)),
            *(one for one in (*numbers, *own, self.local) if isinstance(one, Deferred)),
            *(() if self.noise is None else self.noise.deferred()),
            *self.statistics.deferred(),
        ]
        each_once = {id(one): one for one in deferred}.values()
        return [one for one in each_once if not one.at_hand]

    def _make_entry(self) -> Entry:
        applied = self.outcome.final() == "applied"
        if self.unclipped is not None and not (applied and self.unclipped.after.finite):
            self.norms = self.unclipped
        if self.by_hand:  # only now have the numbers arrived that tell
            clips = self.norms.coefficient != 1.0
            self.norms = self.norms.averaged(self.micro_batches, clip_known=clips)
        norms, before, after = self.norms, self.norms.before, self.norms.after
        first, count = self._check_late()
        record = self._record(count)
        if self._joint is not None:
            self._joint.fill(record)
        self._add_noise_scale(record)
        rows = before.norms.array()
        if norms.before_scale != 1.0:
            rows = rows * norms.before_scale
        clipped = None
        if not norms.untouched:
            factor = norms.after_scale * abs(resolve(norms.coefficient))
            clipped = after.norms.array() * factor
        events = self._events(record, first) if self.counts else ()
        statistics = self.statistics.rows(applied)
        return Entry(
            record,
            before.indices,
            rows,
            after.indices,
            clipped,
            statistics,
            events,
            thrown_away=bool(self.thrown_away),
        )

    def _check_late(self) -> tuple[FirstNonFinite | None, int]:
        """Checks the measurements that were still on a device before; all have arrived now."""
        if not self.late_checks:
            return self.first_nonfinite, self.nonfinite_count
        count = self.backwards
        whole = LateCheck(count, self.norms.before, (), Origin.among(count))
        checks = [*self.late_checks, whole]
        bad = [found for check in checks if (found := check.nonfinite(None))]
        first = self.first_nonfinite or (bad[0][0] if bad else None)
        return first, max(self.nonfinite_count, *map(len, bad), 0)

    def _record(self, nonfinite_parameters: int) -> StepRecord:
        norms, local = self.norms, self.local
        outcome = self.outcome.final()
        eigenvalue, trace = self.curvature if outcome == "applied" else NO_CURVATURE
        return StepRecord(
            step=self.step,
            optimizer=self.optimizer,
            time_s=self.time_s,
            micro_batches=self.micro_batches,
            weight=resolve(self.weight),
            grad_norm=norms.grad_norm,
            grad_norm_all=norms.grad_norm,
            grad_norm_clipped=norms.grad_norm_clipped,
            grad_norm_local=math.nan if local is None else local.value() * norms.before_scale,
            clip_coef=norms.clip_coef,
            clip_threshold=resolve(norms.threshold),
            clipped=norms.clipped,
            outcome=outcome,
            nonfinite_parameters=nonfinite_parameters,
            loss=_mean(self.losses),
            lr=resolve(self.lr),
            group_lr=json.dumps(list(map(resolve, self.group_lr))) if self.group_lr else "",
            loss_scale=resolve(norms.loss_scale),
            hessian_eigenvalue=eigenvalue,
            hessian_trace=trace,
            global_step=self.global_step,
            discarded=self.discarded + sum(one.counts for one in self.uncertain),
        )

    def _add_noise_scale(self, record: StepRecord) -> None:
        estimator, sample = self.estimator, self.noise
        if estimator is None:
            return
        if sample is not None and record.outcome == "applied":
            estimator.add(sample, record.grad_norm * record.grad_norm)
        if estimator.updates:
            noise = estimator.read()
            record.noise_scale, record.noise_scale_stderr = noise.b_simple, noise.stderr
            record.noise_scale_low, record.noise_scale_high = noise.low, noise.high

    def _events(self, record: StepRecord, first: FirstNonFinite | None) -> tuple[Event, ...]:
        before, table, limit = self.norms.before, self.table, self.exploding_norm
        events = []
        if first is not None:
            told = (self.backwards, before.overflowed, self.by_hand)
            events.append(nonfinite_event(record, first, table, *told))
        if before.overflowed:  # it was so at the end of the backward: what came after is later
            late = first is not None and first.origin is Origin.AFTER
            events.insert(0 if late else len(events), overflow_event(record, before, table))
        if self.thrown_away:
            return (*events, discarded_event(record, self.thrown_away))
        if limit is not None and record.grad_norm > limit:
            events.append(exploding_event(record, before, table, limit))
        if record.outcome != "applied":
            events.append(skipped_event(record, self.beyond_undo, events))
        missing = self._missing() if self.missing else ()
        return (*events, *no_gradient_events(record, missing, table))

    def _missing(self) -> list[int]:
        """Lists the parameters without a gradient of which nothing was told yet; each once."""
        received = self._received()
        missing = [i for i in self.missing if i not in received and i not in self.told_missing]
        self.told_missing.update(missing)
        return missing

    def _received(self) -> set[int]:
        """Returns the parameters that have a gradient, though no backward of this rank gave it."""
        # The other ranks did: under find_unused_parameters, and in experts that saw no token here,
        # the reduction is all that writes it. Or the loop has set it by hand.
        before, after = self.norms.before, self.norms.after
        received = set() if after is before else set(after.indices).difference(before.indices)
        if self.local is not None:  # a wrapper leaves what no rank has used without a gradient
            return received.union(before.indices)
        # Zeros may be what zero_grad(set_to_none=False) has left.
        for side in (before, after) if several_ranks() else ():
            columns = np.flatnonzero(side.norms.array()).tolist()
            received.update(side.indices[column] for column in columns)
        return received


def _mean(losses: Sequence[tuple[FloatOrDeferred, FloatOrDeferred]]) -> float:
    total = sum(resolve(weight) for _, weight in losses)
    weighted = (resolve(loss) * resolve(weight) for loss, weight in losses)
    return sum(weighted) / total if total else math.nan
