"""What a training that nobody watches does to its gradients, in float64 and without gradwatch.

A backward is seen where all of them pass, `torch.autograd.backward`, and a step by torch's own hook
on all optimizers. So the same training can be run twice, by itself and watched, and compared.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import gradwatch
from tests.support.float64 import gradient_norms, total


@dataclass
class Taken:
    """One step of an optimizer.

    Attributes:
        before: Norm after the last backward that reached its gradients, in true units.
        after: Norm of what it steps with, in true units.
        losses: What the backwards of its window were run with: as the loop divided them, without
            the loss scale.
    """

    before: float
    after: float
    losses: list[float]


@dataclass
class Followed:
    """An optimizer that the training has built, and its window so far."""

    optimizer: Optimizer
    steps: list[Taken] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before: float = 0.0

    def gradients(self) -> list[Tensor | None]:
        """Return copies of the gradients, None where there is none."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [None if p.grad is None else p.grad.detach().clone() for p in held]

    def norm(self) -> float:
        """Return the L2 norm of the gradients that are there."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return total(gradient_norms({str(index): p for index, p in enumerate(held)}))


@dataclass
class Reference:
    """The optimizers that stepped, in the order of their first steps.

    Attributes:
        scale: Returns the loss scale.
        stepped: The optimizers.
    """

    scale: Callable[[], float] = lambda: 1.0
    stepped: list[Followed] = field(default_factory=list)
    built: list[Followed] = field(default_factory=list)

    def after_backward(self, losses: Sequence[float], before: list[list[Tensor | None]]) -> None:
        """Note a backward, given the gradients of each optimizer as they were before it."""
        for one, old in zip(self.built, before, strict=True):
            if not _differ(old, one.gradients()):
                continue
            if not any(grad is not None and bool((grad != 0).any()) for grad in old):
                one.losses = []
            one.losses.append(sum(losses) / self.scale())
            one.before = one.norm() / self.scale()

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Note a step; one with a closure, once that has returned."""
        one = next(one for one in self.built if one.optimizer is optimizer)
        if not any(one is other for other in self.stepped):
            self.stepped.append(one)
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None:
            self._note(one)
            return None

        def noting(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._note(one)
            return result

        return (args[0], noting), {}

    def _note(self, one: Followed) -> None:
        one.steps.append(Taken(one.before, one.norm(), list(one.losses)))
        one.losses = []


def _differ(old: list[Tensor | None], new: list[Tensor | None]) -> bool:
    pairs = zip(old, new, strict=False)  # groups may have been added
    return any(b is not None and (a is None or not torch.equal(a, b)) for a, b in pairs)


@contextlib.contextmanager
def recorded(scale: Callable[[], float] = lambda: 1.0) -> Iterator[Reference]:
    """Record all optimizers that are built in a block."""
    reference = Reference(scale)
    backward, build = torch.autograd.backward, Optimizer.__init__

    @functools.wraps(backward)
    def seen(tensors: Any, *args: Any, **kwargs: Any) -> None:
        before = [one.gradients() for one in reference.built]
        backward(tensors, *args, **kwargs)
        several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        reference.after_backward([float(loss.detach().sum()) for loss in several], before)

    def built(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        reference.built.append(Followed(self))

    handle = register_optimizer_step_pre_hook(reference.before_step)
    try:
        with (
            mock.patch.object(torch.autograd, "backward", seen),
            mock.patch.object(Optimizer, "__init__", built),
        ):
            yield reference
    finally:
        handle.remove()


def expect_as(reference: Reference, watcher: gradwatch.Watcher, divisor: float = 1.0) -> None:
    """Assert that a watcher has recorded the steps of the same training, run by itself.

    Args:
        reference: That training.
        watcher: Of the watched one.
        divisor: What the loop divides the loss of each micro-batch by. The recorded loss of a step
            with one backward is what that was run with; with several, the mean before the division
            or NaN.
    """
    steps = watcher.history.steps().reset_index()
    groups = [group for _, group in steps.groupby("optimizer", sort=False)]
    assert [len(g) for g in groups] == [len(one.steps) for one in reference.stepped]
    near = functools.partial(pytest.approx, rel=1e-5, abs=1e-12, nan_ok=True)
    for one, group in zip(reference.stepped, groups, strict=True):
        before, after = [t.before for t in one.steps], [t.after for t in one.steps]
        assert group["grad_norm"].tolist() == near(before)
        assert group["grad_norm_clipped"].tolist() == near(after)
        factors = [a / b if b else 1.0 for a, b in zip(after, before, strict=True)]
        assert group["clip_coef"].tolist() == near(factors)
        assert group["micro_batches"].tolist() == [len(t.losses) for t in one.steps]
        for taken, loss in zip(one.steps, group["loss"].tolist(), strict=True):
            mean = sum(taken.losses) / max(len(taken.losses), 1) * divisor
            assert loss != loss or loss == near(mean)
        assert (group["outcome"] == "applied").all()


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two sets of weights are the same, to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(torch.nan_to_num(one[name]), torch.nan_to_num(other[name])) for name in one
    )
