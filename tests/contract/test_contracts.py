"""Objects that the user writes are checked when the watcher is made, and their results at first use."""

import math

import pytest
import torch
from torch import nn

import gradwatch


def _start():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


class Clip:
    """A clipping policy that clips nothing."""

    norm_type = 2.0

    def decide(self, total_norm):
        """Returns the decision to do nothing."""
        return gradwatch.ClipDecision()

    def state_dict(self):
        """Returns nothing."""
        return {}

    def load_state_dict(self, state):
        """Does nothing."""


class Accumulate:
    """An accumulation policy of three micro-batches after the first window."""

    micro_batches = 1
    most = 3
    lr_factor = 1.0

    def looks_at(self, step):
        """Returns that it needs no noise scale."""
        return False

    def decide(self, step, noise):
        """Returns three."""
        return 3

    def state_dict(self):
        """Returns nothing."""
        return {}

    def load_state_dict(self, state):
        """Does nothing."""


class Sink:
    """A sink that keeps nothing."""

    def write(self, batch):
        """Does nothing."""

    def close(self):
        """Does nothing."""


def _without(kind, name):
    members = {n: v for n, v in vars(kind).items() if not n.startswith("__") and n != name}
    return type("Mine", (), members)()


def _with(kind, **members):
    return type("Mine", (kind,), members)()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("clip", _without(Clip, "norm_type"), r"a Mine, which has no norm_type: gradwatch\.Clip"),
        ("clip", _without(Clip, "load_state_dict"), r"no load_state_dict\(state\)"),
        ("clip", _with(Clip, norm_type="two"), "norm_type is 'two' of type str, .* positive"),
        ("clip", _with(Clip, norm_type=0), "norm_type is 0 of type int"),
        ("clip", _with(Clip, scope="layer"), "scope is 'layer' of type str, but it must be one of"),
        ("clip", _with(Clip, decide=lambda self: None), r"cannot be called as decide\(total_norm"),
        ("clip", _with(Clip, decide=0.5), "whose decide is not a method, but 0.5"),
        ("clip", _with(Clip, state_dict=lambda self: None), r"Mine.state_dict\(\) returned None"),
        ("accumulate", _without(Accumulate, "most"), "which has no most: gradwatch.Accumulate"),
        ("accumulate", _without(Accumulate, "looks_at"), r"no looks_at\(step\)"),
        ("accumulate", _with(Accumulate, micro_batches=2.5), "micro_batches is 2.5 of type float"),
        ("accumulate", _with(Accumulate, micro_batches=0), "micro_batches is 0 of type int"),
        ("accumulate", _with(Accumulate, most=0), "most is 0 of type int"),
        ("accumulate", _with(Accumulate, lr_factor=None), "lr_factor is None"),
        ("accumulate", _with(Accumulate, lr_factor=math.nan), "lr_factor is nan"),
        ("accumulate", _with(Accumulate, decide=lambda self, step: 3), r"as decide\(step, noise"),
        ("accumulate", _with(Accumulate, state_dict=lambda self: 3), r"state_dict\(\) returned 3"),
        ("sinks", [_with(Sink, write=lambda self: None)], r"cannot be called as write\(batch\)"),
        ("sinks", [_with(Sink, close=lambda self, now: None)], r"cannot be called as close\(\)"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(option, value, told):
    """The error names the argument, the class, the member and what to write."""
    model, optimizer = _start()
    with pytest.raises(TypeError, match=told) as error:
        gradwatch.watch(model, optimizer, **{option: value})
    assert str(error.value).startswith(f"watch({option}=)") or "state_dict()" in told.replace(
        "\\", ""
    )


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (0.5, r"Mine.decide\(\) returned 0.5 of type float, .* a gradwatch.ClipDecision"),
        (None, r"Mine.decide\(\) returned None"),
        (torch.tensor(0.5), r"returned tensor\(0.5000\) of type Tensor"),
        (gradwatch.ClipDecision(coefficient=0.5), r"None or a real tensor of shape \(\)"),
        (gradwatch.ClipDecision(torch.ones(2)), r"a real tensor of shape \(\)"),
        (gradwatch.ClipDecision(threshold="1"), "whose threshold is a number"),
        (gradwatch.ClipDecision(clip_value=-1.0), "whose clip_value is None or a positive"),
        (gradwatch.ClipDecision(units=3), "whose units is None or has coefficient"),
    ],
)
def test_what_a_clip_policy_returns_is_checked(returned, told):
    """When the watcher is made; or at the first decision that is wrong, before the weights are touched."""
    model, optimizer = _start()
    before = [p.detach().clone() for p in model.parameters()]
    always = _with(Clip, decide=lambda self, total_norm: returned)
    with pytest.raises(TypeError, match=told):
        gradwatch.watch(model, optimizer, clip=always)
    right = gradwatch.ClipDecision()
    policy = _with(Clip, decide=lambda self, total_norm: right if total_norm == 1 else returned)
    with gradwatch.watch(model, optimizer, clip=policy):
        model(torch.ones(3, 4)).sum().backward()
        with pytest.raises(TypeError, match=told):
            optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, r"Mine.decide\(\) returned None of type NoneType, .* integer of at least 1"),
        (2.0, "returned 2.0 of type float"),
        (0, "returned 0 of type int"),
        (True, "returned True of type bool"),
        (4, "at most 3 micro-batches, as its attribute most says"),
    ],
)
def test_what_an_accumulation_policy_returns_is_checked(returned, told):
    """At the first decision."""
    model, optimizer = _start()
    policy = _with(Accumulate, decide=lambda self, step, noise: returned)
    with gradwatch.watch(model, optimizer, accumulate=policy) as watcher:
        watcher.backward(model(torch.ones(3, 4)).sum())
        with pytest.raises(TypeError, match=told):
            watcher.step()


