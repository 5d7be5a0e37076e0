"""Where a replay may be called from, what it refuses, and what errors leave behind."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.hooks.context import ForwardContext, is_replaying
from gradwatch.replay.runs import run_calls, run_closure
from gradwatch.replay.stand_ins import ReplayError
from tests.replay.replayed import Seen, attributes, disturbance, kept
from tests.support import zoo
from tests.support.launch import mesh_of_one, on_ranks
from tests.support.state import differences, pieces, state_of

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))


def _backward(model, x=X):
    with kept(model) as calls:
        model(x).square().mean().backward()
    return calls


def _whole(model):
    return {**state_of(model), "attributes": attributes(model)}


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
        lambda: torch.autograd.detect_anomaly(check_nan=True),
        lambda: torch.autograd.set_multithreading_enabled(False),
    ],
    ids=["no_grad", "inference", "bfloat16", "float16", "anomaly", "one_thread"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_is_active_outside_does_not_matter(around):
    """Grad mode, inference mode, autocast and anomaly mode around a replay are not those in it."""
    model = _network()
    calls = _backward(model)
    before, seen = _whole(model), Seen()
    with around():
        modes = torch.is_grad_enabled(), torch.is_anomaly_enabled()
        casts = [torch.mm(X.T, X)]
        run_calls(model, calls)(seen)
        assert modes == (torch.is_grad_enabled(), torch.is_anomaly_enabled())
    assert list(differences(before, _whole(model))) == []
    # A backward runs under the autocast that is active around the replay, which most likely was
    # around the backward as well: an optimizer's step comes right after it.
    if not any(one.dtype != torch.float32 for one in casts):
        real, replayed = pieces(_gradients(model)), pieces(seen.gradients)
        assert list(differences(real, replayed)) == []


def test_the_weights_that_an_outer_autocast_has_cast_stay():
    """A graph that was built before still uses the casts, and their gradients are added as before."""
    model = nn.Linear(4, 4)

    def gradients(replays):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X)
            if replays:
                run_closure(model, lambda: model(X).square().mean())(Seen())
            model(y).float().square().mean().backward()
        return pieces(_gradients(model))

    assert list(differences(gradients(False), gradients(True))) == []


def test_inside_a_step_pre_hook():
    """A replay from the hook of an optimizer changes no step."""

    def trained(replays):
        model = _network()
        optimizer = torch.optim.Adam(model.parameters())
        calls = []

        def before(*_):
            if replays:
                run_calls(model, calls[-1])(Seen())

        optimizer.register_step_pre_hook(before)
        for _ in range(3):
            optimizer.zero_grad()
            calls.append(_backward(model))
            optimizer.step()
        return state_of(model, optimizer)

    assert list(differences(trained(False), trained(True))) == []


def test_inside_the_closure_of_lbfgs():
    """A replay between two evaluations of a closure changes none of them."""

    def trained(replays):
        model = zoo.small()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def loss_of():
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        def closure():
            loss = loss_of()
            if replays:
                run_closure(model, loss_of)(Seen())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return state_of(model, optimizer)

    assert list(differences(trained(False), trained(True))) == []


# -- gradwatch itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["calls", "closure"])
def test_a_watched_training(way):
    """A watcher counts no backward, no forward and no step of a replay, and copies no buffer."""

    def trained(replays):
        model = _network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(
            model, optimizer, on_nonfinite="skip", accumulate=2, clip=1.0
        ) as watcher:
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(2):
                    calls = _backward(model)
                    if replays and way == "calls":
                        run_calls(model, calls)(Seen())
                    if replays and way == "closure":
                        run_closure(model, lambda: model(X).square().mean())(Seen())
                optimizer.step()
            steps = watcher.history.steps()
        columns = ["grad_norm", "micro_batches", "outcome", "clip_coef"]
        return state_of(model, optimizer), steps[columns].to_dict("list"), len(watcher.events)

    plain, replayed = trained(False), trained(True)
    assert list(differences(plain, replayed)) == []


def test_the_flag_for_our_own_hooks():
    """is_replaying() is true in forward and backward of a replay, and nowhere else."""
    seen = []
    model = nn.Linear(4, 2)
    model.register_forward_hook(lambda *_: seen.append(is_replaying()) or None)

    class Telling(Seen):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            answers.add(is_replaying())
            return super().__torch_dispatch__(function, types, args, kwargs)

    answers = set()
    calls = _backward(model)
    run_calls(model, calls)(Telling())
    assert seen == [False]  # that of the replay was put back
    assert answers == {True}
    assert not is_replaying()


# -- wrappers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["calls", "closure", "own_backward"])
@pytest.mark.parametrize("keyword", ["plain", "static_graph", "gradient_as_bucket_view"])
def test_distributed_data_parallel(way, keyword):
    """The reducer of DistributedDataParallel does not notice a replay."""
    options = {} if keyword == "plain" else {keyword: True}

    def make():
        model = DistributedDataParallel(_network(), **options)
        return model, lambda step: model(X + step).square().mean()

    with mesh_of_one():
        assert disturbance(make, way) == []


def test_data_parallel():
    """nn.DataParallel is called for what it holds."""
    model = nn.DataParallel(_network())
    calls = _backward(model)
    before, seen = _whole(model), Seen()
    run_calls(model, calls)(seen)
    assert list(differences(before, _whole(model))) == []
    assert sorted(seen.parameters) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
        "3.bias",
        "3.weight",
    ]
    assert list(seen.modules) == ["", "0", "1", "2", "3"]


def _one_rank_replays(rank_that_replays):
    model = DistributedDataParallel(_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        with kept(model) as calls:
            model(X + step + dist.get_rank()).square().mean().backward()
        if dist.get_rank() == rank_that_replays:
            run_calls(model, calls)(Seen())
            run_closure(model, lambda step=step: model(X + step).square().mean())(Seen())
        optimizer.step()
    state = state_of(model.module, optimizer)
    return [one.tolist() for one in model.parameters()], str(state["buffers"])


def _communicating():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            y = self.layer(x)
            dist.all_reduce(y.detach().clone())
            return y

    reasons = []
    for model, x in ((Net(), X), (nn.SyncBatchNorm(4), X)):
        call = gradwatch.hooks.forwards.ForwardCall(model, (x,), {}, [0], ForwardContext.now())
        if dist.get_rank() == 1:
            with pytest.raises(ReplayError) as caught:
                run_calls(model, [call])(Seen())
            reasons.append(str(caught.value))
    return reasons


@pytest.mark.slow
def test_one_rank_replays_alone():
    """A rank that replays makes the others wait for nothing, and the training goes on alike."""
    plain = on_ranks(_one_rank_replays, 2, rank_that_replays=-1)
    assert on_ranks(_one_rank_replays, 2, rank_that_replays=1) == plain


def test_a_forward_that_communicates_is_refused():
    """A collective in a forward, or in SyncBatchNorm, ends the replay before anybody waits."""
    reasons = on_ranks(_communicating, 2)[1]
    assert [reason.split(" communicates")[0] for reason in reasons] == [
        "The forward",
        "SyncBatchNorm",
    ]


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer")
def test_a_sharded_model_is_refused():
    """FSDP2 needs all ranks."""
    with mesh_of_one():
        model = zoo.small_sharded()
        before = [id(one) for one in model.parameters()]
        with pytest.raises(ReplayError, match="sharded over ranks"):
            run_closure(model, lambda: model(X).sum())(Seen())
        assert before == [id(one) for one in model.parameters()]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_scripted_model_is_refused():
    """The weights of a scripted module are not where they could be replaced."""
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 2), X))
    with pytest.raises(ReplayError, match="is a scripted module"):
        run_closure(model, lambda: model(X).sum())(Seen())


def test_a_lazy_model_is_refused():
    """Parameters that have no shape yet cannot be copied; once they have one they can."""
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ReplayError, match="lazy"):
        run_closure(model, lambda: model(X).sum())(Seen())
    model(X).sum().backward()
    before, seen = _whole(model), Seen()
    run_closure(model, lambda: model(X).sum())(seen)
    assert list(differences(before, _whole(model))) == []
    assert set(seen.gradients) == {"0.weight", "0.bias"}


# -- errors ----------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Raises an error once it is told to, after it has written to everything."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.calls = []
        self.error = None
        self.in_backward = False

    def forward(self, x):
        self.count += 1
        self.calls.append(1)
        torch.rand(3)
        y = self.layer(x)
        if self.error is not None and self.in_backward:
            y.register_hook(self._fail)
        elif self.error is not None:
            raise self.error
        return y

    def _fail(self, gradient):
        raise self.error


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no such batch"), "ValueError: no such batch"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "Memory ran out"),
        (MemoryError(), "Memory ran out"),
    ],
)
@pytest.mark.parametrize("way", ["calls", "closure"])
def test_an_error_leaves_everything_as_it_was(way, error, reason, in_backward):
    """After an error, be it that memory ran out, all is put back, and the reason is told."""
    model = Failing()
    calls = _backward(model)
    model.error, model.in_backward = error, in_backward
    before = _whole(model)
    run = run_calls(model, calls) if way == "calls" else run_closure(model, lambda: model(X).sum())
    with pytest.raises(ReplayError, match=reason):
        run(Seen())
    assert list(differences(before, _whole(model))) == []
    assert not is_replaying()
    assert torch.autograd.backward.__module__ == "torch.autograd"
    model.error = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()  # steps are allowed again


def test_an_interrupt_is_passed_on():
    """Ctrl-C ends the replay, and the training if it is not caught, with everything put back."""
    model = Failing()
    calls = _backward(model)
    model.error = KeyboardInterrupt()
    before = _whole(model)
    with pytest.raises(KeyboardInterrupt):
        run_calls(model, calls)(Seen())
    assert list(differences(before, _whole(model))) == []


def test_a_closure_that_steps_is_refused():
    """A step inside of the closure would move the weights; the watcher does not count it either."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with gradwatch.watch(model, optimizer) as watcher:
        model(X).square().mean().backward()
        before = state_of(model, optimizer)
        with pytest.raises(ReplayError, match="steps an optimizer"):
            run_closure(model, closure)(Seen())
        assert list(differences(before, state_of(model, optimizer))) == []
        optimizer.step()
    assert len(watcher.history.steps()) == 1


def test_a_tensor_that_nothing_led_to():
    """A leaf that no container holds keeps its gradient and is told nothing."""
    hidden = {}
    called = []

    class Sneaky:
        __slots__ = ("weight",)

    holder = Sneaky()
    holder.weight = torch.ones(4, requires_grad=True)
    holder.weight.register_hook(called.append)
    lock = threading.local()  # what is in there is looked at by nobody
    lock.weight = holder.weight
    hidden["of"] = lock
    model = nn.Linear(4, 2)
    run_closure(model, lambda: model(X * lock.weight).sum())(Seen())
    assert holder.weight.grad is None
    assert called == []
    (holder.weight * 2).sum().backward()
    assert len(called) == 1
