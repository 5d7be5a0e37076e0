"""Derivatives along a line, by the graph and by finite differences, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradwatch.gradcheck.function import Leaf, Repeatable
from gradwatch.measure.devices import exact_dtype, in_double

_REENTRANT = (
    "check_gradients was given a function with a reentrant checkpoint, which writes into the .grad "
    "of everything that it holds. Write checkpoint(..., use_reentrant=False) in it, or pass the "
    "module itself, of which a copy is checked."
)
_LEAST_SCALE = 1e-2
_JITTER = 100  # usual steps: far enough from a kink, too near to meet another one
_COARSE_JITTER = 2  # below float64, where a usual step is long already
_STEPS = (1.0, 1 / 16, 16.0, 1 / 256, 256.0)  # the usual step, then those that help most often
_COARSE_STEPS = (1.0, 1 / 4, 4.0)


@dataclass(frozen=True, eq=False)
class Line:
    """A direction in which consecutive elements of one leaf are varied.

    Attributes:
        leaf: Index of the leaf.
        start: The first position in ``flat``.
        values: float64 ``[n]``: how far each element from there moves per unit of the step.
    """

    leaf: int
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + self.values.numel()

    def part(self, start: int, stop: int) -> Line:
        """Returns the part of the line between two positions in ``flat``."""
        return Line(self.leaf, start, self.values[start - self.start : stop - self.start])

    @classmethod
    def element(cls, leaf: int, position: int, like: Tensor) -> Line:
        """Makes the line that varies one element alone, on the device of ``like``."""
        return cls(leaf, position, in_double(torch.ones_like(like[:1])))

    @classmethod
    def along(cls, leaf: int, gradient: Tensor) -> Line:
        """Makes the line along a gradient ``[n]``, where the derivative is largest."""
        size = float(torch.linalg.vector_norm(gradient)) / math.sqrt(gradient.numel())
        return cls(leaf, 0, gradient / size)

    @classmethod
    def random(cls, leaf: int, like: Tensor, generator: torch.Generator) -> Line:
        """Makes a line that moves every element of ``like`` ``[n]`` by ±0.5 to 1.5."""
        values = _random_signs(tuple(like.shape), generator)
        has_double = exact_dtype(like.device) is torch.float64
        return cls(leaf, 0, values.to(like.device) if has_double else values)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What counts as equal.

    Attributes:
        eps: Step of the differences, as a multiple of the leaf's root mean square.
        rtol: Allowed difference as a share of the larger derivative.
        atol: Allowed absolute difference, in addition to ``rtol``.
        precision: The coarsest dtype that the function computes in.
    """

    eps: float
    rtol: float
    atol: float
    precision: torch.dtype = torch.float64

    @classmethod
    def of(cls, eps: float, rtol: float, atol: float, precision: torch.dtype) -> Tolerance:
        """Widens what the user asked for to what a precision allows.

        The step that balances rounding and curvature is the third root of the rounding unit. Below
        float64 a step may cross kinks, and gradients are themselves rounded.
        """
        if precision is torch.float64:
            return cls(eps, rtol, atol)
        unit = torch.finfo(precision).eps
        least = 5e-3 if unit < 1e-6 else 0.1  # float32, or half precision
        return cls(max(eps, unit ** (1 / 3)), max(rtol, least), atol, precision)

    @property
    def coarse(self) -> bool:
        """Whether the function computes in less than float64."""
        return self.precision is not torch.float64

    @property
    def rounding(self) -> float:
        """By how much outputs may be rounded, as a share of their size."""
        unit = torch.finfo(self.precision).eps
        return (16 if unit < 1e-6 else 4) * unit


