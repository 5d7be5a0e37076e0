"""Measures the curvature between two steps, as a :class:`CurvatureEvery` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradwatch.errors import warn_safely
from gradwatch.hessian.every import CurvatureEvery, CurvatureSample
from gradwatch.hessian.of_model import hessian_of
from gradwatch.hessian.spectrum import (
    Eigenpair,
    NotFiniteError,
    estimate_trace,
    largest_eigenpair,
    random_like,
)
from gradwatch.hooks.backward import inside_backward
from gradwatch.hooks.context import autocast_kinds

_STOPPED = (
    "gradwatch measures no curvature from step {step} on: {error} The training and all other "
    "records go on. To see the error at once, call gradwatch.curvature(model, loss)."
)
_NO_NUMBER = (
    "gradwatch has no curvature at step {step} (later steps without one are not reported): {error} "
    "The training and all other records go on."
)
_IN_BACKWARD = (
    "the optimizer steps inside the backward, where weights from before and after a step are "
    "mixed. Call gradwatch.curvature(model, loss) between two steps."
)

_MIXED_IN = 0.1  # length of the random vector that is added to the last eigenvector (length 1)

NOT_TAKEN = CurvatureSample()


class CurvatureSampler:
    """Measures the curvature when it is due.

    Attributes:
        busy: Whether the user's loss is being computed; forwards and backwards are then not part
            of the training.
    """

    def __init__(self, asked: CurvatureEvery, model: nn.Module | Mapping[str, Tensor]) -> None:
        self.busy = False
        self._asked = asked
        self._model = model
        self._last: Eigenpair | None = None
        self._due = False
        self._warned = False
        self._stopped = False

    def __call__(self, step: int, outcome: str) -> CurvatureSample:
        """Measures the curvature after a step, if it is due.

        Args:
            step: Number of the step, from 1.
            outcome: Outcome of the step. A skip by a scaler may become known only in the next
                backward, in which nothing can be measured: then the next step is measured instead.

        Returns:
            NaN if nothing was measured. Never raises.
        """
        self._due |= (step - 1) % self._asked.every == 0
        if self._stopped or not self._due or outcome == "skipped_scaler":
            return NOT_TAKEN
        self._due = False
        # An optimizer in parameter hooks steps inside the autograd engine.
        if inside_backward():
            self._stop(step, _IN_BACKWARD)
            return NOT_TAKEN
        return self._try(step)

    def _try(self, step: int) -> CurvatureSample:
        self.busy = True
        try:
            return self._measure(step)
        except NotFiniteError as error:
            # The vectors of the previous search may have overflowed: start over next time.
            self._last = None
            if not self._warned:
                self._warned = True
                warn_safely(_NO_NUMBER.format(step=step, error=error))
        except Exception as error:  # whatever the user's function raises: the training goes on
            self._stop(step, f"{type(error).__name__}: {error}".rstrip(". ") + ".")
        finally:
            self.busy = False
        return NOT_TAKEN

    def _measure(self, step: int) -> CurvatureSample:
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
        """Returns the last eigenvector plus a little noise, and the runner-up of that search."""
        generator = torch.Generator().manual_seed(self._asked.seed + step)
        fresh = random_like(like, generator)
        last = self._last
        # The model may have been moved or unfrozen since then.
        if last is None or not _fits(last.vector, like):
            return fresh, None
        share = _MIXED_IN / float(torch.linalg.vector_norm(fresh))
        return last.vector.add(fresh, alpha=share), last.runner_up

    def _stop(self, step: int, why: str) -> None:
        self._stopped, self._last = True, None  # frees two vectors of the size of the model
        warn_safely(_STOPPED.format(step=step, error=why))


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Disables autocast for the block, in case the loop uses it; the loss may enter its own."""
    with ExitStack() as stack:
        for kind in (one for one in autocast_kinds() if torch.is_autocast_enabled(one)):
            # Without the cache: it would keep half-precision copies of the current weights, and the
            # loop would go on using them.
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


def _fits(vector: Tensor, like: Tensor) -> bool:
    return (vector.shape, vector.dtype, vector.device) == (like.shape, like.dtype, like.device)
