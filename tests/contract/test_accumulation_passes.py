"""What the exactness of a window costs: the passes over the gradients, counted."""

from typing import Any

import pytest
import torch

import gradwatch
from tests.support.calls import CountCalls

from .full_batch import Batch, Words, count, loss_of, windows_of

MULTIPLICATIONS = ("_foreach_mul_", "mul_")
# Gradients of all parameters but the tied one, which is there once.
PARAMETERS = 4


class _Passes(CountCalls):
    """Counts only what writes into a gradient; the optimizer's own is told apart by its name."""

    def __init__(self, model: Words) -> None:
        super().__init__()
        self.model = model

    def is_counted(self, function: Any, args: tuple[Any, ...]) -> bool:
        first = args[0] if args else None
        targets = first if isinstance(first, (list, tuple)) else [first]
        gradients = {p.grad.data_ptr() for p in self.model.parameters() if p.grad is not None}
        return any(isinstance(t, torch.Tensor) and t.data_ptr() in gradients for t in targets)


def _passes_of_steps(
    windows: list[list[Batch]], fused: bool, weigh: Any, split: int = 0, **options: Any
) -> list[int]:
    """Return how many multiplications of the gradients each step made."""
    model = Words(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused, foreach=not fused)
    steps = []
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for window in windows:
            for batch in window:
                parts = watcher.micro_batches(batch, split) if split else [batch]
                for part in parts:
                    watcher.backward(loss_of(model, part), weight=weigh(part))
            with _Passes(model) as passes:
                assert watcher.step(last=True) is True
            steps.append(sum(passes.by_name()[name] for name in MULTIPLICATIONS))
    return steps


def _unweighed(part: Batch) -> None:
    return None


EQUAL = windows_of([[2, 2, 2]] * 3, ignored=0.0)
UNEQUAL = windows_of([[2, 3, 1], [1, 1, 3], [5, 2, 4]])


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_equal_windows_multiply_nothing(fused: bool) -> None:
    """Where all windows weigh the same there is nothing to correct, with weights and without."""
    for weigh in (_unweighed, count):
        assert _passes_of_steps(EQUAL, fused, weigh, accumulate=3) == [0, 0, 0]


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_splits_of_equal_batches_multiply_nothing(size: int, fused: bool) -> None:
    """Nor where batches of one size are split, into parts of unequal size too."""
    batches = windows_of([[5], [5], [5]], ignored=0.0)
    assert _passes_of_steps(batches, fused, _unweighed, split=size) == [0, 0, 0]


def test_a_correction_is_one_multiplication() -> None:
    """Unequal windows cost one batched multiplication per step, the clip included."""
    for clip in (None, 0.01):
        assert _passes_of_steps(UNEQUAL, False, count, accumulate=3, clip=clip) == [1, 1, 1]


def test_a_clip_of_equal_windows_is_one_multiplication() -> None:
    """The clip alone is one as well."""
    assert _passes_of_steps(EQUAL, False, count, accumulate=3, clip=0.01) == [1, 1, 1]


def test_a_fused_optimizer_corrects_by_itself() -> None:
    """A fused optimizer that clips has the correction in its own kernel: no multiplication."""
    assert _passes_of_steps(UNEQUAL, True, count, accumulate=3, clip=0.01) == [0, 0, 0]
    assert _passes_of_steps(EQUAL, True, count, accumulate=3, clip=0.01) == [0, 0, 0]


def test_short_windows_cost_one_multiplication() -> None:
    """A short last window is corrected in one pass, and in none by a fused optimizer that clips."""
    windows = windows_of([[2, 2, 2], [2, 2]], ignored=0.0)
    assert _passes_of_steps(windows, False, _unweighed, accumulate=3) == [0, 1]
    assert _passes_of_steps(windows, True, _unweighed, accumulate=3, clip=0.01) == [0, 0]


def test_the_counting_sees_multiplications() -> None:
    """The count is not blind: one multiplication by hand is one, one per parameter is as many."""
    model = Words(dtype=torch.float32)
    loss_of(model, EQUAL[0][0]).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with _Passes(model) as passes:
        torch._foreach_mul_(gradients, 2.0)
        for gradient in gradients:
            gradient.mul_(2.0)
    assert passes.by_name() == {"_foreach_mul_": 1, "mul_": PARAMETERS}
