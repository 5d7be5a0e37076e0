"""GradientCheck: the result of comparing analytic with numeric gradients, and its text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.pickles import stable_name
from gradwatch.record.schema import loads_older

_REASONS = {
    "detached": "no gradient arrives, but the output depends on it (detach, no_grad, .data?)",
    "flat": "there is a gradient, but the output does not change (rounding, straight-through?)",
    "not finite": "the gradient is not finite, but the function is",
}
_SHOWN = 20  # entries shown of each list: thousands of parameters may have a wrong gradient


@stable_name
class WrongGradientError(RuntimeError):
    """A function's backward returns a wrong gradient.

    Attributes:
        check: The full result, with all failures.
    """

    def __init__(self, check: GradientCheck) -> None:
        super().__init__(str(check))
        self.check = check


@stable_name
@dataclass(frozen=True, slots=True)
class GradientMismatch:
    """A tensor whose analytic and numeric gradients differ, with its worst element.

    Attributes:
        name: Name of the parameter, or of the input, such as ``inputs[0]``.
        kind: ``"wrong"``; ``"detached"``: no gradient, or zeros; ``"flat"``: a gradient although
            the output is constant there; ``"not finite"``: NaN or Inf; ``"not differentiable"``:
            a kink or a jump, or a derivative hidden by rounding; ``"contract"``: the backward
            breaks a rule of ``torch.autograd.gradcheck``, given in ``message``.
        index: Index of the element. For a complex tensor it has one more entry: 0 for the real, 1
            for the imaginary part. None if only a direction through all elements shows the error.
        analytic: Derivative of ``output`` by the graph.
        numeric: Derivative of ``output`` by finite differences.
        relative_error: Their difference divided by the larger magnitude, 0 to 2.
        output: The output that was differentiated; empty for a random weighting of all outputs.
        module: The innermost module whose own check fails; empty for the function or module as a
            whole.
        function: The custom ``autograd.Function`` on the path, or several, separated by commas and
            starting from the outputs; empty if there is none.
        message: What gradcheck said; empty for the other kinds.
    """

    name: str
    kind: str
    index: tuple[int, ...] | None
    analytic: float
    numeric: float
    output: str = ""
    module: str = ""
    function: str = ""
    message: str = ""

    @property
    def relative_error(self) -> float:
        """The difference divided by the larger magnitude; NaN if one is not finite."""
        larger = max(abs(self.analytic), abs(self.numeric))
        return abs(self.analytic - self.numeric) / larger if larger else math.nan

    def __str__(self) -> str:
        """Says which element differs, and by how much."""
        # gradcheck's message has numbers of its own; the fields here are NaN.
        if self.message:
            return self.message
        parts = [
            f"{self.name}{list(self.index) if self.index else ''}: analytic {self.analytic:.6g}",
            f"numeric {self.numeric:.6g}",
        ]
        if math.isfinite(self.relative_error):
            parts.append(f"relative error {self.relative_error:.2g}")
        if self.output:
            parts.append(f"for {self.output}")
        reason = f"; {_REASONS[self.kind]}" if self.kind in _REASONS else ""
        return ", ".join(parts) + reason


@stable_name
@loads_older
@dataclass(frozen=True, slots=True)
class GradientCheck:
    """The result of :func:`gradwatch.check_gradients`; true if no gradient is wrong.

    Attributes:
        subject: Class or name of what was checked.
        failures: One entry for each tensor with a wrong gradient.
        not_differentiable: Tensors at which the function has no derivative, or none that finite
            differences can find. This is not an error.
        untraceable: Names of tensors that change the output by no more than rounding, by both
            gradients: unused, behind dead units, or vanished. Their gradients could not be checked.
        checked: Names of all tensors that were varied.
        culprits: Where the error is, in words: the innermost modules whose own check fails, with
            the custom functions in them, or only such functions.
        evaluations: How often the function, or a part of it, was evaluated.
        precision: Name of the dtype that was compared in: ``"float64"``, or the coarsest one that
            the function computes in, with steps and tolerances that fit it.
    """

    subject: str
    failures: tuple[GradientMismatch, ...]
    not_differentiable: tuple[GradientMismatch, ...]
    untraceable: tuple[str, ...]
    checked: tuple[str, ...]
    culprits: tuple[str, ...]
    evaluations: int
    precision: str = "float64"

    @property
    def ok(self) -> bool:
        """Whether no gradient is wrong."""
        return not self.failures

    def raise_if_wrong(self) -> None:
        """Raises a :class:`WrongGradientError` if a gradient is wrong; meant for tests."""
        if self.failures:
            raise WrongGradientError(self)

    def __bool__(self) -> bool:
        """The same as ``ok``."""
        return self.ok

    def __str__(self) -> str:
        """Says what is wrong; the lines with the place to look at come first."""
        effort = f"({self.evaluations} evaluations in {self.precision})"
        tensors = f"{len(self.checked)} tensor" + "s" * (len(self.checked) != 1)
        verdict = "right for" if self.ok else f"WRONG for {len(self.failures)} of"
        lines = [f"Gradients of {self.subject}: {verdict} {tensors} {effort}."]
        lines += [f"  Look at {culprit}." for culprit in self.culprits]
        lines += [f"  {failure}" for failure in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            lines.append(f"  and {len(self.failures) - _SHOWN} more")
        if self.not_differentiable:
            lines.append("  Not differentiable here, which is not an error:")
            lines += [f"    {mismatch}" for mismatch in self.not_differentiable[:_SHOWN]]
        if self.untraceable:
            names = ", ".join(self.untraceable[:_SHOWN])
            more = len(self.untraceable) - _SHOWN
            names += f" and {more} more" if more > 0 else ""
            lines.append(f"  No effect on the output above rounding, so not checked: {names}")
        return "\n".join(lines)
