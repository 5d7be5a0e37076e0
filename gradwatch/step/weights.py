"""WindowWeights: the weights of the micro-batches of a step, and what they tell about the noise.

A managed loop gets the factor that turns the gradients of a window into the mean over its
micro-batches. Where the backwards of a window can be compared with each other, it also gives a
sample of the gradient noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradwatch.accumulate.exchangeable import Exchangeability
from gradwatch.accumulate.noise_scale import (
    MicroBatch,
    NoiseSample,
    NoiseScaleEstimator,
    WindowSums,
    sample_of_all,
    sample_of_first,
    sample_of_rank,
)
from gradwatch.hooks.data_parallel import DataParallel
from gradwatch.hooks.graph import Graph
from gradwatch.hooks.model import ModelHooks
from gradwatch.hooks.snapshot import is_looked_at
from gradwatch.measure.deferred import FloatOrDeferred, as_operand, defer
from gradwatch.measure.devices import home_of
from gradwatch.measure.gathering import together
from gradwatch.measure.norms import Measurement
from gradwatch.measure.sketch import Sketch, Sketcher
from gradwatch.step.window import Window

Losses = list[tuple[FloatOrDeferred, FloatOrDeferred]]

# Why a window says nothing about the noise; NoiseScale.reason shows one of these.
ONE_MICRO_BATCH = (
    "a step has one micro-batch on one process, and there is nothing to compare it with: "
    "accumulate 2 or more"
)
NOT_L2 = "the clip uses a norm other than L2, and only that one is measured"
SHARDED = "sharded parameters do not show what a micro-batch adds to their gradients"
REDUCED_EACH = (
    "every micro-batch was reduced over the ranks by itself, so no gradient was that of one rank: "
    "use watcher.backward(), or no_sync() for all but the last"
)
NOT_ONE_RANK = "this rank's own gradients were not seen before they were averaged over the ranks"
NOT_SEEN = "the gradient of the first micro-batch was not measured by itself"
RESCALED = "the gradients were changed between two backwards of a step"


class WindowWeights:
    """Computes the weights of one optimizer's windows, and samples of the gradient noise.

    Attributes:
        noise: The estimator of the gradient noise scale.
        silent: Why the newest window gave no sample; empty if it gave one.
        sample: The sample of the newest window; None if it gave none.
        data_parallel: The ranks that average their gradients; None if there is only one.
        weight: The weight of the newest window, over all ranks if these were summed; None if it
            was not computed.
    """

    def __init__(
        self, hooks: ModelHooks, data_parallel: DataParallel | None, by_noise: bool
    ) -> None:
        """Starts with no window.

        Args:
            hooks: Measures what a micro-batch adds, and this rank's own gradients.
            data_parallel: The ranks that average their gradients; None if there is only one.
            by_noise: Whether the noise scale decides the length of windows, so that the ranks must
                agree on it.
        """
        self.noise = NoiseScaleEstimator()
        self.silent = ""
        self.sample: NoiseSample | None = None
        self.weight: FloatOrDeferred | None = None
        self._hooks = hooks
        self.data_parallel = data_parallel
        self.by_noise = by_noise
        self._reduced = 0
        self._backwards = _Backwards(hooks)

    def note(
        self,
        window: Window,
        weight: FloatOrDeferred,
        measurement: Measurement | None,
        graph: Graph | None = None,
    ) -> None:
        """Notes the norm that the newest backward of a window added, for the noise scale.

        The window already contains the backward. ``measurement`` is that of the accumulated
        gradients, or None if these are not accessible; ``graph`` is that of the backward.
        """
        count, hooks = len(window.arrivals), self._hooks
        if self._backwards.compares:
            self._backwards.note(window, graph)
        if count == 1 and hooks.local is None and not hooks.added.watching:
            window.noise_norms = [
                MicroBatch(weight, None if measurement is None else measurement.total)
            ]
            return
        first, again = count == 1, count == len(window.noise_norms)
        self._reduced = 0 if first else self._reduced
        own, added = self.own_norm(window), None
        self._reduced += own is not None
        # Nested backwards of one micro-batch each add a part of it. The norm of the whole does not
        # follow from those, so it stays unknown, except in the first micro-batch.
        if first or not again:
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

    def let_go(self) -> None:
        """Drops the parameters."""
        self._backwards.let_go()

    def take_over(self, window: Window, other: WindowWeights) -> None:
        """Takes over what is known of the backwards in a window that ``other`` has noted."""
        self._backwards.take_over(window, other._backwards)

    def own_norm(self, window: Window) -> Tensor | None:
        """Returns this rank's own gradient norm before the newest reduction; None without one."""
        local = self._hooks.local
        return None if local is None else local.total(window.indices)

    def weigh(
        self, window: Window, losses: Losses, scale: FloatOrDeferred, units: int, full_units: int
    ) -> Losses:
        """Sums a window before its step, over the ranks too if gradwatch manages the loop.

        Sets ``window.correction``, the factor that turns the gradients into the mean over all
        micro-batches of all ranks, and :attr:`sample`.

        Args:
            window: The window of the step.
            losses: Its losses and their weights on this rank.
            scale: The loss scale at its last backward.
            units: The number of batches that a managed loop has counted in the window, in the unit
                of ``watch(accumulate=)``; 0 to count its micro-batches.
            full_units: The number of batches in a full window.

        Returns:
            The losses and weights; only their mean if the sums were taken over the ranks.
        """
        self.sample = self.weight = ranks = None
        if window.divisor is not None or self.by_noise:
            ranks = self.data_parallel  # a loop that is only watched gets no collective of ours
        alone = len(window.noise_norms) < 2 and self.data_parallel is None
        if not window.noise_norms or (alone and window.divisor is None):
            self.silent = ONE_MICRO_BATCH
            if self._backwards.compares:
                self._backwards.end()
            return losses
        differ = self._difference(window, ranks)
        if ranks is None:
            sums = WindowSums.of(window.noise_norms, comparable=not differ)
        else:
            device = home_of(window.table.tensors[index] for index in window.indices)
            sums = WindowSums.over_ranks(
                window.noise_norms, losses, ranks.sum_, device, comparable=not differ
            )
            losses = [(_mean_loss(sums), 1.0)] if losses else []
        self.weight = sums.weight
        weight, count = _nonzero(as_operand(sums.weight)), 1 if ranks is None else ranks.ranks
        divisor = window.divisor
        if divisor is None:  # the loop has divided its losses itself
            divisor = defer(weight / count)
        else:
            planned, weight = together(divisor, weight)
            window.correction = defer(planned * count / weight)
        added = _Added(sums, ranks, divisor, scale, units, full_units)
        self.sample, self.silent = self._sample(window, added)
        self.silent = differ or self.silent
        return losses

    def _difference(self, window: Window, ranks: DataParallel | None) -> str:
        """Returns why the backwards of a window cannot be compared; empty if they can be."""
        if len(window.arrivals) < 2:
            self._backwards.end()
            return ""
        # Where the gradient of a rank is compared with the mean over the ranks, whatever a rank has
        # added up is one micro-batch.
        if ranks is None and self.data_parallel is not None:
            self._backwards.end()
            return ""
        reason = self._backwards.judge(window, reduced=self.data_parallel is not None)
        return RESCALED if window.rescaled else reason

    def _sample(self, window: Window, added: _Added) -> tuple[NoiseSample | None, str]:
        if window.norm_type != 2.0:
            return None, NOT_L2
        if window.shards is not None:
            return None, SHARDED
        units = added.units or len(window.noise_norms)
        if added.ranks is None and self.data_parallel is not None:
            return self._sample_of_rank(window, self.data_parallel, added.scale, units)
        if added.ranks is None and len(window.noise_norms) < 2:
            return None, ONE_MICRO_BATCH
        sample = sample_of_all(added.sums, added.divisor, added.scale, units)
        if sample is not None and added.units:  # a short last window says nothing about the next
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
        return sample_of_rank(defer(own), window.weight, ranks.ranks, scale, units), ""


