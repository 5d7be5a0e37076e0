"""A replay leaves alone what other threads do meanwhile, and is left whole by Ctrl-C."""

import signal
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks.context import is_replaying
from gradwatch.replay.runs import live_closure, run_closure
from gradwatch.replay.state import undisturbed
from tests.replay.replayed import Seen
from tests.support import processes
from tests.support.state import differences, state_of

LONGEST = 60.0


class Root(nn.Module):
    """Has an infinite gradient where its input is 0; calls a function in each forward."""

    def __init__(self, called=lambda: None):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 4, bias=False)
        self.called = [called]

    def forward(self, x):
        h = self.layer(x).abs().sqrt()
        self.called[0]()
        return h.mean()


def trained(model, policy, bad=(), steps=4, watched=True):
    """Train, and return the state at the end and the records."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    records = []
    watch = gradwatch.watch(model, optimizer, on_nonfinite=policy) if watched else nullcontext()
    with watch as watcher:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(3, 4, generator=generator) * (0.0 if step in bad else 1.0)
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
            if watched:
                records.append(watcher.last)
    return state_of(model, optimizer), records


def in_a_thread(function):
    """Start a function in a thread; the list gets what it returns, or its error."""
    ended = []

    def run():
        try:
            ended.append(function())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def during_a_replay(model, function):
    """Have a thread run a function while the forward of a model is replayed.

    The hook reaches events alone: what else is in its reach would be put back after the replay.
    """
    begun, done = threading.Event(), threading.Event()

    def run():
        assert begun.wait(LONGEST)
        try:
            return function()
        finally:
            done.set()

    def meanwhile(*_):
        if is_replaying() and not done.is_set():
            begun.set()
            assert done.wait(LONGEST)

    model.register_forward_hook(meanwhile)
    return in_a_thread(run)


@pytest.mark.parametrize("watched", [False, True])
def test_another_thread_trains_during_a_replay(watched):
    """It steps its optimizer, is recorded, and ends as if it were alone."""
    expected, _ = trained(Root(), "skip", bad=[1])
    alone, steps = trained(nn.Sequential(Root()), "explain", watched=watched)
    second, model = nn.Sequential(Root()), Root()
    thread, ended = during_a_replay(
        model.layer, lambda: trained(second, "explain", watched=watched)
    )
    found, records = trained(model, "explain", bad=[1])
    thread.join()
    state, others = ended[0]
    assert not [*differences(alone, state)]
    assert [(one.step, one.grad_norm) for one in others] == [
        (one.step, one.grad_norm) for one in steps
    ]
    assert not [*differences(expected, found)]
    assert [one.outcome for one in records][1] == "skipped_nonfinite"


def test_two_threads_replay_at_once():
    """Each waits for its turn, and both end as with skip."""
    bad = [0, 1, 2, 3]
    expected, _ = trained(Root(), "skip", bad, 6)
    backward = torch.autograd.backward
    threads = [
        in_a_thread(lambda model=model: trained(model, "explain", bad, 6))
        for model in (Root(), Root())
    ]
    for thread, ended in threads:
        thread.join()
        assert not [*differences(expected, ended[0][0])]
    assert torch.autograd.backward is backward


@pytest.mark.parametrize("kind", ["run", "live"])
def test_a_backward_of_another_thread(kind):
    """While the function is replaced, that of another thread reaches its own leaves."""
    leaf = torch.ones(2, requires_grad=True)
    model, x = Root(), torch.ones(3, 4)

    def elsewhere():
        torch.autograd.backward((leaf * 3).sum())
        return is_replaying()

    thread, ended = during_a_replay(model.layer, elsewhere)

    def closure():
        loss = model(x)
        loss.backward()
        return loss

    if kind == "run":
        run_closure(model, closure)(Seen())
    else:
        with live_closure(model, closure):
            pass
    thread.join()
    assert leaf.grad.tolist() == [3.0, 3.0]
    assert ended == [False]


NESTED = """
import threading
import torch
from torch import nn
from gradwatch.hooks.context import is_replaying
from gradwatch.replay.state import undisturbed

found = set()

class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        found.add((threading.get_ident(), is_replaying()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                Nested.apply(x, ctx.depth - 1).backward()
        return gradient, None

def run():
    found.clear()
    Nested.apply(torch.ones((), requires_grad=True), 70).backward()
    print({one for _, one in found}, len(found))

with undisturbed(nn.Linear(1, 1)):
    run()
run()
"""


def test_threads_of_torch_belong_to_the_replay():
    """Backwards that are nested more than 60 deep go on in a thread of torch's."""
    # In a process of its own: once torch has such threads, no test can fork any more.
    ran = processes.run(code=NESTED)
    assert (ran.stdout, ran.stderr) == ("{True} 2\n{False} 2\n", "")


def test_warnings_of_other_threads_are_told():
    """Those of the replay are not; and the filters are as before."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with undisturbed(nn.Linear(1, 1)):
            warnings.warn("in the replay", stacklevel=1)
            thread, _ = in_a_thread(lambda: warnings.warn("elsewhere", stacklevel=1))
            thread.join()
        assert list(warnings.filters) == before
        warnings.warn("afterwards", stacklevel=1)
    assert [str(one.message) for one in told] == ["elsewhere", "afterwards"]


def test_the_cached_weights_of_another_model_stay():
    """Its parametrization is evaluated once in its own cache."""
    cached = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with nn.utils.parametrize.cached():
        weight = cached.weight
        with undisturbed(Root()):
            assert cached.weight is weight
        assert cached.weight is weight


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises an error, also where the tests were started with signals ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupt_in_a_replay(where):
    """Weights, attributes, gradients, handlers and torch's functions are those from before."""
    model = Root()
    model.count = 0

    def interrupt():
        model.count += 1
        if is_replaying():
            signal.raise_signal(signal.SIGINT)

    if where == "forward":
        model.layer.register_forward_hook(lambda *_: interrupt())
    else:
        model.layer.register_full_backward_hook(lambda *_: interrupt())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, handler = model.layer.weight, signal.getsignal(signal.SIGINT)
    values, backward, state = (
        weight.detach().clone(),
        torch.autograd.backward,
        torch.get_rng_state(),
    )
    with gradwatch.watch(model, on_nonfinite="explain"):
        model(torch.zeros(3, 4, requires_grad=True)).backward()
        gradient = weight.grad
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert model.count == 1
    assert model.layer.weight is weight
    assert torch.equal(weight, values)
    assert weight.grad is gradient
    assert signal.getsignal(signal.SIGINT) == handler
    assert torch.autograd.backward is backward
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_replaying()
    optimizer.step()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_things_are_replaced_or_put_back(moment, monkeypatch):
    """It is held back until all is as it was."""
    from gradwatch.replay.reach import Reach

    name = {"before": "replace", "after": "restore"}[moment]
    whole = getattr(Reach, name)

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        whole(self, *args)

    monkeypatch.setattr(Reach, name, interrupted)
    model = Root()
    weight = model.layer.weight
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        assert model.layer.weight is not weight
    assert model.layer.weight is weight
    assert not is_replaying()


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_does_not_keep_things_from_being_put_back(monkeypatch):
    """The first one ends the replay; the second one waits."""
    from gradwatch.replay.reach import Reach

    whole = Reach.restore

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        whole(self)

    monkeypatch.setattr(Reach, "restore", interrupted)
    model = Root()
    weight = model.layer.weight
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        signal.raise_signal(signal.SIGINT)
    assert model.layer.weight is weight
