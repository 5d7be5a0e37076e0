"""How a column declares itself: what it means, and where it is shown.

Each field of a record in :mod:`gradwatch.record.records` declares its column once. The frames of a
history, the run folder, TensorBoard, other loggers, ``gradwatch tail``, the Gradients tab and
``docs/reference.md`` are all made from that declaration, so that none of them can miss a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T", bound=type)

Reduction = Literal["largest", "smallest", "median", "newest"]
"""How one value stands for those of several steps; see :data:`REDUCTIONS`."""

Shape = Literal["triangle", "square", "round"]
"""Marks of events in the Gradients tab: kinds differ in shape as well as in color."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """How a step column is logged as a scalar, ``gradwatch/<column>``.

    Attributes:
        reduction: Which value is written where one point stands for several steps.
        when: Given a :class:`~gradwatch.record.records.StepRecord`, whether it has a value worth
            logging; None for always.
        lasting: Whether ``when`` need hold only once: from that step on every step is logged.
        condition: ``when`` in words, for the reference page.
        tensorboard: Whether ``TensorBoardWriter`` writes it.
        loggers: Whether every logger of a framework gets it (W&B, MLflow, CSV files), not only
            TensorBoard.
    """

    reduction: Reduction = "newest"
    when: Callable[[Any], bool] | None = None
    lasting: bool = False
    condition: str = ""
    tensorboard: bool = True
    loggers: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """What a column says about itself.

    Attributes:
        meaning: A phrase in Markdown, without a full stop.
        unit: Unit of the values; empty for counts, names and ratios.
        page: The page of ``docs/`` that says more; empty for none.
        repeats: Whether the value seldom changes from one step to the next. The run folder then
            stores it as runs, which take next to nothing.
        scalar: How it is logged; None where it is not.
        tail: Its heading in ``gradwatch tail``, which leaves out NaN; empty where tail has no
            column for it.
        tail_when: Given a :class:`~gradwatch.record.records.StepRecord`, whether tail shows the
            value; None for always.
        tab: Whether the tooltip of the Gradients tab shows it, reduced as ``scalar`` says.
    """

    meaning: str
    unit: str = ""
    page: str = ""
    repeats: bool = False
    scalar: Scalar | None = None
    tail: str = ""
    tail_when: Callable[[Any], bool] | None = None
    tab: bool = False


def column(meaning: str, **more: Any) -> dict[str, Any]:
    """Declares a column: the ``metadata`` of a dataclass field.

    Args:
        meaning: See :class:`Column`.
        more: Its other attributes.
    """
    return {"column": Column(meaning, **more)}


def columns_of(record: type) -> dict[str, Column]:
    """Returns what the columns of a record say about themselves, by name.

    Raises:
        TypeError: If a field declares no column.
    """
    columns = {}
    for field in fields(record):
        if "column" not in field.metadata:
            raise TypeError(
                f"{record.__name__}.{field.name} declares no column. Write field(default=..., "
                'metadata=column("what it means", ...)).'
            )
        columns[field.name] = field.metadata["column"]
    return columns


def declared(record: T) -> T:
    """Completes a record class with what its fields declare.

    Its docstring gets the meanings as ``Attributes``. See also :func:`loads_older`.
    """
    lines = (f"        {name}: {one.meaning}." for name, one in columns_of(record).items())
    summary = (record.__doc__ or "").rstrip()
    record.__doc__ = "\n".join((summary, "", "    Attributes:", *lines))
    return loads_older(record)


def loads_older(record: T) -> T:
    """Lets pickles from before a field was added load with the default of that field."""
    record.__setstate__ = _restore  # type: ignore[attr-defined]
    return record


def _restore(self: Any, state: Any) -> None:
    # Frozen dataclasses with slots pickle a list of values, others (None, {name: value}).
    names = [field.name for field in fields(self)]
    values = state[1] if isinstance(state, tuple) else dict(zip(names, state, strict=False))
    for field in fields(self):
        object.__setattr__(self, field.name, values.get(field.name, field.default))


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of event says about itself.

    Attributes:
        meaning: A phrase in Markdown, without a full stop.
        value: What ``Event.value`` is.
        color: Of its marks in plots and in the Gradients tab, ``#rrggbb``. The palette is that of
            Okabe and Ito (Color Universal Design, 2008), which all kinds of sight can tell apart.
        shape: Of its marks in the Gradients tab.
    """

    meaning: str
    value: str
    color: str
    shape: Shape = "round"


def is_finite(name: str) -> Callable[[Any], bool]:
    """Returns a :attr:`Scalar.when`: whether the column of that name is a finite number."""
    return lambda record: math.isfinite(getattr(record, name))


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _smallest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else min(values)


def _median(values: Sequence[float]) -> float:
    numbers = sorted(value for value in values if not math.isnan(value))
    return numbers[len(numbers) // 2] if numbers else math.nan


REDUCTIONS: dict[Reduction, Callable[[Sequence[float]], float]] = {
    "largest": _largest,
    "smallest": _smallest,
    "median": _median,
    "newest": lambda values: values[-1],
}
"""Each reduces the values of several steps, oldest first and at least one, to a single value.

A NaN wins over the largest and the smallest value, so that thinning never hides one.
"""
