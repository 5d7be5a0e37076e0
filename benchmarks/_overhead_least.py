"""The least: a sketch of what any tool must do that measures and clips as gradwatch does.

Bare marks, one batched norm at the end of the backward, the clip before the step from that norm,
and nothing else: no records, no look for NaN, no notice of what the loop does to the gradients.
What gradwatch adds beyond it is gradwatch's own; what it adds itself no rewrite can take away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter, setitem
from typing import Any

import torch
from _overhead_ways import LIMITS, Step, Way
from _overhead_workloads import Training
from torch import Tensor

LEAST = "hooks, one norm, multiply if needed"

_engine = torch.autograd.Variable._execution_engine
_grad = attrgetter("grad")


class _Marks(dict[int, Tensor]):
    """The parameters that have arrived; the first one in a backward asks to be told of its end."""

    measure: Any

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        if not self:
            _engine.queue_callback(self.measure)
        super().__setitem__(index, tensor)


@contextmanager
def least(training: Training, max_norm: float) -> Iterator[Step]:
    """Lends the bare step with the sketch attached."""
    parameters, total = training.parameters, torch.zeros(())
    marks = _Marks()

    def measure() -> None:
        nonlocal total
        marks.clear()
        norms = torch._foreach_norm(list(map(_grad, parameters)), 2.0, torch.float32)
        total = torch.linalg.vector_norm(torch.stack(norms))

    def clip(*_: object) -> None:
        if total.item() > max_norm:
            factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
            torch._foreach_mul_(list(map(_grad, parameters)), factor)

    marks.measure = measure
    handles: list[Any] = [training.optimizer.register_step_pre_hook(clip)]
    for index, parameter in enumerate(parameters):
        mark = partial(setitem, marks, index)
        handles.append(parameter.register_post_accumulate_grad_hook(mark))
    try:
        yield training.step
    finally:
        for handle in handles:
            handle.remove()


def least_ways(training: Training) -> list[Way]:
    """Returns the sketch where it has nothing to clip, and where it clips every step."""
    return [Way(LEAST, partial(least, training, limit), regime) for regime, limit in LIMITS.items()]
