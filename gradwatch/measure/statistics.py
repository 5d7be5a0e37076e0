"""Statistics per parameter besides the norm, taken at every so many steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.checks import shown
from gradwatch.errors import warn_safely
from gradwatch.measure.deferred import Array, Deferred, FloatOrDeferred, resolve
from gradwatch.measure.devices import as_exact, exact_dtype, home_of, in_exact, sent
from gradwatch.measure.gathering import gathered, index_tensor
from gradwatch.measure.norms import gradient_norms, gradient_values
from gradwatch.measure.parameters import readable_part
from gradwatch.measure.sharded import UPDATE, PackedAllReduce, RanksPartedError, Shards

Measure = Callable[[Tensor], Tensor]
"""Given the elements of a gradient, a float tensor with at least one, returns a tensor ``[]``.

Those of a complex gradient are its real and imaginary parts; those of a sparse one are all, unset
ones as zeros.
"""

Totals = Mapping[str, Array]
"""The combined value of each measure, by name: a float64 array ``[parameters]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A statistic per parameter, for ``watch(statistics=)``.

    With sharded parameters, several ranks hold a part of each gradient. A statistic is therefore
    computed in two steps: *measures* of each part, whose values are combined over the parts, and a
    *formula* over these totals. Statistics that share a measure, under the same name, share its
    value.

    Attributes:
        meaning: A phrase in Markdown, without a full stop.
        unit: Unit of the values; empty for ratios.
        formula: Given the totals by name, float64 arrays ``[parameters]``, and the loss scale of
            the gradients, returns the statistic, a float array ``[parameters]``. If its unit is
            that of the gradient, divide by the loss scale.
        sums: Measures whose values are added up over the parts, by name.
        maxima: Measures of whose values the largest counts, by name.
        weights: Instead of ``sums`` and ``maxima``, the totals that a statistic of the weights
            needs: ``"squared_weights"``, the squared L2 norm before the step, or
            ``"squared_update"``, that of the change that the step made.
    """

    meaning: str
    formula: Callable[[Totals, float], Array]
    unit: str = ""
    sums: Mapping[str, Measure] = field(default_factory=dict)
    maxima: Mapping[str, Measure] = field(default_factory=dict)
    weights: tuple[str, ...] = ()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The measures that are taken of a gradient, by name."""
        return {**self.sums, **self.maxima}

    @property
    def needs(self) -> tuple[str, ...]:
        """The totals that the formula reads."""
        return (*self.measures, *self.weights)


# The measures of this module get complex gradients as they are, and of sparse ones the stored
# values: elements that are not stored are zeros, which only change the two counts.


@dataclass(frozen=True, slots=True)
class _TimesCount:
    """A measure that is a number, or its square, times the count of elements.

    Attributes:
        number: Measures the number.
        power: 1, or 2 for its square.
    """

    number: Measure
    power: int = 1

    def __call__(self, values: Tensor) -> Tensor:
        return in_exact(self.number(values)) ** self.power * values.numel()


def _count(values: Tensor) -> Tensor:
    return as_exact(float(values.numel()), values.device)


def _zeros(values: Tensor) -> Tensor:
    return values.numel() - torch.count_nonzero(values)


def _mean(values: Tensor) -> Tensor:
    return (torch.view_as_real(values) if values.is_complex() else values).mean()


def _mean_in_phase(values: Tensor) -> Tensor:
    """Of complex numbers returns their :func:`_mean` again, of real ones 0."""
    return _mean(values) if values.is_complex() else values.new_zeros(())


def _out_of_phase(values: Tensor) -> Tensor:
    """Returns what the magnitude of a complex sum needs besides: 0 for real numbers."""
    if not values.is_complex():
        return values.new_zeros(())
    total = in_exact(values.mean()) * values.numel()
    return (total.real - total.imag) / math.sqrt(2)


_sum = _TimesCount(_mean)


