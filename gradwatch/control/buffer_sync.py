"""What a wrapper communicates in a forward, done ahead of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def broadcast_buffers(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Has the next forwards of wrappers not broadcast their buffers: it is done here, if at all.

    A rank whose forward fails, or that fails before it, leaves the others waiting in it. All ranks
    must call it.

    Args:
        wrappers: The same on every rank, in the same order.
    """
    each: Iterable[Any] = wrappers  # torch leaves these methods without annotations
    for wrapper in each:
        if wrapper._check_sync_bufs_pre_fwd():
            wrapper._sync_buffers()
        # As after a forward that was held back. To reduce what was held back sets it again.
        wrapper.require_forward_param_sync = False
