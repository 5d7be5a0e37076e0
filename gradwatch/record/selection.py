"""Selection: which columns, steps and parameters somebody asks a History for, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import numpy as np

from gradwatch.record.columns import Span

Names = str | re.Pattern[str] | Iterable[str]
"""Parameters: one by its name, several, or those in whose name a compiled pattern is found."""


MOST_COMPARED = 5_000
"""Names that are looked through for one like an unknown one."""


def chosen_columns(
    columns: Iterable[str] | None, known: Sequence[str], what: str
) -> tuple[str, ...]:
    """Checks which columns are asked for.

    Args:
        columns: Their names; None for all.
        known: The columns that there are.
        what: What the user wrote, for the text of errors.

    Raises:
        TypeError: If they are no sequence of names.
        ValueError: If one is unknown.
    """
    if columns is None:
        return tuple(known)
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise TypeError(
            f'{what} must be a sequence of names, got {columns!r}. Write ["{known[0]}"].'
        )
    chosen = tuple(dict.fromkeys(columns))
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what} must be of {', '.join(known)}, got {name!r}.")
    return chosen


def chosen_span(start: object, stop: object, what: str) -> Span:
    """Checks which steps are asked for.

    Args:
        start: The first one; None for no bound.
        stop: One after the last; None for no bound.
        what: What the user called, for the text of errors.

    Raises:
        TypeError: If a bound is no integer.
    """
    return Span(_bound(start, f"{what}(start=)"), _bound(stop, f"{what}(stop=)"))


def _bound(value: object, what: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what} must be a step number or None, got {value!r}.")
    return int(value)


def chosen_parameters(names: Names, known: Sequence[str]) -> list[int]:
    """Finds which parameters are asked for.

    Args:
        names: As for :meth:`gradwatch.History.parameters`.
        known: The names that there are.

    Returns:
        Their places in ``known``, rising.

    Raises:
        TypeError: If they are no names.
        ValueError: If one is unknown.
    """
    if isinstance(names, re.Pattern):
        return [index for index, name in enumerate(known) if names.search(name)]
    if not isinstance(names, Iterable):
        raise TypeError(f"parameters(names=) must be names or a compiled pattern, got {names!r}.")
    wanted = {names} if isinstance(names, str) else set(names)
    for name in wanted.difference(known):
        raise ValueError(_unknown(str(name), known))
    return [index for index, name in enumerate(known) if name in wanted]


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known[:MOST_COMPARED], n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
    return (
        f"parameters(names=) got {name!r}, which is no parameter of this run.{hint} "
        "history.names lists them; re.compile(...) finds names by a pattern."
    )
