"""Covering arrays: few settings in which every pair (or triple) of choices occurs."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

Axes = Mapping[str, Sequence[str]]
Row = dict[str, str]
Forbidden = Sequence[Mapping[str, Sequence[str]]]


def covering_array(axes: Axes, forbidden: Forbidden = (), strength: int = 2) -> list[Row]:
    """Return settings that cover every possible combination of `strength` choices.

    A forbidden combination names, for some axes, the choices that do not go together. The array
    is greedy: each row starts from a combination that is not covered yet, and gives every other
    axis the choice that covers most of what is left. The same arguments give the same rows.
    """
    left = dict.fromkeys(_combinations(axes, strength))
    rows = []
    while left:
        start = next(iter(left))
        row = _fill(dict(start), axes, forbidden, left, strength)
        if row is None:
            del left[start]  # it occurs in no possible setting
            continue
        rows.append(row)
        for combination in _parts(row, axes, strength):
            left.pop(combination, None)
    return rows


def possible(row: Mapping[str, str], forbidden: Forbidden) -> bool:
    """Return whether a row, whole or in part, holds no forbidden combination."""
    return not any(
        all(row.get(axis) in choices for axis, choices in rule.items()) for rule in forbidden
    )


def name_of(row: Row) -> str:
    """Return a row's choices in one word, as the name of a test."""
    return "-".join(row.values())


def _combinations(axes: Axes, strength: int) -> Iterator[tuple[tuple[str, str], ...]]:
    for names in combinations(axes, strength):
        for choices in product(*(axes[name] for name in names)):
            yield tuple(zip(names, choices, strict=True))


def _parts(row: Row, axes: Axes, strength: int) -> Iterator[tuple[tuple[str, str], ...]]:
    chosen = [(name, row[name]) for name in axes if name in row]
    return combinations(chosen, strength)


def _fill(
    row: Row, axes: Axes, forbidden: Forbidden, left: Mapping[object, None], strength: int
) -> Row | None:
    """Complete a row; where a choice leads nowhere, the next best one is tried."""
    if not possible(row, forbidden):
        return None
    name = next((name for name in axes if name not in row), None)
    if name is None:
        return {axis: row[axis] for axis in axes}

    def covers(choice: str) -> int:
        parts = _parts({**row, name: choice}, axes, strength)
        return sum(part in left for part in parts)

    for choice in sorted(axes[name], key=covers, reverse=True):
        filled = _fill({**row, name: choice}, axes, forbidden, left, strength)
        if filled is not None:
            return filled
    return None
