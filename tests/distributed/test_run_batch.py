"""One rank runs out of memory: all of them run the batch again, in smaller micro-batches."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support.launch import on_ranks

ACCUMULATE, WINDOWS = 2, 3
LIMIT = 2
EQUAL, UNEQUAL = (8, 8, 8, 8), (8, 5, 3, 1)  # examples by rank

fsdp2 = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer"
)


class Fault:
    """Runs out of memory above a size, in a micro-batch that holds a certain example."""

    def __init__(self, place=None, example=0, limit=LIMIT):
        self.place, self.example, self.limit = place, example, limit
        self.sizes = []
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def check(self, numbers, place):
        if place == self.place and len(numbers) > self.limit and self.example in numbers:
            raise self.error


class Boundary(torch.autograd.Function):
    """The identity; what comes after it in the model has its gradients when its backward fails."""

    @staticmethod
    def forward(ctx, x, numbers, fault):
        ctx.numbers, ctx.fault = numbers, fault
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.fault.check(ctx.numbers, "backward")
        return gradient, None, None


class Model(nn.Module):
    """Two layers, a place to run out of memory, and a buffer that the first rank broadcasts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(1))
        self.double()

    def forward(self, x, numbers, fault):
        fault.check(numbers, "inside")
        x = Boundary.apply(torch.tanh(self.first(x)) * self.scale, numbers, fault)
        return self.last(x)


def _batch(index, rank, lengths):
    generator = torch.Generator().manual_seed(100 * index + rank)
    x = torch.randn(lengths[rank], 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(lengths[rank])


def _closure(model, fault):
    def closure(part):
        x, numbers = part
        fault.sizes.append(len(x))
        fault.check(numbers, "before")
        loss = model(x, numbers, fault).square().mean()
        fault.check(numbers, "after")
        return loss

    return closure


def _optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _expected(lengths):
    """The weights after training on all the data at once, in one process."""
    model, ranks = Model(), range(dist.get_world_size())
    optimizer = _optimizer(model)
    for window in range(WINDOWS):
        batches = range(window * ACCUMULATE, (window + 1) * ACCUMULATE)
        parts = [_batch(index, rank, lengths)[0] for index in batches for rank in ranks]
        x = torch.cat(parts)
        model(x, torch.arange(len(x)), Fault()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _hook(calls, bucket):
    calls.append(bucket.index())
    return allreduce_hook(None, bucket)


def _train(place, example, failing, start, lengths=EQUAL, **options):
    """Trains a few windows; from one batch on, a rank cannot run it as it is."""
    rank, wrapper = dist.get_rank(), DistributedDataParallel(Model(), **options)
    calls, reductions = [], []
    wrapper.register_comm_hook(calls, _hook)
    optimizer, fault = _optimizer(wrapper), Fault()
    with gradwatch.watch(wrapper, optimizer, accumulate=ACCUMULATE) as watcher:
        for index in range(WINDOWS * ACCUMULATE):
            if index == start and rank == failing:
                fault.place, fault.example = place, example
            watcher.run_batch(_closure(wrapper, fault), _batch(index, rank, lengths))
            watcher.step()
            reductions.append(len(calls))
            calls.clear()
    weights = torch.cat([p.detach().flatten() for p in wrapper.parameters()])
    return {
        "weights": weights.tolist(),
        "error": (weights - _expected(lengths)).abs().max().item(),
        "reductions": reductions,
        "sizes": fault.sizes[start:],
        "size": watcher.micro_batch_size,
        "events": [event.message for event in watcher.events],
        "weight": [*watcher.history.steps()["weight"]],
        "noise": watcher.noise_scale.updates,
    }


PLACES = ["before", "inside", "after", "backward"]


def _cases(cases, **options):
    return [_train(*case, **options) for case in cases]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [("before", 0, 0, 0), ("inside", 7, 1, 2), ("backward", 0, 0, 1)]),
        (2, [("inside", 4, 1, 0, UNEQUAL), ("before", 0, 0, 2, UNEQUAL)]),
        (2, [("after", 0, 0, 1, UNEQUAL), ("backward", 4, 1, 0, UNEQUAL)]),
        (4, [("inside", 0, 3, 0), ("backward", 2, 2, 1, UNEQUAL)]),
    ],
    ids=["equal", "unequal", "late", "four"],
)
def test_all_ranks_run_the_batch_again(ranks, cases):
    """Wherever one rank fails: the weights are those of all the data at once, the same on all ranks."""
    for case, *seen in zip(cases, *on_ranks(_cases, ranks, cases=cases), strict=True):
        lengths = case[4] if len(case) > 4 else EQUAL
        for one in seen:
            assert one["error"] < 1e-14, case
            assert one["size"] in (2, 3), case
            assert one["weight"] == [ACCUMULATE * sum(lengths[:ranks])] * WINDOWS
            assert one["noise"] == WINDOWS, case
            for same in ("weights", "size", "events"):
                assert one[same] == seen[0][same], case


@pytest.fixture(scope="module")
def pair():
    """What two ranks saw, of which the second runs out of memory."""
    cases = [("inside", 0, 1, 1), ("backward", 7, 1, 1), ("after", 0, 1, 1, UNEQUAL)]
    return on_ranks(_cases, 2, cases=cases)


