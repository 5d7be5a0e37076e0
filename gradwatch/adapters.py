"""What an adapter stands on: everything that fits gradwatch to a framework or a logger.

Public, and as stable as ``gradwatch`` itself: ``gradwatch_lightning`` and ``gradwatch_tensorboard``
import from ``gradwatch`` and from here, and from nowhere else. ``docs/extending.md`` builds an
adapter for a made-up framework from it, in one file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from gradwatch.accumulate.policies import accumulate_policy
from gradwatch.checks import described, shown
from gradwatch.errors import warn_safely
from gradwatch.latest import LatestTraining
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.measure.statistics import STATISTICS, Statistic, register_statistic
from gradwatch.options import Options, SharedOptions
from gradwatch.pickles import add_aliases
from gradwatch.record.blocks import BlockScalars
from gradwatch.record.records import (
    EVENT_KINDS,
    NO_GRADIENT,
    RecordBatch,
    StepRecord,
    accumulates,
)
from gradwatch.record.schema import REDUCTIONS, Column, Kind, Reduction, Scalar, columns_of
from gradwatch.record.sink_queue import SinkQueue
from gradwatch.watcher import build_watcher, watch

__all__ = [
    "EVENT_KINDS",
    "GROUP",
    "NO_GRADIENT",
    "REDUCTIONS",
    "SCALARS",
    "STATISTICS",
    "STEP_COLUMNS",
    "BlockScalars",
    "Column",
    "Kind",
    "LatestTraining",
    "LoggerScalars",
    "Options",
    "Reduction",
    "Scalar",
    "SharedOptions",
    "SinkQueue",
    "Statistic",
    "StepScalars",
    "accumulate_policy",
    "accumulates",
    "add_aliases",
    "build_watcher",
    "check_options",
    "described",
    "group_of",
    "optimizer_parameters",
    "register_statistic",
    "sentence",
    "shown",
    "warn_safely",
    "with_watch_options",
]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {
    name: parameter
    for name, parameter in inspect.signature(watch).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}

_UNKNOWN = (
    "{caller}() got an unexpected argument {name!r}. Of the options of gradwatch.watch() it takes: "
    "{known}."
)


def check_options(caller: str, options: Mapping[str, Any], **own: Any) -> Options:
    """Checks options as :func:`gradwatch.watch` does; one that is left out has its default there.

    Args:
        caller: What the user called, ``"GradientMonitor"``: errors name it.
        options: The :class:`SharedOptions` that the user gave, by name.
        own: Options that the adapter sets itself, ``accumulate`` and ``scaler`` among them.

    Returns:
        The options, checked. ``dataclasses.replace()`` changes one, and :func:`build_watcher` takes
        them.

    Raises:
        TypeError: If an option is unknown, or of a wrong type.
        ValueError: If an option is out of bounds.
    """
    for name in options:
        if name not in SharedOptions.__annotations__:
            known = ", ".join(SharedOptions.__annotations__)
            raise TypeError(_UNKNOWN.format(caller=caller, name=name, known=known))
    defaults = {name: parameter.default for name, parameter in _OPTIONS.items()}
    return Options.of({**defaults, **options, **own}, caller)


def with_watch_options(function: F) -> F:
    """Lists the options of :func:`gradwatch.watch` in the signature of what hands them on.

    Args:
        function: Has a last parameter ``**options: Unpack[SharedOptions]``. ``help()``, editors and
            command-line builders show the single options in its place.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *(_OPTIONS[name] for name in SharedOptions.__annotations__)]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


GROUP = "gradwatch"
"""Tags of the first optimizer begin with it."""

STEP_COLUMNS = columns_of(StepRecord)

SCALARS: Mapping[str, Scalar] = {
    name: one.scalar for name, one in STEP_COLUMNS.items() if one.scalar is not None
}
"""How each column is logged that is logged at all, by name."""


