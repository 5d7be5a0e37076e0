"""Lines: the directions in which a function is differentiated, and how long a step is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.explain.gradients.repeatable import Leaf

_LEAST_SCALE = 1e-2


@dataclass(frozen=True, eq=False)
class Line:
    """A direction in a stretch of one leaf.

    Attributes:
        leaf: The leaf, by its place among all.
        start: The first position in ``flat``.
        values: float64 ``[n]``: how far each number from there moves per unit of the step.
    """

    leaf: int
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + self.values.numel()

    def part(self, start: int, stop: int) -> Line:
        """Cuts out a stretch, by positions in ``flat``."""
        return Line(self.leaf, start, self.values[start - self.start : stop - self.start])

    @classmethod
    def element(cls, leaf: int, position: int, like: Tensor) -> Line:
        """Makes the line of one number alone, on the device of ``like``."""
        return cls(leaf, position, torch.ones(1, dtype=torch.float64, device=like.device))

    @classmethod
    def random(cls, leaf: int, like: Tensor, generator: torch.Generator) -> Line:
        """Makes a line that moves every number by ±0.5 to 1.5, for ``like`` in ``[n]``."""
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
        values *= torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
        return cls(leaf, 0, values.to(like.device))


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What counts as equal.

    Attributes:
        eps: The step, per unit of the root mean square of what is varied.
        rtol: The share of the larger number that is let pass.
        atol: What is let pass besides.
    """

    eps: float
    rtol: float
    atol: float


def scale_of(leaf: Leaf) -> float:
    """Computes the unit of a step: the root mean square of a leaf, or 0.01 if that is less."""
    size = leaf.flat.numel()
    return max(_LEAST_SCALE, float(torch.linalg.vector_norm(leaf.flat)) / math.sqrt(size or 1))
