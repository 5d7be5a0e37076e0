"""The micro-batches of one optimizer step: gradients, weights, norms before and after the clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from operator import attrgetter, is_

import torch
from torch import Tensor

from gradwatch.accumulate.noise_scale import (
    MicroBatch,
    NoiseSample,
    NoiseScaleEstimator,
    WindowSums,
    sample_of_all,
    sample_of_first,
    sample_of_rank,
)
from gradwatch.hooks.backward import Backward
from gradwatch.hooks.data_parallel import DataParallel, is_distributed
from gradwatch.hooks.model import ModelHooks, with_freed
from gradwatch.hooks.scaler import LossScale
from gradwatch.hooks.snapshot import GradientSnapshot
from gradwatch.measure.deferred import FloatOrDeferred, as_operand, defer
from gradwatch.measure.norms import FirstNonFinite, LateCheck, Measurement, StepNorms, measure
from gradwatch.measure.parameters import ParameterTable, is_partial, local_part
from gradwatch.measure.sharded import ClipSides, PackedAllReduce, Shards, all_reduce_norms

_grad = attrgetter("grad")


@dataclass(slots=True)
class Window:
    """What has come since the last step of one optimizer.

    Attributes:
        table: All watched parameters.
        indices: Those of this optimizer, in model order.
        norm_type: The p of the norms.
        shards: Knows which gradients this rank holds a part of; None where all are whole.
        arrivals: For each micro-batch the indices that received a gradient in it, and its weight.
        noise_norms: For each micro-batch its weight and norm, for the noise scale.
        first_nonfinite: The first parameter that went bad; None while all is finite.
        nonfinite_count: How many parameters were bad at the worst moment.
        late_checks: What was measured and could not be looked at yet.
        divisor: What the weighted losses were divided by; None where the loop weighs its losses
            itself.
        correction: The factor that turns the gradients into the weighted mean.
    """

    table: ParameterTable
    indices: list[int]
    norm_type: float = 2.0
    shards: Shards | None = None
    arrivals: list[tuple[set[int], FloatOrDeferred]] = field(default_factory=list)
    noise_norms: list[MicroBatch] = field(default_factory=list)
    first_nonfinite: FirstNonFinite | None = None
    nonfinite_count: int = 0
    late_checks: list[LateCheck] = field(default_factory=list)
    divisor: FloatOrDeferred | None = None
    correction: FloatOrDeferred = 1.0
    _before: Measurement | None = None
    _snapshot: GradientSnapshot | None = None
    _tensors: list[Tensor] = field(default_factory=list)
    _dtype: torch.dtype | None = None

    # -- what is in it -----------------------------------------------------------------------------

    @property
    def micro_batches(self) -> int:
        """Backwards whose gradients are in the window."""
        return len(self.arrivals)

    @property
    def weight(self) -> FloatOrDeferred:
        """Sum of the weights of its micro-batches."""
        if len(self.arrivals) == 1:  # no addition, which on a device would be a call
            return self.arrivals[0][1]
        return defer(sum(as_operand(weight) for _, weight in self.arrivals))

    @property
    def arrived(self) -> set[int]:
        """Indices that received a gradient."""
        return set().union(*(arrived for arrived, _ in self.arrivals))

    def gradients(self) -> tuple[list[int], list[Tensor]]:
        """Lists the gradients that are there now, with the indices of their parameters.

        Returns:
            Both, of the same length; of sharded gradients the parts that this rank holds.
        """
        if len(self._tensors) != len(self.indices):
            self._tensors = [self.table.tensors[index] for index in self.indices]
            dtypes = {tensor.dtype for tensor in self._tensors}
            self._dtype = dtypes.pop() if len(dtypes) == 1 else None
        # C loops over all parameters: a Python loop here would cost more than the norms.
        indices, gradients = self.indices, list(map(_grad, self._tensors))
        if any(map(is_, gradients, repeat(None))):
            pairs = [(i, g) for i, g in zip(indices, gradients, strict=True) if g is not None]
            indices, gradients = [i for i, _ in pairs], [g for _, g in pairs]
        return indices, gradients if self.shards is None else list(map(local_part, gradients))

    # -- backwards come in -------------------------------------------------------------------------

    def add(self, backward: Backward, weight: FloatOrDeferred = 1.0) -> Measurement | None:
        """Adds a backward that has ended: one batched pass over the gradients.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.

        Returns:
            The norms, in the units of the gradients; None where none of the window's parameters
            received a gradient.
        """
        arrived = set(backward.arrived)
        if not arrived:  # FSDP2 keeps the gradients to itself until the last micro-batch
            self.arrivals.append((arrived, weight))
            return None
        if arrived.isdisjoint(self.indices):
            return None
        if self._before is not None and self.discarded_before(backward):
            self.reset()
        indices, gradients = self.gradients()
        freed = backward.freed
        if freed:
            freed = {i: norm for i, norm in freed.items() if i in self.indices}
        if not gradients and not freed:
            return None  # an optimizer inside the backward has used and freed them
        if backward.continues and self.arrivals:
            self.arrivals[-1][0].update(arrived)
        else:
            self.arrivals.append((arrived, weight))
        self._before = measure(indices, gradients, self.norm_type, self._dtype)
        if freed:
            self._before = with_freed(self._before, freed, self.norm_type)
        if self.shards is None:
            # The parts of sharded gradients are made anew at each look, so they have no identity.
            self._snapshot = GradientSnapshot(gradients)
        total = self._before.total.if_known()
        if total is None or not math.isfinite(total):
            self._check(self._before, None if freed else gradients, backward.arrived)
        return self._before

    def add_unfinished(self) -> None:
        """Adds a backward that is still under way: an optimizer steps inside it."""
        self.arrivals.append((set(self.indices), 1.0))

    def discarded_before(self, backward: Backward) -> bool:
        """Tells whether the window's gradients were thrown away before a backward.

        Args:
            backward: The backward, which has ended.
        """
        before, snapshot = self._before, self._snapshot
        if before is None or snapshot is None or backward.create_graph or backward.continues:
            return False
        if backward.freed:
            return True  # each backward uses its gradients up
        if is_distributed():
            return False  # a reduction over ranks writes into gradients, and replaces them, as well
        arrived = set(backward.arrived)
        now = (self.table.tensors[index].grad for index in before.indices)
        return snapshot.was_discarded(now, (index in arrived for index in before.indices))

    def reset(self) -> None:
        """Empties the window: a step was taken, or the gradients were thrown away."""
        self.arrivals, self.noise_norms, self.late_checks = [], [], []
        self.first_nonfinite, self.nonfinite_count = None, 0
        self.divisor, self.correction = None, 1.0
        self._before = self._snapshot = None

    def remeasure_reduced(self) -> None:
        """Measures the gradients that a reduction over the ranks has put in place of its own."""
        indices, gradients = self.gradients()
        self.arrivals[-1][0].update(indices)  # none has arrived so far where FSDP2 kept them all
        self._before = measure(indices, gradients, self.norm_type)
        if self.shards is None:
            self._snapshot = GradientSnapshot(gradients)
        self._check(self._before, gradients, ())

    def accept_restored_gradients(self) -> None:
        """Treats the gradients as those that were measured: they were put back by writing twice."""
        if self._snapshot is not None:
            self._snapshot = GradientSnapshot(self.gradients()[1])

    # -- a step looks at it ------------------------------------------------------------------------

    def step_norms(
        self,
        scale: LossScale,
        left: FloatOrDeferred,
        extra: Callable[[PackedAllReduce], None] | None = None,
    ) -> StepNorms:
        """Returns the norms of the gradients that a step is about to use.

        They are measured once more only where something wrote into them since the backward: the
        loop's own clip, or the scaler.

        Args:
            scale: The loss scale of the run.
            left: The loss scale that the gradients still carry.
            extra: Adds further numbers to the all-reduce between ranks, where there is one.

        Returns:
            The norms before and after the loop's own clip.
        """
        loss_scale = left if scale.scaler is None else scale.value()
        # Unscaling moves no version counter: what was measured at the end of the backward has the
        # unit of the scaled loss, whatever the scaler has done to the gradients since.
        unit_before = left if self._before is None else loss_scale
        if self._before is not None and self._is_unchanged(self._before):
            before = after = self._before
        else:
            before, after = self._measure_again()
        unit_after = unit_before if after is before else left
        if self.shards is not None:
            before, after = self._all_reduce(self.shards, before, after, extra)
        return StepNorms(
            before, after, unit_before, unit_after, self.correction, loss_scale=loss_scale
        )

    def measure_clipped(self, indices: Sequence[int], gradients: list[Tensor]) -> Measurement:
        """Measures gradients that a clip has changed element by element.

        Args:
            indices: Their parameters.
            gradients: The gradients; of sharded ones the parts of this rank.
        """
        after = measure(indices, gradients, self.norm_type)
        return after if self.shards is None else self._all_reduce(self.shards, after, after)[1]

    def unused_norms(self, loss_scale: FloatOrDeferred, together: bool) -> StepNorms | None:
        """Returns the norms of a window that no step has used, gradients gone or not.

        Args:
            loss_scale: The loss scale at its last backward.
            together: Whether all ranks are here at once, and can add up the norms of their parts;
                else those of sharded gradients are of the part of this rank.

        Returns:
            The same norms on both sides; None where the window is empty.
        """
        before = self._before
        if before is None:
            return None
        if self.shards is not None and together:
            before, _ = self._all_reduce(self.shards, before, before, gradients=False)
        return StepNorms(before, before, loss_scale, loss_scale, loss_scale=loss_scale)

    def _is_unchanged(self, before: Measurement) -> bool:
        if self._snapshot is None:
            return False
        if before.indices is self.indices:  # all had one, so that none needs a look by itself
            return self._snapshot.matches(list(map(_grad, self._tensors)))
        return self._snapshot.matches(self.gradients()[1])

    def _measure_again(self) -> tuple[Measurement, Measurement]:
        indices, gradients = self.gradients()
        after = measure(indices, gradients, self.norm_type, self._dtype)
        if self._before is not None and _zeroed(self._before, after):
            self.reset()  # zero_grad came after the last backward
        self._check(after, gradients, ())
        return self._before or after, after

    def _check(
        self, measurement: Measurement, gradients: list[Tensor] | None, order: Sequence[int]
    ) -> None:
        """Finds the first parameter that is not finite, now or when its norm has arrived."""
        check = LateCheck(self.micro_batches, measurement, order)
        if not measurement.total.at_hand:
            self.late_checks.append(check)
            return
        bad = check.nonfinite(gradients)
        self.nonfinite_count = max(self.nonfinite_count, len(bad))
        if bad and self.first_nonfinite is None:
            self.first_nonfinite = bad[0]

    def _all_reduce(
        self,
        shards: Shards,
        before: Measurement,
        after: Measurement,
        extra: Callable[[PackedAllReduce], None] | None = None,
        gradients: bool = True,
    ) -> tuple[Measurement, Measurement]:
        """Adds the norms of all ranks' parts up, together with the first bad parameter of any."""
        there = {i: self.table.tensors[i].grad for i in after.indices} if gradients else {}
        partial = {i: local_part(g) for i, g in there.items() if g is not None and is_partial(g)}
        local = ClipSides(before, after, self.first_nonfinite, self.nonfinite_count)
        whole = all_reduce_norms(shards, local, partial, self.norm_type, extra)
        self.first_nonfinite, self.nonfinite_count = whole.first_nonfinite, whole.nonfinite_count
        return whole.before, whole.after

    # -- other windows made of it ------------------------------------------------------------------

    def copy(self) -> Window:
        """Returns a window that further backwards do not change."""
        return replace(
            self,
            arrivals=[(set(arrived), weight) for arrived, weight in self.arrivals],
            noise_norms=list(self.noise_norms),
            late_checks=list(self.late_checks),
        )

    def latest(self) -> Window:
        """Returns a window that holds the newest backward only, as a step of its own."""
        first = self.first_nonfinite and replace(self.first_nonfinite, micro_batch=1)
        return replace(self, arrivals=self.arrivals[-1:], first_nonfinite=first)

    def part(self, indices: Sequence[int]) -> Window:
        """Returns the window of an optimizer that was found while this one was filling.

        Args:
            indices: Parameters of the optimizer, ascending.

        Returns:
            A window with what has come so far. What was measured is in it where this window has
            all of the parameters; else the step will measure.
        """
        mine, first = set(indices), self.first_nonfinite
        part = Window(self.table, list(indices), self.norm_type, self.shards)
        kept = [(arrived, w) for arrived, w in self.arrivals if arrived & mine or not arrived]
        part.arrivals = [(arrived & mine, w) for arrived, w in kept]
        if mine.issuperset(self.indices):
            part.noise_norms = list(self.noise_norms)
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
                part._snapshot = self._snapshot.subset([i in mine for i in self._before.indices])
        return part

    def leave(self, indices: Sequence[int]) -> None:
        """Gives parameters away to another window.

        Args:
            indices: The parameters.
        """
        others = set(indices)
        self.indices = [index for index in self.indices if index not in others]
        self._tensors = []
        self.arrivals = [(arrived - others, w) for arrived, w in self.arrivals if arrived - others]
        if self.first_nonfinite is not None and self.first_nonfinite.index in others:
            self.first_nonfinite = None
        if self._before is not None:
            keep = [index not in others for index in self._before.indices]
            self._before = self._before.subset(self.indices, self.norm_type)
            if self._snapshot is not None:
                self._snapshot = self._snapshot.subset(keep)
        if not self.arrivals:
            self.reset()


