"""Which optimizers step for an object that wraps some: what is followed, split up or refused."""

import collections
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks.optimizer import stepped_by, wrapped_in
from tests.support import float64


class _NoInit(torch.optim.Optimizer):
    """As Accelerate's and Opacus' wrappers: an Optimizer that never calls Optimizer.__init__."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure=None):
        return self.inner.step(closure)


class _Lookahead(_NoInit):
    """As timm's: it has hooks of its own, which nobody calls."""

    def __init__(self, inner):
        super().__init__(inner)
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()


class _Plain:
    """A wrapper that is no Optimizer, as of warm-up schedules."""

    def __init__(self, inner):
        self.optimizer = inner

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


class _Both(_NoInit):
    """Two optimizers on different parameters behind one step()."""

    def __init__(self, first, second):
        self.first, self.second = first, second
        self.param_groups = [*first.param_groups, *second.param_groups]

    def step(self, closure=None):
        self.first.step()
        self.second.step()


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def _train(model, optimizer, steps=3):
    for _ in range(steps):
        model.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("wrap", [_NoInit, _Lookahead, _Plain])
@pytest.mark.parametrize("deep", [False, True])
def test_a_wrapper_is_followed_by_what_it_steps(wrap, deep):
    """The rows, and the clip, are those of the optimizer inside, each step once."""
    model = _model()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = wrap(_NoInit(inner) if deep else inner)
    before = [p.detach().clone() for p in model.parameters()]
    with gradwatch.watch(model, optimizer, clip=1e-3) as watcher:
        _train(model, optimizer)
    steps = watcher.history.steps()
    assert steps["optimizer"].tolist() == ["SGD"] * 3
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() <= 3.1e-3


def test_two_optimizers_in_one_are_followed_each():
    """A wrapper whose parts hold different parameters is as a list of them."""
    model = _model()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[1].parameters(), lr=0.1)
    optimizer = _Both(first, second)
    with gradwatch.watch(model, optimizer) as watcher:
        _train(model, optimizer)
    assert watcher.history.steps()["optimizer"].tolist() == ["SGD", "Adam"] * 3
    with pytest.raises(ValueError, match="holds 2 optimizers"):
        gradwatch.watch(model, {"both": optimizer})


def test_what_cannot_be_followed_is_refused():
    """An optimizer that runs no hooks and steps by itself: the error says what to pass."""

    class Own(_NoInit):
        def __init__(self, parameters):
            self.param_groups, self.state = [{"params": list(parameters)}], {}

    model = _model()
    with pytest.raises(ValueError, match=r"a Own, on which torch runs no step hooks.*Pass the opt"):
        gradwatch.watch(model, Own(model.parameters()))


def test_a_scheduler_is_no_optimizer():
    """It holds one, but has no zero_grad(): passed by mistake, it is refused."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        gradwatch.watch(model, scheduler)


def test_only_optimizers_of_the_same_parameters_count():
    """One that a wrapper holds for another purpose is not what it steps."""
    model, other = _model(), _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.helper = torch.optim.SGD(other.parameters(), lr=0.1)
    assert len(wrapped_in(optimizer)) == 1
    assert [id(one) for one in stepped_by(optimizer)] == [id(optimizer)]


def test_a_step_that_failed_does_not_hide_the_next_ones():
    """Where the wrapper's step raises, the steps of the optimizer inside still count."""

    class TwoStep(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})
            self.base = torch.optim.SGD(self.param_groups, lr=0.1)

        def step(self, closure=None):
            raise NotImplementedError

    model = _model()
    optimizer = TwoStep(model.parameters())
    with gradwatch.watch(model, optimizer) as watcher:
        model(torch.ones(4, 3)).sum().backward()
        with pytest.raises(NotImplementedError):
            optimizer.step()
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(4, 3)).sum().backward()
            optimizer.base.step()
    assert len(watcher.history.steps()) == 2


class Warmed(torch.optim.Adam):
    """Adam that sets its rate in its own step, and leaves the rest to its parent."""

    def step(self, closure=None):
        """Steps as its parent does."""
        self.param_groups[0]["lr"] *= 0.9
        return super().step(closure)


class Counted(Warmed):
    """Counts its steps, and fails in one of them."""

    steps = 0

    def step(self, closure=None):
        """Steps as its parent does, which calls its own."""
        self.steps += 1
        loss = super().step(closure)
        if self.steps == 2:
            raise OSError
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_step_that_calls_its_parents_is_one_step(named, with_closure):
    """torch calls the hooks in both methods, once optimizers of both classes have been built."""
    for parent in (torch.optim.Adam, Warmed):
        parent([nn.Parameter(torch.ones(1))])
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = Counted(model.parameters(), lr=0.01)
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean() * (math.nan if now == 3 else 1.0)
        loss.backward()
        norms.append(float64.gradient_norm(model))
        return loss

    with gradwatch.watch(
        model, optimizer if named else None, clip=0.5, on_nonfinite="skip"
    ) as watcher:
        for now in range(5):
            if not with_closure:
                closure()
            try:
                optimizer.step(*[closure] * with_closure)
            except OSError:
                assert now == 1
                norms.pop()  # no step, and nothing of it is left to the next one
    steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms, nan_ok=True)
    assert steps["micro_batches"].tolist() == [1] * 4
    assert [one == "skipped_nonfinite" for one in steps["outcome"]] == [False, False, True, False]