class _Backwards:
    """What tells whether the backwards of the windows of one optimizer are exchangeable.

    Attributes:
        compares: Whether the window that fills is likely to have several backwards, and is one of
            those that are looked at.
    """

    # All of the first windows are compared, as an estimate counts from the 20th on; then some.
    EARLY, EVERY = 128, 4

    def __init__(self, hooks: ModelHooks) -> None:
        """Starts before the first window."""
        self.compares = True
        self._arrivals = hooks.arrivals
        self._arrivals.describes = True
        self._judge = Exchangeability()
        self._windows = 0
        self._sketcher: Sketcher | None = None
        self._indices: list[int] = []
        self._numbers: list[int] = []
        self._graphs: list[Graph | None] = []
        self._sketches: list[Sketch | None] = []

    def note(self, window: Window, graph: Graph | None) -> None:
        """Notes the newest backward of a window."""
        if self._sketcher is None or self._indices is not window.indices:
            self._indices = window.indices
            self._sketcher = Sketcher([window.table.tensors[index] for index in window.indices])
        count = len(window.arrivals) - 1
        sketch = None if window.shards is not None else self._sketcher.take()
        # A nested backward continues the one before it.
        self._numbers = [*self._numbers[:count], window.backwards[-1]]
        self._graphs = [*self._graphs[:count], graph if len(self._graphs) <= count else None]
        self._sketches = [*self._sketches[:count], sketch]

    def take_over(self, window: Window, other: _Backwards) -> None:
        """Takes over what another one has noted of the backwards in a window.

        Without it, the first window of an optimizer that is found would count as comparable.
        """
        places = {number: place for place, number in enumerate(other._numbers)}
        if not places.keys() >= set(window.backwards):
            return
        kept = [places[number] for number in window.backwards]
        alike = list(window.indices) == other._indices  # else they are sketches of more gradients
        self._numbers = list(window.backwards)
        self._graphs = [other._graphs[place] for place in kept]
        self._sketches = [other._sketches[place] if alike else None for place in kept]

    def let_go(self) -> None:
        """Drops the parameters that are sketched."""
        self._sketcher = None

    def end(self) -> None:
        """Ends a window whose backwards are not compared."""
        self.compares = self._arrivals.describes = False
        self._forget()

    def judge(self, window: Window, reduced: bool) -> str:
        """Ends a window of several backwards; see :meth:`Exchangeability.judge`.

        ``reduced`` says whether its gradients are no longer those of this rank.
        """
        reached = [arrived for arrived, _ in window.arrivals] if window.partial else []
        graphs, sketches = self._graphs, self._sketches
        if self._numbers != window.backwards or None in graphs:
            graphs = []
        if self._numbers != window.backwards or reduced:
            sketches = []
        weights = [weight for _, weight in window.arrivals if isinstance(weight, float)]
        self._windows += 1
        self._forget()
        self._arrivals.describes = is_looked_at(self._windows + 1)
        self.compares = self._windows < self.EARLY or self._windows % self.EVERY == 0
        self.compares |= self._arrivals.describes
        return self._judge.judge(reached, graphs, sketches, weights)

    def _forget(self) -> None:
        self._numbers, self._graphs, self._sketches = [], [], []


@dataclass(frozen=True, slots=True)
class _Added:
    """The sums of a window, the ranks that they were taken over, and how to interpret them."""

    sums: WindowSums
    ranks: DataParallel | None
    divisor: FloatOrDeferred
    scale: FloatOrDeferred
    units: int
    full_units: int


def _mean_loss(sums: WindowSums) -> FloatOrDeferred:
    loss, weight = together(sums.loss, sums.weight)
    return defer(loss / _nonzero(weight))


def _nonzero(weight: float | Tensor) -> float | Tensor:
    """Returns a weight to divide by: 1 instead of 0, as all gradients are zero then."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0
