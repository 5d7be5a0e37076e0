"""The micro-batches of one optimizer step: gradients, weights, norms before and after the clip.

A :class:`Window` measures the gradients at the end of each backward, in one batched pass, and takes
a snapshot of them. When the step begins and the snapshot still matches, that measurement is the
norm before and after the user's clip; otherwise the gradients are measured once more. In some steps
they are measured once more in any case (:class:`~gradwatch.hooks.snapshot.Looks`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import compress, repeat
from operator import attrgetter, is_

import torch
from torch import Tensor

from gradwatch.accumulate.counting import count_micro_batches
from gradwatch.accumulate.noise_scale import MicroBatch
from gradwatch.hooks.backward import Backward
from gradwatch.hooks.data_parallel import is_distributed, rank
from gradwatch.hooks.model import with_freed
from gradwatch.hooks.scaler import LossScale
from gradwatch.hooks.snapshot import Direction, GradientSnapshot, Looks
from gradwatch.measure.deferred import (
    Deferred,
    FloatOrDeferred,
    Transfer,
    defer,
    resolve,
)
from gradwatch.measure.devices import exact_dtype
from gradwatch.measure.gathering import added, are_alike
from gradwatch.measure.norms import (
    NOT_KNOWN,
    FirstNonFinite,
    LateCheck,
    Measurement,
    NonFiniteCount,
    Origin,
    OwnNorm,
    StepNorms,
    gradient_norms,
    has_negative_zero,
    measure,
    nonfinite_counts,
    same_norms,
    total_norm,
    wide_norms,
)
from gradwatch.measure.parameters import ParameterTable, local_part
from gradwatch.measure.sharded import (
    ClipSides,
    MeetAgainError,
    PackedAllReduce,
    Placements,
    RanksPartedError,
    Shards,
    all_reduce_norms,
    pending_sums,
    placements_of,
    unknown_norms,
)
from gradwatch.step.bad_weights import BadWeights

_grad = attrgetter("grad")


@dataclass(slots=True)
class Window:
    """The backwards since the last step of one optimizer.

    Attributes:
        table: All watched parameters.
        indices: Indices of this optimizer's parameters, in model order.
        norm_type: The p of the norms.
        shards: The sharded parameters; None if no gradient is sharded.
        arrivals: For each backward the indices that received a gradient in it, and its weight.
        backwards: For each backward its number in the run (:attr:`Backward.number`).
        noise_norms: For each backward its weight and norm, for the noise scale.
        first_nonfinite: The first parameter whose gradient was not finite; None if there is none.
        stale: Indices of parameters whose gradient was NaN or Inf in the step before, and has not
            been zeroed since.
        bad_weights: Tells whether weights were bad before the gradients; None for nobody.
        nonfinite_count: The largest number of such parameters in any one measurement.
        late_checks: Measurements that are still on a device, and so not checked yet.
        divisor: What the weighted losses were divided by; None if the loop weights its losses
            itself.
        correction: The factor that turns the gradients into the weighted mean.
        shares: Whether other parameters than those of this window are hooked.
        partial: Whether a backward may have reached only some of its parameters.
        rescaled: Whether its gradients were made smaller between two of its backwards.
        clipped_early: Whether a clip did that.
        zeroed: Whether the gradients were thrown away between the last backward and the step.
        looks: When to measure again although nothing is known to have changed; None for never.
    """

    table: ParameterTable
    indices: list[int]
    norm_type: float = 2.0
    shards: Shards | None = None
    arrivals: list[tuple[set[int], FloatOrDeferred]] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)
    noise_norms: list[MicroBatch] = field(default_factory=list)
    first_nonfinite: FirstNonFinite | None = None
    stale: Collection[int] = ()
    bad_weights: BadWeights | None = None
    nonfinite_count: int = 0
    late_checks: list[LateCheck] = field(default_factory=list)
    divisor: FloatOrDeferred | None = None
    correction: FloatOrDeferred = 1.0
    shares: bool = False
    partial: bool = False
    rescaled: bool = False
    clipped_early: bool = False
    zeroed: bool = False
    _measured: list[Measurement | None] = field(default_factory=list)
    looks: Looks | None = field(default_factory=Looks)
    _before: Measurement | None = None
    _snapshot: GradientSnapshot | None = None
    _direction: Direction | None = None
    _looked: bool = False
    _parted: bool = False
    _tensors: list[Tensor] = field(default_factory=list)
    _own: set[int] = field(default_factory=set)
    _dtype: torch.dtype | None = None
    _placed: dict[int, Placements] = field(default_factory=dict)

    # -- contents ----------------------------------------------------------------------------------

    @property
    def backward_count(self) -> int:
        """The number of backwards whose gradients are in the window."""
        return len(self.arrivals)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches that these are (:func:`count_micro_batches`)."""
        if not self.partial:
            return len(self.arrivals)
        return count_micro_batches([arrived for arrived, _ in self.arrivals])

    @property
    def weight(self) -> FloatOrDeferred:
        """Sum of the weights of its micro-batches."""
        if len(self.arrivals) == 1:  # an addition would launch a kernel if the weight is a tensor
            return self.arrivals[0][1]
        return defer(added(weight for _, weight in self.arrivals))

    @property
    def arrived(self) -> set[int]:
        """Indices of the parameters that received a gradient in any micro-batch."""
        return set().union(*(arrived for arrived, _ in self.arrivals))

    def gradients(self) -> tuple[list[int], list[Tensor]]:
        """Returns the indices of the parameters that have a gradient now, and these gradients.

        Of sharded gradients these are the parts that this rank holds.
        """
        if len(self._tensors) != len(self.indices):
            self._tensors = [self.table.tensors[index] for index in self.indices]
            self._own = set(self.indices) if self.shares else set()
            alike = bool(self._tensors) and are_alike(self._tensors)
            self._dtype = self._tensors[0].dtype if alike else None
        # Loops in C over all parameters: a Python loop here would cost more than the norms.
        indices, gradients = self.indices, list(map(_grad, self._tensors))
        if any(map(is_, gradients, repeat(None))):
            pairs = [(i, g) for i, g in zip(indices, gradients, strict=True) if g is not None]
            indices, gradients = [i for i, _ in pairs], [g for _, g in pairs]
        return indices, gradients if self.shards is None else list(map(local_part, gradients))

    # -- adding backwards --------------------------------------------------------------------------

    def add(
        self,
        backward: Backward,
        weight: FloatOrDeferred = 1.0,
        own: Callable[[Measurement], OwnNorm] | None = None,
    ) -> Measurement | None:
        """Adds a backward that has ended, and measures the gradients in one batched pass.

        Args:
            backward: The backward.
            weight: The weight of its micro-batch.
            own: Returns the norm of this rank's own gradients in it; None if nothing tells.

        Returns:
            The norms, in the units of the gradients; None if none of the window's parameters
            received a gradient that can be measured.
        """
        arrived = set(backward.arrived)
        if not arrived:  # FSDP2 keeps the gradients back until the last micro-batch
            self.arrivals.append((arrived, weight))
            self.backwards.append(backward.number)
            self._measured.append(None)
            return None
        indices, gradients = self.gradients()
        if self.shares and not arrived.issubset(self._own):  # it has reached other windows, too
            arrived &= self._own
            if not arrived:
                return None
        freed = backward.freed
        if freed:
            freed = {i: norm for i, norm in freed.items() if i in self.indices}
        if not gradients and not freed:
            return None  # an optimizer has used and freed them inside the backward
        if backward.continues and self.arrivals:
            self.arrivals[-1][0].update(arrived)
            self._measured.pop()
        else:
            self.arrivals.append((arrived, weight))
            self.backwards.append(backward.number)
        self.partial |= len(arrived) < len(self.indices)
        self._looked = False
        self._before = measure(indices, gradients, self.norm_type, self._dtype)
        if freed:
            self._before = with_freed(self._before, freed, self.norm_type)
        self._measured.append(self._before)
        if self.shards is None:
            # local_part() makes a new tensor of a sharded gradient at each call, so a snapshot,
            # which compares ids, would never match.
            self._snapshot = GradientSnapshot(gradients)
        else:
            self._place(indices)
        turns = self.looks is not None and self.looks.turns
        self._direction = Direction(indices, gradients) if turns else None
        total, known = self._before.total.if_known(), self.bad_weights
        if total is None or not math.isfinite(total) or (known is not None and known.unknown):
            here = NOT_KNOWN if own is None else own(self._before)
            self._examine(self._before, None if freed else gradients, backward.arrived, here)
        return self._before

    def _examine(
        self,
        before: Measurement,
        gradients: list[Tensor] | None,
        arrived: Sequence[int],
        own: OwnNorm,
    ) -> None:
        total = before.total.if_known()
        if total is None or not math.isfinite(total):
            self._check(before, gradients, self._origin(arrived), arrived, own)
        elif self.bad_weights is not None:
            self.bad_weights.note_good()

    def share(self) -> None:
        """Notes that a backward may reach parameters that are in other windows."""
        self.shares, self._own = True, set(self.indices)

    def own(self, indices: list[int]) -> None:
        """Sets the parameters of the optimizer, as they have changed."""
        self.indices, self._tensors = indices, []
        self.share()

    def exchange(self, indices: Iterable[int]) -> None:
        """Notes that other tensors have taken the place of watched ones in the table."""
        # A gradient that has not arrived was one that the old tensor had left.
        left = set(indices).intersection(self.indices).difference(self.arrived)
        if self.arrivals and left:
            self.forget(sorted(left))
        self._tensors, self._snapshot, self._direction = [], None, None

    def widen(self, late: Sequence[int]) -> None:
        """Adds gradients of parameters that joined the optimizer after the last backward."""
        before = self._before
        if before is None or not self.arrivals:
            return
        joined = [index for index in late if index not in before.indices]
        gradients = [self.table.tensors[index].grad for index in joined]
        found = [local_part(gradient) for gradient in gradients if gradient is not None]
        if len(found) < len(joined) or not found:
            return
        norms = measure(joined, found, self.norm_type).norms.tensor
        unchanged = self._snapshot is not None and self._snapshot.matches(
            [self.table.tensors[index].grad for index in before.indices]
        )
        self._before = with_freed(
            before, dict(zip(joined, norms.unbind(), strict=True)), self.norm_type
        )
        self.arrivals[-1][0].update(joined)
        if unchanged and self.shards is None:
            self._snapshot = GradientSnapshot(self.gradients()[1])

    def written_by_hand(self, norms: StepNorms) -> bool:
        """Returns whether the loop has set the gradients of a step, rather than clipped them.

        Such gradients may be made from those of earlier backwards, as when the gradients of several
        tasks are merged. ``norms`` are those of the step, before gradwatch's own clip.
        """
        before, after = norms.before, norms.after
        if after is before:
            return not self.arrivals and bool(after.indices) and after.total.if_known() != 0
        if self._snapshot is not None and self._snapshot.replaced(self.gradients()[1]):
            return True
        if not after.total.at_hand or list(after.indices) != list(before.indices):
            return False
        # A clip makes no gradient larger.
        grown = after.norms.array() > before.norms.array() * (1.0 + 1e-4)
        return bool(grown.any())

    def add_unfinished(self) -> None:
        """Adds a backward that is still running, because an optimizer steps inside it."""
        self.arrivals.append((set(self.indices), 1.0))

    def left_before(self, first: int) -> float:
        """Returns how much of the gradients is left when the next backward begins.

        This must be called at its first arrival, when it has added to no other gradient. It waits
        for a device only if the gradients were written to since the last backward.

        Args:
            first: The index of the parameter that has arrived.

        Returns:
            1.0 if nothing has changed the gradients since the last backward; 0.0 if they were
            thrown away: set to None or to zero; otherwise the norm of what is left of them as a
            share of what it was.
        """
        before, snapshot = self._before, self._snapshot
        if before is not None and self.shards is not None:
            gone = all(self.table.tensors[index].grad is None for index in before.indices)
            return 0.0 if gone else 1.0
        if before is None or snapshot is None or len(snapshot) != len(before.indices):
            return 1.0  # some were used and freed inside of their backward
        indices, tensors = before.indices, self._tensors
        if indices is not self.indices:
            tensors = [self.table.tensors[index] for index in indices]
        gradients = list(map(_grad, tensors))
        rest = list(range(len(indices)))
        added_to = bisect_left(indices, first)
        if added_to < len(indices) and indices[added_to] == first:
            del rest[added_to], gradients[added_to]
        self._looked = bool(rest)
        moved = snapshot.moved_among(rest, gradients)
        if not moved:
            return 1.0
        written = [(indices[i], g) for i in moved if (g := self._gradient(indices[i])) is not None]
        # A loop throws all of them away, or clips all. If only some differ, other code set them.
        if len(moved) < len(rest):
            self._check_written(written)
            return 1.0
        return self._left_of(before, [indices[i] for i in rest], written) if written else 0.0

    def _left_of(
        self, before: Measurement, rest: Sequence[int], written: Sequence[tuple[int, Tensor]]
    ) -> float:
        then = before.subset(rest, self.norm_type).total
        there = [gradient for _, gradient in written]
        now = Deferred(
            total_norm(gradient_norms(there, self.norm_type, self._dtype), self.norm_type)
        )
        if waited := [one for one in (then, now) if not one.at_hand]:
            Transfer(waited).wait()  # for both at once
        was, left = then.value(), now.value()
        if not math.isfinite(left):
            self._check_written(written)
        if left == 0 != was:
            return 0.0
        if was == 0:
            self._looked = False  # zeros that stay zeros say nothing: only the first one can tell
        return left / was if 0 < was < math.inf else 1.0

    def _gradient(self, index: int) -> Tensor | None:
        return self.table.tensors[index].grad

    def _check_written(self, written: Sequence[tuple[int, Tensor]]) -> None:
        """Checks gradients that the loop has written to since the last backward."""
        if written:
            indices, gradients = map(list, zip(*written, strict=True))
            self._check(measure(indices, gradients, self.norm_type), gradients, Origin.AFTER)

    def thrown_before(self, first: int) -> list[int]:
        """Lists the parameters whose gradients were thrown away, though others are left.

        As for :meth:`left_before`, this must be called at the first arrival of the next backward.
        """
        before, snapshot = self._before, self._snapshot
        if before is None or snapshot is None or len(snapshot) != len(before.indices):
            return []
        gradients = [self.table.tensors[index].grad for index in before.indices]
        moved = snapshot.moved(gradients)
        norms = before.norms.array() if moved else ()
        gone = []
        for position in moved:
            index, gradient = before.indices[position], gradients[position]
            if index == first:
                # It has its new gradient already. Written to besides, or replaced, it was reset.
                lost = moved[position] > 1
            else:
                lost = gradient is None or not bool(gradient.any())
            if lost and norms[position] != 0:
                gone.append(index)
        return gone

    def discarded_before(self, backward: Backward) -> bool:
        """Returns whether the gradients were thrown away before a backward that has ended.

        This is for windows whose only gradient was the first to arrive: there was no moment at
        which :meth:`left_before` could have seen what was left of it.
        """
        before, snapshot = self._before, self._snapshot
        if self._looked or before is None or snapshot is None:
            return False
        # An optimizer inside the backward frees the gradients, so the next ones are new.
        if backward.create_graph or backward.continues or backward.freed:
            return False
        if is_distributed():
            # A reduction over ranks also writes into gradients and replaces them, so the snapshot
            # cannot tell the two apart.
            return False
        arrived = set(backward.arrived)
        now = (self.table.tensors[index].grad for index in before.indices)
        return snapshot.was_discarded(now, (index in arrived for index in before.indices))

    def reset(self) -> None:
        """Empties the window, after a step or after the gradients were reset."""
        self.arrivals, self.noise_norms, self.late_checks = [], [], []
        self.backwards, self._measured = [], []
        self.partial = self.zeroed = self._looked = False
        self.rescaled = self.clipped_early = False
        self.first_nonfinite, self.nonfinite_count, self.stale = None, 0, ()
        self.divisor, self.correction = None, 1.0
        self._before = self._snapshot = self._direction = None

    def let_go(self) -> None:
        """Drops the parameters; the norms of what is in the window stay."""
        self._tensors, self._direction, self._placed = [], None, {}

    def begin_again(self) -> None:
        """Empties the window, for the next evaluation of a closure inside the same step.

        What was not finite in this one still belongs to the step.
        """
        first, count, late = self.first_nonfinite, self.nonfinite_count, self.late_checks
        self.reset()
        self.first_nonfinite, self.nonfinite_count, self.late_checks = first, count, late

    def remeasure_reduced(self) -> None:
        """Measures the gradients again, after they were reduced over the ranks."""
        indices, gradients = self.gradients()
        self.arrivals[-1][0].update(indices)  # FSDP2 may have kept all of them back until now
        own, held = NOT_KNOWN, self._before
        if held is not None and self.shards is None:  # DDP had not communicated until now
            own = OwnNorm(held.total, held.indices, rank())
        self._before = measure(indices, gradients, self.norm_type)
        if self.shards is None:
            self._snapshot = GradientSnapshot(gradients)
        if self._direction is not None:
            self._direction = Direction(indices, gradients)
        self._check(self._before, gradients, self._origin(()), own=own)

    def accept_restored_gradients(self) -> None:
        """Renews the snapshot, as gradients were changed and then written back unchanged."""
        if self._snapshot is not None:
            self._snapshot = GradientSnapshot(self.gradients()[1])

    # -- norms of a step ---------------------------------------------------------------------------

    def step_norms(
        self,
        scale: LossScale,
        left: FloatOrDeferred,
        extra: Callable[[PackedAllReduce], None] | None = None,
    ) -> StepNorms:
        """Returns the norms of the gradients that a step is about to use.

        The gradients are measured again only if they have changed since the last backward, for
        example by a clip of the training loop, or if a look is due.

        Args:
            scale: The loss scale of the run.
            left: The loss scale by which the gradients are still multiplied; 1 after unscaling.
            extra: Adds further numbers to the all-reduce over ranks, if there is one.

        Returns:
            The norms before and after the user's own clip.
        """
        loss_scale = left if scale.scaler is None else scale.value()
        # A scaler that unscales moves no version counter, so the snapshot still matches. The norms
        # measured at the end of the backward are those of the scaled loss in any case.
        unit_before = left if self._before is None else loss_scale
        unchanged = self._before is not None and self._is_unchanged(self._before)
        due = self.looks is not None and self.looks.due(unchanged)
        if self._before is not None and unchanged and not due:
            before = after = self._before
        elif unchanged:
            before, after = self._look(unit_before, left)
        else:
            before, after = self._measure_again()
        unit_after = unit_before if after is before else left
        sign = self._sign() if after is not before and self._direction is not None else 1.0
        if self.shards is not None:
            before, after = self._all_reduce(self.shards, before, after, extra)
        looked = unchanged and after is not before and not after.total.at_hand
        norms = StepNorms(
            before,
            after,
            unit_before,
            unit_after,
            self.correction,
            loss_scale=loss_scale,
            looked=looked,
            sign=sign,
            clip_known=not self._parted,
        )
        if looked and self.looks is not None:
            self.looks.compare_later(norms)
        return norms

    @property
    def is_known(self) -> bool:
        """Whether the host knows the norm of the newest backward without a wait."""
        return self._before is not None and self._before.total.at_hand

    def look_closer_at_newest(self) -> None:
        """Does what :meth:`look_closer` does for the gradients of the backward that has ended."""
        before = self._before
        if before is not None and self.late_checks and not before.total.at_hand:
            self._before = self.look_closer(StepNorms(before, before), 1.0).before
            self._measured[-1] = self._before

    def look_closer(self, norms: StepNorms, left: FloatOrDeferred) -> StepNorms:
        """Finds in late measurements what the host would have found at once on a CPU.

        It waits for the norm of the step. If that is not finite, NaN and Inf are counted as long as
        the gradients are there, weights are looked at, and a norm beyond float32 is taken again.

        Args:
            norms: The norms of the step; no weight has changed since they were measured.
            left: The loss scale by which the gradients are still multiplied.

        Returns:
            The norms; in float64 if only they were not finite, and not the gradients.
        """
        if self.shards is not None or not self.late_checks:
            return norms
        if norms.looked and norms.before.total.at_hand:
            # There was a wait in the backward. In this one the host also learns what the look has
            # found, so that the next step need not look and wait again.
            looks = [one.norms for one in (norms.before, norms.after)]
            numbers = [*looks, norms.before.total, norms.after.total]
            numbers += [one for one in norms if isinstance(one, Deferred)]
            waiting = {id(one): one for one in numbers if not one.at_hand}
            Transfer(list(waiting.values())).wait()
        if norms.after.finite:
            return norms
        indices, gradients = self.gradients()
        weights = None if self.bad_weights is None else self.bad_weights.measured()
        counts = Deferred(nonfinite_counts(gradients))
        self._read_at_once(norms, counts, weights)  # one wait more, whatever is bad
        rows = [NonFiniteCount(int(nan), int(inf)) for nan, inf in counts.array().tolist()]
        counted = dict(zip(indices, rows, strict=True))
        unchanged = norms.untouched
        if unchanged and not any(rows):
            return self._taken_again(norms, indices, gradients, left)
        spoiled = [] if weights is None else BadWeights.with_nan(weights)
        checks, self.late_checks = self.late_checks, []
        for check in checks:
            # The loop's own clip may have made all elements of a bad gradient NaN.
            kept = unchanged or check.measurement is norms.after
            bad = check.nonfinite(None, counted if kept else None)
            self.nonfinite_count = max(self.nonfinite_count, len(bad))
            if bad and self.first_nonfinite is None:
                self.first_nonfinite = self._traced(bad, check.micro_batch, lambda: spoiled)
        return norms

    def _read_at_once(
        self, norms: StepNorms, counts: Deferred, weights: Measurement | None
    ) -> None:
        """Waits for all numbers that tell what is bad in a step, in one copy from each device."""
        measured = [norms.before, norms.after, *(check.measurement for check in self.late_checks)]
        numbers = [
            counts,
            *(one for part in measured for one in (part.norms, part.total)),
            *([] if weights is None else [weights.norms]),
            *(one for one in norms if isinstance(one, Deferred)),
            *(check.own.norm for check in self.late_checks if check.own.norm is not None),
        ]
        waiting = {id(one): one for one in numbers if not one.at_hand}
        Transfer(list(waiting.values())).wait()

    def _taken_again(
        self,
        norms: StepNorms,
        indices: list[int],
        gradients: list[Tensor],
        left: FloatOrDeferred,
    ) -> StepNorms:
        """Returns the norms of finite gradients whose norm is beyond float32."""
        if exact_dtype(gradients[0].device) != torch.float64:
            return norms
        self.late_checks = []
        whole = wide_norms(gradients, self.norm_type)
        # A scaler that unscales leaves the measurement as it is.
        if resolve(norms.unit_before) != resolve(left):
            whole = whole * (resolve(norms.unit_before) / resolve(left))
        total = total_norm(whole, self.norm_type)
        measured = Measurement(indices, Deferred(whole), Deferred(total), overflowed=True)
        return norms._replace(
            before=measured, after=measured, unit_after=norms.unit_before, looked=False
        )

    def measure_clipped(self, indices: Sequence[int], gradients: list[Tensor]) -> Measurement:
        """Measures gradients (of sharded ones this rank's parts) after a clip by elements or units.

        The norms after such a clip do not follow from those before it.
        """
        after = measure(indices, gradients, self.norm_type)
        return after if self.shards is None else self._all_reduce(self.shards, after, after)[1]

    def unused_norms(self, loss_scale: FloatOrDeferred, together: bool) -> StepNorms | None:
        """Returns the norms of a window whose step was skipped, as measured at its last backward.

        Args:
            loss_scale: The loss scale at its last backward.
            together: Whether all ranks call this at once, so that norms of sharded gradients can be
                combined; if not, they are those of this rank's parts.

        Returns:
            The same norms before and after the clip; None if the window is empty.
        """
        before = self._before
        if before is None:
            return None
        if self.shards is not None and together:
            before, _ = self._all_reduce(self.shards, before, before, gradients=False)
        return StepNorms(
            before,
            before,
            loss_scale,
            loss_scale,
            loss_scale=loss_scale,
            clip_known=not self._parted,
        )

    def _is_unchanged(self, before: Measurement) -> bool:
        if self._snapshot is None:
            return False
        if before.indices is self.indices:
            # All had a gradient. One that is None by now makes the snapshot differ, so the search
            # for None in gradients() can be saved.
            return self._snapshot.matches(list(map(_grad, self._tensors)))
        return self._snapshot.matches(self.gradients()[1])

    def _look(
        self, unit_before: FloatOrDeferred, unit_after: FloatOrDeferred
    ) -> tuple[Measurement, Measurement]:
        """Measures unchanged gradients once more; the record compares numbers that are late."""
        before, (indices, gradients) = self._before, self.gradients()
        if before is None or self.looks is None:
            return self._measure_again()
        if list(before.indices) != indices:  # some were used and freed inside the backward
            return before, before
        after = measure(indices, gradients, self.norm_type, self._dtype)
        if after.total.at_hand:
            units = resolve(unit_before), resolve(unit_after)
            if same_norms(before, after, *units) and self._sign() == 1.0:
                return before, before
            self.looks.found()
        return self._settle_change(after, gradients)

    def _sign(self) -> FloatOrDeferred:
        """Returns -1.0 if the gradients were reversed since the last backward, else 1.0."""
        if self._direction is None or self.looks is None:
            return 1.0
        sign = self._direction.sign(*self.gradients())
        self.looks.turned(sign)
        return sign

    def _measure_again(self) -> tuple[Measurement, Measurement]:
        indices, gradients = self.gradients()
        after = measure(indices, gradients, self.norm_type, self._dtype)
        return self._settle_change(after, gradients)

    def _settle_change(
        self, after: Measurement, gradients: list[Tensor]
    ) -> tuple[Measurement, Measurement]:
        if self._before is not None and _zeroed(self._before, after, gradients):
            self.zeroed = True  # zero_grad() came after the last backward
            return after, after
        origin = self._origin(()) if self._before is None else Origin.AFTER
        self._check(after, gradients, origin)
        return self._before or after, after

    def _origin(self, order: Sequence[int]) -> Origin:
        """Returns where a gradient became bad that is seen for the first time after a backward.

        ``order`` is that of the arrivals; empty if it is not known.
        """
        if not order or (len(self._measured) > 1 and self._measured[-2] is None):
            return Origin.among(self.backward_count)
        return Origin.BACKWARD

    def _check(
        self,
        measurement: Measurement,
        gradients: list[Tensor] | None,
        origin: Origin,
        order: Sequence[int] = (),
        own: OwnNorm = NOT_KNOWN,
    ) -> None:
        """Finds the first gradient that is not finite: now, or once the norms have arrived."""
        check = LateCheck(self.backward_count, measurement, order, origin, own)
        if not measurement.total.at_hand:
            self.late_checks.append(check)
            return
        bad = check.nonfinite(gradients)
        self.nonfinite_count = max(self.nonfinite_count, len(bad))
        if bad and self.first_nonfinite is None:
            count = self.backward_count
            known = self.bad_weights
            spoiled = list[int] if known is None else known.found
            self.first_nonfinite = self._traced(bad, count, spoiled) if gradients else bad[0]

    def _traced(
        self,
        bad: Sequence[FirstNonFinite],
        count: int,
        spoiled: Callable[[], Sequence[int]],
    ) -> FirstNonFinite:
        """Returns the first of the bad gradients, with its origin if that is not its backward.

        Args:
            bad: The bad gradients.
            count: The number of backwards that the window had when they were measured.
            spoiled: Lists the weights that were bad by then.
        """
        first, here = bad[0], rank() if self.shards is None else None
        if first.origin is Origin.AFTER and self.arrivals:
            return replace(first, rank=here)
        # While a backward still runs, other optimizers may have spoiled their weights by now.
        ended = len(self.backwards) == len(self.arrivals)
        weights = spoiled() if ended else ()
        if weights:
            known = first.origin is Origin.BACKWARD
            number = first.micro_batch if known else 0
            return replace(first, origin=Origin.WEIGHTS, micro_batch=number, weights=weights)
        if not self.arrivals:
            return replace(first, rank=here)
        if first.origin is not Origin.BACKWARD:
            return first
        stale = [one for one in bad if one.index in self.stale]
        if stale and count == 1:
            return replace(stale[0], origin=Origin.STALE, rank=here)
        if first.rank == -1:  # the order here, and the micro-batch, need not be that of its rank
            return replace(first, origin=Origin.among(count))
        # A reduction over ranks also writes into gradients that nothing has arrived at here.
        if first.index in self.arrivals[count - 1][0] or is_distributed():
            return first
        return replace(first, origin=Origin.AFTER, micro_batch=first.micro_batch - 1, rank=here)

    def _all_reduce(
        self,
        shards: Shards,
        before: Measurement,
        after: Measurement,
        extra: Callable[[PackedAllReduce], None] | None = None,
        gradients: bool = True,
    ) -> tuple[Measurement, Measurement]:
        """Combines the norms of all ranks' parts, and finds the first bad parameter of any rank.

        ``gradients`` is False if the gradients may be gone or changed, so only norms are used.
        """
        partial = {}
        if gradients:
            self._place(after.indices)
            there = {i: self.table.tensors[i].grad for i in pending_sums(self._placed)}
            partial = {i: local_part(g) for i, g in there.items() if g is not None}
        local = ClipSides(before, after, self.first_nonfinite, self.nonfinite_count)
        shards.stepping, shards.is_step = (self.indices or [-1])[0], gradients
        self._parted = False
        try:
            whole = self._met(shards, local, partial, extra)
        except RanksPartedError:
            whole, self._parted = unknown_norms(local), True
        self.first_nonfinite, self.nonfinite_count = whole.first_nonfinite, whole.nonfinite_count
        return whole.before, whole.after

    def _met(
        self,
        shards: Shards,
        local: ClipSides,
        partial: dict[int, Tensor],
        extra: Callable[[PackedAllReduce], None] | None,
    ) -> ClipSides:
        """Combines the norms of all ranks, in the same step of all."""
        while True:
            with suppress(MeetAgainError):
                return all_reduce_norms(shards, local, self._placed, partial, self.norm_type, extra)

    def _place(self, indices: Sequence[int]) -> None:
        """Notes how the gradients lie on their mesh, which a step may change."""
        self._placed = placements_of({i: self.table.tensors[i].grad for i in indices})

    # -- windows derived from it -------------------------------------------------------------------

    def copy(self) -> Window:
        """Returns a copy that further backwards do not change."""
        return replace(
            self,
            arrivals=[(set(arrived), weight) for arrived, weight in self.arrivals],
            noise_norms=list(self.noise_norms),
            late_checks=list(self.late_checks),
            backwards=list(self.backwards),
            _measured=list(self._measured),
        )

    def latest(self) -> Window:
        """Returns a window of the newest micro-batch only, as a step of its own."""
        first = self.first_nonfinite and replace(self.first_nonfinite, micro_batch=1)
        return replace(self, arrivals=self.arrivals[-1:], first_nonfinite=first, looks=None)

    def part(self, indices: Sequence[int]) -> Window:
        """Returns the window of an optimizer that was found while this window was filling.

        It has the arrivals so far of the optimizer's parameters (``indices``, ascending). It has
        their measurement only if this window contains all of them; otherwise the step will measure.
        """
        mine, first = set(indices), self.first_nonfinite
        part = Window(self.table, list(indices), self.norm_type, self.shards, partial=True)
        part.bad_weights = self.bad_weights
        kept = [i for i, (there, _) in enumerate(self.arrivals) if there & mine or not there]
        part.arrivals = [(self.arrivals[i][0] & mine, self.arrivals[i][1]) for i in kept]
        part.backwards = [self.backwards[i] for i in kept]
        part._measured = [self._measured[i] for i in kept]
        part.noise_norms = self._noise_norms_of(kept, mine)
        if first is not None and first.index in mine:
            number = sum(bool(arrived & mine) for arrived, _ in self.arrivals[: first.micro_batch])
            part.first_nonfinite = replace(first, micro_batch=number)
            part.nonfinite_count = self.nonfinite_count
        complete = mine.issubset(self.indices) and part.arrivals
        if self._before is not None and complete:
            part.late_checks = [
                check for check in self.late_checks if mine.issuperset(check.measurement.indices)
            ]
            part._before = self._before.subset(indices, self.norm_type)
            if self._snapshot is not None:
                part._snapshot = self._kept_snapshot([i in mine for i in self._before.indices])
        return part

    def _noise_norms_of(self, kept: Sequence[int], mine: set[int]) -> list[MicroBatch]:
        """Returns the norms of micro-batches, of some parameters only, for the noise scale.

        Args:
            kept: Positions of the micro-batches.
            mine: Indices of the parameters.
        """
        if not self.noise_norms:
            return []
        if mine.issuperset(self.indices):
            return [self.noise_norms[i] for i in kept]
        # The first gradient of these parameters is all of their .grad until the next one comes.
        first = self._measured[kept[0]] if kept else None
        norms = [None if first is None else first.subset(sorted(mine), self.norm_type).total]
        norms += [None] * (len(kept) - 1)
        return [MicroBatch(self.arrivals[i][1], n) for i, n in zip(kept, norms, strict=False)]

    def forget(self, indices: Sequence[int]) -> None:
        """Removes what has arrived of some parameters, which stay in this window."""
        all_indices = self.indices
        self.leave(indices)
        self.indices, self._tensors = all_indices, []

    def lose(self, indices: Sequence[int]) -> None:
        """Removes what has arrived of parameters that are no longer those of the optimizer."""
        self._snapshot = None  # it is one of the parameters that the optimizer holds by now
        self.leave(indices)

    def _kept_snapshot(self, keep: Sequence[bool]) -> GradientSnapshot | None:
        if self._before is None or self._snapshot is None:
            return None
        kept = compress(self._before.indices, keep)
        return self._snapshot.subset(keep, [self.table.tensors[index].grad for index in kept])

    def leave(self, indices: Sequence[int]) -> None:
        """Removes parameters that belong to another window from now on."""
        others = set(indices)
        rest = [index for index in self.indices if index not in others]
        kept = [i for i, (there, _) in enumerate(self.arrivals) if there - others]
        self.noise_norms = self._noise_norms_of(kept, set(rest))
        self._measured = [self._measured[i] for i in kept]
        self.backwards = [self.backwards[i] for i in kept]
        self.indices, self.partial = rest, True
        self._tensors = []
        self.arrivals = [(arrived - others, w) for arrived, w in self.arrivals if arrived - others]
        if self.first_nonfinite is not None and self.first_nonfinite.index in others:
            self.first_nonfinite = None
        if self._before is not None:
            keep = [index not in others for index in self._before.indices]
            if self._snapshot is not None:
                self._snapshot = self._kept_snapshot(keep)
            self._before = self._before.subset(self.indices, self.norm_type)
        if not self.arrivals:
            self.reset()


def _zeroed(before: Measurement, after: Measurement, gradients: Sequence[Tensor]) -> bool:
    """Returns whether ``zero_grad()`` wrote zeros over the gradients, rather than a clip did."""
    if not (after.total.at_hand and after.total.value() == 0 != before.total.value()):
        return False
    # A clip that meets an infinite norm multiplies by 0. The norm that it sees is infinite where
    # its dtype cannot hold it. Over a NaN or an Inf only zeros that were written make a norm of 0.
    largest = min((torch.finfo(gradient.dtype).max for gradient in gradients), default=math.inf)
    if before.overflowed or largest < before.total.value() < math.inf:
        return False
    return not has_negative_zero(gradients)  # a product with 0 keeps the sign
