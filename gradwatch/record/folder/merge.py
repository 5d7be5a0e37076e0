"""When to merge parts, so that a long run leaves few files and rewrites each row twice or so."""

from __future__ import annotations

from collections.abc import Sequence

FAN = 32
FULL = 1 << 20
"""Values in a part that is never merged again: 3 MB, 0.2 s and some 100 MB to make it of others."""

LEVELS = (FULL // FAN**3, FULL // FAN**2, FULL // FAN, FULL)
"""A part is of a level by its size; what a level holds is merged when it makes one of the next."""


def due(sizes: Sequence[int]) -> slice | None:
    """Chooses parts to merge while the run goes on.

    Args:
        sizes: Values in each part of a session, oldest first.

    Returns:
        Consecutive parts up to the newest; None if there is nothing to do yet.
    """
    for limit in LEVELS:
        tail = _tail(sizes, limit)
        if len(sizes) - tail > 1 and sum(sizes[tail:]) >= limit:
            return slice(tail, len(sizes))
    return None


def leftovers(sizes: Sequence[int]) -> list[slice]:
    """Chooses parts to merge at the end of a run.

    Args:
        sizes: Values in each part of a session, oldest first.

    Returns:
        Groups of two or more consecutive parts that make about a full one each.
    """
    groups: list[slice] = []
    first, total = 0, 0
    for index, size in enumerate([*sizes, FULL]):
        if size >= FULL or total >= FULL:
            groups.append(slice(first, index))
            first, total = index + (size >= FULL), 0
        total += size if size < FULL else 0
    return [group for group in groups if group.stop - group.start > 1]


def _tail(sizes: Sequence[int], limit: int) -> int:
    """Finds where the newest parts begin that are all smaller than a limit."""
    first = len(sizes)
    while first and sizes[first - 1] < limit:
        first -= 1
    return first
