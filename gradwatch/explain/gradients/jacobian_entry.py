"""The single entry of a Jacobian that is most wrong, in numbers that a reader can recompute."""

from __future__ import annotations

import torch

from gradwatch.explain.gradients.lines import Line
from gradwatch.explain.gradients.slopes import Slopes

_TRIED = 4


def worst_entry(slopes: Slopes, line: Line) -> tuple[float, float, str] | None:
    """Looks at the outputs that one number moves most, and picks that with the largest error.

    Args:
        slopes: The derivatives of a weighting of all outputs.
        line: The line of one number.

    Returns:
        The analytic and the numeric derivative of one output, and the place of it; None if the
        function has one number as its output, complex ones, or none that differs by itself.
    """
    outputs = slopes.weights
    if sum(w.numel() for w in outputs) == 1 or any(w.is_complex() for w in outputs):
        return None
    changes = slopes.changes(line)
    candidates = sorted(
        (
            (-abs(float(change)), place, int(position))
            for place, changed in enumerate(changes)
            for change, position in _largest(changed)
        ),
    )[:_TRIED]
    found = [_entry(slopes, line, changes, place, at) for _, place, at in candidates]
    analytic, numeric, label = max(found, key=lambda entry: abs(entry[0] - entry[1]))
    if abs(analytic - numeric) <= slopes.allowed(line, analytic, numeric):
        return None
    return analytic, numeric, label


def _largest(changed: torch.Tensor) -> list[tuple[float, int]]:
    flat = changed.reshape(-1)
    values, places = flat.abs().nan_to_num(0.0).topk(min(_TRIED, flat.numel()))
    return list(zip(values.tolist(), places.tolist(), strict=True))


def _entry(
    slopes: Slopes, line: Line, changes: list[torch.Tensor], place: int, position: int
) -> tuple[float, float, str]:
    weights = [torch.zeros_like(w) for w in slopes.weights]
    weights[place].view(-1)[position] = 1.0
    gradient = slopes.differentiate(weights)[line.leaf]
    analytic = 0.0 if gradient is None else float(gradient[line.start])
    index = torch.unravel_index(torch.tensor(position), changes[place].shape)
    where = str([int(i) for i in index]) if changes[place].ndim else ""
    return analytic, float(changes[place].reshape(-1)[position]), slopes.places[place] + where
