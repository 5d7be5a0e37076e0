"""Memory: nothing grows with the number of steps."""

from __future__ import annotations

import gc
from typing import Any

import torch

import gradwatch
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import batch, loss_of, net

KEPT = 64  # steps in the watcher's memory


@check()
def memory(place: Place) -> Found:
    """Device memory, pinned memory and tensors of the host stay as many as they were."""
    steps = 240 if place.small else 1500
    model = net(place.device)
    optimizer = adamw(model.parameters())
    marks = []
    watcher = gradwatch.watch(model, optimizer, clip="auto", buffer_size=KEPT)
    with place.late(), watcher:
        for step in range(steps):
            loss_of(model, batch(step % 7, place.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (steps // 3, steps - 1):
                watcher.flush()
                marks.append(_held(place))
    early, end = marks
    for name, most in (("device", 2**16), ("pinned", 2**16), ("tensors", 20)):
        require(end[name] <= early[name] + most, f"{name}: {early[name]}, then {end[name]}")
    return {name: [early[name], end[name]] for name in early}


def _held(place: Place) -> dict[str, int]:
    """Returns bytes on the device, bytes of pinned memory, and how many tensors Python knows."""
    place.synchronize()
    gc.collect()
    # By type: isinstance() asks some modules for a class, of which they then warn.
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    if not place.cuda:
        return {"device": 0, "pinned": 0, "tensors": tensors}
    pinned: dict[str, Any] = {}
    if hasattr(torch.cuda, "host_memory_stats"):  # from torch 2.7 on
        pinned = torch.cuda.host_memory_stats()
    bytes_pinned = int(pinned.get("allocated_bytes.current", 0))
    return {
        "device": torch.cuda.memory_allocated(),
        "pinned": bytes_pinned,
        "tensors": tensors,
    }