class Slopes:
    r"""The derivatives of :math:`L = \sum_j w_j y_j` for the outputs :math:`y` of a function.

    The weights are random signs times 0.5 to 1.5, so that errors in two outputs do not cancel; a
    single number has the weight 1. Numeric derivatives are central differences,
    :math:`(y(t + h) - y(t - h)) / 2h` with an error of :math:`O(h^2)`, summed after the
    subtraction. A complex step would have no rounding error at all, but torch's piecewise functions
    (ReLU, max, abs) do not take complex numbers.

    Attributes:
        function: The function that is differentiated.
        tolerance: The step, and what counts as equal.
        paths: Path of each output in what the function returns, such as ``output['loss']``.
        weights: The w of each output, with its shape and dtype.
        sparse: Whether a gradient came as a sparse tensor.
        reentrant: Whether the function has a reentrant checkpoint, which only ``backward()`` runs.
        gradients: For each leaf the gradient of L, float64 ``[n]``; None if no graph leads to it.
        scales: For each leaf the unit of its step.

    References:
        Baydin, Pearlmutter, Radul, Siskind: Automatic Differentiation in Machine Learning: a
        Survey. JMLR 18, 2018, arXiv 1502.05767, section 2.1 on the choice of the step.
        torch.autograd.gradcheck, whose fast mode compares along random lines too.
    """

    def __init__(self, function: Repeatable, tolerance: Tolerance, seed: int) -> None:
        """Evaluates the function, which must have outputs, and computes its gradient."""
        self.function = function
        self.tolerance = tolerance
        self.sparse = self.reentrant = False
        outputs = function.outputs()
        generator = torch.Generator().manual_seed(seed)
        self.weights = [_weights(tensor, generator, len(outputs) == 1) for _, tensor in outputs]
        self.paths = [path for path, _ in outputs]
        self._rounding = tolerance.rounding * _size(self.weights, outputs)
        self.gradients = self.differentiate(self.weights, outputs)
        self.scales = [_scale(leaf) for leaf in function.leaves]

    def differentiate(
        self, weights: Sequence[Tensor], outputs: Sequence[tuple[str, Tensor]] | None = None
    ) -> list[Tensor | None]:
        """Computes the gradient of the weighted sum of the outputs by the graph.

        Args:
            weights: One tensor per output, with its shape.
            outputs: Outputs whose graph is unused; None to evaluate the function again.

        Returns:
            For each leaf float64 ``[n]``, or None if no graph leads to it.
        """
        outputs = self.function.outputs() if outputs is None else outputs
        # torch.autograd.grad refuses an output without a graph, even among others.
        ends = [(y, w) for w, (_, y) in zip(weights, outputs, strict=True) if y.requires_grad]
        leaves = [leaf.tensor for leaf in self.function.leaves]
        if not ends:
            return [None] * len(leaves)
        heads, seeds = [y for y, _ in ends], [w for _, w in ends]
        found = self._gradients(heads, leaves, seeds)
        self.sparse |= any(g is not None and g.layout is not torch.strided for g in found)
        return [None if g is None else _flat(g) for g in found]

    def _gradients(
        self, heads: list[Tensor], leaves: list[Tensor], seeds: list[Tensor]
    ) -> Sequence[Tensor | None]:
        if not self.reentrant:
            try:
                return torch.autograd.grad(heads, leaves, seeds, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
        if self.function.module is None:  # backward() would write to the .grad of whatever it holds
            raise TypeError(_REENTRANT)
        self.reentrant = True
        heads = [y for _, y in self.function.outputs() if y.requires_grad]
        torch.autograd.backward(heads, seeds)
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    def analytic(self, line: Line) -> float:
        """Computes the derivative along a line from the gradient."""
        gradient = self.gradients[line.leaf]
        if gradient is None:
            return 0.0
        return float(torch.dot(gradient[line.start : line.stop], line.values))

    def changes(self, line: Line, factor: float = 1.0) -> list[Tensor]:
        """Computes the derivatives of all outputs along a line by central differences.

        Args:
            line: Which elements move, and how far per unit of the step.
            factor: Multiplies the usual step.

        Returns:
            A tensor for each output; all NaN if the function raises an error at these values.
        """
        step = factor * self.tolerance.eps * self.scales[line.leaf]
        try:
            above, below = self._moved(line, step), self._moved(line, -step)
            pairs = zip(above, below, self.weights, strict=True)
            # A weight of 0 marks an output that is not finite, where Inf - Inf would give NaN.
            return [
                torch.where(_wide(w) != 0, (_wide(a) - _wide(b)) / (2 * step), 0.0)
                for a, b, w in pairs
            ]
        except (RuntimeError, ValueError):  # outside the domain of the function
            return [torch.full_like(_wide(w), math.nan) for w in self.weights]

    def numeric(self, line: Line, factor: float = 1.0) -> float:
        """Computes the derivative along a line by central differences; see :meth:`changes`."""
        changes = self.changes(line, factor)
        return sum(float(_inner(w, c)) for w, c in zip(self.weights, changes, strict=True))

    @contextmanager
    def nearby(self, sign: float) -> Iterator[Slopes]:
        """Moves all leaves a little by random amounts, and yields the slopes there.

        Args:
            sign: 1 or -1, for two points on opposite sides.
        """
        generator = torch.Generator().manual_seed(0)
        jitter = self.tolerance.eps * (_COARSE_JITTER if self.tolerance.coarse else _JITTER)
        saved = [leaf.flat.clone() for leaf in self.function.leaves]
        try:
            for leaf, scale in zip(self.function.leaves, self.scales, strict=True):
                # Each element by another amount: otherwise a tie of two would stay a tie.
                moves = Line.random(0, leaf.flat, generator).values
                _move_(leaf.flat, moves, sign * jitter * scale)
            # The gradient differs at that point, so it needs Slopes of its own.
            yield Slopes(self.function, self.tolerance, 0)
        finally:
            # Copy the values back: subtracting the moves would leave rounding errors.
            for leaf, values in zip(self.function.leaves, saved, strict=True):
                leaf.flat.copy_(values)

    def allowed(self, line: Line, analytic: float, numeric: float, factor: float = 1.0) -> float:
        """Returns the difference up to which two derivatives count as equal.

        ``factor`` multiplies the usual step.
        """
        # Outputs are rounded in proportion to their size; dividing by the step amplifies that.
        rounding = self._rounding / (factor * self.tolerance.eps * self.scales[line.leaf])
        relative = self.tolerance.rtol * max(abs(analytic), abs(numeric))
        return relative + self.tolerance.atol + rounding

    def _moved(self, line: Line, step: float) -> list[Tensor]:
        part = self.function.leaves[line.leaf].flat[line.start : line.stop]
        saved = part.clone()
        try:
            _move_(part, line.values, step)
            return [tensor.detach() for _, tensor in self.function.outputs()]
        finally:
            part.copy_(saved)


def whole_lines(slopes: Slopes, number: int, generator: torch.Generator) -> list[Line]:
    """Makes the lines along which all elements of a leaf are varied at once.

    A random one in float64. In a lower precision one along the gradient too, in which rounding
    matters least, and two more random ones.
    """
    flat, gradient = slopes.function.leaves[number].flat, slopes.gradients[number]
    lines = [Line.random(number, flat, generator)]
    if slopes.tolerance.coarse:
        lines += [Line.random(number, flat, generator) for _ in range(2)]
        if gradient is not None and bool(gradient.any()):
            lines.append(Line.along(number, gradient))
    return lines


def _scale(leaf: Leaf) -> float:
    """Returns the unit of a leaf's step: its root mean square, but at least 0.01."""
    # Without the minimum, weights that start at zero would have a step of zero.
    rms = float(torch.linalg.vector_norm(leaf.flat)) / math.sqrt(leaf.flat.numel() or 1)
    return max(_LEAST_SCALE, rms)


def _random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws numbers of 0.5 to 1.5 with random signs, on the CPU: the same for every device."""
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    return numbers * (torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1)


def _move_(elements: Tensor, values: Tensor, step: float) -> None:
    """Adds a multiple of float64 values, which are on the CPU if the device has no float64."""
    if values.device != elements.device:
        values = values.to(elements)
    elements.add_(values, alpha=step)


def _weights(output: Tensor, generator: torch.Generator, alone: bool) -> Tensor:
    shape = (*output.shape, 2) if output.is_complex() else tuple(output.shape)
    numbers = _random_signs(shape, generator)
    if alone and numbers.numel() == 1:
        numbers = torch.ones_like(numbers)
    weights = torch.view_as_complex(numbers) if output.is_complex() else numbers
    # An output of -Inf, as masks make them, has no derivative: its weight is 0.
    return torch.where(torch.isfinite(output.detach()), weights.to(output), 0.0)


def _size(weights: Sequence[Tensor], outputs: Sequence[tuple[str, Tensor]]) -> float:
    # The root of the sum of squares: independent rounding errors add up like that.
    products = [
        torch.where(_wide(w) != 0, _wide(w) * _wide(y.detach()), 0.0)
        for w, (_, y) in zip(weights, outputs, strict=True)
    ]
    return math.sqrt(sum(float(product.abs().square().sum()) for product in products))


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient.detach() if gradient.layout is torch.strided else gradient.to_dense()
    # view_as_real refuses the lazy conjugate that conj() in a complex backward leaves.
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return in_double(real.reshape(-1))


def _wide(values: Tensor) -> Tensor:
    # Differences of outputs in half precision would be rounded once more.
    return in_double(values)


def _inner(weights: Tensor, changes: Tensor) -> Tensor:
    # torch's convention: the gradient of a real number by a complex one is conjugated.
    product = _wide(weights).conj() * changes
    return product.real.sum() if product.is_complex() else product.sum()


@dataclass(frozen=True, slots=True)
class Comparison:
    """One derivative, computed in two ways.

    Attributes:
        analytic: The derivative by the graph.
        numeric: The derivative by central differences.
        agrees: Whether the two are equal within the tolerance.
        stable: Whether several steps give the same numeric derivative. If not, the difference may
            come from a jump or from rounding.
        traceable: Whether one of the two is larger than the allowed difference.
    """

    analytic: float
    numeric: float
    agrees: bool
    stable: bool = True
    traceable: bool = True


def _steps_to_try(tolerance: Tolerance) -> Sequence[float]:
    return _COARSE_STEPS if tolerance.coarse else _STEPS


def compare(slopes: Slopes, line: Line) -> Comparison:
    """Compares the derivatives along a line; if they differ, tries other steps.

    A smaller step may avoid a kink nearby; a larger one may rise above the rounding of large
    outputs.
    """
    analytic = slopes.analytic(line)
    tried: list[float] = []
    factors = _steps_to_try(slopes.tolerance)
    for factor in factors:
        numeric = slopes.numeric(line, factor)
        tried.append(numeric)
        # A step below the usual one amplifies the rounding; in float64 there is little of it.
        smaller = min(factor, 1.0) if slopes.tolerance.coarse else 1.0
        allowed = slopes.allowed(line, analytic, numeric, smaller)
        if abs(analytic - numeric) <= allowed:
            traceable = max(abs(analytic), abs(numeric)) > allowed
            return Comparison(analytic, numeric, True, traceable=traceable)
    order = sorted(range(len(factors)), key=factors.__getitem__)
    return _disagreement(analytic, [tried[i] for i in order])


def _disagreement(analytic: float, numeric: list[float]) -> Comparison:
    # Take the neighboring steps that agree best: larger ones may meet kinks, smaller ones rounding.
    pairs = [(abs(a - b), b) for a, b in pairwise(numeric) if math.isfinite(a - b)]
    if not pairs:
        return Comparison(analytic, math.nan, False, stable=False)
    spread, best = min(pairs)
    stable = not math.isfinite(analytic) or 4 * spread < abs(analytic - best)
    return Comparison(analytic, best, False, stable)


def is_wrong(slopes: Slopes, line: Line, found: Comparison) -> bool:
    """Tells a wrong gradient from a point at which the function has none.

    A kink is a single point, but a wrong gradient is also wrong next to it. So the derivatives are
    compared again at two points nearby, with all leaves moved by random amounts in opposite
    directions. A NaN gradient of a finite function is always wrong: training would meet it.
    """
    if not math.isfinite(found.analytic):
        return math.isfinite(slopes.numeric(line))
    verdicts = []
    for sign in (1.0, -1.0):
        try:
            with slopes.nearby(sign) as moved:
                again = compare(moved, line)
        except (RuntimeError, ValueError):  # outside the domain of the function
            continue
        verdicts.append(not again.agrees and again.stable)
    # Coarse steps are as long as the way to the next kink: one such point can be the odd one.
    return bool(verdicts) and (all if slopes.tolerance.coarse else any)(verdicts)
