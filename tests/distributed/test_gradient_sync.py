"""Which micro-batches communicate, in real processes: the gradients are those of all the data."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.hooks.data_parallel import DataParallel, GradientSync, _buckets, can_hold
from tests.support.calls import CountCalls
from tests.support.float64 import whole
from tests.support.launch import on_ranks

WANTED = 3
SIZES = (3, 2, 1, 3, 3)  # of the windows; those of fewer than are wanted end early

fsdp2 = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer"
)


class Plain(nn.Module):
    """Two layers and a buffer that every forward of a wrapper may broadcast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(1))
        self.double()

    def forward(self, x, rank):
        return self.last(torch.tanh(self.first(x)) * self.scale)


class Unused(Plain):
    """One parameter that only the last rank uses, and one that none does."""

    def __init__(self):
        super().__init__()
        self.seldom, self.never = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()

    def forward(self, x, rank):
        out = super().forward(x, rank)
        return out + self.seldom(x) if rank else out


class Sparse(Plain):
    """An embedding whose gradient is sparse, and of which ranks use other rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8, sparse=True).double()

    def forward(self, x, rank):
        rows = self.table((x[:, 0].abs() * 3).long().clamp(max=9))
        return self.last(torch.tanh(self.first(x)) + rows)


class Mixed(Plain):
    """Two dtypes, so two buffers."""

    def __init__(self):
        super().__init__()
        self.float()
        self.first.bfloat16()

    def forward(self, x, rank):
        return self.last(torch.tanh(self.first(x.bfloat16()).float()))


class Blocks(nn.Module):
    """Layers to be sharded one by one."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)
        )
        self.head = nn.Linear(4, 1)
        self.to(dtype)

    def forward(self, x, rank):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _batch(micro_batch, rank):
    generator = torch.Generator().manual_seed(100 * micro_batch + rank)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def _backward(model, micro_batch, rank, share=WANTED):
    dtype = list(model.parameters())[-1].dtype
    output = model(_batch(micro_batch, rank).to(dtype), rank)
    (output.square().mean() / share).backward()


def _window(model, sync, start, size):
    """Runs a window as the managed loop does; tells what was sent in each micro-batch."""
    sent = []
    for k in range(size):
        with CountCalls() as collectives:
            _backward(model, start + k, dist.get_rank())
        sent.append(dict(collectives.sent))
        sync.hold_back() if k + 1 < WANTED - 1 else sync.restore()
    with CountCalls() as collectives:
        if size < WANTED:
            sync.reduce_()
    sync.hold_back()
    return [*sent, dict(collectives.sent)]


def _expected(bare, start, size):
    """The gradients of the mean over ranks, in one process, by name."""
    bare = copy.deepcopy(bare)
    for micro_batch in range(start, start + size):
        for rank in range(dist.get_world_size()):
            _backward(bare, micro_batch, rank, WANTED * dist.get_world_size())
    return {name: p.grad for name, p in bare.named_parameters()}


