"""check_gradients: whether the gradients that a function gives are those that it has."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from gradwatch.checks import check_between
from gradwatch.gradcheck.culprits import Culprit, find_culprits, first_calls, functions_between
from gradwatch.gradcheck.function import Repeatable, evaluate_first
from gradwatch.gradcheck.result import GradientCheck, GradientMismatch, WrongGradientError
from gradwatch.gradcheck.slopes import Comparison, Line, Slopes, Tolerance, compare, is_wrong

__all__ = ["GradientCheck", "GradientMismatch", "WrongGradientError", "check_gradients"]


_BROKEN = (RuntimeError, TypeError, AttributeError, NotImplementedError)
_ANY = 1e300  # gradients were compared already, and better: gradcheck knows no kinks


def backward_contract(function: Repeatable) -> str:
    """Tests a backward for undefined gradients, for ignoring what it is given, and for repeating.

    Args:
        function: A small function without kinks nearby, whose gradients are right.

    Returns:
        What is wrong; empty if nothing is.

    References:
        torch.autograd.gradcheck, of which these are the checks besides the numbers.
    """
    leaves = tuple(leaf.tensor for leaf in function.leaves)
    return _first_line(
        lambda: torch.autograd.gradcheck(
            _outputs_of(function),
            leaves,
            atol=_ANY,
            nondet_tol=1e-10,
            fast_mode=not _is_complex(function),
        )
    )


def forward_contract(function: Repeatable, rtol: float) -> str:
    """Compares derivatives in forward mode with numeric ones.

    Args:
        function: A function; its leaves among its arguments are looked at.
        rtol: The share of the larger number that is let pass.

    Returns:
        What is wrong; empty if nothing is.
    """
    leaves = tuple(leaf.tensor for leaf in function.argument_leaves)
    return _first_line(
        lambda: torch.autograd.gradcheck(
            _outputs_of(function),
            leaves,
            rtol=rtol,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
            fast_mode=not _is_complex(function),
        )
    )


def _outputs_of(function: Repeatable) -> Callable[..., tuple[Tensor, ...]]:
    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        # An Inf, as masks make them, has no differences.
        found = [tensor for _, tensor in function.outputs(values)]
        return tuple(torch.where(torch.isfinite(tensor.detach()), tensor, 0.0) for tensor in found)

    return outputs


def _is_complex(function: Repeatable) -> bool:
    tensors = [*(leaf.tensor for leaf in function.leaves), *(t for _, t in function.outputs())]
    return any(tensor.is_complex() for tensor in tensors)


def _first_line(check: Callable[[], bool]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then raises
            check()
    except GradcheckError as error:
        text = " ".join(str(error).split()).partition(" The above quantities")[0]
        return f"torch.autograd.gradcheck says: {text[:400]}"
    except _BROKEN as error:
        said = f"{type(error).__name__}: {error}"[:400]
        return f"fails where torch.autograd.gradcheck leaves out the gradient of an output: {said}"
    return ""


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
