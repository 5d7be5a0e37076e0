"""Counts the micro-batches of a step, whose losses may be backwarded in several parts.

A micro-batch is one backward in most loops. But a loss whose head is backwarded chunk by chunk, and
then the body once, is one micro-batch, and so is a step of two models that have nothing in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence, Set

Reached = Set[int]
"""The parameters that one backward has reached, by index."""


def count_micro_batches(backwards: Sequence[Reached]) -> int:
    """Counts the micro-batches of a step by which parameters its backwards have reached.

    Backwards that reach a parameter in common are of one group. Each group sees every micro-batch,
    some in several chunks, so the smallest number of backwards in a group is that of micro-batches.
    A backward that reaches less than half of the parameters of a later one, and no others, is a
    part of that one and does not count: a chunk of a loss whose head shares its weight with the
    embedding.

    So each backward counts where all reach the same parameters, where one leaves some of them out
    (an expert that no token was sent to), and where two losses have a trunk in common.

    Args:
        backwards: What each backward has reached, in order; an empty set if it is not known.

    Returns:
        The number of micro-batches, from 1 to the number of backwards; 0 if there is none.

    Example:
        >>> body, head = {0, 1, 2, 3}, {4, 5}
        >>> count_micro_batches([head, head, head, body])
        1
        >>> count_micro_batches([body | head, body | head])
        2
    """
    first = backwards[0] if backwards else frozenset()
    if not all(backwards) or backwards.count(first) == len(backwards):
        return len(backwards)
    whole = Counter(
        frozenset(reached)
        for position, reached in enumerate(backwards)
        if not _is_part(reached, backwards[position + 1 :])
    )
    return min(sum(whole[one] for one in group) for group in _connected(whole))


def _is_part(reached: Reached, later: Sequence[Reached]) -> bool:
    return any(2 * len(reached) < len(other) and reached <= other for other in later)


def _connected(sets: Collection[frozenset[int]]) -> list[list[frozenset[int]]]:
    """Sorts sets into groups: those of a group overlap, directly or through others of it."""
    groups: list[tuple[set[int], list[frozenset[int]]]] = []
    for one in sets:
        union, members = set(one), [one]
        apart = []
        for other, of_other in groups:
            if union.isdisjoint(other):
                apart.append((other, of_other))
            else:
                union |= other
                members += of_other
        groups = [*apart, (union, members)]
    return [members for _, members in groups]