def _max(values: Tensor) -> Tensor:
    if values.is_complex():
        return in_exact(values).abs().amax()
    low, high = torch.aminmax(values)  # on a CPU ten times as fast as a norm of p = inf
    return torch.maximum(-low, high)


def _std(totals: Totals, unit: float) -> Array:
    """Adds up the deviations within parts and between them (Chan, Golub, LeVeque 1983).

    Of a complex sum ``a + bi`` the squared magnitude is ``2 s^2 + 2 d^2`` with the half sum ``s``
    and the half difference ``d`` of its parts.
    """
    count = np.maximum(totals["count"], 1)
    squared = totals["sum"] ** 2 + totals["in_phase"] ** 2 + totals["out_of_phase"] ** 2
    between = np.maximum(totals["sum_squared_over_count"] - squared / count, 0)
    std: Array = np.sqrt((totals["squared_deviations"] + between) / count) / unit
    return std


def _update_ratio(totals: Totals, unit: float) -> Array:
    ratio: Array = np.sqrt(totals["squared_update"] / totals["squared_weights"])
    return np.where(totals["squared_weights"] > 0, ratio, np.nan)


STATISTICS: dict[str, Statistic] = {
    "max": Statistic(
        meaning="largest magnitude of an element of the gradient",
        unit="gradient",
        maxima={"max": _max},
        formula=lambda totals, unit: totals["max"] / unit,
    ),
    "mean": Statistic(
        meaning="mean of the elements of the gradient, of complex ones that of their real and "
        "imaginary parts",
        unit="gradient",
        sums={"count": _count, "sum": _sum},
        formula=lambda totals, unit: totals["sum"] / np.maximum(totals["count"], 1) / unit,
    ),
    "std": Statistic(
        meaning="population standard deviation of the elements of the gradient",
        unit="gradient",
        # A sum of squares would do, but it cancels where the mean is large.
        sums={
            "count": _count,
            "sum": _sum,
            "in_phase": _TimesCount(_mean_in_phase),
            "out_of_phase": _out_of_phase,
            "sum_squared_over_count": _TimesCount(lambda v: v.mean().abs(), power=2),
            "squared_deviations": _TimesCount(lambda v: torch.var(v, correction=0)),
        },
        formula=_std,
    ),
    "zeros": Statistic(
        meaning="share of the elements of the gradient that are exactly zero",
        sums={"count": _count, "zeros": _zeros},
        formula=lambda totals, unit: totals["zeros"] / np.maximum(totals["count"], 1),
    ),
    "weight_norm": Statistic(
        meaning="L2 norm of the parameter before the step",
        unit="weight",
        weights=("squared_weights",),
        formula=lambda totals, unit: np.sqrt(totals["squared_weights"]),
    ),
    "update_ratio": Statistic(
        meaning="L2 norm of the change that the step made, over `weight_norm`; NaN where all "
        "weights were zero",
        weights=("squared_weights", "squared_update"),
        formula=_update_ratio,
    ),
}
"""Every statistic that ``watch(statistics=)`` knows, besides ``"norm"``, which is always taken."""

_TAKEN_NAMES = (
    *("norm", "row", "step", "optimizer", "parameter", "grad_norm", "grad_norm_clipped"),
    "blocks",  # the group of the norms of module blocks, in a logger
)

_NOT_A_NAME = (
    "register_statistic(name=) must be an identifier that is not taken yet, got {name!r}. Taken "
    "are: {taken}."
)
_NOT_A_STATISTIC = (
    "register_statistic(statistic=) must be a Statistic, got {value}. Write Statistic("
    'meaning="...", sums={{"name": measure}}, formula=...).'
)
_NOTHING_MEASURED = (
    "register_statistic({name!r}) got a Statistic that measures {what}. Give it measures of the "
    "gradient (sums=, maxima=) or weights=, one of both."
)
_MEASURED_TWICE = (
    "register_statistic({name!r}) has a measure {measure!r}, and so has the statistic {other!r}, "
    "with another function. Measures of one name are taken once: call yours something else."
)