def test_a_policy_that_never_accumulates_cannot_end_a_training():
    """With most = 1 the run is only watched: a warning names the method, and the loop goes on."""
    model, optimizer = _start()
    policy = _with(Accumulate, most=1, decide=lambda self, step, noise: None)

    def step():
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with gradwatch.watch(model, optimizer, accumulate=policy):
        with pytest.warns(
            gradwatch.GradwatchWarning, match=r"stopped watching: Mine.decide\(\) ret"
        ):
            step()
        step()


def test_the_decision_is_the_length_of_the_next_window():
    """decide() is obeyed although the attribute stays as it was, also after a resume."""

    def run(state=None):
        model, optimizer = _start()
        with gradwatch.watch(model, optimizer, accumulate=Accumulate()) as watcher:
            if state is not None:
                watcher.load_state_dict(state)
            for _ in range(9 + (state is None)):
                watcher.backward(model(torch.ones(3, 4)).square().mean())
                watcher.step()
            return watcher, watcher.state_dict()

    watcher, state = run()
    assert watcher.history.steps()["micro_batches"].tolist() == [1, 3, 3, 3]
    assert [(event.kind, event.step, event.value) for event in watcher.events] == [
        ("accumulate", 2, 3.0)
    ]
    assert run(state)[0].history.steps()["micro_batches"].tolist() == [3, 3, 3]


class _ByGroups(Clip):
    scope = "group"

    def decide(self, total_norm):
        """Halves every group."""
        return gradwatch.ClipDecision(torch.full_like(total_norm, 0.5))


@pytest.mark.parametrize("policy", [Clip, _ByGroups])
def test_a_policy_that_fits_is_heard(policy):
    """Own policies work with the members that the interface names, and no more."""
    model, optimizer = _start()
    with gradwatch.watch(model, optimizer, clip=policy()) as watcher:
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert watcher.last.clip_coef == (0.5 if policy is _ByGroups else 1.0)
