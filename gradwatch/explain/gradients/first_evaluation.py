"""The first evaluation of a function in float64, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.explain.gradients.narrowing import Narrowing
from gradwatch.explain.gradients.repeatable import Repeatable
from gradwatch.explain.gradients.subjects import copied, repeatable

_EQUAL = 1e-12
_NO_DOUBLES = (
    "check_gradients computes in float64, which this function does not: {reason}. It works in the "
    "precision of its inputs. Pass a module itself rather than a lambda around it, so that its "
    "weights are converted, and make constants with the dtype of an input (torch.ones_like(x), "
    "x.new_tensor(...))."
)
_NARROWS = (
    "check_gradients computes in float64, and this function goes on in a coarser precision: "
    "{where}. Differences of 1e-6 drown in its rounding. Leave out the cast, or write it as "
    ".to(x.dtype)."
)
_NO_OUTPUT = (
    "check_gradients was given a function that returns {given}, and no floating or complex tensor "
    "to differentiate. Return the loss or the outputs, alone or in a tuple, list, dict or "
    "dataclass."
)
_NO_INPUT = (
    "check_gradients was given no tensor to vary: no floating input, and no parameter that "
    "requires a gradient. Pass floating inputs, or a module itself rather than a lambda around it."
)
_RANDOM = (
    "check_gradients was given a function that is not deterministic: {place} differs by {most:.3g} "
    "between two calls with the same inputs, buffers and random numbers. Let it keep no state "
    "between calls (counters, running averages outside of buffers), and draw its random numbers "
    "from torch, NumPy's or Python's global generators."
)
_NOT_FINITE = (
    "check_gradients was given a function without a finite output for these inputs, so there is "
    "nothing to differentiate. Try inputs inside its domain."
)


def evaluate_first(function: Callable[..., Any], inputs: Any) -> Repeatable:
    """Copies a function with its inputs to float64, and makes sure that it can be differentiated.

    Args:
        function: What the user gave.
        inputs: Its inputs.

    Returns:
        The function to differentiate.

    Raises:
        TypeError: If it does not compute in float64, or has no input or output to differentiate.
        ValueError: If it is not deterministic, or not finite.
    """
    if not callable(function):
        raise TypeError(
            f"check_gradients(function=) must be a function or a module, got an object of type "
            f"{type(function).__name__}. Write check_gradients(model, (x,)), or a lambda."
        )
    call, module = copied(function, widen=True)
    subject = repeatable(call, module, inputs, only_marked=False)
    try:
        if not subject.leaves:
            raise TypeError(_NO_INPUT)
        _check_outputs(subject, _evaluate(subject, function, inputs))
    finally:
        subject.close()
    return subject


def _evaluate(
    subject: Repeatable, function: Callable[..., Any], inputs: Any
) -> list[tuple[str, Tensor]]:
    narrowing = Narrowing()
    try:
        with narrowing:
            outputs = subject.outputs()
    except Exception as error:  # whatever a user's function raises
        if _works_as_it_is(function, inputs):
            raise TypeError(_NO_DOUBLES.format(reason=str(error).rstrip("."))) from error
        raise
    if narrowing.found:
        raise TypeError(_NARROWS.format(where=narrowing.found))
    return outputs


def _works_as_it_is(function: Callable[..., Any], inputs: Any) -> bool:
    call, module = copied(function, widen=False)
    subject = repeatable(call, module, inputs, only_marked=False, widen=False)
    try:
        subject.outputs()
    except Exception:  # then precision is not what is wrong
        return False
    return True


def _check_outputs(subject: Repeatable, outputs: Sequence[tuple[str, Tensor]]) -> None:
    if not outputs:
        raise TypeError(_NO_OUTPUT.format(given="nothing of the kind"))
    if not any(bool(torch.isfinite(tensor).any()) for _, tensor in outputs):
        raise ValueError(_NOT_FINITE)
    again = subject.outputs()
    for (place, one), (_, other) in zip(outputs, again, strict=True):
        most = _distance(one.detach(), other.detach())
        if most:
            raise ValueError(_RANDOM.format(place=place, most=most))


def _distance(one: Tensor, other: Tensor) -> float:
    """Computes the largest difference; 0 where it is no more than a device's order of sums."""
    if one.shape != other.shape:
        return float("inf")
    finite = torch.isfinite(one) & torch.isfinite(other)
    most = torch.where(finite, one - other, 0.0).abs().max() if one.numel() else one.new_zeros(())
    size = torch.where(finite, one, 0.0).abs().max() if one.numel() else most.abs()
    return float(most) if float(most) > _EQUAL * float(size.abs()) else 0.0
