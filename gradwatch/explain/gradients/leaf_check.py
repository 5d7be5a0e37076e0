"""The check of one tensor: along a random line through all of it, then number by number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradwatch.explain.gradients.comparison import Comparison, compare, is_wrong
from gradwatch.explain.gradients.jacobian_entry import worst_entry
from gradwatch.explain.gradients.lines import Line
from gradwatch.explain.gradients.result import GradientMismatch
from gradwatch.explain.gradients.slopes import Slopes


@dataclass(frozen=True, slots=True)
class LeafVerdict:
    """What is known of one tensor.

    Attributes:
        failure: Where its gradient is wrong; None if it is not.
        kink: Where it has none; None if no such place was met.
        traceable: Whether it moved the output by more than rounding.
    """

    failure: GradientMismatch | None = None
    kink: GradientMismatch | None = None
    traceable: bool = True


def check_leaf(
    slopes: Slopes, number: int, samples: int, generator: torch.Generator
) -> LeafVerdict:
    """Checks one tensor.

    A random line moves all its numbers at once and shows almost any error for two evaluations; a
    few of its numbers are then compared one by one. Where the line shows an error that none of
    these has, it is cut in half again and again to find one that has.

    Args:
        slopes: The derivatives of the function.
        number: The tensor's place among the leaves.
        samples: How many numbers to compare, if it has as many; the one with the largest gradient
            is among them.
        generator: What draws the line and the numbers.

    Returns:
        What was found.
    """
    bad = _first_nonfinite(slopes, number)
    if bad is not None:
        return _judge(slopes, [bad])
    whole = Line.random(number, slopes.function.leaves[number].flat, generator)
    found = compare(slopes, whole)
    suspects = _suspects(slopes, _elements(slopes, number, samples, generator))
    if not found.agrees:
        suspects = suspects or [_bisect(slopes, whole)]
        return _judge(slopes, [*suspects, whole])
    verdict = _judge(slopes, suspects)
    return LeafVerdict(verdict.failure, verdict.kink, found.traceable)


def _judge(slopes: Slopes, lines: list[Line]) -> LeafVerdict:
    """Takes lines, the worst first, until one is wrong."""
    kink = None
    for line in lines:
        found = compare(slopes, line)
        if found.agrees:
            continue
        if is_wrong(slopes, line, found):
            return LeafVerdict(failure=_mismatch(slopes, line, found, _kind(slopes, line, found)))
        kink = kink or _mismatch(slopes, line, found, "not differentiable")
    return LeafVerdict(kink=kink)


def _kind(slopes: Slopes, line: Line, found: Comparison) -> str:
    gradient = slopes.gradients[line.leaf]
    if not math.isfinite(found.analytic):
        return "not finite"
    if gradient is None or not bool(gradient.any()):
        return "detached"
    return "flat" if found.numeric == 0 else "wrong"


def _mismatch(slopes: Slopes, line: Line, found: Comparison, kind: str) -> GradientMismatch:
    leaf = slopes.function.leaves[line.leaf]
    index = leaf.index(line.start) if line.values.numel() == 1 else None
    analytic, numeric, output = found.analytic, found.numeric, ""
    if index is not None:
        analytic, numeric, output = worst_entry(slopes, line) or (analytic, numeric, output)
    return GradientMismatch(leaf.name, kind, index, analytic, numeric, output)


def _first_nonfinite(slopes: Slopes, number: int) -> Line | None:
    gradient = slopes.gradients[number]
    if gradient is None or bool(torch.isfinite(gradient).all()):
        return None
    position = int(torch.nonzero(~torch.isfinite(gradient))[0])
    return Line.element(number, position, gradient)


def _elements(slopes: Slopes, number: int, samples: int, generator: torch.Generator) -> list[Line]:
    flat, gradient = slopes.function.leaves[number].flat, slopes.gradients[number]
    size = flat.numel()
    if size <= samples:
        positions = set(range(size))
    else:
        positions = set(torch.randint(0, size, (samples,), generator=generator).tolist())
        if gradient is not None and samples:
            positions.add(int(gradient.abs().argmax()))
    return [Line.element(number, position, flat) for position in sorted(positions)]


def _suspects(slopes: Slopes, lines: list[Line]) -> list[Line]:
    """Keeps the lines that differ at the usual step, the worst first."""
    errors = []
    for place, line in enumerate(lines):
        analytic, numeric = slopes.analytic(line), slopes.numeric(line)
        error = abs(analytic - numeric)
        if not error <= slopes.allowed(line, analytic, numeric):
            errors.append((-error if math.isfinite(error) else 0.0, place))
    return [lines[place] for _, place in sorted(errors)]


def _bisect(slopes: Slopes, line: Line) -> Line:
    """Follows the half with the larger error down to one number, which is then moved alone."""
    while line.values.numel() > 1:
        middle = (line.start + line.stop) // 2
        halves = [line.part(line.start, middle), line.part(middle, line.stop)]
        line = max(halves, key=lambda half: abs(slopes.analytic(half) - slopes.numeric(half)))
    return Line.element(line.leaf, line.start, line.values)
