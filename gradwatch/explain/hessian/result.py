"""Curvature: the numbers that say how a loss bends, and how they read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curvature:
    """How a loss bends around the weights that a model has.

    Attributes:
        loss: The loss there.
        largest_eigenvalue: The largest eigenvalue of the Hessian, in units of the loss per squared
            unit of a weight: the curvature in the steepest valley wall.
        smallest_eigenvalue: The smallest one; clearly negative at a saddle or a ridge.
        trace: The sum of all eigenvalues; NaN if ``probes=0``.
        trace_stderr: Its standard error; 0 where it is exact.
        iterations: Products spent on the eigenvalues.
        probes: Products spent on the trace.
        converged: Whether both eigenvalues are within the tolerance.
        parameters: How many numbers the Hessian has rows.
        unused: The names of parameters that the loss does not depend on; their rows are zero.
    """

    loss: float
    largest_eigenvalue: float
    smallest_eigenvalue: float
    trace: float
    trace_stderr: float
    iterations: int
    probes: int
    converged: bool
    parameters: int
    unused: tuple[str, ...] = ()

    @property
    def dominant_eigenvalue(self) -> float:
        """The eigenvalue of largest magnitude, with its sign."""
        return max(self.largest_eigenvalue, self.smallest_eigenvalue, key=abs)

    @property
    def learning_rate_limit(self) -> float:
        """Where plain gradient descent begins to oscillate: 2 / largest eigenvalue.

        Inf where no direction bends upwards. Momentum β raises it to (2 + 2β) / largest; adaptive
        optimizers have another one. Cohen et al., ICLR 2021, arXiv 2103.00065.
        """
        top = self.largest_eigenvalue
        return 2 / top if top > 0 else math.inf

    def __str__(self) -> str:
        """Says it in two or three lines."""
        eigenvalues = f"{self.smallest_eigenvalue:.4g} to {self.largest_eigenvalue:.4g}"
        effort = f"{self.iterations} products" + ("" if self.converged else ", not converged")
        head = f"Curvature over {self.parameters:,} parameters at loss {self.loss:.4g}: "
        lines = [
            f"{head}eigenvalues from {eigenvalues} ({effort}){self._trace_text()}.",
            f"Plain gradient descent oscillates above a learning rate of {self._limit_text()}.",
        ]
        if self.unused:
            lines.append(f"The loss does not depend on {', '.join(self.unused)}.")
        return "\n".join(lines)

    def _limit_text(self) -> str:
        return f"{self.learning_rate_limit:.3g} (2 / largest eigenvalue)"

    def _trace_text(self) -> str:
        if not self.probes:
            return ""
        if not self.trace_stderr:
            return f", trace {self.trace:.4g} (exact, {self.probes} products)"
        return f", trace {self.trace:.4g} ± {self.trace_stderr:.2g} ({self.probes} products)"
