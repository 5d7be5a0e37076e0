"""FSDP: models that torch shards over ranks; the older kind is refused, the newer one supported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from gradwatch.observe.shards import is_sharded

FSDP1 = (
    "watch(model=) got a model with FullyShardedDataParallel in it (FSDP1), whose flattened "
    "parameters show each rank another part of the gradients: norms would be wrong, and each rank "
    "would clip by its own. Shard the model with torch.distributed.fsdp.fully_shard() instead, or "
    "with ShardingStrategy.NO_SHARD or DistributedDataParallel if it fits on one device."
)


def fully_sharded(model: object) -> Iterator[nn.Module]:
    """Lists the modules of a model that ``fully_shard`` (FSDP2) was applied to."""
    kind = _kind("FSDPModule")
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    return (module for module in modules if isinstance(module, kind))


def refuse_fsdp1(model: object) -> None:
    """Refuses a model whose gradients no rank can see rightly.

    Args:
        model: What is to be watched.

    Raises:
        ValueError: If it holds a ``FullyShardedDataParallel`` that shards anything.
    """
    kind = _kind("FullyShardedDataParallel")
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    for module in modules:
        if isinstance(module, kind):
            strategy: Any = getattr(module, "sharding_strategy", None)
            if getattr(strategy, "name", "") != "NO_SHARD":
                raise ValueError(FSDP1)


def reshard(model: object) -> None:
    """Has FSDP2 put its shards back in place of whole parameters.

    After a forward without a backward, the outermost module still holds the whole parameters,
    which are other tensors than those that the optimizer has. The next forward gathers them anew.

    Args:
        model: What is to be watched.
    """
    for module in fully_sharded(model):
        if not all(map(is_sharded, module.parameters())):
            _reshard(module)


def _reshard(module: Any) -> None:
    module.reshard()


def _kind(name: str) -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
