"""CurvatureEvery: measures the curvature every N steps without changing the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from gradwatch.checks import check_between, check_count, described
from gradwatch.pickles import stable_name

if TYPE_CHECKING:
    from gradwatch.hessian.sampler import CurvatureSampler

_NOT_A_FUNCTION = (
    "CurvatureEvery(loss=) must be a function without arguments, or of the model, that returns the "
    "loss, got {loss}. Write CurvatureEvery(200, lambda: criterion(model(x), y)) "
    "with a batch x, y that stays the same."
)


@stable_name
@dataclass(frozen=True, slots=True)
class CurvatureEvery:
    r"""Measures the curvature of the loss during training, for ``watch(curvature=)``.

    After step 1, and then every ``every`` steps of the first optimizer, the largest eigenvalue of
    the Hessian and its trace are written to the columns ``hessian_eigenvalue`` and
    ``hessian_trace`` of that step. They belong to the weights after the step. The Hessian is taken
    with respect to all parameters of the model that require a gradient, whichever optimizer steps
    them. :func:`gradwatch.curvature` measures the same once, and also returns the smallest
    eigenvalue and standard errors.

    Cost: one forward and one backward that records its graph, and about two backward passes per
    Hessian-vector product. There are at most ``iterations`` products for the eigenvalue, far fewer
    once a previous search can be continued, and ``probes`` for the trace.
    :attr:`gradwatch.Watcher.overhead` includes it. Between measurements two vectors of the size of
    the model are kept, the eigenvector and the runner-up; during one about a dozen, and the graph
    of the batch, in addition to the gradients of the step. On a GPU it waits for the numbers.

    The training is not changed: ``.grad`` fields, buffers, training flags and the random states of
    torch, Python and NumPy stay as they are, and no hook that waits for a gradient is called. If
    the function fails, or the loss cannot be differentiated twice, there is one warning and the
    columns stay NaN from then on. If the loss or the Hessian is not finite, that step has NaN.

    Args:
        every: Number of steps between measurements, at least 1.
        loss: Function that returns the loss: the mean over a batch, neither scaled by a
            ``GradScaler`` nor divided for accumulation. It is called without arguments, or with the
            model if it takes one (without data-parallel and ``torch.compile`` wrappers). Use the
            same batch each time; otherwise the numbers follow the batches. Random numbers, such as
            those of dropout, are the same each time, from ``seed``. Layers stay in the mode
            (training or not) that the loop has set. It must not call ``backward``.
        iterations: Maximum number of products for the eigenvalue, at least 1.
        tolerance: Stop when the error of the eigenvalue is below this share of the largest
            magnitude seen, between 0 and 1.
        probes: Number of products for the trace; 0 for no trace. The random signs are the same each
            time, so that a trend does not come from them.
        seed: Seed of the random numbers.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of bounds.

    References:
        Pearlmutter: Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.
        Hutchinson: A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines. Communications in Statistics 19(2), 1990.
        Cohen, Kaur, Li, Kolter, Talwalkar: Gradient Descent on Neural Networks Typically Occurs at
        the Edge of Stability. ICLR 2021, arXiv 2103.00065: without momentum the eigenvalue rises to
        about 2 / learning rate and stays there.

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
        """Checks the arguments."""
        from gradwatch.hessian.of_model import arguments  # here, as watch() only needs the class

        check_count("CurvatureEvery(every=)", self.every, 1)
        given: object = self.loss
        if not callable(given) or arguments(given) not in (0, 1):
            raise TypeError(_NOT_A_FUNCTION.format(loss=described(given)))
        check_count("CurvatureEvery(iterations=)", self.iterations, 1)
        check_between("CurvatureEvery(tolerance=)", self.tolerance, 0.0, 1.0, "Write 1e-2.")
        check_count("CurvatureEvery(probes=)", self.probes, 0)


@stable_name
class CurvatureSample(NamedTuple):
    """The curvature recorded for a step; NaN where it was not measured.

    Attributes:
        largest_eigenvalue: Largest eigenvalue of the Hessian.
        trace: Trace of the Hessian.
    """

    largest_eigenvalue: float = math.nan
    trace: float = math.nan


def sampler_of(
    asked: CurvatureEvery | None, model: nn.Module | Mapping[str, Tensor]
) -> CurvatureSampler | None:
    """Returns the sampler for ``watch(curvature=)``; None for None.

    Raises:
        TypeError: If parameters are in half precision or sharded.
        ValueError: If no parameter requires a gradient.
    """
    if asked is None:
        return None
    from gradwatch.hessian.of_model import trainable  # few runs need it
    from gradwatch.hessian.sampler import CurvatureSampler

    # Raise now, before training begins: during training it could only be a warning.
    trainable(model)
    return CurvatureSampler(asked, model)
