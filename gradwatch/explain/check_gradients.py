"""check_gradients: whether the gradients that a function gives are those that it has."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradwatch.control.checks import check_between
from gradwatch.explain.gradients.contract import backward_contract, forward_contract
from gradwatch.explain.gradients.culprits import (
    Culprit,
    find_culprits,
    first_calls,
    functions_between,
)
from gradwatch.explain.gradients.first_evaluation import evaluate_first
from gradwatch.explain.gradients.leaf_check import LeafVerdict, check_leaf
from gradwatch.explain.gradients.lines import Tolerance
from gradwatch.explain.gradients.repeatable import Repeatable
from gradwatch.explain.gradients.result import GradientCheck, GradientMismatch, WrongGradientError
from gradwatch.explain.gradients.slopes import Slopes

__all__ = ["GradientCheck", "GradientMismatch", "WrongGradientError", "check_gradients"]

_SMALL = 4096  # numbers in all tensors, up to which gradcheck's own tests are run


def check_gradients(
    function: Callable[..., Any],
    inputs: Any,
    *,
    samples: int = 8,
    eps: float = 1e-6,
    rtol: float = 1e-4,
    atol: float = 1e-8,
    forward_ad: bool = False,
    seed: int = 0,
) -> GradientCheck:
    r"""Compares the gradients of a function or module with numeric ones, in float64.

    Every parameter and input is moved along a random line, and some of its numbers by themselves.
    What differs is looked at with other steps and at places nearby, so that a kink such as that of
    ReLU at 0 is told from a wrong gradient. If a gradient is wrong, the modules inside are checked
    by themselves, with the inputs that they really got, to name the innermost one at fault and
    its custom ``autograd.Function``.

    A module is copied to float64, without its hooks, and in the mode that it is in; it, its
    ``.grad`` fields and buffers, the inputs and the states of random numbers (torch, NumPy,
    Python) stay as they are. Every evaluation sees the random numbers that the next forward would
    see, and the buffers that the module has now, so dropout and batch normalization are functions
    like others.

    What leaves a part of itself out of the graph on purpose is told as wrong, which it is: a
    straight-through estimator, say, or ``spectral_norm`` in training mode.

    It costs two evaluations of the function for each sample of each tensor and some six for each
    tensor, and some dozens for each that differs.

    Args:
        function: A function of tensors (``Square.apply``, a lambda), an ``nn.Module``, or a method
            of one. Whatever it returns, in tuples, dicts or dataclasses, counts if it is floating
            or complex.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments, with tensors inside
            in any dtype. Floating ones are checked, or, if some require a gradient, those alone.
        samples: How many numbers of a tensor to compare one by one, 0 or more; a tensor with no
            more than that is compared in full.
        eps: The step, per unit of a tensor's root mean square (at least 0.01), between 0 and 0.01.
        rtol: The difference that is let pass as a share of the larger one, between 0 and 1.
        atol: The difference that is let pass besides, and besides 16 units of rounding of the
            outputs, between 0 and 1.
        forward_ad: Whether forward-mode derivatives of the inputs are compared too.
        seed: Where the random lines and numbers start.

    Returns:
        What was found: ``.ok``, ``.failures``, ``print(check)``, ``check.raise_if_wrong()``.

    Raises:
        TypeError: If nothing can be varied, the function cannot compute in float64 or returns no
            floating tensor, or the module cannot be copied.
        ValueError: If an argument is out of bounds, the function is not deterministic, or none of
            its outputs is finite.

    References:
        torch.autograd.gradcheck, whose fast mode compares along random lines too, and whose tests
        of undefined gradients and of repeated backwards are run here where the tensors are small.
        Baydin, Pearlmutter, Radul, Siskind: Automatic Differentiation in Machine Learning: a
        Survey. JMLR 18, 2018, arXiv 1502.05767, on numeric derivatives.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**2
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return gradient * ctx.saved_tensors[0]
        >>> check = check_gradients(Square.apply, torch.tensor([1.0, 3.0]))
        >>> check.failures[0].analytic, round(check.failures[0].numeric, 3)
        (3.0, 6.0)
    """
    tolerance = _tolerance(samples, eps, rtol, atol)
    with torch.inference_mode(False), torch.enable_grad():
        return _check(function, inputs, tolerance, (samples, seed), forward_ad)


def _check(
    function: Callable[..., Any],
    inputs: Any,
    tolerance: Tolerance,
    drawn: tuple[int, int],
    forward_ad: bool,
) -> GradientCheck:
    samples, seed = drawn
    subject, kind = evaluate_first(function, inputs), _name(function)
    try:
        slopes = Slopes(subject, tolerance, seed)
        generator = torch.Generator().manual_seed(seed)
        verdicts = [check_leaf(slopes, n, samples, generator) for n in range(len(subject.leaves))]
        wrong = [n for n, verdict in enumerate(verdicts) if verdict.failure is not None]
        culprits: list[Culprit] = []
        if wrong:
            culprits, evaluations = find_culprits(subject, wrong, tolerance, kind, seed)
            failures = _blamed(verdicts, subject, culprits)
        else:
            evaluations, failures = 0, _contract(slopes, verdicts, forward_ad)
    finally:
        subject.close()
    return GradientCheck(
        subject=kind,
        failures=tuple(failures),
        not_differentiable=tuple(v.kink for v in verdicts if v.kink is not None),
        untraceable=tuple(
            leaf.name for leaf, v in zip(subject.leaves, verdicts, strict=True) if not v.traceable
        ),
        checked=tuple(leaf.name for leaf in subject.leaves),
        culprits=tuple(str(culprit) for culprit in culprits if culprit.module or culprit.functions),
        evaluations=subject.evaluations + evaluations,
    )


def _contract(
    slopes: Slopes, verdicts: list[LeafVerdict], forward_ad: bool
) -> list[GradientMismatch]:
    subject = slopes.function
    kinks = any(verdict.kink is not None for verdict in verdicts)
    size = sum(leaf.flat.numel() for leaf in subject.leaves)
    plain = not kinks and not slopes.sparse and size <= _SMALL
    message = backward_contract(subject) if plain else ""
    if forward_ad and not message:
        message = forward_contract(subject, slopes.tolerance.rtol)
    if not message:
        return []
    nan, functions = float("nan"), functions_between(subject, range(len(subject.leaves)))
    mismatch = GradientMismatch("", "contract", None, nan, nan, message=message)
    return [replace(mismatch, function=", ".join(functions))]


def _blamed(
    verdicts: list[LeafVerdict], subject: Repeatable, culprits: list[Culprit]
) -> list[GradientMismatch]:
    """Names for each failure the first culprit that was called with its module or after it."""
    failures = [verdict.failure for verdict in verdicts if verdict.failure is not None]
    called = {call.name: place for place, call in enumerate(first_calls(subject))}
    blamed = []
    for failure in failures:
        since = called.get(failure.name.rpartition(".")[0], -1)
        culprit = next((c for c in culprits if c.place >= since), culprits[-1])
        functions = ", ".join(culprit.functions)
        blamed.append(replace(failure, module=culprit.module, function=functions))
    return blamed


def _tolerance(samples: object, eps: float, rtol: float, atol: float) -> Tolerance:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(
            f"check_gradients(samples=) must be a whole number of at least 0, got {samples!r}. "
            "Write 8, or more to look at more elements of each tensor."
        )
    check_between("check_gradients(eps=)", eps, 0.0, 1e-2, "Write 1e-6.")
    check_between("check_gradients(rtol=)", rtol, 0.0, 1.0, "Write 1e-4.")
    check_between("check_gradients(atol=)", atol, 0.0, 1.0, "Write 1e-8.")
    return Tolerance(eps, rtol, atol)


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, nn.Module):
        return type(function).__name__
    name = str(getattr(function, "__qualname__", type(function).__name__))
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.apply"
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__
    return name.rpartition("<locals>.")[2]
