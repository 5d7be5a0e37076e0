"""A skipped or refused step leaves everything as before, however its optimizer evaluates a closure."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gradwatch
from tests.support.calls import CountCalls
from tests.support.state import identical


class SAM(Optimizer):
    """Perturbs the weights between two evaluations; takes the perturbation back by subtraction."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "rho": 0.05, "momentum": 0.9})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure):
        """Climbs, evaluates again and descends."""
        closure = torch.enable_grad()(closure)
        closure()
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in own]).norm()
        for p in own:
            self.state[p]["climbed"] = 0.05 * p.grad / norm
            p.add_(self.state[p]["climbed"])
        loss = closure()
        for p in own:
            p.sub_(self.state[p]["climbed"])
        self.base.step()
        return loss


class MovesFirst(Optimizer):
    """Looks ahead before it evaluates its closure, once, and counts in its group and by itself."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure):
        """Moves, evaluates, and moves on."""
        for p in self.param_groups[0]["params"]:
            p.mul_(0.99)
        with torch.enable_grad():
            loss = closure()
        self.steps += 1
        self.param_groups[0]["count"] += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


class Once(Optimizer):
    """Evaluates its closure once and first, as nearly all do; counts in its group."""

    def __init__(self, params, lr=0.1, twice_from=math.inf):
        super().__init__(params, {"lr": lr, "count": 0})
        self.twice_from = twice_from

    @torch.no_grad()
    def step(self, closure=None):
        """Descends, and from some step on evaluates once more."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        group["count"] += 1
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=group["lr"])
        if group["count"] >= self.twice_from:
            with torch.enable_grad():
                closure()
        return loss


class Lookahead(Optimizer):
    """Goes back half of the way every second step, whether or not there was a gradient."""

    def __init__(self, params, inner=torch.optim.SGD):
        self.inner = inner(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        for p in self.param_groups[0]["params"]:
            self.state[p]["slow"] = p.detach().clone()
        self.param_groups[0]["count"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        """Steps the inner optimizer, and sometimes goes back."""
        loss = self.inner.step(closure)
        self.param_groups[0]["count"] += 1
        if self.param_groups[0]["count"] % 2 == 0:
            for p in self.param_groups[0]["params"]:
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))
        return loss


MAKE = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "strong_wolfe": lambda p: torch.optim.LBFGS(
        p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    ),
    "SAM": SAM,
    "moves first": MovesFirst,
    "once": Once,
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Lookahead": Lookahead,
    "Lookahead of LBFGS": lambda p: Lookahead(p, torch.optim.LBFGS),
}


def _state(model, optimizer):
    inside = [one for one in vars(optimizer).values() if isinstance(one, Optimizer)]
    states = [
        (
            {i: dict(one.state[p]) for i, p in enumerate(model.parameters()) if p in one.state},
            [{k: v for k, v in g.items() if k != "params"} for g in one.param_groups],
        )
        for one in (optimizer, *inside)
    ]
    counters = {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float))}
    return copy.deepcopy((list(model.parameters()), states, counters))