def register_statistic(name: str, statistic: Statistic) -> None:
    """Makes a statistic of your own known to ``watch(statistics=)``, in this process.

    Args:
        name: What it is called there, and in ``History.parameters()``.
        statistic: The statistic.

    Raises:
        TypeError: If it is no statistic.
        ValueError: If the name is taken or cannot be the name of a column, if nothing is measured,
            or if a measure has the name of another statistic's.
    """
    if not isinstance(statistic, Statistic):
        raise TypeError(_NOT_A_STATISTIC.format(value=shown(statistic)))
    taken = (*_TAKEN_NAMES, *STATISTICS)
    if not str(name).isidentifier() or name in taken:
        raise ValueError(_NOT_A_NAME.format(name=name, taken=", ".join(taken)))
    if bool(statistic.measures) == bool(statistic.weights):
        what = "both gradient and weights" if statistic.weights else "nothing"
        raise ValueError(_NOTHING_MEASURED.format(name=name, what=what))
    for other, known in STATISTICS.items():
        for measure in statistic.measures.keys() & known.measures.keys():
            if _bare(statistic.measures[measure]) is not _bare(known.measures[measure]):
                raise ValueError(_MEASURED_TWICE.format(name=name, measure=measure, other=other))
    STATISTICS[name] = _guarded(name, statistic)


_failed: set[str] = set()

_FAILED = (
    "gradwatch: {what} of a registered statistic failed, {kind}: {error}. The statistic is NaN "
    "there; everything else is recorded, and the training goes on."
)


def _warn_of(what: str, error: Exception) -> None:
    if what not in _failed:  # once in a process: it fails at every sampled step
        _failed.add(what)
        warn_safely(_FAILED.format(what=what, kind=type(error).__name__, error=error))


@dataclass(frozen=True, slots=True)
class _GuardedMeasure:
    """A measure of the user's, which is NaN where it fails."""

    name: str
    measure: Measure

    def __call__(self, values: Tensor) -> Tensor:
        try:
            found: Any = self.measure(values)
            number = found if isinstance(found, Tensor) else as_exact(float(found), values.device)
            return number.reshape(())
        except Exception as error:
            _warn_of(f"the measure {self.name!r}", error)
            return values.new_full((), torch.nan)


def _bare(measure: Measure) -> Measure:
    return measure.measure if isinstance(measure, _GuardedMeasure) else measure


def _guarded(name: str, statistic: Statistic) -> Statistic:
    """Returns the statistic with functions that no longer raise: a training must not end by it."""

    def formula(totals: Totals, unit: float) -> Array:
        size = len(next(iter(totals.values())))
        try:
            made = np.asarray(statistic.formula(totals, unit), np.float64)
            return np.broadcast_to(made, (size,))
        except Exception as error:
            _warn_of(f"the formula of {name!r}", error)
            return np.full(size, np.nan)

    sums, maxima = (
        {row: _GuardedMeasure(row, _bare(measure)) for row, measure in measures.items()}
        for measures in (statistic.sums, statistic.maxima)
    )
    return replace(statistic, formula=formula, sums=sums, maxima=maxima)


@dataclass(frozen=True, slots=True)
class Row:
    """Totals of parameters ``[n]``: numbers from a device, and what the host makes of them.

    A square or a sum needs float64, which the host has and not every device.

    Attributes:
        numbers: Float32 or float64 ``[n]``, on a device; None for ones.
        factors: What they are multiplied by ``[n]``; None for ones.
        power: What they are raised to before.
    """

    numbers: Deferred | None
    factors: NDArray[np.float64] | None = None
    power: int = 1

    def array(self) -> Array:
        """Returns the totals on the host, float64; may wait for the device."""
        if self.numbers is None:
            return np.empty(0) if self.factors is None else self.factors
        with np.errstate(all="ignore"):
            totals: Array = self.numbers.array().astype(np.float64) ** self.power
            return totals if self.factors is None else totals * self.factors

    def on(self, device: torch.device) -> Tensor:
        """Returns the totals on a device, in its most precise dtype, without a wait."""
        factors = None
        if self.factors is not None:
            there = torch.tensor(self.factors, dtype=exact_dtype(device), device="cpu")
            factors = sent(there, device)
        if self.numbers is None:
            return as_exact(0.0, device).new_zeros(0) if factors is None else factors
        totals = in_exact(sent(self.numbers.tensor, device)) ** self.power
        return totals if factors is None else totals * factors


