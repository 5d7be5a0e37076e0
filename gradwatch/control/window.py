"""Window: the micro-batches of one optimizer step, from the first backward to the decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from operator import attrgetter, is_

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.control.apply import clamp_, scale_
from gradwatch.control.loss_scale import LossScale
from gradwatch.control.policy import ClipDecision, ClipPolicy
from gradwatch.control.settled import Offender, Settled
from gradwatch.observe.arrivals import Backward
from gradwatch.observe.measurement import Measurement, measure
from gradwatch.observe.nonfinite import count_nonfinite
from gradwatch.observe.parameters import ParameterTable
from gradwatch.observe.ranks import is_distributed
from gradwatch.observe.snapshot import GradientSnapshot


@dataclass(slots=True)
class Window:
    """What has come since the last step of one optimizer.

    Attributes:
        table: All watched parameters.
        indices: Those of this optimizer, in model order.
        norm_type: The p of the norms.
        filled: For each micro-batch the indices that received a gradient in it, and its weight.
        offender: The first that went bad; None while all is finite.
        nonfinite: How many parameters were bad at the worst moment.
        expected_weight: The sum of weights that the losses were divided by; None where the loop
            weighs its losses itself.
    """

    table: ParameterTable
    indices: list[int]
    norm_type: float = 2.0
    filled: list[tuple[set[int], float]] = field(default_factory=list)
    offender: Offender | None = None
    nonfinite: int = 0
    expected_weight: float | None = None
    _before: Measurement | None = None
    _snapshot: GradientSnapshot | None = None
    _tensors: list[Tensor] = field(default_factory=list)

    @property
    def micro_batches(self) -> int:
        """Backwards whose gradients are in the window."""
        return len(self.filled)

    @property
    def weight(self) -> float:
        """Sum of their weights."""
        return sum(weight for _, weight in self.filled)

    @property
    def arrived(self) -> set[int]:
        """Indices that received a gradient."""
        return set().union(*(arrived for arrived, _ in self.filled))

    def reset(self) -> None:
        """Empties the window: a step was taken, or the gradients were thrown away."""
        self.filled = []
        self.offender = None
        self.nonfinite = 0
        self.expected_weight = None
        self._before = None
        self._snapshot = None

    def add(self, backward: Backward, weight: float = 1.0) -> Measurement | None:
        """Takes in a backward that has ended: one batched pass over the gradients.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.

        Returns:
            The norms, in the units of the gradients; None where none of the window's parameters
            received a gradient.
        """
        arrived = set(backward.arrived)
        if arrived.isdisjoint(self.indices):
            return None
        if self.discarded_before(backward):
            self.reset()
        indices, gradients = self.gradients()
        if not gradients:
            return None  # an optimizer inside the backward has used and freed them
        if backward.continues and self.filled:
            self.filled[-1][0].update(arrived)
        else:
            self.filled.append((arrived, weight))
        self._before = measure(indices, gradients, self.norm_type)
        self._snapshot = GradientSnapshot(gradients)
        self._look_for_offender(self._before, gradients, backward.arrived)
        return self._before

    def discarded_before(self, backward: Backward) -> bool:
        """Tells whether the window's gradients were thrown away before a backward.

        Args:
            backward: The backward, which has ended.
        """
        before, snapshot = self._before, self._snapshot
        if before is None or snapshot is None or backward.create_graph or backward.continues:
            return False
        if is_distributed():
            return False  # a reduction over ranks writes into gradients, and replaces them, as well
        arrived = set(backward.arrived)
        tensors = [self.table.tensors[index].grad for index in before.indices]
        return snapshot.was_discarded(tensors, [index in arrived for index in before.indices])

    def add_unfinished(self) -> None:
        """Takes in a backward that is still under way: an optimizer steps inside it."""
        self.filled.append((set(self.indices), 1.0))

    def gradients(self) -> tuple[list[int], list[Tensor]]:
        """Lists the gradients that are there now, with the indices of their parameters."""
        if len(self._tensors) != len(self.indices):
            self._tensors = [self.table.tensors[index] for index in self.indices]
        gradients = list(map(_grad, self._tensors))
        if not any(map(is_, gradients, repeat(None))):
            return self.indices, gradients
        pairs = zip(self.indices, gradients, strict=True)
        return [i for i, g in pairs if g is not None], [g for g in gradients if g is not None]

    def latest(self) -> Window:
        """Makes a window that holds the newest backward only, as a step of its own."""
        offender = self.offender and replace(self.offender, micro_batch=1)
        return replace(self, filled=self.filled[-1:], offender=offender)

    def part(self, indices: Sequence[int]) -> Window:
        """Makes the window of an optimizer that was found while this one was filling.

        Args:
            indices: Parameters of the optimizer, ascending.

        Returns:
            A window with what has come so far. What was measured is in it where this window has
            all of the parameters; else the step will measure.
        """
        mine = set(indices)
        part = Window(self.table, list(indices), self.norm_type)
        part.filled = [(arrived & mine, w) for arrived, w in self.filled if arrived & mine]
        if self.offender is not None and self.offender.index in mine:
            before = self.filled[: self.offender.micro_batch]
            number = sum(bool(arrived & mine) for arrived, _ in before)
            part.offender = replace(self.offender, micro_batch=number)
            part.nonfinite = self.nonfinite
        complete = mine.issubset(self.indices) and part.filled
        if self._before is not None and self._snapshot is not None and complete:
            part._before = self._before.subset(indices, self.norm_type)
            part._snapshot = self._snapshot.subset([i in mine for i in self._before.indices])
        return part

    def settle(
        self, optimizer: Optimizer | None, policy: ClipPolicy | None, scale: LossScale
    ) -> Settled:
        """Looks at the gradients that a step is about to use, and clips them.

        They are measured once more only where something wrote into them since the backward: the
        loop's own clip, or the scaler.

        Args:
            optimizer: Whose step it is.
            policy: The clipping rule; None to leave the gradients alone. It is not asked where
                they are not finite.
            scale: The loss scale of the run.

        Returns:
            Both sides of the clip.
        """
        left, correction = scale.left_in(optimizer), self._correction()
        loss_scale = scale.value() if scale.active else left
        # Unscaling moves no version counter: what was measured at the end of the backward has the
        # unit of the scaled loss, whatever the scaler has done to the gradients since.
        unit_before = left if self._before is None else loss_scale
        indices, gradients = self.gradients()
        before, after = self._measure_again(indices, gradients)
        unit_after = unit_before if after is before else left
        settled = Settled(
            before,
            after,
            before_scale=correction / unit_before,
            after_scale=correction / unit_after,
            loss_scale=loss_scale,
        )
        if not after.finite:
            return settled
        decision = (
            ClipDecision() if policy is None else policy.decide(_times(after, settled.after_scale))
        )
        coefficient = 1.0 if decision.coefficient is None else decision.coefficient.item()
        settled = replace(settled, coefficient=coefficient, threshold=decision.threshold)
        if correction != 1.0:
            scale_(gradients, coefficient * correction)
        elif decision.coefficient is not None and coefficient != 1.0:
            scale_(gradients, decision.coefficient)
        if decision.clip_value is None:
            return settled
        clamp_(gradients, decision.clip_value * left)
        clamped = measure(indices, gradients, self.norm_type)
        return replace(settled, after=clamped, after_scale=1.0 / left)

    def unapplied(self, loss_scale: float) -> Settled | None:
        """Returns the numbers of a window that no step has used, gradients gone or not.

        Args:
            loss_scale: The loss scale at its last backward.

        Returns:
            Both sides of no clip; None where the window is empty.
        """
        if self._before is None:
            return None
        scale = 1.0 / loss_scale
        return Settled(self._before, self._before, scale, scale, loss_scale=loss_scale)

    def _correction(self) -> float:
        """Returns the factor that turns a sum over the window into its weighted mean."""
        if self.expected_weight is None or self.weight == 0:
            return 1.0
        return self.expected_weight / self.weight

    def _measure_again(
        self, indices: list[int], gradients: list[Tensor]
    ) -> tuple[Measurement, Measurement]:
        snapshot = self._snapshot
        if self._before is not None and snapshot is not None and snapshot.matches(gradients):
            return self._before, self._before
        after = measure(indices, gradients, self.norm_type)
        if self._before is not None and after.total_value == 0 != self._before.total_value:
            self.reset()  # zero_grad came after the last backward
        self._look_for_offender(after, gradients, ())
        return self._before or after, after

    def _look_for_offender(
        self, measurement: Measurement, gradients: list[Tensor], order: Sequence[int]
    ) -> None:
        if measurement.finite or measurement.overflowed:
            return
        where = {index: place for place, index in enumerate(measurement.indices)}
        counts = {i: count_nonfinite(gradients[where[i]]) for i in measurement.nonfinite_indices()}
        bad = {index: count for index, count in counts.items() if count}
        self.nonfinite = max(self.nonfinite, len(bad))
        if bad and self.offender is None:
            first = next((index for index in order if index in bad), min(bad))
            self.offender = Offender(first, self.micro_batches, bad[first])

    def leave(self, indices: Sequence[int]) -> None:
        """Gives parameters away to another window.

        Args:
            indices: The parameters.
        """
        others = set(indices)
        self.indices = [index for index in self.indices if index not in others]
        self._tensors = []
        self.filled = [(arrived - others, w) for arrived, w in self.filled if arrived - others]
        if self.offender is not None and self.offender.index in others:
            self.offender = None
        if self._before is not None and self._snapshot is not None:
            keep = [index not in others for index in self._before.indices]
            self._before = self._before.subset(self.indices, self.norm_type)
            self._snapshot = self._snapshot.subset(keep)
        if not self.filled:
            self.reset()


_grad = attrgetter("grad")


def _times(measurement: Measurement, factor: float) -> Tensor:
    # A multiplication by one would cost a call; the policy must see the very bits of the norm.
    return measurement.total if factor == 1.0 else measurement.total * factor
