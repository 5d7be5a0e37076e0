"""Windows over ranks: the weights of one process with all the data, and one exchange of gradients."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support.calls import CountCalls
from tests.support.float64 import gradient_norm, whole
from tests.support.launch import on_ranks

from .test_gradient_sync import fsdp2

WANTED = 3
# Micro-batches of each window; those of fewer than are wanted end with step(last=True).
SIZES = (3, 3, 2, 1, 3)


class Net(nn.Module):
    """Two layers, and one that only some data use."""

    def __init__(self, seldom=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.seldom = nn.Linear(4, 1) if seldom else None
        self.double()

    def forward(self, x, use=False):
        out = self.last(torch.tanh(self.first(x)))
        return out + self.seldom(x) if self.seldom is not None and use else out


def _rows(window, micro_batch, rank):
    """Rows and tokens that differ between windows, micro-batches and ranks; sometimes none."""
    seed = 1000 * window + 100 * micro_batch + rank
    generator = torch.Generator().manual_seed(seed)
    size = 1 + (seed * 7) % 5
    kept = torch.arange(size) < (0 if seed % 11 == 3 else 1 + seed % size)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64), kept.double()


def _loss(model, data, use=False):
    x, kept = data
    per_row = (model(x, use) if use else model(x)).squeeze(1).square()
    return (per_row * kept).sum() / kept.sum().clamp(min=1)


def _joined(parts):
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _optimizer(model, kind):
    if kind == "adamw_fused":
        return torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-4, fused=True)
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def _at_once(bare, optimizer, sizes, ranks, clip=None, seldom=False, data=_rows):
    """Trains one process on all data of a window at once; returns weights, losses, norms, weights."""
    model = copy.deepcopy(bare)
    optimizer = _optimizer(model, optimizer)
    seen = {"losses": [], "norms": [], "weight": []}
    for window, size in enumerate(sizes):
        parts = [(data(window, m, r), r) for m in range(size) for r in range(ranks)]
        if not seldom:
            loss = _loss(model, _joined([part for part, _ in parts]))
        else:  # only the last rank uses the layer
            total = sum(part[1].sum() for part, _ in parts)
            each = [_loss(model, part, r == ranks - 1) * part[1].sum() for part, r in parts]
            loss = sum(each) / total
        loss.backward()
        seen["norms"].append(gradient_norm(model))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        seen["losses"].append(loss.item())
        seen["weight"].append(sum(part[1].sum().item() for part, _ in parts))
    return {**seen, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def _train(model, kind="sgd", sizes=SIZES, seldom=False, **options):
    """Trains under gradwatch, and tells what was sent in every window."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer, sent, counts = _optimizer(model, kind), [], []
    with gradwatch.watch(model, optimizer, accumulate=WANTED, **options) as watcher:
        for window, size in enumerate(sizes):
            sent.append([])
            for m in range(size):
                data = _rows(window, m, rank)
                with CountCalls() as collectives:
                    use = seldom and rank == ranks - 1
                    watcher.backward(_loss(model, data, use), weight=data[1].sum())
                    watcher.step(last=m + 1 == size)
                sent[-1].append(dict(collectives.sent))
    steps = watcher.history.steps()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {
        "weights": {name: whole(p).clone() for name, p in named.items()},
        "losses": list(steps["loss"]),
        "norms": list(steps["grad_norm"]),
        "weight": list(steps["weight"]),
        "micro_batches": list(steps["micro_batches"]),
        "sent": sent,
        "counts": counts,
    }


def _scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**8)


# What is wrapped, how it is trained, and how the whole batch is.
WRAPPED = {
    "plain": ({}, {}),
    "bucket_view": ({"gradient_as_bucket_view": True}, {}),
    "small_buckets": ({"bucket_cap_mb": 1e-5}, {}),
    "unused": ({"find_unused_parameters": True}, {"seldom": True}),
    "static": ({"static_graph": True}, {}),
    "clip": ({}, {"clip": 0.1}),
    "clip_fused": ({"gradient_as_bucket_view": True}, {"clip": 0.1, "kind": "adamw_fused"}),
    "scaled": ({}, {"scaled": True, "clip": 0.1}),
}


