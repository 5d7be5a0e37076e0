"""The tags of one optimizer; one row may stand for several steps, and steps only ever rise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gradwatch.record.records import StepRecord
from gradwatch_tensorboard.scalars import STEP_SCALARS, StepScalars, largest

Row = dict[str, float]
"""Name to value, for one step. A name may be missing in some steps."""


class Thinner:
    """Gathers rows until enough of them are there, then gives the one that stands for them all."""

    __slots__ = ("_every", "_pending", "_thin")

    def __init__(self, every: int, thin: Callable[[str, Sequence[float]], float]) -> None:
        """Starts with nothing gathered.

        Args:
            every: Steps that one row stands for, at least 1.
            thin: Given a name and its values, oldest first, the value that stands for them.
        """
        self._every = every
        self._thin = thin
        self._pending: list[Mapping[str, float]] = []

    @property
    def holds(self) -> bool:
        """Whether there is anything that was not given yet."""
        return bool(self._pending)

    def add(self, row: Mapping[str, float], *, now: bool) -> Row:
        """Takes the row of one step.

        Args:
            row: The values of the step.
            now: Whether to write at this step whatever the count says.

        Returns:
            The row to write at this step; empty when there is none yet.
        """
        if self._every == 1:
            return dict(row)
        self._pending.append(row)
        return self.rest() if now or len(self._pending) >= self._every else {}

    def rest(self) -> Row:
        """Gives the row that stands for what is still held, empty when nothing is."""
        rows, self._pending = self._pending, []
        if len(rows) == 1:
            return dict(rows[0])
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            name: self._thin(name, [row[name] for row in rows if name in row]) for name in names
        }


NONFINITE_EVENT = "nonfinite_event"

_NONFINITE_MEANING = "Parameters with a NaN or Inf gradient; written at such steps only."
_BLOCK_MEANING = "L2 norm over the parameters of this part of the model, before the clip."


@dataclass(frozen=True, slots=True)
class Point:
    """All values of one step.

    Attributes:
        step: The x-axis.
        time: Wall time in seconds since the epoch.
        values: Tag to value.
    """

    step: int
    time: float
    values: Row


class OptimizerSeries:
    """What is written for one optimizer: its tags, its counters and what thinning still holds.

    TensorBoard groups charts by the text before the first slash, so each optimizer after the first
    has groups of its own, ``gradwatch-SGD-1/`` and ``gradwatch-SGD-1_blocks/``. The hyphen sorts
    them behind those of the first; an underscore would put them in front.

    The newest point waits for the next one: at the end it goes out together with what thinning
    still holds, so that a step is never spread over two Events.
    """

    def __init__(self, label: str, *, every: int, block_every: int, step_scalars: bool) -> None:
        """Starts with nothing taken.

        Args:
            label: Empty for the first optimizer, the optimizer's label for each further one.
            every: Steps that one row of scalars stands for.
            block_every: Steps that one row of block norms stands for.
            step_scalars: Whether the step scalars are written at all.
        """
        name = f"gradwatch-{label.replace('/', '_')}" if label else "gradwatch"
        self._group = f"{name}/"
        self._block_group = f"{name}_blocks/"
        self._step_scalars = step_scalars
        self._scalars = StepScalars()
        self._thin_scalars = Thinner(every, lambda name, values: STEP_SCALARS[name].thin(values))
        self._thin_blocks = Thinner(block_every, lambda _, values: largest(values))
        self._newest: Point | None = None

    def take(
        self,
        record: StepRecord,
        time: float,
        spread: Sequence[float],
        blocks: Mapping[str, float],
        *,
        notable: bool,
    ) -> Point | None:
        """Takes one step.

        Args:
            record: The step.
            time: Its wall time, in seconds since the epoch.
            spread: The four percentiles over the parameters' norms.
            blocks: Norm of each block that had a gradient.
            notable: Whether the step is written however the series are thinned.

        Returns:
            The point before this one, where it is to be written. A step that is not above the last
            one is left out: TensorBoard would take it for a restart and drop the points after it.
        """
        scalars = self._scalars.of(record, spread)
        before = self._newest
        if before is not None and record.global_step <= before.step:
            return None
        values: Row = {}
        if self._step_scalars:
            values |= _prefixed(self._group, self._thin_scalars.add(scalars, now=notable))
        values |= _prefixed(self._block_group, self._thin_blocks.add(blocks, now=notable))
        if record.nonfinite_parameters > 0:
            values[self._group + NONFINITE_EVENT] = float(record.nonfinite_parameters)
        self._newest = Point(record.global_step, time, values)
        return before

    def settled(self) -> Point | None:
        """Gives the newest point now, where thinning holds nothing that belongs to its step."""
        if self._newest is None or self._thin_scalars.holds or self._thin_blocks.holds:
            return None
        point, self._newest = self._newest, replace(self._newest, values={})
        return point

    def rest(self) -> Point | None:
        """Gives the newest point with all that thinning still holds; asked for at the end."""
        if self._newest is None:
            return None
        held = _prefixed(self._group, self._thin_scalars.rest())
        held |= _prefixed(self._block_group, self._thin_blocks.rest())
        return replace(self._newest, values=self._newest.values | held)

    def meaning(self, tag: str) -> str:
        """Says in one sentence what a tag of this optimizer means.

        Args:
            tag: One of the tags that :meth:`take` gave.

        Returns:
            What TensorBoard shows when its user asks about the chart.
        """
        if tag.startswith(self._block_group):
            return _BLOCK_MEANING
        name = tag.removeprefix(self._group)
        return _NONFINITE_MEANING if name == NONFINITE_EVENT else STEP_SCALARS[name].meaning


def _prefixed(group: str, row: Mapping[str, float]) -> Row:
    return {group + name: value for name, value in row.items()}
