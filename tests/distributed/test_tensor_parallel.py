"""Tensor parallelism in real processes: norms and clips are those of one process in float64."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradwatch
from tests.support import float64
from tests.support.launch import on_ranks

STEPS, LIMIT, WORDS, WIDTH, LENGTH = 4, 0.2, 12, 8, 8
CLOSE = 3e-4

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="tensor parallelism on CPUs needs torch 2.9 or newer"
)


class _Net(nn.Module):
    """An embedding, a norm and two linear layers: what sequence parallelism treats differently."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words):
        hidden = self.norm(self.embed(words))
        return self.head(self.narrow(self.wide(hidden).relu())).clone()  # FSDP2 wants no view


def _net():
    torch.manual_seed(3)
    return _Net()


def _words(step, part):
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randint(WORDS, (4, LENGTH), generator=generator)


def _loss(model, words):
    scores = model(words)
    return nn.functional.cross_entropy(scores.reshape(-1, WORDS), words.reshape(-1).roll(1))


def _parallelize(model, mesh, sequence):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    between = Shard(1) if sequence else Replicate()
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "wide": ColwiseParallel(input_layouts=between),
        "narrow": RowwiseParallel(output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)


def _whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _train(sequence, data):
    """Trains on a mesh of `data` copies, and returns norms, factors and weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tensor = dist.get_world_size() // data
    model, part = _net(), 0
    if data == 1:
        _parallelize(model, init_device_mesh("cpu", (tensor,)), sequence)
    else:
        mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
        _parallelize(model, mesh["tensor"], sequence)
        fully_shard(model, mesh=mesh["data"])
        part = mesh.get_local_rank("data")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gradwatch.watch(
        model, optimizer, clip=LIMIT, statistics=("norm", "mean", "weight_norm")
    ) as watcher:
        for step in range(STEPS):
            _loss(model, _words(step, part)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = {name: _whole(p).tolist() for name, p in model.named_parameters()}
        nan = _poisoned_step(model, optimizer, _words(STEPS, part))
    table = watcher.history.parameters().query(f"step <= {STEPS}")
    events = watcher.history.events()
    return {
        "steps": watcher.history.steps().head(STEPS).drop(columns="time_s").to_dict("list"),
        "weights": weights,
        "nan": nan,
        "events": events[["parameter", "nan_count", "rank"]].to_numpy().tolist(),
        **{
            name: table.pivot_table(index="step", columns="parameter", values=name).to_dict("list")
            for name in ("grad_norm", "mean", "weight_norm")
        },
    }


def _poisoned_step(model, optimizer, words):
    """Steps with a NaN in each rank's part of a gradient; returns how many are in the whole."""
    _loss(model, words).backward()
    gradient = model.embed.weight.grad
    gradient.to_local().view(-1)[0] = math.nan
    count = gradient.full_tensor().isnan().sum().item()
    optimizer.step()
    return count


def _reference(data):
    """One process in float64, with the batches of all ranks."""
    model = float64.widen_module(_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = {"total": [], "grad_norm": [], "mean": [], "weight_norm": []}
    for step in range(STEPS):
        for part in range(data):
            (_loss(model, _words(step, part)) / data).backward()
        named = dict(model.named_parameters())
        seen["grad_norm"].append({name: p.grad.norm().item() for name, p in named.items()})
        seen["mean"].append({name: p.grad.mean().item() for name, p in named.items()})
        seen["weight_norm"].append({name: p.norm().item() for name, p in named.items()})
        seen["total"].append(math.hypot(*seen["grad_norm"][-1].values()))
        nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    return {**seen, "weights": dict(model.named_parameters())}


SETTINGS = {
    "rowwise_embedding": {"ranks": 2, "sequence": False, "data": 1},
    "sequence": {"ranks": 2, "sequence": True, "data": 1},
    "sequence_4": {"ranks": 4, "sequence": True, "data": 1},
    "sequence_and_fsdp": {"ranks": 4, "sequence": True, "data": 2},
}


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request):
    """What each rank saw, clipped by gradwatch, and what is right."""
    setting = SETTINGS[request.param]
    ranks, sequence, data = setting["ranks"], setting["sequence"], setting["data"]
    seen = on_ranks(_train, ranks, sequence=sequence, data=data)
    return seen, _reference(data)


def test_norms_are_those_of_one_process(trained):
    """Of every parameter, though gradients may lie on the mesh unlike their parameters."""
    ranks, right = trained
    for seen in ranks:
        assert seen["steps"]["grad_norm"] == pytest.approx(right["total"], rel=CLOSE)
        assert seen["grad_norm"] == _close(right["grad_norm"])


def test_statistics_are_those_of_one_process(trained):
    """Those of gradients, and those of weights, which lie on the mesh in another way."""
    ranks, right = trained
    for seen in ranks:
        assert seen["weight_norm"] == _close(right["weight_norm"])
        assert seen["mean"] == _close(right["mean"], 1e-6)


def _close(rows, absolute=0.0):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: pytest.approx(one, rel=CLOSE, abs=absolute) for name, one in columns.items()}


def test_the_clip_takes_the_factor_of_one_process(trained):
    """And so the weights after it are the same."""
    ranks, right = trained
    factors = [min(1.0, LIMIT / total) for total in right["total"]]
    assert min(factors) < 0.9
    for seen in ranks:
        assert seen["steps"]["clip_coef"] == pytest.approx(factors, rel=CLOSE)
        for name, values in seen["weights"].items():
            weights = right["weights"][name]
            assert torch.allclose(torch.tensor(values).double(), weights, rtol=CLOSE, atol=1e-5)


def test_nan_elements_are_counted_once(trained):
    """However many ranks hold them; which of the ranks they came from is not known."""
    ranks, _ = trained
    for seen in ranks:
        assert seen["events"] == [["embed.weight", seen["nan"], -1]]
