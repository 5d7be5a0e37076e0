"""check_gradients: checks whether a function's backward returns its true gradients."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from gradwatch.checks import check_between, shown
from gradwatch.gradcheck.culprits import Culprit, find_culprits, first_calls, functions_between
from gradwatch.gradcheck.function import Leaf, Repeatable, evaluate_first
from gradwatch.gradcheck.result import GradientCheck, GradientMismatch, WrongGradientError
from gradwatch.gradcheck.slopes import (
    Comparison,
    Line,
    Slopes,
    Tolerance,
    compare,
    is_wrong,
    whole_lines,
)
from gradwatch.hooks.context import backwards_permitted
from gradwatch.pickles import stable_name

__all__ = ["GradientCheck", "GradientMismatch", "WrongGradientError", "check_gradients"]

_SMALL = 4096  # elements of all tensors; torch's gradcheck takes time in proportion to them
_CANDIDATES = 4  # outputs that are differentiated one by one to name the worst: a backward each

_BROKEN = (RuntimeError, TypeError, AttributeError, NotImplementedError)
_NO_FORWARD_AD = (
    "check_gradients(forward_ad=True) compares in float64, and this function computes in "
    "{precision}. Leave the argument out, or the casts to a lower precision in the function."
)
_BAD_SAMPLES = (
    "check_gradients(samples=) must be a whole number of at least 0, got {samples}. "
    "Write 8, or more to compare more elements of each tensor."
)


@stable_name
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
    r"""Compares the gradients of a function or module with numeric gradients.

    Every parameter and input is varied along a random line, and some of its elements one by one. If
    the gradients differ, the comparison is repeated with other steps and at nearby points, to tell
    a kink (ReLU at 0) from a wrong gradient. If a gradient is wrong, each module inside is checked
    by itself, with the inputs that it really got, to name the innermost module at fault and its
    custom ``autograd.Function``.

    The comparison is in float64 where the function can compute in it. Where it cannot (a kernel or
    constants in float32), or continues in a lower precision inside (``.float()``, autocast), it is
    in that precision, with longer steps and wider tolerances: in float32 errors below 0.5 % are not
    seen, in half precision those below 10 %. The result says which it was (``.precision``).

    Compiled functions and modules are checked as they are: the compiled code runs, compiled again
    for the copy by the same backend.

    A module is copied, without its hooks and in its current mode (training or not). The module
    itself, its ``.grad`` fields and buffers, the inputs and the random states of torch,
    NumPy and Python stay unchanged. Every evaluation uses the random numbers that the next forward
    would use, and the current buffers, so dropout and batch normalization can be checked as well.

    A function that leaves part of its computation out of the graph on purpose, such as a
    straight-through estimator or ``spectral_norm`` in training mode, is reported as wrong, because
    its gradient is not that of its output.

    The cost is two evaluations of the function per sample of each tensor, about six more per
    tensor, and a few dozen for each tensor that differs.

    Args:
        function: A function of tensors (``Square.apply``, a lambda), an ``nn.Module``, or a method
            of one. Every floating or complex tensor that it returns is checked, also inside tuples,
            dicts and dataclasses.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments, with tensors of any
            dtype. Floating tensors are varied; if some require a gradient, only those.
        samples: How many elements of each tensor to compare one by one, 0 or more. A tensor with at
            most this many elements is compared in full.
        eps: Step of the differences, between 0 and 0.01, as a multiple of the tensor's root mean
            square (or of 0.01 if that is larger). At least the third root of the rounding unit of
            the precision: 0.005 in float32.
        rtol: Allowed difference as a share of the larger derivative, between 0 and 1. At least
            0.005 in float32, and 0.1 in half precision.
        atol: Allowed absolute difference, between 0 and 1, in addition to ``rtol`` and to 16 units
            of rounding of the outputs.
        forward_ad: Whether to compare forward-mode derivatives of the inputs too, in float64 only.
        seed: Seed of the random lines and of the choice of elements.

    Returns:
        The result: see ``.ok`` and ``.failures``, ``print(check)``, ``check.raise_if_wrong()``.

    Raises:
        TypeError: If there is nothing to vary, the function returns no floating tensor, or has a
            reentrant checkpoint and is no module; if the module cannot be copied, or was compiled
            in place; if ``forward_ad`` is set and the precision is below float64.
        ValueError: If an argument is out of bounds, the function is not deterministic, or none of
            its outputs is finite.

    References:
        torch.autograd.gradcheck, whose fast mode compares along random lines too, and whose tests
        of undefined gradients and of repeated backwards are run here if the tensors are small.
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
    _check_options(samples, eps, rtol, atol)
    # The caller may be under no_grad or inference_mode, which would leave no graph.
    with torch.inference_mode(False), torch.enable_grad(), backwards_permitted():
        return _check(function, inputs, Tolerance(eps, rtol, atol), samples, seed, forward_ad)