def _wrapped():
    seen = {}
    for name, (wrapping, options) in WRAPPED.items():
        training = dict(options)
        seldom, clip = training.get("seldom", False), training.get("clip")
        bare, kind = Net(seldom), training.get("kind", "sgd")
        if training.pop("scaled", False):
            training["scaler"] = _scaler()
        wrapper = DistributedDataParallel(copy.deepcopy(bare), **wrapping)
        reduced = []
        wrapper.register_comm_hook(reduced, _counting) if name == "plain" else None
        expected = _at_once(bare, kind, SIZES, dist.get_world_size(), clip, seldom)
        found = _train(wrapper, **training)
        seen[name] = {
            "found": found,
            "expected": expected,
            "reduced": len(reduced),
            "synced": wrapper.require_backward_grad_sync,
        }
    return seen


def _counting(state, bucket):
    """Reduces a bucket, and notes that it did."""
    state.append(bucket.index())
    future = dist.all_reduce(
        bucket.buffer().div_(dist.get_world_size()), async_op=True
    ).get_future()
    return future.then(lambda done: done.value()[0])


@pytest.fixture(scope="module")
def wrapped():
    """What each of two ranks saw."""
    return on_ranks(_wrapped, 2)


def _assert_same(seen):
    """Compares weights and records with those of the whole batch."""
    found, expected = seen["found"], seen["expected"]
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-12, atol=1e-14)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    assert found["weight"] == expected["weight"]
    assert found["micro_batches"] == list(SIZES)


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_windows_are_the_whole_batch(wrapped, kind):
    """Weights, loss, weight and norm are those of one process with the micro-batches of all ranks."""
    for seen in wrapped:
        _assert_same(seen[kind])


def _reductions(window, key="allreduce"):
    return [counts.get(key, 0) for counts in window]


@pytest.mark.parametrize("kind", ["bucket_view", "unused", "clip", "clip_fused", "scaled"])
def test_one_micro_batch_communicates(wrapped, kind):
    """In full windows only the last micro-batch sends gradients, from the first window on."""
    for seen in wrapped:
        sent = seen[kind]["found"]["sent"]
        for index, window in enumerate(sent):
            first, *middle, last = (
                _reductions(window) if len(window) > 1 else (0, *_reductions(window))
            )
            agreed = 1 if index == 0 else 0  # on what to divide by, once per run
            assert first == agreed, (index, sent)
            assert middle == [0] * len(middle), (index, sent)
            # The gradients, or (in a short window) what has some where, and them; the weights.
            unused = 1 if kind == "unused" and len(window) == WANTED else 0
            most = 2 + unused if len(window) == WANTED else 3
            assert last == most, (index, sent)


def test_one_reduction_per_window(wrapped):
    """The wrapper's own hook ran once per window, in short ones too."""
    for seen in wrapped:
        assert seen["plain"]["reduced"] == len(SIZES)


def test_flags_are_as_they_were(wrapped):
    """After the run the wrapper communicates as before."""
    assert all(kind["synced"] for seen in wrapped for kind in seen.values())


def test_static_graph_communicates_once_more_at_most(wrapped):
    """A static graph must communicate in the first backward of all, and after it once per window."""
    for seen in wrapped:
        sent = [sum(_reductions(window)) for window in seen["static"]["found"]["sent"]]
        assert sent[1] == 2
        assert sent[4] == 2


def _four():
    seen = {}
    for name in ("plain", "clip"):
        clip = 0.1 if name == "clip" else None
        bare = Net()
        found = _train(DistributedDataParallel(copy.deepcopy(bare)), clip=clip)
        seen[name] = {"found": found, "expected": _at_once(bare, "sgd", SIZES, 4, clip)}
    seen["parts"] = _parts_of_unequal_number()
    return seen