class _Run:
    """Four steps with a closure, one evaluation of which is poisoned; the state around that step."""

    def __init__(self, make, step, evaluation, named=True, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        optimizer = make(net.parameters())
        x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
        self.error = ""
        self.evaluated = 0

        def closure():
            self.evaluated += 1
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            if now == step and self.evaluated == evaluation:
                loss = loss * math.nan
            loss.backward()
            return loss

        with gradwatch.watch(net, optimizer if named else None, **options) as self.watcher:
            for now in range(4):
                self.evaluated, before = 0, _state(net, optimizer)
                try:
                    returned = optimizer.step(closure)
                except gradwatch.NonFiniteGradientError as error:
                    returned, self.error = None, str(error)
                if now == step:
                    self.before, self.after = before, _state(net, optimizer)
                    self.returned, self.reached = returned, self.evaluated >= evaluation
                    self.gradients = [p.grad for p in net.parameters()]
        self.outcomes = list(self.watcher.history.steps()["outcome"])
        self.events = [event for event in self.watcher.events if event.kind != "nan"]


@pytest.mark.parametrize(
    "named",
    [pytest.param(True, id="named"), pytest.param(False, id="found", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", MAKE)
def test_a_skip_leaves_everything_as_before(name, step, evaluation, named):
    """Weights, state, groups and counters; the loop goes on, and the gradients are there."""
    run = _Run(MAKE[name], step, evaluation, named, on_nonfinite="skip")
    if not run.reached:
        assert run.outcomes == ["applied"] * 4
        return
    assert run.outcomes == [
        "skipped_nonfinite" if index == step else "applied" for index in range(4)
    ]
    assert identical(run.before, run.after)
    assert [event.kind for event in run.events] == ["skipped"]
    assert "as before" in run.events[0].message
    assert all(gradient is not None for gradient in run.gradients)
    assert isinstance(run.returned, torch.Tensor)


@pytest.mark.parametrize("evaluation", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", MAKE)
def test_an_error_leaves_weights_and_state_as_before(name, step, evaluation):
    """The same with on_nonfinite="raise", and the message says so."""
    run = _Run(MAKE[name], step, evaluation, on_nonfinite="raise")
    if run.reached and run.error:
        # What the optimizer has counted before its closure stays, as its step was left by an error.
        assert identical(run.before[0], run.after[0])
        assert "weights and optimizer state are as before it" in run.error


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_what_cannot_be_undone_is_said(on_nonfinite):
    """An optimizer that begins to evaluate twice in a later step was not copied before that one."""
    run = _Run(lambda p: Once(p, twice_from=3), 2, 2, on_nonfinite=on_nonfinite)
    assert not identical(run.before[0], run.after[0])
    told = run.error or run.events[0].message
    assert "had moved the weights" in told
    assert "as before it" not in told
    again = _Run(lambda p: Once(p, twice_from=3), 3, 2, on_nonfinite=on_nonfinite)
    assert identical(again.before[0], again.after[0])


def test_only_optimizers_that_need_it_are_copied():
    """One evaluation, before anything moves, costs no copy: at once for torch's, else from step 2."""

    def counted(make, steps, on_nonfinite):
        weight = nn.Parameter(torch.ones(3))
        optimizer, counts = make([weight]), []

        def closure():
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        with gradwatch.watch({"w": weight}, optimizer, on_nonfinite=on_nonfinite):
            for _ in range(steps):
                with CountCalls() as counter:
                    optimizer.step(closure)
                counts.append(counter.calls["aten.clone.default"])
        return counts

    def clones(make, steps):
        # Measuring clones a few numbers as well, in the steps that are looked at.
        skip, record = (counted(make, steps, mode) for mode in ("skip", "record"))
        return [one > other for one, other in zip(skip, record, strict=True)]

    assert clones(lambda p: torch.optim.SGD(p, lr=0.1), 3) == [False] * 3
    assert clones(Once, 3) == [True, False, False]
    assert clones(MAKE["moves first"], 3) == [True] * 3


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_evaluations_of_a_closure_are_not_thrown_away(line_search):
    """A NaN in a line search is an event of its step, and nothing is recorded as discarded."""
    run = _Run(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn=line_search), 1, 3)
    assert not run.events
    assert run.watcher.history.steps()["discarded"].eq(0).all()
    assert run.watcher.events[0].step == 2


class Counts(Optimizer):
    """Counts the steps of each parameter, whether it has a gradient or not."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        """Counts, and descends."""
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=0.1)


def test_a_skipped_first_step_makes_no_state():
    """Without a closure, too: an optimizer of another library counts in a state that it makes."""
    model = nn.Linear(2, 1)
    optimizer = Counts(model.parameters())
    with gradwatch.watch(model, optimizer, on_nonfinite="skip"):
        model(torch.full((1, 2), math.nan)).sum().backward()
        optimizer.step()
        assert not optimizer.state
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert [one["step"] for one in optimizer.state.values()] == [1, 1]


class TellsItsClosure(SAM):
    """Says which evaluation it is, by position and by name, as the SAM of Composer does."""

    @torch.no_grad()
    def step(self, closure):
        """Evaluates once without the other ranks, and once with something to write to."""
        given = iter([((), {"sync": False}), (({},), {})])

        def told():
            args, kwargs = next(given)
            return closure(*args, **kwargs)

        return super().step(told)


@pytest.mark.parametrize("on_nonfinite", ["record", "skip", "explain"])
def test_a_closure_is_given_what_its_optimizer_passes(on_nonfinite):
    """Arguments of a closure reach it, also when it is run again to be explained."""
    torch.manual_seed(0)
    net, calls = nn.Linear(3, 1), []
    optimizer, x = TellsItsClosure(net.parameters()), torch.randn(8, 3)

    def closure(found=None, *, sync=True):
        calls.append((found, sync))
        optimizer.zero_grad()
        loss = net(x).square().mean()
        if now == 1 and not sync:
            loss = torch.sqrt(loss - loss.detach())
        loss.backward()
        return loss

    with gradwatch.watch(net, optimizer, on_nonfinite=on_nonfinite) as watcher:
        for now in range(3):
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step(closure)
            if now == 1 and on_nonfinite != "record":
                assert identical(before, [p.detach() for p in net.parameters()])
    assert calls[:2] == calls[-2:] == [(None, False), ({}, True)]
    assert len(watcher.history.steps()) == 3
    explained = [(one.origin, one.operation) for one in watcher.explanations]
    assert explained == ([("operation", "sqrt")] if on_nonfinite == "explain" else [])