def _check_options(samples: object, eps: float, rtol: float, atol: float) -> None:
    # bool is an int in Python: samples=True would mean one.
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(_BAD_SAMPLES.format(samples=shown(samples)))
    check_between("check_gradients(eps=)", eps, 0.0, 1e-2, "Write 1e-6.")
    check_between("check_gradients(rtol=)", rtol, 0.0, 1.0, "Write 1e-4.")
    check_between("check_gradients(atol=)", atol, 0.0, 1.0, "Write 1e-8.")


def _check(
    function: Callable[..., Any],
    inputs: Any,
    tolerance: Tolerance,
    samples: int,
    seed: int,
    forward_ad: bool,
) -> GradientCheck:
    (subject, precision), name = evaluate_first(function, inputs), _name(function)
    tolerance = Tolerance.of(tolerance.eps, tolerance.rtol, tolerance.atol, precision)
    if tolerance.coarse and forward_ad:
        raise TypeError(_NO_FORWARD_AD.format(precision=_named(precision)))
    try:
        slopes = Slopes(subject, tolerance, seed)
        # On the CPU, so that the same seed checks the same elements on every device.
        generator = torch.Generator().manual_seed(seed)
        results = [_check_leaf(slopes, n, samples, generator) for n in range(len(subject.leaves))]
        wrong = [n for n, result in enumerate(results) if result.failure is not None]
        culprits: list[Culprit] = []
        evaluations = 0
        if wrong:
            culprits, evaluations = find_culprits(subject, wrong, tolerance, name, seed)
            failures = _blame(results, subject, culprits)
        else:
            failures = _check_contract(slopes, results, forward_ad)
    finally:
        subject.close()
    return GradientCheck(
        subject=name,
        failures=tuple(failures),
        not_differentiable=tuple(r.kink for r in results if r.kink is not None),
        untraceable=tuple(
            leaf.name for leaf, r in zip(subject.leaves, results, strict=True) if not r.traceable
        ),
        checked=tuple(leaf.name for leaf in subject.leaves),
        culprits=tuple(str(culprit) for culprit in culprits if culprit.module or culprit.functions),
        evaluations=subject.evaluations + evaluations,
        precision=_named(precision),
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, nn.Module):
        return type(function).__name__
    name = str(getattr(function, "__qualname__", type(function).__name__))
    owner = getattr(function, "__self__", None)
    # Function.apply is inherited: its own qualified name is that of torch's base class.
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.apply"
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__
    return name.rpartition("<locals>.")[2]


@dataclass(frozen=True, slots=True)
class LeafResult:
    """The result for one tensor.

    Attributes:
        failure: Where its gradient is wrong; None if it is not.
        kink: Where the function has no derivative; None if no such point was met.
        traceable: Whether the tensor changes the output by more than rounding.
    """

    failure: GradientMismatch | None = None
    kink: GradientMismatch | None = None
    traceable: bool = True