def _distance(found, expected):
    """The largest difference between gradients; infinite where one is there and one is not."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return (whole(found) - whole(expected)).abs().max().item()


def _train(model, bare, names=None):
    """Trains a few windows without steps: the error of each, and what each sent."""
    sync = GradientSync.of(model, DataParallel.of(model))
    sync.hold_back()
    errors, sent, start = [], [], 0
    for index, size in enumerate(SIZES):
        sent.append(_window(model, sync, start, size))
        expected = _expected(bare, start, size)
        trained = names(model) if names else model.module.named_parameters()
        found = {name: p.grad for name, p in trained}
        assert found.keys() == expected.keys()
        errors.append(max(_distance(found[name], expected[name]) for name in expected))
        model.zero_grad(set_to_none=index % 2 == 0 or "table.weight" in found)
        start += size
    return {"errors": errors, "sent": sent, "held": sync.is_held}


def _wrapped():
    """Trains each kind of wrapper; each in the same two processes."""
    kinds = {
        "plain": (Plain, {}),
        "bucket_view": (Plain, {"gradient_as_bucket_view": True}),
        "unused": (Unused, {"find_unused_parameters": True}),
        "unused_view": (Unused, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        "sparse": (Sparse, {}),
        "mixed": (Mixed, {}),
        "static": (Plain, {"static_graph": True}),
        "static_view": (Plain, {"static_graph": True, "gradient_as_bucket_view": True}),
    }
    seen = {}
    for kind, (build, options) in kinds.items():
        model = DistributedDataParallel(build(), **options)
        seen[kind] = _train(model, build())
    return seen


@pytest.fixture(scope="module")
def wrapped():
    """What each rank saw."""
    return on_ranks(_wrapped, 2)


EXACT = ["plain", "bucket_view", "unused", "unused_view", "sparse", "static", "static_view"]


@pytest.mark.parametrize("kind", EXACT)
def test_wrapped_windows_have_the_gradient_of_all_the_data(wrapped, kind):
    """Full windows, and short ones reduced afterwards, whatever came before."""
    for seen in wrapped:
        assert max(seen[kind]["errors"]) < 1e-14


def test_dtypes_are_reduced_apart(wrapped):
    """Parameters of two dtypes have the right gradient, to the rounding of the coarser one."""
    for seen in wrapped:
        assert max(seen["mixed"]["errors"]) < 1e-2
        assert seen["mixed"]["sent"][2][1] == {"allreduce": 3}


def test_buffers_are_of_25_mib_at_most():
    """What is larger by itself goes alone; another dtype goes apart."""
    mib = [10, 10, 10, 40, 1]
    tensors = [torch.empty(size * 2**18, device="meta") for size in mib]
    tensors.insert(1, torch.empty(2**19, dtype=torch.bfloat16, device="meta"))
    sizes = [[t.nbytes // 2**20 for t in bucket] for bucket in _buckets(tensors)]
    assert sizes == [[10, 10], [10], [40], [1], [1]]


def test_only_the_last_micro_batch_reduces(wrapped):
    """One reduction per window; a short one has none but ours, and tells who has a gradient."""
    for kind in ("plain", "bucket_view"):
        full, short, single, *later = wrapped[0][kind]["sent"]
        assert [sent.get("allreduce", 0) for sent in full] == [0, 0, 1, 0]
        assert [sent.get("allreduce", 0) for sent in short] == [0, 0, 2]
        assert [sent.get("allreduce", 0) for sent in single] == [0, 2]
        assert later == [full, full]


def test_buffers_are_broadcast_once_per_window(wrapped):
    """By the first forward after a window, as torch does it; short windows make no difference."""
    for kind in EXACT[1:5]:
        for window in wrapped[0][kind]["sent"]:
            assert "broadcast" in window[0]
            assert not any("broadcast" in sent for sent in window[1:])


def test_a_static_graph_communicates_in_its_first_backward(wrapped):
    """Torch fails otherwise; from the second micro-batch on it is held back."""
    first, *_, last = wrapped[0]["static"]["sent"]
    assert ["allreduce" in sent for sent in first] == [True, False, True, False]
    assert ["allreduce" in sent for sent in last] == [False, False, True, False]


class Around(nn.Module):
    """A model with a wrapper in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, rank):
        return self.inner(x, rank)