def gradient_rows(gradients: Sequence[Tensor], names: Sequence[str]) -> dict[str, Row]:
    """Measures what statistics are made of.

    Args:
        gradients: Tensors of any shape, real or complex, dense or sparse, or parts of such. The
            elements of a sparse one are all, unset ones as zeros.
        names: The statistics; those of weights are passed over.

    Returns:
        Rows ``[len(gradients)]`` by name of the measure.
    """
    measures = {row: one for name in names for row, one in STATISTICS[name].measures.items()}
    if not gradients:
        return {row: Row(None) for row in sorted(measures)}
    taken = [_measured(gradient.detach(), measures) for gradient in gradients]
    home = home_of(gradients)
    return {row: _row([found[row] for found in taken], home) for row in sorted(measures)}


def _row(parts: Sequence[_Number], home: torch.device) -> Row:
    factors = None
    if any(part.factor != 1.0 for part in parts):
        factors = np.array([part.factor for part in parts])
    numbers = [part.number for part in parts]
    if all(number is None for number in numbers):
        return Row(None, np.ones(len(parts)) if factors is None else factors)
    # An empty part of a sharded gradient has no number: its factor is 0.
    one = torch.ones((), dtype=torch.float32, device=home)
    stacked = gathered([one if n is None else n for n in numbers])
    return Row(Deferred(stacked), factors, max(part.power for part in parts))


def weight_row(parameters: Sequence[Tensor]) -> Row:
    """Computes the squared L2 norm of each parameter, or of a part: ``[n]``."""
    return Row(Deferred(gradient_norms([p.detach() for p in parameters])), power=2)


def update_row(before: Sequence[Tensor], after: Sequence[Tensor]) -> Row:
    """Computes the squared L2 norm of the change of each parameter, or of a part of each: ``[n]``.

    Args:
        before: Copies of the parameters before the step.
        after: The parameters after it.
    """
    return weight_row([new.detach() - old for new, old in zip(after, before, strict=True)])


def statistics_of(names: Sequence[str], rows: Totals, unit: float) -> dict[str, Array]:
    """Makes the statistics of rows that have been put together over the parts.

    Args:
        names: The statistics.
        rows: By name of the measure, float arrays ``[n]``.
        unit: What to divide a gradient by to have true units.

    Returns:
        For each statistic whose rows are there a float array ``[n]``.
    """
    there = [name for name in names if all(row in rows for row in STATISTICS[name].needs)]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {name: STATISTICS[name].formula(rows, unit) for name in there}


class _Number(NamedTuple):
    """What was measured of one gradient: see :class:`Row`."""

    number: Tensor | None
    factor: float = 1.0
    power: int = 1


def _measured(gradient: Tensor, measures: Mapping[str, Measure]) -> dict[str, _Number]:
    """Takes the measures of one gradient."""
    stored = _in_full_precision(gradient_values(gradient))
    unset = gradient.numel() - stored.numel()
    # A measure of the user's may need the zeros. Few ask for one of a sparse gradient, which is
    # made dense for it, one at a time.
    own = any(isinstance(measure, _GuardedMeasure) for measure in measures.values())
    whole = _in_full_precision(gradient.to_dense()) if own and unset else stored
    parts = torch.view_as_real(whole) if own and whole.is_complex() else whole
    found = {}
    for row, measure in measures.items():
        values = parts if isinstance(measure, _GuardedMeasure) else stored
        if measure is _count:
            found[row] = _Number(None, float(values.numel() + unset))
        elif not values.numel():  # it has no mean and no largest element
            found[row] = _Number(None, float(unset) if measure is _zeros else 0.0)
        elif isinstance(measure, _TimesCount):
            number = measure.number(values)
            found[row] = _Number(number, float(values.numel()), measure.power)
        else:
            number = _in_single_or_double(measure(values))
            found[row] = _Number(number + unset if unset and measure is _zeros else number)
    return found


