"""What an adapter stands on: everything that fits gradwatch to a framework or a logger.

Public, and as stable as ``gradwatch`` itself: ``gradwatch_lightning`` and ``gradwatch_tensorboard``
import from ``gradwatch`` and from here, and from nowhere else. ``docs/extending.md`` builds an
adapter for a made-up framework from it, in one file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gradwatch.accumulate.policies import accumulate_policy
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.measure.statistics import STATISTICS, Statistic, register_statistic
from gradwatch.options import Options, SharedOptions, described, shown
from gradwatch.pickles import add_aliases
from gradwatch.record.records import EVENT_KINDS, NO_GRADIENT, accumulates, warn_safely
from gradwatch.record.scalars import (
    GROUP,
    SCALARS,
    STEP_COLUMNS,
    LoggerScalars,
    StepScalars,
    group_of,
    sentence,
)
from gradwatch.record.schema import REDUCTIONS, Column, Kind, Reduction, Scalar
from gradwatch.watcher import build_watcher, watch

__all__ = [
    "EVENT_KINDS",
    "GROUP",
    "NO_GRADIENT",
    "REDUCTIONS",
    "SCALARS",
    "STATISTICS",
    "STEP_COLUMNS",
    "Column",
    "Kind",
    "LoggerScalars",
    "Options",
    "Reduction",
    "Scalar",
    "SharedOptions",
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
    "{caller}() got an unexpected argument {name!r}. It takes the options of gradwatch.watch(): "
    "{known}."
)


def check_options(caller: str, options: Mapping[str, Any]) -> Options:
    """Checks options as :func:`gradwatch.watch` does; one that is left out has its default there.

    Args:
        caller: What the user called, ``"GradientMonitor"``: errors name it.
        options: By name, as the user gave them.

    Returns:
        The options, checked; ``dataclasses.replace()`` changes one, and :func:`build_watcher` takes
        them.

    Raises:
        TypeError: If one is unknown, or of a wrong type.
        ValueError: If one is out of bounds.
    """
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(_UNKNOWN.format(caller=caller, name=name, known=", ".join(_OPTIONS)))
    defaults = {name: parameter.default for name, parameter in _OPTIONS.items()}
    return Options.of({**defaults, **options}, caller)


def with_watch_options(function: F) -> F:
    """Lists the options of :func:`gradwatch.watch` in the signature of what hands them on.

    Args:
        function: Has a last parameter ``**options: Unpack[SharedOptions]``. ``help()``, editors and
            command-line builders show the single options in its place.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [_OPTIONS[name] for name in SharedOptions.__annotations__ if name in _OPTIONS]
    taken = {parameter.name for parameter in own}
    parameters = [*own, *(p for p in shared if p.name not in taken)]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function
