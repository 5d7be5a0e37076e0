"""Ranks: which process of a distributed training this is."""

from __future__ import annotations

import torch.distributed as dist


def is_distributed() -> bool:
    """Tells whether a process group is set up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 where there is no process group."""
    return dist.get_rank() if is_distributed() else 0
