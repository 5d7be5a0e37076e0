"""watch() in a loop of Fabric on two ranks: DDP and FSDP2, and who logs."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

import gradwatch
from gradwatch_lightning import FabricSink
from tests.support import float64, zoo
from tests.support.launch import on_ranks

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
STEPS = 4

pytestmark = pytest.mark.slow


class Rows(Logger):
    """Keeps what it is given."""

    name, version = "rows", 0

    def __init__(self):
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def made(strategy):
    """Makes a Fabric of two ranks, whose group is there already, with a logger."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ["GROUP_RANK"] = "0"
    warnings.simplefilter("ignore")
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, loggers=Rows())
    fabric.launch()
    return fabric


def sgd(model):
    """Makes an optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(fabric, model, optimizer, bare, accumulate=1, max_norm=None):
    """Trains; returns the norms before and after the clip, in float64, over all ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    before, after = [], []
    for _ in range(STEPS):
        for k in range(accumulate):
            x = torch.randn(8, 4, generator=generator)
            with fabric.no_backward_sync(model, enabled=k < accumulate - 1):
                fabric.backward((model(x) - 1).square().mean() / accumulate)
        before.append(float64.gradient_norm(bare))
        if max_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        after.append(float64.gradient_norm(bare))
        optimizer.step()
        optimizer.zero_grad()
    return before, after


def told(watcher, fabric, before, after, bare):
    """What a rank says of its training."""
    steps = watcher.history.steps()
    return {
        "norms": (steps.grad_norm.tolist(), before),
        "clipped": (steps.grad_norm_clipped.tolist(), after),
        "micro_batches": steps.micro_batches.tolist(),
        "noise_scale": steps.noise_scale.tolist(),
        "names": watcher.history.parameters().parameter.unique().tolist(),
        "rows": fabric.logger.rows,
        "weights": torch.cat([float64.whole(p).reshape(-1) for p in bare.parameters()]),
        "events": [event.kind for event in watcher.events],
    }


def with_ddp(compiled, accumulate, watched=True):
    """What one rank does under DDP."""
    fabric = made(DDPStrategy(cluster_environment=TorchElasticEnvironment()))
    bare = zoo.small(seed=1)
    module = torch.compile(bare, backend="eager") if compiled else bare
    model, optimizer = fabric.setup(module, sgd(bare))
    if not watched:
        train(fabric, model, optimizer, bare, accumulate, max_norm=0.1)
        return torch.cat([p.detach().reshape(-1) for p in bare.parameters()])
    sinks = [FabricSink(fabric)]
    with gradwatch.watch(model, optimizer, sinks=sinks, on_nonfinite="skip") as watcher:
        before, after = train(fabric, model, optimizer, bare, accumulate, max_norm=0.1)
    return told(watcher, fabric, before, after, bare)


def sharded(model, mesh):
    """Shards a model by FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for layer in (*filter(lambda one: isinstance(one, nn.Linear), model), model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


def with_fsdp2():
    """What one rank does with Fabric's ModelParallelStrategy."""
    strategy = ModelParallelStrategy(sharded, data_parallel_size=2, tensor_parallel_size=1)
    strategy.cluster_environment = TorchElasticEnvironment()
    fabric = made(strategy)
    bare = zoo.small(seed=1)
    model = fabric.setup_module(bare)
    optimizer = fabric.setup_optimizers(sgd(model))
    with gradwatch.watch(model, optimizer, sinks=[FabricSink(fabric)]) as watcher:
        before, after = train(fabric, model, optimizer, bare, max_norm=0.1)
    return told(watcher, fabric, before, after, bare)


def all_of_ddp():
    """Three trainings of one rank, one after the other."""
    return {
        "plain": with_ddp(compiled=False, accumulate=1),
        "accumulated": with_ddp(compiled=True, accumulate=3),
        "unwatched": with_ddp(compiled=False, accumulate=1, watched=False),
    }


def check(ranks):
    """Compares what two ranks have told with each other and with float64."""
    first, second = ranks
    for one in ranks:
        for seen, wanted in (one["norms"], one["clipped"]):
            assert seen == pytest.approx(wanted, rel=1e-6)
        assert one["names"] == NAMES
        assert one["events"] == []
    assert torch.equal(first["weights"], second["weights"])
    tags = [row["gradwatch/grad_norm"] for _, row in first["rows"]]
    assert tags == first["norms"][0]
    assert second["rows"] == []


@pytest.fixture(scope="module")
def ddp():
    """What each of two ranks has seen; they take seconds to import Lightning."""
    return on_ranks(all_of_ddp, 2)


def test_ddp(ddp):
    """Norms are those of the averaged gradients in float64, and rank 0 alone logs."""
    check([one["plain"] for one in ddp])
    assert ddp[0]["plain"]["micro_batches"] == [1] * STEPS


def test_ddp_accumulates(ddp):
    """Micro-batches under no_backward_sync() are counted, and there is a noise scale."""
    check([one["accumulated"] for one in ddp])
    for one in ddp:
        assert one["accumulated"]["micro_batches"] == [3] * STEPS
        assert one["accumulated"]["noise_scale"][-1] >= 0  # not NaN


def test_ddp_trains_as_without(ddp):
    """Weights are bit for bit those of a training that is not watched."""
    for one in ddp:
        assert torch.equal(one["plain"]["weights"], one["unwatched"])


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="FSDP2 on CPUs needs torch 2.9 or newer")
def test_fsdp2():
    """Norms are those over the parts of both ranks, under the names of the module."""
    check(on_ranks(with_fsdp2, 2))
