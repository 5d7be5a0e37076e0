"""GradientCheck: what comparing analytic with numeric gradients has found, and how it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.pickles import stable_name

_REASONS = {
    "detached": "no gradient arrives, but the output depends on it (detach, no_grad, .data?)",
    "flat": "there is a gradient, but the output does not move (rounding, straight-through?)",
    "not finite": "the gradient is not finite, but the function is",
}
_SHOWN = 20  # entries of each list: a model with thousands of parameters may be wrong in all


@stable_name
class WrongGradientError(RuntimeError):
    """A gradient is not that of its function.

    Attributes:
        check: What was found.
    """

    def __init__(self, check: GradientCheck) -> None:
        super().__init__(str(check))
        self.check = check


@stable_name
@dataclass(frozen=True, slots=True)
class GradientMismatch:
    """A tensor whose analytic gradient is not the numeric one, at the element that is worst.

    Attributes:
        name: The parameter, or the input: ``inputs[0]``, say.
        kind: ``"wrong"``; ``"detached"``: no gradient, or zeros; ``"flat"``: a gradient although
            the output is constant there; ``"not finite"``: NaN or Inf; ``"not differentiable"``:
            a kink or a jump, or a number that rounding hides; ``"contract"``: against the rules of
            ``torch.autograd.gradcheck`` for a backward, as ``message`` says.
        index: The element; ends in 0 for the real and 1 for the imaginary part of a complex one.
            None where only a direction through all of them shows it.
        analytic: Its derivative by the graph.
        numeric: Its derivative by differences, both those of ``output``.
        relative_error: Their distance as a share of the larger magnitude, 0 to 2.
        output: The number that was differentiated; empty for a random weighting of all.
        module: The innermost module whose own check fails; empty for the function itself, or for
            the module as a whole.
        function: The custom ``autograd.Function`` on the way there, or several, the last one that
            ran first; empty without.
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
        """The distance of the two as a share of the larger magnitude; NaN if one is not finite."""
        larger = max(abs(self.analytic), abs(self.numeric))
        return abs(self.analytic - self.numeric) / larger if larger else math.nan

    def __str__(self) -> str:
        """Says where and how much."""
        # gradcheck's message has its own numbers; those here are NaN.
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
@dataclass(frozen=True, slots=True)
class GradientCheck:
    """What a check has found.

    Attributes:
        subject: The class or name of what was checked.
        failures: The tensors with a wrong gradient, one entry each.
        not_differentiable: Tensors with a place where the function has no derivative, or none
            that differences can find. No fault of the function.
        untraceable: Names of tensors that move the output by no more than rounding, in analytic
            and numeric gradient: unused, behind dead units, or vanished. Nothing is known of them.
        checked: Names of all tensors that were varied.
        culprits: Where the fault is, in words: the innermost modules whose own check fails and
            the custom functions in them, or these alone.
        evaluations: How often the function was computed, and those of parts of it.
    """

    subject: str
    failures: tuple[GradientMismatch, ...]
    not_differentiable: tuple[GradientMismatch, ...]
    untraceable: tuple[str, ...]
    checked: tuple[str, ...]
    culprits: tuple[str, ...]
    evaluations: int

    @property
    def ok(self) -> bool:
        """Whether no gradient is wrong."""
        return not self.failures

    def raise_if_wrong(self) -> None:
        """Raises a :class:`WrongGradientError` if a gradient is wrong, for tests."""
        if self.failures:
            raise WrongGradientError(self)

    def __bool__(self) -> bool:
        """Tells whether it is ok."""
        return self.ok

    def __str__(self) -> str:
        """Says what is wrong and where, the place to look at first."""
        effort = f"({self.evaluations} evaluations in float64)"
        tensors = f"{len(self.checked)} tensor" + "s" * (len(self.checked) != 1)
        verdict = "right for" if self.ok else f"WRONG for {len(self.failures)} of"
        lines = [f"Gradients of {self.subject}: {verdict} {tensors} {effort}."]
        lines += [f"  Look at {culprit}." for culprit in self.culprits]
        lines += [f"  {failure}" for failure in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            lines.append(f"  and {len(self.failures) - _SHOWN} more")
        if self.not_differentiable:
            lines.append("  Not differentiable here, which is no fault:")
            lines += [f"    {mismatch}" for mismatch in self.not_differentiable[:_SHOWN]]
        if self.untraceable:
            names = ", ".join(self.untraceable[:_SHOWN])
            more = len(self.untraceable) - _SHOWN
            names += f" and {more} more" if more > 0 else ""
            lines.append(f"  Without influence above rounding, so not checked: {names}")
        return "\n".join(lines)
