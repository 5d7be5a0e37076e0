"""How a model is spread over ranks: DistributedDataParallel, fully_shard, parallelize_module."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.support.places import HOST, Place
from tests.support.zoo import units_of


def _at_once(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Layout:
    """A number of ranks, and how they share a model.

    Attributes:
        ranks: How many there are.
        wrap: Makes of the whole model, the same on every rank, what a rank trains.
        micro_batch: Gives the context of a micro-batch, which is the last of its step or not.
        copies: How many consecutive ranks work on the same data.
        place: What kind of device each rank has.
    """

    ranks: int
    wrap: Callable[[nn.Module], nn.Module]
    micro_batch: Callable[[nn.Module, bool], AbstractContextManager[object]] = _at_once
    copies: int = 1
    place: Place = HOST


def alone(place: Place) -> Layout:
    """Return the layout of one process that trains on a device, or on the host."""
    return Layout(1, place.to, place=place)


ALONE = alone(HOST)

HOOKS = {"fp16_hook": default_hooks.fp16_compress_hook}


def ddp(ranks: int = 2, *, hook: str = "no_hook", no_sync: bool = True, **options: bool) -> Layout:
    """Return the layout of DistributedDataParallel, communicating at the last micro-batch only."""

    def wrap(model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model, **options)
        if hook in HOOKS:
            wrapped.register_comm_hook(None, HOOKS[hook])
        return wrapped

    def micro_batch(model: nn.Module, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or not no_sync else model.no_sync()

    return Layout(ranks, wrap, micro_batch)


def fsdp(
    *shape: int, each: bool = True, mixed: bool = False, no_sync: bool = True, reshard: bool = True
) -> Layout:
    """Return the layout of fully_shard, on a mesh of one dimension (FSDP) or of two (HSDP).

    Args:
        *shape: Shape of the mesh.
        each: Whether each unit of the model is sharded by itself.
        mixed: Whether to compute in bfloat16 and reduce in float32.
        no_sync: Whether gradients stay unreduced up to the last micro-batch.
        reshard: Whether parameters are gathered anew for the backward.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    )

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshard}
        for unit in units_of(model) if each else []:
            fully_shard(unit, **options)
        return fully_shard(model, **options)

    def micro_batch(model: nn.Module, last: bool) -> AbstractContextManager[object]:
        model.set_requires_gradient_sync(last or not no_sync)
        return nullcontext()

    ranks = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    return Layout(ranks, wrap, micro_batch)


def tensor_parallel(shards: int = 1, *, whole: bool = False) -> Layout:
    """Return the layout of the perceptron whose matrices are split over two ranks.

    Args:
        shards: Over how many groups of two ranks fully_shard splits the parameters as well.
        whole: Whether the last layer is split too; else it stays a plain one on every rank.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if whole:
        plan["4"] = ColwiseParallel(output_layouts=Replicate())

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (shards, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        return fully_shard(model, mesh=mesh["shard"]) if shards > 1 else model

    return Layout(2 * shards, wrap, copies=2)