def _check_leaf(
    slopes: Slopes, number: int, samples: int, generator: torch.Generator
) -> LeafResult:
    """Checks one tensor.

    A random line varies all elements at once and reveals almost any error with two evaluations. A
    few elements are then compared one by one. If the line shows an error but none of these elements
    does, the line is halved again and again to find one that does.
    """
    nonfinite = _first_nonfinite(slopes, number)
    if nonfinite is not None:
        return _first_wrong(slopes, [nonfinite])
    lines = whole_lines(slopes, number, generator)
    found = [compare(slopes, line) for line in lines]
    suspects = _suspects(slopes, _elements(slopes, number, samples, generator))
    bad = [line for line, one in zip(lines, found, strict=True) if not one.agrees]
    if bad:
        # The whole line comes last: an index says more to the user than a direction.
        return _first_wrong(slopes, [*(suspects or [_bisect(slopes, bad[0])]), *bad])
    traceable = any(one.traceable for one in found)
    return replace(_first_wrong(slopes, suspects), traceable=traceable)


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
        drawn = torch.randint(0, size, (samples,), generator=generator, device="cpu")
        positions = set(drawn.tolist())
        # Only a few of thousands are drawn: add the largest one, which an error may stand out in.
        if gradient is not None and samples:
            positions.add(int(gradient.abs().argmax()))
    return [Line.element(number, position, flat) for position in sorted(positions)]


def _suspects(slopes: Slopes, lines: list[Line]) -> list[Line]:
    """Returns the lines that differ at the usual step, worst first."""
    errors = []
    for index, line in enumerate(lines):
        analytic, numeric = slopes.analytic(line), slopes.numeric(line)
        error = abs(analytic - numeric)
        if not error <= slopes.allowed(line, analytic, numeric):  # NaN too
            # NaN cannot be sorted: it counts as the smallest error.
            errors.append((-error if math.isfinite(error) else 0.0, index))
    return [lines[index] for _, index in sorted(errors)]


def _bisect(slopes: Slopes, line: Line) -> Line:
    """Follows the half with the larger error down to a single element."""
    while line.values.numel() > 1:
        middle = (line.start + line.stop) // 2
        halves = [line.part(line.start, middle), line.part(middle, line.stop)]
        line = max(halves, key=lambda half: abs(slopes.analytic(half) - slopes.numeric(half)))
    return Line.element(line.leaf, line.start, line.values)


def _first_wrong(slopes: Slopes, lines: list[Line]) -> LeafResult:
    kink = None
    for line in lines:
        found = compare(slopes, line)
        if found.agrees:
            continue
        if is_wrong(slopes, line, found):
            return LeafResult(failure=_mismatch(slopes, line, found, _kind(slopes, line, found)))
        kink = kink or _mismatch(slopes, line, found, "not differentiable")
    return LeafResult(kink=kink)


def _kind(slopes: Slopes, line: Line, found: Comparison) -> str:
    gradient = slopes.gradients[line.leaf]
    if not math.isfinite(found.analytic):
        return "not finite"
    # Zeros too: if an output was detached later, autograd passes zeros to its Function's backward.
    if gradient is None or not bool(gradient.any()):
        return "detached"
    return "flat" if found.numeric == 0 else "wrong"


def _mismatch(slopes: Slopes, line: Line, found: Comparison, kind: str) -> GradientMismatch:
    leaf = slopes.function.leaves[line.leaf]
    if line.values.numel() > 1:
        return GradientMismatch(leaf.name, kind, None, found.analytic, found.numeric)
    entry = _worst_entry(slopes, line) or (found.analytic, found.numeric, "")
    return GradientMismatch(leaf.name, kind, leaf.index(line.start), *entry)


def _worst_entry(slopes: Slopes, line: Line) -> tuple[float, float, str] | None:
    """Among the outputs that one element changes most, finds the one with the largest error.

    Returns:
        The analytic and the numeric derivative of one output, and its label. None if the function
        returns a single number or complex numbers, or if no output differs by itself.
    """
    outputs = slopes.weights
    if sum(w.numel() for w in outputs) == 1 or any(w.is_complex() for w in outputs):
        return None
    changes = slopes.changes(line)
    largest = [_largest(changed) for changed in changes]
    candidates = sorted(
        (-size, output, position) for output, top in enumerate(largest) for size, position in top
    )[:_CANDIDATES]
    # One by one: the weighted sum of all outputs, as in Slopes, cannot say which one is wrong.
    found = [_entry(slopes, line, changes, output, at) for _, output, at in candidates]
    analytic, numeric, label = max(found, key=lambda entry: abs(entry[0] - entry[1]))
    if abs(analytic - numeric) <= slopes.allowed(line, analytic, numeric):
        return None
    return analytic, numeric, label