def _summed(calls, bucket):
    calls.append(bucket.index())
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _special():
    """Wrappers that are not quite ordinary."""
    seen, calls = {}, []
    hooked = DistributedDataParallel(Plain())
    hooked.register_comm_hook(calls, _summed)
    sync = GradientSync.of(hooked, DataParallel.of(hooked))
    sync.hold_back()
    errors = []
    for start, size in ((0, 3), (3, 2), (5, 3)):
        _window(hooked, sync, start, size)
        expected = _expected(Plain(), start, size)
        found = hooked.module.named_parameters()
        errors += [_distance(p.grad, 2 * expected[name]) for name, p in found]
        hooked.zero_grad()
    seen["summed"] = (max(errors), calls)

    bare = Plain()
    hide = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    hide(bare, ["first.bias"])
    around = Around(DistributedDataParallel(bare))
    sync = GradientSync.of(around, DataParallel.of(around))
    sync.hold_back()
    _backward(around, 0, dist.get_rank())
    own = bare.first.bias.grad.clone()
    sync.reduce_()
    expected = _expected(Plain(), 0, 1)
    seen["ignored"] = torch.equal(bare.first.bias.grad, own)
    seen["inner"] = _distance(bare.first.weight.grad, expected["first.weight"])
    sync.reduce_()
    seen["again"] = _distance(bare.first.weight.grad, expected["first.weight"])

    twice = Plain()
    wrappers = [DistributedDataParallel(twice) for _ in range(2)]
    sync = GradientSync.of(twice, DataParallel.of(twice))
    sync.hold_back()
    _backward(wrappers[0], 0, dist.get_rank())
    with CountCalls() as collectives:
        sync.reduce_()
    seen["twice"] = collectives.sent["allreduce"]
    seen["outer"] = _distance(twice.last.weight.grad, expected["last.weight"])

    table = DistributedDataParallel(Sparse())
    table.register_comm_hook([], _summed)
    sync = GradientSync.of(table, None)
    sync.hold_back()
    _backward(table, 0, dist.get_rank())
    try:
        sync.reduce_()
    except RuntimeError as error:
        seen["refused"] = str(error)

    static = DistributedDataParallel(Plain(), static_graph=True)
    sync = GradientSync.of(static, None)
    seen["can_hold"] = [can_hold(static)]
    sync.hold_back()
    seen["is_held"] = [sync.is_held]
    _backward(static, 0, dist.get_rank())
    sync.hold_back()
    seen["can_hold"].append(can_hold(static))
    seen["is_held"].append(sync.is_held)
    sync.restore()
    seen["is_held"].append(sync.is_held)
    return seen


@pytest.fixture(scope="module")
def special():
    """What each rank saw."""
    return on_ranks(_special, 2)


def test_a_communication_hook_reduces_short_windows_too(special):
    """A hook that adds up, and does not average, is called once per window, of whatever length."""
    for seen in special:
        error, calls = seen["summed"]
        assert error < 1e-14
        assert calls == [0, 0, 0]


def test_a_wrapper_inside_a_model_is_found(special):
    """What it ignores keeps this rank's gradient; averaging again changes nothing."""
    for seen in special:
        assert seen["ignored"]
        assert seen["inner"] < 1e-14
        assert seen["again"] == seen["inner"]


def test_a_model_wrapped_twice_is_reduced_once(special):
    """A wrapper that nobody uses any more may be around on one rank, and not on another."""
    for seen in special:
        assert seen["outer"] < 1e-14
        assert seen["twice"] == 2  # who has a gradient, and the gradients


def test_what_cannot_be_reduced_afterwards_is_refused(special):
    """The message says why, and what to write."""
    for seen in special:
        assert "hook is registered, and some of them are sparse" in seen["refused"]
        assert "watcher.micro_batches(...)" in seen["refused"]


def test_a_wrapper_that_cannot_hold_back_says_so(special):
    """A static graph can only after its first backward; nothing is held until then."""
    for seen in special:
        assert seen["can_hold"] == [False, True]
        assert seen["is_held"] == [False, True, False]


def _shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _names(model):
    return model.named_parameters()


