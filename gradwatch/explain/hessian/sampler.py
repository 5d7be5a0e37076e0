"""CurvatureSampler: takes the curvature at every so many steps of a training, and harms none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradwatch.explain.curvature_every import NOT_TAKEN, CurvatureEvery, CurvatureSample
from gradwatch.explain.hessian.hutchinson import estimate_trace
from gradwatch.explain.hessian.largest_eigenpair import Eigenpair, largest_eigenpair
from gradwatch.explain.hessian.not_finite import NotFiniteError
from gradwatch.explain.hessian.of_model import hessian_of
from gradwatch.observe.arrivals import inside_backward
from gradwatch.record.sinks import warn_safely

MIXED_IN = 0.1
"""Length of the random vector that is added to the last eigenvector, whose length is 1."""

STOPPED = (
    "gradwatch takes no curvature from step {step} on: {error} The training and all other records "
    "go on. gradwatch.curvature(model, loss) tries the same at once."
)
NO_NUMBER = (
    "gradwatch has no curvature at step {step}, nor says so again at later ones: {error} The "
    "training and all other records go on."
)
IN_BACKWARD = (
    "the optimizer steps inside the backward, where weights of before and after a step are mixed. "
    "Call gradwatch.curvature(model, loss) between two steps."
)


class CurvatureSampler:
    """Takes the curvature when it is due.

    Attributes:
        busy: Whether the loss of the user is being computed; what happens then is no part of the
            training.
    """

    def __init__(self, asked: CurvatureEvery, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Takes nothing yet.

        Args:
            asked: What to take, and when.
            model: The watched model.
        """
        self.busy = False
        self._asked = asked
        self._model = model
        self._last: Eigenpair | None = None
        self._owed = False
        self._warned = False
        self._dead = False

    def __call__(self, step: int, outcome: str) -> CurvatureSample:
        """Takes the curvature after a step, if it is due.

        Args:
            step: The step, counted from 1.
            outcome: What became of it. One that a scaler has left out may show only in the next
                backward, in which nothing can be taken: the next step makes up for it.

        Returns:
            The numbers; NaN where none were taken. Nothing is raised.
        """
        self._owed |= (step - 1) % self._asked.every == 0
        if self._dead or not self._owed or outcome == "skipped_scaler":
            return NOT_TAKEN
        self._owed = False
        if inside_backward():
            self._stop(step, IN_BACKWARD)
            return NOT_TAKEN
        return self._try(step)

    def _try(self, step: int) -> CurvatureSample:
        self.busy = True
        try:
            return self._take(step)
        except NotFiniteError as error:
            self._last = None
            if not self._warned:
                self._warned = True
                warn_safely(NO_NUMBER.format(step=step, error=error))
        except Exception as error:
            self._stop(step, _named(error))
        finally:
            self.busy = False
        return NOT_TAKEN

    def _take(self, step: int) -> CurvatureSample:
        asked = self._asked
        with _without_autocast(), hessian_of(self._model, asked.loss, asked.seed) as found:
            product = found.product
            start, runner_up = self._start(product.like, step)
            limits = (asked.iterations, asked.tolerance)
            top = largest_eigenpair(product, start, *limits, runner_up)
            generator = torch.Generator().manual_seed(asked.seed)
            trace = estimate_trace(product, product.like, asked.probes, generator)
        self._last = top
        return CurvatureSample(top.value, trace.value)

    def _start(self, like: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Takes where the last search ended, the best mixed with all others."""
        generator = torch.Generator().manual_seed(self._asked.seed + step)
        fresh = torch.randn(like.shape, generator=generator).to(like)
        last = self._last
        if last is None or not _fits(last.vector, like):
            return fresh, None
        share = MIXED_IN / float(torch.linalg.vector_norm(fresh))
        return last.vector.add(fresh, alpha=share), last.runner_up

    def _stop(self, step: int, why: str) -> None:
        self._dead, self._last = True, None
        warn_safely(STOPPED.format(step=step, error=why))


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Leaves the autocast that the loop may be in; the loss can enter one of its own.

    Without its cache: that would keep the half-precision weights of this moment for the loop.
    """
    with ExitStack() as stack:
        for kind in _device_types():
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


def _device_types() -> Iterable[str]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _fits(vector: Tensor, like: Tensor) -> bool:
    return (vector.shape, vector.dtype, vector.device) == (like.shape, like.dtype, like.device)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". ") + "."