def _largest(changed: Tensor) -> list[tuple[float, int]]:
    # topk would put NaN first, which a neighboring point outside the domain gives.
    sizes, positions = (
        changed.cpu().reshape(-1).abs().nan_to_num(0.0).topk(min(_CANDIDATES, changed.numel()))
    )
    return list(zip(sizes.tolist(), positions.tolist(), strict=True))


def _entry(
    slopes: Slopes, line: Line, changes: list[Tensor], output: int, position: int
) -> tuple[float, float, str]:
    weights = [torch.zeros_like(w) for w in slopes.weights]
    weights[output].view(-1)[position] = 1.0
    gradient = slopes.differentiate(weights)[line.leaf]
    analytic = 0.0 if gradient is None else float(gradient[line.start])
    changed = changes[output]
    index = np.unravel_index(position, tuple(changed.shape)) if changed.ndim else ()
    label = slopes.paths[output] + (str([int(i) for i in index]) if changed.ndim else "")
    return analytic, float(changed.reshape(-1)[position]), label


def _blame(
    results: list[LeafResult], subject: Repeatable, culprits: list[Culprit]
) -> list[GradientMismatch]:
    """Assigns to each failure the first culprit that was called with its module or after it."""
    called = {call.name: order for order, call in enumerate(first_calls(subject))}
    blamed = []
    for failure in (result.failure for result in results if result.failure is not None):
        # Inputs, and parameters of the root module, are used from before the first call.
        since = called.get(failure.name.rpartition(".")[0], -1)
        culprit = next((c for c in culprits if c.order >= since), culprits[-1])
        functions = ", ".join(culprit.functions)
        blamed.append(replace(failure, module=culprit.module, function=functions))
    return blamed


def _check_contract(
    slopes: Slopes, results: list[LeafResult], forward_ad: bool
) -> list[GradientMismatch]:
    """Runs the tests of torch's gradcheck that the comparison lacks, and those of forward mode."""
    subject, message = slopes.function, ""
    # gradcheck takes none of these; compiled code need not take an undefined gradient.
    if slopes.reentrant or slopes.tolerance.coarse or subject.compiled:
        return []
    kinks = any(result.kink is not None for result in results)
    size = sum(leaf.flat.numel() for leaf in subject.leaves)
    if not kinks and not slopes.sparse and size <= _SMALL:
        # Undefined gradients and repeated backwards. The values were compared already, and better,
        # because gradcheck does not know kinks; a huge atol is the only way to leave them out.
        message = _gradcheck(subject, subject.leaves, atol=1e300, nondet_tol=1e-10)
    if forward_ad and not message:
        message = _gradcheck(
            subject,
            subject.argument_leaves,
            rtol=slopes.tolerance.rtol,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
        )
    if not message:
        return []
    functions = ", ".join(functions_between(subject, range(len(subject.leaves))))
    nan = math.nan
    return [GradientMismatch("", "contract", None, nan, nan, function=functions, message=message)]


def _gradcheck(function: Repeatable, leaves: Sequence[Leaf], **options: Any) -> str:
    """Runs ``torch.autograd.gradcheck``; returns what is wrong, or an empty text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns before it raises the same
            torch.autograd.gradcheck(
                lambda *values: _finite_outputs(function, values),
                tuple(leaf.tensor for leaf in leaves),
                fast_mode=not _is_complex(function),
                **options,
            )
    except GradcheckError as error:
        # The rest explains random projections of the fast mode, which the user did not ask for.
        text = " ".join(str(error).split()).partition(" The above quantities")[0]
        return f"torch.autograd.gradcheck says: {text[:400]}"
    except _BROKEN as error:
        said = f"{type(error).__name__}: {error}"[:400]
        return f"fails when torch.autograd.gradcheck leaves out the gradient of an output: {said}"
    return ""


def _finite_outputs(function: Repeatable, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Differences of Inf are NaN, and masks put Inf into outputs.
    found = [tensor for _, tensor in function.outputs(values)]
    return tuple(torch.where(torch.isfinite(tensor.detach()), tensor, 0.0) for tensor in found)


def _is_complex(function: Repeatable) -> bool:
    tensors = [*(leaf.tensor for leaf in function.leaves), *(t for _, t in function.outputs())]
    return any(tensor.is_complex() for tensor in tensors)
