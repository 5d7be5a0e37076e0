"""check_gradients: whether the gradients that a function gives are those that it has."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from gradwatch.checks import check_between
from gradwatch.gradcheck.culprits import Culprit, find_culprits, first_calls, functions_between
from gradwatch.gradcheck.function import Leaf, Repeatable, evaluate_first
from gradwatch.gradcheck.result import GradientCheck, GradientMismatch, WrongGradientError
from gradwatch.gradcheck.slopes import Comparison, Line, Slopes, Tolerance, compare, is_wrong
from gradwatch.pickles import stable_name

__all__ = ["GradientCheck", "GradientMismatch", "WrongGradientError", "check_gradients"]

_SMALL = 4096  # numbers in all tensors; torch's gradcheck takes time in proportion to them
_CANDIDATES = 4  # outputs that are differentiated alone to name one: a backward each

_BROKEN = (RuntimeError, TypeError, AttributeError, NotImplementedError)
_BAD_SAMPLES = (
    "check_gradients(samples=) must be a whole number of at least 0, got {samples!r}. "
    "Write 8, or more to look at more elements of each tensor."
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
    _check_options(samples, eps, rtol, atol)
    # A caller's no_grad or inference_mode, in a validation loop say, would leave no graph.
    with torch.inference_mode(False), torch.enable_grad():
        return _check(function, inputs, Tolerance(eps, rtol, atol), samples, seed, forward_ad)


def _check_options(samples: object, eps: float, rtol: float, atol: float) -> None:
    # bool is an int in Python: samples=True would mean one.
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(_BAD_SAMPLES.format(samples=samples))
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
    subject, name = evaluate_first(function, inputs), _name(function)
    try:
        slopes = Slopes(subject, tolerance, seed)
        # On the CPU, whatever the device, so that the same seed checks the same elements.
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
    )


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
    """What is known of one tensor.

    Attributes:
        failure: Where its gradient is wrong; None if it is not.
        kink: Where it has none; None if no such point was met.
        traceable: Whether it moved the output by more than rounding.
    """

    failure: GradientMismatch | None = None
    kink: GradientMismatch | None = None
    traceable: bool = True


def _check_leaf(
    slopes: Slopes, number: int, samples: int, generator: torch.Generator
) -> LeafResult:
    """Checks one tensor.

    A random line moves all its numbers at once and shows almost any error for two evaluations; a
    few of its numbers are then compared one by one. Where the line shows an error that none of
    these has, it is cut in half again and again to find one that has.
    """
    nonfinite = _first_nonfinite(slopes, number)
    if nonfinite is not None:
        return _first_wrong(slopes, [nonfinite])
    whole = Line.random(number, slopes.function.leaves[number].flat, generator)
    found = compare(slopes, whole)
    suspects = _suspects(slopes, _elements(slopes, number, samples, generator))
    if not found.agrees:
        # The whole line comes last: an index says more to the user than a direction.
        return _first_wrong(slopes, [*(suspects or [_bisect(slopes, whole)]), whole])
    return replace(_first_wrong(slopes, suspects), traceable=found.traceable)


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
        # Of thousands few are drawn: an error that makes its gradient stand out is not missed.
        if gradient is not None and samples:
            positions.add(int(gradient.abs().argmax()))
    return [Line.element(number, position, flat) for position in sorted(positions)]


def _suspects(slopes: Slopes, lines: list[Line]) -> list[Line]:
    """Keeps the lines that differ at the usual step, the worst first."""
    errors = []
    for index, line in enumerate(lines):
        analytic, numeric = slopes.analytic(line), slopes.numeric(line)
        error = abs(analytic - numeric)
        if not error <= slopes.allowed(line, analytic, numeric):  # NaN too
            # NaN has no order, and would leave the sort in any: it goes last.
            errors.append((-error if math.isfinite(error) else 0.0, index))
    return [lines[index] for _, index in sorted(errors)]


def _bisect(slopes: Slopes, line: Line) -> Line:
    """Follows the half with the larger error down to one number, which is then moved alone."""
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
    # Zeros too: a Function's backward is given zeros for an output that was detached behind it.
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
    """Looks at the outputs that one number moves most, and picks that with the largest error.

    Returns:
        The analytic and the numeric derivative of one output, and which it is; None if the
        function has one number as its output, complex ones, or none that differs by itself.
    """
    outputs = slopes.weights
    if sum(w.numel() for w in outputs) == 1 or any(w.is_complex() for w in outputs):
        return None
    changes = slopes.changes(line)
    largest = [_largest(changed) for changed in changes]
    candidates = sorted(
        (-size, output, position) for output, top in enumerate(largest) for size, position in top
    )[:_CANDIDATES]
    # One by one: a weighting of all outputs, as in Slopes, would not tell which one is wrong.
    found = [_entry(slopes, line, changes, output, at) for _, output, at in candidates]
    analytic, numeric, label = max(found, key=lambda entry: abs(entry[0] - entry[1]))
    if abs(analytic - numeric) <= slopes.allowed(line, analytic, numeric):
        return None
    return analytic, numeric, label


def _largest(changed: Tensor) -> list[tuple[float, int]]:
    # topk would put a NaN, of an output that is no number nearby, above all others.
    sizes, positions = (
        changed.reshape(-1).abs().nan_to_num(0.0).topk(min(_CANDIDATES, changed.numel()))
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
    index = torch.unravel_index(torch.tensor(position), changed.shape)
    label = slopes.paths[output] + (str([int(i) for i in index]) if changed.ndim else "")
    return analytic, float(changed.reshape(-1)[position]), label


def _blame(
    results: list[LeafResult], subject: Repeatable, culprits: list[Culprit]
) -> list[GradientMismatch]:
    """Names for each failure the first culprit that was called with its module or after it."""
    called = {call.name: order for order, call in enumerate(first_calls(subject))}
    blamed = []
    for failure in (result.failure for result in results if result.failure is not None):
        # Inputs, and parameters of the whole itself, are there before the first call.
        since = called.get(failure.name.rpartition(".")[0], -1)
        culprit = next((c for c in culprits if c.order >= since), culprits[-1])
        functions = ", ".join(culprit.functions)
        blamed.append(replace(failure, module=culprit.module, function=functions))
    return blamed


def _check_contract(
    slopes: Slopes, results: list[LeafResult], forward_ad: bool
) -> list[GradientMismatch]:
    """Runs those tests of gradcheck that the comparison does not make, if asked in forward mode."""
    subject, message = slopes.function, ""
    kinks = any(result.kink is not None for result in results)
    size = sum(leaf.flat.numel() for leaf in subject.leaves)
    if not kinks and not slopes.sparse and size <= _SMALL:
        # Undefined gradients, repeated backwards. Not the numbers: they were compared already,
        # and better, for gradcheck knows no kinks. No tolerance but a huge one leaves them out.
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
    """Runs ``torch.autograd.gradcheck``; returns what is wrong, empty if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then raises
            torch.autograd.gradcheck(
                lambda *values: _finite_outputs(function, values),
                tuple(leaf.tensor for leaf in leaves),
                fast_mode=not _is_complex(function),
                **options,
            )
    except GradcheckError as error:
        # What follows explains the fast mode's random projections, which the user never made.
        text = " ".join(str(error).split()).partition(" The above quantities")[0]
        return f"torch.autograd.gradcheck says: {text[:400]}"
    except _BROKEN as error:
        said = f"{type(error).__name__}: {error}"[:400]
        return f"fails where torch.autograd.gradcheck leaves out the gradient of an output: {said}"
    return ""


def _finite_outputs(function: Repeatable, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # An Inf, as masks make them, has no differences.
    found = [tensor for _, tensor in function.outputs(values)]
    return tuple(torch.where(torch.isfinite(tensor.detach()), tensor, 0.0) for tensor in found)


def _is_complex(function: Repeatable) -> bool:
    tensors = [*(leaf.tensor for leaf in function.leaves), *(t for _, t in function.outputs())]
    return any(tensor.is_complex() for tensor in tensors)