def _zeroed(before: Measurement, after: Measurement) -> bool:
    return after.total.at_hand and after.total.value() == 0 != before.total.value()


Losses = list[tuple[FloatOrDeferred, FloatOrDeferred]]

ONE_MICRO_BATCH = (
    "a step has one micro-batch on one process, and there is nothing to compare it with: "
    "accumulate 2 or more"
)
NOT_L2 = "the clip works with another norm than L2, so that is the one measured"
SHARDED = "sharded parameters do not show what a micro-batch adds to their gradients"
REDUCED_EACH = (
    "every micro-batch was reduced over the ranks by itself, so that no gradient was of one rank: "
    "use watcher.backward(), or no_sync() for all but the last"
)
NOT_ONE_RANK = "this rank's own gradients were not seen before they were averaged over the ranks"
NOT_SEEN = "the gradient of the first micro-batch was not measured by itself"


class WindowWeights:
    """Weighs the windows of one optimizer, and takes from them what they tell about the noise.

    Attributes:
        noise: Its gradient noise scale.
        silent: Why the newest window said nothing about the noise; empty where it did.
        sample: What it said; None where it said nothing.
        weight: Weight of the newest window over all ranks; None where they were not asked.
    """

    def __init__(
        self, hooks: ModelHooks, data_parallel: DataParallel | None, by_noise: bool
    ) -> None:
        """Starts with no window.

        Args:
            hooks: See what a micro-batch adds, and each rank's own gradients.
            data_parallel: The ranks that average their gradients; None where there is one only.
            by_noise: Whether the noise scale decides about windows, so that ranks must agree on it.
        """
        self.noise = NoiseScaleEstimator()
        self.silent = ""
        self.sample: NoiseSample | None = None
        self.weight: FloatOrDeferred | None = None
        self._hooks = hooks
        self._data_parallel = data_parallel
        self._by_noise = by_noise
        self._reduced = 0

    def note(
        self, window: Window, weight: FloatOrDeferred, measurement: Measurement | None
    ) -> None:
        """Notes what a backward that the window has just taken in tells about the noise.

        Args:
            window: The window.
            weight: Weight of the micro-batch.
            measurement: The gradients as they are now; None where they cannot be seen.
        """
        count, hooks = len(window.arrivals), self._hooks
        if count == 1 and hooks.local is None and not hooks.added.watching:
            window.noise_norms = [
                MicroBatch(weight, None if measurement is None else measurement.total)
            ]
            return
        first, again = count == 1, count == len(window.noise_norms)
        self._reduced = 0 if first else self._reduced
        own, added = self.own_norm(window), None
        self._reduced += own is not None
        if first or not again:  # a nested backward adds to a micro-batch in parts
            added = hooks.added.total(window.indices)
        if added is None and first:
            added = own
        norm = None if added is None else defer(added)
        if norm is None and first and measurement is not None:
            norm = measurement.total
        window.noise_norms = [
            *window.noise_norms[: count - 1],
            MicroBatch(weight, norm),
        ]

    def own_norm(self, window: Window) -> Tensor | None:
        """Returns the norm of this rank's own gradients before the newest reduction, if any."""
        local = self._hooks.local
        return None if local is None else local.total(window.indices)

    def weigh(
        self, window: Window, losses: Losses, scale: FloatOrDeferred, units: int, full_units: int
    ) -> Losses:
        """Adds a window up, before its step.

        Works out what the gradients lack to be the mean over all micro-batches of all ranks, and
        what they tell about the noise.

        Args:
            window: The window.
            losses: Its losses and their weights on this rank.
            scale: The loss scale at its last backward.
            units: What a managed loop counts the window as, in the unit of ``watch(accumulate=)``;
                0 for as many as it has micro-batches.
            full_units: The same for a full window.

        Returns:
            The losses: one, of all ranks where they were asked.
        """
        self.sample = self.weight = ranks = None
        if window.divisor is not None or self._by_noise:
            ranks = self._data_parallel  # but not in a loop that is only watched
        alone = len(window.noise_norms) < 2 and self._data_parallel is None
        if not window.noise_norms or (alone and window.divisor is None):
            self.silent = ONE_MICRO_BATCH
            return losses
        sums = WindowSums.of(window.noise_norms, losses)
        if ranks is not None:
            device = window.table.tensors[window.indices[0]].device
            sums = sums.over_ranks(ranks.sum_, device)
            losses = [(_mean_loss(sums), 1.0)] if losses else []
        self.weight = sums.weight
        weight, count = _nonzero(as_operand(sums.weight)), 1 if ranks is None else ranks.ranks
        divisor = window.divisor
        if divisor is None:  # the loop has made a mean of it itself
            divisor = defer(weight / count)
        else:
            window.correction = defer(as_operand(divisor) * count / weight)
        added = _Added(sums, ranks, divisor, scale, units, full_units)
        self.sample, self.silent = self._sample(window, added)
        return losses

    def _sample(self, window: Window, added: _Added) -> tuple[NoiseSample | None, str]:
        if window.norm_type != 2.0:
            return None, NOT_L2
        if window.shards is not None:
            return None, SHARDED
        units = added.units or len(window.noise_norms)
        if added.ranks is None and self._data_parallel is not None:
            return self._sample_of_rank(window, self._data_parallel, added.scale, units)
        if added.ranks is None and len(window.noise_norms) < 2:
            return None, ONE_MICRO_BATCH
        sample = sample_of_all(added.sums, added.divisor, added.scale, units)
        if sample is not None and added.units:  # a short last window is not as long as the next
            sample = replace(sample, micro_batches=added.full_units)
        if sample is None and added.ranks is None:
            sample = sample_of_first(window.noise_norms, added.divisor, added.scale)
        return sample, "" if sample is not None else NOT_SEEN

    def _sample_of_rank(
        self, window: Window, ranks: DataParallel, scale: FloatOrDeferred, units: int
    ) -> tuple[NoiseSample | None, str]:
        own = self.own_norm(window)
        if own is None:
            return None, NOT_ONE_RANK
        if self._reduced != 1:
            return None, REDUCED_EACH
        return sample_of_rank(own, window.weight, ranks.ranks, scale, units), ""


@dataclass(frozen=True, slots=True)
class _Added:
    """A window that has been added up, over which ranks, and what the sums are to be read with."""

    sums: WindowSums
    ranks: DataParallel | None
    divisor: FloatOrDeferred
    scale: FloatOrDeferred
    units: int
    full_units: int


def _mean_loss(sums: WindowSums) -> FloatOrDeferred:
    return defer(as_operand(sums.loss) / _nonzero(as_operand(sums.weight)))


def _nonzero(weight: float | Tensor) -> float | Tensor:
    """Returns a weight to divide by: 1 for a window of nothing, whose gradients are all zero."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0