def _parts_of_unequal_number():
    """Splits one batch per window, on each rank in another number of parts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bare, lengths = Net(), (6, 4, 6, 5)

    def data(window, micro_batch, which):
        x, _ = _rows(window, micro_batch, which)
        return x.repeat(6, 1)[: lengths[window]], torch.ones(lengths[window], dtype=torch.float64)

    expected = _at_once(bare, "sgd", (1,) * 4, ranks, data=data)
    model = DistributedDataParallel(copy.deepcopy(bare))
    optimizer, sent = _optimizer(model, "sgd"), []
    with gradwatch.watch(model, optimizer) as watcher:
        for window in range(4):
            with CountCalls() as collectives:
                # Of six rows the first rank makes two parts, the second one three.
                for x, kept in watcher.micro_batches(data(window, 0, rank), 3 if rank == 0 else 2):
                    watcher.backward(_loss(model, (x, kept)))
                assert watcher.step()
            sent.append(collectives.sent["allreduce"])
    steps = watcher.history.steps()
    return {
        "found": {
            "weights": {n: p.detach().clone() for n, p in model.module.named_parameters()},
            "losses": list(steps["loss"]),
            "norms": list(steps["grad_norm"]),
            "weight": list(steps["weight"]),
            "micro_batches": list(steps["micro_batches"]),
            "sent": sent,
        },
        "expected": expected,
    }


@pytest.fixture(scope="module")
def four():
    """What each of four ranks saw."""
    return on_ranks(_four, 4)


@pytest.mark.parametrize("kind", ["plain", "clip"])
def test_four_ranks(four, kind):
    """The same on four ranks."""
    for seen in four:
        _assert_same(seen[kind])


def test_ranks_with_another_number_of_parts(four):
    """Ranks may split their batches into different numbers of parts: each counts by its examples."""
    for rank, seen in enumerate(four):
        found, expected = seen["parts"]["found"], seen["parts"]["expected"]
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-12, atol=1e-14)
        for name in ("losses", "norms", "weight"):
            assert found[name] == pytest.approx(expected[name], rel=1e-9)
        assert found["micro_batches"] == ([2, 2, 2, 2] if rank == 0 else [3, 2, 3, 3])
        # What to divide by is agreed on in the first window; gradients and weights in each.
        assert found["sent"] == [3, 2, 2, 2]


def _sharded_net(mesh=None):
    from torch.distributed.fsdp import fully_shard

    model = Net()
    for module in (model.first, model.last, model):
        fully_shard(module, mesh=mesh)
    return model


def _sharded(hybrid):
    mesh = None
    if hybrid:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    seen = {}
    for name, training in {
        "plain": {},
        "clip": {"clip": 0.1},
        "scaled": {"scaler": _scaler()},
    }.items():
        expected = _at_once(Net(), "sgd", SIZES, dist.get_world_size(), training.get("clip"))
        model = _sharded_net(mesh)
        found = _train(model, **training)
        states = [m._get_fsdp_state() for m in (model, model.first, model.last)]
        flags = [g.reduce_grads for s in states for g in getattr(s, "_fsdp_param_groups", [])]
        seen[name] = {"found": found, "expected": expected, "flags": flags}
    return seen


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "hybrid"])
def sharded(request):
    """What each rank saw under FSDP2, sharded over two ranks or over two times two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return on_ranks(_sharded, request.param, hybrid=request.param == 4)


@fsdp2
@pytest.mark.parametrize("kind", ["plain", "clip", "scaled"])
def test_sharded_windows_are_the_whole_batch(sharded, kind):
    """Under FSDP2 too, sharded over all ranks or over some."""
    for seen in sharded:
        _assert_same(seen[kind])


@fsdp2
@pytest.mark.parametrize("kind", ["plain", "clip"])
def test_sharded_micro_batches_reduce_once(sharded, kind):
    """Each of two layers is reduced once per window, in short ones too."""
    for seen in sharded:
        for window in seen[kind]["found"]["sent"]:
            reduced = _reductions(window, "reduce_scatter_base")
            assert reduced == [0] * (len(window) - 1) + [2], seen[kind]["found"]["sent"]
        assert all(seen[kind]["flags"])
