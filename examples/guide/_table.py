"""The table at the end of each script: numbers derived by hand, and the measured ones."""

from __future__ import annotations

from collections.abc import Mapping


def compare(rows: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Prints numbers side by side.

    Args:
        rows: By name, the number derived by hand and the measured one.

    Returns:
        The measured numbers.
    """
    width = max(map(len, rows))
    print(f"{'':<{width}}  {'by hand':>10}  {'seen':>10}")
    for name, (by_hand, seen) in rows.items():
        print(f"{name:<{width}}  {by_hand:>10.6g}  {seen:>10.6g}")
    return {name: float(seen) for name, (_, seen) in rows.items()}