def _in_single_or_double(number: Tensor) -> Tensor:
    if number.dtype in (torch.float32, torch.float64):
        return number
    return in_exact(number.real if number.is_complex() else number)


def _in_full_precision(values: Tensor) -> Tensor:
    # Every result would be rounded to their 8 or 11 bits, and those of float16 overflow. With
    # float8 torch hardly calculates.
    if values.dtype in (torch.float16, torch.bfloat16) or values.dtype.itemsize == 1:
        return values.float()
    return values.to(torch.complex64) if values.dtype is torch.complex32 else values


@dataclass(frozen=True, slots=True)
class StatisticsSample:
    """The statistics of one step, whose numbers may be on their way from the device.

    Attributes:
        names: The statistics.
        columns: Number of watched parameters.
        parts: Indices and rows, those of gradients and those of weights.
        unit: The loss scale that the gradients carried.
    """

    names: Sequence[str] = ()
    columns: int = 0
    parts: Sequence[tuple[Sequence[int], dict[str, Row]]] = ()
    unit: FloatOrDeferred = 1.0

    def deferred(self) -> list[Deferred]:
        """Lists what must be read before the rows can be made."""
        unit = [self.unit] if isinstance(self.unit, Deferred) else []
        rows = (row.numbers for _, rows in self.parts for row in rows.values())
        return [*unit, *(numbers for numbers in rows if numbers is not None)]

    def rows(self, applied: bool = True) -> dict[str, Array]:
        """Makes the statistics: rows over all columns, NaN where there is no value.

        ``applied`` says whether the step was taken; one that was skipped has no update.
        """
        made: dict[str, Array] = {}
        for indices, late in self.parts:
            rows = {
                name: row.array()
                for name, row in late.items()
                if applied or name != "squared_update"
            }
            for name, values in statistics_of(self.names, rows, resolve(self.unit)).items():
                made[name] = np.full(self.columns, np.nan)
                made[name][list(indices)] = values
        return made


NO_SAMPLE = StatisticsSample()


@dataclass(slots=True)
class _Rows:
    """Rows ``[len(indices)]`` by name, and their slots in the all-reduce between ranks."""

    indices: Sequence[int] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)