def _sharded(hybrid):
    """Trains sharded models; each in the same processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    kinds = {"resharded": {}, "whole": {"reshard_after_forward": False}}
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        kinds = {"hybrid": {"mesh": mesh}}
    seen = {}
    for kind, options in kinds.items():
        seen[kind] = _train(_shard(Blocks(), **options), Blocks(), _names)
    wide = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for kind, policy in (("wide", wide), ("narrow", {"param_dtype": torch.bfloat16})):
        options["mp_policy"] = MixedPrecisionPolicy(**policy)
        seen[kind] = _against_synced(_shard(Blocks(torch.float32), **options), options)
    return seen


def _against_synced(model, options):
    """The largest difference to a model whose short windows know that they are short."""
    other = _shard(Blocks(torch.float32), **options)
    sync = GradientSync.of(model, DataParallel.of(model))
    sync.hold_back()
    errors, start = [], 0
    for size in SIZES:
        _window(model, sync, start, size)
        for k in range(size):
            other.set_requires_gradient_sync(k == size - 1)
            _backward(other, start + k, dist.get_rank())
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        errors += [_distance(p.grad, q.grad) for p, q in pairs]
        model.zero_grad()
        other.zero_grad()
        start += size
    return max(errors)


@pytest.fixture(scope="module", params=[2, 4], ids=["1d", "hybrid"])
def sharded(request):
    """What each rank saw."""
    return on_ranks(_sharded, request.param, hybrid=request.param == 4)


@fsdp2
def test_sharded_windows_have_the_gradient_of_all_the_data(sharded):
    """Full windows, and short ones reduced afterwards, on one dimension and on two."""
    for seen in sharded:
        for kind in seen.keys() & {"resharded", "whole", "hybrid"}:
            assert max(seen[kind]["errors"]) < 1e-14


@fsdp2
def test_sharded_short_windows_round_like_torch(sharded):
    """Under mixed precision they are bit for bit what a last micro-batch that communicates gives."""
    for seen in sharded:
        assert seen["wide"] == seen["narrow"] == 0.0


@fsdp2
def test_shards_are_reduced_once_per_window(sharded):
    """One reduce-scatter per group and window, in the last micro-batch or after a short one."""
    for kind in sharded[0].keys() & {"resharded", "whole", "hybrid"}:
        for window in sharded[0][kind]["sent"]:
            counts = [sent.get("reduce_scatter_base", 0) for sent in window]
            if len(window) == 1 + WANTED:
                assert counts == [0, 0, 4, 0]
            else:
                assert counts == [0] * (len(window) - 1) + [4]
            if kind == "hybrid":
                assert [sent.get("allreduce", 0) for sent in window] == counts


def _flags():
    """What is left of the flags that a user has set."""
    wrapper = DistributedDataParallel(Plain())
    sync = GradientSync.of(wrapper, DataParallel.of(wrapper))
    seen = []
    for wanted in (True, False):
        wrapper.require_backward_grad_sync = wanted
        for change in (sync.restore, sync.hold_back, sync.restore):
            change()
            seen.append(wrapper.require_backward_grad_sync)
    wrapper.require_backward_grad_sync = True
    sync.restore()
    return [*seen, wrapper.require_backward_grad_sync]


def _sharded_flags():
    """The same for shards; and what is said where torch has changed."""
    model = _shard(Blocks())
    model.blocks[0].set_requires_all_reduce(False)
    model.blocks[1].set_requires_gradient_sync(False)
    sync = GradientSync.of(model, DataParallel.of(model))
    seen = [_sharded_flags_of(model)]
    for change in (sync.hold_back, sync.restore, sync.restore):
        change()
        seen.append(_sharded_flags_of(model))
    sync.hold_back()
    _backward(model, 0, dist.get_rank())
    model.set_is_last_backward(False)
    sync.reduce_()
    state = model._get_fsdp_state()
    seen += [_sharded_flags_of(model), state._state_ctx.is_last_backward]
    del type(state)._root_post_backward_final_callback
    try:
        sync.reduce_()
    except RuntimeError as error:
        seen.append(str(error))
    return seen


def _sharded_flags_of(model):
    groups = [b._get_fsdp_state()._fsdp_param_group for b in (*model.blocks, model)]
    return [(group.reduce_grads, group.all_reduce_grads) for group in groups]


def test_flags_are_put_back():
    """As the user had set them, and only once."""
    for seen in on_ranks(_flags, 2):
        assert seen == [True, False, True, False, False, False, True]


@fsdp2
def test_flags_of_shards_are_put_back():
    """Each as it was; reducing changes none; where torch has changed, it is said what to write."""
    users = [(True, False), (False, False), (True, True), (True, True)]
    held = [(False, False)] * 4
    for *seen, message in on_ranks(_sharded_flags, 2):
        assert seen == [users, held, users, users, held, False]
        assert "_root_post_backward_final_callback" in message
        assert "watcher.micro_batches(...)" in message


def _layouts():
    """Who averages, for each way to lay a model out over four ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([member]) for member in range(4)]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    inner = Plain()
    outer = DistributedDataParallel(Around(inner))
    tensor_parallel = Blocks()
    plan = {"blocks.*.0": ColwiseParallel(output_layouts=_replicated())}
    parallelize_module(tensor_parallel, mesh["shard"], plan)
    paired = DistributedDataParallel(Plain(), process_group=pairs[rank // 2])
    layouts = {
        "bare": Plain(),
        "outer": outer,
        "inner": inner,
        "alone": DistributedDataParallel(Plain(), process_group=alone[rank]),
        "paired": paired,
        "experts": nn.ModuleList([DistributedDataParallel(Plain()), paired]),
        "parallel": tensor_parallel,
        "one_dimension": _shard(Blocks()),
        "hybrid": _shard(Blocks(), mesh=mesh),
    }
    found = {kind: DataParallel.of(model) for kind, model in layouts.items()}
    _shard(tensor_parallel, mesh=mesh["replicate"])
    found["sharded_and_parallel"] = DataParallel.of(tensor_parallel)
    found["by_hand"] = DataParallel(4, [], [mesh.get_group(0), mesh.get_group(1)])
    seen = {kind: _sums(ranks) for kind, ranks in found.items()}
    seen["same_wrapper"] = found["inner"].wrappers[0] is outer
    seen["no_sync"] = GradientSync.of(layouts["bare"], None)
    crossed = DistributedDataParallel(Plain(), process_group=across[rank % 2])
    try:
        DataParallel.of(nn.ModuleList([crossed, paired]))
    except ValueError as error:
        seen["crossed"] = str(error)
    return seen


def _replicated():
    from torch.distributed.tensor import Replicate

    return Replicate()


def _sums(ranks):
    if ranks is None:
        return None
    own = torch.tensor([1.0, 2.0 ** dist.get_rank()])
    with CountCalls() as collectives:
        total = ranks.sum_(own.clone()).tolist()
    largest = ranks.max_(own)[1].item()
    return ranks.ranks, *total, largest, collectives.sent["allreduce"]


@fsdp2
def test_the_ranks_that_average_are_found_in_every_layout():
    """Wrapped inside or outside, sharded on one dimension or two; tensor parallelism is no part."""
    for rank, seen in enumerate(on_ranks(_layouts, 4)):
        whole = (4, 4.0, 15.0, 8.0, 1)
        pair = (2, 2.0, 3.0, 2.0, 1) if rank < 2 else (2, 2.0, 12.0, 8.0, 1)
        column = (2, 2.0, 5.0, 4.0, 1) if rank % 2 == 0 else (2, 2.0, 10.0, 8.0, 1)
        for kind in ("outer", "inner", "experts", "one_dimension", "hybrid"):
            assert seen[kind] == whole, kind
        assert seen["by_hand"] == (*whole[:-1], 2)
        assert seen["paired"] == pair
        assert seen["sharded_and_parallel"] == column
        assert seen["bare"] is seen["alone"] is seen["parallel"] is seen["no_sync"] is None
        assert seen["same_wrapper"]
        assert "neither contains the other" in seen["crossed"]
