"""Streams: parts of a step in a stream of their own, and the order of what touches a gradient."""

from __future__ import annotations

from typing import Any

import torch

import gradwatch
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import ALL, Training, batch, loss_of, net, relative

HALF = 6  # layers of the network


@check()
def streams(place: Place) -> Found:
    """The whole step, half of the model, or the optimizer in a side stream: the norms are right."""
    expected = Training({"accumulate": 2}, micro=2).run("cpu").norms
    found = {}
    for part in ("all", "half", "optimizer", "none"):
        found[part] = relative(_norms(place, part, {"accumulate": 2}), expected)
    require(max(found.values()) < 1e-3, f"relative differences: {found}")
    return found


def _norms(place: Place, part: str, options: dict[str, Any], steps: int = 8) -> list[float]:
    """Returns the norms of steps of two micro-batches, with a part of each in a side stream."""
    side, main = place.stream(), place.current_stream()
    model = net(place.device)
    optimizer = adamw(model.parameters())

    def backward(x: torch.Tensor) -> None:
        x.record_stream(side)
        if part == "all":
            side.wait_stream(main)
            with place.on(side):
                place.busy(2)
                loss_of(model, x).backward()
        elif part == "half":
            side.wait_stream(main)
            with place.on(side):
                place.busy(2)
                hidden = model[:HALF](x)
            main.wait_stream(side)
            hidden.record_stream(main)
            (model[HALF:](hidden) - x.sum(1, keepdim=True) / 8).square().mean().backward()
        else:
            loss_of(model, x).backward()

    def step() -> None:
        place.busy(2)
        optimizer.step()
        optimizer.zero_grad()

    with gradwatch.watch(model, optimizer, **options) as watcher:
        for number in range(steps):
            for micro in range(2):
                backward(batch(1000 * micro + number, place.device))
            if part in ("all", "optimizer"):
                side.wait_stream(main)
                with place.on(side):
                    step()
                main.wait_stream(side)
            else:
                step()
    return watcher.history.steps()["grad_norm"].tolist()


@check(cuda=True, alone_s=90)
def sanitizer(place: Place) -> Found:
    """torch.cuda._sanitizer finds no memory that two streams use without an order between them."""
    import torch.cuda._sanitizer as sanitizer

    sanitizer.enable_cuda_sanitizer()  # an unordered use raises from here on
    Training({"clip": 1e-2, "statistics": ALL}, steps=3).run(place.device)
    Training({"accumulate": 2}, steps=3, micro=2).run(place.device)
    norms = _norms(place, "half", {"accumulate": 2, "statistics": ALL}, steps=3)
    require(len(norms) == 3, f"norms {norms}")
    return {"steps": len(norms)}