class StatisticsSampler:
    """The further statistics of one optimizer's parameters.

    ``update_ratio`` copies the weights before a sampled step; nothing else is kept.
    """

    def __init__(
        self, names: Sequence[str], every: int, columns: int, shards: Shards | None = None
    ) -> None:
        """Starts with no sample.

        Args:
            names: Statistics to take; ``norm`` is not among its tasks.
            every: Take them at every so many steps.
            columns: Number of watched parameters.
            shards: Knows which parameters this rank holds a part of; None where all are whole.
        """
        self._names = [name for name in names if name != "norm"]
        self._of_gradients = [name for name in self._names if STATISTICS[name].measures]
        self._of_weights = {row for name in self._names for row in STATISTICS[name].weights}
        self._maxima = {row for name in self._names for row in STATISTICS[name].maxima}
        self._every = every
        self._columns = columns
        self._shards = shards
        self._forget()

    @classmethod
    def of(
        cls, names: Sequence[str], every: int, columns: int, shards: Shards | None
    ) -> StatisticsSampler | None:
        """Returns a sampler; None where no more than the norm is wanted."""
        return cls(names, every, columns, shards) if any(name != "norm" for name in names) else None

    def _forget(self) -> None:
        self._gradients, self._weights = _Rows(), _Rows()
        self._weights_before: list[Tensor] = []
        self._packed: PackedAllReduce | None = None

    def due(self, step: int) -> bool:
        """Tells whether statistics are to be taken at a step, counted from 1."""
        return bool(self._names) and (step - 1) % self._every == 0

    def measure_gradients(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Measures gradients before the clip, of sharded ones the parts of this rank."""
        if self._of_gradients:
            self._gradients = _Rows(indices, gradient_rows(gradients, self._of_gradients))

    def measure_weights(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Measures parameters before the step."""
        if self._of_weights:
            parts = list(map(readable_part, parameters))
            self._weights = _Rows(indices, {"squared_weights": weight_row(parts)})

    def add_to(self, packed: PackedAllReduce) -> None:
        """Adds the rows of sharded parameters to the all-reduce of the norms."""
        # Anew at each call: a closure that is evaluated several times reduces as often.
        for part in (self._gradients, self._weights):
            of_gradients = part is self._gradients
            for name, values in part.rows.items():
                row = packed.shards.full_row(part.indices, values.on(packed.device))
                part.slots[name] = (
                    packed.add_gather(row)
                    if name in self._maxima
                    else packed.add_sum(row, of_gradients)
                )
        self._packed = packed

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Copies the weights that a step is about to change, where their update is asked for."""
        if "squared_update" in self._of_weights:
            self._weights_before = [torch.clone(readable_part(p.detach())) for p in parameters]

    def after_step(
        self, indices: Sequence[int], parameters: Sequence[Tensor], unit: FloatOrDeferred
    ) -> StatisticsSample:
        """Measures the update, and returns everything measured for this step.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters after the step.
            unit: The loss scale that the gradients carried when they were measured.
        """
        if self._shards is not None:
            for part in (self._gradients, self._weights):
                for name in part.rows:
                    part.rows[name] = self._reduced(self._packed, part, name)
            if self._packed is not None and self._packed.exchanged:
                self._measure_sums(self._packed.partial)
        if self._weights_before:
            update = update_row(self._weights_before, list(map(readable_part, parameters)))
            self._weights.rows["squared_update"] = self._summed(indices, update)
        parts = [(p.indices, p.rows) for p in (self._gradients, self._weights) if p.rows]
        self._forget()
        return StatisticsSample(self._names, self._columns, parts, unit)

    def _measure_sums(self, sums: Mapping[int, Tensor]) -> None:
        """Measures gradients that were sums still pending, of which each rank had one term.

        ``sums`` are these gradients before the clip, by index, known since the all-reduce.
        """
        for column, index in enumerate(self._gradients.indices):
            if index in sums:
                for name, value in gradient_rows([sums[index]], self._of_gradients).items():
                    numbers = self._gradients.rows[name].numbers
                    if numbers is not None:  # all of them, as the ranks have summed them
                        numbers.tensor[column] = value.on(numbers.tensor.device)[0]

    def _summed(self, indices: Sequence[int], row: Row) -> Row:
        """Sums the row of an update over the ranks, in an all-reduce of its own after the step."""
        if self._shards is None:
            return row
        device = home_of(self._shards.tensors)
        packed = PackedAllReduce(self._shards, device)
        slot = packed.add_sum(self._shards.full_row(indices, row.on(device)), of_gradients=False)
        if self._shards.settle():
            self._shards.kind = UPDATE
            with suppress(RanksPartedError):
                packed.run()
        part = _Rows(indices, {"squared_update": row}, {"squared_update": slot})
        return self._reduced(packed, part, "squared_update")

    def _reduced(self, packed: PackedAllReduce | None, part: _Rows, name: str) -> Row:
        """Returns a row as summed over the ranks; NaN where they have not exchanged it."""
        if packed is None or not packed.exchanged:
            return Row(None, np.full(len(part.indices), math.nan))
        slot = part.slots[name]
        row = packed.gathered[slot].amax(0) if name in self._maxima else packed.sums[slot]
        return Row(Deferred(row[index_tensor(tuple(part.indices), row.device)]))