def group_of(optimizer: str, first: str) -> str:
    """Names the group of tags of an optimizer: ``gradwatch``, of further ones ``gradwatch-Adam-1``.

    Args:
        optimizer: Its label.
        first: Label of the optimizer whose group has no suffix.
    """
    # Loggers group charts by the text before the first slash. The hyphen sorts the groups behind
    # that of the first optimizer; an underscore would put them in front.
    return GROUP if optimizer == first else f"{GROUP}-{optimizer.replace('/', '_')}"


def sentence(column: Column) -> str:
    """Returns what a column means in one short sentence, for a logger that shows one.

    Example:
        >>> sentence(STEP_COLUMNS["clip_coef"])
        'Factor that the gradients were multiplied with.'
    """
    meaning = column.meaning.partition(";")[0]  # what follows says what the default stands for
    return f"{meaning[:1].upper()}{meaning[1:]}."


class StepScalars:
    """Turns the steps of one optimizer into what is logged of them.

    A value that says nothing is left out: a loss that is not known, a noise scale below its
    standard error. Some are logged from the first step on that has something to say, the loss scale
    say; what has been seen so far is all that is remembered.
    """

    def __init__(self, names: Iterable[str], known: Iterable[str] = ()) -> None:
        """Starts without a step.

        Args:
            names: Columns to log, of :data:`SCALARS`.
            known: Those of them that are logged from the first step on, whatever it says.
        """
        self._scalars = {name: SCALARS[name] for name in names}
        self._seen = set(known)

    def of(self, record: StepRecord) -> dict[str, float]:
        """Returns the values of one step by column."""
        values = {}
        for name, scalar in self._scalars.items():
            if name in self._seen or scalar.when is None or scalar.when(record):
                values[name] = float(getattr(record, name))
                if scalar.lasting:
                    self._seen.add(name)
        return values


class LoggerScalars:
    """Turns the steps of all optimizers into tags and values, as every logger gets them.

    Each further optimizer has a group of tags of its own, ``gradwatch-Adam-1/grad_norm``.

    Example:
        >>> from gradwatch import StepRecord
        >>> step = StepRecord(1, "SGD", grad_norm=2.0, grad_norm_clipped=2.0)
        >>> LoggerScalars().of(step)  # doctest: +ELLIPSIS
        {'gradwatch/grad_norm': 2.0, 'gradwatch/grad_norm_clipped': 2.0, ...}
    """

    def __init__(
        self, *, accumulates: bool = False, blocks: bool = False, statistics: bool = False
    ) -> None:
        """Starts without a step.

        Args:
            accumulates: Whether steps may have several micro-batches: then their number is logged
                from the first step on.
            blocks: Whether :meth:`rows` has the norms of module blocks, at most 20, before the
                clip: ``gradwatch_blocks/encoder``.
            statistics: Whether :meth:`rows` has what ``watch(statistics=)`` takes, in the steps
                where it is taken: ``gradwatch_max/encoder``, for the parameter of the block where
                it is largest in magnitude.
        """
        self._known = ["micro_batches"] * accumulates
        self._series: dict[str, StepScalars] = {}
        self._blocks = BlockScalars(norms=blocks, statistics=statistics)

    def of(self, record: StepRecord) -> dict[str, float]:
        """Returns the values of one step by tag; to be given every step, in order."""
        if record.optimizer not in self._series:
            names = [name for name, one in SCALARS.items() if one.loggers]
            self._series[record.optimizer] = StepScalars(names, self._known)
        values = self._series[record.optimizer].of(record)
        return {f"{self._group(record)}/{name}": value for name, value in values.items()}

    def rows(self, batch: RecordBatch) -> list[tuple[StepRecord, dict[str, float]]]:
        """Returns the steps of a batch with their values by tag; to be given every batch."""
        rows = [(record, self.of(record)) for record in batch.steps]
        for (record, values), of_blocks in zip(rows, self._blocks.of(batch), strict=True):
            group = self._group(record)
            values |= {f"{group}_{name}": value for name, value in of_blocks.items()}
        return rows

    def _group(self, record: StepRecord) -> str:
        return group_of(record.optimizer, first=next(iter(self._series)))