def test_there_is_one_reduction_per_window(pair):
    """The one bucket of gradients is sent once per window, by the wrapper's own hook, at the step."""
    for rank in pair:
        for case in rank:
            assert case["reductions"] == [0, 1] * WINDOWS


def test_a_rank_that_fits_runs_the_batch_again_too(pair):
    """It finishes its attempt, is told, and halves as well."""
    fits, fails = pair
    assert fits[0]["sizes"][:7] == [8, 4, 4, 2, 2, 2, 2]
    assert fails[0]["sizes"][:6] == [8, 4, 2, 2, 2, 2]
    assert fails[1]["sizes"][:7] == [8, 4, 4, 2, 2, 2, 2]


def test_the_smallest_that_failed_is_halved(pair):
    """Of a rank with eight examples and one with five that fails, both go on with three."""
    fits, fails = pair
    assert fits[2]["sizes"][:4] == [8, 3, 3, 2]
    assert fails[2]["sizes"][:2] == [5, 3]
    assert "5 examples" in fits[2]["events"][0]


OPTIONS = [
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True},
]


def _options():
    return [_train("backward", 7, 1, 1, **options) for options in OPTIONS]


def test_every_kind_of_wrapper():
    """Gradients that are views of buckets, unused parameters, a static graph once it is known."""
    first, second = on_ranks(_options, 2)
    for one, other, options in zip(first, second, OPTIONS, strict=True):
        assert one["error"] < 1e-14, options
        assert one["weights"] == other["weights"], options
        assert one["size"] == other["size"] == 2, options


def _too_large(place):
    """One rank cannot run a single example; afterwards both train on."""
    rank, wrapper = dist.get_rank(), DistributedDataParallel(Model())
    fault, seen = Fault(place if rank else None, limit=0), {}
    with gradwatch.watch(wrapper, _optimizer(wrapper), accumulate=2) as watcher:
        whole = _closure(wrapper, Fault())
        watcher.run_batch(whole, _batch(0, rank, EQUAL))
        before = [p.grad.tolist() for p in wrapper.parameters()]
        try:
            watcher.run_batch(_closure(wrapper, fault), _batch(1, rank, EQUAL))
        except RuntimeError as error:
            seen["own"], seen["message"] = error is fault.error, str(error)
            seen["frames"] = error.__traceback__ is not None
        seen["same"] = before == [p.grad.tolist() for p in wrapper.parameters()]
        seen["early"] = watcher.step()
        watcher.run_batch(whole, _batch(1, rank, EQUAL))
        seen["stepped"] = watcher.step()
    seen["weights"] = [p.tolist() for p in wrapper.parameters()]
    seen["weight"] = watcher.last.weight
    return seen


@pytest.mark.parametrize("place", PLACES)
def test_an_example_that_does_not_fit_on_one_rank(place):
    """That rank raises the error, the others say where it was; none hangs, and all can go on."""
    other, failing = on_ranks(_too_large, 2, place=place)
    assert failing["own"]
    assert not other["own"]
    assert "Another rank ran out of memory" in other["message"]
    assert "one example" in other["message"]
    for seen in (other, failing):
        assert seen["same"]
        assert seen["frames"]
        assert not seen["early"]
        assert seen["stepped"]
        assert seen["weight"] == 32
    assert other["weights"] == failing["weights"]


def _as_it_came(model):
    """All ranks fail at once, where none could run the batch again by itself."""
    fault = Fault("before")
    with gradwatch.watch(model, _optimizer(model)) as watcher:
        try:
            watcher.run_batch(_closure(model, fault), _batch(0, dist.get_rank(), EQUAL))
        except torch.OutOfMemoryError as error:
            own = error is fault.error
        size = watcher.micro_batch_size
        watcher.load_state_dict({**watcher.state_dict(), "micro_batch_size": 3})
        fault.place = None
        watcher.run_batch(_closure(model, fault), _batch(0, dist.get_rank(), EQUAL))
        stepped = watcher.step()
    return own, size, fault.sizes, stepped, watcher.last.weight


def _wrapped_as_it_came():
    synced = DistributedDataParallel(Model())
    synced.module.unused = nn.SyncBatchNorm(8, affine=False)  # a wrapper refuses it on the CPU
    static = DistributedDataParallel(Model(), static_graph=True)
    return [_as_it_came(synced), _as_it_came(static)]


def _sharded_as_it_came():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return [_as_it_came(model)]


EXPECTED = (True, None, [8, 3, 3, 2], True, 16.0)


def test_the_error_is_raised_as_it_came_where_forwards_communicate():
    """With SyncBatchNorm, and in the first backward of a static graph, others wait in the middle."""
    for seen in on_ranks(_wrapped_as_it_came, 2):
        assert seen == [EXPECTED] * 2


@fsdp2
def test_the_error_is_raised_as_it_came_with_shards():
    """Under FSDP2 a rank cannot run a forward again alone; a size from elsewhere is kept to."""
    for seen in on_ranks(_sharded_as_it_came, 2):
        assert seen == [EXPECTED]
