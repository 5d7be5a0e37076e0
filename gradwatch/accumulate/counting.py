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
    Chunks of a loss whose head shares its weight with the embedding do not count either: that is,
    before each other backward the same number of backwards, two or more, that reach less than half
    of its parameters, and no others.

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
    whole = Counter(map(frozenset, _without_chunks(backwards)))
    return min(sum(whole[one] for one in group) for group in _connected(whole))


def _without_chunks(backwards: Sequence[Reached]) -> Sequence[Reached]:
    """Leaves out the chunks of a head that shares a parameter with the rest."""
    chunk, body = backwards[0], backwards[-1]
    if 2 * len(chunk) >= len(body) or not chunk <= body:
        return backwards
    # By chance a backward may also reach few parameters, but hardly in such a row.
    row = backwards.index(body) + 1
    count, rest = divmod(len(backwards), row)
    if rest or row < 3 or list(backwards) != [*[chunk] * (row - 1), body] * count:
        return backwards
    return [body] * count


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
