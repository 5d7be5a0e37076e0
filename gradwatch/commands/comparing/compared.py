"""Compared: all that is said of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradwatch.commands.comparing.parameters import ParametersCompared, compare_parameters
from gradwatch.commands.comparing.settings import differing_settings
from gradwatch.commands.comparing.steps import StepsCompared, compare_steps
from gradwatch.commands.comparing.totals import totals
from gradwatch.commands.shared.opened import open_run, run_name


@dataclass(frozen=True, slots=True)
class Compared:
    """Two runs beside each other.

    Attributes:
        a: How A is called.
        b: How B is called.
        settings: By path the settings that differ, with the values of both.
        totals: By name a number of each; NaN where one run has none.
        steps: By step.
        parameters: By parameter.
    """

    a: str
    b: str
    settings: Mapping[str, tuple[Any, Any]]
    totals: Mapping[str, tuple[float, float]]
    steps: StepsCompared
    parameters: ParametersCompared


def compare(a: str, b: str) -> Compared:
    """Compares two runs.

    Args:
        a: A run folder.
        b: Another.

    Raises:
        CommandError: If one cannot be read.
    """
    left, right = open_run(a), open_run(b)
    return Compared(
        a=run_name(a),
        b=run_name(b),
        settings=differing_settings(a, b),
        totals=_beside(totals(left), totals(right)),
        steps=compare_steps(left, right),
        parameters=compare_parameters(left, right),
    )


def _beside(a: dict[str, float], b: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Puts numbers beside each other; a kind of event that one run does not have is 0 there."""
    return {name: (a.get(name, 0), b.get(name, 0)) for name in dict.fromkeys((*a, *b))}
