"""The table that the scripts of the guide end with: what was derived by hand, what was seen."""

from __future__ import annotations

from collections.abc import Mapping


def compare(rows: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Prints numbers side by side.

    Args:
        rows: For each name the number derived by hand, and the one that was seen.

    Returns:
        Those that were seen.
    """
    width = max(map(len, rows))
    print(f"{'':<{width}}  {'by hand':>10}  {'seen':>10}")
    for name, (by_hand, seen) in rows.items():
        print(f"{name:<{width}}  {by_hand:>10.6g}  {seen:>10.6g}")
    return {name: float(seen) for name, (_, seen) in rows.items()}
