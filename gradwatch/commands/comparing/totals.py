"""What a run comes to in a few numbers, to be put beside those of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

READ = ("time_s", "clipped", "outcome", "nonfinite_parameters")


def totals(history: History) -> dict[str, float]:
    """Counts.

    Args:
        history: A run.

    Returns:
        By name: ``steps``, ``parameters``, ``seconds per step``, ``clipped`` (share of the applied
        steps), ``skipped`` and ``non-finite`` (steps), and ``events: kind`` for each kind.
    """
    steps = history.steps(READ)
    applied = steps["outcome"] == "applied"
    kinds = history.events()["kind"].value_counts()
    return {
        "steps": len(steps),
        "parameters": len(history.names),
        "seconds per step": _pace(steps),
        "clipped": float(steps["clipped"][applied].mean()) if applied.any() else float("nan"),
        "skipped": int((~applied).sum()),
        "non-finite": int((steps["nonfinite_parameters"] > 0).sum()),
        **{f"events: {kind}": int(amount) for kind, amount in kinds.items()},
    }


def _pace(steps: pd.DataFrame) -> float:
    """Returns the median time between steps, which a pause or a resumed run does not change."""
    between = np.diff(steps["time_s"].to_numpy())
    return float(np.median(between)) if len(between) else float("nan")
