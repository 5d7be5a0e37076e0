"""CurvatureEvery: what ``watch(curvature=)`` takes, and the two numbers that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from gradwatch.control.checks import check_between, check_count

if TYPE_CHECKING:
    from gradwatch.explain.hessian.sampler import CurvatureSampler

_NOT_A_FUNCTION = (
    "CurvatureEvery(loss=) must be a function without arguments, or of the model, that returns the "
    "loss, got {loss!r} of type {kind}. Write CurvatureEvery(200, lambda: criterion(model(x), y)) "
    "with a batch x, y that stays the same."
)


class CurvatureSample(NamedTuple):
    """What is kept of the curvature at a step.

    Attributes:
        largest_eigenvalue: Of the Hessian.
        trace: Its trace.
    """

    largest_eigenvalue: float = math.nan
    trace: float = math.nan


NOT_TAKEN = CurvatureSample()

TakeCurvature: TypeAlias = Callable[[int, str], CurvatureSample]
"""What a step and its outcome are told to, when it is over."""


def never(step: int, outcome: str) -> CurvatureSample:
    """Takes nothing, at any step."""
    return NOT_TAKEN


@dataclass(frozen=True, slots=True)
class CurvatureEvery:
    r"""Takes the curvature of the loss along a training, for ``watch(curvature=)``.

    After step 1, and then after every so many steps of the first optimizer, the largest eigenvalue
    of the Hessian and its trace go into the columns ``hessian_eigenvalue`` and ``hessian_trace`` of
    that step, for the weights that the step has left. The Hessian is that of all parameters of the
    model that require a gradient, whichever optimizer steps them. :func:`gradwatch.curvature` is
    the same for one moment, and has the smallest eigenvalue and standard errors besides.

    It costs a forward and a backward that records its graph, and about two backwards for each
    product of the Hessian with a vector: at most ``iterations`` for the eigenvalue, far fewer as
    soon as there is a search from the time before to go on from, and ``probes`` for the trace.
    :attr:`gradwatch.Watcher.overhead` counts it. Between the steps at which it is taken two vectors
    of the size of the model are kept, the eigenvector and the runner-up; at them a dozen, and the
    graph of the batch, next to the gradients of the step. On a device it waits for the numbers.

    The training is not changed: ``.grad`` fields, buffers, training flags, and the random numbers
    of torch, Python and NumPy stay as they are, and no hook that waits for a gradient is called. A
    function that fails, or a loss that cannot be differentiated twice, is warned of once, and the
    columns stay NaN from there on; a loss or Hessian that is not finite is a NaN for that step.

    Args:
        every: Steps from one time to the next, at least 1.
        loss: Returns the loss: a mean over a batch, neither scaled by a ``GradScaler`` nor divided
            for accumulation. Called without arguments, or with the model if it takes one, free of
            its data-parallel wrapper and uncompiled. Give it one batch that stays the same, or the
            numbers follow the batches. Random numbers, dropout's say, are the same each time, from
            ``seed``. Whether layers are in training mode is as the loop has left it. It must not
            call ``backward``.
        iterations: The most products to spend on the eigenvalue, at least 1.
        tolerance: The error of the eigenvalue at which to stop, as a share of the largest magnitude
            seen, between 0 and 1.
        probes: Products to spend on the trace, with the same random signs each time, so that a
            trend is not theirs; 0 leaves it out.
        seed: Where the random numbers start.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of bounds.

    References:
        Pearlmutter: Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.
        Hutchinson: A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines. Communications in Statistics 19(2), 1990.
        Cohen, Kaur, Li, Kolter, Talwalkar: Gradient Descent on Neural Networks Typically Occurs at
        the Edge of Stability. ICLR 2021, arXiv 2103.00065: without momentum the eigenvalue rises to
        about 2 / learning rate, and stays there.

    Example:
        >>> import torch, gradwatch
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> loss = lambda: x[0] ** 4 + x[1] ** 2
        >>> optimizer = torch.optim.SGD([x], lr=0.1)
        >>> with gradwatch.watch({"x": x}, optimizer, curvature=CurvatureEvery(2, loss)) as watcher:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss().backward()
        ...         optimizer.step()
        >>> [round(value, 2) for value in watcher.history.steps()["hessian_eigenvalue"]]
        [4.32, nan, 2.53]
    """

    every: int
    loss: Callable[..., Any] = field(repr=False)
    iterations: int = 20
    tolerance: float = 1e-2
    probes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what was given."""
        from gradwatch.explain.hessian.loss_of import arguments

        check_count("CurvatureEvery(every=)", self.every, 1)
        given: object = self.loss
        if not callable(given) or arguments(given) not in (0, 1):
            kind = type(given).__name__
            raise TypeError(_NOT_A_FUNCTION.format(loss=given, kind=kind))
        check_count("CurvatureEvery(iterations=)", self.iterations, 1)
        check_between("CurvatureEvery(tolerance=)", self.tolerance, 0.0, 1.0, "Write 1e-2.")
        check_count("CurvatureEvery(probes=)", self.probes, 0)


def sampler_of(
    asked: CurvatureEvery | None, model: nn.Module | Mapping[str, Tensor]
) -> CurvatureSampler | None:
    """Makes what takes the curvature, where it is asked for.

    Args:
        asked: What is asked for.
        model: The watched model.

    Returns:
        None where nothing is.

    Raises:
        TypeError: If parameters are in half precision or sharded.
        ValueError: If nothing is trainable.
    """
    if asked is None:
        return None
    from gradwatch.explain.hessian.of_model import trainable
    from gradwatch.explain.hessian.sampler import CurvatureSampler

    trainable(model)
    return CurvatureSampler(asked, model)
